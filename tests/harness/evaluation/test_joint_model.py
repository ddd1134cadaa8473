"""Ensembles in the suites and in experiments, on tiny models."""

from pathlib import Path
from typing import Any

import pytest

from baselines.ensemble import EnsembleParameters, ensemble, make_ensemble
from baselines.method import Candidate, Ensemble, Member
from fusion.errors import UserError
from harness.config.loading import load
from harness.config.validation import method_parameters, suite_config
from harness.data.corpus import Document
from harness.evaluation.evaluated_model import EvaluatedModel
from harness.evaluation.joint_model import JointModel, make_joint_model
from harness.evaluation.perplexity import PerplexityConfig, measure_documents
from harness.evaluation.suite import SUITES, SuiteResult
from harness.evaluation.vote import chosen_indices, voted
from harness.experiment import run
from harness.experiment.plan import plan
from harness.models.resolution import ModelSpec, count_parameters, resolve
from harness.store.artifacts import Store
from harness.store.costs import Costs
from tests.harness.evaluation.measuring import completions, lines
from tests.harness.suite_rows import make_data_root
from tests.harness.tiny_models import save_model

pytestmark = pytest.mark.usefixtures("no_network")

CONTEXT = 8192


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data_root(tmp_path_factory.mktemp("data"), 3)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two with one tokenizer, the second with rows that have no token, and one with another tokenizer."""
    from transformers import GPTNeoXConfig, LlamaConfig

    folder = tmp_path_factory.mktemp("models")
    settings: dict[str, Any] = {"max_position_embeddings": CONTEXT}
    made = {
        "one": save_model(folder / "one", LlamaConfig, 400, 0, 6, **settings),
        "two": save_model(folder / "two", GPTNeoXConfig, 400, 1, 6, **settings),
        "other": save_model(folder / "other", LlamaConfig, 330, 2, 6, **settings),
    }
    return made | {"wide": _widened(made["two"], folder / "wide")}


def _widened(model: Path, folder: Path) -> Path:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    loaded = AutoModelForCausalLM.from_pretrained(model)
    loaded.resize_token_embeddings(416)
    loaded.save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(model).save_pretrained(folder)
    return folder


def evaluated(folder: Path, root: Path, label: str | None = None) -> EvaluatedModel:
    spec = ModelSpec(name=str(folder), dtype="float32")
    found = resolve(spec, root / "models")
    return EvaluatedModel(
        label or folder.name, found.fingerprint, spec, "float32", "cpu", 2048, count_parameters(folder), root
    )


def together(
    members: dict[str, Path], root: Path, combine: Any = "probabilities", weights: dict[str, float] | None = None
) -> JointModel:
    """The members by role, the first of which is the pivot."""
    alone = {role: evaluated(folder, root, role) for role, folder in members.items()}
    made = make_ensemble(
        [
            Member(role, Candidate(members[role], one.fingerprint, False), (weights or {}).get(role, 1 / len(members)))
            for role, one in alone.items()
        ],
        pivot=next(iter(members)),
        combine=combine,
        map="first_piece",
        label="E",
    )
    return make_joint_model("E", made, [(alone[m.name], m.weight) for m in made.members])


def measure(name: str, section: dict[str, Any], of: EvaluatedModel, root: Path, data: Path) -> SuiteResult:
    return SUITES.get(name)(suite_config(name, section), data).measure(of, Store(root / "artifacts"), Costs("cpu"))


SECTIONS: dict[str, dict[str, Any]] = {
    "bbh": {"tasks": ["navigate"], "max_new_tokens": 6},
    "commonsense": {"tasks": ["arc_easy", "boolq"]},
    "generative": {"tasks": ["triviaqa", "lambada_openai"], "max_new_tokens": 6},
    "multipl_e": {"tasks": ["js"], "samples": 2, "max_new_tokens": 6, "execute": False},
}


def answers(name: str, of: EvaluatedModel, root: Path, data: Path) -> Any:
    measured = measure(name, SECTIONS[name], of, root, data)
    assert not measured.missing
    if name == "multipl_e":
        return [problem["completions"] for problem in completions(measured.artifacts["js samples"])]
    return {task: [line["answer"] for line in found] for task, found in lines(measured).items()}


def flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    return [one for part in value for one in flat(part)] if isinstance(value, list) else [value]


@pytest.mark.slow
@pytest.mark.parametrize("name", SECTIONS)
def test_every_suite_takes_ensembles(name: str, rows: Path, models: dict[str, Path], tmp_path: Path) -> None:
    one, two, other, wide = (models[role] for role in ("one", "two", "other", "wide"))
    alone = flat(answers(name, evaluated(one, tmp_path), tmp_path, rows))

    def same(a: list[Any], b: list[Any]) -> bool:
        return all(x == (pytest.approx(y, abs=1e-3) if isinstance(y, float) else y) for x, y in zip(a, b, strict=True))

    twice = flat(answers(name, together({"a": one, "b": one}, tmp_path), tmp_path, rows))
    assert same(twice, alone)
    both = flat(answers(name, together({"a": one, "b": two}, tmp_path), tmp_path, rows))
    turned = flat(answers(name, together({"b": two, "a": one}, tmp_path), tmp_path / "turned", rows))
    padded = flat(answers(name, together({"a": one, "b": wide}, tmp_path), tmp_path, rows))
    assert not same(both, alone) and same(turned, both)
    assert same(padded, both)  # rows without a token change nothing
    mixed = flat(answers(name, together({"a": one, "c": other}, tmp_path), tmp_path, rows))
    assert not same(mixed, alone) and not same(mixed, both)


def test_perplexity_of_ensembles(models: dict[str, Path], tmp_path: Path) -> None:
    texts = ["the quick brown fox jumps over 猫 and ale", "seven wizards"]
    documents = [Document(str(i), "d", text, str(i)) for i, text in enumerate(texts)]
    section = PerplexityConfig.model_construct(window=16, mode="rolling", stride=None)

    def nats(of: EvaluatedModel) -> list[float]:
        return [r["nats"] for r in measure_documents(of.predictor, of.tokenizer, documents, section, batch_tokens=64)]

    alone = nats(evaluated(models["one"], tmp_path))
    assert nats(together({"a": models["one"], "b": models["one"]}, tmp_path)) == pytest.approx(alone, rel=1e-5)
    both = nats(together({"a": models["one"], "b": models["two"]}, tmp_path))
    assert both == pytest.approx(nats(together({"b": models["two"], "a": models["one"]}, tmp_path)), rel=1e-5)
    assert both != pytest.approx(alone, rel=1e-2)
    assert nats(together({"a": models["one"], "c": models["other"]}, tmp_path)) != pytest.approx(both, rel=1e-2)


@pytest.mark.slow
def test_a_vote_counts_the_members_answers(rows: Path, models: dict[str, Path], tmp_path: Path) -> None:
    members = {"a": models["one"], "b": models["two"], "c": models["other"]}
    weights = {"a": 0.4, "b": 0.35, "c": 0.25}
    for name, task, metric in (("commonsense", "arc_easy", "acc_norm"), ("bbh", "navigate", "exact_match")):
        measured = measure(name, SECTIONS[name], together(members, tmp_path, "vote", weights), tmp_path, rows)
        found = {(e.task, e.example, e.metric): e.numerator for e in measured.examples()}
        alone = {
            r: lines(measure(name, SECTIONS[name], evaluated(m, tmp_path, r), tmp_path, rows))
            for r, m in members.items()
        }
        for number in range(3):
            given = {role: of_role[task][number] for role, of_role in alone.items()}
            (example,) = {line["example"] for line in given.values()}
            behind: dict[str, float] = {}
            for role, line in given.items():
                if name == "bbh":
                    key = str(line["filtered"]["get-answer"])
                else:
                    lls = [x[0] / len(c) for x, c in zip(line["answer"], line["choices"], strict=True)]
                    key = str(lls.index(max(lls)))
                behind[key] = behind.get(key, 0) + weights[role]
                if behind[key] == max(behind.values()):
                    score = line["scores"][metric]
            assert found[task, example, metric] == score
    measured = measure("generative", SECTIONS["generative"], together(members, tmp_path, "vote"), tmp_path, rows)
    assert measured.missing == {"lambada_openai": "there is no answer to vote on"}
    assert {e.task for e in measured.examples()} == {"triviaqa"}
    measured = measure("multipl_e", SECTIONS["multipl_e"], together(members, tmp_path, "vote"), tmp_path, rows)
    assert measured.missing == {"js": "there is no answer to vote on"}


def test_votes_by_hand() -> None:
    def line(choice: int, right: int) -> dict[str, Any]:
        log_p = [[-1.0 if i == choice else -2.0, False] for i in range(3)]
        scores = {"acc": float(choice == right), "acc_norm": 0.0, "other": 1.0}
        return {"example": "0", "cluster": "", "answer": log_p, "choices": ["a", "a", "a"], "scores": scores}

    def score(*votes: tuple[int, float]) -> float:
        members = [([line(choice, 1)], weight) for choice, weight in votes]
        (found,) = [e.numerator for e in voted("t", members, chosen_indices) if e.metric == "acc"]
        return found

    assert score((0, 0.4), (1, 0.3), (1, 0.3)) == 1
    assert score((0, 0.6), (1, 0.2), (1, 0.2)) == 0
    assert score((0, 0.5), (1, 0.5)) == score((1, 0.5), (0, 0.5)) == 0.5  # a draw
    assert score((0, 1 / 3), (1, 1 / 3), (2, 1 / 3)) == pytest.approx(1 / 3)
    # By its length a choice may be another one.
    assert chosen_indices({"answer": [[-3.0, 0], [-2.0, 0]], "choices": ["four", "x"]}) == {"acc": 1, "acc_norm": 0}


class _Context:
    seed = 0
    label = "E"
    sources = ("a", "b")
    validation_fingerprint = "text"

    def __init__(self, folders: dict[str, Path] | None = None) -> None:
        self._folders = folders or {}

    def model(self, role: str) -> Candidate:
        return Candidate(self._folders.get(role, Path("not", "made")), f"fingerprint of {role}", False)

    candidate = model

    def validation_nll(self, candidate: Candidate, label: str = "") -> float:
        return {"a": 0.7, "b": 0.9, "target": 0.8}[label]


def build(folders: dict[str, Path] | None = None, **parameters: Any) -> Ensemble:
    checked: Any = method_parameters("E", parameters, EnsembleParameters)
    return ensemble(_Context(folders), checked)  # type: ignore[arg-type]


def test_an_ensemble_does_not_depend_on_the_order() -> None:
    one = build(models=["target", "a", "b"], weights=[1, 2, 3])
    assert one == build(models=["b", "target", "a"], weights=[6, 2, 4])
    assert [(m.name, m.weight) for m in one.members] == [("target", 1 / 6), ("a", 1 / 3), ("b", 1 / 2)]
    assert one.fingerprint != build(models=["target", "a", "b"]).fingerprint
    assert one.fingerprint != build(models=["target", "a", "b"], weights=[1, 2, 3], combine="logits").fingerprint
    assert one.fingerprint != build(models=["target", "a", "b"], weights=[1, 2, 3], pivot="a").fingerprint
    assert [m.name for m in build(weights=[0, 1], pivot="b").members] == ["b"]


def test_weights_by_validation_text() -> None:
    from math import exp

    found = build(weights="validation", weight_temperature=0.5)
    assert {m.name: m.weight for m in found.members} == pytest.approx(
        {"a": 1 / (1 + exp(-0.4)), "b": exp(-0.4) / (1 + exp(-0.4))}
    )
    assert found.fingerprint != build(weights="validation").fingerprint


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"models": ["a"]}, "needs two models or more, not a"),
        ({"models": ["a", "a"]}, "names a model twice"),
        ({"models": ["a", "b"], "weights": [1.0]}, "1 numbers for 2 models"),
        ({"weights": [1.0, 2.0, 3.0]}, "3 weights for 2 models"),
        ({"weights": [1.0, -1.0]}, "A weight of an ensemble is -1"),
        ({"weights": [0.0, 0.0]}, "The weights of an ensemble sum to 0"),
        ({"models": ["a", "b"], "pivot": "c"}, "pivot = 'c' is none of the models a, b"),
        ({"pivot": "b", "weights": [1.0, 0.0]}, "the pivot b, which is none of the models that count: a"),
        ({"map": "mine"}, "did you mean 'mined'"),
    ],
)
def test_what_is_no_ensemble_is_refused_in_a_sentence(parameters: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build(**parameters)


def test_logits_of_other_tokenizers_are_refused_before_anything_is_loaded(models: dict[str, Path]) -> None:
    sentence = "E is a mean of logits, for which a and b must have one tokenizer, but theirs differ: .*probabilities"
    for a, b in (("one", "other"), ("other", "one")):
        with pytest.raises(UserError, match=sentence):
            build({"a": models[a], "b": models[b]}, combine="logits")
    assert build({"a": models["one"], "b": models["wide"]}, combine="logits").combine == "logits"
    assert build({"a": models["one"], "b": models["other"]}).combine == "probabilities"


def test_an_ensemble_does_not_search_beams(rows: Path, models: dict[str, Path], tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance

    lm = together({"a": models["one"], "b": models["two"]}, tmp_path).lm(batch_size=1, seed=0)
    request = Instance("generate_until", {}, ("the fox", {"until": ["."], "max_gen_toks": 4, "num_beams": 2}), 0)
    with pytest.raises(UserError, match=r"E answers greedily or by sampling .* num_beams"):
        lm.generate_until([request])


@pytest.mark.slow
def test_an_experiment_with_ensembles(experiment_file: Path, tmp_path: Path) -> None:
    overrides = [
        "methods.Ensemble.method=ensemble",
        "methods.Ensemble.models=[target,neox]",
        "methods.Votes.method=ensemble",
        "methods.Votes.models=[target,neox]",
        "methods.Votes.combine=vote",
    ]
    drop = [f"methods.{name}=null" for name in load(str(experiment_file)).methods if name != "CLM"]
    config = load(str(experiment_file), overrides=[*overrides, *drop])
    assert any("perplexity" in p.spec.kind for p in plan(config, tmp_path))
    folder = run.run(config, tmp_path)
    from harness.reporting.runs import open_run
    from harness.reporting.tables import run_table

    table = run_table(open_run(folder))
    cells = dict(zip(table.rows, table.cells, strict=True))
    assert cells["Ensemble"][0].value is not None
    assert cells["Votes"][0].value is None
