"""Loading a configuration: YAML layers merged by OmegaConf, rows written out, the result validated.

Precedence: `--set` > user's file > what that file extends > profile > shipped experiment > defaults. The resolved
configuration says everything; it is stored with every artifact and printed by `fusellm experiment show`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fusion.errors import UserError, message_line
from harness.config.errors import ConfigurationError, Problem, collecting, problems_of
from harness.config.layers import Layer, is_file, place_of, setting_layer, user_layers
from harness.config.references import missing_data_root, reference_problems
from harness.config.schema import Config, DataConfig
from harness.config.shipped import shipped
from harness.config.templates import completed_roles, expanded_rows
from harness.config.validation import resolve
from harness.store.paths import PRESETS

_OWN = "own"  # the profile of a user's file that names none


def load(
    name: str,
    *,
    profile: str | None = None,
    overrides: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> Config:
    """The resolved configuration of an experiment's name or of a user's YAML file.

    A user's file may say `extends: NAME` to start from an experiment that ships with the harness or `extends: FILE` to
    start from another file, and `profile: NAME`; without either it stands alone. A source, row or suite that is null is
    left out. Raises UserError; a `ConfigurationError` names every unknown key and wrong value in one sentence each.
    """
    return _load(_written(name), profile, overrides, seeds)[0]


def validate(
    names: Sequence[str], profile: str | None = None, overrides: Sequence[str] = (), seeds: Sequence[int] = ()
) -> dict[str, list[Problem]]:
    """Every problem of the experiments and files, by name; an empty list where there is none.

    Beside what `load` refuses these are files, folders and models that are named and not there (hub ids are not looked
    up). Without a profile an experiment is checked in each of its profiles.
    """
    problems: dict[str, list[Problem]] = {}
    for name in names:
        collected: list[Problem] = []
        with collecting(collected):
            written = _written(name)
            profiles: Sequence[str | None] = [profile] if profile else written.profiles or [None]
            for one in profiles:
                with collecting(collected):
                    raw, layers = _merged(written, one, overrides, seeds)
                    found: list[Problem] = []
                    with collecting(found):
                        raw = _resolved(raw, name).model_dump(mode="json")
                    found += reference_problems(raw)
                    collected += [_placed(problem, layers) for problem in found]
        problems[name] = list(dict.fromkeys(collected))  # most problems are those of every profile
    return problems


@dataclass(frozen=True)
class _Written:
    """An experiment as its files have it."""

    name: str
    shipped: Any
    """The shipped experiment that it is or extends, as an OmegaConf mapping."""
    user: Sequence[Layer]
    """The user's files, the one that was asked for last."""

    @property
    def profiles(self) -> list[str]:
        """The profiles that it can be run in; [] where it does not say, or says something else."""
        from omegaconf import OmegaConf

        chosen = [layer.values["profile"] for layer in self.user if isinstance(layer.values.get("profile"), str)]
        if chosen:
            return chosen[-1:]
        profiles: Any = OmegaConf.to_container(OmegaConf.create({"profiles": self.shipped.get("profiles", [])}))
        return [str(profile) for profile in profiles["profiles"]]


def _written(name: str) -> _Written:
    from omegaconf import OmegaConf

    if not is_file(name):
        experiment = shipped("experiments", name)
        experiment.experiment = name
        return _Written(name, experiment, ())
    user, extended = user_layers(Path(name))
    user[-1].values.setdefault("experiment", Path(name).stem)
    base = OmegaConf.create({})
    if extended:
        try:
            base = shipped("experiments", extended)
        except UserError as error:
            raise ConfigurationError(name, [_placed(Problem(str(error), ("extends",)), user)]) from None
    return _Written(name, base, user)


def _load(
    written: _Written, profile: str | None, overrides: Sequence[str], seeds: Sequence[int]
) -> tuple[Config, Sequence[Layer]]:
    """The configuration, and the layers that a user wrote."""
    raw, layers = _merged(written, profile, overrides, seeds)
    try:
        return _resolved(raw, written.name), layers
    except ConfigurationError as error:
        raise ConfigurationError(written.name, [_placed(problem, layers) for problem in error.problems]) from None


def _merged(
    written: _Written, profile: str | None, overrides: Sequence[str], seeds: Sequence[int]
) -> tuple[dict[str, Any], Sequence[Layer]]:
    """The keys and values of all layers, and the layers that a user wrote."""
    from omegaconf import OmegaConf

    with _as_sentences(f"The configuration of {written.name}"):
        experiment: Any = OmegaConf.merge(written.shipped)  # a copy
        per_profile = experiment.pop("per_profile", {})
        own = [layer.values.get("profile") for layer in reversed(written.user)]
        chosen = profile or next(filter(None, own), None) or experiment.get("profiles", [_OWN])[0]
        layers = [OmegaConf.create((PRESETS / "defaults.yaml").read_text(encoding="utf-8")), experiment]
        if chosen != _OWN:
            layers.append(shipped("profiles", str(chosen)))
        layers.append(per_profile.get(str(chosen), {}))
        merged = OmegaConf.merge(*layers, *(layer.values for layer in written.user))
    merged, settings = _with_settings(merged, overrides)
    with _as_sentences(f"The configuration of {written.name}"):
        merged.profile = chosen
        if seeds:
            merged.seeds = list(seeds)
        raw: Any = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    raw.pop("protocols", None)  # what experiments took from it is in their suites
    return raw, [*written.user, *settings]


