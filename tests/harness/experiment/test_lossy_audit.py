"""The audit of models whose tokens do not spell all of the text: what is lost costs nothing, and is no merit."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from harness.config.loading import load
from harness.experiment import headroom
from harness.experiment.headroom import audit


def test_a_source_that_loses_text_has_no_bits_per_byte(experiment_file: Path, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "neox", tmp_path / "lossy")
    path = tmp_path / "lossy" / "tokenizer.json"
    raw = json.loads(path.read_text())
    # Unknown text is one token whatever it says, and so costs next to nothing.
    words = {word: i for i, word in enumerate(["<|end|>", "<unk>", " ", "the", "quick", "brown", "fox"])}
    raw["model"] = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    path.write_text(json.dumps(raw))
    found = audit(load(str(experiment_file), overrides=[f"roles.sources.neox.model={tmp_path / 'lossy'}"]), tmp_path)
    lossy, target = (found.measures[found.measures["source"] == name] for name in ("neox", "llama (target)"))
    assert lossy["bits_per_byte"].isna().all() and (lossy["lost"] > 0.3).all() and (lossy["lost"] <= 1).all()
    assert target["bits_per_byte"].notna().all() and not target["lost"].any()
    share = lossy.set_index("domain").loc["all domains", "lost"]
    assert f"The tokens of neox do not spell {100 * share:.2g} % of the text's bytes." in found.sentence


def test_rows_that_lose_text_are_ahead_only_of_those_that_lose_the_same() -> None:
    columns = ["method", "suite", "task", "example", "metric", "numerator", "denominator", "tokens"]
    measured = [("bits_per_byte", 8.0), ("lost_bytes", 5.0)]
    records = [
        (method, "perplexity", "web", "a", metric, value, 10, None)
        for method, metrics in {"target": measured[:1], "CLM": measured, "KD": measured}.items()
        for metric, value in metrics
    ]
    run: Any = SimpleNamespace(
        records=pd.DataFrame(records, columns=columns),
        roles={"target": "target"},
        precision=lambda suite: "float32",
        reference="CLM",
        methods={name: {"method": "as_is" if name == "target" else "clm"} for name in ("target", "CLM", "KD")},
    )
    row = headroom._learnt(run)[-1]
    assert (row["source"], row["lost"], row["ahead_of_reference"]) == ("KD", 0.5, 0)
    assert np.isnan([row["bits_per_byte"], row["ahead_of_target"]]).all()
