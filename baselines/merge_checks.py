"""Which checkpoints can be merged: those of one architecture, one size and one tokenizer."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from baselines.merge_configuration import define_gpt_neox, first_line, with_folders
from baselines.merge_methods import register_sce
from fusion.errors import UserError
from fusion.modeling.loading import code_was_refused

# Properties of a configuration that say nothing about the weights: names, library, precision, special tokens; and the
# tokenizer of a shape, which is compared by itself.
_NOT_COMPARED = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "initializer_range",
    "max_position_embeddings", "pad_token_id", "tokenizer", "transformers_version", "use_cache",
}  # fmt: skip
# Compared first, since the other sizes follow from them: the message then names the cause.
_COMPARED_FIRST = ("model_type", "hidden_size", "vocab_size")
_LEAST_SUM = 1e-9  # of weights that are divided by their sum
_PER_LAYER = {"num_hidden_layers", "layer_types"}  # may differ where a mergekit configuration has slices


def check_mergeable(
    shapes: Mapping[str, Path | Mapping[str, Any]], label: str, *, sliced: bool = False, tokenizers: bool = True
) -> None:
    """Raises UserError, naming the first difference, unless all models have one architecture, size and tokenizer.

    shapes: for each model its checkpoint folder, or what is known before that exists (see `Candidate.shape`), of which
    only values known of both models are compared. Reads configurations and tokenizers, no weights. sliced: the number
    of layers may differ. tokenizers: False when tokenizers and vocabularies may differ.
    """
    (first, *others) = shapes or [""]
    skipped = _NOT_COMPARED | (_PER_LAYER if sliced else set()) | (set() if tokenizers else {"vocab_size"})

    def read_config(name: str) -> dict[str, Any]:
        shape = shapes[name]
        if isinstance(shape, Path):
            shape = _text_config(shape, name, label).to_dict()
        return {key: value for key, value in shape.items() if key not in skipped}

    for name in others:
        left, right = read_config(first), read_config(name)
        keys = left.keys() | right.keys()
        for shape, known in ((shapes[first], left), (shapes[name], right)):
            keys = keys if isinstance(shape, Path) else keys & known.keys()
        for key in [*(k for k in _COMPARED_FIRST if k in keys), *sorted(keys - set(_COMPARED_FIRST))]:
            if left.get(key) != right.get(key):
                raise UserError(
                    f"{label} cannot merge {first} and {name}, which differ in {key} ({left.get(key)} and "
                    f"{right.get(key)}): choose models of one architecture and size."
                )
        if tokenizers and (difference := _tokenizers_differ(shapes[first], shapes[name])):
            raise UserError(
                f"{label} cannot merge {first} and {name}, whose tokenizers differ ({difference}): choose models with "
                "one tokenizer."
            )


def _text_config(folder: Path, name: str, label: str) -> Any:
    """The configuration of a checkpoint's text model. Raises UserError where that would need code of its folder."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_text_config()
    except ValueError as error:
        if not code_was_refused(error):
            raise
        raise UserError(
            f"{label} cannot merge {name}, which needs Python code of its own (trust_remote_code), and merging runs "
            "none: choose models that transformers knows."
        ) from error


