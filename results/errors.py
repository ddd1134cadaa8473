"""The errors that the user can correct.

A command line prints them; for an unknown name it adds the nearest spelling, which is why that error carries its parts.
"""

from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can correct: the message says in one sentence what is wrong, where, and what to do."""


class UnknownName(UserError):
    """A name that is not there: `name`, among the `known` ones, of what `noun` says ("metric", "reference row")."""

    def __init__(self, noun: str, name: str, known: Iterable[str]) -> None:
        self.noun = noun
        self.name = name
        self.known = tuple(known)
        super().__init__(f"There is no {noun} {name!r}: there are {', '.join(self.known) or 'none'}.")

    def __reduce__(self) -> tuple[type, tuple[str, str, tuple[str, ...]]]:
        return type(self), (self.noun, self.name, self.known)  # worker processes pass errors on
