"""Whatever a user gets wrong ends in exit status 2 and one sentence, with nothing half-written.

One table for all commands: what is asked for, what is prepared in the folder `{here}`, what the sentence says.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.store.files import write_json
from harness.store.fingerprint import file_sha256
from harness.store.paths import RUN_FILE
from harness.store.run_files import read_run_file
from results.records import Record
from results.records import write as write_records
from tests.harness.command import answer, assert_whole, fusellm, sentence
from tests.harness.reporting.test_runs import finished
from tests.results.sample import scores

Prepare = Callable[[Path], object]


@pytest.fixture
def here(made: Path, experiment_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with copies of the models, of the text and of the experiment, which is also where commands run."""
    folder = tmp_path / "here"
    for name in ("llama", "neox", "train", "test"):
        shutil.copytree(made / name, folder / name)
    shutil.copytree(made / "llama", folder / "wide")
    text = experiment_file.read_text(encoding="utf-8").replace(str(made), str(folder))
    (folder / "small.yaml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FUSELLM_ROOT", str(folder / "root"))
    return folder


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


USAGE: list[tuple[list[str], str]] = [
    (["experimnt"], r"No such command 'experimnt'\. Did you mean 'experiment'\? \(see `fusellm --help`\)"),
    (["experiment", "shwo"], r"Did you mean 'show'\? \(see `fusellm experiment --help`\)"),
    (["experiment", "run"], r"Missing argument 'names' \(see `fusellm experiment run --help`\)"),
    (["model", "fetch"], "Missing argument 'names'"),
    ([*SHOW, "main", "--profil", "x"], r"No such option: --profil \(Possible options: --profile\)"),
    ([*SHOW, "main", "--seed", "x"], "Invalid value for '--seed'.*integer"),
    (["tables", "main", "--format", "xml"], "Invalid value for '--format' / '-f': 'xml' is not one of 'md', 'csv'"),
    (["artifact", "verify", "all"], r"unexpected extra argument\(s\) \(all\)"),
]

