"""The JSON schema takes every file that loads, and refuses what loading refuses."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusion.errors import UserError
from harness.config.json_schema import json_schema
from harness.config.shipped import names
from harness.evaluation.suite import SUITES, Suite, SuiteConfig, suite_config
from harness.store.paths import PRESETS
from tests.registries import restore_after

ROOT = Path(__file__).parents[3]
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}


class Checker:
    """As much of JSON schema as ours uses; an unknown keyword fails the test."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self.schema = schema

    def errors(self, value: Any, schema: dict[str, Any] | None = None) -> Iterator[str]:
        schema = self.schema if schema is None else schema
        for keyword, argument in schema.items():
            yield from getattr(self, "_" + keyword.strip("$"))(value, argument, schema)

    def _ignored(self, value: Any, argument: Any, schema: dict[str, Any]) -> Iterator[str]:
        yield from ()

    _schema = _title = _description = _default = _defs = _comment = _format = _effective = _ignored
    _minProperties = _ignored  # a file may leave the rest to the file that it extends

    def _ref(self, value: Any, argument: str, schema: dict[str, Any]) -> Iterator[str]:
        yield from self.errors(value, self.schema["$defs"][argument.removeprefix("#/$defs/")])

    def _type(self, value: Any, argument: str, schema: dict[str, Any]) -> Iterator[str]:
        if not isinstance(value, TYPES[argument]) or (isinstance(value, bool) and argument != "boolean"):
            yield f"{value!r} is no {argument}"

    def _anyOf(self, value: Any, argument: list[Any], schema: dict[str, Any]) -> Iterator[str]:
        if all(any(True for _ in self.errors(value, one)) for one in argument):
            yield f"{value!r} is none of {len(argument)}"

    def _oneOf(self, value: Any, argument: list[Any], schema: dict[str, Any]) -> Iterator[str]:
        if sum(not any(True for _ in self.errors(value, one)) for one in argument) != 1:
            yield f"{value!r} is not one of {len(argument)}"

    def _const(self, value: Any, argument: Any, schema: dict[str, Any]) -> Iterator[str]:
        if value != argument:
            yield f"{value!r} is not {argument!r}"

    def _enum(self, value: Any, argument: list[Any], schema: dict[str, Any]) -> Iterator[str]:
        if value not in argument:
            yield f"{value!r} is not in {argument}"

    def _pattern(self, value: Any, argument: str, schema: dict[str, Any]) -> Iterator[str]:
        if isinstance(value, str) and not re.search(argument, value):
            yield f"{value!r} does not match {argument}"

    def _properties(self, value: Any, argument: dict[str, Any], schema: dict[str, Any]) -> Iterator[str]:
        for key in value.keys() & argument.keys() if isinstance(value, dict) else ():
            yield from self.errors(value[key], argument[key])

    def _additionalProperties(self, value: Any, argument: Any, schema: dict[str, Any]) -> Iterator[str]:
        for key in value.keys() - schema.get("properties", {}).keys() if isinstance(value, dict) else ():
            if argument is False:
                yield f"unknown key {key}"
            elif argument is not True:
                yield from self.errors(value[key], argument)

    def _items(self, value: Any, argument: dict[str, Any], schema: dict[str, Any]) -> Iterator[str]:
        for item in value if isinstance(value, list) else ():
            yield from self.errors(item, argument)

    def _prefixItems(self, value: Any, argument: list[Any], schema: dict[str, Any]) -> Iterator[str]:
        for item, one in zip(value, argument, strict=False) if isinstance(value, list) else ():
            yield from self.errors(item, one)

    def _minItems(self, value: Any, argument: int, schema: dict[str, Any]) -> Iterator[str]:
        if isinstance(value, list) and len(value) < argument:
            yield "too short"

    def _maxItems(self, value: Any, argument: int, schema: dict[str, Any]) -> Iterator[str]:
        if isinstance(value, list) and len(value) > argument:
            yield "too long"

    def _minLength(self, value: Any, argument: int, schema: dict[str, Any]) -> Iterator[str]:
        if isinstance(value, str) and len(value) < argument:
            yield "too short"

    def _bound(self, value: Any, holds: bool, argument: float) -> Iterator[str]:
        if not holds:
            yield f"{value!r} is beyond {argument}"

    def _minimum(self, value: Any, argument: float, schema: dict[str, Any]) -> Iterator[str]:
        yield from self._bound(value, not isinstance(value, int | float) or value >= argument, argument)

    def _maximum(self, value: Any, argument: float, schema: dict[str, Any]) -> Iterator[str]:
        yield from self._bound(value, not isinstance(value, int | float) or value <= argument, argument)

    def _exclusiveMinimum(self, value: Any, argument: float, schema: dict[str, Any]) -> Iterator[str]:
        yield from self._bound(value, not isinstance(value, int | float) or value > argument, argument)

    def _exclusiveMaximum(self, value: Any, argument: float, schema: dict[str, Any]) -> Iterator[str]:
        yield from self._bound(value, not isinstance(value, int | float) or value < argument, argument)


