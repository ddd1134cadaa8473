"""Methods: their parameters and what they ask of the context."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baselines.fusellm import FuseLLM, FuseLLMParameters
from baselines.method import METHODS, Candidate, Parameters, Role, method, named_roles
from fusion.errors import UserError
from fusion.losses.specs import Fusion, Learning
from fusion.switches import PRESETS, Switches


class _Context:
    """Notes what it is asked for."""

    seed = 0
    label = "row"
    sources: Sequence[str] = ("a", "b")

    def __init__(self) -> None:
        self.asked: list[tuple[float, Learning | None]] = []

    def model(self, role: str) -> Candidate:
        return Candidate(Path(role), role, False)

    def extract(self, role: str) -> Path:
        return Path(role)

    def train(self, *, lam: float, learn: Learning | None = None) -> Candidate:
        self.asked.append((lam, learn))
        return Candidate(Path("trained"), "trained", True)


def _asked(**parameters: Any) -> tuple[float, Fusion]:
    context = _Context()
    FuseLLM(FuseLLMParameters(**parameters)).build(context)
    ((lam, fusion),) = context.asked
    assert isinstance(fusion, Fusion)
    return lam, fusion


def test_the_methods_of_the_main_job_are_registered() -> None:
    for name in ("as_is", "clm", "fusellm"):
        assert method(name).schema
    with pytest.raises(UserError, match="did you mean 'fusellm'"):
        method("fusellmm")
    assert set(METHODS.names()) >= {"as_is", "clm", "fusellm"}


def test_a_role_is_what_is_typed_as_one() -> None:
    class Settings(Parameters):
        base: float = 2.0
        pivot: Role = "target"
        teachers: list[Role] | None = None
        models: tuple[str, ...] = ("no role",)

    assert named_roles(Settings()) == ["target"]
    assert named_roles(Settings(pivot="a", teachers=["b", "c"])) == ["a", "b", "c"]


def test_presets_set_switches_and_nothing_else() -> None:
    lam, fusion = _asked()
    assert (lam, fusion.map, fusion.map_on, list(fusion.sources)) == (0.9, "mined", "bytes", ["a", "b"])
    assert fusion.switches == Switches()
    _, published = _asked(preset="published")
    assert (published.map, published.map_on) == ("mined", "strings")
    assert published.switches == Switches(**PRESETS["published"])


@given(st.sampled_from(["corrected", "published"]), st.sampled_from(["bucket", "renormalise", "gold"]))
def test_a_switch_set_alone_goes_before_the_preset(preset: str, tail: str) -> None:
    _, fusion = _asked(preset=preset, tail=tail, **{"lambda": 0.5}, map="first_piece", map_on="bytes", sources=["b"])
    assert fusion.switches == Switches(**{**PRESETS[preset], "tail": tail})
    assert fusion.map == "first_piece" and list(fusion.sources) == ["b"]


def test_clm_is_lambda_one_without_fusion() -> None:
    context = _Context()
    kind = method("clm")
    kind(kind.schema()).build(context)
    assert context.asked == [(1.0, None)]


def test_an_unknown_source_is_named() -> None:
    with pytest.raises(UserError, match="names the source 'c'; the experiment's are a, b"):
        _asked(sources=["a", "c"])