NAMES: list[tuple[list[str], str]] = [
    ([*SHOW, "mian"], "There is no experiment 'mian' .did you mean 'main'."),
    ([*SHOW, "main", "--profile", "smal"], "There is no profile 'smal' .did you mean 'small'."),
    ([*SHOW, "main", "--profile", "tiny"], "main has no profile 'tiny': its profiles are small, paper"),
    (["audit", "qickstart"], "did you mean 'quickstart'"),
    (setting("training.learning_rat=1"), "unknown key training.learning_rat .did you mean 'learning_rate'."),
    (setting("suites.perplexitty.window=3"), "There is no suite 'perplexitty' .did you mean 'perplexity'."),
    (setting("roles.source.x.model=y"), "unknown key roles.source .did you mean 'sources'."),
    (setting("methods.CLM.method=clmm"), "There is no method 'clmm' .did you mean 'clm'."),
    (setting("methods.FuseLLM.map=minde"), "methods.FuseLLM: There is no map 'minde' .did you mean 'mined'."),
    (setting("methods.FuseLLM.alignment=same_edn"), "There is no alignment 'same_edn' .did you mean 'same_end'."),
    (setting("methods.FuseLLM.fusion=minc"), "There is no fusion function 'minc' .did you mean 'mince'."),
    (setting("methods.FuseLLM.tail=buckets"), "switch tail is 'buckets' .did you mean 'bucket'.*; it takes one of"),
    (setting("methods.FuseLLM.select_over=pasage"), "switch select_over is 'pasage' .did you mean 'passage'."),
    (
        setting("methods.FuseLLM.preset=correctd"),
        "no preset 'correctd' .did you mean 'corrected'.*: presets are corrected, publish",
    ),
    (setting("methods.FuseLLM.tial=gold"), "unknown key tial .did you mean 'tail'."),
    (setting("methods.FuseLLM.sources=[Gemma-3-270m]"), "is no role .did you mean 'Gemma-3-270M'."),
    (
        setting("methods.X.method=as_is", "methods.X.role=targt"),
        "names 'targt', which is no role .did you mean 'target'.",
    ),
    (
        setting("methods.M.method=merge", "methods.M.base=targt"),
        "names 'targt', which is no role and no row .did you mean 'target'.",
    ),
    (setting("methods.M.method=merge", "methods.M.models=[target,gemma]"), "methods.M names 'gemma', which is no role"),
    (
        setting("methods.M.method=merge", "methods.M.merge_method=tise"),
        "methods.M has merge_method = 'tise', which is wrong",
    ),
    (setting("methods.X.method=as_is", "methods.X.role=teacher"), "methods.X needs a teacher, and there is none"),
    (setting("roles.teacher=Llama"), "roles.teacher = 'Llama', which must hold keys and values"),
    (["baseline", "show", "mrege"], "There is no method 'mrege' .did you mean 'merge'."),
    (["baseline", "build", "mrege"], "quickstart has no row and there is no method 'mrege' .did you mean 'merge'."),
    (["baseline", "build", "clm", "--experiment", "mian"], "There is no experiment 'mian' .did you mean 'main'."),
    (["quickstart", "--set", "roles.target.modle=x"], "unknown key roles.target.modle .did you mean 'model'."),
    (
        setting("methods.X.method=distillation", "methods.X.teachers=[Gemma-3-270m]"),
        "names 'Gemma-3-270m', which is no role .did you mean 'Gemma-3-270M'.",
    ),
    (
        setting("methods.X.method=distillation", "methods.X.teachers=[teacher]"),
        "methods.X needs a teacher, and there is none: say who it is in roles.teacher",
    ),
    (setting("roles.teacher=null", of="table6"), "methods.KD needs a teacher, and there is none: say who it is in rol"),
    (
        setting("methods.X.method=distillation", "methods.X.divergence=reverse_lk"),
        "methods.X: There is no divergence 'reverse_lk' .did you mean 'reverse_kl'.",
    ),
    (
        [*SHOW, "table6", "--profile", "tiny", "--set", "roles.teacher.model=null"],
        "roles.teacher.model = None, which is wrong",
    ),
    (
        run("roles.teacher.model=SmolLM2-360M-Instruct"),
        "The model SmolLM2-360M-Instruct is not in .*: run `fusellm model fetch SmolLM2-360M-Instruct`",
    ),
    (setting("methods.X.role=target"), "methods.X does not say which method it is"),
    (setting("methods.X.method=[clm]"), "methods.X does not say which method it is"),
    (setting("reference=CML"), "reference 'CML' is no row .did you mean 'CLM'.*: rows are"),
    (setting("roles.sources.target.model=x"), "a source called 'target', which means something else"),
    (setting("experiment=a/b"), "experiment = 'a/b', which is wrong"),
    (setting("profile=small"), "--set profile=small chooses no profile: write --profile"),
    (run("roles.target.model=SmolLM-135M-Instruct"), "no model 'SmolLM-135M-Instruct' .did you mean 'SmolLM2-135M-In"),
    (run("roles.target.model=pythia-1b"), "pythia-1b is not in .*: run `fusellm model fetch pythia-1b`"),
    (run("roles.target.model=tiny:target"), "no tiny models for the profile 'own': choose one of tiny, micro"),
    (["model", "fetch", "SmolLM2", "--root", "{here}/root"], "There is no model 'SmolLM2'"),
    (
        ["model", "fetch", "some/model", "--root", "{here}/root"],
        "only on the hub .some/model., which cannot be reached",
    ),
    (["eval", "SmolLM2", "--suite", "bbh"], "There is no model 'SmolLM2'"),
    (["eval", "SmolLM2", "--suite", "bhb"], r"did you mean 'bbh'\?"),
    (["eval", "SmolLM2", "--suite", "bbh", "--task", "snarkz"], r"did you mean 'snarks'\?"),
    (["eval", "SmolLM2", "--suite", "bbh", "--set", "multipl_e.k=1"], "is no setting of bbh"),
    (evaluate("bbh", "--set", "data.root=[a]"), r"data.root = \['a'\], which is wrong: Input should be a valid string"),
    (evaluate("bbh", "--set", "data.root=nowhere"), "data.root nowhere is no folder: correct it"),
    (evaluate("bbh", "--data-root", "nowhere"), "data.root nowhere is no folder: correct it"),
    (evaluate("bbh", "--set", "bbh.variant=[a"), r"--set bbh.variant=\[a does not hold"),
    (
        evaluate("bbh", "--set", "bbh.variant=${foo}"),
        "does not hold: Interpolation key 'foo'",
    ),
    (evaluate("bbh", "--generate-only"), "bbh cannot use --generate-only: leave it out"),
    (evaluate("bbh,commonsense", "--samples", "3"), "bbh, commonsense cannot use --samples: leave it out"),
    (evaluate("perplexity", "--task", "code"), "No suite that was asked for has the task 'code'"),
    (["multipl-e", "execute", "nothing.jsonl"], "There is no file nothing.jsonl"),
    (["tables", "quikstart"], "There is no table 'quikstart' .did you mean 'quickstart'."),
    (["tables", "main"], "'main' has no finished run below .*root: run `fusellm experiment run main`"),
    (["tables", "main", "--profile", "small"], "run `fusellm experiment run main --profile small`"),
    (["tables", "paper/tabel1"], "There is no published table 'tabel1' .did you mean 'table1'."),
    (["tables", "table2", "--profile", "smal"], "There is no profile of table2 'smal' .did you mean 'small'."),
    (["tables", "main", "--profile", "tiny"], "There is no profile of main 'tiny': there are small, paper"),
    (["report", "tabel2"], "There is no experiment or folder of a run 'tabel2' .did you mean 'table2'."),
    (["run", "show", "all"], "There is no experiment or folder of a run 'all'.*: there are ablations, figure3"),
    (["experiment", "diff", "a", "b"], "There is no experiment or folder of a run 'a'.*: there are ablations"),
    (["report", "table2", "--profile", "tiny"], "run `fusellm experiment run table2 --profile tiny`"),
    (["report"], "There are no finished runs below .*root: run `fusellm experiment run`"),
    (
        ["experiment", "diff", "table2", "main"],
        "'table2' has no finished run below .*root: run `fusellm experiment run t",
    ),
    (["experiment", "run", "table1", "tabel2", "--profile", "micro"], "no experiment 'tabel2' .did you mean 'table2'."),
    (
        ["experiment", "run", "table1", "main", "--profile", "tiny"],
        "main has no profile 'tiny': its profiles are small",
    ),
    (["experiment", "run", "all"], "all means the experiments of one profile: add --profile NAME"),
    (["experiment", "run", "all", "--profile", "tny"], "There is no profile 'tny' .did you mean 'tiny'."),
]

