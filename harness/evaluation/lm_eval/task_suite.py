"""A suite that is made of lm-eval's tasks: what all such suites have in common."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from harness.evaluation.evaluated_model import EvaluatedModel
from harness.evaluation.lm_eval.examples import (
    EXAMPLES,
    mean_metrics,
    read_examples,
    read_overflows,
    scored_line,
    stored_answers,
)
from harness.evaluation.lm_eval.parts import AnswerParts, Lines
from harness.evaluation.lm_eval.requests import answer_requests, drop_unanswerable, no_room, settled_batch_size
from harness.evaluation.lm_eval.rows import first_line
from harness.evaluation.lm_eval.tasks import Overrides, Prepared, Source, find_source, prepare
from harness.evaluation.overflow import SKIPPED, OverflowRule, WrongRow, overflow_result
from harness.evaluation.suite import (
    NO_VOTE,
    NONE_FITS,
    Example,
    LimitedConfig,
    StoredAnswer,
    Suite,
    SuiteResult,
    Unfinished,
    read_lines,
    take_over,
)
from harness.evaluation.vote import Answers, chosen_indices, voted
from harness.runtime.progress import notify
from harness.store.artifacts import Spec, Store
from harness.store.costs import Costs
from harness.store.fingerprint import fingerprint
from harness.store.leases import Leases

VERSION = 5
_DEFAULT_METRICS = {"multiple_choice": "acc", "loglikelihood": "acc", "generate_until": "exact_match"}
_UNKNOWN_ROWS = 1000  # of a task whose rows are not on this machine, for estimates


class LmEvalConfig(LimitedConfig):
    """The configuration of a suite of lm-eval tasks; by default the tasks are as lm-eval defines them."""

    tasks: list[str] | None = Field(None, min_length=1, description="only these tasks. Default: all of the suite")
    num_fewshot: int | None = Field(None, ge=0, description="examples in the prompt. Default: the task's own number")
    max_new_tokens: int | None = Field(None, gt=0, description="longest answer (tokens). Default: the task's own")
    batch_size: int | Literal["auto"] = Field(
        "auto", description="answers generated at one time; changes no answer in float32"
    )
    seed: int = Field(0, ge=0, description="seed of tasks that sample their answers, and of `limit_by: seed`")
    overflow: OverflowRule = Field(
        "truncate_left",
        description="for prompt and answer that do not fit the context: truncate_left reads the prompt's end only, as "
        "lm-eval does; shrink_answer leaves less room for the answer; skip leaves the example out of all rows",
    )


class LmEvalSuite(Suite):
    """A suite of lm-eval tasks: one artifact a candidate and task, one line an example."""

    name: ClassVar[str]
    in_parts: ClassVar[bool] = True
    example_bytes: ClassVar[float] = 4000.0
    """Bytes of text that are read and written for one example, roughly, for estimates."""

    def __init__(self, config: LmEvalConfig, data_root: Path | None) -> None:
        self.config = config
        self._data_root = data_root
        self._tasks = self._chosen()

    def _chosen(self) -> dict[str, tuple[str, Path]]:
        """lm-eval's name of each task and its YAML file, by the task's name in tables."""
        raise NotImplementedError

    def metric(self, task: str) -> str:
        """The metric that is shown for a task: the first in its YAML that is a mean over examples."""
        source = self._sources[task]
        listed = [m for m in source.config.get("metric_list") or () if m.get("aggregation", "mean") == "mean"]
        if not listed:
            return _DEFAULT_METRICS.get(source.config.get("output_type", ""), "acc")
        return function_name(str(listed[0]["metric"]))

    def recorded_name(self, task: str, metric: str) -> str:
        """The name under which a metric of a task is recorded (see `results.metrics.measure`)."""
        return metric

    def main_filter(self, filters: Sequence[str]) -> str:
        """The filter (lm-eval's way to clean an answer) whose scores bear the plain name of their metric."""
        return filters[0]

    def task_metrics(self) -> dict[str, str]:
        return {task: self.metric(task) for task in self._tasks}

    @classmethod
    def answers(cls, folder: Path, metric: str) -> Iterator[StoredAnswer]:
        return stored_answers(folder, metric)

    def identity(self) -> dict[str, Any]:
        return {"version": VERSION, "tasks": {task: source.identity() for task, source in self._sources.items()}}

    @cached_property
    def _sources(self) -> dict[str, Source]:
        overrides = Overrides(self.config.num_fewshot, self.config.max_new_tokens)
        return {task: find_source(name, yaml, self._data_root, overrides) for task, (name, yaml) in self._tasks.items()}

    @cached_property
    def _prepared(self) -> tuple[dict[str, Prepared], dict[str, str]]:
        return prepare(list(self._sources.values()), self.config)

    def measure(self, evaluated: EvaluatedModel, store: Store, costs: Costs) -> SuiteResult:
        if evaluated.votes:
            return self._counted(evaluated, store, costs)
        specs = {task: self._spec(evaluated, task) for task in self._sources}
        missing = {} if store.dry else self._missing(evaluated, [t for t in specs if not store.path(specs[t]).exists()])
        paths: dict[str, Path] = {}
        for task, spec in specs.items():
            if task not in missing:
                answers = self._answers_to(task, evaluated, store)
                try:
                    paths[task] = store.ensure(
                        spec,
                        partial(self._finish, task, answers),
                        costs.forward(evaluated.parameters, self._rows(task) * self.example_bytes),
                        make_parts=answers.make,
                    )
                except Unfinished as error:
                    missing[task] = str(error)
        if not store.shares_only:
            for task, reason in missing.items():
                notify(f"{self.name} {evaluated.label}: {task} is left out, {reason}.")
        overflows = {} if store.deferred else {task: read_overflows(path, EXAMPLES) for task, path in paths.items()}
        return SuiteResult(
            examples=lambda: (e for task, path in paths.items() for e in read_examples(task, path)),
            artifacts=paths,
            fingerprints={task: specs[task].fingerprint for task in paths},
            missing=missing | {task: NONE_FITS for task, one in overflows.items() if one.asked == 0},
            dtype=evaluated.dtype,
            **overflow_result(evaluated.label, self.config.overflow, overflows),
        )

    def _counted(self, evaluated: EvaluatedModel, store: Store, costs: Costs) -> SuiteResult:
        """The result of a majority vote: each member is measured by itself, and their answers are counted."""
        results: list[tuple[SuiteResult, float]] = []
        for member, weight in evaluated.members:
            results.append((self.measure(member, store, costs), weight))
            member.release()
        missing = {task: why for result, _ in results for task, why in result.missing.items()}
        missing |= {task: NO_VOTE for task in self._sources if self._answers(task) is None}
        tasks = [task for task in self._sources if task not in missing]

        def examples() -> Iterator[Example]:
            for task in tasks:
                answers = self._answers(task)
                assert answers is not None
                given = [(read_lines(result.artifacts[task] / EXAMPLES), weight) for result, weight in results]
                yield from voted(task, given, answers)

        labels = [member.label for member, _ in evaluated.members]
        by_label = [(label, result) for label, (result, _) in zip(labels, results, strict=True)]
        return SuiteResult(
            examples,
            artifacts={f"{label} {task}": result.artifacts[task] for label, result in by_label for task in tasks},
            fingerprints={
                task: fingerprint([evaluated.fingerprint, *(result.fingerprints[task] for _, result in by_label)])
                for task in tasks
            },
            missing=missing,
            notes=[note for result, _ in results for note in result.notes],
            skipped={
                task: sorted({e for result, _ in results for e in result.skipped.get(task, ())}) for task in tasks
            },
        )

    def _answers(self, task: str) -> Answers | None:
        """The function that extracts the answers of a task for a vote; None for a task without answers."""
        kind = self._sources[task].config.get("output_type")
        return {"multiple_choice": chosen_indices, "generate_until": self._texts}.get(str(kind))

    def _texts(self, line: Mapping[str, Any]) -> dict[str, Any]:
        filters = list(line["filtered"])
        by_metric = {metric: metric.partition(",")[2] or self.main_filter(filters) for metric in line["scores"]}
        return {metric: line["filtered"][name] for metric, name in by_metric.items()}

    def _spec(self, evaluated: EvaluatedModel, task: str) -> Spec:
        return Spec(
            self.name,
            f"{evaluated.label}-{task}",
            VERSION,
            {"model": evaluated.fingerprint, "task": self._sources[task].identity()},
            {
                **self.config.limit_identity(),
                "seed": self.config.seed,
                "overflow": self.config.overflow,
                **evaluated.computing,
            },
            {
                "candidate": evaluated.label,
                "batch_size": self.config.batch_size,
                "batch_tokens": evaluated.batch_tokens,
            },
        )

    def _rows(self, task: str) -> int:
        """Rows of the task's data on this machine, or a constant where they are not known, for estimates."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        files = [path for path in self._sources[task].files.values() if path.suffix == ".parquet"]
        rows = _UNKNOWN_ROWS
        if files:
            with suppress(pa.ArrowInvalid):  # a damaged file, which is refused by name when it is read
                rows = pq.read_metadata(files[0]).num_rows
        return min(rows, self.config.limit or rows)

    def _missing(self, evaluated: EvaluatedModel, tasks: Sequence[str]) -> dict[str, str]:
        """The reason why each task that cannot be run cannot, without loading the model."""
        if not tasks:
            return {}
        prepared, unavailable = self._prepared
        reasons = {}
        for task in tasks:
            name = self._sources[task].name
            if reason := (
                unavailable.get(name)
                or _unfit(prepared[name])
                or no_room(prepared[name], evaluated.context, self.config.overflow)
            ):
                reasons[task] = reason
        return reasons

    def _answers_to(self, task: str, evaluated: EvaluatedModel, store: Store) -> AnswerParts:
        """The answers of a model to a task, in parts."""
        spec = self._spec(evaluated, task)

        def sizes() -> dict[str, int]:
            return {example: len(requests) for example, requests in self._prepared_task(task).examples.items()}

        def known(folder: Path) -> dict[str, Lines]:
            lines = take_over(store, spec, folder, EXAMPLES, self._prepared_task(task).asks)
            return {line["example"]: {EXAMPLES: [line]} for line in lines}

        description = f"{self.name} {evaluated.label} {task}"
        return AnswerParts(description, sizes, partial(self._answer, task, evaluated), known, (EXAMPLES, SKIPPED))

    def _prepared_task(self, task: str) -> Prepared:
        return self._prepared[0][self._sources[task].name]

    def _finish(self, task: str, answers: AnswerParts, folder: Path) -> None:
        """Joins the parts of the answers to a task. Raises Unfinished where some could not be made."""
        if failures := answers.failures:
            n, rows = len(failures), sum(map(len, answers.parts))
            raise Unfinished(f"{n} of {rows} examples cannot be scored (first {failures[min(failures)]}")
        answers.join(folder)

    def _answer(
        self, task: str, evaluated: EvaluatedModel, folder: Path, leases: Leases, examples: Sequence[str], known: Lines
    ) -> tuple[Lines, dict[str, str]]:
        """The lines of examples of a task, and the reason for every one that could not be answered or scored."""
        prepared, config = self._prepared_task(task), self.config
        lines = {file: {line["example"]: line for line in known.get(file, [])} for file in (EXAMPLES, SKIPPED)}
        pending = {e: prepared.examples[e] for e in examples if not any(e in some for some in lines.values())}
        if not pending:
            return known, {}
        lm = evaluated.lm(batch_size=config.batch_size, seed=config.seed, overflow=config.overflow)
        if generating := [r for some in prepared.examples.values() for r in some if r.request_type == "generate_until"]:
            lm.rows = settled_batch_size(folder, leases, lambda: lm.fitting_rows(generating))
        failures: dict[str, str] = {}

        def failed(example: str, error: Exception) -> None:
            if isinstance(error, WrongRow):
                failures[example] = f"row {int(example) + 1}, {error}); correct that row"
            else:
                failures[example] = (
                    f"{example}, {first_line(error)}); the others are kept, and the same command tries these again"
                )

        def dropped(example: str, overflow: dict[str, int]) -> None:
            lines[SKIPPED][example] = {"example": example, "overflow": overflow}

        overflows = drop_unanswerable(lm, pending, dropped)

        def finished(example: str) -> None:
            try:
                line = scored_line(
                    prepared, example, self.main_filter, partial(self.recorded_name, task), lm.end_tokens
                )
            except Exception as error:  # whatever a task's own code raises about this answer
                failed(example, error)
                return
            lines[EXAMPLES][example] = {**line, "overflow": overflows.get(example)}

        answer_requests(lm, pending, finished, failed)
        return {file: [some[e] for e in examples if e in some] for file, some in lines.items()}, failures


def function_name(metric: str) -> str:
    """The name of a metric in a YAML file, where a function is named by its path."""
    return metric.rsplit(".", 1)[-1] if "/" in metric else metric


def _unfit(prepared: Prepared) -> str | None:
    """The reason why a task can be run for no model here; None for a task that can."""
    if getattr(prepared.task, "UNSAFE_CODE", False):
        return "it runs what a model writes outside of any sandbox"
    if getattr(prepared.task, "MULTIMODAL", False):
        return "it needs more than text"
    return None if mean_metrics(prepared) else "none of its metrics is a mean over examples"
