"""lm-eval's tasks as they are, on the data of this machine.

A small YAML file includes the task's own and names the local files; nothing else of the task is changed. Only the files
that are needed are read, since reading all 14,000 YAML files of lm-eval takes longer than many a task.
"""

import glob
import importlib.metadata
import importlib.util
import json
import os
import re
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.errors import UserError, message_line
from harness.data.hub import dataset_commit, dataset_fingerprint, offline_unless_reachable
from harness.evaluation.lm_eval.rows import (
    first_failing,
    first_line,
    naming_the_row,
    null_as_text,
    read_rows,
    refuse_cache,
    refuse_wide_integers,
    wrong_target,
)
from harness.evaluation.overflow import WrongRow
from harness.evaluation.quiet import quietly
from harness.evaluation.suite import LimitedConfig
from harness.runtime.progress import notify
from harness.store.fingerprint import file_sha256, fingerprint

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import ConfigurableTask

FEWSHOT_SEED = 1234  # lm-eval's own default
_FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}  # and what datasets calls them
_TASK_LINE = re.compile(rb"""^["']?(task|group|tag)["']?:[ ]*["']?([^"'\s\[{#][^"'\n#]*?)["']?[ ]*\r?$""", re.M)

_FUNCTION = re.compile(r'"(/[^"]+)\.\w+"')  # in a task's YAML: a module's path and a name in it


@dataclass(frozen=True)
class Overrides:
    """What is changed of a task; None leaves it as it is."""

    num_fewshot: int | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Source:
    """One task of lm-eval: its YAML file, and where its data are."""

    name: str
    yaml: Path
    config: dict[str, Any] = field(compare=False)
    files: dict[str, Path] = field(compare=False)
    """By split, on this machine; empty where only the hub has them."""
    overrides: Overrides
    expected: tuple[Path, ...] = field(default=(), compare=False)
    """The files below `data.root` (or relative to it) that would hold the data, where they are not on this machine."""

    @property
    def hub(self) -> str:
        """The data set and its configuration, for messages."""
        return f"{self.config.get('dataset_path')} ({self.config.get('dataset_name') or 'default'})"

    @property
    def revision(self) -> str:
        """The revision of the data set: main unless the task's YAML names another."""
        return str((self.config.get("dataset_kwargs") or {}).get("revision", "main"))

    @property
    def names_own_files(self) -> bool:
        """True if the task's YAML names its data files itself."""
        return bool((self.config.get("dataset_kwargs") or {}).get("data_files"))

    def identity(self) -> dict[str, Any]:
        """Everything that the prompts and targets depend on, as hashes and names. Raises UserError for absent files."""
        if absent := [path for path in self.files.values() if not path.is_file()]:
            data: Any = f"absent:{absent[0].name}"
        else:
            data = {split: file_sha256(path) for split, path in self.files.items()}
            data = data or dataset_fingerprint(str(self.config.get("dataset_path")), self.revision)
        return {
            "task": self.name,
            "definition": _definition(self),
            "lm_eval": lm_eval_version(),
            "data": data,
            "num_fewshot": self.overrides.num_fewshot,
            "max_new_tokens": self.overrides.max_new_tokens,
        }


def _definition(source: Source) -> str:
    """SHA-256 of a task: its configuration with all includes, the Python files beside it, and those it names."""
    folder = source.yaml.parent
    config = json.dumps(source.config, sort_keys=True, default=str)
    modules = {*folder.glob("*.py"), *(Path(f"{name}.py") for name in _FUNCTION.findall(config))}
    code = sorted(file_sha256(path) for path in modules if path.is_file())
    for place in (folder, task_folder()):
        config = config.replace(json.dumps(str(place))[1:-1], "")
    return fingerprint({"config": config, "code": code})


