"""A table as an object: its data frame, how a notebook shows it, and what the package offers by name."""

import csv
import io
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import results
from results.errors import UnknownName
from results.formats import render
from results.layout import Cell, Column
from results.paper_numbers import NAMES, paper_table
from results.table import Table

TABLE = Table(
    title="a table",
    rows=("CLM", "FuseLLM"),
    columns=(Column("code"), Column("code")),  # two columns may have one label
    cells=(
        (Cell(0.5, n=20), Cell(None, note="not run")),
        (Cell(0.25, (0.2, 0.3), difference=-0.25, verdict="better"), Cell(1 / 3)),
    ),
    higher_is_better=False,
    digits=2,
)


def test_a_frame_has_the_values_at_full_precision() -> None:
    frame = TABLE.to_frame()
    assert list(frame.index) == ["CLM", "FuseLLM"] and frame.index.name == "method"
    assert list(frame.columns) == ["code", "code"]
    assert frame.dtypes.tolist() == ["float64", "float64"]
    assert frame.iloc[1, 1] == 1 / 3 and pd.isna(frame.iloc[0, 1])


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("difference", [[None, None], [-0.25, None]]),
        ("verdict", [[None, None], ["better", None]]),
        ("interval", [[None, None], [(0.2, 0.3), None]]),
        ("note", [["", "not run"], ["", ""]]),
    ],
)
def test_a_frame_has_any_field_of_the_cells(field: str, expected: list[list[object]]) -> None:
    frame = TABLE.to_frame(field).astype(object)
    assert frame.where(frame.notna(), None).values.tolist() == expected


def test_an_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(UnknownName, match="There is no field of a cell 'values': there are value, interval, "):
        TABLE.to_frame("values")


@pytest.mark.parametrize("name", NAMES)
def test_a_frame_has_the_shape_of_its_table(name: str) -> None:
    table = paper_table(name)
    assert table.to_frame().shape == (len(table.rows), len(table.columns))


def test_a_notebook_shows_what_the_formats_give() -> None:
    assert TABLE._repr_html_() == render(TABLE, "html")
    assert TABLE._repr_markdown_() == render(TABLE, "md")
    assert repr(TABLE) == "<Table 'a table': 2 rows, 2 columns>"


def test_every_public_name_is_there_and_nothing_heavy_is_imported_before_it_is_used() -> None:
    assert all(getattr(results, name) is not None for name in results.__all__)
    assert set(results.__all__) <= set(dir(results)) and set(results.__all__) == set(results._HOME)
    with pytest.raises(AttributeError, match="no attribute 'tabel'"):
        results.tabel  # noqa: B018
    heavy = "{'numpy', 'pandas', 'scipy', 'matplotlib', 'pyarrow', 'rich'} & set(sys.modules)"
    code = f"import sys, results; dir(results); print({heavy}); results.Table; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parents[2])
    assert done.stdout.split() == [b"set()", b"set()"]


def test_what_rounds_to_zero_has_no_sign() -> None:
    table = Table("t", ("a", "b"), (Column("x"),), ((Cell(-1e-9, (-1e-9, 1.0)),), (Cell(1.0),)), True, 2)
    assert "-0.00" not in render(table, "md") and "0.00" in render(table, "md")


HOSTILE = {
    "<script>alert(1)</script>": r"\<script>alert(1)\</script>",
    "<!-- hidden": r"\<!-- hidden",
    "[a](javascript:b)": r"[a\](javascript:b)",
    "a|b\\|c": r"a\|b\\\|c",
    "`rm`": r"\`rm\`",
    "*a* _b_ ~~c~~": r"\*a\* \_b\_ \~~c\~~",
    "&lt;b": r"\&lt;b",
    "p < 0.05, acc_norm, R&D [1, 2] ~3": "p < 0.05, acc_norm, R&D [1, 2] ~3",  # nothing that Markdown would read
}


@pytest.mark.parametrize("label", HOSTILE)
def test_labels_are_text_in_markdown(label: str) -> None:
    table = Table(
        title=label,
        rows=(label,),
        columns=(Column(label),),
        cells=((Cell(0.5, note=label),),),
        higher_is_better=True,
        digits=1,
    )
    text = render(table, "md")
    assert text.count(HOSTILE[label]) >= 3 and f"| {HOSTILE[label]} |" in text
    assert text.replace(HOSTILE[label], "").count("|") == 9


@pytest.mark.parametrize(
    ("label", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("+cmd|'/c calc'!A0", "'+cmd|'/c calc'!A0"),
        ("-tail", "'-tail"),
        ("\t=1", "'\t=1"),
        ("-1.5%", "-1.5%"),
        ("+3", "+3"),
        ("CLM = 1", "CLM = 1"),
    ],
)
def test_no_cell_of_a_csv_is_a_formula(label: str, cell: str) -> None:
    table = Table(
        title="t", rows=(label,), columns=(Column("c"),), cells=((Cell(-0.5),),), higher_is_better=True, digits=1
    )
    (_, line) = csv.reader(io.StringIO(render(table, "csv")))
    assert line[:3] == [cell, "c", "-0.5"]
