"""The audit: what the sources know more than the target, and how much of it is left after every step of the fusion.

The steps are those of `fusion.alignment.waterfall`, in bits per byte of all the text of a domain, so that they add up.
What the experiment's rows have learnt of it is read from the records of its run, where there is one, and is said of the
suite's documents, which are other text.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from baselines.distillation import DistillationParameters
from baselines.fusellm import FuseLLMParameters
from fusion.alignment.selection import FusionFunction, mean
from fusion.alignment.waterfall import FUSED, STAGES, waterfall
from fusion.errors import UnknownName, UserError
from fusion.losses.loss import LossRequirements, LossResources
from fusion.losses.top_k_distillation import TopKDistillationLoss
from fusion.switches import Switches
from fusion.vocabulary.tokenization import lost_bytes
from harness.config.schema import Config
from harness.config.validation import method_parameters
from harness.data.passages import Passages, sample_of
from harness.data.predictions import PredictionsReader
from harness.experiment.pipeline import TARGET, Experiment, loss_resources, open_experiment, predictions_spec, start
from harness.experiment.run import run_folder
from harness.reporting.figures import audited
from harness.reporting.runs import Run, open_run
from harness.runtime.progress import track
from harness.stages.prefix_check import TEXTS, prefix_warning
from harness.store.files import write_atomically
from harness.store.paths import RUN_FILE, command_path, safe_name
from results.metrics import LOST_BYTES

OVERALL = "all domains"
_STEPS = {
    "aligned": "positions without a partner",
    "projected": "map and projection",
    "kept": "top k and tail",
    "selected": "the selection among sources",
    "in_loss": "positions between partners",
}
_COUNTS = ("passages", "bytes")
SHOWN = ("source", "domain", "bits_per_byte", *STAGES, "ahead_of_target", "ahead_of_reference")
"""The columns that fit a terminal; the others are of the files."""
Sums = defaultdict[tuple[str, str], defaultdict[str, float]]
"""By model and domain: sums over passages."""


@dataclass(frozen=True)
class Audit:
    """The measures of an audit, and sentences that sum them up."""

    measures: pd.DataFrame
    """One row a model and domain (see `results.figures.audit.audit_figure`)."""
    sentence: str
    folder: Path


def contribute(config: Config, root: Path, passages: int = 2000, row: str | None = None) -> None:
    """Makes, on a rank that is not the main process, its part of what an audit there needs."""
    experiment = open_experiment(config, root, one_gpu=True)
    start(experiment)
    with experiment.workspace.store.in_use(command_path(root, config.experiment, config.profile, "audit")):
        _inputs(experiment, _audited_row(config, row), passages)


def audit(config: Config, root: Path, passages: int = 2000, row: str | None = None) -> Audit:
    """Measures the sources on the training corpus; makes extractions and maps where they are missing.

    Where there are more passages than are measured, and predictions of all of them are not there, only those that are
    measured are extracted.

    The sources, the map and the switches are those of a row of FuseLLM or distillation. Each passage is fused by
    itself, so that under `select_over: sequence` a selection can differ from the training's. The measures of a row that
    is named lie in a folder of its own.

    Args:
        config: the experiment.
        root: where its artifacts and runs lie.
        passages: how many are measured, drawn from all by seed 0.
        row: the row's label. Default: the first FuseLLM row.

    Raises:
        UserError: the experiment has no FuseLLM row, or `row` is none whose sources can be followed.
    """
    experiment = open_experiment(config, root, one_gpu=True)
    start(experiment)
    audited_row = _audited_row(config, row)
    with experiment.workspace.store.in_use(command_path(root, config.experiment, config.profile, "audit")):
        sums, skipped = _sums(audited_row, passages, *_inputs(experiment, audited_row, passages))
    run = run_folder(experiment, root)
    models = experiment.models
    precisions = {name: models.dtype(name) for name in (TARGET, *audited_row.sources)}
    precisions[FUSED] = " and ".join(sorted(set(precisions.values())))
    rows = _by_domain(sums, precisions, models.model(TARGET).name)
    finished = open_run(run) if (run / RUN_FILE).exists() else None
    learnt = _learnt(finished) if finished else []
    names = {measured["source"] for measured in rows}
    for measured in learnt:
        measured["source"] += " (row)" if measured["source"] in names else ""
    measures = pd.DataFrame([*rows, *learnt], columns=[*rows[0], "ahead_of_target", "ahead_of_reference"])
    sentence = _sentence(measures, audited_row, config.reference)
    if skipped:
        sentence += f" {skipped} passages are not counted: a model has no predictions of them (see its extraction)."
    for warning in _prefix_warnings(experiment, [TARGET, *audited_row.sources]):
        sentence += f" {warning}"
    folder = run / "audit" / (safe_name(row) if row else "")
    folder.mkdir(parents=True, exist_ok=True)
    _write(measures, sentence, folder, f"{config.title}: {row}" if row else config.title, config.banner or "")
    return Audit(measures, sentence, folder)


def plain_rows(measures: pd.DataFrame, digits: int | None = None) -> list[list[Any]]:
    """The rows of measures as plain values, counts as integers, the others rounded to so many digits."""

    def plain(column: str, value: Any) -> Any:
        if not isinstance(value, float) or math.isnan(value):
            return value
        return int(value) if column in _COUNTS else value if digits is None else round(value, digits) + 0.0  # no -0

    return [[plain(str(column), value) for column, value in row.items()] for row in measures.to_dict("records")]


def _prefix_warnings(experiment: Experiment, names: Sequence[str]) -> Iterator[str]:
    """A sentence for each role whose model reads passages clearly better after another token than its prefix."""
    passages, models = Passages(experiment.corpora.passages[1]), experiment.models
    some = np.linspace(0, len(passages) - 1, min(TEXTS, len(passages))).astype(int)
    texts = [passages.text(passage) for passage in some.tolist()]
    store, device = experiment.workspace.store, experiment.workspace.device
    for name in names:
        if warning := prefix_warning(store, models.model(name), texts, dtype=models.dtype(name), device=device):
            yield warning


@dataclass(frozen=True)
class _AuditedRow:
    """The row whose loss is audited: whose stored predictions it is computed from, and how."""

    label: str
    sources: Sequence[str]
    """Roles, without the target."""
    requirements: LossRequirements
    switches: Switches
    fusion: FusionFunction | None = None


def _audited_row(config: Config, row: str | None) -> _AuditedRow:
    """Of the row, by default the first of FuseLLM."""
    if row is None:
        row = next((label for label, entry in config.methods.items() if entry["method"] == "fusellm"), None)
        if row is None:
            raise UserError(f"The experiment {config.experiment} has no FuseLLM row to audit: add one to methods.")
    if row not in config.methods:
        raise UnknownName("row", row, config.methods)
    entry, everyone = config.methods[row], list(config.roles.sources)
    if entry["method"] == "fusellm":
        fusellm = method_parameters(row, entry, FuseLLMParameters)
        fusion = fusellm.loss(fusellm.sources or everyone)
        return _AuditedRow(row, fusion.sources, fusion.requirements(TARGET), fusion.switches)
    if entry["method"] == "distillation":
        distillation = method_parameters(row, entry, DistillationParameters)
        loss = distillation.loss(distillation.teachers or everyone)
        if isinstance(loss, TopKDistillationLoss) and loss.temperature == 1:
            teachers = [name for name in loss.teachers if name != TARGET]
            requirements = replace(loss.requirements(TARGET), predictions=[TARGET, *teachers])
            return _AuditedRow(row, teachers, requirements, loss.switches(TARGET in loss.teachers), mean)
    raise UserError(
        f"There is no audit of {row}: choose a row of FuseLLM, or of distillation from stored predictions at "
        "temperature 1."
    )


def _inputs(
    experiment: Experiment, audited_row: _AuditedRow, at_most: int
) -> tuple[LossResources, dict[str, PredictionsReader], Passages]:
    """Vocabularies and maps, the stored predictions, and the passages that they are about: all of them where that is
    there already, else a sample.
    """
    # All stored entries, whatever k the row uses.
    requirements = replace(audited_row.requirements, k=None)
    store = experiment.workspace.store
    if not all(store.path(predictions_spec(experiment, name)).exists() for name in requirements.predictions):
        experiment = replace(experiment, corpora=experiment.corpora.sampled(at_most))
    return *loss_resources(experiment, "audit", requirements), Passages(experiment.corpora.passages[1])


def _sums(
    audited_row: _AuditedRow,
    at_most: int,
    resources: LossResources,
    readers: Mapping[str, PredictionsReader],
    passages: Passages,
) -> tuple[Sums, int]:
    """The sums over the passages that no model skipped, and the number of the other passages."""
    sources = [resources.source(name) for name in audited_row.sources]
    drawn = sample_of(len(passages), at_most)
    sums: Sums = defaultdict(lambda: defaultdict(float))
    skipped = 0
    with track("audit", len(drawn), "passages") as advance:
        for passage in drawn:
            predictions = {name: reader.predictions(passage) for name, reader in readers.items()}
            advance(1)
            if any(one.skipped for one in predictions.values()):
                skipped += 1
                continue
            size = int(passages.n_bytes[passage])
            gains = waterfall(
                predictions,
                size,
                target=TARGET,
                sources=sources,
                target_vocabulary=resources.vocabularies[TARGET],
                switches=audited_row.switches,
                k=audited_row.requirements.k,
                fusion=audited_row.fusion,
            )
            of_all = {
                "passages": 1,
                "bytes": size,
                "shared_bytes": gains.shared_bytes,
                "n_positions": gains.n_positions,
            }
            taken = sum(positions.get("chosen", 0) for positions in gains.positions.values())
            for name, stages in gains.nats.items():
                positions = gains.positions[name]
                values: dict[str, float] = {**of_all, **stages, **positions}
                if name != FUSED:
                    values["nats"] = float(predictions[name].nll.sum(dtype=np.float64))
                    values["share"] = positions["chosen"] / taken if taken else 0.0
                    ids = predictions[name].tokens[1:].tolist()
                    values["lost"] = lost_bytes(ids, readers[name].vocabulary, passages.text(passage).encode())
                for domain in (passages.domain(passage), OVERALL):
                    for measure, value in values.items():
                        sums[name, domain][measure] += value
    if not sums:
        raise UserError("There is no passage that all models have predicted, so there is nothing to audit.")
    return sums, skipped


def _by_domain(sums: Sums, precisions: Mapping[str, str], target: str) -> list[dict[str, Any]]:
    """The measures: one row a model and domain, those of all domains last.

    precisions: what each model computes in, in the order of the rows.
    """
    domains = sorted({domain for _, domain in sums} - {OVERALL})
    rows = []
    for name, precision in precisions.items():
        for domain in [*domains, OVERALL]:
            total = sums[name, domain]
            bits = total["bytes"] * math.log(2)
            row: dict[str, Any] = {
                "source": f"{target} (target)" if name == TARGET else name,
                "kind": name if name in (TARGET, FUSED) else "source",
                "domain": domain,
                "passages": int(total["passages"]),
                "bytes": int(total["bytes"]),
                "shared": _ratio(total, "shared_bytes", "bytes"),
                "lost": _ratio(total, "lost", "bytes"),
                # Text that is lost costs nothing, so that the quotient would be no measure of it.
                "bits_per_byte": total["nats"] / bits if "nats" in total and not total["lost"] else math.nan,
            }
            # Where a true next token is impossible there is no value.
            row |= {stage: total[stage] / bits if math.isfinite(total[stage]) else math.nan for stage in STAGES}
            row |= {
                "paired": _ratio(total, "paired", "n_positions"),
                "inside": _ratio(total, "inside", "n_positions"),
                "no_entry": _ratio(total, "no_entry", "paired"),
                "chosen": _ratio(total, "share", "passages"),
                "precision": precision,
            }
            rows.append(row)
    return rows


def _ratio(total: Mapping[str, float], part: str, whole: str) -> float:
    return total[part] / total[whole] if part in total and total[whole] else math.nan


def _learnt(run: Run) -> list[dict[str, Any]]:
    """Bits per byte by which each row that is no model as it is is ahead of the target and of the reference, by domain.

    They are of the documents of the suite perplexity that both have, as the mean over seeds. There is no value where
    the two lose different text.
    """
    records, document = run.records, ["method", "task", "example"]
    final = records[(records["suite"] == "perplexity") & records["tokens"].isna()]
    lost = final[final["metric"] == LOST_BYTES].groupby(document)["numerator"].mean().rename("lost")
    final = final[final["metric"].str.startswith("bits_per_byte")]
    by_document = final.groupby(document)[["numerator", "denominator"]].mean().join(lost).fillna({"lost": 0.0})
    measured = set(final["method"])
    others = {"ahead_of_target": run.roles.get("target"), "ahead_of_reference": run.reference}
    rows = list[dict[str, Any]]()
    for label, entry in run.methods.items():
        if entry["method"] == "as_is" or label not in measured:
            continue
        own = by_document.loc[label]
        for domain in [*sorted(own.index.unique("task")), OVERALL]:
            row: dict[str, Any] = {"source": label, "kind": "row", "domain": domain}
            row["precision"] = run.precision("perplexity")
            part = own if domain == OVERALL else own.xs(domain, level="task", drop_level=False)
            row["lost"] = float(part["lost"].sum() / part["denominator"].sum())
            bits_per_byte = float(part["numerator"].sum() / part["denominator"].sum() / math.log(2))
            row["bits_per_byte"] = math.nan if row["lost"] else bits_per_byte
            for column, other in others.items():
                if other in measured:
                    both = part.join(by_document.loc[other], rsuffix="_other", how="inner")
                    nats = (both["numerator_other"] - both["numerator"]).sum()
                    comparable = len(both) and (both["lost"] == both["lost_other"]).all()
                    row[column] = float(nats / both["denominator"].sum() / math.log(2)) if comparable else math.nan
            rows.append(row)
    return rows


def _sentence(measures: pd.DataFrame, audited_row: _AuditedRow, reference: str | None) -> str:
    """Sentences that say what there is to learn, how much of it reaches the loss and is learnt, and which step loses
    most: of the best model of each passage first, then of every source.
    """
    rows = [{str(key): value for key, value in row.items()} for row in measures.to_dict("records")]
    overall = {row["kind"] if row["kind"] == FUSED else row["source"]: row for row in rows if row["domain"] == OVERALL}
    learnt = {name: row["ahead_of_reference"] for name, row in overall.items() if row["kind"] == "row"}
    fused = overall[FUSED]
    if fused["native"] <= 0:
        sentences = ["No source reads any passage better than the target."]
    else:
        sentences = [
            f"Over all text the best model of each passage is ahead of the target by {fused['native']:.4f} bits per "
            f"byte{_way(fused, audited_row.label, learnt.get(audited_row.label, math.nan), reference)}."
        ]
    for name in audited_row.sources:
        better = [row for row in rows if row["source"] == name and row["domain"] != OVERALL and row["native"] > 0]
        if not better:
            sentences.append(f"{name} reads no domain better than the target.")
            continue
        size = sum(row["bytes"] for row in better)
        left = {stage: sum(row[stage] * row["bytes"] for row in better) / size for stage in STAGES}
        domains = ", ".join(row["domain"] for row in better)
        sentences.append(
            f"{name} reads {domains} better than the target by {left['native']:.4f} bits per byte{_way(left)}."
        )
    for name, row in overall.items():
        if row["lost"] > 0:
            sentences.append(
                f"The tokens of {name} do not spell {100 * row['lost']:.2g} % of the text's bytes. Lost text costs "
                "nothing, so that there are no bits per byte of it in domains with such text."
            )
    if math.isnan(fused["in_loss"]):
        sentences.append(
            f"Without a tail {audited_row.label} says that the true next token is impossible at "
            f"{fused['no_entry']:.1%} of its positions, so that what is left has no value."
        )
    precisions = " and ".join(sorted({row["precision"] for row in rows if row["kind"] != "row"}))
    sentences.append(
        f"Predictions are computed in {precisions}. Leads are in bits per byte, and higher is better; of "
        "bits_per_byte itself lower is better."
    )
    ahead = [f"{name} {value:+.4f}" for name, value in learnt.items() if name != reference and not math.isnan(value)]
    if ahead:
        sentences.append(f"On the suite's documents rows are ahead of {reference} by {', '.join(ahead)}.")
    return " ".join(sentences)


def _way(left: Mapping[str, float], label: str = "", learnt: float = math.nan, reference: str | None = None) -> str:
    """The clauses about what of it reaches the loss (of the row `label`) and is learnt, and the worst step."""
    steps = [(left[before] - left[stage], _STEPS[stage]) for before, stage in pairwise(STAGES)]
    clauses = ""
    if not math.isnan(left["in_loss"]):
        reaches = f"{left['in_loss']:.4f} reaches the loss"
        clauses = f"; {reaches} of {label}" if label else f", of which {reaches}"
        if not math.isnan(learnt) and label != reference:
            clauses += f", which has learnt {learnt:.4f} (its lead over {reference} on the suite's documents)"
            steps.append((left["in_loss"] - learnt, "the training"))
    if math.isnan(left["kept"]):
        return f"{clauses}; what loses most is {_STEPS['kept']}, without limit"
    lost, step = max(one for one in steps if not math.isnan(one[0]))  # in a mixture the last two are nobody's
    return clauses + (f"; what loses most is {step} ({lost:.4f})" if lost > 0 else "; no step loses any of it")


def _write(measures: pd.DataFrame, sentence: str, folder: Path, title: str, banner: str) -> None:
    from results.formats import plain_table

    columns = list(measures.columns)
    for form in ("md", "csv", "json"):
        rows = plain_rows(measures, None if form == "json" else 6)
        below = f"\n{sentence}\n" if form == "md" else ""
        write_atomically(folder / f"audit.{form}", plain_table(columns, rows, form) + below)
    write_atomically(folder / "audit.txt", sentence + "\n")
    for drawing in audited(measures, title, banner):
        drawing.draw(folder / drawing.name)
