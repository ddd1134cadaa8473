"""The texts of an experiment: what is trained on, what is chosen by, what is tested on, and that these are apart."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from fusion.errors import UserError
from harness.config.loading import Config
from harness.data import corpus
from harness.data.corpus import CorpusConfig, Document
from harness.data.passages import Passages, corpus_sentence, make_passages
from harness.runtime.progress import notify
from harness.store.artifacts import Spec, Store


class Corpora:
    """Passages and documents, each read once.

    Held-out documents are compared with the text that is trained on when they are first asked for, but not in a plan,
    which makes no passages.
    """

    def __init__(self, store: Store, config: Config) -> None:
        self.config = config
        self.store = store
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

    def passages_of(self, role: str) -> tuple[Spec, Path]:
        """The artifact of the text that a role's model is continued on."""
        text = self.config.roles.named()[role].corpus
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

    @cached_property
    def test_documents(self) -> list[Document]:
        """The documents of the perplexity suite. Raises UserError when one of them is in a training corpus."""
        documents = list(corpus.documents(self.config.suites.perplexity.documents, self.data_root))
        self._check_not_trained(documents, "suites.perplexity.documents")
        return documents

    @property
    def test(self) -> tuple[Sequence[Document], float]:
        """The test documents and their bytes; in a plan without the text no documents and the expected bytes."""
        if (expected := self._bytes_without_text(self.config.suites.perplexity.documents)) is not None:
            return [], expected
        return self.test_documents, _n_bytes(self.test_documents)

    @property
    def curve(self) -> tuple[Sequence[Document], float]:
        """The first test documents of each domain, which are measured during training, and their bytes."""
        per_domain = self.config.curve.per_domain
        if not per_domain:
            return [], 0.0
        documents, n_bytes = self.test
        if not documents:  # a plan without the text
            return [], min(n_bytes, 4000.0 * per_domain)
        by_domain: dict[str, list[Document]] = {}
        for document in documents:
            by_domain.setdefault(document.domain, []).append(document)
        first = [document for domain in by_domain.values() for document in domain[:per_domain]]
        return first, _n_bytes(first)

    @property
    def validation(self) -> tuple[Sequence[Document], float]:
        """The documents that methods choose by, and their bytes; in a plan without the text only the expected bytes.

        Raises UserError where the experiment has none, and when one of them is trained or tested on.
        """
        self.requested.add("validation")
        return self._validation

    @cached_property
    def _validation(self) -> tuple[Sequence[Document], float]:
        settings = self.config.validation
        if settings is None:
            raise UserError(
                f"The experiment {self.config.experiment} has no text to choose by: add a validation section, with "
                "documents that are neither in corpus nor in suites.perplexity.documents."
            )
        if (expected := self._bytes_without_text(settings)) is not None:
            return [], expected
        documents = list(corpus.documents(settings, self.data_root))
        self._check_not_trained(documents, "validation")
        tested = {document.sha256 for document in self.test[0]}
        if shared := [document for document in documents if document.sha256 in tested]:
            raise UserError(
                f"{len(shared)} validation documents are in suites.perplexity.documents, too (first {shared[0].name}): "
                "choose another split in validation."
            )
        return documents, _n_bytes(documents)

    def _bytes_without_text(self, settings: CorpusConfig) -> float | None:
        """The expected bytes of a text that a plan need not fetch; None where the text is to be read."""
        if self.store.dry and settings.expected_bytes and corpus.is_on_hub(settings, self.data_root):
            return float(settings.expected_bytes)
        return None

    def _check_not_trained(self, documents: Sequence[Document], section: str) -> None:
        if self.store.dry:
            return
        roles = self.config.roles.named()
        trained = [self.passages, *(self.passages_of(name) for name, role in roles.items() if role.corpus)]
        hashes = set[str]().union(*(Passages(folder).document_hashes() for _, folder in trained))
        if shared := [document for document in documents if document.sha256 in hashes]:
            raise UserError(
                f"{len(shared)} held-out documents are in the training corpus (first {shared[0].name}): "
                f"choose another split in {section}."
            )


def _n_bytes(documents: Sequence[Document]) -> float:
    return float(sum(len(document.text.encode()) for document in documents))
