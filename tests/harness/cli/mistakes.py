"""A mistake of a user: what is prepared in the folder `{here}`, what is asked for, and what must hold at the end."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from harness.store.files import write_json
from harness.store.fingerprint import file_sha256
from harness.store.paths import RUN_FILE
from harness.store.run_files import read_run_file
from results.records import Record
from results.records import write as write_records
from tests.harness.command import answer, assert_whole, sentence
from tests.harness.reporting.test_runs import finished
from tests.results.sample import scores

Prepare = Callable[[Path], object]


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# What is prepared.


def nothing(here: Path) -> None:
    pass


def write(name: str, content: str | bytes) -> Prepare:
    def prepare(here: Path) -> None:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return prepare


def remove(name: str) -> Prepare:
    return lambda here: (here / name).unlink()


def rename(name: str, other: str) -> Prepare:
    return lambda here: (here / name).rename(here / other)


def cut(name: str) -> Prepare:
    return lambda here: (here / name).write_bytes((here / name).read_bytes()[:-100])


def set_key(name: str, **values: object) -> Prepare:
    return lambda here: (here / name).write_text(json.dumps({**json.loads((here / name).read_text()), **values}))


def parquet(name: str, values: list[object], column: str = "text", damage: bool = False) -> Prepare:
    def prepare(here: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        array = pa.array(values)
        if array.type == pa.binary():
            array = array.view(pa.string())
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({column: array}), here / name)
        if damage:
            raw = bytearray((here / name).read_bytes())
            raw[8:16] = b"\xff" * 8
            (here / name).write_bytes(raw)

    return prepare


def other_tokenizer(here: Path) -> None:
    shutil.copy(here / "neox" / "tokenizer.json", here / "llama")


def swapped(name: str) -> Prepare:
    """A tokenizer that numbers two letters the other way round."""

    def prepare(here: Path) -> None:
        raw = json.loads((here / name).read_text(encoding="utf-8"))
        words = raw["model"]["vocab"]
        words["x"], words["y"] = words["y"], words["x"]
        (here / name).write_text(json.dumps(raw), encoding="utf-8")

    return prepare


def artifact(name: str, content: str) -> Prepare:
    """A complete artifact, one file of which is then overwritten."""

    def prepare(here: Path) -> None:
        from harness.config.schema import CorpusConfig
        from harness.data.passages import make_passages
        from harness.store.artifacts import Store

        _, folder = make_passages(Store(here / "root" / "artifacts"), CorpusConfig(path=str(here / "train")), 50, None)
        (folder / name).write_text(content)

    return prepare


def ran(*files: list[Record]) -> Prepare:
    """A finished run of `table2` with these record files."""

    def prepare(here: Path) -> None:
        folder = finished(here / "root", "table2", files[0])
        for i, records in enumerate(files[1:]):
            write_records(folder / "records" / f"more{i}.parquet", records)
        description = read_run_file(folder / RUN_FILE)
        description["records"] |= {p.name: file_sha256(p) for p in (folder / "records").glob("*.parquet")}
        write_json(folder / RUN_FILE, description)

    return prepare


def answers(method: str, task: str, values: list[float], seed: int = -1) -> list[Record]:
    return scores(method, task, values, seed, metric="acc_norm", experiment="table2")


def older(**changed: object) -> Prepare:
    """A finished run whose description another version wrote."""

    def prepare(here: Path) -> None:
        folder = finished(here / "root", "table2", answers("CLM", "arc_easy", [1.0], 0))
        write_json(folder / RUN_FILE, {**read_run_file(folder / RUN_FILE), **changed})

    return prepare


def other_schema(here: Path) -> None:
    import pyarrow.parquet as pq

    folder = finished(here / "root", "table2", answers("CLM", "arc_easy", [1.0], 0))
    path = folder / "records" / "all.parquet"
    pq.write_table(pq.read_table(path).replace_schema_metadata({b"fusellm.records.schema": b"0"}), path)
    description = read_run_file(folder / RUN_FILE)
    write_json(folder / RUN_FILE, {**description, "records": {path.name: file_sha256(path)}})


SHOW = ("experiment", "show")
RUN = ("experiment", "run", "{here}/small.yaml", "--root", "{here}/root")


def setting(*values: str, of: str = "main") -> list[str]:
    return [*SHOW, of, *(part for value in values for part in ("--set", value))]


def merged(*values: str) -> list[str]:
    return setting("methods.M.method=merge", *(f"methods.M.{value}" for value in values))


def run(*values: str) -> list[str]:
    return [*RUN, *(part for value in values for part in ("--set", value))]


def plan(*values: str) -> list[str]:
    return [*run(*values), "--dry-run"]


def evaluate(suite: str, *arguments: str) -> list[str]:
    return ["eval", "{here}/llama", "--suite", suite, *arguments]


def merge(*values: str, wide: bool = False) -> list[str]:
    """The plan of a merge of roles, of which `wide` is a copy of the target's model."""
    role = ["roles.sources.wide.model={here}/wide"] if wide else []
    return plan(*role, "methods.M.method=merge", *(f"methods.M.{value}" for value in values))


def check(here: Path, arguments: list[str], expected: str, *, rows_left: bool = False) -> None:
    """The command ends in exit status 2 and one sentence, with nothing half-written.

    rows_left: a row of the run cannot be made, and the table of the others is printed before the sentence.
    """
    before = _files(here)
    status, printed, said = answer(*(part.replace("{here}", str(here)) for part in arguments))
    assert status == 2, said
    assert re.search(expected, sentence(said)), said
    assert bool(printed) == rows_left
    after = _files(here)
    assert {name: raw for name, raw in after.items() if name in before} == before
    assert all(name.startswith("root/") or name.endswith(".lock") for name in after.keys() - before.keys())
    if (here / "root").is_dir() and not {"list", "gc", "tables", "report", "diff"} & set(arguments):
        assert_whole(here / "root")
