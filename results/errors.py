"""The one exception that carries a sentence for the user."""


class UserError(ValueError):
    """Something the user can mend: the message says in one sentence what is wrong, where, and what to do."""
