"""Configurations are put together from layers, and every mistake is named with the place that it stands in."""

from pathlib import Path

import pytest

from fusion.errors import UserError
from fusion.switches import Switches
from harness.config.errors import ConfigurationError
from harness.config.loading import load, validate
from harness.config.schema import Config
from harness.config.shipped import names
from harness.config.validation import method_parameters, parameters_model
from tests.harness.command import answer, sentences

ROOT = Path(__file__).parents[3]


def _write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("name", names("experiments"))
def test_every_shipped_experiment_holds_in_every_profile(name: str) -> None:
    assert validate([name]) == {name: []}


def test_every_experiment_of_the_documentation_holds() -> None:
    files = sorted(map(str, (ROOT / "docs").rglob("*.yaml")))
    assert files and validate(files) == {file: [] for file in files}


def test_all_mistakes_are_named_each_in_one_line() -> None:
    settings = [
        "a=1",
        "training.learning_rate=x",
        "seeds=1",
        "methods.CLM.lamda=1",
        "methods.FuseLLM.lambda=2",
        "methods.FuseLLM.sources=[Gemma-3-270m]",
        "suites.bhb.limit=1",
        "suites.bbh.limit=0",
        "suites.perplexity.windw=1",
        "roles.sources.x.modle=y",
        "reference=CML",
    ]
    _, printed, said = answer(*["experiment", "show", "main"], *(part for one in settings for part in ("--set", one)))
    expected = [
        "unknown key a: correct or remove it (--set a=1).",
        "training.learning_rate = 'x', which is wrong: Input should be a valid number",
        "seeds = 1, which is wrong: Input should be a valid list",
        "methods.CLM has an unknown key lamda",
        "methods.FuseLLM has lambda = 2, which is wrong",
        "There is no suite 'bhb' (did you mean 'bbh'?)",
        "suites.bbh.limit = 0, which is wrong",
        "unknown key suites.perplexity.windw (did you mean 'window'?)",
        "unknown key roles.sources.x.modle (did you mean 'model'?)",
        "lacks roles.sources.x.model: add it.",
        "reference 'CML' is no row (did you mean 'CLM'?)",
    ]
    assert not printed
    found = sentences(said)
    assert len(found) == len(expected)
    for part in expected:
        assert sum(part in sentence for sentence in found) == 1, (part, found)


def test_a_mistake_is_placed_in_the_file_that_has_it_last(tmp_path: Path) -> None:
    _write(
        tmp_path,
        base="extends: main\ntraining:\n  learning_rate: fast\n  epochs: -1\nmethods:\n  CLM: {lambda: 2}\n",
        mine="extends: base.yaml\ntraining:\n  epochs: -2\n",
    )
    with pytest.raises(ConfigurationError) as caught:
        load(str(tmp_path / "mine.yaml"), overrides=["corpus.max_bytes=0"])
    places = {".".join(problem.key): problem.place for problem in caught.value.problems}
    assert places == {
        "training.learning_rate": f"{tmp_path}/base.yaml, line 3",
        "training.epochs": f"{tmp_path}/mine.yaml, line 3",
        "methods.CLM.lambda": f"{tmp_path}/base.yaml, line 6",
        "corpus.max_bytes": "--set corpus.max_bytes=0",
    }
    assert all(str(problem).endswith(f"({problem.place}).") for problem in caught.value.problems)


def test_alternatives_of_one_value_are_one_mistake() -> None:
    with pytest.raises(ConfigurationError) as caught:
        load("main", overrides=["methods.M.method=merge", "methods.M.weights=[.nan,x]"])
    (problem,) = caught.value.problems
    assert problem.key == ("methods", "M", "weights")
    assert "'uniform' or 'tuned'; or: " in problem.sentence


