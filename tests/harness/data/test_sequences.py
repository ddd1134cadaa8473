"""Packing."""

from hypothesis import given
from hypothesis import strategies as st

from harness.data.sequences import pack


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(50, 120))
def test_every_passage_lies_in_one_row_that_holds_it(lengths: list[int], sequence_length: int) -> None:
    rows = pack(lengths, sequence_length, window=32)
    assert sorted(p for row in rows for p in row) == list(range(len(lengths)))
    assert all(sum(lengths[p] for p in row) <= sequence_length for row in rows)
    # First fit never leaves two neighbouring rows of one window that would have fitted into one.
    assert len(pack(lengths, sequence_length, window=10**6)) <= 1 + 2 * sum(lengths) // sequence_length
