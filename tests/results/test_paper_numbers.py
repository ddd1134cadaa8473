from decimal import Decimal
from importlib import resources

import pytest

from results.errors import UnknownName, UserError
from results.formats import FORMATS, render
from results.paper_numbers import NAMES, averages, load, paper_table, rounded
from tests.shared import shared


@pytest.mark.parametrize("name", ["table1", "table2", "table3", "table7"])
def test_every_average_recomputes_equal_to_the_printed_one(name: str) -> None:
    found = averages(load(name))
    assert found
    off = {method: (printed, mean) for method, (printed, mean) in found.items() if rounded(mean, printed) != printed}
    if name == "table7":
        # (0.8463 + 0.6569 + 0.6068) / 3 is 0.70333, printed 0.7034: only the unrounded entries can give it.
        printed, mean = off.pop("FuseLLM")
        assert (printed, rounded(mean, printed)) == (Decimal("0.7034"), Decimal("0.7033"))
        assert abs(mean - printed) < Decimal("0.0001")
        assert any("0.7033" in note for note in paper_table(name).notes)
    assert off == {}


def test_a_wrong_digit_in_an_average_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    table = load("table2")
    wrong = (*table.values[:-1], (Decimal("59.87"), *table.values[-1][1:]))
    with pytest.raises(UserError, match=r"59\.87 of OpenLLaMA"):
        averages(type(table)(**{**table.__dict__, "values": wrong}))


@pytest.mark.parametrize("name", ["table4", "table6"])
def test_summaries_repeat_the_averages_of_the_full_tables(name: str) -> None:
    table = load(name)
    for column, full in zip(table.columns, ("table1", "table2", "table3"), strict=True):
        printed = averages(load(full))
        for row, values in zip(table.rows, table.values, strict=True):
            if row in printed:
                assert values[table.columns.index(column)] == printed[row][0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMATS)
def test_every_table_goes_through_the_renderer(name: str, form: str) -> None:
    text = render(paper_table(name), form)
    assert text == render(paper_table(name), form)
    for row, values in zip(load(name).rows, load(name).values, strict=True):
        assert row in text.replace("\\_", "_")
        if form == "md":
            assert all(f" {value} " in text or f"**{value}**" in text for value in values)


def test_the_best_is_bold_where_it_is() -> None:
    by_task = render(paper_table("table1"), "md")
    assert "| boolean_expressions | 74.40 | 66.00 | 68.80 | **76.00** (+10.47%) | 71.60 (+4.07%) |" in by_task
    lower = render(paper_table("table7"), "md")
    assert "| FuseLLM | 0.8463 (-6.05%) | 0.6569 (-2.54%) | 0.6068 (-0.15%) | **0.7034** (-3.31%) |" in lower


def test_an_unknown_table_names_those_there_are() -> None:
    with pytest.raises(UnknownName, match="There is no published table 'tabel1': there are table1, "):
        paper_table("tabel1")


def test_the_data_is_the_reference_data() -> None:
    ours = resources.files("results").joinpath("paper")
    reference = {one.name: one.read_bytes() for one in shared("paper").glob("*.csv")}
    assert {name: ours.joinpath(name).read_bytes() for name in reference} == reference
