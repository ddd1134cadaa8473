"""Whether the files and folders that a configuration names are there. Hub ids are not looked up."""

from collections.abc import Iterator
from pathlib import Path

from fusion.errors import UserError
from harness.config.errors import Problem, collecting
from harness.config.schema import Config, CorpusConfig
from harness.data.corpus import is_on_hub
from harness.models.catalogue import find_entry, is_hub_id, tiny_name, unknown_model
from harness.stages.sharding import zero_config


def reference_problems(config: Config) -> list[Problem]:
    """Every file, folder and model of the configuration that is not on this machine and cannot be on the hub."""
    problems: list[Problem] = []
    root = config.data.folder
    if root is not None and not root.expanduser().is_dir():
        problems.append(Problem(f"data.root {root} is no folder: correct it.", ("data", "root")))
        root = None  # a corpus that is only there is on the hub as far as this machine knows
    for key, corpus in _corpora(config):
        with collecting(problems, *key, "path"):
            is_on_hub(corpus, root)
    for name, role in config.roles.by_name().items():
        key = ("roles", *(("sources",) if name in config.roles.sources else ()), name, "model")
        with collecting(problems, *key):
            _check_model(role.model, config.profile)
    if config.training.deepspeed is not None:
        with collecting(problems, "training", "deepspeed"):
            zero_config(config.training.deepspeed)
    return problems


def _corpora(config: Config) -> Iterator[tuple[tuple[str, ...], CorpusConfig]]:
    yield ("corpus",), config.corpus
    if config.validation is not None:
        yield ("validation",), config.validation
    for suite, settings in config.suites.items():
        for key, value in settings:
            if isinstance(value, CorpusConfig):
                yield ("suites", suite, key), value
    for name, role in config.roles.by_name().items():
        if role.corpus is not None:
            yield ("roles", *(("sources",) if name in config.roles.sources else ()), name, "corpus"), role.corpus


def _check_model(name: str, profile: str) -> None:
    """Raises UserError for a model that is neither in the catalogue, nor here, nor can be on the hub."""
    if (tiny := tiny_name(name)) is not None:
        from harness.models.tiny import tiny_recipe

        tiny_recipe(profile).model(tiny)
    elif name.endswith(".gguf"):
        if not Path(name).expanduser().is_file():
            raise UserError(f"There is no file {name}: give the path of a .gguf file, or a model's name.")
    elif not (find_entry(name) or Path(name).expanduser().is_dir() or is_hub_id(name)):
        raise unknown_model(name)
