"""The methods, what each needs and what can be set, as read from the registry and the parameters' schemas."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from baselines.registry import METHODS, get_method, schema_of
from baselines.training import TrainedParameters
from fusion.errors import UserError


@dataclass(frozen=True)
class Setting:
    """One parameter of a method, in the words of a configuration file."""

    name: str
    type: str
    """Its type, or its choices, such as `number` or `bucket or renormalise`."""
    default: str
    """Its effective value; `required` where there is none; where presets differ, theirs follow in parentheses."""
    description: str


@dataclass(frozen=True)
class MethodDescription:
    """One method. `refused` says why a package's method cannot be used, and is empty otherwise."""

    name: str
    summary: str = ""
    needs: tuple[str, ...] = ()
    settings: tuple[Setting, ...] = ()
    reference: str = ""
    refused: str = ""


def describe(name: str) -> MethodDescription:
    """The method of that name. Raises UserError when there is none, or it cannot be imported."""
    part = get_method(name)
    return MethodDescription(
        name=name,
        summary=(part.value.__doc__ or "").strip().partition("\n")[0],
        needs=part.needs,
        settings=settings_of(schema_of(part)),
        reference=part.reference,
    )


def describe_all() -> list[MethodDescription]:
    """Every registered method; for one that cannot be imported the reason, so that the others are still listed."""
    descriptions = []
    for name in METHODS.names():
        try:
            descriptions.append(describe(name))
        except UserError as error:
            descriptions.append(MethodDescription(name, refused=str(error)))
    return descriptions


def settings_of(model: type[BaseModel]) -> tuple[Setting, ...]:
    """What can be set of a method or a suite, from the model that validates it."""
    schema = model.model_json_schema(by_alias=True)
    required = schema.get("required", [])
    settings = [_setting(name, field, schema, name in required) for name, field in schema.get("properties", {}).items()]
    # What a method shares with every other that trains comes after what is its own.
    return tuple(sorted(settings, key=lambda setting: setting.name in TrainedParameters.model_fields))


def _setting(name: str, field: Mapping[str, Any], schema: Mapping[str, Any], required: bool) -> Setting:
    default = "required" if required else _written(field.get("effective", field.get("default")))
    presets: Mapping[str, Mapping[str, Any]] = schema.get("presets", {})
    others = [
        f"{preset}: {_written(values[name])}"
        for preset, values in presets.items()
        if name in values and values[name] != field.get("default")
    ]
    if others:
        default += f" ({', '.join(others)})"
    return Setting(name, _type(field, schema.get("$defs", {})), default, field.get("description", ""))


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _type(field: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """A JSON schema in words: its choices, or the name of its type, with the types of a list's items."""
    if "$ref" in field:
        return _type(definitions[field["$ref"].rpartition("/")[2]], definitions)
    if options := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(_type(option, definitions) for option in options)
    if "enum" in field:
        return " or ".join(map(_written, field["enum"]))
    if "const" in field:
        return _written(field["const"])
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}), definitions)}"
    return str(field.get("format") or {"object": "mapping"}.get(field.get("type", ""), field.get("type", "any")))
