"""An experiment at work: roles become models, models become extractions and maps, methods become candidates.

Everything goes through the store, so that nothing is made twice; with a dry store the same code only plans.
"""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from baselines.method import Candidate, Ensemble
from fusion.errors import UserError, did_you_mean
from fusion.losses.specs import Learning, Needs
from fusion.vocabulary.token_bytes import Vocabulary, encode
from harness.config.loading import Config, Role
from harness.data import corpus
from harness.data.corpus import Document
from harness.data.passages import VERSION as PASSAGES_VERSION
from harness.data.passages import Passages, corpus_sentence, make_passages
from harness.evaluation import bits_per_byte
from harness.models.checkpoints import (
    ModelSpec,
    ResolvedModel,
    compute_dtype,
    count_parameters,
    find_entry,
    load_config,
    load_model,
    load_tokenizer,
    resolve,
)
from harness.runtime import distributed
from harness.runtime.progress import notify
from harness.stages import extraction, loss_resources
from harness.stages.continued_models import continued_model_spec, make_continued_model
from harness.stages.extraction import Extraction, extraction_spec
from harness.stages.sharding import zero_config
from harness.stages.shards import position_bytes
from harness.store.artifacts import Estimate, Spec, Store
from harness.store.costs import BYTES_PER_TOKEN, Costs
from harness.store.fingerprint import canonical, fingerprint, plain_json

if TYPE_CHECKING:
    from harness.evaluation.suite import EvaluatedModel, Suite

MAP_VERSION = 1
TRAIN_VERSION = 4
TARGET = "target"
MODEL_FOLDER = "model"
VERSIONS = {
    "passages": PASSAGES_VERSION,
    "predictions": extraction.VERSION,
    "map": MAP_VERSION,
    "train": TRAIN_VERSION,
    "perplexity": bits_per_byte.VERSION,
}


@dataclass(frozen=True)
class ModelSize:
    """What estimates need to know of a model."""

    parameters: float
    vocabulary: int


