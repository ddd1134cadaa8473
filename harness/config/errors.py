"""What is wrong with a configuration, in sentences: pydantic's errors in the words of the file that was written."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from fusion.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Problem:
    """One mistake in a configuration."""

    sentence: str
    key: tuple[str, ...] = ()
    """The parts of the dotted key that it is about; () where it is about no single one."""
    place: str | None = None
    """Where that key was written: a file and line, or a `--set`; None where no user wrote it."""

    def __str__(self) -> str:
        """The sentence, with the place in brackets where it is known."""
        return f"{self.sentence.removesuffix('.')} ({self.place})." if self.place else self.sentence


class ConfigurationError(UserError):
    """Every mistake of a configuration; its message is the one sentence, or a list of one sentence a line."""

    def __init__(self, where: str, problems: Sequence[Problem]) -> None:
        self.problems = list(dict.fromkeys(problems))
        if len(self.problems) == 1:
            super().__init__(str(self.problems[0]))
        else:
            lines = "".join(f"\n  {problem}" for problem in self.problems)
            super().__init__(f"The configuration of {where} has {len(self.problems)} errors:{lines}")


@contextmanager
def collecting(problems: list[Problem], *key: str) -> Iterator[None]:
    """Adds the UserError of its block to `problems`, as one about `key` or what is below it, instead of raising it."""
    try:
        yield
    except ConfigurationError as error:
        problems += [replace(problem, key=key + problem.key) for problem in error.problems]
    except UserError as error:
        problems.append(Problem(str(error), key))


def problems_of(
    error: ValidationError, schema: type[BaseModel], given: Any, where: str, above: tuple[str, ...] = ()
) -> list[Problem]:
    """Every complaint of pydantic about `given`, one sentence each, with the nearest spelling of unknown keys.

    where: what the sentences call the configuration. above: the place of `given` in it, with which the keys in the
    sentences begin; those of the problems begin at `given`. Missing keys share one sentence, and so do the alternatives
    of a value that may be of several types.
    """
    missing: list[str] = []
    wrong: dict[tuple[str, ...], list[str]] = {}
    problems: list[Problem] = []
    for one in error.errors():
        place = tuple(map(str, one["loc"]))
        key = ".".join(above + place)
        if isinstance(raised := one.get("ctx", {}).get("error"), UserError):
            problems.append(Problem(f"{where}: {raised}", place))
        elif one["type"] == "extra_forbidden":
            model = _model_at(schema, place[:-1])
            known = [field.alias or name for name, field in model.model_fields.items()] if model else []
            hint = did_you_mean(place[-1], known)
            sentence = f"The configuration of {where} has an unknown key {key}{hint}: correct or remove it."
            problems.append(Problem(sentence, place))
        elif one["type"] == "missing":
            missing.append(key)
        else:
            wrong.setdefault(_written(given, place), []).append(one["msg"].removeprefix("Value error, "))
    for place, messages in wrong.items():
        reason = "; or: ".join(dict.fromkeys(messages))
        key, value = ".".join(above + place), _value(given, place)
        sentence = f"The configuration of {where} has {key} = {value!r}, which is wrong: {reason}."
        problems.append(Problem(sentence, place))
    if missing:
        keys = ", ".join(missing[:-1]) + " and " * (len(missing) > 1) + missing[-1]
        add = "add it" if len(missing) == 1 else "add them"
        problems.append(Problem(f"The configuration of {where} lacks {keys}: {add}."))
    return problems


def _written(given: Any, place: Sequence[str]) -> tuple[str, ...]:
    """The part of a place that is written in the configuration, without the names of a union's members."""
    for depth in range(len(place)):
        try:
            _value(given, place[: depth + 1])
        except (KeyError, IndexError, ValueError, TypeError):
            return tuple(place[:depth])
    return tuple(place)


def _value(given: Any, place: Sequence[str]) -> Any:
    for part in place:
        given = given[part] if isinstance(given, Mapping) else list(given)[int(part)]
    return given


def _model_at(schema: type[BaseModel] | None, place: Sequence[str]) -> type[BaseModel] | None:
    """The model of the section at a place; None where the schema does not say."""
    model = schema
    skip = False  # the key of a mapping, which is a name that the user chose
    for part in place:
        if skip or model is None:
            skip = False
            continue
        fields = {field.alias or name: field for name, field in model.model_fields.items()}
        annotation = fields[part].annotation if part in fields else None
        model, skip = _model_in(annotation)
    return model


def _model_in(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The model that a field holds, alone, beside None or as a mapping's values; and whether it is a mapping's."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    for part in get_args(annotation):
        model, _ = _model_in(part)
        if model is not None:
            return model, getattr(annotation, "__origin__", None) is dict
    return None, False
