"""Whether the files and folders that a configuration names are there. Hub ids are not looked up."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from fusion.errors import UserError
from harness.config.errors import Problem, collecting
from harness.config.schema import CorpusConfig, DataConfig, TrainingConfig
from harness.data.corpus import check_corpus
from harness.models.catalogue import find_entry, is_hub_id, tiny_name, unknown_model
from harness.stages.trainer.sharding import zero_config

M = TypeVar("M", bound=BaseModel)


def reference_problems(raw: Mapping[str, Any]) -> list[Problem]:
    """Every file, folder and model of a configuration that is not on this machine and cannot be on the hub.

    raw: the configuration as keys and values; sections that do not hold are passed over.
    """
    problems: list[Problem] = []
    data = _valid(DataConfig, raw.get("data"))
    root = data.folder if data is not None else None
    if problem := missing_data_root(root):
        problems.append(problem)
        root = None  # a corpus that is only there is on the hub as far as this machine knows
    for key, section in _sections(raw):
        if (corpus := _valid(CorpusConfig, section)) is not None:
            with collecting(problems, *key, "path"):
                check_corpus(corpus, root)
        elif key[0] == "roles" and isinstance(model := section.get("model"), str):
            with collecting(problems, *key, "model"):
                _check_model(model, str(raw.get("profile")))
    training = _valid(TrainingConfig, raw.get("training"))
    if training is not None and training.deepspeed is not None:
        with collecting(problems, "training", "deepspeed"):
            zero_config(training.deepspeed)
    return problems


def missing_data_root(folder: Path | None) -> Problem | None:
    """The problem of a `data.root` that is no folder."""
    if folder is None or folder.expanduser().is_dir():
        return None
    return Problem(f"data.root {folder} is no folder: correct it.", ("data", "root"))


def _sections(value: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every section that may hold a corpus or a model, with its place."""
    for name, inner in value.items():
        key = (*above, str(name))
        if isinstance(inner, Mapping) and key[0] in ("corpus", "validation", "suites", "roles"):
            yield key, inner
            yield from _sections(inner, key)


def _valid(schema: type[M], section: Any) -> M | None:
    """The section of a configuration; None where it does not hold."""
    try:
        return schema.model_validate(section)
    except ValidationError:
        return None


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
