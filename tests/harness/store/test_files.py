"""Files and locks of the store: nothing half-written, nothing misnamed, nobody waits for ever."""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from fusion.errors import UserError
from harness.evaluation import suite
from harness.evaluation.suite import read_lines, write_lines
from harness.store import files
from harness.store.artifacts import Spec, Store
from harness.store.files import disk_errors, intact_lines, parse_json, write_atomically

SPECS = [Spec("task", name, 1, {}, {"name": name}) for name in ("one", "two", "three")]


@pytest.mark.parametrize(
    "damage", [b"\0" * 40 + b"\n", b'{"a": "\xff"}\n', b'{"a": 1\n', b"[1]\n", b'{"a": 1}', b"\n", b"[" * 99999 + b"\n"]
)
def test_damaged_lines_are_made_again_and_never_read(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    write_lines(path, [{"example": "1"}])
    with path.open("ab") as file:
        file.write(damage)
    if damage not in (b"[1]\n", b'{"a": 1}'):
        with pytest.raises(UserError, match=r"examples.jsonl, line 2 is damaged \(.+\): remove "):
            read_lines(path)
    assert [parse_json(line) for line in intact_lines(path)] == [{"example": "1"}]
    assert intact_lines(tmp_path / "absent") == []


def test_processes_of_one_number_do_not_share_a_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the main processes of two containers do that share a folder."""
    names = set()
    monkeypatch.setattr(os, "getpid", lambda: 7)
    rename = files.rename_durably
    monkeypatch.setattr(files, "rename_durably", lambda beside, path: (names.add(beside.name), rename(beside, path)))
    for _ in range(3):
        write_atomically(tmp_path / "a", "text")
    assert len(names) == 3 and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_data_is_on_the_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and folder of an artifact is synced before the rename, and the folder that has the name after it."""
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        done.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        done.append(f"renamed to {target}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)

    def build(folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_bytes(b"1")

    store = Store(tmp_path)
    path = store.ensure(SPECS[0], build)
    partial = store._partial_folder(SPECS[0])
    at = done.index(f"renamed to {path}")
    before, after = done[:at], done[at:]
    assert {str(partial / name) for name in ("model/weights", "model", "manifest.json", "")} - {f"{partial}/"} <= {
        *before, f"{partial}/"
    }  # fmt: skip
    assert str(partial) in before and str(path.parent) in after


def test_a_text_that_utf8_does_not_have_is_kept(tmp_path: Path) -> None:
    """Bytes of a path that are not UTF-8, or half an emoji in an answer."""
    value = {"command": ["caf\udce9", "\ud83d"]}
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json", "") == value
    write_atomically(tmp_path / "page.html", "an answer \ud83d")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == "an answer \\ud83d"


@pytest.mark.parametrize(
    ("error", "free", "is_full"),
    [
        (RuntimeError("shapes do not match"), 0, False),
        (ZeroDivisionError("division by zero"), 0, False),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), 0, True),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), 1 << 40, False),
        (ValueError("I/O error: No space left on device (os error 28)"), 1 << 40, True),
        (OSError("1000 requested and 512 written"), 0, True),
    ],
)
def test_a_full_disk_renames_no_other_error(
    error: Exception, free: int, is_full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(Exception) as raised, disk_errors(tmp_path / "folder"):
        raise error
    assert (getattr(raised.value, "errno", None) == errno.ENOSPC) is is_full
    assert is_full or raised.value is error


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("9" * 5000, "too many digits"),
        ("[" * 200_000, "nested too deeply"),
        (b'"\xff"', "byte 1 is not UTF-8"),
        ('{"a" 1}', "Expecting ':' delimiter at character 6"),
    ],
)
def test_what_is_wrong_with_json_is_said(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)
    assert parse_json(json.dumps({"a": ["\ud83d", 1e308]})) == {"a": ["\ud83d", 1e308]}


def test_an_infinite_log_likelihood_is_kept(tmp_path: Path) -> None:
    from harness.evaluation.lm_eval.examples import plain
    from harness.evaluation.vote import chosen_indices

    write_lines(tmp_path / "a", [plain({"choices": ["x", "y"], "answer": [[-float("inf"), False], [-3.5, True]]})])
    (line,) = suite.read_lines(tmp_path / "a")
    assert chosen_indices(line) == {"acc": 1, "acc_norm": 1}
