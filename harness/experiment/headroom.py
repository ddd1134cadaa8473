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

from baselines.fusellm import FuseLLMParameters
from fusion.alignment.waterfall import FUSED, STAGES, waterfall
from fusion.errors import UserError
from fusion.losses.fusion_loss import FusionLoss
from harness.config.schema import Config
from harness.config.validation import method_parameters
from harness.data.passages import Passages
from harness.experiment.pipeline import TARGET, Experiment, loss_resources, open_experiment, start
from harness.experiment.run import run_folder
from harness.reporting.figures import audited
from harness.reporting.runs import Run, open_run
from harness.runtime.progress import track
from harness.stages.prefix_check import TEXTS, prefix_warning
from harness.store.files import write_atomically
from harness.store.paths import RUN_FILE, command_path

OVERALL = "all domains"
_STEPS = {
    "aligned": "positions without a partner",
    "projected": "map and projection",
    "kept": "top k and tail",
    "selected": "the selection among sources",
    "taught": "positions between partners",
}
Sums = defaultdict[tuple[str, str], defaultdict[str, float]]
"""By model and domain: sums over passages."""


@dataclass(frozen=True)
class Audit:
    """The measures of an audit, and sentences that sum them up."""

    measures: pd.DataFrame
    """One row a model and domain (see `results.figures.audit.audit_figure`)."""
    sentence: str
    folder: Path


def audit(config: Config, root: Path, passages: int = 2000) -> Audit:
    """Measures the sources on the training corpus; makes extractions and maps where they are missing.

    The sources, the map and the switches are those of the experiment's first FuseLLM row. Each passage is fused by
    itself, so that under `select_over: sequence` a selection can differ from the training's.

    Args:
        config: the experiment.
        root: where its artifacts and runs lie.
        passages: how many are measured, drawn from all by seed 0.

    Raises:
        UserError: the experiment has no FuseLLM row.
    """
    experiment = open_experiment(config, root)
    start(experiment)
    parameters = _fusellm(config)
    fusion = parameters.loss(parameters.sources or list(config.roles.sources))
    with experiment.workspace.store.in_use(command_path(root, config.experiment, config.profile, "audit")):
        sums, skipped = _sums(experiment, fusion, passages)
    run = run_folder(experiment, root)
    rows = _by_domain(sums, [TARGET, *fusion.sources, FUSED], experiment.models.model(TARGET).name)
    learnt = _learnt(open_run(run)) if (run / RUN_FILE).exists() else []
    names = {row["source"] for row in rows}
    for row in learnt:
        row["source"] += " (row)" if row["source"] in names else ""
    measures = pd.DataFrame([*rows, *learnt], columns=[*rows[0], "ahead_of_target", "ahead_of_reference"])
    sentence = _sentence(measures)
    if skipped:
        sentence += f" {skipped} passages are not counted: a model has no predictions of them (see its extraction)."
    for warning in _prefix_warnings(experiment, [TARGET, *fusion.sources]):
        sentence += f" {warning}"
    folder = run / "audit"
    folder.mkdir(parents=True, exist_ok=True)
    _write(measures, sentence, folder, config)
    return Audit(measures, sentence, folder)


def _prefix_warnings(experiment: Experiment, names: Sequence[str]) -> Iterator[str]:
    """A sentence for each role whose model reads passages clearly better after another token than its prefix."""
    passages, models = Passages(experiment.corpora.passages[1]), experiment.models
    some = np.linspace(0, len(passages) - 1, min(TEXTS, len(passages))).astype(int)
    texts = [passages.text(passage) for passage in some.tolist()]
    store, device = experiment.workspace.store, experiment.workspace.device
    for name in names:
        if warning := prefix_warning(store, models.model(name), texts, dtype=models.dtype(name), device=device):
            yield warning


def _fusellm(config: Config) -> FuseLLMParameters:
    for label, entry in config.methods.items():
        if entry["method"] == "fusellm":
            parameters = method_parameters(label, entry, FuseLLMParameters)
            assert isinstance(parameters, FuseLLMParameters)
            return parameters
    raise UserError(f"The experiment {config.experiment} has no FuseLLM row to audit: add one to methods.")


def _sums(experiment: Experiment, fusion: FusionLoss, at_most: int) -> tuple[Sums, int]:
    """The sums over the passages that no model skipped, and the number of the other passages."""
    requirements = fusion.requirements(TARGET)
    # All stored entries, whatever k the row uses.
    resources, readers = loss_resources(experiment, "audit", replace(requirements, k=None))
    sources = [resources.source(name) for name in fusion.sources]
    passages = Passages(experiment.corpora.passages[1])
    drawn = np.arange(len(passages))
    if at_most < len(passages):
        drawn = np.sort(np.random.default_rng(0).choice(len(passages), at_most, replace=False))
    sums: Sums = defaultdict(lambda: defaultdict(float))
    skipped = 0
    with track("audit", len(drawn), "passages") as advance:
        for passage in drawn.tolist():
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
                switches=fusion.switches,
                k=requirements.k,
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
                    values["nats"] = float(predictions[name].nats.sum(dtype=np.float64))
                    values["share"] = positions["chosen"] / taken if taken else 0.0
                for domain in (passages.domain(passage), OVERALL):
                    for measure, value in values.items():
                        sums[name, domain][measure] += value
    if not sums:
        raise UserError("There is no passage that all models have predicted, so there is nothing to audit.")
    return sums, skipped


