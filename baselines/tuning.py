"""Settings that validation text chooses: pilots on a part of the training text, of which the best is trained on all."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Generic, TypeVar

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from baselines.method import Candidate, Context, Parameters, Tuning
from fusion.errors import UserError

PILOT_SHARE = 0.2
"""The part of the training passages that a pilot is trained on, with all passes, as fewer would choose another."""
MOST_COMBINATIONS = 12
"""Of more combinations than these, one setting is tuned after the other."""
T = TypeVar("T", int, float)


class Tune(Parameters, Generic[T]):
    """The values of a setting of which validation text chooses one."""

    model_config = ConfigDict(json_schema_extra={"format": "{tune: [...]}"})

    tune: list[T] = Field(min_length=2, description="values that are tried")

    @model_validator(mode="before")
    @classmethod
    def _check(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and set(given) != {"tune"}:
            raise UserError(f"{dict(given)} is no setting: write a value, or {{tune: [VALUE, VALUE, ...]}}.")
        values = given["tune"] if isinstance(given, Mapping) else None
        if isinstance(values, list) and any(value in values[:i] for i, value in enumerate(values)):
            raise UserError(f"tune {values} names a value twice: give each once.")
        return given


def _kind(given: Any) -> str:
    return "tune" if isinstance(given, Mapping | Tune) else "value"


_Share = Annotated[float, Field(ge=0, le=1)]
_Positive = Annotated[float, Field(gt=0)]
_Count = Annotated[int, Field(gt=0)]


class TuneShare(Tune[_Share]):
    """Several numbers from 0 to 1, of which validation text chooses one."""


class TuneNumber(Tune[_Positive]):
    """Several positive numbers, of which validation text chooses one."""


class TuneCount(Tune[_Count]):
    """Several positive whole numbers, of which validation text chooses one."""


_ONE_OF = Discriminator(_kind)
TunableShare = Annotated[Annotated[_Share, Tag("value")] | Annotated[TuneShare, Tag("tune")], _ONE_OF]
"""A number from 0 to 1, or several to choose from."""
TunableNumber = Annotated[Annotated[_Positive, Tag("value")] | Annotated[TuneNumber, Tag("tune")], _ONE_OF]
"""A positive number, or several to choose from."""
TunableCount = Annotated[Annotated[_Count, Tag("value")] | Annotated[TuneCount, Tag("tune")], _ONE_OF]
"""A positive whole number, or several to choose from."""


def tuned(
    context: Context, tunes: Mapping[str, Sequence[float]], train: Callable[[Context, dict[str, Any]], Candidate]
) -> Candidate:
    """The candidate of `train(context, values)` with those values of the settings `tunes` that pilots found best.

    Every combination is tried, or of more than MOST_COMBINATIONS one setting after the other, in the order of `tunes`,
    with the first values of those that follow. Of equal ones the first wins. In a plan that cannot know the best one
    the first values are planned. Raises UserError where every pilot diverges.
    """
    tried: dict[tuple[float, ...], float] = {}

    def best(combinations: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
        for values in combinations:
            if values not in tried:
                named = dict(zip(tunes, values, strict=True))
                pilot = context.pilot(PILOT_SHARE, f"{context.label} pilot ({listed(named)})")
                tried[values] = pilot.validation_nll(train(pilot, named))
        unknown = any(math.isnan(tried[values]) for values in combinations)
        return combinations[0] if unknown else min(combinations, key=lambda values: tried[values])

    every = math.prod(map(len, tunes.values())) <= MOST_COMBINATIONS
    if every:
        chosen = best(list(itertools.product(*tunes.values())))
    else:
        chosen = tuple(values[0] for values in tunes.values())
        for i, values in enumerate(tunes.values()):
            chosen = best([(*chosen[:i], value, *chosen[i + 1 :]) for value in values])
    if math.isinf(tried[chosen]):
        raise UserError(f"{context.label}: every pilot diverges: lower the learning rates that are tried.")
    tuning = Tuning(tuple(tunes), tuple(tried.items()), chosen, every)
    named = dict(zip(tunes, chosen, strict=True))
    if not tuning.known:
        context = context.relabelled(f"{context.label} (with the first values: the pilots will choose)")
    return replace(train(context, named), tuning=tuning)


def listed(values: Mapping[str, float]) -> str:
    """Settings with their values, in words."""
    return ", ".join(f"{name} {value:g}" for name, value in values.items())
