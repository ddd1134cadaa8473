"""The documentation of dataclass fields, which Python itself does not keep."""

import ast
import inspect
import textwrap


def field_docstrings(cls: type) -> dict[str, str]:
    """The string literal below each annotated field in the source of `cls`, by field, with its lines joined.

    Empty when the source is not available.
    """
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    docstrings = {}
    for field, statement in zip(definition.body, definition.body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            docstrings[field.target.id] = " ".join(str(statement.value.value).split())
    return docstrings
