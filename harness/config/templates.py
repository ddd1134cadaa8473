"""What an experiment leaves open by name: rows such as `{sources}`, and the texts that roles are continued on."""

from collections.abc import Mapping
from typing import Any

from fusion.errors import UserError
from harness.models.catalogue import tiny_name

_SOURCE = "{source}"  # in a row's label and parameters: the row is there once for every source


def expanded_rows(methods: Mapping[str, Any], roles: Any) -> dict[str, Any]:
    """The rows with `{target}`, `{teacher}`, `{sources}`, `{source}` written out by name, without those that are null.

    `{target}` and `{teacher}` are called as their models, and `{teacher}` is left out where there is none; `{sources}`
    is one row for each source. What has the wrong structure is left as it is, for the validation to refuse. Raises
    UserError where two rows would have one label.
    """
    rows: dict[str, Any] = {label: entry for label, entry in methods.items() if not isinstance(entry, dict | None)}
    sound = {name: role for name, role in roles.items() if isinstance(role, dict)} if isinstance(roles, dict) else {}
    sources = list(sound.get("sources", {}))
    for label, entry in methods.items():
        if not isinstance(entry, dict) or (label == "{teacher}" and not sound.get("teacher")):
            continue
        if label in ("{target}", "{teacher}"):
            role = label.strip("{}")
            model = str(sound.get(role, {}).get("model", role))
            expanded = {_short(model): {**entry, "role": role}}
        elif label == "{sources}":
            expanded = {source: {**entry, "role": source} for source in sources}
        elif _SOURCE in str(label):
            expanded = {label.replace(_SOURCE, source): _with_source(entry, source) for source in sources}
        else:
            expanded = {str(label): dict(entry)}
        if taken := sorted(rows.keys() & expanded.keys()):
            raise UserError(f"Two rows of the table would be called {taken[0]!r}: rename the source or the method.")
        rows |= expanded
    return rows


def completed_roles(roles: Mapping[str, Any], corpus: Mapping[str, Any] | None) -> dict[str, Any]:
    """The roles without sources that are null; a role's corpus takes the keys that it lacks from `corpus`."""
    completed = {name: _completed(role, corpus) for name, role in roles.items() if name != "sources"}
    if "sources" in roles:
        sources = completed["sources"] = roles["sources"]
        if sources and isinstance(sources, dict):
            kept = {name: _completed(role, corpus) for name, role in sources.items() if role is not None}
            completed["sources"] = kept
    return {name: completed[name] for name in roles}


def _completed(role: Any, corpus: Mapping[str, Any] | None) -> Any:
    if isinstance(role, dict) and isinstance(role.get("corpus"), dict):
        return {**role, "corpus": {**(corpus or {}), **role["corpus"]}}
    return role


def _with_source(value: Any, source: str) -> Any:
    if isinstance(value, dict):
        return {key: _with_source(item, source) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_source(item, source) for item in value]
    return value.replace(_SOURCE, source) if isinstance(value, str) else value


def _short(model: str) -> str:
    return (tiny_name(model) or model).rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")
