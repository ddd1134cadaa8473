"""The suite MultiPL-E: a model completes the problems of ten languages, and the completions are executed.

Samples are an artifact of their own, separate from their execution (`execute`), so that one machine can write them and
another execute them. They are stored in the format of MultiPL-E's own tools.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from fusion.errors import UserError
from harness.evaluation.evaluated_model import EvaluatedModel
from harness.evaluation.lm_eval.examples import read_overflows
from harness.evaluation.lm_eval.parts import AnswerParts, Lines
from harness.evaluation.lm_eval.requests import answer_requests, drop_unanswerable, settled_batch_size
from harness.evaluation.lm_eval.rows import first_line
from harness.evaluation.multipl_e.languages import LANGUAGES, cut
from harness.evaluation.multipl_e.problems import asked, data_identity, file_of, read_problems
from harness.evaluation.overflow import SKIPPED, OverflowRule, overflow_result
from harness.evaluation.suite import (
    NO_VOTE,
    NONE_FITS,
    SUITES,
    LimitedConfig,
    StoredAnswer,
    Suite,
    SuiteResult,
    Unfinished,
    chosen,
    read_lines,
    take_over,
    write_lines,
)
from harness.runtime.progress import notify
from harness.store.artifacts import Estimate, Spec, Store
from harness.store.costs import BYTES_PER_TOKEN, Costs
from harness.store.leases import Leases
from harness.store.paths import TOOLCHAINS

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

VERSION = 4
SAMPLES = "samples.jsonl"
COMPLETIONS = "completions.jsonl"
RESULTS = "results.jsonl"
_PROBLEMS = 160  # of a language, for estimates
_RUN_SECONDS = 0.5  # of one program, for estimates
TEMPERATURE, TOP_P = 0.2, 0.95  # section 4.1 of arXiv 2401.10491


Sample = tuple[str, int]
"""A problem's name, and the sample's number."""


class MultiplEConfig(LimitedConfig):
    """The configuration of the suite `multipl_e`."""

    tasks: list[str] | None = Field(None, min_length=1, description="only these languages. Default: all ten")
    samples: int = Field(20, gt=0, description="completions a problem")
    greedy: bool = Field(False, description="one completion a problem, decoded greedily")
    k: int = Field(1, gt=0, description="the k of pass@k that is shown")
    max_new_tokens: int = Field(1024, gt=0, description="longest completion (tokens)")
    batch_size: int | Literal["auto"] = Field("auto", description="completions generated at one time")
    overflow: OverflowRule = Field(
        "skip",
        description="for prompt and completion that do not fit the context: skip leaves the problem out of all rows; "
        "shrink_answer leaves less room for the completion; truncate_left reads the prompt's end only",
    )
    seed: int = Field(0, ge=0, description="seed of the samples, and of `limit_by: seed`")
    max_execution_seconds: float | None = Field(
        None, gt=0, description="longest execution of a language; the next start goes on. Default: no limit"
    )
    execute: bool = Field(True, description="execute the completions. False: only write them")
    sandbox: bool = Field(True, description="False: generated programs run with all your rights")

    @property
    def n(self) -> int:
        """The number of completions of a problem."""
        return 1 if self.greedy else self.samples

    @model_validator(mode="after")
    def _enough_samples(self) -> "MultiplEConfig":
        if self.n < self.k:
            raise UserError(f"pass@{self.k} needs {self.k} samples a problem, but there are {self.n}: raise samples.")
        return self


@SUITES.register("multipl_e", parameters=MultiplEConfig, reference="Cassano et al. 2023, arXiv 2208.08227")
class MultiplE(Suite):
    """HumanEval in ten languages, scored by pass@k (arXiv 2107.03374, equation 1)."""

    name = "multipl_e"
    in_parts: ClassVar[bool] = True

    def __init__(self, config: MultiplEConfig, data_root: Path | None) -> None:
        self.config = config
        self._data_root = data_root
        self._languages = chosen(config.tasks, list(LANGUAGES), self.name)
        self._problems: dict[str, list[dict[str, Any]]] = {}
        self._tried: dict[str, str | None] = {}  # why a language's toolchain does not work, None where it does

    def task_metrics(self) -> dict[str, str]:
        return dict.fromkeys(self._languages, "passed")

    def identity(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "data": {language: data_identity(language, self._data_root) for language in self._languages},
            "toolchains": self._verdict_keys,
        }

    @cached_property
    def _verdict_keys(self) -> dict[str, str | None]:
        """By language, what verdicts depend on beside programs (see `verdict_keys`); empty where none is executed."""
        from harness.evaluation.multipl_e.execute import verdict_keys

        return verdict_keys(self._languages, unsafe=not self.config.sandbox) if self.config.execute else {}

    @classmethod
    def answers(cls, folder: Path, metric: str) -> Iterator[StoredAnswer]:
        """The first program of every problem, and how many samples pass."""
        if not (folder / RESULTS).exists():
            return
        for line in read_lines(folder / RESULTS):
            passing = [bool(r["strict"] if metric == "passed" else r["exit_code"] == 0) for r in line["results"]]
            first = line["results"][0]
            program = f"{first['program'].removeprefix(line['prompt']).removesuffix(line['tests']).strip()}"
            text = f"{program}\n\n[{first['status']}; {sum(passing)} of {len(passing)} samples pass]"
            score = sum(passing) / len(passing)
            yield StoredAnswer(line["name"], line["prompt"], "programs that pass the tests", text, score)

    def measure(self, evaluated: EvaluatedModel, store: Store, costs: Costs) -> SuiteResult:
        if evaluated.votes:
            return SuiteResult(lambda: iter(()), missing=dict.fromkeys(self._languages, NO_VOTE))
        execute = self.config.execute and not store.dry
        todo = [n for n in self._languages if execute and not store.path(self._results(evaluated, n)).exists()]
        if todo and self.config.sandbox:
            from harness.evaluation.sandbox import refusal

            if why := refusal():  # before hours are spent on samples
                raise UserError(f"{why} Without it write samples only (--generate-only) and run them elsewhere.")
        if store.shares_only:
            self._generate(evaluated, store, costs)
            return SuiteResult(lambda: iter(()))
        from harness.evaluation.multipl_e.execute import OutOfTime
        from harness.evaluation.multipl_e.scores import examples, unsolvable_notes

        samples, missing = self._generate(evaluated, store, costs)
        artifacts = {f"{language} samples": path for language, path in samples.items()}
        overflows = {} if store.dry else {name: read_overflows(path, COMPLETIONS) for name, path in samples.items()}
        for language in [name for name, one in overflows.items() if not one.asked]:
            missing[language] = NONE_FITS
            del samples[language]
        said = overflow_result(evaluated.label, self.config.overflow, overflows)
        if not self.config.execute:
            return SuiteResult(lambda: iter(()), artifacts, missing=missing, **said)
        not_run = self._without_toolchain([name for name in todo if name in samples], store)
        for language, reason in not_run.items():
            notify(f"{self.name} {evaluated.label}: {language} is not run, {reason}")
        paths: dict[str, Path] = {}
        for language, written in samples.items():
            if language not in not_run:
                programs = (self.config.limit or _PROBLEMS) * self.config.n
                try:
                    paths[language] = store.ensure(
                        self._results(evaluated, language),
                        partial(self._execute, samples=written, store=store),
                        Estimate(seconds=programs * _RUN_SECONDS),
                    )
                except OutOfTime as error:
                    not_run[language] = str(error).rstrip(".")
                    notify(f"{self.name} {evaluated.label}: {language} is left out, {not_run[language]}.")
        return SuiteResult(
            examples=lambda: (e for language, path in paths.items() for e in examples(language, path / RESULTS)),
            artifacts={**artifacts, **paths},
            fingerprints={name: self._results(evaluated, name).fingerprint for name in paths},
            missing={**missing, **not_run},
            dtype=evaluated.dtype,
            notes=[
                *said["notes"],
                *([] if store.dry else unsolvable_notes({name: path / RESULTS for name, path in paths.items()})),
            ],
            skipped=said["skipped"],
        )

    def _results(self, evaluated: EvaluatedModel, language: str) -> Spec:
        from harness.evaluation.multipl_e.execute import VERSION as executing

        samples = self._spec(evaluated, language)
        params = {"toolchain": self._verdict_keys[language]}
        info = {"candidate": evaluated.label}
        return Spec(self.name, samples.label, executing, {"samples": samples.fingerprint}, params, info)

    def _without_toolchain(self, languages: Sequence[str], store: Store) -> dict[str, str]:
        from harness.evaluation.multipl_e.toolchains import available

        unknown = [name for name in languages if name not in self._tried]
        if unknown:
            _, not_run = available(unknown, _toolchains(store), unsafe=not self.config.sandbox)
            self._tried |= {name: not_run.get(name) for name in unknown}
        return {name: reason for name in languages if (reason := self._tried[name])}

    def _execute(self, folder: Path, *, samples: Path, store: Store) -> None:
        from harness.evaluation.multipl_e.execute import execute

        out = folder / RESULTS
        seconds = self.config.max_execution_seconds
        done = execute(
            samples / COMPLETIONS, out, cache=_toolchains(store), unsafe=not self.config.sandbox, max_seconds=seconds
        )
        if done.not_run:
            raise UserError(next(iter(done.not_run.values())))
        for lock in folder.glob(".*.lock"):
            lock.unlink()

    def _generate(
        self, evaluated: EvaluatedModel, store: Store, costs: Costs
    ) -> tuple[dict[str, Path], dict[str, str]]:
        """The samples by language, and the reason for every language whose problems are unavailable or do not fit."""
        tokens = (self.config.limit or _PROBLEMS) * self.config.n * min(self.config.max_new_tokens, 256)
        estimate = costs.forward(evaluated.parameters, BYTES_PER_TOKEN * tokens)
        paths: dict[str, Path] = {}
        missing: dict[str, str] = {}
        for language in self._languages:
            spec = self._spec(evaluated, language)
            if not (store.dry or store.path(spec).exists()) and (reason := self._obstacle(language, evaluated)):
                missing[language] = reason
                continue
            samples = self._samples(language, evaluated, store)
            try:
                build = partial(self._finish, language, samples)
                paths[language] = store.ensure(spec, build, estimate, make_parts=samples.make)
            except Unfinished as error:
                missing[language] = str(error)
        if not store.shares_only:
            for language, reason in missing.items():
                notify(f"{self.name} {evaluated.label}: {language} is left out, {reason}.")
        return paths, missing

    def _samples(self, language: str, evaluated: EvaluatedModel, store: Store) -> AnswerParts:
        """The samples of a language, in parts of whole problems."""
        spec = self._spec(evaluated, language)

        def known(folder: Path) -> dict[str, Lines]:
            lines: dict[str, Lines] = {}
            for line in take_over(store, spec, folder, SAMPLES, partial(self._asks, language), "samples"):
                lines.setdefault(line["name"], {SAMPLES: []})[SAMPLES].append(line)
            return lines

        def sizes() -> dict[str, int]:
            return {str(problem["name"]): self.config.n for problem in self.problems(language)}

        description = f"{self.name} {evaluated.label} {language}"
        return AnswerParts(description, sizes, partial(self._answer, language, evaluated), known, (SAMPLES, SKIPPED))

    def _asks(self, language: str, line: Mapping[str, Any]) -> bool:
        """Whether a sample, stored before, is one of those that are wanted."""
        return line["sample"] < self.config.n and line["name"] in {p["name"] for p in self.problems(language)}

    def _spec(self, evaluated: EvaluatedModel, language: str) -> Spec:
        config = self.config
        sampling = {} if config.greedy else {"temperature": TEMPERATURE, "top_p": TOP_P, "seed": config.seed}
        return Spec(
            "multipl_e_samples",
            f"{evaluated.label}-{language}",
            VERSION,
            {"model": evaluated.fingerprint, "data": data_identity(language, self._data_root)},
            {
                "language": language,
                "overflow": config.overflow,
                **config.limit_identity(),
                "samples": config.n,
                "max_new_tokens": config.max_new_tokens,
                **evaluated.computing,
                **sampling,
            },
            {"candidate": evaluated.label, "batch_size": config.batch_size, "batch_tokens": evaluated.batch_tokens},
        )

    def problems(self, language: str) -> list[dict[str, Any]]:
        """The problems of a language: name, prompt, tests, stop_tokens. Raises UserError where they are unavailable."""
        if language not in self._problems:
            self._problems[language] = read_problems(language, self._data_root, self.config)
        return self._problems[language]

    def _obstacle(self, language: str, evaluated: EvaluatedModel) -> str | None:
        """The reason why a language cannot be asked; None where it can."""
        try:
            self.problems(language)
        except UserError as error:
            if file_of(language, self._data_root):
                raise
            return f"its problems cannot be had ({error})"
        new, context = self.config.max_new_tokens, evaluated.context
        if new < context or self.config.overflow == "shrink_answer":
            return None
        return (
            f"up to {new} tokens are to be generated, which do not fit the context of {context}; lower max_new_tokens"
        )

    def _answer(
        self, language: str, evaluated: EvaluatedModel, folder: Path, leases: Leases, names: Sequence[str], known: Lines
    ) -> tuple[Lines, dict[str, str]]:
        """The samples of some problems, and the reason for every problem of which one could not be generated."""
        config = self.config
        problems = {str(problem["name"]): problem for problem in self.problems(language)}
        done = {(line["name"], line["sample"]): line for line in known.get(SAMPLES, [])}
        skipped = {line["example"]: line for line in known.get(SKIPPED, [])}
        samples = [(name, sample) for name in names for sample in range(config.n)]
        pending = {
            (name, sample): [self._request(problems[name], sample)]
            for name, sample in samples
            if name not in skipped and (name, sample) not in done
        }
        if not pending:
            return known, {}
        lm = evaluated.lm(batch_size=config.batch_size, seed=config.seed, after_prompt=True, overflow=config.overflow)
        every = [self._request(problem, 0) for problem in problems.values()]
        lm.rows = settled_batch_size(folder, leases, lambda: lm.fitting_rows(every))
        failures: dict[str, str] = {}

        def finished(key: Sample) -> None:
            request = pending[key][0]
            completion = cut(request.resps[0], request.doc["stop_tokens"])
            done[key] = {"name": key[0], "sample": key[1], "completion": completion, "overflow": overflows.get(key)}

        def dropped(key: Sample, overflow: dict[str, int]) -> None:
            skipped.setdefault(key[0], {"example": key[0], "overflow": overflow})

        def failed(key: Sample, error: Exception) -> None:
            name, sample = key
            failures.setdefault(
                name,
                f"sample {sample} of {name} cannot be generated ({first_line(error)}); the others are kept, and the "
                "same command tries it again",
            )

        overflows = drop_unanswerable(lm, pending, dropped)
        answer_requests(lm, pending, finished, failed)
        lines = {
            SAMPLES: [done[key] for key in samples if key in done],
            SKIPPED: [skipped[name] for name in names if name in skipped],
        }
        return lines, failures

    def _finish(self, language: str, samples: AnswerParts, folder: Path) -> None:
        """Joins the samples and writes them in MultiPL-E's format. Raises Unfinished where some could not be made."""
        if samples.failures:
            raise Unfinished(next(iter(samples.failures.values())))
        samples.join(folder)
        done: dict[str, list[dict[str, Any]]] = {}
        for line in read_lines(folder / SAMPLES):
            done.setdefault(line["name"], []).append(line)
        problems = [problem for problem in self.problems(language) if problem["name"] in done]
        write_lines(folder / COMPLETIONS, [self._completions(language, p, done[p["name"]]) for p in problems])

    def _completions(
        self, language: str, problem: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """The line of a problem in the format of MultiPL-E's tools; with `overflow` where its prompt does not fit."""
        return {
            **problem,
            "language": language,
            "completions": [sample["completion"] for sample in samples],
            "temperature": 0.0 if self.config.greedy else TEMPERATURE,
            "top_p": 1.0 if self.config.greedy else TOP_P,
            "max_tokens": self.config.max_new_tokens,
            **({"overflow": overflow} if (overflow := samples[0]["overflow"]) else {}),
        }

    def _request(self, problem: Mapping[str, Any], sample: int) -> "Instance":
        """The request to lm-eval's LM for one sample of a problem."""
        from lm_eval.api.instance import Instance

        kwargs = {
            "until": problem["stop_tokens"],
            "max_gen_toks": self.config.max_new_tokens,
            "do_sample": False,
        }
        if not self.config.greedy:
            kwargs |= {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0}
        return Instance("generate_until", dict(problem), (asked(problem), kwargs), sample)


def _toolchains(store: Store) -> Path:
    return store.root.parent / TOOLCHAINS
