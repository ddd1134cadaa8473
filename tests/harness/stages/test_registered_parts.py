"""Registered parts of a training: their versions and parameters name it, and a loss may come from another package."""

import importlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from torch import Tensor

from baselines.registry import METHODS
from fusion.alignment.pairing import ALIGNMENTS
from fusion.alignment.selection import FUSIONS
from fusion.errors import UserError
from fusion.losses.divergences import DIVERGENCES, forward_kl
from fusion.losses.fusion_loss import FusionLoss
from fusion.losses.loss import LOSSES, Loss
from fusion.losses.top_k_distillation import TopKDistillationLoss
from fusion.registry import Registry
from fusion.switches import Switches
from fusion.vocabulary.maps import MAPS
from harness.experiment.candidates import candidates
from harness.experiment.pipeline import Experiment, open_experiment, train
from tests.harness.bigrams import Bigrams, experiment
from tests.registries import restore_after

TEXTS = ["abcdab", "ddabc"]
FUSELLM, DISTILLATION = {"method": "fusellm"}, {"method": "distillation"}
ONLINE = {"method": "distillation", "online": True, "divergence": "reverse_kl"}


def of_row(folder: Path, row: dict[str, Any]) -> Experiment:
    return experiment(folder, TEXTS, {"s": Bigrams({"a": {"d": 0.6}})}, f"methods.X={json.dumps(row)}")


def fingerprint(experiment: Experiment, root: Path) -> str:
    """Of the one row's training, as a plan knows it."""
    (row,) = candidates(open_experiment(experiment.config, root, dry=True))
    return row.candidate.fingerprint


@pytest.mark.parametrize(
    ("registry", "name", "row", "used"),
    [
        (LOSSES, "fusion", FUSELLM, True),
        (LOSSES, "top_k_distillation", DISTILLATION, True),
        (LOSSES, "online_distillation", ONLINE, True),
        (LOSSES, "uld", {"method": "uld"}, True),
        (LOSSES, "alm", {"method": "alm"}, True),
        (MAPS, "first_piece", FUSELLM, True),
        (MAPS, "first_piece", DISTILLATION, True),
        (ALIGNMENTS, "same_end", FUSELLM, True),
        (ALIGNMENTS, "same_end", DISTILLATION, True),
        (FUSIONS, "mince", FUSELLM, True),
        (DIVERGENCES, "forward_kl", DISTILLATION, True),
        (DIVERGENCES, "reverse_kl", ONLINE, True),
        (FUSIONS, "avgce", FUSELLM, False),
        (DIVERGENCES, "reverse_kl", DISTILLATION, False),
        (LOSSES, "fusion", {"method": "clm"}, False),
    ],
)
def test_another_version_of_a_part_that_is_used_is_another_training(
    registry: Registry[Any], name: str, row: dict[str, Any], used: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = of_row(tmp_path, row)
    before = fingerprint(small, tmp_path / "root")
    assert fingerprint(small, tmp_path / "root") == before
    part = registry.part(name)
    monkeypatch.setitem(registry._parts, name, replace(part, version=part.version + 1))
    assert (fingerprint(small, tmp_path / "root") != before) == used


class SkewParameters(BaseModel):
    alpha: float = 0.1


def test_a_divergence_with_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    restore_after(monkeypatch, DIVERGENCES)

    @DIVERGENCES.register("skewed", parameters=SkewParameters)
    def skewed(log_p: Tensor, log_q: Tensor, *, parameters: SkewParameters) -> Tensor:
        """KL(p || (1 - alpha) q + alpha p)."""
        both = torch.stack([log_q + math.log1p(-parameters.alpha), log_p + math.log(parameters.alpha)])
        return forward_kl(log_p, both.logsumexp(0))

    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = torch.rand(2, 1, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p /= p.sum(-1, keepdim=True)
    features = {
        "ids": torch.arange(5).expand(2, 1, 5),
        "p": p,
        "tail": torch.zeros(2, 1, dtype=torch.float64),
        "weight": torch.ones(2, 1, dtype=torch.float64),
    }
    losses = [TopKDistillationLoss(["a"], {"name": "skewed", "alpha": alpha}) for alpha in (0.25, 0.5)]
    q = logits.softmax(-1)
    for loss, alpha in zip(losses, (0.25, 0.5), strict=True):
        expected = (p[:, 0] * (p[:, 0] / ((1 - alpha) * q + alpha * p[:, 0])).log()).sum(-1)
        assert torch.allclose(loss(logits, features), expected)
    assert losses[0].identity() != losses[1].identity()
    assert TopKDistillationLoss(["a"], "skewed").identity() != TopKDistillationLoss(["a"]).identity()
    with pytest.raises(UserError, match="does not accept beta"):
        TopKDistillationLoss(["a"], {"name": "skewed", "beta": 1.0})


def test_one_name_has_one_identity_however_it_is_given() -> None:
    plain, mapping = (FusionLoss(["a"], switches=Switches(fusion=name)) for name in ("mince", {"name": "mince"}))
    assert plain.identity()["parameters"]["fusion"] == mapping.identity()["parameters"]["fusion"]


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Loss]:
    """The loss of the page about adding one, as an installed package offers it."""
    page = (Path(__file__).parents[3] / "docs" / "adding-a-loss.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python title=.*?\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(code.splitlines()) < 80
    folder = tmp_path / "site"
    info = folder / "penalty-1.dist-info"
    info.mkdir(parents=True)
    (folder / "fusellm_penalty.py").write_text(code)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: penalty\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[fusellm.losses]\npenalty = fusellm_penalty:ConfidencePenalty\n")
    restore_after(monkeypatch, LOSSES, METHODS)
    monkeypatch.syspath_prepend(folder)
    loss: type[Loss] = importlib.import_module("fusellm_penalty").ConfidencePenalty
    return loss


@pytest.mark.slow
def test_a_loss_of_another_package_trains(plugin: type[Loss], tmp_path: Path) -> None:
    assert LOSSES.get("penalty") is plugin and LOSSES.get("confidence_penalty") is plugin
    loss = plugin(strength=2.0)  # type: ignore[call-arg]
    assert loss.identity() == {"name": "confidence_penalty", "version": 1, "parameters": {"strength": 2.0}}
    small = of_row(tmp_path, {"method": "clm"})
    candidate = train(small, "X", 0, lam=0.5, loss=loss)
    assert candidate.training is not None
    (step,) = [e for e in json.loads((candidate.training / "log.json").read_text()) if "tokens" in e]
    # At most 0, at least -2 log V nats for the target's 8 tokens.
    assert -2 * math.log(8) < step["fusion_nats_per_token"] < 0
    other = train(small, "X", 0, lam=0.5, loss=plugin(strength=1.0))  # type: ignore[call-arg]
    assert other.fingerprint != candidate.fingerprint


def test_a_loss_that_is_not_registered_has_no_identity() -> None:
    class Local(FusionLoss):
        pass

    with pytest.raises(UserError, match="is no registered loss: register it"):
        Local(["a"]).identity()
