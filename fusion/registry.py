"""Names for the parts that a user can choose or add: maps, alignments, fusion functions, losses, methods, suites.

A part is registered under a name with a version, a schema of its parameters and a reference. Whoever uses a part by
name calls `Registry.choose`, which validates the parameters that a configuration gives and knows the part's identity:
name, version and parameters, which belong in the fingerprint of everything that is computed with it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from fusion.errors import UnknownName, UserError, did_you_mean

if TYPE_CHECKING:
    from pydantic import BaseModel

PartName = str | Mapping[str, Any]
"""How a configuration names a registered part: `NAME`, or `{name: NAME, PARAMETER: VALUE, ...}`."""
T = TypeVar("T")


@dataclass(frozen=True)
class Part(Generic[T]):
    """A registered object and what was said of it when it was registered."""

    name: str
    value: T
    version: int = 1
    """Raised when the code changes in a way that changes results."""
    parameters: type[BaseModel] | None = None
    """The schema of its parameters; None for a part without any."""
    reference: str = ""
    """Where the idea is from: a paper, a section, a table."""
    needs: tuple[str, ...] = ()
    """What must be there for it to be used, in the words of its registry."""


@dataclass(frozen=True)
class Choice(Generic[T]):
    """A part as a configuration names it, with its validated parameters."""

    part: Part[T]
    settings: BaseModel | None = None

    @property
    def value(self) -> T:
        """The registered function; one that has parameters gets them by the keyword `parameters`."""
        if self.settings is None:
            return self.part.value
        return cast(T, partial(cast(Callable[..., Any], self.part.value), parameters=self.settings))

    def identity(self) -> dict[str, Any]:
        """Name, version and every parameter as JSON values: this part's contribution to a fingerprint."""
        settings = {} if self.settings is None else self.settings.model_dump(mode="json", by_alias=True)
        return {"name": self.part.name, "version": self.part.version, **({"parameters": settings} if settings else {})}


