"""Plain continued training of the target on the same tokens: what fusion must beat."""

from baselines.method import Candidate, Context
from baselines.registry import method
from baselines.training import TrainedParameters


@method("clm", needs=("training",), reference="arXiv 2401.10491, section 4.1 (Llama-2 CLM)")
def clm(context: Context, parameters: TrainedParameters) -> Candidate:
    """The target trained on causal language modelling alone (the objective at lambda = 1)."""
    return parameters.train(context, lam=1.0)
