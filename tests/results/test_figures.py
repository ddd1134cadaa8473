from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from results.errors import UserError
from results.figures import Curve, audit_figure, equal_quality, learning_curves
from results.records import Record, read, write
from tests.results.sample import curve

LOG2 = np.log(2)


def records(folder: Path, *parts: list[Record]) -> pd.DataFrame:
    for i, part in enumerate(parts):
        write(folder / f"{i}.parquet", part)
    return read(folder)


def line(method: str, values: dict[int, float]) -> Curve:
    return Curve(method, np.array(list(values)), np.array(list(values.values())))


def test_curves_and_equal_quality_as_data(tmp_path: Path) -> None:
    found = learning_curves(
        records(
            tmp_path,
            curve("CLM", {0: 0.8, 1000: 0.7, 2000: 0.66}),
            curve("FuseLLM", {0: 0.8, 1000: 0.68, 2000: 0.64}),
        ),
        ["CLM", "FuseLLM"],
        tmp_path / "figure",
    )
    clm, fused = found.curves
    assert clm.tokens.tolist() == [0, 1000, 2000]
    assert fused.values == pytest.approx(np.array([0.8, 0.68, 0.64]) / LOG2)
    ahead, behind = found.equal_quality
    assert (ahead.method, ahead.other, ahead.other_tokens) == ("FuseLLM", "CLM", 2000)
    assert ahead.tokens == pytest.approx(1500)
    assert ahead.quality == pytest.approx(0.66 / LOG2)
    assert behind.tokens is None and behind.sentence(4).endswith("not reached")
    assert [one.name for one in found.files] == ["figure.png", "figure.svg"]


def test_the_first_crossing_counts_and_equality_is_reached() -> None:
    wavy = line("a", {0: 1.0, 10: 0.5, 20: 0.9, 30: 0.4})
    assert equal_quality(wavy, line("b", {0: 1.0, 30: 0.5}), higher_is_better=False).tokens == 10
    assert equal_quality(wavy, line("b", {0: 1.2, 30: 1.1}), higher_is_better=False).tokens == 0
    rising = line("a", {0: 0.2, 10: 0.4})
    assert equal_quality(rising, line("b", {0: 0.2, 30: 0.3}), higher_is_better=True).tokens == pytest.approx(5)


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 2), min_size=2, max_size=8), st.floats(0.1, 2))
def test_the_interpolated_point_lies_on_the_curve(values: list[float], goal: float) -> None:
    own = Curve("a", np.arange(len(values)) * 100, np.array(values))
    found = equal_quality(own, line("b", {0: 3.0, 50: goal}), higher_is_better=False)
    if found.tokens is None:
        assert min(values) > goal
    else:
        there = np.interp(found.tokens, own.tokens, own.values)
        assert there <= goal + 1e-9
        assert all(value > goal for value, at in zip(values, own.tokens, strict=True) if at < found.tokens)


def test_seeds_are_averaged_and_unfinished_steps_left_out(tmp_path: Path) -> None:
    found = learning_curves(
        records(
            tmp_path,
            curve("CLM", {0: 0.8, 10: 0.7, 20: 0.6}, seed=0),
            curve("CLM", {0: 0.8, 10: 0.6}, seed=1),
        ),
        ["CLM"],
        tmp_path / "figure",
    )
    assert found.curves[0].tokens.tolist() == [0, 10]
    assert found.curves[0].values == pytest.approx(np.array([0.8, 0.65]) / LOG2)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    both = records(tmp_path, curve("CLM", {0: 0.8}), curve("FuseLLM", {0: 0.8}, tasks=("a", "b", "c")))
    with pytest.raises(UserError, match="other domains"):
        learning_curves(both, ["CLM", "FuseLLM"], tmp_path / "f")
    with pytest.raises(UserError, match="no records of KD along its training"):
        learning_curves(both, ["CLM", "KD"], tmp_path / "f")
    with pytest.raises(UserError, match="unknown baseline"):
        learning_curves(both, ["FuseLLM"], tmp_path / "f")
    moved = both.copy()
    moved.loc[moved["method"] == "FuseLLM", "denominator"] = 99.0
    with pytest.raises(UserError, match="disagree about the data"):
        learning_curves(moved[moved["task"] != "c"], ["CLM", "FuseLLM"], tmp_path / "f")


def measures() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    names = ["nats_per_byte", "paired", "p_next_native", "p_next_mapped", "p_next_target", "chosen"]
    logs = ["bucket_ll_native", "bucket_ll_mapped", "bucket_ll_target"]
    rows = [
        {"source": source, "domain": domain}
        | {one: rng.random() for one in names}
        | {one: -rng.random() for one in logs}
        for source in ("Gemma", "Qwen")
        for domain in ("code", "news", "wiki")
    ]
    rows[0]["p_next_mapped"] = float("nan")
    return pd.DataFrame(rows)


def test_figures_have_the_same_bytes_every_time(tmp_path: Path) -> None:
    parts = records(tmp_path / "r", curve("CLM", {0: 0.8, 10: 0.7}), curve("FuseLLM", {0: 0.8, 10: 0.69}))
    for folder in ("one", "two"):
        learning_curves(parts, ["CLM", "FuseLLM"], tmp_path / folder / "curves", title="main", banner="plumbing")
        audit_figure(measures().iloc[:3], tmp_path / folder / "audit", title="audit")
    for name in ("curves.png", "curves.svg", "audit.png", "audit.svg"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert (tmp_path / "one" / "curves.png").read_bytes().startswith(b"\x89PNG")
    for name in ("curves.svg", "audit.svg"):
        assert "<dc:date>" not in (tmp_path / "one" / name).read_text()


def test_bad_measures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lack the columns paired"):
        audit_figure(measures().drop(columns="paired"), tmp_path / "a")
    with pytest.raises(UserError, match="no measures"):
        audit_figure(measures().iloc[:0], tmp_path / "a")
    with pytest.raises(UserError, match="twice"):
        audit_figure(pd.concat([measures(), measures()]), tmp_path / "a")