VALUES: list[tuple[list[str], str]] = [
    (setting("training.learning_rate=fast"), "training.learning_rate = 'fast', which is wrong: .* valid number"),
    (setting("training.learning_rate=-1"), "training.learning_rate = -1, .* greater than 0"),
    (setting("training.learning_rate=.nan"), "training.learning_rate = nan, .* finite number"),
    (setting("training.epochs=.inf"), "training.epochs = inf, .* finite number"),
    (setting("training.betas=[0.9,1]"), r"training.betas.1 = 1, .* less than 1"),
    (setting("methods.FuseLLM.lambda=1.5"), "methods.FuseLLM has lambda = 1.5, which is wrong"),
    (setting("methods.FuseLLM.weight_temperature=.inf"), "weight_temperature = inf, .* finite number"),
    (setting("methods.FuseLLM.weight_temperature=0"), "weight_temperature is 0.0; it must be greater than 0"),
    (setting("methods.FuseLLM.sources=[]"), r"methods.FuseLLM has sources = \[\]"),
    (setting("methods.FuseLLM.sources=[Gemma-3-270M,Gemma-3-270M]"), "sources .* names one twice"),
    (merged("weights=[1,-1]"), r"methods.M: weights \[1.0, -1.0\] do not sum to a positive number: raise one of them"),
    (merged("weights=[0,0]"), "do not sum to a positive number"),
    (merged("weights=[.nan,1]"), "methods.M has weights"),
    (merged("weights=[1,2,3]", "models=[target,Gemma-3-270M]"), "weights has 3 numbers for 2 models: give one each"),
    (merged("models=[target,target]"), "names one twice: give each model once"),
    (merged("density=0"), "methods.M has density = 0, .* greater than 0"),
    (merged("trials=0"), "methods.M has trials = 0, .* greater than 0"),
    (merged("mergekit={}", "scale=2"), "a mergekit configuration says everything by itself: remove scale"),
    (merged("mergekit=nowhere.yaml"), "the mergekit configuration nowhere.yaml cannot be read .No such file"),
    (
        setting("methods.X.method=distillation", "methods.X.divergence=reverse_kl", "methods.X.tail=gold"),
        "methods.X: reverse_kl compares all outcomes, and tail 'gold' leaves out .* set tail to bucket, or online",
    ),
    (
        setting("methods.X.method=distillation", "methods.X.online=true", "methods.X.map=em"),
        "methods.X: map is about stored distributions: leave it out, or set online to false",
    ),
    (setting("methods.X.method=uld", "methods.X.lambda=2"), "methods.X has lambda = 2, which is wrong"),
    (setting("methods.X.method=alm", "methods.X.temperature=0"), "methods.X has temperature = 0, which is wrong"),
    (setting("methods.X.method=alm", "methods.X.teachers=[]"), r"methods.X has teachers = \[\], which is wrong"),
    (setting("extraction.temperatures=[0]"), "extraction.temperatures.0 = 0, which is wrong"),
    (
        plan("methods.X.method=distillation", "methods.X.temperature=2"),
        "X takes stored distributions at temperature 2, and those extracted are 1: add it to extraction.temperatures",
    ),
    (
        plan("methods.X.method=distillation", "methods.X.online=true"),
        "X has neox read the target's tokens, but its tokenizer is another: choose a teacher with the target's tok",
    ),
    (setting("extraction.k=0"), "extraction.k = 0, .* greater than 0"),
    (setting("seeds=[-1]"), r"seeds.0 = -1"),
    ([*SHOW, "main", "--seed", "1", "--seed", "1"], r"seeds \[1, 1\] names one twice: give each seed once"),
    (
        setting("training.micro_batch_size=4"),
        "training.global_batch_size = 6 is no multiple of training.micro_batch_size = 4",
    ),
    (setting("suites.perplexity.mode=strided", "suites.perplexity.stride=0"), "suites.perplexity.stride = 0"),
    (run("suites.perplexity.mode=strided", "suites.perplexity.stride=60"), "between 1 and half the window of 64"),
    (run("device=cuda"), "this machine has no CUDA device that torch can use: set device=cpu"),
    (setting("nonsense"), "--set nonsense has no value: write --set KEY=VALUE"),
    (setting("=1"), "--set =1 has no key"),
    (setting("training=[1]"), r"--set training=\[1\] has a list where keys and values belong"),
    (setting("training.learning_rate=["), r"--set training.learning_rate=\[ does not hold"),
    (setting("roles.target=foo"), "roles.target = 'foo', which must hold keys and values"),
    (setting("methods.CLM=clm"), "which must hold keys and values"),
    (setting("roles.sources=null"), "roles.sources"),
    (setting("profiles=small"), "profiles = 'small', which must be a list"),
    (setting("title=${titel}"), "Interpolation key 'titel' not found"),
    (setting("extends=main"), "--set extends=main extends nothing: write `extends` in a YAML file"),
]

