"""The suite perplexity: nats and bytes of whole documents, from which bits per byte follow."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from baselines.method import Artifact
from fusion.errors import NotFinite, UserError
from fusion.inference.windows import window_stride, windows
from fusion.modeling.context import context_length
from harness.config.schema import CorpusConfig
from harness.data import corpus
from harness.data.corpus import Document
from harness.evaluation.evaluated_model import EvaluatedModel
from harness.evaluation.suite import NO_VOTE, SUITES, Example, Suite, SuiteConfig, SuiteResult
from harness.runtime.memory import device_memory
from harness.runtime.progress import track
from harness.stages.training_log import read_curve
from harness.store.artifacts import Spec, Store
from harness.store.costs import Costs
from harness.store.files import read_json, write_json
from harness.store.fingerprint import fingerprint
from harness.store.leases import Leases
from results.metrics import LOST_BYTES

if TYPE_CHECKING:
    from torch import nn

    from fusion.inference.ensembles import PrefixCachedEnsemble
    from fusion.vocabulary.token_bytes import Vocabulary

VERSION = 4
ROLLING_NOTE = (
    "Bits per byte are lm-eval's rolling ones: of a document beyond {window:,} tokens only the first window begins "
    "with the model's prefix token, which costs models that need it (suites.perplexity.mode=strided has it in every "
    "window)."
)
METRICS = {"rolling": "bits_per_byte", "strided": "bits_per_byte_strided"}
UNREAD_NOTE = (
    "{label} did not read documents, and these count for no row, of which a window of {window:,} tokens does not fit "
    "the context of a member with another tokenizer (suites.perplexity.window may be lowered): {counts}."
)
_PART = 32  # documents measured between two savings


class PerplexityConfig(SuiteConfig):
    """Bits per byte of whole held-out documents."""

    documents: CorpusConfig = Field(description="held-out text; no document of it may be in a training corpus")
    window: int = Field(2048, gt=1, description="length of the text that a model reads at once (tokens)")
    mode: Literal["rolling", "strided"] = Field(
        "rolling", description="rolling: adjacent windows; strided: overlapping windows, each token with more context"
    )
    stride: int | None = Field(
        None, gt=0, description="strided: distance of two windows (tokens). Default: half the window"
    )
    dtype: Literal["float32", "bfloat16", "float16", "role"] = Field(
        "float32", description="computing precision, the same for every row; role: that of each row's own model"
    )

    def key(self) -> dict[str, Any]:
        """How documents are measured, as the key of what is measured holds it."""
        return {"window": self.window, "mode": self.mode, "stride": window_stride(self.mode, self.window, self.stride)}


@dataclass(frozen=True)
class HeldOutText:
    """Documents and their size; in a plan that need not fetch the text, no documents and the expected size."""

    documents: Sequence[Document]
    n_bytes: float

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the documents as they are measured: identity, domain and the text that was taken."""
        return fingerprint([[d.sha256, d.domain, d.text] for d in self.documents])


