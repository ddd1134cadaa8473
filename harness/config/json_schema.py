"""The JSON schema of an experiment's file, with which editors complete and check keys while one types."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from fusion.errors import UserError
from harness.config.schema import Config
from harness.config.shipped import names
from harness.config.validation import parameters_model
from harness.evaluation.suite import suite_parameters

# OmegaConf resolves `${other.key}`, whatever type the value must have in the end.
_INTERPOLATION = {"type": "string", "pattern": r"\$\{.+\}"}
# Of a method's model; the rest (its presets, say) is for our own listings.
_KEYWORDS = ("type", "description", "properties", "additionalProperties")
_ABSENT = {"type": "null", "description": "leave out what a lower layer has"}


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of the files that `harness.config.loading.load` reads.

    Rows and suites may be any that are registered, each with the parameters of its method or suite; one whose package
    cannot be imported is left out and named under `$comment`. No key is required, since a file may extend another.
    """
    notes: list[str] = []
    methods = dict(_models("methods", notes))
    suites = dict(_models("suites", notes))
    every: dict[type[BaseModel], None] = dict.fromkeys([Config, *methods.values(), *suites.values()])
    references, whole = models_json_schema([(model, "validation") for model in every], by_alias=True)
    definitions: dict[str, Any] = whole["$defs"]

    def reference(model: type[BaseModel]) -> dict[str, Any]:
        return dict(references[model, "validation"])

    def definition(of: dict[str, Any]) -> dict[str, Any]:
        return dict(definitions[of["$ref"].rpartition("/")[2]])

    rows = []
    for name, model in methods.items():
        schema = {key: value for key, value in definition(reference(model)).items() if key in _KEYWORDS}
        schema["properties"] = {"method": {"const": name}, **schema.get("properties", {})}
        rows.append({**schema, "title": name})
    root = definition(reference(Config))
    inlined: list[type[BaseModel]] = [Config, *methods.values()]
    used = {reference(model)["$ref"].rpartition("/")[2] for model in inlined}
    definitions = {name: schema for name, schema in definitions.items() if name not in used or _uses(rows, name)}
    properties = root["properties"]
    properties["methods"]["additionalProperties"] = {"anyOf": [*rows, _ABSENT, _INTERPOLATION]}
    by_name = definition(properties["roles"])["properties"]["sources"]
    by_name["additionalProperties"] = {"anyOf": [by_name["additionalProperties"], _ABSENT]}
    sections = {name: {"anyOf": [reference(model), _ABSENT]} for name, model in suites.items()}
    properties["suites"] |= {"properties": sections, "additionalProperties": False}
    properties["extends"] = {"type": "string", "description": "experiment's name or YAML file to start from"}
    properties["protocols"] = {"type": "object", "description": "settings of suites to refer to: ${protocols.NAME}"}
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **_relaxed(root),
        "title": "Experiment of fusellm-harness",
        "$defs": {name: _relaxed(one) for name, one in sorted(definitions.items())},
    }
    return {**schema, "$comment": " ".join(notes)} if notes else schema


def _models(kind: Any, notes: list[str]) -> Iterator[tuple[str, type[BaseModel]]]:
    """The registered methods or suites with the models of their parameters; `notes` gets a sentence for the others."""
    for name in names(kind):
        try:
            yield name, parameters_model(name) if kind == "methods" else suite_parameters(name)
        except UserError as error:
            notes.append(str(error))


def _uses(schemas: Any, name: str) -> bool:
    return f"'#/$defs/{name}'" in str(schemas)


def _relaxed(schema: Any) -> Any:
    """A schema in which no key is required and every property that is no string may be an interpolation."""
    if isinstance(schema, list):
        return [_relaxed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    relaxed = {key: _relaxed(value) for key, value in schema.items() if key != "required"}
    if isinstance(properties := relaxed.get("properties"), dict):
        relaxed["properties"] = {name: _or_interpolated(value) for name, value in properties.items()}
    return relaxed


def _or_interpolated(schema: dict[str, Any]) -> dict[str, Any]:
    if "const" in schema or (schema.get("type") == "string" and not {"enum", "pattern"} & schema.keys()):
        return schema
    about = {key: value for key, value in schema.items() if key in ("title", "description", "default")}
    rest = {key: value for key, value in schema.items() if key not in about}
    return {
        **about,
        "anyOf": [*rest.pop("anyOf"), _INTERPOLATION] if set(rest) == {"anyOf"} else [rest, _INTERPOLATION],
    }