@dataclass(frozen=True)
class Registered:
    """Annotates a pydantic field with the registry whose names it takes: `kind: Annotated[str, Registered(MAPS)]`.

    The type is `str`, or `PartName` where parts may have parameters. Validation raises the registry's UserError for an
    unknown name and for parameters that do not fit; the JSON schema lists the names.
    """

    registry: Registry[Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core import core_schema

        def check(chosen: PartName) -> PartName:
            self.registry.choose(chosen)
            return chosen

        return core_schema.no_info_after_validator_function(check, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        result, names = handler(schema), self.registry.names()
        if "anyOf" not in result:
            return {**result, "enum": names}
        options = [
            {**option, "enum": names} if option.get("type") == "string" else option for option in result["anyOf"]
        ]
        return {**result, "anyOf": options}


class Registry(Generic[T]):
    """The parts registered under a noun ("map", "method"): our own, and those that installed packages offer.

    `own` maps the names of our own parts to the modules that register them; a module is imported when one of its parts
    is asked for, so that listing imports nothing. Entry points of `entry_point_group` are read by name without
    importing; the target of an entry point is itself what is registered (not a module that registers).
    """

    def __init__(self, noun: str, entry_point_group: str | None = None, own: Mapping[str, str] | None = None) -> None:
        self.noun = noun
        self.entry_point_group = entry_point_group
        self._own = dict(own or {})
        self._parts: dict[str, Part[T]] = {}
        self._loaded: set[str] = set()
        self._entries: dict[str, list[EntryPoint]] = {}
        self._read_from: tuple[str, ...] | None = None

    def register(
        self,
        name: str,
        *,
        version: int = 1,
        parameters: type[BaseModel] | None = None,
        reference: str = "",
        needs: Sequence[str] = (),
    ) -> Callable[[T], T]:
        """A decorator that registers its function or class under `name` (see `Part` for the rest).

        Raises UserError when another object has the name already.
        """

        def decorate(value: T) -> T:
            if name in self._parts and not _same(self._parts[name].value, value):
                raise UserError(f"The {self.noun} {name!r} is registered twice: give one of the two another name.")
            self._parts[name] = Part(name, value, version, parameters, reference, tuple(needs))
            return value

        return decorate

    def names(self) -> list[str]:
        """All names in alphabetical order, those of entry points included, without importing anything."""
        return sorted({*self._parts, *self._own, *self._entry_points()})

    def get(self, name: str) -> T:
        """The object registered under `name`. Raises UserError with the nearest spelling and everything there is."""
        return self.part(name).value

    def choose(self, chosen: PartName) -> Choice[T]:
        """The part that a configuration names: `NAME`, or `{name: NAME, PARAMETER: VALUE, ...}`.

        Raises UserError for an unknown name, an unknown parameter and a value that the part's schema refuses.
        """
        given: dict[str, Any] = {"name": chosen} if isinstance(chosen, str) else dict(chosen)
        name = given.pop("name", None)
        if not isinstance(name, str):
            raise UserError(f"A {self.noun} is given as a name or as {{name: NAME, ...}}, not as {chosen!r}.")
        part = self.part(name)
        if part.parameters is None:
            if given:
                raise UserError(
                    f"The {self.noun} {name!r} has no parameters, and {', '.join(given)} is given: remove it."
                )
            return Choice(part)
        from pydantic import ValidationError

        try:
            return Choice(part, part.parameters.model_validate(given, extra="forbid"))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            known = [field.alias or own for own, field in part.parameters.model_fields.items()]
            hint = did_you_mean(key, known)
            raise UserError(
                f"The {self.noun} {name!r} does not accept {key}{hint} ({first['msg']}): its parameters are "
                f"{', '.join(known)}."
            ) from None

    def part(self, name: str) -> Part[T]:
        """Everything registered under `name`; imports it when needed. Raises UserError as `get` does."""
        entry = self._entry_point(name)
        if name not in self._parts and name in self._own:
            import_module(self._own[name])
        if name in self._parts:
            if entry is not None and name not in self._loaded:
                self._check_not_shadowed(name, entry)
            return self._parts[name]
        if entry is not None:
            try:
                value: T = entry.load()
            except Exception as error:
                said = " ".join(str(error).split())
                raise UserError(
                    f"The {self.noun} {name!r} could not be imported from {entry.value!r} ({type(error).__name__}: "
                    f"{said}): correct or uninstall the package that offers it."
                ) from error
            self._loaded.add(name)
            # Importing may have run a decorator that registered the name already, with its version and reference.
            return self._parts.setdefault(name, Part(name, value))
        raise UnknownName(self.noun, name, self.names())

    def find(self, value: T) -> Part[T]:
        """What `value`, a function or class, was registered as. Raises UserError for one that is not registered."""
        for name, part in self._parts.items():
            if _same(part.value, value):
                return self.part(name)
        address = ":".join(_home(value))
        for name, entries in self._entry_points().items():
            if address in [entry.value for entry in entries]:
                return self.part(name)
        raise UserError(
            f"{_home(value)[1]} of {_home(value)[0]} is no registered {self.noun}: register it by a decorator, with a "
            "name and a version."
        )

    def reference(self, name: str) -> str:
        """Where the idea of a registered name is from; "" for what came from an entry point without saying."""
        return self.part(name).reference

    def _entry_point(self, name: str) -> EntryPoint | None:
        """The entry point of that name, not imported. UserError where two packages offer different ones."""
        offered = self._entry_points().get(name, [])
        if len(offered) > 1:
            raise UserError(
                f"The {self.noun} {name!r} is offered by two packages, as {offered[0].value!r} and "
                f"{offered[1].value!r}: uninstall one of them."
            )
        return offered[0] if offered else None

    def _entry_points(self) -> dict[str, list[EntryPoint]]:
        """The group's different entry points by name, read again only when the places to import from have changed."""
        if self.entry_point_group is None:
            return {}
        path = tuple(sys.path)
        if path != self._read_from:
            self._entries, self._read_from = {}, path
            for entry in entry_points(group=self.entry_point_group):
                others = self._entries.setdefault(entry.name, [])
                if entry.value not in [other.value for other in others]:
                    others.append(entry)
        return self._entries

    def _check_not_shadowed(self, name: str, entry: EntryPoint) -> None:
        # A package may both decorate its class and offer it by entry point: that is one object, not two.
        package = _home(self._parts[name].value)[0].partition(".")[0]
        if package != entry.value.partition(":")[0].partition(".")[0]:
            raise UserError(
                f"The {self.noun} {name!r} is registered by {package!r}, and a package offers another as "
                f"{entry.value!r}: rename or uninstall one of them."
            )


def _home(value: object) -> tuple[str, str]:
    return getattr(value, "__module__", ""), getattr(value, "__qualname__", repr(value))


def _same(left: object, right: object) -> bool:
    # A module that is loaded twice (reload, a notebook cell run again) registers equal definitions, not rivals.
    return left is right or (_home(left) == _home(right) and "<locals>" not in _home(left)[1])
