import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, Field

from fusion.errors import UserError
from fusion.registry import Registry

LAZY: Registry[int] = Registry("thing", own={"late": "fusellm_own_part"})


def test_what_is_registered_is_found() -> None:
    registry: Registry[Callable[[], int]] = Registry("thing")

    @registry.register("one", reference="Peano 1889")
    def one() -> int:
        return 1

    registry.register("two")(lambda: 2)
    assert registry.get("one") is one and registry.names() == ["one", "two"]
    assert registry.reference("one") == "Peano 1889" and registry.reference("two") == ""


def test_unknown_names_hear_the_nearest_spelling() -> None:
    registry: Registry[int] = Registry("alignment")
    with pytest.raises(UserError, match=r"There is no alignment 'dtw': there are none\."):
        registry.get("dtw")
    registry.register("same_end")(1)
    registry.register("dtw")(2)
    with pytest.raises(
        UserError, match=r"no alignment 'same-end' \(did you mean 'same_end'\?\): there are dtw, same_end"
    ):
        registry.get("same-end")


def test_two_of_one_name_collide() -> None:
    registry: Registry[object] = Registry("map")
    registry.register("a")(object())
    with pytest.raises(UserError, match="'a' is registered twice"):
        registry.register("a")(object())


def _package(folder: Path, name: str, entry_points: str, code: str) -> None:
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[fusellm.test_things]\n{entry_points}\n")


def test_entry_points_are_named_without_importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry: Registry[Callable[[], str]] = Registry("thing", "fusellm.test_things")
    assert registry.names() == []
    _package(tmp_path, "fusellm_good", "good = fusellm_good:thing", "def thing():\n    return 'good'\n")
    _package(tmp_path, "fusellm_bad", "bad = fusellm_bad:thing", "raise RuntimeError('not today')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.names() == ["bad", "good"]
    assert registry.get("good")() == "good" and registry.get("good")() == "good"
    with pytest.raises(UserError, match=r"thing 'bad' could not be imported from 'fusellm_bad:thing' .*not today"):
        registry.get("bad")


def test_entry_points_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry: Registry[Callable[[], str]] = Registry("thing", "fusellm.test_things")
    registry.register("mine")(lambda: "mine")
    _package(tmp_path, "fusellm_first", "mine = fusellm_first:thing", "")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="'mine' is registered by 'tests'"):
        registry.get("mine")
    _package(tmp_path, "fusellm_second", "mine = fusellm_second:thing", "")
    other: Registry[Callable[[], str]] = Registry("thing", "fusellm.test_things")
    assert other.names() == ["mine"]
    with pytest.raises(UserError, match=r"'mine' is offered by two packages, as 'fusellm_\w+:thing' and"):
        other.get("mine")


class _Scale(BaseModel):
    model_config = ConfigDict(extra="forbid")

    tau: float = Field(1.0, gt=0, alias="temperature")


def test_a_choice_has_validated_parameters_and_an_identity() -> None:
    registry: Registry[Callable[..., float]] = Registry("rule")

    @registry.register("plain", version=2)
    def plain(x: float) -> float:
        return x

    @registry.register("scaled", version=3, parameters=_Scale)
    def scaled(x: float, *, parameters: _Scale) -> float:
        return x / parameters.tau

    assert registry.choose("plain").value(2.0) == 2.0
    assert registry.choose("plain").identity() == {"name": "plain", "version": 2}
    chosen = registry.choose({"name": "scaled", "temperature": 4})
    assert chosen.value(2.0) == 0.5
    assert chosen.identity() == {"name": "scaled", "version": 3, "parameters": {"temperature": 4.0}}
    assert registry.choose("scaled").identity()["parameters"] == {"temperature": 1.0}
    for given, message in (
        ({"name": "plain", "tau": 1}, "'plain' has no parameters, and tau is given"),
        ({"name": "scaled", "temprature": 1}, "does not accept temprature .did you mean 'temperature'"),
        ({"name": "scaled", "temperature": 0}, "does not accept temperature .*greater than 0"),
        ({"tau": 1}, "given as a name or as"),
    ):
        with pytest.raises(UserError, match=message):
            registry.choose(given)


def test_our_own_parts_are_imported_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fusellm_own_part.py").write_text(
        "import tests.fusion.test_registry as t\nt.LAZY.register('late')(7)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert LAZY.names() == ["late"] and "fusellm_own_part" not in sys.modules
    assert LAZY.get("late") == 7 and "fusellm_own_part" in sys.modules
