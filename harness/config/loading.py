"""Loading a configuration: YAML layers merged by OmegaConf, rows written out, the result validated.

Precedence: `--set` > user's file > what that file extends > profile > shipped experiment > defaults. The resolved
configuration says everything; it is stored with every artifact and printed by `fusellm experiment show`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from harness.config.errors import ConfigurationError, Problem, collecting
from harness.config.layers import Layer, is_file, place_of, setting_layer, user_layers
from harness.config.references import reference_problems
from harness.config.schema import Config
from harness.config.shipped import shipped
from harness.config.templates import completed_roles, expanded_rows
from harness.config.validation import resolve
from harness.store.paths import PRESETS

_OWN = "own"  # the profile of a user's file that names none


def load(
    name: str,
    *,
    profile: str | None = None,
    overrides: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> Config:
    """The resolved configuration of an experiment's name or of a user's YAML file.

    A user's file may say `extends: NAME` to start from an experiment that ships with the harness or `extends: FILE` to
    start from another file, and `profile: NAME`; without either it stands alone. A source, row or suite that is null is
    left out. Raises UserError; a `ConfigurationError` names every unknown key and wrong value in one sentence each.
    """
    return _load(_written(name), profile, overrides, seeds)[0]


def validate(
    names: Sequence[str], profile: str | None = None, overrides: Sequence[str] = (), seeds: Sequence[int] = ()
) -> dict[str, list[Problem]]:
    """Every problem of the experiments and files, by name; an empty list where there is none.

    Beside what `load` refuses these are files, folders and models that are named and not there (hub ids are not looked
    up). Without a profile an experiment is checked in each of its profiles.
    """
    problems: dict[str, list[Problem]] = {}
    for name in names:
        collected: list[Problem] = []
        with collecting(collected):
            written = _written(name)
            profiles: Sequence[str | None] = [profile] if profile else written.profiles or [None]
            for one in profiles:
                with collecting(collected):
                    config, layers = _load(written, one, overrides, seeds)
                    collected += [_placed(problem, layers) for problem in reference_problems(config)]
        problems[name] = list(dict.fromkeys(collected))  # most problems are those of every profile
    return problems


@dataclass(frozen=True)
class _Written:
    """An experiment as its files have it."""

    name: str
    shipped: Any
    """The shipped experiment that it is or extends, as an OmegaConf mapping."""
    user: Sequence[Layer]
    """The user's files, the one that was asked for last."""

    @property
    def profiles(self) -> list[str]:
        """The profiles that it can be run in; [] where it does not say, or says something else."""
        from omegaconf import OmegaConf

        chosen = [layer.values["profile"] for layer in self.user if isinstance(layer.values.get("profile"), str)]
        if chosen:
            return chosen[-1:]
        profiles: Any = OmegaConf.to_container(OmegaConf.create({"profiles": self.shipped.get("profiles", [])}))
        return [str(profile) for profile in profiles["profiles"]]


def _written(name: str) -> _Written:
    from omegaconf import OmegaConf

    if not is_file(name):
        experiment = shipped("experiments", name)
        experiment.experiment = name
        return _Written(name, experiment, ())
    user, extended = user_layers(Path(name))
    user[-1].values.setdefault("experiment", Path(name).stem)
    return _Written(name, shipped("experiments", extended) if extended else OmegaConf.create({}), user)


def _load(
    written: _Written, profile: str | None, overrides: Sequence[str], seeds: Sequence[int]
) -> tuple[Config, Sequence[Layer]]:
    """The configuration, and the layers that a user wrote."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    name = written.name
    user = list(written.user)
    place = f"The configuration of {name}"
    try:
        experiment: Any = OmegaConf.merge(written.shipped)  # a copy
        per_profile = experiment.pop("per_profile", {})
        own = [layer.values.get("profile") for layer in reversed(user)]
        chosen = profile or next(filter(None, own), None) or experiment.get("profiles", [_OWN])[0]
        layers = [OmegaConf.create((PRESETS / "defaults.yaml").read_text(encoding="utf-8")), experiment]
        if chosen != _OWN:
            layers.append(shipped("profiles", str(chosen)))
        layers.append(per_profile.get(str(chosen), {}))
        merged = OmegaConf.merge(*layers, *(layer.values for layer in user))
        for item in overrides:
            place = f"--set {item}"
            user.append(setting_layer(item))
            merged = OmegaConf.merge(merged, user[-1].values)
        place = f"The configuration of {name}"
        merged.profile = chosen
        if seeds:
            merged.seeds = list(seeds)
        raw: Any = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserError(f"{place} does not hold: {str(error).splitlines()[0]}.") from None
    except TypeError:  # what OmegaConf raises for these two
        raise UserError(f"{place} has a list where keys and values belong, or the other way round.") from None
    raw.pop("protocols", None)  # what experiments took from it is in their suites
    try:
        return _resolved(raw, name), user
    except ConfigurationError as error:
        raise ConfigurationError(name, [_placed(problem, user) for problem in error.problems]) from None


def _resolved(raw: dict[str, Any], name: str) -> Config:
    """The configuration of merged layers. Raises ConfigurationError with every mistake."""
    profiles = raw.setdefault("profiles", [raw["profile"]])
    problems: list[Problem] = []
    if not isinstance(profiles, list):
        sentence = f"The configuration of {name} has profiles = {profiles!r}, which must be a list."
        problems.append(Problem(sentence, ("profiles",)))
    elif raw["profile"] not in profiles:
        known = ", ".join(map(str, profiles))
        raise UserError(f"The experiment {name} has no profile {raw['profile']!r}: its profiles are {known}.")
    for key in (("roles",), ("roles", "sources"), ("roles", "target"), ("roles", "teacher"), ("methods",)):
        problems += _mapping_problems(raw, key, name)
    if problems:
        raise ConfigurationError(name, problems)
    if raw.get("roles"):
        raw["roles"] = completed_roles(raw["roles"], raw.get("corpus"))
    if raw.get("methods"):
        raw["methods"] = expanded_rows(raw["methods"], raw.get("roles") or {})
    return resolve(raw, name)


def _mapping_problems(raw: Mapping[str, Any], key: tuple[str, ...], name: str) -> list[Problem]:
    """A problem where `key` holds something else than keys and values, or is a list of such and holds one."""
    value: Any = raw
    for part in key:
        value = value.get(part) if isinstance(value, dict) else None
    values = {key: value}
    if isinstance(value, dict) and key in (("methods",), ("roles", "sources")):
        values |= {(*key, str(label)): entry for label, entry in value.items()}
    return [
        Problem(f"The configuration of {name} has {'.'.join(at)} = {one!r}, which must hold keys and values.", at)
        for at, one in values.items()
        if one is not None and not isinstance(one, dict)
    ]


def _placed(problem: Problem, layers: Sequence[Layer]) -> Problem:
    return replace(problem, place=place_of(problem.key, layers))
