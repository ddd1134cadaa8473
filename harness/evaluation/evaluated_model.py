"""A candidate as a suite sees it: its names and settings, and the model, which is loaded when it is first needed."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.modeling.context import context_length
from harness.evaluation.overflow import OverflowRule
from harness.models.checkpoints import load_model, load_tokenizer, load_whole_config
from harness.models.resolution import ModelSpec, ResolvedModel, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from fusion.inference.ensembles import PrefixCachedEnsemble
    from harness.evaluation.shared_prefix_lm import SharedPrefixLM


@dataclass
class EvaluatedModel:
    """A candidate as a suite sees it: what it is called and what it is; it is loaded when it is first needed."""

    label: str
    fingerprint: str
    spec: ModelSpec
    dtype: str
    """Computing precision, made definite."""
    device: str
    batch_tokens: int
    parameters: float
    models_dir: Path
    _lm: "tuple[dict[str, Any], SharedPrefixLM] | None" = field(default=None, init=False)

    @property
    def computing(self) -> dict[str, Any]:
        """How the model computes, as the key of what is measured of it holds it."""
        return self.spec.computing(self.dtype)

    @cached_property
    def resolved(self) -> ResolvedModel:
        return resolve(self.spec, self.models_dir)

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        return load_tokenizer(self.resolved)

    @cached_property
    def model(self) -> "PreTrainedModel":
        return load_model(self.resolved, self.dtype, self.device)  # type: ignore[arg-type]

    def in_dtype(self, dtype: str) -> "EvaluatedModel":
        """The same candidate computing in another precision; itself where it does already."""
        return self if self.dtype == dtype else replace(self, dtype=dtype)

    @property
    def predictor(self) -> "PreTrainedModel | PrefixCachedEnsemble":
        """What gives the distributions over the next token."""
        return self.model

    @property
    def members(self) -> "Sequence[tuple[EvaluatedModel, float]]":
        """The models that it is made of, and their weights."""
        return [(self, 1.0)]

    @property
    def votes(self) -> bool:
        """Whether its members answer each for itself, and their answers are counted."""
        return False

    @cached_property
    def context(self) -> int:
        """The longest text that the model reads (tokens); where its configuration names none, what lm-eval assumes."""
        from lm_eval.models.utils import resolve_max_length

        config = load_whole_config(self.resolved)
        return context_length(config) or resolve_max_length(config, self.tokenizer)

    def release(self) -> None:
        """Frees the model's memory; it is loaded again when it is needed again."""
        self._lm = None
        self.__dict__.pop("model", None)

    def lm(
        self, *, batch_size: Any, seed: int, after_prompt: bool = False, overflow: OverflowRule | None = None
    ) -> "SharedPrefixLM":
        """The candidate as lm-eval's LM. With `after_prompt` its answers join to the prompt; `overflow` is the rule for
        prompts that do not fit the context (see `SharedPrefixLM`).
        """
        settings = {"batch_size": batch_size, "seed": seed, "after_prompt": after_prompt, "overflow": overflow}
        if self._lm is None or self._lm[0] != settings:
            self._lm = settings, self._make_lm(**settings)
        return self._lm[1]

    def _make_lm(self, **settings: Any) -> "SharedPrefixLM":
        from harness.evaluation.shared_prefix_lm import SharedPrefixLM

        return SharedPrefixLM(
            self.model,
            self.tokenizer,
            label=self.label,
            batch_tokens=self.batch_tokens,
            context=self.context,
            **settings,
        )
