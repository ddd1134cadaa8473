"""What every trained method lets a row choose: its training settings, where it starts, how its terms are balanced."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from baselines.method import Candidate, Context, Parameters, Row
from baselines.tuning import TunableCount, TunableNumber, TunableShare, Tune, tuned
from fusion.errors import UserError
from fusion.losses.loss import Balance, Loss

SHARED = (
    "sequence_length",
    "micro_batch_size",
    "select",
    "dtype",
    "gradient_checkpointing",
    "save_every",
    "workers",
    "timeout_minutes",
    "deepspeed",
    "fsdp2",
)
"""Settings of `training` that all rows share: rows are packed alike, and computed in one precision and way."""
_Decay = Annotated[float, Field(ge=0, lt=1)]


class RowTraining(Parameters):
    """A row's own values of the experiment's `training`; a key that is not given has the experiment's value.

    The learning rate, the global batch size and the passes may be `{tune: [...]}`: validation text chooses a value.
    """

    learning_rate: TunableNumber | None = Field(None, description="peak learning rate; null: the experiment's")
    global_batch_size: TunableCount | None = Field(
        None, description="sequences in an optimiser step, over all processes; null: the experiment's"
    )
    epochs: TunableNumber | None = Field(None, description="passes over the corpus; null: the experiment's")
    betas: tuple[_Decay, _Decay] | None = Field(
        None, description="decay rates of AdamW's first and second moment; null: the experiment's"
    )
    weight_decay: float | None = Field(None, ge=0, description="weight decay of AdamW; null: the experiment's")
    gradient_clip: float | None = Field(None, gt=0, description="maximum norm of the gradient; null: the experiment's")
    warmup_ratio: float | None = Field(
        None, ge=0, lt=1, description="fraction of the steps in which the learning rate rises; null: the experiment's"
    )
    schedule: Literal["cosine", "linear", "constant_with_warmup"] | None = Field(
        None, description="course of the learning rate after the warm-up; null: the experiment's"
    )

    @model_validator(mode="before")
    @classmethod
    def _check_shared(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and (shared := [name for name in SHARED if name in given]):
            raise UserError(f"{shared[0]} is the same for all rows: set training.{shared[0]} of the experiment.")
        return given

    def given(self) -> dict[str, Any]:
        """The keys that are set."""
        return self.model_dump(exclude_none=True)

    def tunes(self) -> dict[str, list[float]]:
        """The values that are tried of each key that is tuned, in the order in which keys are listed."""
        return {name: value.tune for name in type(self).model_fields if isinstance(value := getattr(self, name), Tune)}


class TrainedParameters(Parameters):
    """The parameters of a method that trains the target."""

    training: RowTraining | None = Field(
        None,
        description=f"the row's own values of the experiment's `training`: {', '.join(RowTraining.model_fields)}; "
        "null: none. The first three may be {tune: [...]}: validation text chooses",
    )
    warm_start: Row | None = Field(
        None, description="row whose checkpoint the training starts from; null: the target as it is"
    )

    def train(
        self, context: Context, *, lam: float | Tune[float], loss: Loss | None = None, balance: Balance = "none"
    ) -> Candidate:
        """The target trained on lam * CLM + (1 - lam) * loss with these parameters (see `Context.train`).

        What is to be tuned is tuned first (see `baselines.tuning.tuned`).
        """
        training = self.training or RowTraining()
        tunes = training.tunes()
        own = {name: value for name, value in training.given().items() if name not in tunes}
        fixed: dict[str, Any] = {}
        if isinstance(lam, Tune):
            tunes = {"lambda": lam.tune, **tunes}
        else:
            fixed["lambda"] = lam

        def train(context: Context, values: dict[str, Any]) -> Candidate:
            """In a pilot's context the row that this one starts from has the pilot's seed."""
            given = {**own, **fixed, **values}
            start = None if self.warm_start is None else context.candidate(self.warm_start)
            return context.train(lam=given.pop("lambda"), loss=loss, start=start, training=given, balance=balance)

        return tuned(context, tunes, train) if tunes else train(context, {})


class MixedParameters(TrainedParameters):
    """The parameters of a method with two terms, CLM and a loss."""

    lam: TunableShare = Field(0.9, alias="lambda", description="weight of the CLM term (paper: 0.9)")
    balance: Balance = Field(
        "none",
        description="rescale: in each micro batch the other term is multiplied by the ratio of the CLM term to it "
        "before lambda weighs them; none: terms as they are",
    )

    def train_mixed(self, context: Context, loss: Loss) -> Candidate:
        """The target trained on lambda * CLM + (1 - lambda) * loss, balanced as these parameters say."""
        return self.train(context, lam=self.lam, loss=loss, balance=self.balance)
