"""Merge configurations in mergekit's format: read from YAML, checked, and their model names listed or replaced."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

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

    try:
        MergeConfiguration.model_validate(configuration)
    except Exception as error:  # pydantic's, or RuntimeError
        raise UserError(f"{label}: mergekit does not take its configuration: {first_line(error)}.") from None
    known = [method.spec.name for method in registered_methods()]
    if configuration["merge_method"] not in known:
        hint = did_you_mean(configuration["merge_method"], known)
        raise UserError(
            f"{label}: mergekit has no merge_method {configuration['merge_method']!r}{hint}: it has {', '.join(known)}."
        )


def changes_layers(configuration: Mapping[str, Any]) -> bool:
    """True if the merged model may have another number of layers than its models."""
    return "slices" in configuration or "modules" in configuration


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
    # Pydantic says in its second line where something is wrong and in its third line what.
    return " ".join(line.strip() for line in lines[1:3] if lines[0].endswith("MergeConfiguration")) or lines[0].rstrip(
        "."
    )
