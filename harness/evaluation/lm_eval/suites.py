"""The suites of lm-eval's tasks: BIG-bench Hard, commonsense, generative tasks, and any task by name."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from fusion.errors import UserError, did_you_mean
from harness.evaluation.lm_eval.examples import mean_metrics
from harness.evaluation.lm_eval.task_suite import LmEvalConfig, LmEvalSuite, function_name
from harness.evaluation.lm_eval.tasks import index_tasks, index_tasks_of_file, lm_eval_version, task_folder, task_index
from harness.evaluation.suite import SUITES, chosen

# Metrics of lm-eval that are a number from 0 to 1 an example, shown in percent; others are shown as they are.
_SCORES = {"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "em", "f1"}


class BbhConfig(LmEvalConfig):
    """The configuration of `bbh`: that of every suite of lm-eval tasks, and the kind of prompt."""

    variant: Literal["cot_fewshot", "fewshot", "zeroshot", "cot_zeroshot"] = Field(
        "cot_fewshot", description="three examples with a chain of thought (the paper's), without, or no examples"
    )


@SUITES.register("bbh", parameters=BbhConfig, reference="Suzgun et al. 2022, arXiv 2210.09261")
class Bbh(LmEvalSuite):
    """BIG-bench Hard, 27 tasks, greedy."""

    name = "bbh"
    config: BbhConfig

    def _chosen(self) -> dict[str, tuple[str, Path]]:
        folder, prefix = task_folder() / "bbh" / self.config.variant, f"bbh_{self.config.variant}_"
        files = {path.stem: path for path in sorted(folder.glob("[!_]*.yaml"))}
        wanted = [name.removeprefix(prefix) for name in self.config.tasks] if self.config.tasks else None
        return {task: (prefix + task, files[task]) for task in chosen(wanted, list(files), self.name)}

    def metric(self, task: str) -> str:
        return "exact_match"

    def main_filter(self, filters: Sequence[str]) -> str:
        # What lm-eval's own groups of the zero-shot variants count.
        return "flexible-extract" if "flexible-extract" in filters else filters[0]


@SUITES.register(
    "commonsense",
    parameters=LmEvalConfig,
    reference="section 4.1 of arXiv 2401.10491; the metric of each task is the paper's",
)
class Commonsense(LmEvalSuite):
    """Five tasks, zero-shot, by likelihood."""

    name = "commonsense"
    example_bytes = 700.0  # four short choices
    _METRICS: ClassVar = {
        "arc_easy": "acc_norm",
        "arc_challenge": "acc_norm",
        "boolq": "acc",
        "hellaswag": "acc_norm",
        "openbookqa": "acc_norm",
    }
    _FILES: ClassVar = {
        "arc_easy": "arc/arc_easy.yaml",
        "arc_challenge": "arc/arc_challenge.yaml",
        "boolq": "super_glue/boolq/default.yaml",
        "hellaswag": "hellaswag/hellaswag.yaml",
        "openbookqa": "openbookqa/openbookqa.yaml",
    }

    def _chosen(self) -> dict[str, tuple[str, Path]]:
        tasks = chosen(self.config.tasks, list(self._FILES), self.name)
        return {task: (task, task_folder() / self._FILES[task]) for task in tasks}

    def metric(self, task: str) -> str:
        return self._METRICS[task]


@SUITES.register("generative", parameters=LmEvalConfig, reference="table 8 of arXiv 2401.10491")
class Generative(LmEvalSuite):
    """TriviaQA, DROP and LAMBADA, or whatever tasks of lm-eval are named."""

    name = "generative"
    _FILES: ClassVar = {
        "triviaqa": "triviaqa/default.yaml",
        "drop": "drop/default.yaml",
        "lambada_openai": "lambada/lambada_openai.yaml",
    }

    def _chosen(self) -> dict[str, tuple[str, Path]]:
        return {task: (task, self._file(task)) for task in dict.fromkeys(self.config.tasks or self._FILES)}

    def _file(self, task: str) -> Path:
        if task in self._FILES:
            return task_folder() / self._FILES[task]
        return find_task(task, task_index())


def find_task(name: str, index: Mapping[str, tuple[str, Path]]) -> Path:
    """The YAML file of a task. Raises UserError, with the nearest spelling, for a name that is no task of the index."""
    if name not in index:
        hint = did_you_mean(name, index)
        raise UserError(f"lm-eval {lm_eval_version()} has no task {name!r}{hint}: correct the name.")
    kind, path = index[name]
    if kind != "task":
        members = [other for other, (_, p) in index.items() if p.parent == path.parent and other != name]
        listed = f" ({', '.join(sorted(members)[:5])} ...)" if members else ""
        raise UserError(f"{name!r} is a {kind} of lm-eval's tasks: name the tasks themselves{listed}.")
    return path


class NamedTasksConfig(LmEvalConfig):
    """The configuration of the suite `lm_eval`."""

    tasks: list[str] = Field(min_length=1, description="names of lm-eval's tasks, or YAML files of tasks of your own")
    include_path: str | None = Field(None, description="folder with YAML files of tasks of your own, known by name")


@SUITES.register("lm_eval", parameters=NamedTasksConfig, reference="lm-eval's own tasks; each with its own metrics")
class NamedTasks(LmEvalSuite):
    """Any tasks of lm-eval by name, and tasks of one's own by name or YAML file."""

    name = "lm_eval"
    config: NamedTasksConfig

    def _chosen(self) -> dict[str, tuple[str, Path]]:
        own: dict[str, tuple[str, Path]] = {}
        if self.config.include_path is not None:
            folder = Path(self.config.include_path).expanduser()
            if not folder.is_dir():
                raise UserError(f"There is no folder {folder}: correct suites.lm_eval.include_path.")
            own = index_tasks(folder)
        tasks: dict[str, tuple[str, Path]] = {}
        for task in self.config.tasks:
            name, path = self._of_file(Path(task).expanduser()) if task.endswith((".yaml", ".yml")) else (task, None)
            if path is None:
                path = own[name][1] if own.get(name, ("",))[0] == "task" else find_task(name, task_index() | own)
            if tasks.setdefault(name, (name, path))[1] != path:
                raise UserError(f"Two YAML files define the task {name!r}: rename one of the tasks.")
        return tasks

    @staticmethod
    def _of_file(path: Path) -> tuple[str, Path]:
        """The name of the task that a YAML file defines, and the file."""
        if not path.is_file():
            raise UserError(f"There is no file {path}: correct the path of the task.")
        names = [name for name, (kind, p) in index_tasks_of_file(path).items() if kind == "task"]
        if len(names) != 1:
            raise UserError(f"{path} defines no task of lm-eval: give it a line `task: NAME`.")
        return names[0], path.absolute()

    def metric(self, task: str) -> str:
        source = self._sources[task]
        if source.config.get("class") is None:
            return self.recorded_name(task, super().metric(task))
        # A task that is a Python class names its metrics in its code alone.
        prepared = self._prepared[0].get(source.name)
        means = mean_metrics(prepared) if prepared else set()
        return self.recorded_name(task, next(iter(sorted(means)), super().metric(task)))

    def recorded_name(self, task: str, metric: str) -> str:
        if metric in _SCORES and self._higher_is_better(task, metric):
            return metric
        return f"{metric}:{'higher' if self._higher_is_better(task, metric) else 'lower'}"

    def _higher_is_better(self, task: str, metric: str) -> bool:
        """The direction of a metric: as the task's YAML states it, else as lm-eval registers it, else True."""
        from lm_eval.api.registry import HIGHER_IS_BETTER_REGISTRY

        source = self._sources[task]
        for entry in source.config.get("metric_list") or ():
            if function_name(str(entry["metric"])) == metric and entry.get("higher_is_better") is not None:
                return bool(entry["higher_is_better"])
        return bool(HIGHER_IS_BETTER_REGISTRY.get(metric, True))
