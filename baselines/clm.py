"""Plain continued training of the target on the same tokens: what fusion must beat."""

from baselines.method import Candidate, Context, Parameters
from baselines.registry import method


@method("clm", needs=("training",), reference="arXiv 2401.10491, section 4.1 (Llama-2 CLM)")
def clm(context: Context, parameters: Parameters) -> Candidate:
    """The target trained on causal language modelling alone (the objective at lambda = 1)."""
    return context.train(lam=1.0)
