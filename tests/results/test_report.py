"""What the page says of a table; the page itself is tried in a browser in tests/harness/reporting/test_report.py."""

import json
from dataclasses import replace

from results.layout import Cell, Column
from results.report import findings, page_cells
from results.table import Table
from results.tables import main_table
from tests.results.sample import final


def test_better_is_said_only_where_it_holds() -> None:
    records = [*final("CLM"), *final("FuseLLM", shift=-0.05), *final("other", shift=0.0)]
    better, other = findings(main_table(records_frame(records), ["CLM", "FuseLLM", "other"]))
    assert better.startswith("FuseLLM, average: ") and better.endswith("better than CLM, about these checkpoints only.")
    assert "95% interval -" in better
    assert other.startswith("other, average: ") and other.endswith("no difference shown.")


def test_what_has_too_few_examples_is_left_out_of_what_is_said() -> None:
    def said(**documents: int) -> str:
        records = [*final("CLM", documents=documents), *final("FuseLLM", documents=documents, shift=-0.05)]
        (found,) = findings(main_table(records_frame(records), ["CLM", "FuseLLM"]))
        return found

    assert said(code=24, news=10).startswith("FuseLLM, average of domains with an interval: ")
    assert "better than CLM" in said(code=24, news=10)
    assert said(code=8, news=10).endswith("(no interval): too little to say more.")


def records_frame(records):  # type: ignore[no-untyped-def]
    from dataclasses import asdict

    import pandas as pd

    return pd.DataFrame([asdict(one) for one in records]).astype({"tokens": "Int64"}).assign(evaluation="")


def test_ranks_are_along_the_methods_and_missing_cells_have_none() -> None:
    cells = ((Cell(3.0), Cell(1.0)), (Cell(3.0), Cell(None, note="not run")), (Cell(4.0), Cell(2.0)))
    table = Table("t", ("a", "b", "c"), (Column("x"), Column("y")), cells, True, 1, reference="a")
    assert [[cell.texts["rank"] for cell in row] for row in page_cells(table)] == [["2", "2"], ["2", "—"], ["1", "1"]]
    assert [[cell.keys["value"] for cell in row] for row in page_cells(table)] == [[3.0, 1.0], [3.0, None], [4.0, 2.0]]
    lossy = replace(table, cells=((Cell(3.0), Cell(9.0, lossy=True)), (Cell(3.0 + 1e-15), Cell(1.0)), cells[2]))
    assert [[cell.texts["rank"] for cell in row] for row in page_cells(lossy)] == [["2", "—"], ["2", "2"], ["1", "1"]]
    assert page_cells(table)[0][0].texts["difference"] == "reference"
    assert ["note", "not run"] in json.loads(page_cells(table)[1][1].about)["facts"]
    across = Table("t", ("x", "y"), (Column("a"), Column("b")), (cells[0], cells[2]), False, 1, best_along="row")
    assert [[cell.texts["rank"] for cell in row] for row in page_cells(across)] == [["2", "1"], ["2", "1"]]