YAML: list[tuple[str | bytes, str]] = [
    ("- a\n- b\n", "my.yaml does not hold keys and values"),
    ("", "my.yaml does not hold keys and values"),
    ("5\n", "my.yaml does not hold keys and values"),
    ("a: [1\nb: {\n", "my.yaml, line 2 is not valid YAML"),
    (b"title: caf\xe9\n", "my.yaml is not UTF-8 at byte 10: convert the file"),
    ("a: &x\n  b: *x\n", "my.yaml, line 1 is not valid YAML .YAML recursive aliases are not supported"),
    ("title: a\ntitle: b\n", "my.yaml, line 2 is not valid YAML .found duplicate key title"),
    ("title: ${title}\n", "Recursive interpolation"),
    ("title: ${env:HOME}\n", "Unsupported interpolation type env"),
    ("a: !!python/object:os.system {}\n", "my.yaml, line 1 is not valid YAML"),
    ("title: mine\n", "my.yaml lacks roles, corpus, suites, methods and reference: add them"),
    ("extends: mian\n", "There is no experiment 'mian' .did you mean 'main'."),
    ("extends: main\nprofile: smal\n", "There is no profile 'smal'"),
    ("extends: main\nroles: [a]\n", "my.yaml has a list where keys and values belong"),
]

