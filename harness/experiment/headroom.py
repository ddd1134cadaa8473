"""The audit: how much the sources could improve the target, measured before any training.

At every target position that a source is paired with, three probabilities of the true next token are compared: that of
the source's own next token under the source (native), that of the target's next token under the source's distribution
projected onto the target's vocabulary (mapped), and that of the target's next token under the target itself. Where the
second does not exceed the third, fusion cannot improve the target, however good the source is.

The bucket log-likelihood treats every distribution as it is stored, k entries and the mass of the tail, and spreads the
tail's mass evenly over the rest of the vocabulary. Without this a less certain distribution would look better: the true
token is in its tail more often, and a large tail is an outcome that is easily right.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from baselines.fusellm import FuseLLMParameters
from fusion.alignment.fuse import UNPAIRED, fuse_sequence
from fusion.errors import UserError
from fusion.losses.fusion_loss import FusionLoss
from fusion.types import Predictions, Sparse
from harness.config.schema import Config
from harness.config.validation import method_parameters
from harness.data.passages import Passages
from harness.experiment.pipeline import TARGET, Experiment, loss_resources, open_experiment, start
from harness.experiment.run import run_folder
from harness.reporting.figures import audited
from harness.runtime.progress import track
from harness.stages.prefix_check import TEXTS, prefix_warning
from harness.store.files import write_atomically
from harness.store.paths import command_path

LEAST_TAIL = 1e-6  # a tail is stored in float16; below this it is rounding and its logarithm means nothing
OVERALL = "all domains"
CHOSEN = "fused"
_MEANS = ("p_next_native", "p_next_mapped", "p_next_target", "bucket_ll_native", "bucket_ll_mapped", "bucket_ll_target")


@dataclass(frozen=True)
class Audit:
    """The measures of an audit, and a sentence that sums them up."""

    measures: pd.DataFrame
    """One row a source and domain (see `results.figures.audit.audit_figure`)."""
    sentence: str
    folder: Path


def audit(config: Config, root: Path) -> Audit:
    """Measures the sources on the training corpus; makes extractions and maps where they are missing.

    The sources, the map and the switches are those of the experiment's first FuseLLM row. Each passage is fused by
    itself, so that under `select_over: sequence` a selection can differ from the training's. Raises UserError where the
    experiment has no FuseLLM row.
    """
    experiment = open_experiment(config, root)
    start(experiment)
    parameters = _fusellm(config)
    fusion = parameters.loss(parameters.sources or list(config.roles.sources))
    with experiment.workspace.store.in_use(command_path(root, config.experiment, config.profile, "audit")):
        measures, skipped = _measures(experiment, fusion)
    sentence = _sentence(measures)
    if skipped:
        sentence += f" {skipped} passages are not counted: a model has no predictions of them (see its extraction)."
    for warning in _prefix_warnings(experiment, [TARGET, *fusion.sources]):
        sentence += f" {warning}"
    folder = run_folder(experiment, root) / "audit"
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


def _measures(experiment: Experiment, fusion: FusionLoss) -> tuple[pd.DataFrame, int]:
    """The measures over the passages that no model skipped, and the number of the other passages."""
    resources, readers = loss_resources(experiment, "audit", fusion.requirements(TARGET))
    sources = [resources.source(name) for name in fusion.sources]
    passages = Passages(experiment.corpora.passages[1])
    target_vocabulary = experiment.models.tokenizer(TARGET)[1]
    sizes = {name: len(reader.vocabulary) for name, reader in readers.items()}
    single_source = replace(fusion.switches, include_target=False, tail="bucket", fusion="mince", unmapped="tail")
    rows: list[dict[str, Any]] = []
    skipped = 0
    with track("audit", len(passages), "passages") as advance:
        for passage in range(len(passages)):
            predictions_of = {name: reader.predictions(passage) for name, reader in readers.items()}
            advance(1)
            if any(predictions.skipped for predictions in predictions_of.values()):
                skipped += 1
                continue
            size, domain = int(passages.n_bytes[passage]), passages.domain(passage)

            def fuse(sources: list[Any], switches: Any, predictions_of: Any = predictions_of, size: int = size) -> Any:
                return fuse_sequence(
                    [predictions_of],
                    [size],
                    target=TARGET,
                    sources=sources,
                    target_vocabulary=target_vocabulary,
                    switches=switches,
                )

            fused = fuse(sources, fusion.switches)
            own = predictions_of[TARGET]
            for source in [None, *sources]:
                name = TARGET if source is None else source.name
                predictions = predictions_of[name]
                row: dict[str, Any] = {"source": name, "domain": domain, "bytes": size, "passages": 1}
                row["nats"] = float(predictions.nats.sum(dtype=np.float64))
                row["positions"] = len(own.nats) - 1
                row["chosen"] = _selected_fraction(fused, name)
                if source is None:
                    at = np.arange(len(own.nats) - 1)
                    projected = Sparse(own.ids, np.exp(own.log_p), own.tail)
                    partner = at
                else:
                    single = fuse([source], single_source)
                    projected = single.targets
                    at = np.flatnonzero(single.paired[0][:-1])
                    partner = single.partner[0][at]
                row["paired"] = len(at)
                row |= _sums(predictions, own, projected, at, partner, (sizes[name], sizes[TARGET]))
                rows.append(row)
            rows.append(_fused_row(fused, own, {"domain": domain, "bytes": size, "passages": 1}, sizes[TARGET]))
    names = [TARGET, *(s.name for s in sources), CHOSEN]
    return _by_domain(pd.DataFrame(rows), names, experiment.models.model(TARGET).name), skipped


def _fused_row(fused: Any, own: Predictions, row: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """The row of the distribution that the loss trains on, at the positions where it comes from a source."""
    at = np.flatnonzero(fused.chosen[:-1] != UNPAIRED)
    # It is no model's own prediction, so it has no native positions.
    sums = _sums(own, own, fused.targets, at, np.full(len(at), len(own.nats) - 1), (vocabulary, vocabulary))
    whole = {"source": CHOSEN, "nats": np.nan, "positions": len(own.nats) - 1, "paired": len(at), "chosen": 1.0}
    return row | whole | sums


def _selected_fraction(fused: Any, name: str) -> float:
    """The fraction of the passages (here one) for which the predictions of `name` were selected."""
    chosen = fused.chosen[fused.chosen >= 0]
    if name not in fused.names or not len(chosen):
        return 0.0
    return float((chosen == fused.names.index(name)).mean())


def _bucket(p: np.ndarray, tail: np.ndarray, rest: np.ndarray | int) -> np.ndarray:
    """Log-likelihood (nats) of the next token: of its entry, or of its part of the tail, which `rest` tokens share."""
    return np.log(np.where(p > 0, p, np.maximum(tail, LEAST_TAIL) / rest).astype(np.float64))


def _native(predictions: Predictions, at: np.ndarray, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """p(next token) and bucket log-likelihood of predictions at positions that have a next token."""
    p = np.exp(-predictions.nats[at].astype(np.float64))
    listed = (predictions.ids[at] == predictions.tokens[at + 1][:, None]).any(1)
    return p, _bucket(np.where(listed, p, 0), predictions.tail[at], vocabulary - predictions.ids.shape[1])


def _sums(
    predictions: Predictions,
    own: Predictions,
    projected: Sparse,
    at: np.ndarray,
    partner: np.ndarray,
    vocabularies: tuple[int, int],
) -> dict[str, float]:
    # A source position at its own end of text has no next token to compare with.
    has_next = partner < len(predictions.nats) - 1
    p_native, ll_native = _native(predictions, partner[has_next], vocabularies[0])
    p_target, ll_target = _native(own, at, vocabularies[1])
    gold = own.tokens[at + 1]
    hit = projected.ids[at] == gold[:, None]
    p_mapped = np.where(hit, projected.p[at], 0).sum(1, dtype=np.float64)
    columns = {
        "p_next_native": p_native,
        "p_next_mapped": p_mapped,
        "p_next_target": p_target,
        "bucket_ll_native": ll_native,
        "bucket_ll_mapped": _bucket(p_mapped, projected.tail[at], vocabularies[1] - (projected.ids[at] >= 0).sum(1)),
        "bucket_ll_target": ll_target,
    }
    return {name: float(values.sum()) for name, values in columns.items()} | {"native_positions": int(has_next.sum())}


def _by_domain(rows: pd.DataFrame, order: list[str], target: str) -> pd.DataFrame:
    def combined() -> Iterator[dict[str, Any]]:
        everything = rows.assign(domain=OVERALL)
        for name in order:
            for domain in [*sorted(rows["domain"].unique()), OVERALL]:
                part = everything if domain == OVERALL else rows
                part = part[(part["source"] == name) & (part["domain"] == domain)]
                total = part.sum(numeric_only=True)
                row: dict[str, Any] = {
                    "source": f"{target} (target)" if name == TARGET else name,
                    "domain": domain,
                    "passages": int(total["passages"]),
                    "nats_per_byte": total["nats"] / total["bytes"] if name != CHOSEN else np.nan,
                    "paired": total["paired"] / total["positions"] if total["positions"] else np.nan,
                    "chosen": total["chosen"] / total["passages"],
                }
                for measure in _MEANS:
                    n = total["native_positions"] if measure.endswith("native") else total["paired"]
                    row[measure] = total[measure] / n if n else np.nan
                yield row

    return pd.DataFrame(list(combined()))


def _sentence(measures: pd.DataFrame) -> str:
    """A sentence about which sources exceed the target after their mass is projected onto its vocabulary."""
    rows = [{str(k): v for k, v in row.items()} for row in measures.to_dict("records")]
    *sources, fused = [row for row in rows if row["domain"] == OVERALL][1:]
    parts = []
    for row in sources:
        ahead = [
            other["domain"]
            for other in rows
            if other["source"] == row["source"] and other["domain"] != OVERALL and _gain(other) > 0
        ]
        parts.append(
            f"{row['source']} gives the true next token {row['p_next_native']:.3f} natively and "
            f"{row['p_next_mapped']:.3f} after the map (the target itself {row['p_next_target']:.3f}), by bucket "
            f"log-likelihood it is ahead of the target in {', '.join(ahead) or 'no domain'}, and it is chosen for "
            f"{row['chosen']:.0%} of the passages"
        )
    gain = _gain(fused)
    verdict = (
        f"the fused distribution is ahead of the target by {gain:.3f} nats a position, which is what there is to learn"
        if gain > 0
        else f"the fused distribution is behind the target ({gain:.3f} nats a position): there is nothing to learn"
    )
    return f"{'; '.join(parts)}: {verdict} ({fused['p_next_mapped']:.3f} against {fused['p_next_target']:.3f})."


def _gain(row: dict[str, Any]) -> float:
    """Nats a position by which the projected source exceeds the target, in bucket log-likelihood."""
    return float(row["bucket_ll_mapped"] - row["bucket_ll_target"])


def _write(measures: pd.DataFrame, sentence: str, folder: Path, config: Config) -> None:
    from results.formats import plain_table

    columns, rows = list(measures.columns), measures.values.tolist()
    for form in ("md", "csv", "json"):
        write_atomically(folder / f"audit.{form}", plain_table(columns, rows, form))
    write_atomically(folder / "audit.txt", sentence + "\n")
    for drawing in audited(measures, config.title, config.banner or ""):
        drawing.draw(folder / drawing.name)
