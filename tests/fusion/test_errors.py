"""What sentences about errors of libraries are made of."""

import pytest

from fusion.errors import message_line


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("one\ntwo"), "one"), (ValueError(), "ValueError"), (KeyError(""), "''"), (OSError("\n x\n"), "x")],
)
def test_an_error_without_a_message_has_its_class(error: Exception, line: str) -> None:
    assert message_line(error) == line