class Experiment:
    """The shared part of a run: models, corpus, extractions, maps and held-out documents, each looked at once."""

    def __init__(self, config: Config, root: Path, *, dry: bool = False) -> None:
        self.config = config
        self.store = Store(root / "artifacts", dry=dry, info={"configuration": config.model_dump(mode="json")})
        self.models_dir = root / "models"
        self.data_root = config.data.folder
        self.device = distributed.usable_device(config.device, dry=dry)
        if not dry:
            distributed.initialize(self.device)
        if config.threads is not None:
            import torch

            torch.set_num_threads(config.threads)
        self.costs = Costs(self.device)
        self._resolved: dict[str, ResolvedModel] = {}
        self._origins: dict[str, ResolvedModel] = {}
        self._vocabularies: dict[str, tuple[Any, Vocabulary]] = {}
        self._evaluated: EvaluatedModel | None = None

    def role(self, name: str) -> Role:
        """The role's setting. Raises UserError for a role the experiment does not have."""
        roles = self.config.roles.named()
        if name not in roles:
            raise UserError(f"There is no role {name!r}{did_you_mean(name, roles)}: roles are {', '.join(roles)}.")
        return roles[name]

    def model(self, name: str) -> ResolvedModel:
        """The role's model on this machine. In a plan a model that is not here yet is known by its name alone."""
        if name not in self._resolved:
            self._resolved[name] = self.origin(name) if self.role(name).corpus is None else self._continued_model(name)
        return self._resolved[name]

    def origin(self, name: str) -> ResolvedModel:
        """The model that the role is, or that it is a continuation of."""
        if name not in self._origins:
            role = self.role(name)
            if role.model.startswith("tiny:"):
                self._origins[name] = self._tiny(role)
            else:
                spec = ModelSpec(
                    name=role.model,
                    revision=role.revision,
                    dtype=role.dtype,
                    trust_remote_code=role.trust_remote_code,
                    attn_implementation=role.attn_implementation,
                )
                self._origins[name] = self.resolve(spec)
        return self._origins[name]

    def _continued_model_spec(self, name: str) -> Spec:
        passages, _ = self._own_passages(name)
        training = self.config.training
        return continued_model_spec(
            name, self.origin(name), passages, training, device=self.device, version=TRAIN_VERSION
        )

    def _continued_model(self, name: str) -> ResolvedModel:
        spec, role = self._continued_model_spec(name), self.role(name)
        assert role.corpus is not None
        tokens = corpus.expected_bytes(role.corpus, self.data_root) / BYTES_PER_TOKEN * self.config.training.epochs
        path = make_continued_model(
            self.store,
            spec,
            self.origin(name),
            self._own_passages(name)[1],
            self.config.training,
            device=self.device,
            estimate=self.costs.training(self.model_size(name).parameters, tokens),
        )
        own = ModelSpec(name=str(path / MODEL_FOLDER), dtype=role.dtype, attn_implementation=role.attn_implementation)
        return ResolvedModel(path / MODEL_FOLDER, name, spec.fingerprint, own)

    def _own_passages(self, name: str) -> tuple[Spec, Path]:
        """The text that a role was continued on."""
        text = self.role(name).corpus
        assert text is not None
        return make_passages(self.store, text, self.config.passages.max_bytes, self.data_root)

    def resolve(self, spec: ModelSpec) -> ResolvedModel:
        try:
            return resolve(spec, self.models_dir)
        except UserError:
            if self.store.dry and find_entry(spec.name):
                return ResolvedModel(self.models_dir / spec.name, spec.name, f"not fetched: {spec.name}", spec)
            raise

    def _tiny(self, role: Role) -> ResolvedModel:
        from harness.stages.tiny_models import make_tiny

        name = role.model.removeprefix("tiny:")
        spec, path = make_tiny(self.store, name, self.config.profile, self.device)
        model = ModelSpec(name=str(path / MODEL_FOLDER), dtype=role.dtype)
        return ResolvedModel(path / MODEL_FOLDER, name, spec.fingerprint, model)

    def run_fingerprint(self) -> str:
        """What names a run: all that its numbers come from but the seeds, since runs with other seeds belong together.

        That is the configuration, and what it only names.
        """
        config = self.config.model_dump(
            mode="json",
            exclude={
                "seeds": True,
                "device": True,
                "threads": True,
                "extraction": {"compression", "max_skipped_fraction"},
            },
        )
        return fingerprint({"config": config, **self.named()})

    def named(self) -> dict[str, Any]:
        """What the configuration only names: hashes of texts, models and rows, computing precision, stages."""
        roles = self.config.roles.named()
        identity: dict[str, Any] = {
            "versions": VERSIONS,
            "passages": self.passages[0].fingerprint,
            "documents": bits_per_byte.documents_fingerprint(self._held_out()[0]),
            "models": {
                name: (self.model(name) if role.corpus is None else self._continued_model_spec(name)).fingerprint
                for name, role in roles.items()
            },
            "dtypes": {name: compute_dtype(role.dtype, self.device) for name, role in roles.items()},
        }
        if self.config.validation is not None:
            identity["validation"] = corpus.content_fingerprint(self.config.validation, self.data_root)
        if self.suites:
            identity["suites"] = {name: suite.identity() for name, suite in self.suites.items()}
        return identity

    def model_size(self, name: str) -> ModelSize:
        """Parameters and vocabulary of a role's model, from the catalogue or the files."""
        model = self.role(name).model
        if model.startswith("tiny:"):
            return ModelSize(1e6, 0)
        if found := find_entry(model):
            return ModelSize(found[1].parameters, found[1].vocabulary)
        return ModelSize(count_parameters(self.origin(name).folder), 0)

    @cached_property
    def documents(self) -> list[Document]:
        """The test documents. Raises UserError when one of them is in a training corpus."""
        found = list(corpus.documents(self.config.suites.perplexity.documents, self.data_root))
        self._check_not_trained(found, "suites.perplexity.documents")
        return found

    @cached_property
    def validation(self) -> tuple[Sequence[Document], float]:
        """The documents that methods choose by, and their bytes; in a plan without the text only the expected bytes.

        Raises UserError where the experiment has none, and when one of them is trained or tested on.
        """
        settings = self.config.validation
        if settings is None:
            raise UserError(
                f"The experiment {self.config.experiment} has no text to choose by: add a validation section, with "
                "documents that are neither in corpus nor in suites.perplexity.documents."
            )
        if self.store.dry and settings.expected_bytes and corpus.is_on_hub(settings, self.data_root):
            return [], float(settings.expected_bytes)
        found = list(corpus.documents(settings, self.data_root))
        self._check_not_trained(found, "validation")
        tested = {d.sha256 for d in self._held_out()[0]}
        if shared := [d for d in found if d.sha256 in tested]:
            raise UserError(
                f"{len(shared)} validation documents are in suites.perplexity.documents, too (first {shared[0].name}): "
                "choose another split in validation."
            )
        return found, sum(len(d.text.encode()) for d in found)

    def _check_not_trained(self, found: Sequence[Document], section: str) -> None:
        if self.store.dry:
            return
        continued = [self._own_passages(name) for name, role in self.config.roles.named().items() if role.corpus]
        trained = set[str]().union(*(Passages(folder).document_hashes() for _, folder in [self.passages, *continued]))
        if shared := [d for d in found if d.sha256 in trained]:
            raise UserError(
                f"{len(shared)} held-out documents are in the training corpus (first {shared[0].name}): "
                f"choose another split in {section}."
            )

    @cached_property
    def curve_documents(self) -> list[Document]:
        """The first documents of each domain, measured during training."""
        taken: dict[str, list[Document]] = {}
        for document in self.documents:
            if len(taken.setdefault(document.domain, [])) < self.config.curve.per_domain:
                taken[document.domain].append(document)
        return [document for part in taken.values() for document in part]

    def _held_out(self) -> tuple[Sequence[Document], float]:
        """The documents and their bytes; in a plan without the text only the expected bytes."""
        settings = self.config.suites.perplexity.documents
        if self.store.dry and settings.expected_bytes and corpus.is_on_hub(settings, self.data_root):
            return [], float(settings.expected_bytes)
        return self.documents, sum(len(d.text.encode()) for d in self.documents)

    @cached_property
    def passages(self) -> tuple[Spec, Path]:
        """The passages of the training corpus; shows how much of the corpus they are."""
        corpus_config = self.config.corpus
        spec, folder = make_passages(self.store, corpus_config, self.config.passages.max_bytes, self.data_root)
        if not self.store.dry:
            notify(corpus_sentence(corpus_config, folder))
        return spec, folder

    @property
    def corpus_bytes(self) -> float:
        """Bytes of training text: counted where it is there, else as configured."""
        path = self.passages[1]
        if path.exists():
            return float(Passages(path).n_bytes.sum())
        return corpus.expected_bytes(self.config.corpus, self.data_root)

    def extract(self, name: str) -> tuple[Spec, Path]:
        """The stored extraction of a role's model."""
        role, model, settings = self.role(name), self.model(name), self.config.extraction
        passages_spec, passages_folder = self.passages
        spec = extraction_spec(
            model,
            passages_spec,
            settings,
            dtype=compute_dtype(role.dtype, self.device),
            batch_tokens=role.batch_tokens,
        )
        model_size = self.model_size(name)
        stored = position_bytes(settings.k, model_size.vocabulary, settings.store_dtype, len(settings.temperatures))
        estimate = self.costs.forward(model_size.parameters, self.corpus_bytes, disk_per_token=stored)
        path = extraction.make_extraction(
            self.store, spec, model, passages_folder, settings, device=self.device, estimate=estimate
        )
        return spec, path

    def tokenizer(self, name: str) -> tuple[Any, Vocabulary]:
        """The role's tokenizer and vocabulary."""
        if name not in self._vocabularies:
            model = self.model(name)
            tokenizer = load_tokenizer(model)
            self._vocabularies[name] = tokenizer, Vocabulary.from_tokenizer(tokenizer, load_config(model).vocab_size)
        return self._vocabularies[name]

    def reader(self, name: str, temperature: float = 1.0, k: int | None = None) -> Extraction:
        """The role's extraction, passage by passage."""
        tokenizer, vocabulary = self.tokenizer(name)
        return Extraction(self.extract(name)[1], Passages(self.passages[1]), tokenizer, vocabulary, temperature, k)

    def map(self, source: str, kind: str, on: Literal["bytes", "strings"]) -> tuple[Spec, Path]:
        """The vocabulary map of a source onto the target, for the tokens that its extraction holds."""
        extracted, _ = self.extract(source)
        inputs = {"extraction": extracted.fingerprint, "target": self.model(TARGET).fingerprint}
        label = f"{source}-to-{self.model(TARGET).name}-{kind}-{on}"
        spec = Spec("map", label, MAP_VERSION, inputs, {"kind": kind, "on": on})

        def build(folder: Path) -> None:
            from fusion.alignment.pairing import consulted_ids
            from fusion.vocabulary.maps import build_map
            from harness.runtime.progress import track

            reader = self.reader(source)
            tokenizer, vocabulary = self.tokenizer(TARGET)
            only = consulted_ids(reader.vocabulary, reader.occurring_ids())
            with track(f"map {label}", len(only), "tokens") as advance:
                last = 0

                def progress(done: int, total: int) -> None:
                    nonlocal last
                    advance((done - last) * len(only) / max(total, 1))
                    last = done

                found = build_map(
                    kind,
                    reader.vocabulary,
                    vocabulary,
                    on=on,
                    only=only,
                    encode_target=lambda text: encode(tokenizer, text),
                    progress=progress,
                )
            beside = folder / "map.npy.tmp"
            with beside.open("wb") as file:
                np.save(file, found, allow_pickle=False)
            beside.replace(folder / "map.npy")

        model_size = self.model_size(source)
        return spec, self.store.ensure(spec, build, Estimate(disk=4 * model_size.vocabulary, memory=1e9, seconds=10))

    def train(self, label: str, seed: int, *, lam: float, learn: Learning | None = None) -> Candidate:
        """The target trained on the corpus' rows (see `harness.stages.trainer.train`)."""
        settings, target = self.config.training, self.model(TARGET)
        if lam == 1:
            learn = None  # nothing of it would be learnt, and plain continued training is there already
        needs = Needs() if learn is None else learn.needs(TARGET)
        documents, n_bytes = self._curve()
        dtype = compute_dtype(settings.dtype, self.device)
        zero = zero_config(settings.deepspeed) if settings.deepspeed else None
        params: dict[str, Any] = {
            "lambda": lam,
            "seed": seed,
            "dtype": dtype,
            "curve": {"points": self.config.curve.points, "documents": bits_per_byte.documents_fingerprint(documents)},
            "perplexity": self.config.suites.perplexity.model_dump(exclude={"documents"}),
            **settings.model_dump(exclude={"workers", "micro_batch_size", "save_every", "dtype"}),
            "deepspeed": zero,
        }
        inputs: dict[str, Any] = {"model": target.fingerprint, "passages": self.passages[0].fingerprint}
        if learn is not None:
            params |= learn.identity()
            inputs |= loss_resources.made_of(self, label, needs)
        # The number of ranks is no part of it: as with rows at once, sums are rounded otherwise and that is all.
        info = {"ranks": distributed.world_size()}
        spec = Spec("train", f"{label}-seed{seed}", TRAIN_VERSION, plain_json(inputs), plain_json(params), info)
        card = self._card(label, spec)

        def build(folder: Path) -> None:
            from transformers import set_seed

            from harness.data.sequences import PackedSequences
            from harness.stages.trainer import Curve, train

            tokenizer, vocabulary = self.tokenizer(TARGET)
            lesson = None if learn is None else learn.lesson(loss_resources.material(self, needs))
            passages, readers = Passages(self.passages[1]), loss_resources.readers(self, needs)
            rows = PackedSequences(passages, tokenizer, vocabulary, settings.sequence_length, lesson, readers)
            set_seed(seed)
            role, section = self.role(TARGET), self.config.suites.perplexity
            curve = None
            if documents:
                curve = Curve(
                    self.config.curve.points,
                    lambda model: bits_per_byte.measure(
                        model, tokenizer, documents, section, batch_tokens=role.batch_tokens
                    ),
                )
            # What ZeRO-3 partitions may be more than a GPU holds before.
            whole_on = "cpu" if zero and zero["zero_optimization"]["stage"] == 3 else self.device
            with redirect_stdout(sys.stderr):  # DeepSpeed prints, and standard output is for tables
                train(
                    load_model(target, "float32", whole_on),
                    tokenizer,
                    rows,
                    settings,
                    lam=lam,
                    lesson=lesson,
                    teachers={n: load_model(self.model(n), self.role(n).dtype, self.device) for n in needs.models},
                    seed=seed,
                    device=self.device,
                    folder=folder,
                    label=f"{label} (seed {seed})",
                    card=card,
                    curve=curve,
                )

        model_size = self.model_size(TARGET)
        tokens = self.corpus_bytes / BYTES_PER_TOKEN * settings.epochs
        estimate = self.costs.training(model_size.parameters, tokens)
        measured = self.costs.forward(model_size.parameters, n_bytes * (self.config.curve.points + 1))
        along = [
            self.costs.forward(self.model_size(name).parameters, self.corpus_bytes * settings.epochs)
            for name in needs.models
        ]
        estimate = Estimate(
            estimate.disk,
            estimate.memory + sum(e.memory for e in along),
            estimate.seconds + measured.seconds + sum(e.seconds for e in along),
        )
        path = self.store.ensure(spec, build, estimate, on_all_ranks=True)
        return Candidate(path / MODEL_FOLDER, spec.fingerprint, True, path)

    def _curve(self) -> tuple[Sequence[Document], float]:
        if not self.config.curve.per_domain:
            return [], 0.0
        documents, n_bytes = self._held_out()
        if not documents:  # a plan without the text
            return [], min(n_bytes, 4000.0 * self.config.curve.per_domain)
        return self.curve_documents, sum(len(d.text.encode()) for d in self.curve_documents)

    def _card(self, label: str, spec: Spec) -> str:
        import yaml

        config = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        return (
            f"---\nbase_model: {self.config.roles.target.model}\nlibrary_name: transformers\n---\n\n"
            f"# {label}\n\n`{self.config.roles.target.model}` trained by `fusellm-harness`, experiment "
            f"`{self.config.experiment}`, profile `{self.config.profile}`; artifact `{spec.fingerprint}`.\n"
            + (f"\n**{self.config.banner}**\n" if self.config.banner else "")
            + f"\n## Made from\n\n```json\n{canonical(spec.identity())}\n```\n"
            f"\n## Resolved configuration\n\n```yaml\n{config}```\n"
        )

    def evaluate(self, label: str, candidate: Candidate | Ensemble, role: Role) -> tuple[Spec, Path] | None:
        """The candidate's nats and bytes on every held-out document; None for one that only votes over answers."""
        from harness.evaluation.perplexity import evaluate

        documents, n_bytes = self._held_out()
        evaluated = self.evaluated(label, candidate, role)
        if evaluated.votes:
            return None
        return evaluate(self.config.suites.perplexity, documents, evaluated, self.store, self.costs, n_bytes)

    def evaluated(self, label: str, candidate: Candidate | Ensemble, role: Role) -> "EvaluatedModel":
        """The candidate as suites see it; the same for all suites, so that it is loaded once, and only the last."""
        if not self._evaluated or (self._evaluated.label, self._evaluated.fingerprint) != (
            label,
            candidate.fingerprint,
        ):
            if isinstance(candidate, Ensemble):
                self._evaluated = self._together(label, candidate)
            else:
                self._evaluated = self._alone(label, candidate, role)
        return self._evaluated

    def _together(self, label: str, ensemble: Ensemble) -> "EvaluatedModel":
        from harness.evaluation.joint_model import joint_subject

        members = [
            (self._alone(member.role, member.candidate, self.role(member.role)), member.weight)
            for member in ensemble.members
        ]
        return joint_subject(label, ensemble, members)

    def _alone(self, label: str, candidate: Candidate, role: Role) -> "EvaluatedModel":
        from harness.evaluation.suite import EvaluatedModel

        role_name = next(n for n, r in self.config.roles.named().items() if r is role)
        spec = ModelSpec(
            name=str(candidate.folder),
            dtype=role.dtype,
            trust_remote_code=role.trust_remote_code,
            attn_implementation=role.attn_implementation,
        )
        return EvaluatedModel(
            label=label,
            fingerprint=candidate.fingerprint,
            spec=spec,
            dtype=compute_dtype(role.dtype, self.device),
            device=self.device,
            batch_tokens=role.batch_tokens,
            parameters=self.model_size(role_name).parameters,
            models_dir=self.models_dir,
        )

    @cached_property
    def suites(self) -> "dict[str, Suite]":
        """The suites beside perplexity, whose data are prepared once for all candidates."""
        from harness.evaluation.suite import suite

        return {name: suite(name)(section, self.data_root) for name, section in self.config.suites.others.items()}
