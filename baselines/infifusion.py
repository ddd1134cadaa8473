"""InfiFusion: the target learns the sorted probabilities of standardised logits (arXiv 2501.02795)."""

from typing import Literal

from pydantic import Field

from baselines.distillation import TeacherParameters
from baselines.merge import merge_models
from baselines.merge_methods import MergeStep
from baselines.method import Candidate, Context
from baselines.registry import method
from fusion.losses.infifusion import InfiFusionLoss


class InfiFusionParameters(TeacherParameters):
    """The teachers, how they are brought together, and how many probabilities are compared."""

    fuse: Literal["unified", "pairwise"] = Field(
        "unified", description="unified: one training with all teachers; pairwise: one with each, then a merge"
    )
    top_k: int = Field(10, gt=0, description="greatest probabilities that are compared, at most those stored")
    merge: MergeStep = Field(
        MergeStep(merge_method="linear"), description="pairwise: how the trained targets are merged, as in `merge`"
    )


@method("infifusion", needs=("training", "teacher"), reference="arXiv 2501.02795")
def infifusion(context: Context, parameters: InfiFusionParameters) -> Candidate:
    """The target trained on lambda * CLM + (1 - lambda) * distance of the sorted, standardised top k."""
    if parameters.fuse == "unified":
        loss = InfiFusionLoss(**parameters.teaching(context), top_k=parameters.top_k)
        return parameters.train_mixed(context, loss)
    trained = {
        f"target taught by {teacher}": parameters.train_mixed(
            context.relabelled(f"{context.label}, {teacher}"), InfiFusionLoss([teacher], top_k=parameters.top_k)
        )
        for teacher in parameters.teacher_roles(context)
    }
    start = "target" if parameters.warm_start is None else parameters.warm_start
    found = {**trained, start: context.candidate(start)}
    return merge_models(context, parameters.merge, list(trained), start, found.__getitem__)
