"""The errors that the user can correct, and the nearest spelling of a wrong name."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can correct: the message says in one sentence what is wrong, where, and what to do."""


class NotFinite(UserError):
    """Logits of a model that are not finite."""


class UnknownName(UserError):
    """A name that is not there: `name`, among the `known` ones, of what `noun` says ("map", "method")."""

    def __init__(self, noun: str, name: str, known: Iterable[str]) -> None:
        self.noun = noun
        self.name = name
        self.known = tuple(known)
        super().__init__(unknown_name(noun, name, self.known))

    def __reduce__(self) -> tuple[type, tuple[str, str, tuple[str, ...]]]:
        return type(self), (self.noun, self.name, self.known)  # worker processes pass errors on


def unknown_name(noun: str, name: str, known: Iterable[str]) -> str:
    """The sentence for an unknown name: the nearest spelling and everything there is."""
    known = tuple(known)
    return f"There is no {noun} {name!r}{did_you_mean(name, known)}: there are {', '.join(known) or 'none'}."


def message_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest spelling among `known`, whatever the case; empty where nothing is near."""
    by_lower = {spelling.lower(): spelling for spelling in known}
    near = difflib.get_close_matches(str(name).lower(), by_lower, n=1)
    return f" (did you mean {by_lower[near[0]]!r}?)" if near else ""
