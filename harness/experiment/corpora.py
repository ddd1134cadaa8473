"""The texts of an experiment: what is trained on, what is chosen by, what is tested on, and that these are apart."""

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from fusion.errors import UserError
from harness.config.schema import Config, CorpusConfig
from harness.data import corpus
from harness.data.corpus import Document
from harness.data.passages import Passages, corpus_sentence, make_passages, sample_passages
from harness.evaluation.perplexity import HeldOutText, Perplexity, PerplexityConfig
from harness.evaluation.suite import Suite
from harness.runtime.progress import notify
from harness.store.artifacts import Spec, Store


class Corpora:
    """Passages and documents, each read once.

    Held-out documents are compared with the text that is trained on, but not in a plan, which makes no passages.
    """

    def __init__(self, store: Store, config: Config, suites: Mapping[str, Suite]) -> None:
        self.config = config
        self.store = store
        self._suites = suites
        self.perplexity = next((suite for suite in suites.values() if isinstance(suite, Perplexity)), None)
        """The suite in whose way text is measured while a model is trained; None where the experiment has none."""
        self.data_root = config.data.folder
        self.requested: set[str] = set()
        """The held-out texts that were asked for: `validation`, where a method chooses by it."""

    @cached_property
    def passages(self) -> tuple[Spec, Path]:
        """The artifact of the training corpus' passages; shows how much of the corpus they are."""
        spec, folder = self._passages(self.config.corpus)
        if not self.store.dry:
            notify(corpus_sentence(self.config.corpus, folder))
        return spec, folder

    def sampled(self, n: int) -> "Corpora":
        """The same texts, but of the training corpus only `n` passages, drawn by seed 0; itself if it has no more."""
        spec, folder = self.passages
        if self.store.dry or n >= len(Passages(folder)):
            return self
        sample = copy.copy(self)
        sample.passages = sample_passages(self.store, spec, folder, n)
        return sample

    def passages_of(self, role: str) -> tuple[Spec, Path]:
        """The artifact of the text that a role's model is continued on."""
        text = self.config.roles.by_name()[role].corpus
        assert text is not None, f"{role} is not continued"
        return self._passages(text)

    def _passages(self, text: CorpusConfig) -> tuple[Spec, Path]:
        return make_passages(self.store, text, self.config.passages.max_bytes, self.data_root)

    @property
    def n_bytes(self) -> float:
        """The size of the training corpus (bytes): counted where its passages are made, else as configured."""
        folder = self.passages[1]
        if folder.exists():
            return float(Passages(folder).n_bytes.sum())
        return self.expected_bytes(self.config.corpus)

    def expected_bytes(self, text: CorpusConfig) -> float:
        """The size of a text (bytes) as configured, or that of its files; 0 where it is not known."""
        return corpus.expected_bytes(text, self.data_root)

    @property
    def curve(self) -> HeldOutText:
        """The first test documents of each domain, which are measured during training."""
        per_domain = self.config.curve.per_domain
        if self.perplexity is None or not per_domain:
            return HeldOutText([], 0.0)
        return self.perplexity.text(dry=self.store.dry, per_domain=per_domain)

    def check_test_documents(self) -> None:
        """Raises UserError when a document that a suite tests on is in a training corpus."""
        for name, suite in self._suites.items():
            if suite.documents:
                self._check_not_trained(suite.documents, f"suites.{name}.documents")

    @property
    def validation(self) -> Perplexity:
        """Measures the text that methods choose by, in the way of the perplexity suite.

        Raises UserError where the experiment has no such text, and when a document of it is trained or tested on.
        """
        self.requested.add("validation")
        return self._validation

    @cached_property
    def _validation(self) -> Perplexity:
        documents = self.config.validation
        if documents is None:
            raise UserError(
                f"The experiment {self.config.experiment} has no text to choose by: add a validation section, with "
                "documents that are neither in corpus nor in suites.perplexity.documents."
            )
        if self.perplexity is None:
            validation = Perplexity(PerplexityConfig(documents=documents), self.data_root)
        else:
            config = self.perplexity.config.model_copy(update={"documents": documents})
            validation = Perplexity(config, self.data_root)
        text = validation.text(dry=self.store.dry)
        self._check_not_trained(text.documents, "validation")
        if self.perplexity is not None:
            tested = {document.sha256 for document in self.perplexity.text(dry=self.store.dry).documents}
            if shared := [document for document in text.documents if document.sha256 in tested]:
                raise UserError(
                    f"{len(shared)} validation documents are in suites.perplexity.documents, too (first "
                    f"{shared[0].name}): choose another split in validation."
                )
        return validation

    def _check_not_trained(self, documents: Sequence[Document], section: str) -> None:
        if self.store.dry:
            return
        roles = self.config.roles.by_name()
        trained = [self.passages, *(self.passages_of(name) for name, role in roles.items() if role.corpus)]
        hashes = {document.sha256 for document in documents}
        seen = set[str]().union(*(Passages(folder).holds_any(hashes) for _, folder in trained))
        if shared := [document for document in documents if document.sha256 in seen]:
            raise UserError(
                f"{len(shared)} held-out documents are in the training corpus (first {shared[0].name}): "
                f"choose another split in {section}."
            )