FILES: list[tuple[Prepare, list[str], str]] = [
    # A model's folder.
    (
        remove("llama/tokenizer.json"),
        run(),
        "llama has no tokenizer: put the model's tokenizer.json beside its weights",
    ),
    (
        rename("llama/tokenizer.json", "llama/tokenizer.model"),
        run(),
        "only a slow tokenizer .*run `fusellm model convert",
    ),
    (
        rename("llama/model.safetensors", "llama/pytorch_model.bin"),
        run(),
        "weights as pickles, .*run `fusellm model conv",
    ),
    (remove("llama/model.safetensors"), run(), "llama holds no weights"),
    (
        cut("llama/model.safetensors"),
        run(),
        r"model.safetensors has [\d,]+ bytes, which is not the size that its header states",
    ),
    (write("neox/model.safetensors", ""), run(), "neox/model.safetensors is no safetensors file"),
    (write("llama/model.safetensors.index.json", "{"), run(), "index.json is no JSON object in UTF-8"),
    (write("llama/model.safetensors.index.json", "{}"), run(), "index.json names no weights"),
    (
        write("llama/model.safetensors.index.json", '{"weight_map": {"a": "a.safetensors"}}'),
        run(),
        "llama lacks a.safetensors, which its index names",
    ),
    (remove("neox/config.json"), run(), "neox is no model: it has no config.json"),
    (
        write("neox/config.json", "{"),
        run(),
        "neox/config.json is no JSON object in UTF-8: fetch or copy the model again",
    ),
    (set_key("neox/config.json", model_type="noex"), run(), "neox .*cannot be loaded .*model type `noex`"),
    (set_key("neox/config.json", num_hidden_layers=3), run(), "neox do not fit its config.json .*missing keys"),
    (
        set_key("llama/config.json", vocab_size=9),
        run("extraction.k=10"),
        "extraction.k = 10 exceeds the vocabulary of targ",
    ),
    (write("llama/tokenizer.json", "{"), run(), "llama .*cannot be loaded .*correct its files"),
    (write("llama/tokenizer.json", "{}"), run(), "llama .*cannot be loaded .*correct its files"),
    (write("llama/tokenizer_config.json", "{}"), run(), "neither a bos nor an eos token"),
    (other_tokenizer, run(), r"tokenizer gives token 3\d\d, but its config.json has a vocabulary of 300"),
    (write("llama/fusellm-model.json", "["), run(), "fusellm-model.json is no JSON object"),
    (
        write("llama/fusellm-model.json", '{"files": {"config.json": "00"}}'),
        run(),
        "llama/config.json is not the file that was put there .*SHA-256 differs",
    ),
    (
        write("a.gguf", "GGUF"),
        run("roles.target.model=a.gguf"),
        "not yet converted .*run `fusellm model convert a.gguf`",
    ),
    # Text.
    (write("a.jsonl", '{"text": "x"}\n{"text":\n'), run("corpus.path=a.jsonl"), "a.jsonl, line 2 is not JSON in UTF-8"),
    (write("a.jsonl", b'{"text": "\xff"}\n'), run("corpus.path=a.jsonl"), "a.jsonl, line 1 is not JSON in UTF-8"),
    (
        write("a.jsonl", '{"texts": "x"}\n'),
        run("corpus.path=a.jsonl"),
        "a.jsonl, line 1 has no 'text': set text",
    ),
    (write("a.jsonl", '{"text": "\\ud800"}\n'), run("corpus.path=a.jsonl"), "is not valid Unicode"),
    (write("a.jsonl", ""), run("corpus.path=a.jsonl"), "a.jsonl .train. has no document"),
    (write("text/a.txt", ""), run("corpus.path=text"), "Document 'a.txt' of text .train. has no text: remove it"),
    (write("text/a.txt", b"caf\xe9"), run("corpus.path=text"), "text/a.txt is not UTF-8 at byte 3"),
    (write("text/a.csv", "x"), run("corpus.path=text"), "The corpus text .train. has no document"),
    (write("a.csv", "x"), run("corpus.path={here}/a.csv"), "a.csv is neither .parquet, .jsonl, .txt nor a folder"),
    (write("a.parquet", "PAR1"), run("corpus.path=a.parquet"), "a.parquet is no Parquet file, or is damaged"),
    (
        parquet("a.parquet", ["x"], damage=True),
        run("corpus.path=a.parquet"),
        "a.parquet is no Parquet file, or is damag",
    ),
    (parquet("a.parquet", [b"\xff"]), run("corpus.path=a.parquet"), "a.parquet has text that is not UTF-8"),
    (parquet("a.parquet", ["x"], "txet"), run("corpus.path=a.parquet"), "no column 'text' .did you mean 'txet'."),
    (nothing, run("corpus.path={here}/b.txt"), "The corpus .*/b.txt does not exist: correct that path"),
    (
        nothing,
        plan("corpus.path=some/text"),
        "some/text .default, train. is neither a file or folder here nor can",
    ),
    (nothing, plan("corpus.path=stdlib:foo"), "There is no corpus 'stdlib:foo'"),
    (nothing, plan("corpus.path=stdlib", "corpus.domains=[cod]"), "has no domain 'cod' .did you mean 'code'."),
    (nothing, plan("corpus.path=some/great/text"), "The corpus some/great/text does not exist: correct that path"),
    (
        nothing,
        plan("roles.target.model=models/mine"),
        "models/mine is neither a folder here nor in .*models: correct the path, or run `fusellm model fetch models/mi",
    ),
    (
        nothing,
        run("data.root=nowhere", "corpus.path=some/set"),
        "nowhere is no folder: .*some/set/default/train.par",
    ),
    (
        parquet("data/some/set/default/test.parquet", ["x"]),
        run("data.root=data", "corpus.path=some/set"),
        "data/some/set/default/train.parquet is missing: data.root has some/set but not this",
    ),
    (
        write("data/a", ""),
        run("data.root=data", "corpus.path=some/set"),
        "set data.root to a folder that holds some/set/d",
    ),
    (nothing, run("suites.perplexity.documents.path=train"), "14 held-out documents are in the training corpus"),
    (
        nothing,
        run("suites.perplexity.documents.path=stdlib:micro", "suites.perplexity.documents.split=tset"),
        "no doc",
    ),
    # What does not fit.
    (nothing, run("extraction.k=1000"), "extraction.k = 1000 exceeds the vocabulary of target, 300: lower it"),
    (nothing, [*run("extraction.k=1000"), "--dry-run"], "extraction.k = 1000 exceeds the vocabulary"),
    (nothing, run("suites.perplexity.window=300"), "window = 300 exceeds the context of target, 256: lower it"),
    (nothing, run("training.sequence_length=20"), r"is \d+ tokens for target and exceeds training.sequence_length, 20"),
    (
        write("train/long.txt", "".join(map(str, range(2000)))),
        run("passages.max_bytes=3000", "corpus.first_bytes=3000", "training.sequence_length=4000"),
        r"long.txt .bytes from 0. is \d+ tokens for target and exceeds the context of target, 256: lower passages",
    ),
    # Merges: refused before anything is loaded or trained.
    (
        nothing,
        merge("models=[target,neox]"),
        r"M cannot merge target and neox, which differ in model_type .llama and gpt_neox.",
    ),
    (
        set_key("wide/config.json", intermediate_size=80),
        merge("models=[target,wide]", wide=True),
        r"M cannot merge target and wide, which differ in intermediate_size .\d+ and 80.: choose models of one arch",
    ),
    (
        swapped("wide/tokenizer.json"),
        merge("models=[target,wide]", wide=True),
        r"M cannot merge target and wide, whose tokenizers differ .first in token \d+, '[xy]'.: choose",
    ),
    (nothing, merge(), r"M merges at least two models with linear and not 1 .neox.: say which in its `models`"),
    (nothing, merge("merge_method=slerp"), "M merges two models with slerp and not 1"),
    (nothing, merge("models=[target,neox]", "weights=[1]"), "weights has 1 numbers for 2 models"),
    (write("m.yaml", "models: ["), merge("mergekit=m.yaml"), "m.yaml is not valid YAML"),
    (write("m.yaml", "- a"), merge("mergekit=m.yaml"), "m.yaml does not hold keys and values"),
    (write("m.yaml", b"\xff"), merge("mergekit=m.yaml"), "m.yaml is not valid YAML"),
    (
        write("m.yaml", "merge_method: linaer\ndtype: float32\nmodels: [{model: target}, {model: neox}]"),
        merge("mergekit=m.yaml"),
        "M: mergekit has no merge_method 'linaer' .did you mean 'linear'.*: it has",
    ),
    (
        write("m.yaml", "merge_method: linear\nmodels: [{mdel: target}]"),
        merge("mergekit=m.yaml"),
        "M: mergekit does not take its configuration: models.0.*model",
    ),
    (
        write("m.yaml", "merge_method: linear\ndtype: float32\nmodels: [{model: target}, {model: nowhere}]"),
        merge("mergekit=m.yaml"),
        "names 'nowhere', which is no role and no row",
    ),
    (nothing, run("training.deepspeed=zero.json"), "'zero.json' is no JSON file and none of zero1, zero2, zero3"),
    (nothing, run("training.deepspeed=zer2"), r"did you mean 'zero2'\?"),
    (nothing, run("training.deepspeed=zero2"), "start them with torchrun"),
    (write("zero.json", "["), run("training.deepspeed=zero.json"), "zero.json is no JSON object in UTF-8"),
    (
        nothing,
        ["audit", *run("methods.FuseLLM=null", "methods.FuseLLM published=null")[2:]],
        "has no FuseLLM row to audit: add one to methods",
    ),
    # Experiments' files.
    (nothing, [*SHOW, "nowhere.yaml"], "There is no file nowhere.yaml"),
    (lambda here: (here / "my.yaml").mkdir(), [*SHOW, "my.yaml"], "my.yaml is a folder"),
    # Converting.
    (
        nothing,
        ["model", "convert", "nothing.gguf"],
        "nothing.gguf is neither a .gguf file nor a model's folder",
    ),
    (write("a.gguf", "GGUF"), ["model", "convert", "a.gguf"], "a.gguf cannot be read as a GGUF file"),
    (nothing, ["model", "convert", "train"], "train is no model: it has no config.json"),
    (remove("llama/model.safetensors"), ["model", "convert", "llama"], "holds no weights that can be converted"),
    (
        lambda here: (here / "llama/model.safetensors").rename(here / "llama/pytorch_model.bin"),
        ["model", "convert", "llama"],
        "pickles that are damaged or have more in them than weights",
    ),
    (
        lambda here: (here / "llama/tokenizer.json").rename(here / "llama/tokenizer.model"),
        ["model", "convert", "llama"],
        "tokenizer.model cannot be read as a SentencePiece model",
    ),
    (nothing, ["model", "convert", "llama", "--out", "neox"], "neox exists already and holds something else"),
    # The root and what is in it.
    (write("root", ""), run(), "choose another --root"),
    (write("root", ""), ["model", "convert", "llama", "--root", "root"], "choose another --root"),
    (
        nothing,
        ["tables", "paper/table1", "--out", "/proc/x"],
        "/proc/x cannot be made .*: choose another --out",
    ),
    (nothing, ["init", "baseline", "mine", "--out", "/proc/x"], "/proc/x/mine cannot be made .*: choose another --out"),
    (nothing, ["model", "convert", "llama", "--out", "/proc/x/y"], "/proc/x cannot be made .*: choose another --out"),
    (write("root", ""), ["artifact", "list", "--root", "root"], "There is no folder root"),
    (nothing, ["artifact", "verify", "--root", "nowhere"], "There is no folder nowhere: give the --root that"),
    (nothing, ["artifact", "gc", "--root", "nowhere"], "There is no folder nowhere"),
    (write("root/models/.hashes.json", b"\xff"), run("roles.target.model=nowhere"), "There is no model 'nowhere'"),
    (
        artifact("manifest.json", "{}"),
        ["artifact", "list", "--root", "root"],
        "manifest.json is damaged or of another version: remove that fold",
    ),
    (
        write("root/runs/main/small/x/run.json", "{}"),
        ["tables", "main", "--root", "root"],
        "run.json is damaged or of another version: remove that file and run the experiment again",
    ),
    (
        write("root/runs/main/small/x/plan.json", "{"),
        ["artifact", "gc", "--root", "root"],
        "plan.json is damaged or of another version: remove that file and run the experiment again",
    ),
    # Records.
    (
        ran(answers("CLM", "arc_easy", [1.0], 0), answers("CLM", "arc_easy", [0.0], 0)),
        ["tables", "table2", "--root", "root"],
        r"records disagree about .*CLM.*in root/\S*all\.parquet and root/\S*more0\.parquet; remove the wrong one",
    ),
    (
        ran(answers("CLM", "arc_easy", [1.0, 0.0], 0), answers("FuseLLM", "arc_easy", [1.0], 0)),
        ["tables", "table2", "--root", "root"],
        "CLM .*FuseLLM .*evaluate both on the same",
    ),
    (
        ran(answers("CLM", "arc_easy", [1.0], 0)),
        ["tables", "table2", "--reference", "CML", "--root", "root"],
        "There is no reference row 'CML' .did you mean 'CLM'.",
    ),
    *(
        (prepare, [*command, "--root", "root"], expected)
        for command in (["tables", "table2"], ["report", "table2"], ["experiment", "diff", "table2", "table2"])
        for prepare, expected in (
            (other_schema, r"all\.parquet has record schema '0' but this version reads only '1'"),
            (older(records=["all.parquet"]), "root/runs/table2/small/1 was made by another version of fusellm-harness"),
            (older(configuration=None), "root/runs/table2/small/1 was made by another version of fusellm-harness"),
        )
    ),
]


