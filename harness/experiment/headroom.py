"""Before anyone pays for training: is there something to learn from the sources?

At every target position that a source is paired with, three predictions of the same text are set side by side: the
source's own next token under the source (native), the target's next token under what the map makes of the source's
distribution, and the target's next token under the target itself. If the second does not beat the third, fusion has
nothing to teach there, whatever the source knows.

The bucket log-likelihood takes every distribution as what is stored of it, k entries and the mass of the rest, and
spreads that mass evenly over the rest of the vocabulary. Without the spreading a distribution that knows less would
look better: the true token falls into its tail more often, and a large tail is an easy outcome to be right about.
"""

from collections.abc import Iterator
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
from harness.store.files import write_atomically

LEAST_TAIL = 1e-6  # a tail is stored in float16; below this it is rounding and its logarithm means nothing
OVERALL = "all domains"
CHOSEN = "fused"
_MEANS = ("p_next_native", "p_next_mapped", "p_next_target", "bucket_ll_native", "bucket_ll_mapped", "bucket_ll_target")


@dataclass(frozen=True)
class Audit:
    """One row a source and domain (see `results.figures.audit.audit_figure`), and what they mean in a sentence."""

    measures: pd.DataFrame
    sentence: str
    folder: Path


def audit(config: Config, root: Path) -> Audit:
    """Measures the sources on the training corpus; makes extractions and maps where they are missing.

    The sources, the map and the switches are those of the experiment's first FuseLLM row; passages are looked at one by
    one, so that under `level: row` a choice can differ from the training's. Raises UserError when it has none.
    """
    experiment = open_experiment(config, root)
    start(experiment)
    parameters = _fusellm(config)
    fusion = parameters.loss(parameters.sources or list(config.roles.sources))
    measures, skipped = _measures(experiment, fusion)
    sentence = _sentence(measures)
    if skipped:
        sentence += f" {skipped} passages are not counted: the logits of a model about them are not finite."
    folder = run_folder(experiment, root) / "audit"
    folder.mkdir(parents=True, exist_ok=True)
    _write(measures, sentence, folder, config)
    return Audit(measures, sentence, folder)


def _fusellm(config: Config) -> FuseLLMParameters:
    for label, entry in config.methods.items():
        if entry["method"] == "fusellm":
            found = method_parameters(label, entry, FuseLLMParameters)
            assert isinstance(found, FuseLLMParameters)
            return found
    raise UserError(f"The experiment {config.experiment} has no FuseLLM row to audit: add one to methods.")


def _measures(experiment: Experiment, fusion: FusionLoss) -> tuple[pd.DataFrame, int]:
    """The measures over the passages that all models could read, and how many the others are."""
    resources, readers = loss_resources(experiment, "audit", fusion.requirements(TARGET))
    sources = [resources.source(name) for name in fusion.sources]
    passages = Passages(experiment.corpora.passages[1])
    target_vocabulary = experiment.models.tokenizer(TARGET)[1]
    sizes = {name: len(reader.vocabulary) for name, reader in readers.items()}
    alone = replace(fusion.switches, include_target=False, tail="bucket", fusion="mince", unmapped="tail")
    rows: list[dict[str, Any]] = []
    skipped = 0
    with track("audit", len(passages), "passages") as advance:
        for passage in range(len(passages)):
            readings = {name: reader.predictions(passage) for name, reader in readers.items()}
            advance(1)
            if any(predictions.skipped for predictions in readings.values()):
                skipped += 1
                continue
            size, domain = int(passages.n_bytes[passage]), passages.domain(passage)

            def fuse(sources: list[Any], switches: Any, readings: Any = readings, size: int = size) -> Any:
                return fuse_sequence(
                    [readings],
                    [size],
                    target=TARGET,
                    sources=sources,
                    target_vocabulary=target_vocabulary,
                    switches=switches,
                )

            together = fuse(sources, fusion.switches)
            own = readings[TARGET]
            for source in [None, *sources]:
                name = TARGET if source is None else source.name
                predictions = readings[name]
                row: dict[str, Any] = {"source": name, "domain": domain, "bytes": size, "passages": 1}
                row["nats"] = float(predictions.nats.sum(dtype=np.float64))
                row["positions"] = len(own.nats) - 1
                row["chosen"] = _share_chosen(together, name)
                if source is None:
                    at = np.arange(len(own.nats) - 1)
                    carried = Sparse(own.ids, np.exp(own.log_p), own.tail)
                    partner = at
                else:
                    single = fuse([source], alone)
                    carried = single.targets
                    at = np.flatnonzero(single.paired[0][:-1])
                    partner = single.partner[0][at]
                row["paired"] = len(at)
                row |= _sums(predictions, own, carried, at, partner, (sizes[name], sizes[TARGET]))
                rows.append(row)
            rows.append(_chosen(together, own, {"domain": domain, "bytes": size, "passages": 1}, sizes[TARGET]))
    names = [TARGET, *(s.name for s in sources), CHOSEN]
    return _by_domain(pd.DataFrame(rows), names, experiment.models.model(TARGET).name), skipped