@dataclass(frozen=True)
class Prepared:
    """A task with its requests: those of each example, in the order of the rows."""

    source: Source
    task: "ConfigurableTask"
    examples: dict[str, list["Instance"]]

    def asks(self, line: Mapping[str, Any]) -> bool:
        """Whether the line of an example, stored before, answers a prompt of this task."""
        from lm_eval.utils import hash_string

        requests = self.examples.get(line["example"])
        return requests is not None and hash_string(str(requests[0].args[0])) == line["prompt_hash"]


def lm_eval_version() -> str:
    """The version of the installed lm-eval."""
    return importlib.metadata.version("lm_eval")


def task_folder() -> Path:
    """lm-eval's folder of tasks, without importing it."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "tasks"


@cache
def task_index() -> dict[str, tuple[str, Path]]:
    """Every name of lm-eval: its kind (task, group or tag), and a YAML file that defines it."""
    return index_tasks(task_folder())


def index_tasks(folder: Path) -> dict[str, tuple[str, Path]]:
    """Every name that a YAML file in the folder, or below it, defines: its kind (task, group or tag), and the file."""
    index: dict[str, tuple[str, Path]] = {}
    for parent, _, names in os.walk(folder):
        for name in sorted(names):
            if name.endswith((".yaml", ".yml")):
                for task, definition in index_tasks_of_file(Path(parent, name)).items():
                    index.setdefault(task, definition)
    return index


def index_tasks_of_file(path: Path) -> dict[str, tuple[str, Path]]:
    """Every name that one YAML file defines, as `index_tasks` gives it."""
    return {value.decode(): (kind.decode(), path) for kind, value in _TASK_LINE.findall(path.read_bytes())}


def find_source(name: str, yaml: Path, data_root: Path | None, overrides: Overrides) -> Source:
    """A task and where its data are.

    Raises UserError when the YAML file cannot be read, and when `data_root` has the data set but not a split that the
    task needs.
    """
    from lm_eval.tasks._yaml_loader import load_yaml
    from yaml import YAMLError

    try:
        config = load_yaml(yaml, resolve_func=False)
    except (YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{yaml} does not define a task of lm-eval ({message_line(error)}): correct the file."
        ) from None
    if (config.get("dataset_kwargs") or {}).get("data_files"):
        return Source(name, yaml, config, _own_files(config, yaml), overrides)
    hub, configuration = str(config.get("dataset_path")), config.get("dataset_name")
    splits = _needed_splits(config, overrides)
    files = {split: local_split(hub, configuration, split, data_root, f"the task {name}") for split in splits}
    here = {split: path for split, path in files.items() if path is not None}
    folder = (data_root.expanduser() if data_root else Path()) / hub / (configuration or "default")
    expected = () if here else tuple(folder / f"{split}.parquet" for split in splits)
    return Source(name, yaml, config, here, overrides, expected)


def _own_files(config: dict[str, Any], yaml: Path) -> dict[str, Path]:
    """The data files that a task's YAML names, by split; relative ones are beside the YAML or in the current folder.

    Raises UserError for several files a split, which are not supported.
    """
    named = config["dataset_kwargs"]["data_files"]
    by_split = named if isinstance(named, dict) else {"train": named}
    files: dict[str, Path] = {}
    for split, value in by_split.items():
        several = value if isinstance(value, list) else [value]
        if len(several) != 1 or any(sign in str(several[0]) for sign in ("*", "?", "://")):
            raise UserError(f"{yaml} names data_files = {value!r} for {split}: name one local file a split.")
        path = Path(str(several[0])).expanduser()
        beside = yaml.parent / path
        files[str(split)] = beside if beside.exists() or not path.exists() else path.absolute()
    return files


def local_split(hub: str, configuration: str | None, split: str, data_root: Path | None, reader: str) -> Path | None:
    """The file below `data_root` with a split of a hub's data set; None where only the hub has it.

    Raises UserError when the data set is there but not this split, naming the file that `reader` expects.
    """
    folder = data_root.expanduser() / hub if data_root else None
    if folder is None or not folder.is_dir():
        return None
    files = [folder / (configuration or "default") / f"{split}{suffix}" for suffix in _FORMATS]
    existing = next((path for path in files if path.exists()), None)
    if existing is None:
        raise UserError(f"{files[0]} (or .jsonl) is missing, which {reader} reads: put it there, or leave that out.")
    return existing


def load_rows(hub: str, configuration: str, split: str, path: Path | None) -> list[dict[str, Any]]:
    """All rows of a split, from `path` or else the hub. Raises UserError when they cannot be had."""
    import datasets

    if path is not None:
        return read_rows(path)
    with quietly(), offline_unless_reachable():
        try:
            return list(datasets.load_dataset(hub, configuration, split=split, revision=dataset_commit(hub)))
        except Exception as error:  # whatever datasets and its readers raise
            refuse_cache(error)
            raise UserError(
                f"The rows of {hub} ({configuration}, {split}) cannot be read ({first_line(error)}): set data.root to "
                f"a folder with {hub}/{configuration}/{split}.parquet."
            ) from None


def _needed_splits(config: dict[str, Any], overrides: Overrides) -> list[str]:
    """The split that is evaluated, and that of the few-shot examples where they come from one."""
    shots = config.get("num_fewshot") if overrides.num_fewshot is None else overrides.num_fewshot
    of_shots = config.get("fewshot_config") or {}
    needed = [_evaluated_split(config)]
    if shots and not of_shots.get("samples"):
        order = ("training_split", "validation_split", "test_split")  # lm-eval's own rule where none is named
        named = of_shots.get("split") or config.get("fewshot_split")
        needed.append(named or next(config[split] for split in order if config.get(split)))
    return [str(split) for split in dict.fromkeys(needed) if split]


def _evaluated_split(config: dict[str, Any]) -> str:
    return str(config.get("test_split") or config.get("validation_split") or "")


def _include(source: Source, folder: Path) -> dict[str, Any]:
    """The YAML that includes the task's own and changes what must be changed.

    folder: for what is needed only while rows are read. Files of rows are given by links there, since `datasets` takes
    a path for a pattern or an address, and its cache of them is there, since they are here already.
    """
    rows = Path(tempfile.mkdtemp(dir=folder))
    changed: dict[str, Any] = {"include": str(source.yaml), "task": source.name}
    data_files: dict[str, str] = {}
    for split, path in source.files.items():
        link = rows / f"{len(data_files)}{path.suffix}"
        link.symlink_to(path.absolute())
        data_files[split] = glob.escape(str(link))
    local = {"data_files": data_files, "cache_dir": str(rows / "cache")}
    if source.names_own_files:
        changed["dataset_kwargs"] = {**source.config["dataset_kwargs"], **local}
    elif source.files:
        kinds = {_FORMATS[path.suffix] for path in source.files.values()}
        if len(kinds) > 1:
            raise UserError(f"The splits of {source.hub} are partly Parquet, partly JSON: give all in one format.")
        changed |= {
            "dataset_path": kinds.pop(),
            "dataset_name": None,
            "dataset_kwargs": local,
        }
        for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
            if source.config.get(key) and source.config[key] not in source.files:
                changed[key] = None
    elif commit := dataset_commit(str(source.config.get("dataset_path")), source.revision):
        changed["dataset_kwargs"] = {**(source.config.get("dataset_kwargs") or {}), "revision": commit}
    if source.overrides.num_fewshot is not None:
        changed["num_fewshot"] = source.overrides.num_fewshot
    if source.overrides.max_new_tokens is not None and source.config.get("output_type") == "generate_until":
        given = source.config.get("generation_kwargs") or {"until": ["\n\n"], "do_sample": False}
        changed["generation_kwargs"] = {**given, "max_gen_toks": source.overrides.max_new_tokens}
    return changed


def prepare(sources: Sequence[Source], config: LimitedConfig) -> tuple[dict[str, Prepared], dict[str, str]]:
    """By name, the tasks with the requests of the rows that `config` takes, and the reasons why others are unavailable.

    Raises UserError for data on this machine that do not hold what the task reads.
    """
    from lm_eval.tasks import TaskManager

    prepared: dict[str, Prepared] = {}
    missing: dict[str, str] = {}
    for source in sources:
        if absent := [path for path in source.files.values() if not path.is_file()]:
            missing[source.name] = f"its data file {absent[0]} does not exist"
    sources = [source for source in sources if source.name not in missing]
    with tempfile.TemporaryDirectory() as folder, quietly():
        for number, source in enumerate(sources):
            # JSON is YAML, and quotes everything.
            Path(folder, f"{number}.yaml").write_text(json.dumps(_include(source, Path(folder))), encoding="utf-8")
        manager = TaskManager(include_defaults=False, include_path=[folder])
        for source in sources:
            try:
                with nullcontext() if source.files else offline_unless_reachable():
                    prepared[source.name] = _prepared(source, manager.load([source.name])["tasks"][source.name], config)
            except Exception as error:  # whatever a task's own code raises
                for path in source.files.values():
                    if path.suffix in _FORMATS:
                        refuse_wide_integers(path, read_rows(path))  # says what is wrong with the file, if that is it
                refuse_cache(error, "TMPDIR" if source.files else "HF_DATASETS_CACHE")
                if source.files:
                    raise _unusable(source, error) from None
                missing[source.name] = _unavailable(source, first_line(error))
    return prepared, missing


def _unusable(source: Source, error: Exception) -> UserError:
    """The error for rows on this machine that a task cannot use, with the row where it can be found."""
    from lm_eval.tasks._yaml_loader import load_yaml

    path = source.files.get(_evaluated_split(source.config))
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    if frame.f_code.co_qualname == "ConfigurableTask.__init__" and frame.f_locals.get("choice") == "":
        error = WrongRow("row 1: one of its choices is empty")  # lm-eval looks at the first letter of each
    process = None if isinstance(error, WrongRow) else load_yaml(source.yaml).get("process_docs")
    if path and process is not None and (number := first_failing(read_rows(path), process)):
        error = WrongRow(f"row {number}: {first_line(error)}")
    if path and isinstance(error, WrongRow):
        return UserError(
            f"The task {source.name} cannot use the rows of {path} ({error}): correct that row, or give all "
            f"the columns of {source.hub}."
        )
    listed = ", ".join(str(path) for path in source.files.values())
    return UserError(
        f"The task {source.name} cannot use the rows of {listed} ({first_line(error)}): give them the columns of "
        f"{source.hub}."
    )


def _unavailable(source: Source, reason: str) -> str:
    """Why the data of a task cannot be had, and the file that is expected."""
    text = f"its data, {source.hub}, are neither on this machine nor on the hub ({reason})"
    if not source.expected:
        return text
    path = source.expected[0]
    where = f"put them into {path}" if path.is_absolute() else f"set data.root to a folder that holds {path}"
    return f"{text}; {where}"


def _prepared(source: Source, task: Any, config: LimitedConfig) -> Prepared:
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(FEWSHOT_SEED)
    # From the first row on, whatever is wanted: lm-eval draws few-shot examples one row after the other.
    with naming_the_row(task):
        task.build_all_requests(limit=config.limit if config.limit_by == "first" else None)
    examples: dict[str, list[Any]] = {}
    for instance in task.instances:
        examples.setdefault(f"{instance.doc_id:05d}", []).append(instance)
    names = list(examples)
    taken = {names[i]: examples[names[i]] for i in config.taken(names)}
    for name, requests in taken.items():
        if reason := wrong_target(task, requests[0].doc) or null_as_text(task, requests[0].doc):
            if source.files:
                raise WrongRow(f"row {int(name) + 1}: {reason}")
            notify(f"{source.name}: row {int(name) + 1} of {source.hub} is asked as lm-eval has it, though {reason}.")
            break
    return Prepared(source, task, taken)