def _check(here: Path, arguments: list[str], expected: str, *, rows_left: bool = False) -> None:
    """`rows_left`: a row of the run cannot be made, and the table of the others is printed before the sentence."""
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


@pytest.mark.parametrize(("arguments", "expected"), [*USAGE, *NAMES, *VALUES])
def test_a_wrong_word_ends_in_one_sentence(here: Path, arguments: list[str], expected: str) -> None:
    _check(here, arguments, expected)


@pytest.mark.parametrize(("content", "expected"), YAML)
def test_a_wrong_experiment_file_ends_in_one_sentence(here: Path, content: str | bytes, expected: str) -> None:
    write("my.yaml", content)(here)
    _check(here, [*SHOW, "my.yaml"], expected)


@pytest.mark.parametrize(("prepare", "arguments", "expected"), FILES)
def test_a_wrong_file_ends_in_one_sentence(here: Path, prepare: Prepare, arguments: list[str], expected: str) -> None:
    prepare(here)
    _check(here, arguments, expected, rows_left="missing keys" in expected or "vocabulary of 300" in expected)


def test_damaged_artifacts_are_listed_one_by_one(here: Path) -> None:
    artifact("passages.arrow", "nonsense")(here)
    status, _, said = answer("artifact", "verify", "--root", "root")
    first, last = said.splitlines()
    assert status == 2 and "passages.arrow does not match its SHA-256" in first
    assert last == "fusellm: 1 of 1 artifacts do not match their manifests: see the lines above."