@pytest.fixture(scope="module")
def checker() -> Checker:
    return Checker(json.loads(json.dumps(json_schema())))


def test_every_experiment_and_profile_fits(checker: Checker) -> None:
    files = [*(PRESETS / "experiments").glob("*.yaml"), *(PRESETS / "profiles").glob("*.yaml")]
    files += [PRESETS / "defaults.yaml", *(ROOT / "docs").rglob("*.yaml")]
    for file in files:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
        for layer in [raw, *raw.pop("per_profile", {}).values()]:
            assert list(checker.errors(layer)) == [], file


def test_every_method_and_suite_completes(checker: Checker) -> None:
    rows = checker.schema["properties"]["methods"]["anyOf"][0]["additionalProperties"]["anyOf"]
    methods = {row["title"]: row["properties"] for row in rows if "properties" in row}
    assert sorted(methods) == names("methods")
    assert all(properties["method"] == {"const": name} for name, properties in methods.items())
    assert {"preset", "lambda", "select_over"} <= methods["fusellm"].keys()
    suites = checker.schema["properties"]["suites"]["anyOf"][0]["properties"]
    assert sorted(suites) == names("suites") and "bbh" in suites and "multipl_e" in suites


@pytest.mark.parametrize(("made", "model"), [(Suite, None), (dict, SuiteConfig)])
def test_what_is_not_made_like_a_suite_is_refused_by_name(
    made: Any, model: type[SuiteConfig] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore_after(monkeypatch, SUITES)
    SUITES.register("bare", parameters=model)(made)
    with pytest.raises(UserError, match=r"'bare' is no subclass of Suite that @SUITES.register.* decorates"):
        suite_config("bare", {})
    assert "'bare' is no subclass of Suite" in json_schema()["$comment"]


def test_every_section_of_the_schema_is_described() -> None:
    schema = json_schema()
    sections = {"Config": schema, **schema["$defs"]}
    for section in ("Config", "RoleConfig", "RolesConfig", "TrainingConfig", "CorpusConfig", "ExtractionConfig"):
        for key, value in sections[section]["properties"].items():
            assert value.get("description"), f"{section}.{key}"


@pytest.mark.parametrize(
    "wrong",
    [
        "nonsense: 1",
        "training: {learning_rat: 1}",
        "training: {learning_rate: fast}",
        "training: {betas: [0.9, 1]}",
        "methods: {A: {method: clmm}}",
        "methods: {A: {method: fusellm, lambda: 2}}",
        "methods: {A: {method: clm, preset: corrected}}",
        "suites: {bhb: {}}",
        "suites: {bbh: {limit: 0}}",
        "roles: {sources: {a: {modle: x}}}",
        "extends: [main]",
    ],
)
def test_what_is_wrong_does_not_fit(wrong: str, checker: Checker) -> None:
    assert list(checker.errors(yaml.safe_load(wrong)))
