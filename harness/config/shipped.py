"""What ships with the harness and can be named: experiments and profiles."""

from collections.abc import Sequence
from typing import Any, Literal

from fusion.errors import UserError, did_you_mean
from harness.store.paths import PRESETS

ALL = "all"
"""In the place of an experiment's name: every experiment of the chosen profile."""


def names(kind: Literal["experiments", "profiles", "methods", "suites", "models"]) -> list[str]:
    """The names of a kind that can be given to the command, in alphabetical order; imports no method and no suite."""
    if kind == "methods":
        from baselines.registry import METHODS

        return METHODS.names()
    if kind == "suites":
        from harness.evaluation.suite import SUITES

        return SUITES.names()
    if kind == "models":
        from harness.models.catalogue import catalogue

        return sorted(catalogue())
    return sorted(path.stem for path in (PRESETS / kind).glob("*.yaml"))


def shipped(kind: Literal["experiments", "profiles"], name: str) -> Any:
    """An experiment's or a profile's YAML as an OmegaConf mapping. Raises UserError with the nearest spelling."""
    from omegaconf import OmegaConf

    known = names(kind)
    if name not in known:
        raise UserError(
            f"There is no {kind.removesuffix('s')} {name!r}{did_you_mean(name, known)}: {kind} are {', '.join(known)}"
            f"{', or give a YAML file' if kind == 'experiments' else ''}."
        )
    return OmegaConf.create((PRESETS / kind / f"{name}.yaml").read_text(encoding="utf-8"))


def choose_experiments(wanted: Sequence[str], profile: str | None) -> list[str]:
    """The experiments of a command line, each once; `all` stands for those with the profile that ship with the harness.

    Raises UserError for `all` without a profile, or with one that no experiment has.
    """
    experiments: list[str] = []
    for name in wanted:
        if name != ALL:
            experiments.append(name)
        elif profile is None:
            raise UserError("all means the experiments of one profile: add --profile NAME.")
        else:
            shipped("profiles", profile)
            experiments += [one for one in names("experiments") if profile in shipped("experiments", one).profiles]
    return list(dict.fromkeys(experiments))
