"""What the parameters of methods name: roles, other rows and models; unknown names, and rows that need each other."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from baselines.method import Parameters
from fusion.errors import did_you_mean


def unknown_reference(
    label: str, name: str, kinds: Sequence[str], roles: Sequence[str], rows: Mapping[str, Any] | Sequence[str]
) -> str:
    """The sentence for a name that the row `label` gives and that is nothing of these kinds ("role", "row")."""
    known = {"role": list(roles), "row": [row for row in rows if row != label]}
    wanted = [kind for kind in known if kind in kinds]
    hint = did_you_mean(name, [known_name for kind in wanted for known_name in known[kind]])
    lists = "; ".join(f"{kind}s are {', '.join(known[kind]) or 'none'}" for kind in wanted)
    return f"methods.{label} names {name!r}, which is no {' and no '.join(wanted)}{hint}: {lists}."


def reference_sentences(
    label: str, parameters: Parameters, roles: Sequence[str], rows: Mapping[str, Any], *, needs_teacher: bool
) -> Iterator[str]:
    """What is wrong with the names that the parameters of the row `label` give, a sentence each.

    needs_teacher: the method requires the role `teacher` without naming it.
    """
    references = [(name, reference.kinds) for name, reference in parameters.references()]
    if needs_teacher:
        references.append(("teacher", ("role",)))
    for name, kinds in dict.fromkeys(references):
        if name in roles and "role" in kinds:
            if "row" in kinds and name in rows and not _is_unchanged(rows[name], name):
                yield (
                    f"methods.{label} names {name!r}, which is a role and also a row that is not the role's unchanged "
                    "model: rename the row."
                )
        elif name in rows and "row" in kinds:
            if name == label:
                yield f"methods.{label} names itself: name another row."
        elif name == "teacher" and "role" in kinds:
            yield f"methods.{label} needs a teacher, and there is none: say who it is in roles.teacher."
        elif "model" not in kinds:
            yield unknown_reference(label, name, kinds, roles, rows)


def needed_rows(label: str, parameters: Parameters, roles: Sequence[str], rows: Mapping[str, Any]) -> list[str]:
    """The other rows that the parameters of the row `label` name."""
    return [
        name
        for name, reference in parameters.references()
        if "row" in reference.kinds
        and name in rows
        and name != label
        and not ("role" in reference.kinds and name in roles)
    ]


def cycles(needed: Mapping[str, Sequence[str]]) -> Iterator[list[str]]:
    """Rows that need each other in a circle, each circle once. needed: the rows that a row names, by its label."""
    finished: set[str] = set()

    def visit(label: str, path: list[str]) -> Iterator[list[str]]:
        if label in path:
            yield path[path.index(label) :]
        elif label not in finished:
            for name in needed.get(label, ()):
                yield from visit(name, [*path, label])
            finished.add(label)

    for label in needed:
        yield from visit(label, [])


def cycle_sentence(labels: Sequence[str]) -> str:
    """The sentence for rows of which each needs the next and the last one the first."""
    first, *others = labels
    if not others:
        return f"methods.{first} needs itself: name another row."
    chain = ", which needs ".join(f"methods.{label}" for label in [*others, first])
    return f"methods.{first} needs {chain}: take one of these rows out of the parameters of another."


def _is_unchanged(entry: Any, role: str) -> bool:
    """Whether a row is the model of a role as it is."""
    return isinstance(entry, Mapping) and entry.get("method") == "as_is" and entry.get("role", "target") == role
