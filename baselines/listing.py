"""What methods there are, what each needs and what can be set: for people, and read from the methods themselves."""

from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from baselines.method import METHODS, Role, method, method_names
from fusion.errors import UserError


@dataclass(frozen=True)
class Setting:
    """One parameter of a method."""

    name: str
    type: str
    default: str
    description: str


@dataclass(frozen=True)
class Listed:
    """One method; `refused` says why a package's method cannot be used, and is empty where it can."""

    name: str
    summary: str = ""
    needs: tuple[str, ...] = ()
    settings: tuple[Setting, ...] = ()
    reference: str = ""
    refused: str = ""


def listed(name: str) -> Listed:
    """A method of that name. Raises UserError where there is none, or importing it fails."""
    kind = method(name)
    fields = kind.schema.model_fields
    return Listed(
        name=name,
        summary=(kind.__doc__ or "").strip().partition("\n")[0],
        needs=tuple(getattr(kind, "needs", ())),
        settings=tuple(_setting(field.alias or key, field) for key, field in fields.items()),
        reference=METHODS.reference(name),
    )


def all_listed() -> list[Listed]:
    """Every registered method; one that cannot be imported is named and says why, and the others are there."""
    found = []
    for name in method_names():
        try:
            found.append(listed(name))
        except UserError as error:
            found.append(Listed(name, refused=str(error)))
    return found


def _setting(name: str, field: FieldInfo) -> Setting:
    default = "required" if field.is_required() else str(field.get_default(call_default_factory=True))
    return Setting(name, _type(field.annotation), default, field.description or "")


def _type(annotation: Any) -> str:
    """A type as a configuration would have it."""
    parts = [part for part in get_args(annotation) if part is not type(None)]
    if get_origin(annotation) is Literal:
        return " or ".join(str(part) for part in parts)
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_type(part) for part in parts)
    if parts:
        return str(annotation).replace(str(Role), "str").replace("typing.", "")
    return str(annotation.__name__)