@SUITES.register("perplexity", parameters=PerplexityConfig)
class Perplexity(Suite):
    """Nats and bytes of every held-out document; its tasks are the documents' domains."""

    name = "perplexity"
    in_parts: ClassVar[bool] = True

    def __init__(self, config: PerplexityConfig, data_root: Path | None) -> None:
        self.config = config
        self._data_root = data_root

    @classmethod
    def standalone_config(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration of `fusellm eval`: the documents and the window of the profile `small`.

        The option `limit` is the number of documents a domain.
        """
        documents: dict[str, Any] = {
            "path": "corpora/mixed",
            "split": "test",
            "name_column": "name",
            "domain_column": "source",
            "first_bytes": 1000,
            "per_domain": options.get("limit") or 40,
        }
        return {"documents": documents, "window": 1024}

    @cached_property
    def documents(self) -> list[Document]:
        """The documents that are measured."""
        return list(corpus.documents(self.config.documents, self._data_root))

    def text(self, *, dry: bool = False, per_domain: int | None = None) -> HeldOutText:
        """The documents, or the first `per_domain` of each domain. With `dry`, text on the hub is not fetched where its
        size is configured.
        """
        expected = self.config.documents.expected_bytes
        if dry and expected and corpus.is_on_hub(self.config.documents, self._data_root):
            # About 4 kB a document, of one domain at least.
            return HeldOutText([], float(expected) if per_domain is None else min(expected, 4000.0 * per_domain))
        documents = self.documents
        if per_domain is not None:
            by_domain: dict[str, list[Document]] = {}
            for document in documents:
                by_domain.setdefault(document.domain, []).append(document)
            documents = [document for domain in by_domain.values() for document in domain[:per_domain]]
        return HeldOutText(documents, float(sum(len(document.text.encode()) for document in documents)))

    def key(self, text: HeldOutText) -> dict[str, Any]:
        """What the nats of a text depend on beside the model: the text, how it is measured, and by which version."""
        dtype = self.config.dtype
        return {"version": VERSION, "documents": text.fingerprint, "dtype": dtype, **self.config.key()}

    def task_metrics(self) -> dict[str, str]:
        return dict.fromkeys(sorted({document.domain for document in self.documents}), METRICS[self.config.mode])

    def identity(self) -> dict[str, Any]:
        return {"version": VERSION, "documents": self.text().fingerprint}

    def measure(self, evaluated: EvaluatedModel, store: Store, costs: Costs) -> SuiteResult:
        text = self.text(dry=store.dry)
        if evaluated.votes:
            domains = {document.domain for document in text.documents}
            return SuiteResult(lambda: iter(()), missing=dict.fromkeys(sorted(domains), NO_VOTE))
        measured = evaluated if self.config.dtype == "role" else evaluated.in_dtype(self.config.dtype)
        spec = evaluation_spec(measured, text, self.config)

        def make_parts(folder: Path, leases: Leases) -> None:
            if measured is not evaluated:
                evaluated.release()  # lest the model be in memory twice
            members = [(member.parameters, member.dtype) for member, _ in measured.members]
            refuse_too_large(measured.label, members, measured.device)
            evaluate(folder, leases, measured, text.documents, self.config)
            if measured is not evaluated:
                measured.release()

        estimate = costs.forward(evaluated.parameters, text.n_bytes)
        path = store.ensure(spec, lambda folder: None, estimate, make_parts=make_parts)
        notes = []
        rows = [] if store.deferred else read_evaluation(path)
        if self.config.mode == "rolling" and any(row["windows"] > 1 for row in rows):
            notes.append(ROLLING_NOTE.format(window=self.config.window))
        sizes, unread = Counter(row["domain"] for row in rows), dict[str, list[str]]()
        for row in rows:
            if row["nats"] is None:
                unread.setdefault(row["domain"], []).append(row["example"])
        if unread:
            counts = ", ".join(f"{domain} {len(some):,} of {sizes[domain]:,}" for domain, some in unread.items())
            notes.append(UNREAD_NOTE.format(label=evaluated.label, window=self.config.window, counts=counts))
        none = {domain for domain, some in unread.items() if len(some) == sizes[domain]}
        return SuiteResult(
            lambda: self._examples(read_evaluation(path)),
            {self.name: path},
            {self.name: spec.fingerprint},
            missing=dict.fromkeys(sorted(none), "none of its documents can be read"),
            dtype=measured.dtype,
            notes=notes,
            skipped={domain: some for domain, some in unread.items() if domain not in none},
        )

    def check_context(self, label: str, context: int) -> None:
        if self.config.window > context:
            raise UserError(
                f"suites.perplexity.window = {self.config.window} exceeds the context of {label}, {context}: lower it."
            )

    def check_memory(self, label: str, members: Sequence[tuple[float, str]], device: str) -> None:
        own = self.config.dtype
        refuse_too_large(label, members if own == "role" else [(size, own) for size, _ in members], device)

    def with_curve(self, result: SuiteResult, curve: Artifact) -> SuiteResult:
        """A trained candidate's result and the measurements of its training, with the tokens trained on before each."""

        def examples() -> Iterator[Example]:
            yield from result.examples()
            for point in read_curve(curve.folder):
                yield from self._examples(point["records"], int(point["tokens"]))

        return replace(
            result,
            examples=examples,
            artifacts={**result.artifacts, "curve": curve.folder},
            fingerprints={**result.fingerprints, "curve": curve.fingerprint},
        )

    def _examples(self, rows: Sequence[Mapping[str, Any]], tokens: int | None = None) -> Iterator[Example]:
        metric, clusters = METRICS[self.config.mode], self._clusters
        for row in rows:
            if row["nats"] is None:
                continue
            example, cluster = row["example"], clusters.get(row["example"], "")
            yield Example(row["domain"], example, metric, row["nats"], row["bytes"], tokens, cluster)
            if row["lost"]:
                yield Example(row["domain"], example, LOST_BYTES, row["lost"], row["bytes"], tokens, cluster)

    @cached_property
    def _clusters(self) -> dict[str, str]:
        """By SHA-256 of a document the name of the text of which it and others are parts.

        Documents of one domain and name are parts of one text.
        """
        names = {one.sha256: f"{one.domain}/{one.name}" for one in self.documents if one.name}
        times = Counter(names.values())
        return {sha256: name for sha256, name in names.items() if times[name] > 1}


def refuse_too_large(label: str, members: Sequence[tuple[float, str]], device: str) -> None:
    """Raises UserError where the weights alone exceed the memory of the device.

    members: parameters and precision of each model that is in memory at one time.
    """
    needed = sum(parameters * (4 if dtype == "float32" else 2) for parameters, dtype in members)
    memory, dtypes = device_memory(device), sorted({dtype for _, dtype in members})
    if needed > memory:
        lower = "set suites.perplexity.dtype to bfloat16, or to role" if "float32" in dtypes else "leave it out"
        raise UserError(
            f"{label} has {needed / 1e9:.1f} GB of weights in {' and '.join(dtypes)}, in which perplexity is computed, "
            f"and {device} has {memory / 1e9:.1f} GB of memory: {lower}."
        )


def evaluation_spec(evaluated: EvaluatedModel, text: HeldOutText, config: PerplexityConfig) -> Spec:
    """The key of a candidate's nats on the text."""
    return Spec(
        "perplexity",
        evaluated.label,
        VERSION,
        {"model": evaluated.fingerprint, "documents": text.fingerprint},
        {**config.key(), **evaluated.computing, **evaluated.spec.prefix_identity()},
        {"batch_tokens": evaluated.batch_tokens},
    )


def measure_documents(
    model: "nn.Module | PrefixCachedEnsemble",
    tokenizer: Any,
    documents: Sequence[Document],
    config: PerplexityConfig,
    *,
    batch_tokens: int,
    prefix: str | None = None,
) -> list[dict[str, Any]]:
    """One row a document: example (SHA-256), domain, nats, bytes, the windows that it was read in, and the bytes that
    its tokens do not spell.

    `prefix` is read before each document (see `prefix_id`). The nats are None where an ensemble cannot read a window of
    the document (see `unreadable`). Raises UserError for a stride that does not fit, NotFinite for logits that are not.
    """
    from fusion.inference.likelihood import document_nats, unreadable
    from fusion.vocabulary.tokenization import encode_all, lost_bytes, prefix_id

    tokens = encode_all(tokenizer, [document.text for document in documents])
    before = prefix_id(tokenizer, prefix)
    try:
        skipped = unreadable(model, tokens, prefix=before, window=config.window, mode=config.mode, stride=config.stride)
        nats = document_nats(
            model,
            [[] if n in skipped else ids for n, ids in enumerate(tokens)],
            prefix=before,
            window=config.window,
            mode=config.mode,
            stride=config.stride,
            batch_tokens=batch_tokens,
        )
    except UserError as error:
        names = ", ".join(document.name for document in documents[:3])
        kind = NotFinite if isinstance(error, NotFinite) else UserError
        raise kind(f"perplexity of {names} ...: {error}") from None
    vocabulary, stride = _vocabulary(tokenizer), window_stride(config.mode, config.window, config.stride)
    return [
        {
            "example": d.sha256,
            "domain": d.domain,
            "nats": None if i in skipped else float(n),
            "bytes": len(raw := d.text.encode("utf-8")),
            "windows": len(windows(len(ids), window=config.window, stride=stride)),
            "lost": lost_bytes(ids, vocabulary, raw),
        }
        for i, (d, ids, n) in enumerate(zip(documents, tokens, nats, strict=True))
    ]


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Any) -> "Vocabulary":
    from fusion.vocabulary.token_bytes import Vocabulary

    return Vocabulary.from_tokenizer(tokenizer)


