"""Names for the parts a user can choose or add: maps, alignments, fusion functions, methods, suites."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from fusion.errors import UserError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """What is registered under a noun ("map", "method"), by a decorator here or by an entry point of a package.

    Entry points of `entry_point_group` are read by name without importing; the target is imported when it is asked for,
    and is itself what is registered (not a module that registers).
    """

    def __init__(self, noun: str, entry_point_group: str | None = None) -> None:
        self.noun = noun
        self.entry_point_group = entry_point_group
        self._registered: dict[str, T] = {}
        self._references: dict[str, str] = {}
        self._loaded: set[str] = set()
        self._entries: dict[str, list[EntryPoint]] = {}
        self._read_from: tuple[str, ...] | None = None

    def register(self, name: str, *, reference: str = "") -> Callable[[T], T]:
        """A decorator that registers its function or class under `name`; `reference` says where the idea is from.

        Raises UserError when another object has the name already.
        """

        def decorate(value: T) -> T:
            if name in self._registered and not _same(self._registered[name], value):
                raise UserError(f"The {self.noun} {name!r} is registered twice: give one of the two another name.")
            self._registered[name] = value
            self._references[name] = reference
            return value

        return decorate

    def names(self) -> list[str]:
        """All names in alphabetical order, those of entry points included, without importing anything."""
        return sorted({*self._registered, *self._entry_points()})

    def reference(self, name: str) -> str:
        """Where the idea of a registered name is from; "" for what came from an entry point without saying."""
        self.get(name)
        return self._references.get(name, "")

    def get(self, name: str) -> T:
        """What is registered under `name`; UserError names the nearest spelling and everything there is."""
        entry = self._entry_point(name)
        if name in self._registered:
            if entry is not None and name not in self._loaded:
                self._check_not_shadowed(name, entry)
            return self._registered[name]
        if entry is not None:
            try:
                value: T = entry.load()
            except Exception as error:
                said = " ".join(str(error).split())
                raise UserError(
                    f"The {self.noun} {name!r} could not be imported from {entry.value!r} ({type(error).__name__}: "
                    f"{said}): mend or uninstall the package that offers it."
                ) from error
            self._loaded.add(name)
            # Importing may have run a decorator that registered the name already, with its reference.
            return self._registered.setdefault(name, value)
        raise UserError(
            f"There is no {self.noun} {name!r}{did_you_mean(name, self.names())}: registered are "
            f"{', '.join(self.names()) or 'none'}."
        )

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
        package = _home(self._registered[name])[0].partition(".")[0]
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
