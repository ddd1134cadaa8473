"""What the models cost: the objective, a training step, the data loader beside it, and extraction."""

import statistics
import time
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import fusion.losses.objective as objective_module
from baselines.fusellm import FuseLLMParameters
from benchmarks.support import machine, reference_implementation
from benchmarks.support.inputs import Inputs
from benchmarks.support.page import Result
from fusion.inference.top_k import batches_by_length, predict_top_k, reader
from fusion.losses.fusion_loss import FusionLoss
from fusion.losses.loss import LossResources
from fusion.losses.objective import CHUNK, Head, Objective, mixed_loss
from fusion.losses.sparse_cross_entropy import SparseCrossEntropy
from fusion.modeling.heads import fused_forward
from fusion.modeling.packing import Packing, attending_by_passage, check_packing, own_forward, packed_inputs
from fusion.vocabulary.tokenization import prefix_id
from harness.data.passages import Passages
from harness.data.predictions import PredictionsReader
from harness.data.sequences import IGNORED, PackedSequences, collate
from harness.data.tokens import Tokens
from harness.experiment.pipeline import TARGET, Experiment, loss_resources, tokenise
from harness.models.checkpoints import load_model
from harness.models.resolution import ResolvedModel
from harness.runtime.device import compute_dtype
from harness.runtime.memory import PeakMemory, retain_heap

_KINDS = ("clm", "fusellm", "plain")
_LAMBDA = 0.9
_ENTRIES = 10


def objective(inputs: Inputs, *, quick: bool) -> list[Result]:
    """The mixed loss with its gradients at the size of SmolLM2's head, in float32."""
    positions, vocabulary, hidden = (256, 2000, 64) if quick else (2048, 49152, 576)
    size = (positions, vocabulary, hidden)
    problem = _problem(*size)
    ours, dense = _fused(problem), _dense(problem)
    for name, got, wanted in zip(("loss", "gradient", "gradient of the projection"), ours, dense, strict=True):
        if not torch.allclose(got, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max())):
            raise AssertionError(f"the {name} differs from that of the plain re-implementation")
    del ours, dense
    taken = machine.seconds(lambda: _fused(problem), repeat=5)
    reference = machine.seconds(lambda: _dense(problem), repeat=3)
    peaks = {kind: machine.in_fresh_process(_objective_peak, kind, *size) for kind in ("fused", "dense")}
    shape = f"T = {positions:,}, V = {vocabulary:,}, D = {hidden}"
    return [
        Result(
            f"the objective's memory beyond the model, {shape}",
            "MB",
            peaks["fused"] / 1e6,
            peaks["dense"] / 8e6,
            reference=peaks["dense"] / 1e6,
            roofline=positions * (hidden * 4 + _ENTRIES * 8) / 1e6,
            note="the height of resident memory in a fresh process, less the weights and the projection's gradient; "
            "the goal is an eighth of the plain objective's (dense targets and logits, autograd). Roofline: the "
            "gradient of the hidden states and the targets.",
        ),
        Result(
            f"the objective's time, forward and backward, {shape}",
            "s",
            taken,
            reference=reference,
            roofline=3 * 2 * positions * vocabulary * hidden / machine.matmul("float32"),
            note="float32. Roofline: its three matrix products at the rate of a large one, "
            f"{machine.matmul('float32') / 1e9:.0f} GFLOP/s.",
        ),
    ]


@dataclass(frozen=True)
class _Problem:
    hidden: Tensor
    weight: Tensor
    gold: Tensor
    ids: Tensor
    p: Tensor


def _problem(positions: int, vocabulary: int, hidden: int) -> _Problem:
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(positions, _ENTRIES, generator=generator)
    first = torch.randint(vocabulary - _ENTRIES, (positions, 1), generator=generator)
    return _Problem(
        hidden=torch.randn(positions, hidden, generator=generator).requires_grad_(),
        weight=(torch.randn(vocabulary, hidden, generator=generator) / hidden**0.5).requires_grad_(),
        gold=torch.randint(vocabulary, (positions,), generator=generator),
        ids=first + torch.arange(_ENTRIES),
        p=p / p.sum(1, keepdim=True),
    )