def evaluate(
    folder: Path, leases: Leases, evaluated: EvaluatedModel, documents: Sequence[Document], config: PerplexityConfig
) -> None:
    """Measures the documents in parts, those that no other process measures; finished parts are kept.

    Raises UserError for a window that exceeds the model's context, and where a finished part is damaged.
    """
    import torch

    parts = [documents[start : start + _PART] for start in range(0, len(documents), _PART)]
    paths = [folder / f"part-{number:05d}.json" for number in range(len(parts))]
    sizes = [sum(len(document.text.encode("utf-8")) for document in part) for part in parts]
    done = 0
    for path, size in zip(paths, sizes, strict=True):
        if path.exists():
            read_json(path, "remove that file to have it made again")
            done += size

    def measure(number: int) -> bool:
        context = _context(evaluated.predictor)
        if context and config.window > context:
            raise UserError(
                f"perplexity window {config.window} exceeds the context of {evaluated.label}, {context}: lower it."
            )
        with torch.inference_mode():
            rows = measure_documents(
                evaluated.predictor,
                evaluated.tokenizer,
                parts[number],
                config,
                batch_tokens=evaluated.batch_tokens,
                prefix=evaluated.spec.prefix,
            )
        write_json(paths[number], {"rows": rows})
        advance(sizes[number])
        return True

    with track(f"perplexity {evaluated.label}", sum(sizes), "bytes", done=done) as advance:
        leases.make_missing(paths, measure)


def _context(model: Any) -> int | None:
    """The longest text that a model or an ensemble reads (tokens); None where it does not say."""
    from fusion.inference.ensembles import PrefixCachedEnsemble

    if isinstance(model, PrefixCachedEnsemble):
        return model.positions
    return context_length(model.config)


def read_evaluation(folder: Path) -> list[dict[str, Any]]:
    """All rows of a stored evaluation, in the order of the documents."""
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("part-*.json")):
        rows += read_json(path, f"remove {folder} to have it made again")["rows"]
    return rows
