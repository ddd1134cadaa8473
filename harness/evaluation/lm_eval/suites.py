"""The suites that are made of lm-eval's tasks: bbh, commonsense, and any other task by name.

Every example is written down as soon as all its requests are answered, so that a kill costs only what was under way.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, Field

from fusion.errors import UserError, did_you_mean
from harness.evaluation.lm_eval.tasks import (
    Overrides,
    Prepared,
    Source,
    find_source,
    lm_eval_version,
    prepare,
    task_folder,
    task_index,
)
from harness.evaluation.suite import (
    NO_VOTE,
    SUITES,
    EvaluatedModel,
    Example,
    Section,
    SuiteResult,
    append_line,
    chosen,
    ensure_jointly,
    kept_lines,
    read_lines,
)
from harness.evaluation.vote import Answers, choices, voted
from harness.runtime.progress import notify, track
from harness.store.artifacts import Spec, Store
from harness.store.costs import Costs
from harness.store.fingerprint import fingerprint

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

VERSION = 1
EXAMPLES = "examples.jsonl"
_DEFAULT_METRICS = {"multiple_choice": "acc", "loglikelihood": "acc", "generate_until": "exact_match"}
_UNKNOWN_ROWS = 1000  # of a task whose rows are not here, for estimates


class LmEvalConfig(Section):
    """What can be set of a suite of lm-eval tasks; without anything the tasks are as lm-eval has them."""

    tasks: list[str] | None = Field(None, min_length=1, description="only these tasks; all of the suite's without")
    limit: int | None = Field(None, gt=0, description="only the first so many rows of each task")
    num_fewshot: int | None = Field(None, ge=0, description="examples in the prompt; the task's own number without")
    max_new_tokens: int | None = Field(None, gt=0, description="longest answer (tokens); the task's own without")
    batch_size: int | Literal["auto"] = Field("auto", description="answers generated at one time; changes no answer")
    seed: int = Field(0, ge=0, description="of tasks that sample their answers")


class LmSuite:
    """A suite of lm-eval tasks: one artifact a candidate and task, one line an example."""

    name: ClassVar[str]
    schema: ClassVar[type[BaseModel]] = LmEvalConfig
    example_bytes: ClassVar[float] = 4000.0
    """Of text that is read and written for one example, about, for estimates."""

    def __init__(self, section: LmEvalConfig, data_root: Path | None) -> None:
        self.section = section
        self._data_root = data_root
        self._tasks = self._chosen()

    def _chosen(self) -> dict[str, tuple[str, Path]]:
        """By the name in the table: lm-eval's name of the task, and its YAML file."""
        raise NotImplementedError

    def metric(self, task: str) -> str:
        """The one that is shown for a task."""
        source = self._sources[task]
        listed = [m for m in source.config.get("metric_list") or () if m.get("aggregation", "mean") == "mean"]
        if not listed:
            return _DEFAULT_METRICS.get(source.config.get("output_type", ""), "acc")
        name = str(listed[0]["metric"])
        return name.rsplit(".", 1)[-1] if "/" in name else name  # a function is named by its path

    def main_filter(self, filters: Sequence[str]) -> str:
        """Of the ways in which lm-eval cleans an answer, the one whose score bears the metric's plain name."""
        return filters[0]

    def shown(self) -> dict[str, str]:
        return {task: self.metric(task) for task in self._tasks}

    def identity(self) -> dict[str, Any]:
        return {"version": VERSION, "tasks": {task: source.identity() for task, source in self._sources.items()}}

    @cached_property
    def _sources(self) -> dict[str, Source]:
        overrides = Overrides(self.section.num_fewshot, self.section.max_new_tokens)
        return {task: find_source(name, yaml, self._data_root, overrides) for task, (name, yaml) in self._tasks.items()}

    @cached_property
    def _prepared(self) -> tuple[dict[str, Prepared], dict[str, str]]:
        return prepare(list(self._sources.values()), self.section.limit)

    def measure(self, evaluated: EvaluatedModel, store: Store, costs: Costs) -> SuiteResult:
        if evaluated.votes:
            return self._counted(evaluated, store, costs)
        specs = {task: self._spec(evaluated, task) for task in self._sources}
        missing = {} if store.dry else self._missing(evaluated, [t for t in specs if not store.path(specs[t]).exists()])
        for task, reason in missing.items():
            notify(f"{self.name} {evaluated.label}: {task} is left out, {reason}.")
        wanted = [
            (task, spec, costs.forward(evaluated.parameters, self._rows(task) * self.example_bytes))
            for task, spec in specs.items()
            if task not in missing
        ]
        paths = ensure_jointly(store, wanted, partial(self._run, evaluated))
        return SuiteResult(
            examples=lambda: (e for task, path in paths.items() for e in _examples(task, path)),
            artifacts=paths,
            fingerprints={task: specs[task].fingerprint for task in paths},
            missing=missing,
        )

    def _counted(self, evaluated: EvaluatedModel, store: Store, costs: Costs) -> SuiteResult:
        """The vote of members that are measured one by one, as they would be alone."""
        found: list[tuple[SuiteResult, float]] = []
        for member, weight in evaluated.members:
            found.append((self.measure(member, store, costs), weight))
            member.release()
        missing = {task: why for measured, _ in found for task, why in measured.missing.items()}
        missing |= {task: NO_VOTE for task in self._sources if self._answers(task) is None}
        tasks = [task for task in self._sources if task not in missing]

        def examples() -> Iterator[Example]:
            for task in tasks:
                answers = self._answers(task)
                assert answers is not None
                given = [(read_lines(measured.artifacts[task] / EXAMPLES), weight) for measured, weight in found]
                yield from voted(task, given, answers)

        labels = [member.label for member, _ in evaluated.members]
        measured_by = [(label, measured) for label, (measured, _) in zip(labels, found, strict=True)]
        return SuiteResult(
            examples,
            artifacts={f"{label} {task}": one.artifacts[task] for label, one in measured_by for task in tasks},
            fingerprints={
                task: fingerprint([evaluated.fingerprint, *(one.fingerprints[task] for _, one in measured_by)])
                for task in tasks
            },
            missing=missing,
        )

    def _answers(self, task: str) -> Answers | None:
        """How a task's answers are told apart; None where there are none."""
        kind = self._sources[task].config.get("output_type")
        return {"multiple_choice": choices, "generate_until": self._texts}.get(str(kind))

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
            {"limit": self.section.limit, "seed": self.section.seed, "dtype": evaluated.dtype},
            {
                "candidate": evaluated.label,
                "batch_size": self.section.batch_size,
                "batch_tokens": evaluated.batch_tokens,
            },
        )

    def _rows(self, task: str) -> int:
        """Rows of the task's data on this machine, or a guess, for estimates."""
        import pyarrow.parquet as pq

        files = [path for path in self._sources[task].files.values() if path.suffix == ".parquet"]
        rows = pq.read_metadata(files[0]).num_rows if files else _UNKNOWN_ROWS
        return min(rows, self.section.limit or rows)

    def _missing(self, evaluated: EvaluatedModel, tasks: Sequence[str]) -> dict[str, str]:
        """Of the tasks that cannot be run: why not. Known before the model is loaded."""
        if not tasks:
            return {}
        prepared, unavailable = self._prepared
        found = {}
        for task in tasks:
            name = self._sources[task].name
            long = (too_long(prepared[name], member) for member, _ in evaluated.members)
            if reason := unavailable.get(name) or _unfit(prepared[name]) or next(filter(None, long), None):
                found[task] = reason
        return found

    def _run(self, evaluated: EvaluatedModel, folders: Mapping[str, Path]) -> None:
        """Writes the examples of several tasks that an earlier start has not, each into its task's folder."""
        prepared = {task: self._prepared[0][self._sources[task].name] for task in folders}
        pending: dict[tuple[str, str], list[Instance]] = {}
        for task, folder in folders.items():
            done = {line["example"] for line in kept_lines(folder / EXAMPLES)}
            pending |= {(task, e): requests for e, requests in prepared[task].examples.items() if e not in done}
        total = sum(len(one.examples) for one in prepared.values())
        with track(f"{self.name} {evaluated.label}", total, "examples", done=total - len(pending)) as advance:
            if not pending:
                return

            def finished(key: tuple[str, str]) -> None:
                task, example = key
                append_line(folders[task] / EXAMPLES, self._line(prepared[task], example))
                advance(1)

            answer(evaluated.lm(batch_size=self.section.batch_size, seed=self.section.seed), pending, finished)

    def _line(self, prepared: Prepared, example: str) -> dict[str, Any]:
        """What is kept of an example whose requests are answered."""
        from lm_eval.utils import hash_string

        task, requests = prepared.task, sorted(prepared.examples[example], key=lambda r: r.idx)
        doc = requests[0].doc
        for clean in task._filters:
            clean.apply(requests)
        filters = list(requests[0].filtered_resps)
        means = _means(prepared)
        scores: dict[str, float] = {}
        others: dict[str, Any] = {}
        for name in filters:
            for metric, value in task.process_results(doc, [r.filtered_resps[name] for r in requests]).items():
                label = metric if name == self.main_filter(filters) else f"{metric},{name}"
                if metric in means:
                    scores[label] = float(value)
                else:
                    others[label] = _plain(value)
        question = task.doc_to_text(doc)
        return {
            "example": example,
            "prompt_hash": hash_string(str(requests[0].args[0])),
            "question": question if isinstance(question, str) else None,
            "choices": _plain(task.doc_to_choice(doc)) if task.config.doc_to_choice is not None else None,
            "target": _plain(task.doc_to_target(doc)),
            "answer": [_plain(r.resps[0] if len(r.resps) == 1 else r.resps) for r in requests],
            "filtered": {name: [_plain(r.filtered_resps[name]) for r in requests] for name in filters},
            "scores": scores,
            "other_scores": others,
        }