def test_a_file_extends_a_file_and_null_removes(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    _write(
        tmp_path / "below",
        first="extends: quickstart\nprofile: micro\nseeds: [3]\nmethods:\n  Mine: {method: clm}\n  FuseLLM: null\n"
        "suites:\n  bbh: {limit: 1}\n",
        second="extends: first.yaml\nseeds: [4]\nmethods:\n  Mine: null\n  Mine 2: {method: clm}\n"
        "  FuseLLM: {method: clm}\n",
    )
    _write(tmp_path, third="extends: below/second.yaml\nroles:\n  sources: {reader: null}\nsuites:\n  bbh: null\n")
    config = load(str(tmp_path / "third.yaml"))
    assert (config.experiment, config.profile, config.seeds) == ("third", "micro", [4])
    assert list(config.methods) == ["target", "coder", "CLM", "FuseLLM", "FuseLLM shuffled", "Mine 2"]
    assert config.methods["FuseLLM"]["method"] == "clm", "a row that is null is forgotten, also by a later layer"
    assert "preset" not in config.methods["FuseLLM"]
    assert list(config.roles.sources) == ["coder"] and list(config.suites) == ["perplexity"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a": "extends: a.yaml\n"}, "a file cannot extend itself"),
        ({"a": "extends: b.yaml\n", "b": "extends: ./a.yaml\n"}, "b.yaml, which extends .*a.yaml: a file cannot"),
        ({"a": "extends: b.yaml\n"}, "There is no file .*/b.yaml: correct `extends` in .*/a.yaml"),
        ({"a": "extends: b.yaml\n", "b": "extends: mian\n"}, "no experiment 'mian' .did you mean 'main'."),
        ({"a": "extends: [main]\n"}, "a.yaml has extends = .*, which must be an experiment's name or a YAML file"),
        ({"a": "extends: b.yaml\n", "b": "- a\n"}, "b.yaml does not hold keys and values"),
    ],
)
def test_what_cannot_be_extended_is_refused(files: dict[str, str], expected: str, tmp_path: Path) -> None:
    _write(tmp_path, **files)
    with pytest.raises(UserError, match=expected):
        load(str(tmp_path / "a.yaml"))
    (problem,) = validate([str(tmp_path / "a.yaml")])[str(tmp_path / "a.yaml")]
    assert str(problem)


def test_files_and_models_that_are_not_there_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "text.txt").write_text("text", encoding="utf-8")
    _write(
        tmp_path,
        mine="extends: main\nprofile: small\ndata: {root: /nowhere}\ncorpus: {path: corpus.jsonl}\n"
        "validation: {path: some/set}\n"
        "roles:\n  target: {model: model}\n  sources:\n    a: {model: SmolLM}\n    b: {model: b.gguf}\n"
        "    c: {model: some/model, corpus: {path: text.txt}}\n"
        "training: {deepspeed: zero4}\nsuites:\n  perplexity:\n    documents: {path: /test.parquet}\n",
    )
    load("mine.yaml")
    problems = validate(["mine.yaml", "main"])
    assert problems["main"] == []
    assert {(".".join(p.key), p.place) for p in problems["mine.yaml"]} == {
        ("data.root", "mine.yaml, line 3"),
        ("corpus.path", "mine.yaml, line 4"),
        ("roles.sources.a.model", "mine.yaml, line 9"),
        ("roles.sources.b.model", "mine.yaml, line 10"),
        ("training.deepspeed", "mine.yaml, line 12"),
        ("suites.perplexity.documents.path", "mine.yaml, line 15"),
    }


def test_several_files_are_checked_in_their_own_profile(tmp_path: Path) -> None:
    _write(tmp_path, good="extends: quickstart\nprofile: micro\n", bad="extends: table6\nroles: {teacher: null}\n")
    good, bad = str(tmp_path / "good.yaml"), str(tmp_path / "bad.yaml")
    problems = validate([good, bad, "mian"])
    assert problems[good] == []
    assert [problem.sentence for problem in problems[bad]] == [
        "methods.KD needs a teacher, and there is none: say who it is in roles.teacher."
    ]
    assert "did you mean 'main'" in problems["mian"][0].sentence
    assert validate([good], profile="small")[good], "quickstart is not for this profile"


def test_the_resolved_configuration_has_every_switch_of_a_method() -> None:
    config = load("main", overrides=["methods.Mine={method: fusellm, preset: published, tail: gold}"])
    switches = set(Switches.__dataclass_fields__)
    for label in ("FuseLLM", "FuseLLM published", "Mine"):
        assert switches | {"map", "map_on", "lambda", "preset", "k", "sources"} < config.methods[label].keys()
        assert all(config.methods[label][name] is not None for name in switches | {"map", "map_on"})
    assert config.methods["FuseLLM"]["map_on"] == "bytes" and config.methods["FuseLLM"]["tail"] == "bucket"
    published, mine = config.methods["FuseLLM published"], config.methods["Mine"]
    assert {key for key in mine if mine[key] != published[key]} == {"tail"}
    assert config.methods["CLM"] == {"method": "clm", "training": None, "warm_start": None}