def check_plan(configuration: Mapping[str, Any], shapes: Mapping[str, Path | Mapping[str, Any]], label: str) -> None:
    """Raises UserError for a configuration that mergekit would refuse while it merges, or that gives no numbers.

    mergekit plans the merge, which reads no weights. shapes: as in `check_mergeable`, for every model that the
    configuration names; where one has no folder of its own yet, small Llamas stand for all of them.
    """
    from mergekit.common import dtype_from_name
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import _model_out_config, get_architecture_info
    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    with tempfile.TemporaryDirectory() as name:
        folders = {model: shape for model, shape in shapes.items() if isinstance(shape, Path)}
        layers = {
            model: _text_config(shape, model, label).num_hidden_layers
            if isinstance(shape, Path)
            else shape.get("num_hidden_layers")
            for model, shape in shapes.items()
        }
        _check_layer_ranges(configuration, layers, label)
        if len(set(folders.values())) < len(shapes):  # of candidates that are not there yet one shape is known
            folders = {model: _stand_in(Path(name, str(number)), layers[model]) for number, model in enumerate(shapes)}
        define_gpt_neox()
        register_sce()
        LoaderCache().loaders.clear()  # it caches by path
        try:
            for key in ("dtype", "out_dtype"):
                if configuration.get(key) is not None:
                    dtype_from_name(configuration[key])
            options = MergeOptions()
            LoaderCache().setup(options=options)
            merge = MergeConfiguration.model_validate(with_folders(configuration, folders))
            architecture = get_architecture_info(merge, options)
            planner = MergePlanner(merge, architecture, options, _model_out_config(merge, architecture))
            planner.plan_to_disk(name)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # it raises RuntimeError, ValueError, KeyError and pydantic's own
            said = first_line(error)
            for model, folder in folders.items():
                said = said.replace(f"{folder}.", f"{model}, ").replace(str(folder), model)
            raise UserError(f"{label}: mergekit cannot merge {', '.join(shapes)}: {said}.") from None
        finally:
            LoaderCache().loaders.clear()
    for weight, task in planner._tensors:
        if isinstance(task, ExecuteMergeMethodTask) and task.method_name == "linear" and task.parameters["normalize"]:
            shares = [of_model["weight"] for of_model in task.input_parameters.values()]
            if abs(sum(shares)) < _LEAST_SUM:
                raise UserError(
                    f"{label}: the weights of the models sum to 0 for {weight.name}, and are divided by their sum: "
                    "raise one of them, or set normalize: false."
                )


def _check_layer_ranges(configuration: Any, layers: Mapping[str, int | None], label: str) -> None:
    """Raises UserError for a slice with layers that its model does not have, or with none."""
    if isinstance(configuration, Mapping):
        model, of_slice = configuration.get("model"), configuration.get("layer_range")
        if isinstance(of_slice, list) and len(of_slice) == 2:
            first, end = of_slice
            n = layers.get(str(model))
            if not 0 <= first < end <= (end if n is None else n):
                has = "" if n is None else f", which has {n} layers"
                raise UserError(f"{label}: layer_range {of_slice} is none of {model}{has}: correct it.")
    for inside in configuration.values() if isinstance(configuration, Mapping) else configuration:
        if isinstance(inside, Mapping | list):
            _check_layer_ranges(inside, layers, label)


def _stand_in(folder: Path, layers: int | None) -> Path:
    """A folder that mergekit can plan with in place of a model that is not there yet: a configuration, no weights."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=layers or 1, num_attention_heads=1)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    save_file({"lm_head.weight": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    return folder


def _tokenizers_differ(first: Path | Mapping[str, Any], second: Path | Mapping[str, Any]) -> str:
    """The first difference of two tokenizers, in words; "" when they encode every text alike or one is not known."""
    from tokenizers import Tokenizer

    if not (isinstance(first, Path) and isinstance(second, Path)):
        names = [None if isinstance(shape, Path) else shape.get("tokenizer") for shape in (first, second)]
        return "" if None in names or names[0] == names[1] else f"{names[0]} and {names[1]}"
    left, right = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (first, second))
    if differing := left.get_vocab().items() ^ right.get_vocab().items():
        token, number = min(differing, key=lambda pair: (pair[1], pair[0]))
        return f"first in token {number}, {token!r}"
    # Compared as this version of the library writes them: another version may have written the same in another form.
    left_parts, right_parts = json.loads(left.to_str()), json.loads(right.to_str())
    for part in ("normalizer", "pre_tokenizer", "model"):
        if left_parts[part] != right_parts[part]:
            return f"in their {part}"
    return ""
