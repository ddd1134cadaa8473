"""The one exception that carries a sentence for the user, and what such sentences share."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend: the message says in one sentence what is wrong, where, and what to do."""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest spelling among `known`, whatever the case; empty where nothing is near."""
    by_lower = {spelling.lower(): spelling for spelling in known}
    near = difflib.get_close_matches(str(name).lower(), by_lower, n=1)
    return f" (did you mean {by_lower[near[0]]!r}?)" if near else ""
