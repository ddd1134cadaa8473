"""Whatever a user gets wrong ends in exit status 2 and one sentence: words, values and experiments' files.

One table for all commands: what is asked for, and what the sentence says. Files are in `test_bad_files`.
"""

from pathlib import Path

import pytest

from tests.harness.cli.mistakes import SHOW, check, evaluate, merged, plan, run, setting, write
from tests.harness.command import answer, fusellm, sentence

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
        "no preset 'correctd' .did you mean 'corrected'.*: there are corrected, publish",
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
    (["baseline", "build", "mrege"], "There is no row of quickstart or method 'mrege' .did you mean 'merge'."),
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
    (
        plan(
            "methods.X={method: distillation, online: true, teachers: [twin]}",
            "roles.sources.twin={model: '{here}/llama', prefix: e}",
        ),
        "X has twin read the target's tokens after the target's prefix, but its own prefix is another: give both",
    ),
    (setting("extraction.k=0"), "extraction.k = 0, .* greater than 0"),
    (setting("seeds=[-1]"), r"seeds.0 = -1"),
    ([*SHOW, "main", "--seed", "1", "--seed", "1"], r"seeds \[1, 1\] names one twice: give each seed once"),
    (
        setting("training.micro_batch_size=4"),
        "training.global_batch_size = 6 is no multiple of training.micro_batch_size = 4",
    ),
    (
        setting("methods.CLM.training.global_batch_size=5", "training.micro_batch_size=2"),
        "methods.CLM.training.global_batch_size = 5 is no multiple of training.micro_batch_size = 2",
    ),
    (
        setting("methods.CLM.training.workers=2"),
        "methods.CLM: workers is the same for all rows: set training.workers of the experiment",
    ),
    (setting("methods.CLM.training.epoch=2"), r"methods.CLM has an unknown key training.epoch \(did you mean 'epochs'"),
    (setting("methods.CLM.training.epochs=0"), "methods.CLM has training.epochs = 0, which is wrong"),
    (setting("methods.CLM.warm_start=CLM"), "methods.CLM names itself: name another row"),
    (setting("methods.X.method=uld", "methods.X.balance=ratio"), "methods.X has balance = 'ratio', which is wrong"),
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
    ("title: ${env:HOME}\n", "which is not resolved, because a secret of the environment would be stored"),
    ("a: !!python/object:os.system {}\n", "my.yaml, line 1 is not valid YAML"),
    ("title: mine\n", "my.yaml lacks roles, corpus, suites, methods and reference: add them"),
    ("extends: mian\n", "There is no experiment 'mian' .did you mean 'main'."),
    ("extends: main\nprofile: smal\n", "There is no profile 'smal'"),
    ("extends: main\nroles: [a]\n", "my.yaml has a list where keys and values belong"),
]


@pytest.mark.parametrize(("arguments", "expected"), [*USAGE, *NAMES, *VALUES])
def test_a_wrong_word_ends_in_one_sentence(here: Path, arguments: list[str], expected: str) -> None:
    check(here, arguments, expected)


@pytest.mark.parametrize(("content", "expected"), YAML)
def test_a_wrong_experiment_file_ends_in_one_sentence(here: Path, content: str | bytes, expected: str) -> None:
    write("my.yaml", content)(here)
    check(here, [*SHOW, "my.yaml"], expected)


def test_without_a_command_there_is_help() -> None:
    for group in ([], ["experiment"], ["model"], ["artifact"]):
        status, printed, said = answer(*group)
        assert status == 2 and "Usage" in printed and not said


@pytest.mark.parametrize("arguments", [["experiment", "show", "mian"], ["experiment", "shwo"]])
def test_a_real_process_says_the_same(arguments: list[str]) -> None:
    done = fusellm(*arguments, check=False)
    assert (done.returncode, done.stdout) == (2, "") and sentence(done.stderr)