def _chosen(fused: Any, own: Predictions, row: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """The row of what the target is really taught: the fused distribution, wherever it is one of the sources'."""
    at = np.flatnonzero(fused.chosen[:-1] != UNPAIRED)
    # Nobody's own reading is behind it, so nothing is native.
    sums = _sums(own, own, fused.targets, at, np.full(len(at), len(own.nats) - 1), (vocabulary, vocabulary))
    whole = {"source": CHOSEN, "nats": np.nan, "positions": len(own.nats) - 1, "paired": len(at), "chosen": 1.0}
    return row | whole | sums


def _share_chosen(fused: Any, name: str) -> float:
    chosen = fused.chosen[fused.chosen >= 0]
    if name not in fused.names or not len(chosen):
        return 0.0
    return float((chosen == fused.names.index(name)).mean())


def _bucket(p: np.ndarray, tail: np.ndarray, rest: np.ndarray | int) -> np.ndarray:
    """Log-likelihood (nats) of the next token: that of its entry, or of its share of the tail over `rest` tokens."""
    return np.log(np.where(p > 0, p, np.maximum(tail, LEAST_TAIL) / rest).astype(np.float64))


def _native(predictions: Predictions, at: np.ndarray, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """p(next token) and bucket log-likelihood of a reading at positions that have a next token."""
    p = np.exp(-predictions.nats[at].astype(np.float64))
    listed = (predictions.ids[at] == predictions.tokens[at + 1][:, None]).any(1)
    return p, _bucket(np.where(listed, p, 0), predictions.tail[at], vocabulary - predictions.ids.shape[1])


def _sums(
    predictions: Predictions,
    own: Predictions,
    carried: Sparse,
    at: np.ndarray,
    partner: np.ndarray,
    vocabularies: tuple[int, int],
) -> dict[str, float]:
    # A source position at its own end of text has no next token to compare with.
    has_next = partner < len(predictions.nats) - 1
    p_native, ll_native = _native(predictions, partner[has_next], vocabularies[0])
    p_target, ll_target = _native(own, at, vocabularies[1])
    gold = own.tokens[at + 1]
    hit = carried.ids[at] == gold[:, None]
    p_mapped = np.where(hit, carried.p[at], 0).sum(1, dtype=np.float64)
    columns = {
        "p_next_native": p_native,
        "p_next_mapped": p_mapped,
        "p_next_target": p_target,
        "bucket_ll_native": ll_native,
        "bucket_ll_mapped": _bucket(p_mapped, carried.tail[at], vocabularies[1] - (carried.ids[at] >= 0).sum(1)),
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
    """What the numbers mean: which sources still know more than the target once their mass is carried over."""
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
    """By how many nats a position the carried source beats the target, in bucket log-likelihood."""
    return float(row["bucket_ll_mapped"] - row["bucket_ll_target"])


def _write(measures: pd.DataFrame, sentence: str, folder: Path, config: Config) -> None:
    from results.formats import plain_table

    columns, rows = list(measures.columns), measures.values.tolist()
    for form in ("md", "csv", "json"):
        write_atomically(folder / f"audit.{form}", plain_table(columns, rows, form))
    write_atomically(folder / "audit.txt", sentence + "\n")
    for drawing in audited(measures, config.title, config.banner or ""):
        drawing.draw(folder / drawing.name)