def _unfit(prepared: Prepared) -> str | None:
    """Why the task can be run for no candidate here; None for a task like any other."""
    if getattr(prepared.task, "UNSAFE_CODE", False):
        return "it runs what a model writes outside of any sandbox"
    if getattr(prepared.task, "MULTIMODAL", False):
        return "it needs more than text"
    return None if _means(prepared) else "none of its metrics is a mean over examples"


def _means(prepared: Prepared) -> set[str]:
    """The task's metrics that are means over examples; a perplexity, notify, is not."""
    from lm_eval.api.metrics import mean

    return {metric for metric, aggregation in prepared.task.aggregation().items() if aggregation is mean}


def _plain(value: Any) -> Any:
    """The value in JSON's types."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):  # numpy's numbers
        value = value.item()
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _examples(task: str, folder: Path) -> Iterator[Example]:
    for line in sorted(read_lines(folder / EXAMPLES), key=lambda line: str(line["example"])):
        for metric, score in line["scores"].items():
            yield Example(task, line["example"], metric, score)


def too_long(prepared: Prepared, evaluated: EvaluatedModel) -> str | None:
    """Why the task's longest prompt does not fit the model's context; None when all fit."""
    from lm_eval.models.utils import normalize_gen_kwargs

    default = 256  # HFLM's own
    context = evaluated.context
    doubtful: list[tuple[str, int]] = []  # text, and tokens that must fit beside it
    for request in (r for requests in prepared.examples.values() for r in requests):
        if request.request_type == "generate_until":
            text, extra = request.args[0], int(normalize_gen_kwargs(request.args[1], default)["max_gen_toks"])
        elif request.request_type == "loglikelihood":
            # The last token is predicted, not read; a prompt of nothing is read as one token.
            text, extra = "".join(request.args), -1 if request.args[0] else 0
        else:
            continue
        if len(text.encode()) + 2 + extra > context:  # a token is a byte or more, but for those put before a text
            doubtful.append((text, extra))
    if not doubtful:
        return None
    lengths = [len(ids) for ids in evaluated.tokenizer([text for text, _ in doubtful])["input_ids"]]
    length, extra = max(
        ((n, extra) for n, (_, extra) in zip(lengths, doubtful, strict=True)), key=lambda pair: sum(pair)
    )
    if length + extra <= context:
        return None
    new = f" and up to {extra} are to be generated" if extra > 0 else ""
    advice = "; lower max_new_tokens to run it with shorter answers" if length < context and extra > 0 else ""
    return f"its longest prompt has {length} tokens{new}, which do not fit the context of {context}{advice}"


Key = TypeVar("Key", bound=Hashable)


def answer(lm: Any, examples: Mapping[Key, list["Instance"]], finished: Callable[[Key], None]) -> None:
    """Has `lm` answer all requests; `finished(example)` is called once, when all of an example's have their `resps`.

    Examples are finished while others are under way, through the hook that lm-eval has for its cache. (The cache
    itself knows no model, and would serve one model's answers to another.)
    """
    from lm_eval.api.model import CacheHook

    unanswered = {example: len(requests) for example, requests in examples.items()}
    owner = {id(request): example for example, requests in examples.items() for request in requests}
    itself: dict[int, Instance] = {}
    alike: dict[tuple[Any, str], list[Instance]] = {}

    def settle(request: "Instance", responses: list[Any]) -> None:
        if request.resps:
            return
        request.resps = responses
        example = owner[id(request)]
        unanswered[example] -= 1
        if not unanswered[example]:
            finished(example)

    class Hook(CacheHook):
        def add_partial(self, attr: str, req: Any, res: Any) -> None:
            if id(req) in itself:
                settle(itself[id(req)], [res])
            else:
                for request in alike.pop(_key(req), ()):
                    settle(request, [res])

    requests = [request for some in examples.values() for request in some]
    for kind in dict.fromkeys(request.request_type for request in requests):
        of_kind = [request for request in requests if request.request_type == kind]
        for request in of_kind:
            request.resps = []
            if (request.repeats or 1) == 1:
                itself[id(request.args)] = request
                if not (kind == "generate_until" and request.args[1].get("do_sample")):
                    # HFLM gives the hook a copy of the arguments; where nothing is drawn, equals have one answer.
                    alike.setdefault(_key(request.args), []).append(request)
        lm.set_cache_hook(Hook(None))
        try:
            named = [request for request in of_kind for _ in range(request.repeats or 1)]
            responses: dict[int, list[Any]] = {}
            for request, response in zip(named, getattr(lm, kind)(named, disable_tqdm=True), strict=True):
                responses.setdefault(id(request), []).append(response)
        finally:
            lm.set_cache_hook(CacheHook(None))
        for request in of_kind:
            settle(request, responses[id(request)])


def _key(arguments: Sequence[Any]) -> tuple[Any, str]:
    return arguments[0], repr(tuple(arguments[1:]))


class BbhConfig(LmEvalConfig):
    variant: Literal["cot_fewshot", "fewshot", "zeroshot", "cot_zeroshot"] = Field(
        "cot_fewshot", description="three examples with a chain of thought (the paper's), without, or no examples"
    )


@SUITES.register("bbh", reference="Suzgun et al. 2022, arXiv 2210.09261")
class Bbh(LmSuite):
    """BIG-bench Hard, 27 tasks, greedy."""

    name = "bbh"
    schema: ClassVar[type[BaseModel]] = BbhConfig
    section: BbhConfig

    def _chosen(self) -> dict[str, tuple[str, Path]]:
        folder, prefix = task_folder() / "bbh" / self.section.variant, f"bbh_{self.section.variant}_"
        files = {path.stem: path for path in sorted(folder.glob("[!_]*.yaml"))}
        wanted = [name.removeprefix(prefix) for name in self.section.tasks] if self.section.tasks else None
        return {task: (prefix + task, files[task]) for task in chosen(wanted, list(files), self.name)}

    def metric(self, task: str) -> str:
        return "exact_match"

    def main_filter(self, filters: Sequence[str]) -> str:
        # What lm-eval's own groups of the zero-shot variants count.
        return "flexible-extract" if "flexible-extract" in filters else filters[0]


@SUITES.register("commonsense", reference="section 4.1 of arXiv 2401.10491; the metric of each task is the paper's")
class Commonsense(LmSuite):
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
        tasks = chosen(self.section.tasks, list(self._FILES), self.name)
        return {task: (task, task_folder() / self._FILES[task]) for task in tasks}

    def metric(self, task: str) -> str:
        return self._METRICS[task]


@SUITES.register("generative", reference="table 8 of arXiv 2401.10491")
class Generative(LmSuite):
    """TriviaQA, DROP and LAMBADA, or whatever tasks of lm-eval are named."""

    name = "generative"
    _FILES: ClassVar = {
        "triviaqa": "triviaqa/default.yaml",
        "drop": "drop/default.yaml",
        "lambada_openai": "lambada/lambada_openai.yaml",
    }

    def _chosen(self) -> dict[str, tuple[str, Path]]:
        return {task: (task, self._file(task)) for task in dict.fromkeys(self.section.tasks or self._FILES)}

    def _file(self, task: str) -> Path:
        if task in self._FILES:
            return task_folder() / self._FILES[task]
        index = task_index()
        if task not in index:
            hint = did_you_mean(task, index)
            raise UserError(f"lm-eval {lm_eval_version()} has no task {task!r}{hint}: correct the name.")
        kind, path = index[task]
        if kind != "task":
            members = [name for name, (_, p) in index.items() if p.parent == path.parent and name != task]
            listed = f" ({', '.join(sorted(members)[:5])} ...)" if members else ""
            raise UserError(f"{task!r} is a {kind} of lm-eval's tasks: name the tasks themselves{listed}.")
        return path
