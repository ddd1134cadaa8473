"""Methods: their parameters and what they ask of the context."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from baselines.clm import clm
from baselines.fusellm import FuseLLMParameters, fusellm
from baselines.listing import Setting, describe
from baselines.merge import MergeParameters
from baselines.method import Candidate, Context, Parameters, Reference, Role, RoleOrRow, Row
from baselines.registry import METHODS, get_method, method, schema_of
from baselines.training import SHARED, RowTraining, TrainedParameters
from fusion.docstrings import field_docstrings
from fusion.errors import UserError
from fusion.losses.fusion_loss import FusionLoss
from fusion.losses.loss import Loss
from fusion.switches import PRESETS, Switches
from harness.config.schema import TrainingConfig


class _Context:
    """Notes what it is asked for."""

    seed = 0
    label = "row"
    sources: Sequence[str] = ("a", "b")

    def __init__(self) -> None:
        self.asked: list[tuple[float, Loss | None]] = []

    def model(self, role: str) -> Candidate:
        return Candidate(Path(role), role, False)

    def extract(self, role: str) -> Path:
        return Path(role)

    def candidate(self, name: str) -> Candidate:
        return Candidate(Path(name), name, True)

    def train(self, *, lam: float, loss: Loss | None = None, **given: Any) -> Candidate:
        self.asked.append((lam, loss))
        self.given = given
        return Candidate(Path("trained"), "trained", True)


def _asked(**parameters: Any) -> tuple[float, FusionLoss]:
    context: Any = _Context()
    fusellm(context, FuseLLMParameters(**parameters))
    ((lam, fusion),) = context.asked
    assert isinstance(fusion, FusionLoss)
    return lam, fusion


def test_the_methods_of_the_main_job_are_registered() -> None:
    for name in ("as_is", "clm", "fusellm"):
        assert issubclass(schema_of(get_method(name)), Parameters)
    with pytest.raises(UserError, match="did you mean 'fusellm'"):
        get_method("fusellmm")
    assert set(METHODS.names()) >= {"as_is", "clm", "fusellm"}


def test_a_role_is_what_is_typed_as_one() -> None:
    class Settings(Parameters):
        base: float = 2.0
        pivot: Role = "target"
        teachers: list[Role] | None = None
        models: tuple[str, ...] = ("no role",)

    role = Reference(("role",))
    assert Settings().references() == [("target", role)]
    assert Settings(pivot="a", teachers=["b", "c"]).references() == [("a", role), ("b", role), ("c", role)]


def test_rows_and_models_can_be_named() -> None:
    class Settings(Parameters):
        start: Row = "CLM"
        models: list[RoleOrRow] | None = None

    row, either = Reference(("row",)), Reference(("role", "row"))
    assert Settings(models=["a"]).references() == [("CLM", row), ("a", either)]
    configuration = {"merge_method": "slerp", "base_model": "x", "models": [{"model": "CLM"}, {"model": "x"}]}
    names = MergeParameters(mergekit=configuration).references()
    anything = Reference(("role", "row", "model"))
    assert names == [("target", either), ("x", anything), ("CLM", anything)]


def test_presets_set_switches_and_nothing_else() -> None:
    lam, fusion = _asked()
    assert (lam, fusion.map, fusion.map_on, list(fusion.sources)) == (0.9, "first_piece", "bytes", ["a", "b"])
    assert fusion.switches == Switches()
    _, published = _asked(preset="published")
    assert (published.map, published.map_on) == ("mined", "strings")
    assert published.switches == Switches(**PRESETS["published"])


@given(st.sampled_from(["corrected", "published"]), st.sampled_from(["bucket", "renormalise", "gold"]))
def test_a_switch_set_alone_goes_before_the_preset(preset: str, tail: str) -> None:
    _, fusion = _asked(preset=preset, tail=tail, **{"lambda": 0.5}, map="byte_prefix", map_on="bytes", sources=["b"])
    assert fusion.switches == Switches(**{**PRESETS[preset], "tail": tail})
    assert fusion.map == "byte_prefix" and list(fusion.sources) == ["b"]


def test_clm_is_lambda_one_without_fusion() -> None:
    context: Any = _Context()
    clm(context, TrainedParameters())
    assert context.asked == [(1.0, None)]
    assert context.given == {"start": None, "training": {}, "balance": "none"}


def test_every_trained_method_has_its_own_settings_start_and_balance() -> None:
    own = {"training": {"learning_rate": 1e-4, "epochs": 4}, "warm_start": "CLM"}
    for name in ("clm", "fusellm", "distillation", "uld", "alm", "bpm", "gold", "simct", "strict", "xtoken"):
        context: Any = _Context()
        part = get_method(name)
        more = {} if name == "clm" else {"balance": "rescale"}
        part.value(context, schema_of(part).model_validate({**own, **more}))
        start = context.candidate("CLM")
        assert context.given == {"start": start, "balance": "none", **more, "training": own["training"]}
    with pytest.raises(ValueError, match=r"sequence_length is the same for all rows: set training.sequence_length"):
        TrainedParameters.model_validate({"training": {"sequence_length": 100}})


def _value_type(field: FieldInfo) -> tuple[Any, list[Any]]:
    """The type of a setting that is not null, and what restricts it; of one that can be tuned those of a value."""
    given = get_args(field.annotation)[0]
    if not hasattr(given, "__metadata__") or not get_args(given.__origin__):
        return given, field.metadata
    value, restricted, _ = get_args(get_args(given.__origin__)[0])
    return value, restricted.metadata


def test_a_row_sets_what_the_experiment_sets_unless_it_is_shared() -> None:
    own, whole = RowTraining.model_fields, TrainingConfig.model_fields
    assert {*own, *SHARED} == whole.keys() and not own.keys() & set(SHARED)
    for name, field in own.items():
        annotation, metadata = _value_type(field)
        assert str(annotation) == str(whole[name].annotation)
        assert str(metadata) == str(whole[name].metadata)
        assert field.description == f"{whole[name].description}; null: the experiment's"


def test_an_unknown_source_is_named() -> None:
    with pytest.raises(UserError, match="names the source 'c'; the experiment's are a, b"):
        _asked(sources=["a", "c"])


def test_a_decorated_function_is_a_method_and_stays_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS, "_parts", dict(METHODS._parts))  # nothing of ours is imported in this test

    class Settings(Parameters):
        role: Role = "target"

    @method("probe", needs=("teacher",), reference="nowhere", version=3)
    def probe(context: Context, parameters: Settings) -> Candidate:
        """Takes a role's model.

        And more.
        """
        return context.model(parameters.role)

    part = get_method("probe")
    assert part.value is probe and schema_of(part) is Settings
    assert (part.needs, part.reference, part.version) == (("teacher",), "nowhere", 3)
    context: Any = _Context()
    assert probe(context, Settings(role="a")) == context.model("a")
    described = describe("probe")
    assert (described.summary, described.needs) == ("Takes a role's model.", ("teacher",))
    assert described.settings == (Setting("role", "role", "target", ""),)


def _no_annotation(context, parameters):  # type: ignore[no-untyped-def]
    return context.model("target")


def _other_schema(context: Context, parameters: dict[str, int]) -> Candidate:
    return context.model("target")


def _three_arguments(context: Context, parameters: Parameters, more: int) -> Candidate:
    return context.model("target")


def _unknown_annotation(context: Context, parameters: "Nowhere") -> Candidate:  # type: ignore[name-defined]  # noqa: F821
    return context.model("target")


@pytest.mark.parametrize("wrong", [_no_annotation, _other_schema, _three_arguments, _unknown_annotation, 1, Parameters])
def test_what_is_no_function_of_context_and_parameters_is_refused(wrong: Any) -> None:
    with pytest.raises(UserError, match=r"method 'wrong' must be a function of .context, parameters. whose second"):
        method("wrong")(wrong)
    assert "wrong" not in METHODS.names()


def test_listing_reads_types_choices_and_defaults_from_the_schema() -> None:
    def settings(name: str) -> dict[str, Setting]:
        return {setting.name: setting for setting in describe(name).settings}

    merge = settings("merge")
    assert merge["merge_method"].type.startswith(
        "linear or slerp or task_arithmetic or ties or dare_ties or varm or sce_"
    )
    assert merge["weights"].type == "uniform or tuned or list of number"
    assert (merge["models"].type, merge["models"].default) == ("list of role or row or null", "null")
    assert (merge["mergekit"].type, merge["scale"].type, merge["scale"].default) == ("mapping or null", "number", "1.0")
    assert settings("alm").keys() >= {"lambda", "teachers", "temperature"}
    for name in METHODS.names():
        assert all(setting.type and setting.default and setting.description for setting in describe(name).settings), (
            name
        )


def test_listing_the_names_imports_no_method() -> None:
    code = (
        "import sys; from baselines.registry import METHODS; METHODS.names(); "
        "sys.exit(bool({'baselines.merge', 'baselines.fusellm', 'torch'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_listing_gives_every_switch_its_choices_defaults_and_meaning() -> None:
    settings = {setting.name: setting for setting in describe("fusellm").settings}
    descriptions = field_docstrings(Switches)
    assert list(settings)[:3] == ["lambda", "balance", "preset"] and list(settings)[-2:] == ["training", "warm_start"]
    assert settings["preset"].type == "corrected or published"
    for switch in fields(Switches):
        setting, published = settings[switch.name], PRESETS["published"].get(switch.name)
        assert setting.description == descriptions[switch.name]
        assert setting.default == json.dumps(switch.default).strip('"') + (
            f" (published: {published})" if published else ""
        )
    assert settings["tail"].type == "bucket or renormalise or gold"
    assert settings["alignment"].type == "dtw or same_end or mapping"  # one with parameters is {name: NAME, ...}
    assert settings["map"].type == "byte_prefix or em or first_piece or mined"


def test_parameters_hold_the_effective_value_of_every_switch() -> None:
    """Under a preset, and again when they are read from what was written."""
    published = FuseLLMParameters(preset="published", tail="gold", unmapped=None)
    expected = {**PRESETS["published"], "tail": "gold", "map": "mined", "map_on": "strings"}
    assert expected.items() <= published.model_dump(exclude_unset=True).items()
    assert FuseLLMParameters.model_validate(published.model_dump(mode="json", by_alias=True)) == published
