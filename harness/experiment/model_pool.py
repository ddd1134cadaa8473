"""The models of an experiment's roles: where each lies, its tokenizer, its vocabulary and its size."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion.errors import UnknownName, UserError
from fusion.modeling.context import context_length
from fusion.vocabulary.token_bytes import Vocabulary
from harness.config.schema import Config, RoleConfig
from harness.experiment.corpora import Corpora
from harness.models.catalogue import find_entry, tiny_name
from harness.models.checkpoints import load_config, load_tokenizer
from harness.models.resolution import ModelSpec, ResolvedModel, count_parameters, resolve, tokenizer_fingerprint
from harness.models.tiny import tiny_recipe
from harness.runtime.device import compute_dtype
from harness.stages.continued_models import continued_model_spec, make_continued_model
from harness.stages.tiny_models import make_tiny
from harness.stages.tokenization import make_tokens, tokens_spec
from harness.store.artifacts import Spec
from harness.store.paths import MODEL_FOLDER
from harness.store.workspace import Workspace


@dataclass(frozen=True)
class ModelSize:
    """What the estimates of a plan depend on."""

    parameters: float
    vocabulary: int
    """Tokens; 0 where it is not known."""


class ModelPool:
    """The model of every role, resolved once. Tiny and continued models are made when they are first asked for."""

    def __init__(self, workspace: Workspace, config: Config, corpora: Corpora) -> None:
        self._workspace = workspace
        self._config = config
        self._corpora = corpora
        self._roles = config.roles.by_name()
        self._models: dict[str, ResolvedModel] = {}
        self._bases: dict[str, ResolvedModel] = {}
        self._vocabularies: dict[str, tuple[Any, Vocabulary]] = {}

    @property
    def names(self) -> list[str]:
        """The names of the roles, the target first."""
        return list(self._roles)

    def role(self, name: str) -> RoleConfig:
        """The configuration of a role. Raises UserError for a role that the experiment does not have."""
        if name not in self._roles:
            raise UnknownName("role", name, self._roles)
        return self._roles[name]

    def model(self, name: str) -> ResolvedModel:
        """The role's model on this machine. In a plan a model that is not here yet is known by its name alone."""
        if name not in self._models:
            role = self.role(name)
            self._models[name] = self.base(name) if role.corpus is None else self._continued_model(name, role)
        return self._models[name]

    def base(self, name: str) -> ResolvedModel:
        """The model that a role names: the role's own, or the one that it is a continuation of."""
        if name not in self._bases:
            role = self.role(name)
            tiny = tiny_name(role.model)
            self._bases[name] = self.resolve(self.spec(name)) if tiny is None else self._tiny_model(tiny, name)
        return self._bases[name]

    def fingerprint(self, name: str) -> str:
        """The fingerprint of the role's model; a continued model need not be made for it."""
        if self.role(name).corpus is None:
            return self.model(name).fingerprint
        return self._continued_model_spec(name).fingerprint

    def spec(self, name: str, model: str | None = None) -> ModelSpec:
        """How the role's model is loaded, or another checkpoint (the folder `model`) as that is."""
        role = self.role(name)
        return ModelSpec(
            name=model or role.model,
            revision=None if model else role.revision,
            dtype=role.dtype,
            trust_remote_code=role.trust_remote_code,
            attn_implementation=role.attn_implementation,
            prefix=role.prefix,
        )

    def resolve(self, spec: ModelSpec) -> ResolvedModel:
        """The model on this machine; in a plan also one of the catalogue that is not fetched yet."""
        models = self._workspace.models
        try:
            return resolve(spec, models)
        except UserError:
            if self._workspace.store.dry and find_entry(spec.name):
                return ResolvedModel(models / spec.name, spec.name, f"not fetched: {spec.name}", spec)
            raise

    def dtype(self, name: str) -> str:
        """The precision that the role's model computes in on this device."""
        return compute_dtype(self.role(name).dtype, self._workspace.device)

    def size(self, name: str) -> ModelSize:
        """Parameters and vocabulary of the role's model, from the catalogue or the files."""
        model = self.role(name).model
        if tiny_name(model) is not None:
            return ModelSize(1e6, 0)
        if entry := find_entry(model):
            return ModelSize(entry[1].parameters, entry[1].vocabulary)
        return ModelSize(count_parameters(self.base(name).folder), 0)

    def is_tiny(self, name: str) -> bool:
        """True if the role's model is made by the run itself, so that it need not be there before."""
        return tiny_name(self.role(name).model) is not None

    def limits(self, name: str) -> tuple[int | None, int | None]:
        """Vocabulary and context of the role's model (tokens); None where it is not here or does not say.

        Raises UserError where the weights are damaged.
        """
        if tiny := tiny_name(self.role(name).model):
            recipe = tiny_recipe(self._config.profile).model(tiny)
            return recipe.embedded, recipe.context
        base = self.base(name)
        if not base.folder.exists():  # in a plan
            return None, None
        count_parameters(base.folder)
        config = load_config(base)
        return config.vocab_size, context_length(config)

    def shape(self, name: str) -> Path | Mapping[str, Any] | None:
        """What is known of the architecture of the role's model before it is there: see `Candidate.shape`."""
        folder = self.base(name).folder
        if folder.exists():
            return folder
        model = self.role(name).model
        if tiny := tiny_name(model):
            return tiny_recipe(self._config.profile).model(tiny).shape()
        entry = find_entry(model)
        return {"hidden_size": entry[1].hidden, "num_hidden_layers": entry[1].layers} if entry else None

    def tokenizer(self, name: str) -> tuple[Any, Vocabulary]:
        """The tokenizer of the role's model, and its vocabulary."""
        if name not in self._vocabularies:
            model = self.model(name)
            tokenizer = load_tokenizer(model)
            self._vocabularies[name] = tokenizer, Vocabulary.from_tokenizer(tokenizer, load_config(model).vocab_size)
        return self._vocabularies[name]

    def vocabulary_key(self, name: str) -> Mapping[str, Any]:
        """What the role's tokenizer and vocabulary follow from, for keys: no weights; a continued model has its base's.

        The same in a plan, but for a model of the catalogue that is not fetched yet.
        """
        base, key = self.base(name), self.tokenizer_key(name)
        return {**key, "size": load_config(base).vocab_size} if "tokenizer" in key else key

    def tokenizer_key(self, name: str) -> Mapping[str, Any]:
        """What the role's tokenizer is read from, for keys; as `vocabulary_key`."""
        base = self.base(name)
        if self.is_tiny(name) or not base.folder.exists():
            return {"model": base.fingerprint}
        return {"tokenizer": tokenizer_fingerprint(base.folder, self._workspace.models)}

    def tokens(self, name: str, passages: tuple[Spec, Path], n_bytes: float) -> Path:
        """The artifact of passages, of so many bytes, as tokens of the role's tokenizer."""
        base, spec = self.base(name), self.tokens_spec(name, passages[0])
        return make_tokens(self._workspace.store, spec, passages[1], lambda: load_tokenizer(base), n_bytes=n_bytes)

    def tokens_spec(self, name: str, passages: Spec) -> Spec:
        """The key of passages as tokens of the role's tokenizer."""
        return tokens_spec(self.base(name).name, passages, self.tokenizer_key(name))

    def _tiny_model(self, tiny: str, name: str) -> ResolvedModel:
        spec, path = make_tiny(self._workspace, tiny, self._config.profile)
        model = self.spec(name, str(path / MODEL_FOLDER))
        return ResolvedModel(path / MODEL_FOLDER, tiny, spec.fingerprint, model)

    def _continued_model_spec(self, name: str) -> Spec:
        passages, _ = self._corpora.passages_of(name)
        training = self._config.training
        return continued_model_spec(name, self.base(name), passages, training, device=self._workspace.device)

    def _continued_model(self, name: str, role: RoleConfig) -> ResolvedModel:
        assert role.corpus is not None
        spec, passages = self._continued_model_spec(name), self._corpora.passages_of(name)
        n_bytes = self._corpora.expected_bytes(role.corpus)
        path = make_continued_model(
            self._workspace,
            spec,
            self.base(name),
            passages[1],
            self.tokens(name, passages, n_bytes),
            self._config.training,
            parameters=self.size(name).parameters,
            corpus_bytes=n_bytes,
        )
        model = self.spec(name, str(path / MODEL_FOLDER))
        return ResolvedModel(path / MODEL_FOLDER, name, spec.fingerprint, model)
