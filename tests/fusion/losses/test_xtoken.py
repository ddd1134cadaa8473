"""X-Token against NeMo-RL's own numbers, where a chunk is one token of either."""

from typing import Any

import numpy as np
import pytest
import torch

from fusion.losses.loss import LossResources
from fusion.losses.xtoken import XTokenLoss
from fusion.vocabulary.sparse_projection import SparseProjection, sparse_projection
from tests.fusion.losses.oracles import longest_match, oracle, predictions, resources, value_and_gradient, vocabulary


def matrix(found: dict[str, Any], n_columns: int) -> SparseProjection:
    ids, weights = (np.array(found["step3_top4"][name]) for name in ("indices", "likelihoods"))
    return SparseProjection(np.where(weights > 0, ids, -1).astype(np.int32), weights.astype(np.float32), n_columns)


@pytest.mark.parametrize(("name", "two_way"), [("W_forward_only", False), ("W_no_scale", True), ("W2_no_scale", True)])
def test_the_matrix_is_the_published_one(name: str, two_way: bool) -> None:
    """To the rounding of bfloat16. Without what its scale trick adds: a fifth of weight on an arbitrary token."""
    found = oracle("xtoken-projection")
    own = vocabulary(found["student_vocab"])
    words = vocabulary(found["teacher2_vocab" if name.startswith("W2") else "teacher_vocab"])
    theirs = matrix(next(one for one in found["projections"] if one["name"] == name), len(words))
    same = resources(own, t=words).shared("t")
    ours = sparse_projection(same, longest_match(own, words), longest_match(words, own) if two_way else None)

    def dense(one: SparseProjection) -> np.ndarray:
        result = np.zeros((len(own), len(words)))
        row, column, value = one.entries
        result[row, column] = value
        return result

    np.testing.assert_allclose(dense(ours), dense(theirs), atol=5e-3)


def test_pairs_are_the_published_partition() -> None:
    found = oracle("xtoken-projection")
    for one in found["partitions"]:
        (given,) = (m for m in found["projections"] if m["name"] == one["projection"])
        n = len(found["teacher2_vocab" if given["teacher"].endswith("2") else "teacher_vocab"])
        pairs = matrix(given, n).pairs(0.6 if one["xtoken_loss"] else 1.0)
        expected = dict(zip(one["common_teacher"], one["common_student"], strict=True))
        assert {t: s for t, s in enumerate(pairs.tolist()) if s >= 0} == expected


def teacher_of(found: dict[str, Any], name: str, sample: int, temperature: float) -> tuple[Any, Any]:
    teacher = found["student"] if name == "same" else found["teachers"][name]
    logits = found["teachers"][name]["logits"][sample]
    n = sum(teacher["token_mask"][sample])
    words = vocabulary(found[found["teachers"][name]["vocab"] + "_vocab"])
    return words, predictions(words, teacher["input_ids"][sample][:n], np.array(logits[:n]) / temperature)


class Given(XTokenLoss):
    """With a matrix from the published tools."""

    def matrix(self, resources: LossResources, name: str) -> SparseProjection:
        return MATRICES[name]


MATRICES: dict[str, SparseProjection] = {}


