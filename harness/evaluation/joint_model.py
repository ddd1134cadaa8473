"""An ensemble as a suite sees it: its members loaded together and read as one, or asked one by one and counted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from baselines.method import Ensemble
from fusion.errors import UserError
from harness.evaluation.evaluated_model import EvaluatedModel
from harness.store.fingerprint import fingerprint

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from fusion.inference.ensembles import PrefixCachedEnsemble
    from fusion.vocabulary.token_bytes import Vocabulary
    from harness.evaluation.shared_prefix_lm import SharedPrefixLM


@dataclass
class JointModel(EvaluatedModel):
    """Members that are read as one, in the tokens of the first; or, where they vote, each by itself."""

    ensemble: Ensemble = field(kw_only=True)
    parts: Sequence[tuple[EvaluatedModel, float]] = field(kw_only=True)

    def in_dtype(self, dtype: str) -> "JointModel":
        if all(member.dtype == dtype for member, _ in self.parts):
            return self
        parts = [(member.in_dtype(dtype), weight) for member, weight in self.parts]
        return replace(self, dtype=dtype, parts=parts)

    @property
    def members(self) -> Sequence[tuple[EvaluatedModel, float]]:
        return self.parts

    @property
    def computing(self) -> dict[str, Any]:
        each = [member.computing for member, _ in self.parts]
        return each[0] if all(one == each[0] for one in each) else {"members": each}

    @property
    def votes(self) -> bool:
        return self.ensemble.combine == "vote"

    @property
    def predictor(self) -> "PrefixCachedEnsemble":
        return self.reader

    @cached_property
    def model(self) -> "PreTrainedModel":
        return self.parts[0][0].model

    @cached_property
    def reader(self) -> "PrefixCachedEnsemble":
        """Loads all members. Raises UserError for one that cannot take part."""
        from fusion.inference.ensembles import CrossTokenizerMember, PrefixCachedEnsemble
        from fusion.inference.prefix_cache import PrefixCachedModel, UnsupportedModel
        from fusion.vocabulary.token_bytes import Vocabulary
        from fusion.vocabulary.tokenization import encode_alike, encode_all, prefix_id

        assert self.ensemble.combine != "vote"
        readers = []
        for member, _ in self.parts:
            try:
                readers.append(PrefixCachedModel(member.model, float32_logits=True))
            except UnsupportedModel as reason:
                raise UserError(f"{member.label} cannot take part in {self.label}: {reason}.") from None
        vocabularies = [
            Vocabulary.from_tokenizer(member.tokenizer, reader.vocabulary)
            for (member, _), reader in zip(self.parts, readers, strict=True)
        ]
        shared = [
            i
            for i, (member, _) in enumerate(self.parts)
            if vocabularies[0].means_in(vocabularies[i]) and encode_alike(self.tokenizer, member.tokenizer)
        ]
        others = [i for i in range(len(self.parts)) if i not in shared]
        rows = min(readers[i].vocabulary for i in shared)
        pivot = Vocabulary.from_tokenizer(self.tokenizer, rows)
        translators = [
            CrossTokenizerMember(
                readers[i],
                (member := self.parts[i][0]).tokenizer,
                vocabularies[i],
                pivot,
                self._map(member, vocabularies[i], pivot),
                encode_pivot=partial(encode_all, self.tokenizer),
                prefix=prefix_id(member.tokenizer, member.spec.prefix),
                label=member.label,
            )
            for i in others
        ]
        return PrefixCachedEnsemble(
            [(readers[i], self.parts[i][1]) for i in shared],
            [(translator, self.parts[i][1]) for translator, i in zip(translators, others, strict=True)],
            self.ensemble.combine,
        )

    def _map(self, member: EvaluatedModel, vocabulary: "Vocabulary", pivot: "Vocabulary") -> "Tensor":
        import torch

        from fusion.vocabulary.maps import build_map
        from fusion.vocabulary.tokenization import encode_all
        from harness.runtime.progress import track

        label = f"map {member.label} to {self.parts[0][0].label}"
        with track(label, len(vocabulary), "tokens") as advance:
            found = build_map(
                self.ensemble.map,
                vocabulary,
                pivot,
                encode_target=partial(encode_all, self.tokenizer),
                progress=_steps(advance, len(vocabulary)),
            )
        return torch.from_numpy(found).long()

    @cached_property
    def context(self) -> int:
        return min(member.context for member, _ in self.parts)

    def _make_lm(self, **settings: Any) -> "SharedPrefixLM":
        return super()._make_lm(joint=self.reader, **settings)

    def release(self) -> None:
        super().release()
        self.__dict__.pop("reader", None)
        for member, _ in self.parts:
            member.release()


def _steps(advance: Callable[[float], None], size: int) -> Callable[[int, int], None]:
    """`advance` by what has been done since the last call, as `build_map` counts."""
    last = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        now = done * size / max(total, 1)
        advance(now - last)
        last = now

    return progress


def _fingerprint(ensemble: Ensemble, parts: Sequence[tuple[EvaluatedModel, float]]) -> str:
    """The ensemble's, and the prefixes of members that have another than the default."""
    prefixes = [member.spec.prefix for member, _ in parts]
    return fingerprint([ensemble.fingerprint, prefixes]) if any(prefixes) else ensemble.fingerprint


def make_joint_model(label: str, ensemble: Ensemble, parts: Sequence[tuple[EvaluatedModel, float]]) -> JointModel:
    """The ensemble of evaluated models; the first is the pivot."""
    pivot = parts[0][0]
    dtypes = [member.dtype for member, _ in parts]
    return JointModel(
        label=label,
        fingerprint=_fingerprint(ensemble, parts),
        spec=pivot.spec,
        dtype=dtypes[0] if len(set(dtypes)) == 1 else "+".join(dtypes),
        device=pivot.device,
        batch_tokens=pivot.batch_tokens,
        parameters=sum(member.parameters for member, _ in parts),
        models_dir=pivot.models_dir,
        ensemble=ensemble,
        parts=parts,
    )
