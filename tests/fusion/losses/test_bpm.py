"""Byte-prefix marginalisation against its published functions: targets of every row, losses and gradients."""

import numpy as np
import pytest
import torch

from fusion.alignment.byte_prefixes import BytePrefixTargets
from fusion.losses.bpm import BPMLoss
from fusion.losses.loss import LossResources
from fusion.types import Predictions
from fusion.vocabulary.token_bytes import Vocabulary
from tests.fusion.losses.oracles import oracle, predictions, value_and_gradient, vocabulary


def with_end(tokens: list[int], logits: list[list[float]]) -> tuple[list[int], np.ndarray]:
    """Tokens after a prefix, and logits at each of them; the last ones say nothing."""
    rows = np.array(logits)
    return [1, *tokens], np.concatenate([rows, np.zeros_like(rows[:1])])


def prefix_nll(read: Predictions, words: Vocabulary) -> np.ndarray:
    """Of all entries that begin with the first bytes of the token that follows."""
    found = []
    for j, token in enumerate(read.tokens[1:].tolist()):
        true = words.token_bytes[token] or b""
        for n in range(1, len(true)):
            alike = [(words.token_bytes[t] or b"").startswith(true[:n]) for t in read.ids[j]]
            found.append(-np.log(np.exp(read.log_p[j][alike].astype(float)).sum()))
    return np.array(found, np.float32)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("name", ["A", "A_reversed", "B", "spaces", "residual"])
def test_targets_and_losses_are_the_published_ones(name: str, stored: bool) -> None:
    (case,) = (case for case in oracle("bpm")["cases"] if case["name"] == name)
    own, words = (vocabulary(case[who], eos=0) for who in ("student_vocab", "teacher_vocab"))
    tokens, logits = with_end(case["student_ids"], case["student_logits"])
    its = predictions(words, *with_end(case["teacher_ids"], case["teacher_logits"]))
    if stored:
        its = Predictions(**{**its.__dict__, "prefix_nll": prefix_nll(its, words)})
    passage = {"target": predictions(own, tokens, logits), "t": its}
    resources = LossResources("target", {"target": own, "t": words}, {"t": np.array(case["phi"], np.int32)})
    targets = BytePrefixTargets(resources.source("t"), own, True, True)([its], [passage["target"]])
    for row in case["rows"]:
        i = row["student_position"]
        assert targets.trained[i] == ("target" in row), row["route"]
        if "target" not in row:
            continue
        mine = {str(v): p for v, p in zip(targets.ids[i].tolist(), targets.p[i], strict=True) if p > 1e-12}
        theirs = {v: p for v, p in row["target"].items() if p > 1e-12}
        assert mine == pytest.approx(theirs, rel=2e-5, abs=1e-8), (row["route"], i)
    for run in case["losses"]:
        loss = BPMLoss(["t"], run["beta"], run["rkl_lambda"])
        nats, gradient = value_and_gradient(loss, passage, resources, torch.tensor(logits))
        assert nats[torch.tensor(targets.trained)].tolist() == pytest.approx(run["per_row"], rel=1e-5, abs=5e-7)
        assert float(gradient.norm()) == pytest.approx(run["grad_norm"], rel=1e-5)
        if "grad_student_logits" in run:
            expected = torch.tensor(run["grad_student_logits"]).double()
            assert (gradient[:-1] - expected).norm() <= 1e-5 * expected.norm()
