"""Perplexity as a suite: bits per byte of whole documents (see `harness.evaluation.bits_per_byte`)."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel

from harness.config.loading import PerplexityConfig
from harness.data import corpus
from harness.data.corpus import Document
from harness.evaluation.suite import SUITES, EvaluatedModel, Example, SuiteResult
from harness.store.artifacts import Spec, Store
from harness.store.costs import Costs


@SUITES.register("perplexity")
class Perplexity:
    """Nats and bytes of every held-out document; its tasks are the documents' domains."""

    name = "perplexity"
    schema: ClassVar[type[BaseModel]] = PerplexityConfig

    def __init__(self, section: PerplexityConfig, data_root: Path | None) -> None:
        self.section = section
        self._data_root = data_root

    @property
    def _metric(self) -> str:
        from harness.evaluation.bits_per_byte import METRIC

        return METRIC[self.section.mode]

    @cached_property
    def documents(self) -> Sequence[Document]:
        return list(corpus.documents(self.section.documents, self._data_root))

    def shown(self) -> dict[str, str]:
        return dict.fromkeys(sorted({d.domain for d in self.documents}), self._metric)

    def identity(self) -> dict[str, Any]:
        from harness.evaluation import bits_per_byte

        return {"version": bits_per_byte.VERSION, "documents": bits_per_byte.documents_fingerprint(self.documents)}

    def measure(self, evaluated: EvaluatedModel, store: Store, costs: Costs) -> SuiteResult:
        from harness.evaluation.bits_per_byte import read_evaluation

        spec, path = evaluate(self.section, self.documents, evaluated, store, costs)

        def examples() -> Iterator[Example]:
            for row in read_evaluation(path):
                yield Example(row["domain"], row["example"], self._metric, row["nats"], row["bytes"])

        return SuiteResult(examples, {self.name: path}, {self.name: spec.fingerprint})


def evaluate(
    section: PerplexityConfig,
    documents: Sequence[Document],
    evaluated: EvaluatedModel,
    store: Store,
    costs: Costs,
    n_bytes: float | None = None,
) -> tuple[Spec, Path]:
    """The artifact of a candidate on the documents; `n_bytes` for a plan in which they are not here."""
    from harness.evaluation import bits_per_byte

    spec = bits_per_byte.evaluation_spec(
        evaluated.label,
        evaluated.fingerprint,
        documents,
        section,
        dtype=evaluated.dtype,
        batch_tokens=evaluated.batch_tokens,
    )

    def build(folder: Path) -> None:
        bits_per_byte.evaluate(
            folder,
            lambda: (evaluated.predictor, evaluated.tokenizer),
            documents,
            section,
            label=evaluated.label,
            batch_tokens=evaluated.batch_tokens,
        )

    if n_bytes is None:
        n_bytes = sum(len(d.text.encode()) for d in documents)
    return spec, store.ensure(spec, build, costs.forward(evaluated.parameters, n_bytes))
