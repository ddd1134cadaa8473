"""Merge configurations in mergekit's format: read from YAML, checked, and their model names listed or replaced."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from baselines.merge_methods import register_sce
from fusion.errors import UserError, did_you_mean


def read_configuration(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises UserError when it cannot be read or holds something else."""
    import yaml

    try:
        configuration = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"the mergekit configuration {path} cannot be read ({error.strerror}): correct it.") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"the mergekit configuration {path} is not valid YAML ({first_line(error)}).") from None
    if not isinstance(configuration, dict):
        raise UserError(f"the mergekit configuration {path} does not hold keys and values: correct it.")
    return configuration


def check_configuration(configuration: Mapping[str, Any], label: str) -> None:
    """Raises UserError for a configuration that mergekit refuses: an unknown method, a wrong type, no models."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge_methods.registry import registered_methods

    register_sce()
    try:
        MergeConfiguration.model_validate(configuration)
    except Exception as error:  # pydantic's, or RuntimeError
        raise UserError(f"{label}: mergekit does not take its configuration: {first_line(error)}.") from None
    known = {method.spec.name: method for method in registered_methods()}
    name = configuration["merge_method"]
    if name not in known:
        raise UserError(
            f"{label}: mergekit has no merge_method {name!r}{did_you_mean(name, known)}: it has {', '.join(known)}."
        )
    _check_parameters(configuration, name, [parameter.name for parameter in known[name].spec.parameters], label)


def _check_parameters(configuration: Any, method: str, known: Sequence[str], label: str) -> None:
    """Raises UserError for a parameter that the method does not have, which mergekit would pass over in silence."""
    if isinstance(configuration, Mapping):
        given = configuration.get("parameters")
        for name in given if isinstance(given, Mapping) else ():
            if name not in known:
                takes = ", ".join(known) or "none"
                raise UserError(
                    f"{label}: {method} has no parameter {name!r}{did_you_mean(name, known)}: it has {takes}."
                )
    for inside in configuration.values() if isinstance(configuration, Mapping) else configuration:
        if isinstance(inside, Mapping | list):
            _check_parameters(inside, method, known, label)


def changes_layers(configuration: Mapping[str, Any]) -> bool:
    """True if the merged model may have another number of layers than its models."""
    return "slices" in configuration or "modules" in configuration


def makes_tokenizer(configuration: Mapping[str, Any]) -> bool:
    """True if mergekit makes the merged model's tokenizer, so that vocabularies may differ."""
    return "tokenizer" in configuration or "tokenizer_source" in configuration


def with_folders(configuration: Mapping[str, Any], folders: Mapping[str, Path]) -> Any:
    """The configuration with the folder of every model in place of its name."""
    return rename_models(configuration, lambda name: {"model": {"path": str(folders[name])}})


def models_of(configuration: Mapping[str, Any]) -> list[str]:
    """Each model that a configuration names, once, in its order."""
    return list(dict.fromkeys(_names(configuration)))


def donor_of(configuration: Mapping[str, Any]) -> str:
    """The model whose tokenizer and chat template the merged model gets: the base, or the first that is named."""
    return str(configuration.get("base_model") or next(_names(configuration)))


def _is_model(key: str, value: Any) -> bool:
    """Whether an entry of a mergekit configuration names a model."""
    named = key in ("model", "base_model") or (key in ("tokenizer_source", "source") and value not in ("union", "base"))
    return named and isinstance(value, str)


def rename_models(configuration: Any, rename: Callable[[str], Any]) -> Any:
    """The configuration with `rename(name)` in place of the name of every model."""
    if isinstance(configuration, Mapping):
        return {k: rename(v) if _is_model(k, v) else rename_models(v, rename) for k, v in configuration.items()}
    if isinstance(configuration, list):
        return [rename_models(item, rename) for item in configuration]
    return configuration


def _names(configuration: Any) -> Iterator[str]:
    """Every mention of a model, in the configuration's order."""
    names: list[str] = []
    rename_models(configuration, names.append)
    yield from names


def first_line(error: Exception) -> str:
    """What is wrong, in one line, of an error that mergekit or pydantic raised."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # Pydantic says below its first line where something is wrong and what.
    details = " ".join(line.strip() for line in lines[1:3]) if "validation error for" in lines[0] else ""
    said, _, about = (details or lines[0]).partition(" [type=")
    value = re.search(r"input_value=(.+), input_type=", about)
    return said.rstrip(".") + (f" (it is {value[1]})" if value else "")


def define_gpt_neox() -> None:
    """Has mergekit ask a GPT-NeoX checkpoint for its weights only.

    Its own definition also wants the masks and frequencies that such checkpoints once held; without a definition it
    would leave the language model's head out.
    """
    from importlib.resources import files

    from mergekit.architecture.json_definitions import NAME_TO_ARCH, _load_architecture_json

    definition = json.loads((files("mergekit._data.architectures") / "gpt-neox.json").read_text(encoding="utf-8"))
    layer = definition["layer_templates"]
    computed = (".attention.bias", ".attention.masked_bias", ".inv_freq")
    layer["weights"] = [weight for weight in layer["weights"] if not weight["name"].endswith(computed)]
    for name in definition["architectures"]:
        NAME_TO_ARCH[name] = [_load_architecture_json(json.dumps(definition))]