@pytest.mark.parametrize("name", names("experiments"))
def test_a_resolved_configuration_resolves_to_itself(name: str) -> None:
    config = load(name)
    for label, entry in config.methods.items():
        schema = parameters_model(entry["method"])
        parameters = method_parameters(label, entry, schema)
        assert {"method": entry["method"], **parameters.model_dump(mode="json", by_alias=True)} == entry
    whole = config.model_dump(mode="json")
    assert Config.model_validate(whole).model_dump(mode="json") == whole


def test_every_mistake_is_found_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _write(
        tmp_path,
        mine="extends: quickstart\nprofile: micro\nroles:\n  sources: {coder: name}\ncorpus: {path: stdlib:mircro}\n"
        "training: {epochs: 0}\nmethods:\n  CLM: clm\n"
        "  FuseLLM: {preset: correct, alignment: a, fusion: b, map_on: c, k: 0, lambda: 0.5}\n"
        "suites:\n  perplexity:\n    documents: {path: gone.txt}\n",
    )
    keys = sorted(".".join(problem.key) for problem in validate(["mine.yaml"])["mine.yaml"])
    switches = [f"methods.FuseLLM.{name}" for name in ("alignment", "fusion", "k", "map_on", "preset")]
    paths = ["corpus.path", "suites.perplexity.documents.path"]
    assert keys == sorted([*paths, "roles.sources.coder", "training.epochs", "methods.CLM", *switches])


def test_the_standard_library_has_what_is_asked_of_it(tmp_path: Path) -> None:
    _write(tmp_path, mine="extends: quickstart\nprofile: micro\ncorpus: {path: stdlib, domains: [cod], split: x}\n")
    (problem,) = validate([str(tmp_path / "mine.yaml")])[str(tmp_path / "mine.yaml")]
    assert "no split of the corpus stdlib 'x'" in problem.sentence and problem.key == ("corpus", "path")


def test_an_unknown_base_is_named_with_its_line(tmp_path: Path) -> None:
    _write(tmp_path, mine="title: mine\nextends: mian\n")
    with pytest.raises(UserError, match=r"did you mean 'main'.*mine.yaml, line 2\)"):
        load(str(tmp_path / "mine.yaml"))


def test_a_name_that_ends_in_a_colon_is_set(tmp_path: Path) -> None:
    assert load("main", overrides=["data.root=tiny:"]).data.root == "tiny:"


@pytest.mark.parametrize(
    "text",
    [
        "title: ${oc.env:HF_TOKEN}",
        "title: 'a ${ oc.env : HF_TOKEN } b'",
        "title: ${oc.env:NONE,${oc.env:HF_TOKEN}}",
        "extends: ${oc.env:HF_TOKEN}.yaml",
        "profile: ${oc.env:HF_TOKEN}",
        "methods: {CLM: {method: '${oc.env:HF_TOKEN}'}}",
        "seeds: [0, '${oc.env:HF_TOKEN}']",
        "a: oc\ntitle: ${${a}.env:HF_TOKEN}",
        "a: 'oc.e'\nb: 'nv:HF_TOKEN'\nc: '\\${${a}${b}}'\ntitle: ${oc.decode:${c}}",
    ],
)
def test_nothing_of_the_environment_gets_into_a_configuration(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.chdir(tmp_path)
    _write(tmp_path, own=text if "extends" in text else f"extends: main\n{text}", other="extends: own.yaml")
    for command in (["show", "own.yaml"], ["show", "other.yaml"], ["run", "own.yaml"], ["validate", "own.yaml"]):
        status, printed, said = answer("experiment", *command)
        assert status == 2
        assert "hf_secret" not in printed + said
        assert "own.yaml, line" in printed + said and "secret of the environment" in printed + said
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "hf_secret" in path.read_text()]


def test_nothing_of_the_environment_gets_into_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for command in (
        ["experiment", "show", "main", "--set", "title=${oc.env:HF_TOKEN}"],
        ["eval", "m", "--suite", "bbh", "--set", "bbh.limit=${oc.env:HF_TOKEN}", "--root", str(tmp_path)],
        ["eval", "m", "--suite", "bbh", "--set", "data.root=/data/${oc.env:HF_TOKEN}", "--root", str(tmp_path)],
    ):
        status, printed, said = answer(*command)
        assert status == 2
        assert "hf_secret" not in printed + said and "secret of the environment" in said


def test_other_keys_can_be_interpolated(tmp_path: Path) -> None:
    _write(tmp_path, own="extends: main\ntitle: 'On ${roles.target.model}: ${roles.target.model}: all of it'")
    config = load(str(tmp_path / "own.yaml"))
    assert config.title == f"On {config.roles.target.model}: {config.roles.target.model}: all of it"
