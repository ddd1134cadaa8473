"""Whether a configuration holds: its sections by the schema, methods and suites by the models they are registered with.

Nothing stops at the first mistake: all are collected, and one `ConfigurationError` names them.
"""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from baselines.method import Parameters
from baselines.registry import get_method, schema_of
from fusion.errors import UserError, did_you_mean
from harness.config.errors import ConfigurationError, Problem, collecting, problems_of
from harness.config.named_rows import cycle_sentence, cycles, needed_rows, reference_sentences
from harness.config.schema import Config
from harness.evaluation.suite import suite_config

P = TypeVar("P", bound=Parameters)

# What a source cannot be called: the other roles, and what the audit calls all sources together.
_RESERVED = ("target", "teacher", "fused")


def parameters_model(name: str) -> type[Parameters]:
    """The model of a method's parameters. Raises UserError for an unknown method or one that cannot be imported."""
    return schema_of(get_method(name))


def method_parameters(label: str, entry: Mapping[str, Any], schema: type[P]) -> P:
    """The parameters of the row `label`, validated by its method's model. Raises UserError for what is wrong there."""
    given, where = {key: value for key, value in entry.items() if key != "method"}, f"methods.{label}"
    try:
        return schema.model_validate(given)
    except ValidationError as error:
        raise ConfigurationError(where, problems_of(error, schema, given, where)) from None


def resolve(raw: Mapping[str, Any], where: str) -> Config:
    """The configuration that a merged mapping stands for, with the effective parameters of methods and suites.

    where: what messages call it. Raises ConfigurationError with every mistake.
    """
    problems: list[Problem] = []
    needed: dict[str, list[str]] = {}
    methods, sections, roles = raw.get("methods"), raw.get("suites"), raw.get("roles")
    rows = dict(methods) if isinstance(methods, Mapping) else {}
    for label, entry in rows.items():
        if not isinstance(entry, Mapping):  # the schema refuses it below
            continue
        with collecting(problems, "methods", label):
            if not isinstance(entry.get("method"), str):
                raise UserError(f"methods.{label} does not say which method it is: add `method: NAME`.")
            method = get_method(entry["method"])
            parameters = method_parameters(label, entry, schema_of(method))
            # The values and not what they were read from: defaults, presets and files may change later.
            rows[label] = {"method": entry["method"], **parameters.model_dump(mode="json", by_alias=True)}
            if isinstance(roles, Mapping):
                present = _roles(roles)
                implied = "teacher" in method.needs and not hasattr(parameters, "teachers")
                sentences = reference_sentences(label, parameters, present, rows, needs_teacher=implied)
                problems += [Problem(sentence, ("methods", label)) for sentence in sentences]
                needed[label] = needed_rows(label, parameters, present, rows)
    problems += [Problem(cycle_sentence(cycle), ("methods", cycle[0])) for cycle in cycles(needed)]
    if isinstance(sections, Mapping):
        sections = {name: given for name, given in sections.items() if given is not None}
        for name, given in sections.items():
            with collecting(problems, "suites", name):
                sections[name] = suite_config(name, given, where)
    whole = {**raw, **({"methods": rows} if rows else {}), **({"suites": sections} if sections is not None else {})}
    config = None
    try:
        config = Config.model_validate(whole)
        problems += _number_problems(config)
    except ValidationError as error:
        problems = [*problems_of(error, Config, whole, where), *problems]
    problems += _name_problems(whole)
    if problems or config is None:
        raise ConfigurationError(where, problems)
    return config


def _roles(roles: Mapping[str, Any]) -> list[str]:
    """The names of the roles of an experiment."""
    return ["target", *_sources(roles), *(["teacher"] if roles.get("teacher") else [])]


def _sources(roles: Any) -> list[str]:
    sources = roles.get("sources") if isinstance(roles, Mapping) else None
    return list(sources) if isinstance(sources, Mapping) else []


def _name_problems(raw: Mapping[str, Any]) -> Iterator[Problem]:
    """Sources with names that mean something else, and a reference that is no row."""
    roles, rows, reference = raw.get("roles"), raw.get("methods"), raw.get("reference")
    for name in _sources(roles):
        if name in _RESERVED:
            sentence = f"roles.sources has a source called {name!r}, which means something else: rename it."
            yield Problem(sentence, ("roles", "sources", name))
    if isinstance(reference, str) and isinstance(rows, Mapping) and rows and reference not in rows:
        hint = did_you_mean(reference, rows)
        sentence = f"reference {reference!r} is no row{hint}: rows are {', '.join(rows)}."
        yield Problem(sentence, ("reference",))


def _number_problems(config: Config) -> Iterator[Problem]:
    """Numbers that are right alone and wrong together."""
    training = config.training
    if len(set(config.seeds)) != len(config.seeds):
        yield Problem(f"seeds {config.seeds} names one twice: give each seed once.", ("seeds",))
    for row, size in config.global_batch_sizes():
        if size % training.micro_batch_size:
            section = ("training",) if row is None else ("methods", row, "training")
            yield Problem(
                f"{'.'.join(section)}.global_batch_size = {size} is no multiple of "
                f"training.micro_batch_size = {training.micro_batch_size}: change one of them.",
                ("training", "micro_batch_size") if row is None else (*section, "global_batch_size"),
            )
