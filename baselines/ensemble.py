"""Several models that answer together: their distributions averaged at every token, or a vote over their answers."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from baselines.method import Context, Ensemble, Member, Parameters, RoleOrRow
from baselines.registry import method
from fusion.errors import UserError
from fusion.registry import Registered
from fusion.vocabulary.maps import MAPS

VERSION = 3


class EnsembleParameters(Parameters):
    """The members, how their answers are combined and what each weighs."""

    models: list[RoleOrRow] | None = Field(None, description="roles or rows that take part; null: all sources")
    combine: Literal["probabilities", "logits", "vote"] = Field(
        "probabilities", description="mean of probabilities, mean of logits (one tokenizer), or vote over answers"
    )
    weights: Literal["uniform", "validation"] | list[float] = Field(
        "uniform",
        description="uniform; one number a model; or validation: more weight for a lower loss on validation text",
    )
    weight_temperature: float = Field(
        0.25,
        gt=0,
        description="validation: softmax of -nats per byte / this (PackLLM's 1 a token is about 0.25 a byte)",
    )
    pivot: str | None = Field(
        None,
        description="member whose tokens are read and written; null: the target if it is one, else the first by name",
    )
    map: Annotated[str, Registered(MAPS)] = Field(
        "first_piece", description="other tokenizers: vocabulary map onto the pivot (on bytes)"
    )

    @model_validator(mode="after")
    def _check(self) -> "EnsembleParameters":
        if self.models is not None:
            check_models(self.models)
            if isinstance(self.weights, list) and len(self.weights) != len(self.models):
                raise UserError(
                    f"weights has {len(self.weights)} numbers for {len(self.models)} models: give one each."
                )
            if self.pivot is not None and self.pivot not in self.models:
                raise UserError(f"pivot = {self.pivot!r} is none of the models {', '.join(self.models)}: name one.")
        if isinstance(self.weights, list):
            normalise(self.weights)
        return self


@method(
    "ensemble",
    version=VERSION,
    reference="PackLLM, arXiv 2404.11531, for other tokenizers; table 7 of arXiv 2401.10491",
)
def ensemble(context: Context, parameters: EnsembleParameters) -> Ensemble:
    """The models of several roles or rows, each as it is; nothing is trained."""
    names = parameters.models or list(context.sources)
    check_models(names, context.label)
    candidates = {name: context.candidate(name) for name in names}
    if parameters.combine == "logits":
        shapes = {name: shape for name, candidate in candidates.items() if (shape := candidate.known_shape) is not None}
        check_one_tokenizer(shapes, context.label)
    weights = [1.0] * len(names)
    chosen_by: dict[str, Any] = {}
    if parameters.weights == "validation":
        # Weights that follow from a text are identified by that text: in a plan nothing has been measured yet.
        chosen_by = {"validation": context.validation_fingerprint, "temperature": parameters.weight_temperature}
        nll = [context.validation_nll(candidates[name], name) for name in names]
        if all(map(math.isfinite, nll)):
            weights = [math.exp((min(nll) - n) / parameters.weight_temperature) for n in nll]
    elif parameters.weights != "uniform":
        weights = list(parameters.weights)
    if len(weights) != len(names):
        raise UserError(
            f"{context.label} has {len(weights)} weights for {len(names)} models ({', '.join(names)}): give one each."
        )
    return make_ensemble(
        [Member(name, candidates[name], w) for name, w in zip(names, normalise(weights), strict=True)],
        pivot=parameters.pivot or ("target" if "target" in names else min(names)),
        combine=parameters.combine,
        map=parameters.map,
        label=context.label,
        chosen_by=chosen_by,
    )


def make_ensemble(
    members: Sequence[Member],
    *,
    pivot: str,
    combine: Literal["probabilities", "logits", "vote"],
    map: str,
    label: str,
    chosen_by: Mapping[str, Any] | None = None,
) -> Ensemble:
    """The members that weigh something, in an order that does not depend on the one given; the pivot first.

    `chosen_by` says what the weights come from, where they were not given. Raises UserError where the pivot is none of
    the members.
    """
    members = [member for member in members if member.weight > 0]
    if pivot not in (names := [member.name for member in members]):
        raise UserError(f"{label} has the pivot {pivot}, which is none of the models that count: {', '.join(names)}.")
    members = sorted(members, key=lambda m: (m.name != pivot, m.candidate.fingerprint, m.weight))
    identity = {
        "version": VERSION,
        "members": [[m.candidate.fingerprint, None if chosen_by else m.weight] for m in members],
        "weights": dict(chosen_by or {}),
        "combine": combine,
        "map": MAPS.choose(map).identity(),
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return Ensemble(tuple(members), combine, map, digest, any(member.candidate.seeded for member in members))


def check_models(names: Sequence[str], label: str = "models") -> None:
    """Raises UserError unless two models or more are named, each once."""
    if len(names) < 2:
        raise UserError(
            f"{label}: an ensemble needs two models or more, not {', '.join(names) or 'none'}: name another."
        )
    if len(set(names)) < len(names):
        raise UserError(f"{label}: {', '.join(names)} names a model twice: give each model once.")


def check_one_tokenizer(shapes: Mapping[str, Path | Mapping[str, Any]], label: str) -> None:
    """Raises UserError when two models encode a text in different tokens. Reads no weights.

    shapes: for each model its checkpoint folder, or what is known before that exists (see `Candidate.shape`).
    """
    from transformers import PreTrainedTokenizerFast

    from fusion.vocabulary.tokenization import encode_alike

    folders = {name: shape for name, shape in shapes.items() if isinstance(shape, Path)}
    loaded = {n: PreTrainedTokenizerFast.from_pretrained(f, local_files_only=True) for n, f in folders.items()}
    named = {n: s["tokenizer"] for n, s in shapes.items() if not isinstance(s, Path) and "tokenizer" in s}
    differing = [pair for pair in pairwise(loaded) if not encode_alike(loaded[pair[0]], loaded[pair[1]])]
    differing += [pair for pair in pairwise(named) if named[pair[0]] != named[pair[1]]]
    if differing:
        first, second = differing[0]
        raise UserError(
            f"{label} is a mean of logits, for which {first} and {second} must have one tokenizer, but theirs differ: "
            "combine probabilities, or choose models of one family."
        )


def normalise(weights: Sequence[float]) -> list[float]:
    """The weights divided by their sum. Raises UserError where one is negative or they do not sum to more than 0."""
    if negative := [weight for weight in weights if not weight >= 0]:
        raise UserError(f"A weight of an ensemble is {negative[0]:g}: give each member a number of 0 or more.")
    total = sum(weights)
    if not 0 < total < float("inf"):
        raise UserError(f"The weights of an ensemble sum to {total:g}: give at least one member a positive number.")
    return [weight / total for weight in weights]
