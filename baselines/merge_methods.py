"""The methods by which weights are merged: mergekit's, and those of FuseChat that it has in another form or not at all.

A method is described by a mergekit configuration. The paper's SCE and its published code's are registered with mergekit
beside its own; VaRM is its linear merge with weights that are computed for each tensor.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from baselines.method import Parameters
from fusion.errors import UserError

Weights = Literal["uniform", "tuned"] | list[float]
MergeMethod = Literal[
    "linear", "slerp", "task_arithmetic", "ties", "dare_ties", "varm", "sce_paper", "sce_published", "sce",
    "arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "della", "della_linear", "karcher", "model_stock",
    "multislerp", "nearswap", "nuslerp", "passthrough", "ram", "ramplus_tl",
]  # fmt: skip
SELECT_TOPK = 0.1
"""Share of the elements that SCE selects, in its paper's experiments (arXiv 2408.07990)."""


class VaRMParameters(Parameters):
    """What VaRM takes as `parameters` (arXiv 2402.16107, section 3.3)."""

    granularity: Literal["matrix", "module", "layer", "model"] = Field(
        "matrix", description="what has weights of its own: every tensor, module or layer, or the whole model"
    )
    change: Literal["square", "absolute"] = Field("square", description="how the change of an element is measured")


class MergeStep(Parameters):
    """How models are merged."""

    merge_method: MergeMethod = Field(
        "linear",
        description="a method of mergekit by its name; varm; or SCE as in its paper (sce_paper) or its published code "
        "(sce_published), which mergekit's differs from",
    )
    weights: Weights = Field(
        "uniform", description="uniform; one number a model, of which the shares count; or tuned on validation text"
    )
    scale: float = Field(1.0, description="factor of the merged change, of methods that have one (lambda)")
    density: float = Field(0.5, gt=0, le=1, description="share of each change that is kept, of methods that drop some")
    parameters: dict[str, Any] = Field(
        {},
        description="further parameters of the method, such as {select_topk: 0.1} of sce and {granularity: layer} of "
        "varm",
    )
    trials: int = Field(12, gt=0, description="tuned: merges that are tried")

    @model_validator(mode="after")
    def _check_step(self) -> "MergeStep":
        if isinstance(self.weights, list) and not sum(self.weights) > 0:
            raise UserError(f"weights {self.weights} do not sum to a positive number: raise one of them.")
        if self.merge_method == "varm":
            self.varm()
        return self

    def varm(self) -> VaRMParameters:
        """The parameters of VaRM."""
        return VaRMParameters.model_validate(self.parameters)

    def changes_base(self) -> bool:
        """True if the method merges changes from a base, which is none of the models."""
        from mergekit.merge_methods.base import BasePolicy

        if self.merge_method in ("varm", "slerp"):
            return self.merge_method == "varm"
        return _spec(self.merge_method).contract.base is BasePolicy.REQUIRED

    def check_models(self, models: Sequence[str], label: str) -> list[float]:
        """One weight for each model. Raises UserError for a wrong number of models or weights."""
        n, least = len(models), 1 if self.merge_method == "passthrough" or self.changes_base() else 2
        if n < least or (self.merge_method == "slerp" and n != 2):
            number = "two models" if self.merge_method == "slerp" else f"at least {least} models"
            raise UserError(
                f"{label} merges {number} with {self.merge_method} and not {n} ({', '.join(models)}): say which in its "
                "`models`."
            )
        if isinstance(self.weights, list) and n != len(self.weights):
            raise UserError(
                f"{label} has {len(self.weights)} weights for {n} models ({', '.join(models)}): give one each."
            )
        name = self.merge_method
        weighted = name == "slerp" or (name != "varm" and "weight" in _parameters(name))
        if self.weights != "uniform" and not weighted:
            raise UserError(f"{label}: {name} takes no weights: leave them out.")
        return list(self.weights) if isinstance(self.weights, list) else [1.0] * n

    def configuration(self, models: Sequence[str], weights: Sequence[float], base: str) -> dict[str, Any]:
        """The merge of `models` with `weights` (as shares of their sum), as mergekit describes it.

        Of VaRM it is the linear merge whose weights `varm_configuration` replaces.
        """
        shares = [weight / sum(weights) for weight in weights]
        name = "linear" if self.merge_method == "varm" else self.merge_method
        configuration: dict[str, Any] = {"merge_method": name, "dtype": "float32"}
        if name == "slerp":
            first, second = models
            return {
                **configuration,
                "base_model": first,
                "models": [{"model": first}, {"model": second}],
                "parameters": {"t": shares[1], **self.parameters},
            }
        known = _parameters(name)
        # Task arithmetic has a density only because it shares its code with those that drop.
        density = {"density": self.density} if "density" in known and name != "task_arithmetic" else {}
        configuration["models"] = [
            {"model": model, "parameters": {**({"weight": share} if "weight" in known else {}), **density}}
            for model, share in zip(models, shares, strict=True)
        ]
        if self.merge_method == "varm":
            return configuration
        if self.changes_base():
            configuration["base_model"] = base
        if given := {**({"lambda": self.scale} if "lambda" in known else {}), **self.parameters}:
            configuration["parameters"] = given
        return configuration


