"""Registries whose parts a test adds to, put back afterwards."""

from typing import Any

import pytest

from fusion.registry import Registry


def restore_after(monkeypatch: pytest.MonkeyPatch, *registries: Registry[Any]) -> None:
    """What is registered from here on is forgotten when `monkeypatch` is undone."""
    for registry in registries:
        for name in registry._own:  # a module registers once, when it is first imported: that must not be forgotten
            registry.part(name)
        monkeypatch.setattr(registry, "_parts", dict(registry._parts))
