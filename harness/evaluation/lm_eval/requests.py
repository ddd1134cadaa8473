"""Requests of lm-eval's tasks: whether they leave room for answers, and answering them so that a kill costs little."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fusion.errors import UserError
from harness.evaluation.lm_eval.rows import first_line
from harness.evaluation.lm_eval.tasks import Prepared
from harness.evaluation.overflow import Overflow, OverflowRule
from harness.evaluation.suite import BATCH_SIZE
from harness.store.files import read_json, write_json
from harness.store.leases import Leases

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from harness.evaluation.shared_prefix_lm import SharedPrefixLM

_DEFAULT_NEW_TOKENS = 256  # of HFLM, where a task sets no limit
_MOST_FAILURES = 8  # examples that cannot be answered; with more the model is to blame, or the machine

Key = TypeVar("Key", bound=Hashable)


def no_room(prepared: Prepared, context: int, rule: OverflowRule) -> str | None:
    """The reason why no prompt of the task can be asked in a context of so many tokens: its answers alone fill it."""
    from lm_eval.models.utils import normalize_gen_kwargs

    generated = [
        int(normalize_gen_kwargs(request.args[1], _DEFAULT_NEW_TOKENS)["max_gen_toks"])
        for requests in prepared.examples.values()
        for request in requests
        if request.request_type == "generate_until"
    ]
    longest = max(generated, default=0)
    if longest < context or rule == "shrink_answer":
        return None
    return (
        f"up to {longest} tokens are to be generated, which do not fit the context of {context}; lower max_new_tokens, "
        "or set overflow to shrink_answer"
    )


def settled_batch_size(folder: Path, leases: Leases, measure: Callable[[], int]) -> int:
    """The number of answers of an artifact that are generated at one time; the first process that asks measures it.

    All others take the same, also after an interruption, since in bfloat16 another one may change an answer's last
    digits.
    """
    path = folder / BATCH_SIZE

    def note(_: int) -> bool:
        write_json(path, {"batch_size": measure()})
        return True

    leases.make_missing([path], note, wait=True)
    return int(read_json(path, f"remove {folder} to have it made again")["batch_size"])


def worst_overflow(lm: "SharedPrefixLM", requests: Sequence["Instance"]) -> Overflow | None:
    """Of the requests of an example, the one of which least can be read; None where all fit the context."""
    try:
        found = [overflow for request in requests if (overflow := lm.overflow(request))]
    except Exception:  # a text that the tokenizer does not take is named when it is asked
        return None
    return min(found, key=lambda one: (one.read > 0, one.read - one.prompt), default=None)


def drop_unanswerable(
    lm: "SharedPrefixLM",
    examples: dict[Key, list["Instance"]],
    dropped: Callable[[Key, dict[str, int]], None],
) -> dict[Key, dict[str, int]]:
    """What does not fit of the examples that are asked all the same (the fields of `Overflow`).

    Those of which nothing can be read are removed from `examples`; `dropped(example, overflow)` is called for each.
    """
    overflows: dict[Key, dict[str, int]] = {}
    for example, requests in list(examples.items()):
        if worst := worst_overflow(lm, requests):
            overflows[example] = asdict(worst)
            if worst.read == 0:
                del examples[example]
                dropped(example, overflows.pop(example))
    return overflows


def answer_requests(
    lm: Any,
    examples: Mapping[Key, list["Instance"]],
    finished: Callable[[Key], None],
    failed: Callable[[Key, Exception], None],
) -> None:
    """Makes `lm` answer all requests; `finished(example)` is called once all requests of an example have `resps`.

    `failed(example, error)` is called for one that cannot be answered: it is looked for by halves, and the others are
    answered all the same. Raises UserError where there are more than a few such examples.

    Examples are finished while others are under way, through the hook that lm-eval has for its cache. (The cache itself
    is not used: it has no model in its key, and would serve one model's answers to another.)
    """
    from lm_eval.api.model import CacheHook

    unanswered = {example: len(requests) for example, requests in examples.items()}
    owner = {id(request): example for example, requests in examples.items() for request in requests}
    given_up: set[Key] = set()
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

    def ask(kind: str, some: Sequence["Instance"]) -> None:
        some = [request for request in some if not request.resps and owner[id(request)] not in given_up]
        if not some:
            return
        named = [request for request in some for _ in range(request.repeats or 1)]
        responses: dict[int, list[Any]] = {}
        try:
            answers = getattr(lm, kind)(named, disable_tqdm=True)
        except (UserError, OSError, MemoryError):
            raise
        except Exception as error:  # of one example in many, such as one that a tokenizer does not take
            if len(some) > 1:
                ask(kind, some[: len(some) // 2])
                ask(kind, some[len(some) // 2 :])
                return
            example = owner[id(some[0])]
            given_up.add(example)
            if len(given_up) > _MOST_FAILURES:
                name = " ".join(map(str, example)) if isinstance(example, tuple) else example
                raise UserError(
                    f"More than {_MOST_FAILURES} examples cannot be answered (the last of them {name}, "
                    f"{first_line(error)}): correct what this names, and the same command goes on."
                ) from error
            failed(example, error)
            return
        for request, response in zip(named, answers, strict=True):
            responses.setdefault(id(request), []).append(response)
        for request in some:
            settle(request, responses[id(request)])

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
            ask(kind, of_kind)
        finally:
            lm.set_cache_hook(CacheHook(None))


def _key(arguments: Sequence[Any]) -> tuple[Any, str]:
    return arguments[0], repr(tuple(arguments[1:]))