def varm_configuration(
    parameters: VaRMParameters, models: Mapping[str, Path], base: Path, configuration: Mapping[str, Any]
) -> dict[str, Any]:
    """The linear merge of `models` with VaRM's weights for each tensor, from their changes of the model in `base`."""
    from safetensors import safe_open

    from fusion.modeling.merging import mean_change, varm_weights

    changes: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    with ExitStack() as stack:
        opened: list[dict[str, Any]] = []
        for folder in (base, *models.values()):
            files = [stack.enter_context(safe_open(file, "pt")) for file in sorted(folder.glob("*.safetensors"))]
            opened.append({name: file for file in files for name in file.keys()})  # noqa: SIM118
        of_base, *of_models = opened
        for name in of_base:
            origin = of_base[name].get_tensor(name)
            sizes[name] = origin.numel()
            changes[name] = [mean_change(of[name].get_tensor(name), origin, parameters.change) for of in of_models]
    weights = varm_weights(changes, sizes, parameters.granularity)
    # A filter is a part of a tensor's name and the first that fits is taken: a whole name is before its parts.
    names = sorted(weights, key=lambda name: (-len(name), name))
    return {
        **configuration,
        "models": [
            {
                "model": model,
                "parameters": {
                    "weight": [
                        *({"filter": name, "value": weights[name][j]} for name in names),
                        {"value": 1 / len(models)},  # of a tensor that mergekit knows and the files do not have
                    ]
                },
            }
            for j, model in enumerate(models)
        ],
    }


def register_sce() -> None:
    """Makes the paper's SCE and its published code's known to mergekit, as `sce_paper` and `sce_published`."""
    from mergekit.merge_methods.base import BasePolicy, InputContract, TensorGroup
    from mergekit.merge_methods.easy_define import merge_method
    from mergekit.merge_methods.registry import register, registered_methods
    from torch import Tensor

    from fusion.modeling.merging import sce

    def paper(group: TensorGroup, select_topk: float = SELECT_TOPK) -> Tensor:
        models = [entry.tensor for entry in group.non_base]
        return sce(group.base.tensor, models, select_topk=select_topk, published=False)

    def published(group: TensorGroup, select_topk: float = SELECT_TOPK) -> Tensor:
        models = [entry.tensor for entry in group.non_base]
        return sce(group.base.tensor, models, select_topk=select_topk, published=True)

    if "sce_paper" not in {method.spec.name for method in registered_methods()}:
        for function in (paper, published):
            contract = InputContract(base=BasePolicy.REQUIRED)
            register(merge_method(function, name=f"sce_{function.__name__}", contract=contract))


def _spec(name: str) -> Any:
    """What mergekit says of a method. Raises UserError where the installed version does not have it."""
    from mergekit.merge_methods.registry import registered_methods

    register_sce()
    for method in registered_methods():
        if method.spec.name == name:
            return method.spec
    raise UserError(f"the installed mergekit has no merge_method {name}: install a newer version of it.")


def _parameters(name: str) -> list[str]:
    """The names of a method's parameters in mergekit."""
    return [parameter.name for parameter in _spec(name).parameters]