def _by_domain(sums: Sums, order: Sequence[str], target: str) -> list[dict[str, Any]]:
    """The measures: one row a model and domain, those of all domains last."""
    domains = sorted({domain for _, domain in sums} - {OVERALL})
    rows = []
    for name in order:
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
                "bits_per_byte": total["nats"] / bits if "nats" in total else math.nan,
            }
            row |= {stage: total[stage] / bits if stage in total else math.nan for stage in STAGES}
            row |= {
                "paired": _ratio(total, "paired", "n_positions"),
                "inside": _ratio(total, "inside", "n_positions"),
                "no_entry": _ratio(total, "no_entry", "paired"),
                "chosen": _ratio(total, "share", "passages"),
            }
            rows.append(row)
    return rows


def _ratio(total: Mapping[str, float], part: str, whole: str) -> float:
    return total[part] / total[whole] if part in total and total[whole] else math.nan


def _learnt(run: Run) -> list[dict[str, Any]]:
    """Bits per byte by which each row that is no model as it is is ahead of the target and of the reference, by domain.

    They are of the documents of the suite perplexity that both have, as the mean over seeds.
    """
    records = run.records
    final = records[(records["suite"] == "perplexity") & records["tokens"].isna()]
    final = final[final["metric"].str.startswith("bits_per_byte")]
    by_document = final.groupby(["method", "task", "example"])[["numerator", "denominator"]].mean()
    measured = set(final["method"])
    others = {"ahead_of_target": run.roles.get("target"), "ahead_of_reference": run.reference}
    rows = list[dict[str, Any]]()
    for label, entry in run.methods.items():
        if entry["method"] == "as_is" or label not in measured:
            continue
        own = by_document.loc[label]
        for domain in [*sorted(own.index.unique("task")), OVERALL]:
            row: dict[str, Any] = {"source": label, "kind": "row", "domain": domain}
            part = own if domain == OVERALL else own.xs(domain, level="task", drop_level=False)
            row["bits_per_byte"] = float(part["numerator"].sum() / part["denominator"].sum() / math.log(2))
            for column, other in others.items():
                if other in measured:
                    both = part.join(by_document.loc[other], rsuffix="_other", how="inner")
                    nats = (both["numerator_other"] - both["numerator"]).sum()
                    row[column] = float(nats / both["denominator"].sum() / math.log(2)) if len(both) else math.nan
            rows.append(row)
    return rows


def _sentence(measures: pd.DataFrame) -> str:
    """Sentences that say of every source what it knows more, how much of it is taught, and which step loses most."""
    rows = [{str(key): value for key, value in row.items()} for row in measures.to_dict("records")]
    sentences = []
    for name in dict.fromkeys(row["source"] for row in rows if row["kind"] == "source"):
        better = [row for row in rows if row["source"] == name and row["domain"] != OVERALL and row["native"] > 0]
        if not better:
            sentences.append(f"{name} reads no domain better than the target.")
            continue
        size = sum(row["bytes"] for row in better)
        left = {stage: sum(row[stage] * row["bytes"] for row in better) / size for stage in STAGES}
        domains = ", ".join(row["domain"] for row in better)
        sentence = f"{name} reads {domains} better than the target by {left['native']:.4f} bits per byte"
        steps = [(left[before] - left[stage], _STEPS[stage]) for before, stage in pairwise(STAGES)]
        lost, step = max(one for one in steps if not math.isnan(one[0]))  # in a mixture the last two are nobody's
        if not math.isnan(left["taught"]):
            sentence += f", of which {left['taught']:.4f} is taught"
        sentence += f"; what loses most is {step} ({lost:.4f})" if lost > 0 else "; no step loses any of it"
        sentences.append(sentence + ".")
    (fused,) = (row for row in rows if row["kind"] == FUSED and row["domain"] == OVERALL)
    gain = fused["taught"]
    sentences.append(
        f"Over all text the fused distribution is ahead of the target by {gain:.4f} bits per byte, which is what there "
        "is to learn."
        if gain > 0
        else f"Over all text the fused distribution is behind the target ({gain:.4f} bits per byte): there is nothing "
        "to learn."
    )
    learnt = [row for row in rows if row["kind"] == "row" and row["domain"] == OVERALL]
    ahead = [
        f"{row['source']} {row['ahead_of_reference']:+.4f}" for row in learnt if abs(row["ahead_of_reference"]) > 0
    ]
    if ahead:
        sentences.append(f"On other text, that of the suite, rows are ahead of the reference by {', '.join(ahead)}.")
    return " ".join(sentences)


def _write(measures: pd.DataFrame, sentence: str, folder: Path, config: Config) -> None:
    from results.formats import plain_table

    columns, rows = list(measures.columns), measures.values.tolist()
    for form in ("md", "csv", "json"):
        write_atomically(folder / f"audit.{form}", plain_table(columns, rows, form))
    write_atomically(folder / "audit.txt", sentence + "\n")
    for drawing in audited(measures, config.title, config.banner or ""):
        drawing.draw(folder / drawing.name)
