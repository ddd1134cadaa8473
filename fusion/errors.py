"""The one exception that carries a sentence for the user, and what such sentences share."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend: the message says in one sentence what is wrong, where, and what to do."""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest spelling among `known`; empty where nothing is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
