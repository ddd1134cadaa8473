"""The suites on shared prefixes beside lm-eval's HFLM at its best batch size: the same answers, how much sooner.

Every answer that differs is listed with how far apart the two likeliest tokens were where the answers part; HFLM
against itself at another batch size is the control.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from harness.models.checkpoints import load_model, load_tokenizer
from harness.models.resolution import ModelSpec, resolve
from harness.runtime.progress import notify

GOALS = {"bbh": 3.0, "hellaswag": 2.0, "multipl_e": 3.0}


@dataclass
class Case:
    """Requests of one kind, and what their examples are called."""

    name: str
    kind: str
    requests: list[Any]
    unit: str
    examples: int
    sampled: bool = False


@dataclass
class Outcome:
    """What one reader gave for a case, and how long it took: seconds of the processor, whatever else it had to do."""

    reader: str
    answers: list[Any]
    seconds: float


def cases(
    data_root: Path, limit: int, languages: Sequence[str], new_tokens: int | None, bbh_tasks: list[str] | None = None
) -> list[Case]:
    """BBH (all tasks without `bbh_tasks`), every commonsense task and MultiPL-E, `limit` rows a task or language."""
    from lm_eval.api.instance import Instance

    from harness.evaluation.lm_eval.suites import Bbh, BbhConfig, Commonsense
    from harness.evaluation.lm_eval.task_suite import LmEvalConfig
    from harness.evaluation.multipl_e.code_suite import MultiplE, MultiplEConfig

    found = []
    bbh = Bbh(BbhConfig(limit=limit, max_new_tokens=new_tokens, tasks=bbh_tasks), data_root)
    commonsense = Commonsense(LmEvalConfig(limit=limit), data_root)
    for suite in (bbh, commonsense):
        prepared, missing = suite._prepared
        if missing:
            raise UserError(f"{next(iter(missing))} is missing: {next(iter(missing.values()))}.")
        for name, task in prepared.items():
            requests = [request for some in task.examples.values() for request in some]
            found.append(Case(name, requests[0].request_type, requests, "examples", len(task.examples)))
    # The tasks of BBH are asked at once, as the suite asks them.
    tasks = [case for case in found if case.kind == "generate_until"]
    asked = [request for case in tasks for request in case.requests]
    found = [case for case in found if case not in tasks]
    found.insert(0, Case("bbh", "generate_until", asked, "examples", sum(case.examples for case in tasks)))
    multipl_e = MultiplE(
        MultiplEConfig(limit=limit, tasks=list(languages), max_new_tokens=new_tokens or 256), data_root
    )
    requests = []
    for language in languages:
        for problem in multipl_e.problems(language):
            kwargs = {"until": problem["stop_tokens"], "max_gen_toks": new_tokens or 256, "do_sample": True}
            kwargs |= {"temperature": 0.2, "top_p": 0.95, "top_k": 0}
            requests += [Instance("generate_until", problem, (problem["prompt"], kwargs), n) for n in range(20)]
    found.append(Case("multipl_e", "generate_until", requests, "samples", len(requests), sampled=True))
    return found


def measure(lm: Any, case: Case, reader: str) -> Outcome:
    started = time.process_time()
    answers = getattr(lm, case.kind)(case.requests, disable_tqdm=True)
    return Outcome(reader, answers, time.process_time() - started)


def differences(
    case: Case, ours: Sequence[Any], theirs: Sequence[Any], gap: Callable[[str, str, str], float]
) -> list[str]:
    """One sentence for every answer that differs: by more than rounding, or in a token."""
    found = []
    for request, a, b in zip(case.requests, ours, theirs, strict=True):
        where = f"{request.task_name} {request.doc_id}"
        if case.kind == "generate_until" and a != b:
            found.append(
                f"{where}: the two likeliest tokens lie {gap(request.args[0], a, b):.1e} apart where answers part"
            )
        elif case.kind == "loglikelihood" and (abs(a[0] - b[0]) > 1e-2 or a[1] != b[1]):
            found.append(f"{where}: {a} against {b}")
    return found


def token_gap(model: Any, tokenizer: Any) -> Callable[[str, str, str], float]:
    """How far apart the logits of the two likeliest tokens are where two answers to a prompt part."""
    import torch

    def gap(prompt: str, a: str, b: str) -> float:
        start, one, other = (tokenizer(text)["input_ids"] for text in (prompt, prompt + a, prompt + b))
        same = next((i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), min(len(one), len(other)))
        with torch.inference_mode():
            logits = model(torch.tensor([one[: max(same, len(start))]]), logits_to_keep=1).logits[0, -1]
        first, second = logits.topk(2).values.tolist()
        return float(first - second)

    return gap


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a Markdown page; exit status 1 where a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suites", description=__doc__)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--root", type=Path, default=Path("work"), help="folder that holds models/")
    parser.add_argument("--data-root", type=Path, default=Path("../shared/data/hub"))
    parser.add_argument("--limit", type=int, default=3, help="rows a task or language")
    parser.add_argument("--only", nargs="+", help="bbh, hellaswag, arc_easy, ..., multipl_e")
    parser.add_argument("--bbh-tasks", nargs="+", help="of BBH only these; all 27 without")
    parser.add_argument("--languages", nargs="+", default=["cpp", "js", "python"])
    parser.add_argument("--max-new-tokens", type=int, help="shorter answers, to try; the tasks' own without")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8, 16], help="those tried for HFLM")
    options = parser.parse_args(arguments)
    from lm_eval.models.huggingface import HFLM

    from harness.evaluation.shared_prefix_lm import SharedPrefixLM

    try:
        resolved = resolve(ModelSpec(name=options.model, dtype="float32"), options.root / "models")
        model, tokenizer = load_model(resolved, "float32"), load_tokenizer(resolved)
        chosen = cases(options.data_root, options.limit, options.languages, options.max_new_tokens, options.bbh_tasks)
    except UserError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    gap = token_gap(model, tokenizer)
    rows: list[str] = []
    listed: list[str] = []
    control: list[str] = []
    missed = False
    for case in chosen:
        if options.only and case.name not in options.only:
            continue
        notify(f"{case.name}: {case.examples} {case.unit}")
        ours = measure(SharedPrefixLM(model, tokenizer, label=options.model), case, "shared prefixes")
        theirs = [
            measure(HFLM(model, tokenizer=tokenizer, backend="causal", batch_size=size), case, f"HFLM, batch {size}")
            for size in options.batch_sizes
        ]
        best = min(outcome.seconds for outcome in theirs)
        goal = GOALS.get(case.name, 0.0)
        missed |= best / ours.seconds < goal
        for outcome in (ours, *theirs):
            wanted = goal if goal and outcome is ours else ""
            numbers = f"{case.examples / outcome.seconds:.3g} | {best / outcome.seconds:.2f} | {wanted}"
            rows.append(f"| {case.name}, {case.examples} {case.unit} | {outcome.reader} | {numbers} |")
        if not case.sampled:
            listed += [f"{case.name}, {line}" for line in differences(case, ours.answers, theirs[0].answers, gap)]
            for other in theirs[1:]:
                control += differences(case, other.answers, theirs[0].answers, gap)
    print(f"| {options.model}, float32 | reader | per processor second | times HFLM's best | goal |")
    print("| --- | --- | ---: | ---: | ---: |")
    print("\n".join(rows))
    print(f"\nAnswers that differ from HFLM's at batch {options.batch_sizes[0]}: {len(listed)}.")
    print(f"HFLM's own at other batch sizes: {len(control)}.\n")
    print("".join(f"- {line}\n" for line in listed))
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
