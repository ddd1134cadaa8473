"""FuseChat: the target is fused with each source by itself, then the fused targets are merged (arXiv 2402.16107)."""

from pydantic import Field

from baselines.fusellm import FuseLLMParameters, source_roles
from baselines.merge import merge_models
from baselines.merge_methods import MergeStep
from baselines.method import Candidate, Context
from baselines.registry import method


class FuseThenMergeParameters(FuseLLMParameters):
    """How the target is fused with each source, as FuseLLM's parameters say, and how the fused targets are merged."""

    merge: MergeStep = Field(
        MergeStep(merge_method="sce_paper"),
        description="how the fused targets are merged: {merge_method: varm, ...}, with the parameters of `merge`",
    )


@method(
    "fuse_then_merge",
    needs=("training",),
    reference="arXiv 2402.16107, section 3; merged by SCE in arXiv 2408.07990",
)
def fuse_then_merge(context: Context, parameters: FuseThenMergeParameters) -> Candidate:
    """The merge of targets that are each trained on lambda * CLM + (1 - lambda) * fusion with one source."""
    fused = {
        f"target fused with {source}": parameters.train_mixed(
            context.relabelled(f"{context.label}, {source}"), parameters.loss([source])
        )
        for source in source_roles(context, parameters)
    }
    start = "target" if parameters.warm_start is None else parameters.warm_start
    found = {**fused, start: context.candidate(start)}
    return merge_models(context, parameters.merge, list(fused), start, found.__getitem__)