def test_the_gradient_at_chunks_of_one_token_is_the_published_one() -> None:
    """The loss is a sum over chunks: at positions of a chunk of one token the gradient is that chunk's alone."""
    found, tools = oracle("xtoken-loss"), oracle("xtoken-projection")
    own = vocabulary(found["student_vocab"])
    compared = 0
    for run in found["runs"]:
        settings = run["settings"]
        if "grad_student_logits" not in run or len(run["teachers"]) > 1 or "vocab_topk" in settings:
            continue
        (name,), (given,) = run["teachers"], run["projections"]
        temperature = settings.get("temperature", 1.0)
        loss = Given(
            [name],
            objective="h_kl" if settings.get("gold_loss") else "p_kl",
            divergence="reverse_kl" if settings.get("reverse_kl") else "forward_kl",
            temperature=temperature,
            unmapped="renormalise",
            least_weight=0.6 if settings.get("xtoken_loss") else 1.0,
        )
        scale = run["metrics"]["kl_loss_scale"]
        n_valid = run["metrics"].get("num_valid_pairs_t0", run["metrics"].get("num_valid_chunks_t0"))
        total = 0.0
        for sample in range(2):
            words, its = teacher_of(found, name, sample, temperature)
            if given is None:
                MATRICES[name] = sparse_projection(
                    np.arange(len(own), dtype=np.int32), np.full((len(own), 1), -1, np.int32)
                )
            else:
                MATRICES[name] = matrix(next(m for m in tools["projections"] if m["name"] == given), len(words))
            n = sum(found["student"]["token_mask"][sample])
            tokens, logits = (found["student"][key][sample][:n] for key in ("input_ids", "logits"))
            passage = {"target": predictions(own, tokens, logits), name: its}
            needed = resources(own, **{name: words})
            nats, gradient = value_and_gradient(loss, passage, needed, torch.tensor(logits))
            total += float(nats.sum())
            theirs = torch.tensor(run["grad_student_logits"][sample])[:n].double()
            ends, its_ends = passage["target"].byte_ends.tolist(), its.byte_ends.tolist()
            single = [
                i
                for i in range(n - 1)
                if ends[i] in its_ends and its_ends[its_ends.index(ends[i]) + 1 :][:1] == [ends[i + 1]]
            ]
            assert single
            for i in single:
                clm = torch.zeros(len(own), dtype=torch.float64)
                if settings.get("dynamic_loss_scaling", True):
                    n_labels = sum(sum(mask) - 1 for mask in found["student"]["token_mask"])
                    clm = torch.tensor(logits[i]).double().softmax(-1)
                    clm[tokens[i + 1]] -= 1
                    clm /= n_labels
                if name == "same":
                    n_valid = sum(sum(mask) - 1 for mask in found["student"]["token_mask"])
                expected = (theirs[i] - clm) / scale * n_valid
                assert (gradient[i] - expected).norm() <= 2e-5 * expected.norm(), (run["teachers"], settings, i)
                compared += 1
        if name == "same":
            assert total / n_valid == pytest.approx(run["metrics"]["kl_loss"], rel=1e-5)
    assert compared > 20


@pytest.mark.parametrize("unmapped", ["bucket", "renormalise"])
@pytest.mark.parametrize("k", [5, 2])
def test_it_is_the_dense_form_with_all_entries(k: int, unmapped: Any) -> None:
    """P-KL in float64, with values and gradients; of the target's tokens d has no row of W, and ab has two entries."""
    own, words = vocabulary(["<s>", "a", "b", "ab", "c", "d"], 1), vocabulary(["<s>", "c", "b", "a", "bc"], 1)
    g = torch.Generator().manual_seed(2)
    logits, its_logits = (torch.randn(4, n, generator=g, dtype=torch.float64) for n in (6, 5))
    tokens, its = [0, 1, 2, 4], [0, 3, 2, 1]
    w = torch.zeros(6, 5, dtype=torch.float64)
    w[1, 3] = w[2, 2] = w[4, 1] = 1
    w[3, 3], w[3, 2] = 1 / 1.1, 0.1 / 1.1
    leaf, nats = logits.clone().requires_grad_(), []
    for i in range(3):
        p, q = its_logits[i].softmax(-1), leaf[i].softmax(-1) @ w
        kept = sorted({*p.topk(k).indices.tolist(), its[i + 1]})
        missing = 1 - q.sum()
        if unmapped == "renormalise":
            q, missing = q / q.sum() + 1e-10, 0 * missing
        others = torch.ones(5, dtype=torch.bool)
        others[kept] = False
        p, q = torch.cat([p[kept], p[others].sum()[None]]), torch.cat([q[kept], q[others].sum()[None] + missing])
        nats.append(torch.where(p > 0, p * (p.clamp(min=1e-30) / q.clamp(min=1e-30)).log(), 0).sum())
    (theirs,) = torch.autograd.grad(torch.stack(nats).sum(), leaf)
    passage = {"target": predictions(own, tokens, logits), "t": predictions(words, its, its_logits, k)}
    loss = XTokenLoss(["t"], unmapped=unmapped)
    mine, gradient = value_and_gradient(loss, passage, resources(own, t=words), logits)
    torch.testing.assert_close(mine[:-1], torch.stack(nats).detach(), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(gradient, theirs, rtol=1e-5, atol=1e-7)
