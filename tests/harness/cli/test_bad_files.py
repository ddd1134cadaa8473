"""Whatever is wrong with a user's files ends in exit status 2 and one sentence, with nothing half-written.

One table for all commands: what is prepared in the folder `{here}`, what is asked for, and what the sentence says.
"""

import re
from pathlib import Path

import pytest

from results.records import SCHEMA_VERSION
from tests.harness.cli.mistakes import (
    SHOW,
    Prepare,
    answers,
    artifact,
    check,
    cut,
    merge,
    nothing,
    older,
    other_schema,
    other_tokenizer,
    parquet,
    plan,
    ran,
    remove,
    rename,
    run,
    set_key,
    swapped,
    write,
)
from tests.harness.command import answer

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
    (
        write("text/a.txt", ""),
        run("corpus.path=text"),
        "Document 'a.txt' .row 1. of text .train. has no text: remove it",
    ),
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
    (
        nothing,
        plan("corpus.path=stdlib", "corpus.domains=[cod]"),
        "domain of the corpus stdlib 'cod' .did you mean 'code'.",
    ),
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
        r"long.txt .bytes from 0. is \d+ tokens for target and exceeds the context of target, 256, as 3.% of the",
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
    (nothing, merge(), r"M merges at least 2 models with linear and not 1 .neox.: say which in its `models`"),
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
            (other_schema, rf"all\.parquet has record schema '0' but this version reads only '{SCHEMA_VERSION}'"),
            (older(records=["all.parquet"]), "root/runs/table2/small/1 was made by another version of fusellm-harness"),
            (older(configuration=None), "root/runs/table2/small/1 was made by another version of fusellm-harness"),
        )
    ),
]


def _rows_left(expected: str) -> bool:
    """Whether it is the mistake of one row, so that the others are made."""
    return "missing keys" in expected or "vocabulary of 300" in expected


@pytest.mark.parametrize(
    ("prepare", "arguments", "expected"),
    [pytest.param(*case, marks=[pytest.mark.slow] if _rows_left(case[2]) else []) for case in FILES],
)
def test_a_wrong_file_ends_in_one_sentence(here: Path, prepare: Prepare, arguments: list[str], expected: str) -> None:
    prepare(here)
    check(here, arguments, expected, rows_left=_rows_left(expected))


def test_damaged_artifacts_are_listed_one_by_one(here: Path) -> None:
    artifact("passages.arrow", "nonsense")(here)
    status, _, said = answer("artifact", "verify", "--root", "root")
    first, last = said.splitlines()
    assert status == 2 and "passages.arrow does not match its SHA-256" in first
    assert last == "fusellm: 1 of 1 artifacts do not match their manifests: see the lines above."


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