def test_without_a_command_there_is_help() -> None:
    for group in ([], ["experiment"], ["model"], ["artifact"]):
        status, printed, said = answer(*group)
        assert status == 2 and "Usage" in printed and not said


@pytest.mark.parametrize("arguments", [["experiment", "show", "mian"], ["experiment", "shwo"]])
def test_a_real_process_says_the_same(arguments: list[str]) -> None:
    done = fusellm(*arguments, check=False)
    assert (done.returncode, done.stdout) == (2, "") and sentence(done.stderr)


def test_what_a_table_lacks_is_said_below_it_in_one_sentence(here: Path) -> None:
    """A method without half of the tasks, and two without a seed in common, spoil nothing but their own cells."""
    right = [float(i % 2) for i in range(24)]
    both = ["arc_easy", "arc_challenge"]
    ran(
        [one for task in both for one in answers("CLM", task, right, 0)],
        [one for task in both for one in answers("FuseLLM", task, right, 1)],
        answers("Gemma", "arc_easy", right),
    )(here)
    status, printed, _ = answer("tables", "table2", "--format", "md", "--root", here / "root")
    assert status == 0
    lines = printed.splitlines()
    (missing,) = [
        line for line in lines if "no records of Gemma on arc_challenge: not evaluated" in line and "|" not in line
    ]
    assert re.match(r"\(\d+\) ", missing)
    (seeds,) = [
        line for line in lines if "FuseLLM (seeds 1) and CLM (seeds 0) have no seed in common in arc_easy" in line
    ]
    assert "run one of them with a seed of the other" in seeds
    (row,) = [line for line in lines if line.startswith("| arc_challenge")]
    assert row.count("50.00") == 2