def _gradients(problem: _Problem, loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    by_hidden, by_weight = torch.autograd.grad(loss, (problem.hidden, problem.weight))
    return loss.detach(), by_hidden, by_weight


def _fused(problem: _Problem) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.full((len(problem.gold),), 1 / len(problem.gold))
    term = SparseCrossEntropy(problem.ids, problem.p, torch.zeros_like(weight), weight)
    loss = mixed_loss(problem.hidden, Head(problem.weight), Objective(problem.gold, weight, _LAMBDA, term))
    return _gradients(problem, loss.total)


def _dense(problem: _Problem) -> tuple[Tensor, Tensor, Tensor]:
    logits = problem.hidden @ problem.weight.T
    p = torch.zeros(logits.shape).scatter_(1, problem.ids, problem.p)
    return _gradients(problem, reference_implementation.objective(logits, problem.gold, p, _LAMBDA) / len(logits))


def _objective_peak(kind: str, positions: int, vocabulary: int, hidden: int) -> int:
    run = {"fused": _fused, "dense": _dense}[kind]
    run(_problem(64, 512, hidden))  # what comes with the first call only
    problem = _problem(positions, vocabulary, hidden)
    return machine.peak_beyond(lambda: run(problem)) - 4 * problem.weight.numel()


@dataclass(frozen=True)
class Prepared:
    """An experiment with everything made that its training needs."""

    experiment: Experiment
    passages: Passages
    loss: FusionLoss
    resources: LossResources
    extractions: dict[str, PredictionsReader]
    rows: PackedSequences


def prepare(experiment: Experiment) -> Prepared:
    """Extracts and maps what is not there yet."""
    loss = FuseLLMParameters().loss(list(experiment.config.roles.sources))
    resources, extractions = loss_resources(experiment, "FuseLLM", loss.requirements(TARGET))
    passages = Passages(experiment.corpora.passages[1])
    tokenizer, vocabulary = experiment.models.tokenizer(TARGET)
    features = partial(loss.features, resources=resources)
    length = experiment.config.training.sequence_length
    tokens = Tokens(tokenise(experiment, TARGET))
    rows = PackedSequences(passages, tokens, tokenizer, vocabulary, length, features, extractions)
    return Prepared(experiment, passages, loss, resources, extractions, rows)


class _Stepper:
    """Training steps of one model, by the trainer's objective or by a plain one."""

    def __init__(self, model: ResolvedModel) -> None:
        self.model = load_model(model, "float32").train()
        self.packing = check_packing(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        self.dtype = compute_dtype("auto", "cpu")

    def step(self, kind: str, batch: dict[str, Tensor]) -> float:
        """Seconds of one step on a batch of `collate`: "clm", "fusellm", or "plain" (FuseLLM with dense targets)."""
        started = time.perf_counter()
        with attending_by_passage(self.model, self.packing):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bfloat16"):
                loss = self._plain(batch) if kind == "plain" else self._loss(batch, fusion=kind == "fusellm")
            (loss / batch["labels"].ne(IGNORED).sum()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started

    def gradient(self, batch: dict[str, Tensor], *, masked: bool) -> float:
        """Seconds of CLM's gradient on a batch: as it is, or `masked`, as it was before it was made faster.

        Before, a row was read at a time, a mask hid the other passages of it, the logits of 256 positions were worked
        on at once, wherever they lay, and the C library gave freed memory back at once (see `_gradient`).
        """
        if not masked:
            return self._gradient(batch, self.packing)
        rows = ({name: value[i : i + 1] for name, value in batch.items()} for i in range(len(batch["labels"])))
        with mock.patch.object(objective_module, "CACHED", 2**62):
            return sum(self._gradient(row, "positions", chunk=256) for row in rows)

    def _gradient(self, batch: dict[str, Tensor], packing: Packing, **options: Any) -> float:
        started = time.perf_counter()
        with attending_by_passage(self.model, packing):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bfloat16"):
                loss = self._loss(batch, packing=packing, **options)
            loss.backward()
        return time.perf_counter() - started

    def _loss(
        self, batch: dict[str, Tensor], *, fusion: bool = False, packing: Packing | None = None, chunk: int = CHUNK
    ) -> Tensor:
        labels = batch["labels"].flatten()
        term = FusionLoss([]).term(batch, {}) if fusion else None
        objective = Objective(labels.clamp(min=-1), (labels >= 0).float(), _LAMBDA if fusion else 1.0, term, chunk)
        packing = packing or self.packing
        return fused_forward(self.model, batch["input_ids"], batch["position_ids"], objective, packing=packing).total

    def _plain(self, batch: dict[str, Tensor]) -> Tensor:
        inputs = packed_inputs(self.packing, batch["input_ids"], batch["position_ids"], torch.float32)
        logits = own_forward(self.model, **inputs).logits.float().flatten(0, 1)
        ids, p = batch["ids"].flatten(0, 1), batch["p"].flatten(0, 1)
        dense = torch.zeros_like(logits).scatter_add_(1, ids.clamp(min=0), p)  # pads add 0 to id 0
        return reference_implementation.objective(logits, batch["labels"].clamp(min=-1).flatten(), dense, _LAMBDA)


def training(prepared: Prepared, *, quick: bool) -> list[Result]:
    """A FuseLLM step beside a CLM step on the same rows, and the data loader beside the step."""
    experiment, rows = prepared.experiment, prepared.rows
    target = experiment.models.model(TARGET)
    batch = _tensors([rows[i] for i in range(min(experiment.config.training.micro_batch_size, len(rows)))])
    stepper = _Stepper(target)
    taken: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    for turn in range(2 if quick else 4):  # in turns, so that what else the machine does falls on all
        for kind in _KINDS:
            seconds = stepper.step(kind, batch)
            taken[kind] += [seconds] if turn else []
    median = {kind: statistics.median(values) for kind, values in taken.items()}
    parameters, dtype = sum(p.numel() for p in stepper.model.parameters()), stepper.dtype
    del stepper
    arrays = {name: value.numpy() for name, value in batch.items()}
    peak = {kind: machine.in_fresh_process(_step_peak, kind, target, arrays) for kind in _KINDS}
    before, now = (machine.in_fresh_process(_gradient, was, target, arrays, 1 if quick else 3) for was in (True, False))
    tokens = batch["input_ids"].numel()
    what = f"a FuseLLM step with {len(experiment.config.roles.sources)} sources, {tokens:,} positions"
    return [
        Result(
            f"the gradient of {tokens:,} positions, of which `{experiment.config.experiment}`'s slowest stage is made",
            "% of the time it took",
            100 * now / before,
            75.0,
            roofline=100 * 6 * parameters * tokens / machine.matmul(dtype) / before,
            note=f"training, here CLM; {now:.2f} s against {before:.2f} s before: passages attend by themselves, in "
            "whole products where they are short, where a mask hid the other passages; logits are worked on in the "
            f"cache; freed memory is kept; {len(batch['labels'])} rows are read at once, where it was one. "
            "Roofline: the matrix products alone.",
        ),
        Result(
            f"{what}: time",
            "CLM steps",
            median["fusellm"] / median["clm"],
            1.1,
            reference=median["plain"] / median["clm"],
            roofline=1.0,
            note=f"CLM {median['clm']:.2f} s, FuseLLM {median['fusellm']:.2f} s; the matrix products of a step alone "
            f"take {6 * parameters * tokens / machine.matmul(dtype):.2f} s at the rate of a large one, "
            f"{machine.matmul(dtype) / 1e9:.0f} GFLOP/s in {dtype}. Reference: the model's own logits, dense targets "
            "without the tail.",
        ),
        Result(
            f"{what}: memory",
            "CLM steps",
            peak["fusellm"] / peak["clm"],
            1.1,
            reference=peak["plain"] / peak["clm"],
            roofline=1.0,
            note="the height of a fresh process's resident memory in its second step: "
            f"CLM {peak['clm'] / 1e9:.2f} GB, FuseLLM {peak['fusellm'] / 1e9:.2f} GB.",
        ),
        _loader(prepared, median["fusellm"] / len(batch["labels"])),
    ]


def _gradient(masked: bool, model: ResolvedModel, batch: dict[str, np.ndarray], repeat: int) -> float:
    if not masked:
        retain_heap()
    stepper = _Stepper(model)
    tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
    stepper.gradient(tensors, masked=masked)
    return statistics.median(stepper.gradient(tensors, masked=masked) for _ in range(repeat))


def _step_peak(kind: str, model: ResolvedModel, batch: dict[str, np.ndarray]) -> int:
    stepper = _Stepper(model)
    tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
    stepper.step(kind, tensors)  # the optimiser's moments are there from the second step on
    with PeakMemory() as peak:
        stepper.step(kind, tensors)
    return peak.bytes


def _loader(prepared: Prepared, step_seconds: float) -> Result:
    """Predictions, aligning, fusing and collating a row beside the step on it."""
    rows, target, extractions = prepared.rows, prepared.resources.target, prepared.extractions
    sources = [prepared.resources.source(name) for name in prepared.loss.sources]
    each = [machine.seconds(partial(_load, rows, i), repeat=5) for i in range(min(len(rows), 8))]
    taken = statistics.median(each)
    members = rows.members(0)
    predictions = [{name: e.predictions(p) for name, e in extractions.items()} for p in members]
    pairs = {
        s.name: [
            reference_implementation.same_end(r[s.name].byte_ends.tolist(), r[target].byte_ends.tolist())
            for r in predictions
        ]
        for s in sources
    }
    images = {source.name: source.map for source in sources}
    size = len(extractions[target].vocabulary)
    reference = machine.seconds(
        lambda: reference_implementation.fuse(predictions, pairs, images, target, size), repeat=1, warm=False
    )
    reading = machine.seconds(lambda: [e.predictions(p) for e in extractions.values() for p in members], repeat=5)
    return Result(
        f"the data loader, a sequence of {rows.sequence_length:,} positions",
        "% of the step on it",
        100 * taken / step_seconds,
        100.0,
        reference=100 * reference / step_seconds,
        roofline=100 * reading / step_seconds,
        note=f"{1e3 * taken:.0f} ms a row: below 100 % one worker is always ahead of the trainer, until a device takes "
        f"{rows.sequence_length / taken:,.0f} positions a second; without a worker its share is added to the step. "
        "Reference: projection and the dense collator, without reading the shards. Roofline: reading the row's "
        "predictions.",
    )


def _load(rows: PackedSequences, index: int) -> dict[str, Tensor]:
    return _tensors([rows[index]])


def _tensors(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """What `collate` makes of rows, without the lists of lengths that the model computes from positions, too."""
    batch = collate(rows)
    del batch["passage_lengths"]
    return batch


def extraction(prepared: Prepared, *, quick: bool) -> list[Result]:
    """Extraction beside a bare forward pass, logits included, of the same batches."""
    return [_extraction(prepared, name, quick) for name in prepared.extractions]


def _extraction(prepared: Prepared, name: str, quick: bool) -> Result:
    experiment = prepared.experiment
    role = experiment.models.role(name)
    stored = Tokens(tokenise(experiment, name))
    model = load_model(experiment.models.model(name), compute_dtype(role.dtype, "cpu"))
    backbone, project = reader(model)
    prefix, k = prefix_id(experiment.models.tokenizer(name)[0]), experiment.config.extraction.k
    count = min(len(prepared.passages), 3 if quick else 6)
    sequences = [[prefix, *stored.ids(p).tolist()] for p in range(count)]
    batches = [
        [sequences[i] for i in batch] for batch in batches_by_length(list(map(len, sequences)), role.batch_tokens)
    ]

    def extract() -> None:
        for batch in batches:
            predict_top_k(backbone, project, batch, k=k, device=torch.device("cpu"))

    @torch.inference_mode()
    def forward() -> None:
        for batch in batches:
            width = max(map(len, batch))
            padded = torch.tensor([[*sequence, *[0] * (width - len(sequence))] for sequence in batch])
            model(input_ids=padded, use_cache=False)

    def reference() -> None:
        for batch in batches:
            reference_implementation.predict_top_k(model, batch, k)

    kinds = {"extraction": extract, "forward": forward, "plain": reference}
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(1 if quick else 3):
        for kind, run in kinds.items():
            taken[kind].append(machine.seconds(run, repeat=1, warm=False))
    median = {kind: statistics.median(values) for kind, values in taken.items()}
    tokens = sum(map(len, sequences))
    return Result(
        f"extraction with {experiment.models.model(name).name}",
        "% of the rate of a forward pass",
        100 * median["forward"] / median["extraction"],
        80.0,
        "more",
        reference=100 * median["forward"] / median["plain"],
        roofline=100.0,
        note=f"{tokens:,} tokens in {len(batches)} batches, {tokens / median['extraction']:,.0f} tokens/s against "
        f"{tokens / median['forward']:,.0f} of the forward pass, both with all logits. Reference: dense float32 "
        "logits, the top ten of one position after the other.",
    )