def suite_settings(
    names: Sequence[str], overrides: Sequence[str], data_root: str | None = None
) -> tuple[dict[str, dict[str, Any]], Path | None]:
    """Settings of suites by name, and the folder of data sets, from `--set` as experiments take it.

    data_root: as `data.root`, which it replaces. Raises UserError for a setting of anything but these suites.
    """
    from omegaconf import OmegaConf

    merged, layers = _with_settings(OmegaConf.create({}), overrides)
    for item, layer in zip(overrides, layers, strict=True):
        (section, values), *_ = dict(layer.values).items()
        taken = ["root"] if section == "data" else names if section == "suites" else []
        if not OmegaConf.is_dict(values) or not set(values) <= set(taken):
            raise UserError(
                f"--set {item} is no setting of {', '.join(names)}: write --set SUITE.KEY=VALUE or data.root=FOLDER."
            )
    with _as_sentences(f"--set {' --set '.join(overrides)}"):
        raw: Any = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    data = {**raw.get("data", {}), **({} if data_root is None else {"root": data_root})}
    try:
        folder = DataConfig.model_validate(data).folder
    except ValidationError as error:
        problems = problems_of(error, DataConfig, data, "this command", ("data",))
        raise ConfigurationError("this command", problems) from None
    if problem := missing_data_root(folder):
        raise UserError(problem.sentence)
    return raw.get("suites", {}), folder


def _with_settings(base: Any, overrides: Sequence[str]) -> tuple[Any, list[Layer]]:
    """An OmegaConf mapping with every `--set` merged over it, and the layer of each."""
    from omegaconf import OmegaConf

    layers: list[Layer] = []
    for item in overrides:
        with _as_sentences(f"--set {item}"):
            layers.append(setting_layer(item))
            base = OmegaConf.merge(base, layers[-1].values)
    return base, layers


@contextmanager
def _as_sentences(place: str) -> Iterator[None]:
    """Raises UserError about `place` for what OmegaConf raises in the block."""
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        yield
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserError(f"{place} does not hold: {message_line(error)}.") from None
    except TypeError:  # what OmegaConf raises for these two
        raise UserError(f"{place} has a list where keys and values belong, or the other way round.") from None


def _resolved(raw: dict[str, Any], name: str) -> Config:
    """The configuration of merged layers, completed in `raw`. Raises ConfigurationError with every mistake."""
    profiles = raw.setdefault("profiles", [raw["profile"]])
    if isinstance(profiles, list) and raw["profile"] not in profiles:
        known = ", ".join(map(str, profiles))
        raise UserError(f"The experiment {name} has no profile {raw['profile']!r}: its profiles are {known}.")
    problems = list(_structural_problems(raw, name))
    if isinstance(raw.get("roles"), dict):
        raw["roles"] = completed_roles(raw["roles"], raw.get("corpus"))
    if isinstance(raw.get("methods"), dict):
        with collecting(problems, "methods"):
            raw["methods"] = expanded_rows(raw["methods"], raw.get("roles"))
    try:
        config = resolve(raw, name)
    except ConfigurationError as error:
        # What has the wrong structure is said once.
        said = [problem.key for problem in problems]
        problems += [problem for problem in error.problems if not any(problem.key[: len(key)] == key for key in said)]
    if problems:
        raise ConfigurationError(name, problems)
    return config


def _structural_problems(raw: Mapping[str, Any], name: str) -> Iterator[Problem]:
    """What is no list, or holds something else than keys and values, where it must."""
    if not isinstance(raw["profiles"], list):
        sentence = f"The configuration of {name} has profiles = {raw['profiles']!r}, which must be a list."
        yield Problem(sentence, ("profiles",))
    roles, methods = raw.get("roles"), raw.get("methods")
    sources = roles.get("sources") if isinstance(roles, dict) else None
    places: dict[tuple[str, ...], Any] = {("roles",): roles, ("methods",): methods, ("roles", "sources"): sources}
    for key, section in list(places.items()):
        if isinstance(section, dict):
            places |= {(*key, str(inner)): value for inner, value in section.items()}
    for key, value in places.items():
        if value is not None and not isinstance(value, dict):
            sentence = f"The configuration of {name} has {'.'.join(key)} = {value!r}, which must hold keys and values."
            yield Problem(sentence, key)


def _placed(problem: Problem, layers: Sequence[Layer]) -> Problem:
    return replace(problem, place=place_of(problem.key, layers))
