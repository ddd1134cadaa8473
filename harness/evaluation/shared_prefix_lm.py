"""lm-eval's HFLM with cached prompt prefixes: in float32 the same answers, in less time.

lm-eval's tasks use it like any other LM. For a model whose attention cache cannot be shared this way, a notice is
printed; answers are then decoded in padded batches, and log-likelihoods computed by HFLM's own method.
"""

import hashlib
import heapq
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal

import psutil
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.generation import GenerationMode

from fusion.errors import UserError
from fusion.inference.answer_row import AnswerRow, next_tokens
from fusion.inference.decoding import Sampling, decode, group_by_prefix, pack_consecutive
from fusion.inference.ensembles import PrefixCachedEnsemble
from fusion.inference.padded_decoding import decode_padded, padded_row_bytes
from fusion.inference.prefix_cache import PrefixCachedModel, UnsupportedModel
from fusion.inference.prefix_tree import Branching
from fusion.vocabulary.tokenization import decode_continuation
from harness.evaluation.overflow import Overflow, OverflowRule, fit, limited, without_token
from harness.evaluation.quiet import quietly
from harness.runtime.memory import device_memory
from harness.runtime.progress import notify

ROWS = 64  # sequences decoded at one time, if memory allows
_LOGITS = 2**26  # numbers of logits that exist at one time: 256 MB
_LONGEST = 16  # requests with the most characters, among which the one with the most tokens is looked for
_CACHED = 16  # rows of logits that are summed at one time: what fits a processor's cache
# How transformers may draw otherwise, and the values under which it does not.
_WARPERS = {
    "min_p": (None,),
    "top_h": (None,),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
}

BatchSize = int | Literal["auto"]


def _totals(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the summed exponentials, float32[n], and the greedy token, int64[n], of each row of logits[n, V].

    The sum is more exact than HFLM's log_softmax in float32, whose error is some 4e-5 nats a token for V of 150,000.
    The greedy token is HFLM's: the first of those with the greatest log-probability in the dtype of the logits. In
    bfloat16 there are several at one position in twenty.
    """
    totals, greedy = [], []
    for part in logits.split(_CACHED):
        best = part.amax(-1).float()
        totals.append(best + (part.float() - best[:, None]).exp_().sum(-1).log())
        greedy.append(part.log_softmax(-1).argmax(-1))
    return torch.cat(totals), torch.cat(greedy)


class SharedPrefixLM(HFLM):
    """A model and its tokenizer as lm-eval's LM. It differs from HFLM in three points.

    A prompt that does not fit the context is refused with UserError unless a rule says what is read of it. A sampled
    answer depends only on `seed`, its prompt and its number. Log-probabilities are computed in float32 from logits in
    the model's own dtype.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        label: str,
        batch_size: BatchSize = "auto",
        batch_tokens: int = 2048,
        seed: int = 0,
        joint: PrefixCachedEnsemble | None = None,
        context: int | None = None,
        after_prompt: bool = False,
        overflow: OverflowRule | None = None,
    ) -> None:
        """Wraps a loaded model. Raises UserError where the tokenizer has no end-of-text token.

        `batch_size` is the number of sequences decoded at one time, `batch_tokens` the number of prompt tokens read at
        one time. `context` is the longest text that is read (tokens; default: as lm-eval finds it). `joint` are the
        models of an ensemble, with `model` among them. With `after_prompt` an answer is what the new tokens add to the
        text of the prompt (see `decode_continuation`); by default they are decoded by themselves, as HFLM does, and may
        lack a first space. `overflow` is the rule for prompts that do not fit the context (default: they are refused).
        """
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"The tokenizer of {label} has no end-of-text token, so that no answer would ever end: name it as "
                "eos_token in tokenizer_config.json."
            )
        own = 1 if batch_size == "auto" else batch_size
        with quietly():
            super().__init__(
                pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=own, max_length=context
            )
        self.label = label
        self._batch_size = batch_size
        self.rows: BatchSize = batch_size
        """Sequences decoded at one time; `auto` becomes what memory allows when it is first needed."""
        self._batch_tokens = batch_tokens
        self._seed = seed
        self._joint = joint
        self._after_prompt = after_prompt
        self._overflow = overflow
        self._prompt: list[int] | None = None
        """With `after_prompt`, the prompt that HFLM is answering."""
        try:
            self.reader: PrefixCachedModel | None = joint or PrefixCachedModel(model)
        except UnsupportedModel as reason:
            self.reader = None
            notify(f"{label}: common prefixes are read again for every prompt ({reason}).")

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        if self._prompt is None:
            return str(super().tok_decode(tokens, skip_special_tokens))
        new = [tokens] if isinstance(tokens, int) else tokens
        return decode_continuation(self.tokenizer, self._prompt, new, skip_special_tokens=skip_special_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        for context, continuation in (request.args for request in requests):
            # HFLM looks at the first token of what follows no text.
            if not context and not self.tok_encode(continuation, add_special_tokens=False):
                raise without_token(continuation, self.label)
        return super().loglikelihood(requests, disable_tqdm)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As HFLM; a continuation of which no token is left, since it joins the context's, is encoded by itself."""
        before, scored = super()._encode_pair(context, continuation)
        alone = context[len(context.rstrip()) :] + continuation
        return before, scored or self.tok_encode(alone, add_special_tokens=False)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-probability (nats) of each (_, context, continuation), and True where the continuation is greedy."""
        if empty := [key[1] for key, _, scored in requests if not scored]:
            raise without_token(empty[0], self.label)
        requests = [(key, self._fitted(c, len(scored) - 1, scored=True)[0], scored) for key, c, scored in requests]
        if self.reader is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs or self._padded_rows(requests))
        of_context: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, _) in enumerate(requests):
            of_context.setdefault(tuple(context), []).append(index)
        contexts = list(of_context)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        branchings: list[tuple[Branching, list[int]]] = []
        with self.reader.patched_attention():
            for common, members in group_by_prefix(contexts):
                cached = self.reader.prefill([Branching(contexts[members[0]][:common])])[1][0] if common else None
                for m in members:
                    trunk, all_of_it = contexts[m][common:], of_context[contexts[m]]
                    sizes = [len(requests[i][2]) - 1 for i in all_of_it]
                    for part in pack_consecutive(sizes, max(1, self._batch_tokens - len(trunk))):
                        some = [all_of_it[p] for p in part]
                        branchings.append((Branching(trunk, cached, [requests[i][2][:-1] for i in some]), some))
                # Groups wait for one another to fill a call, but not all: their cached prefixes take memory meanwhile.
                if sum(len(branching.tokens) for branching, _ in branchings) >= self._batch_tokens:
                    self._score(branchings, requests, answers)
                    branchings = []
            self._score(branchings, requests, answers)
        return answers

    def _score(
        self,
        branchings: Sequence[tuple[Branching, list[int]]],
        requests: Sequence[tuple[Any, list[int], list[int]]],
        answers: list[tuple[float, bool]],
    ) -> None:
        """Fills in the answers of the requests whose continuations are the branches of the batches."""
        assert self.reader is not None
        wide = -(-self._batch_tokens * self.reader.widest // _LOGITS)
        # A call is bounded by its tokens and by its logits alike.
        sizes = [
            max(len(branching.tokens), (len(branching.tokens) - len(branching.trunk) + 1) * wide)
            for branching, _ in branchings
        ]
        for pack in pack_consecutive(sizes, self._batch_tokens):
            part = [branchings[i] for i in pack]
            # What follows the trunk is predicted at its last token, the rest of a branch in the branch.
            wanted = [range(len(branching.trunk) - 1, len(branching.tokens)) for branching, _ in part]
            logits = self.reader.read([branching for branching, _ in part], wanted)
            total, greedy = _totals(logits)
            if not torch.isfinite(total).all():
                raise UserError(f"The logits of {self.label} are not finite: it cannot be evaluated.")
            first = 0
            for branching, some in part:
                row = first + 1
                for index in some:
                    continuation = torch.tensor(requests[index][2], device=logits.device)
                    n = len(continuation) - 1
                    at = torch.tensor([first, *range(row, row + n)], device=logits.device)
                    row += n
                    chosen = logits[at, continuation].float()
                    answers[index] = (float((chosen - total[at]).sum()), bool((greedy[at] == continuation).all()))
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])
                first += len(branching.tokens) - len(branching.trunk) + 1

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to every request, cut before its first stop string."""
        answers = [""] * len(requests)
        rows: dict[int, AnswerRow] = {}
        copies: Counter[int] = Counter()
        slow: list[tuple[int, Instance]] = []
        for index, request in enumerate(requests):
            context, given = request.args
            kwargs: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
            until = handle_stop_sequences(kwargs.pop("until"), self.tok_decode(self.eot_token_id, False))
            limit = kwargs.pop("max_gen_toks")
            prompt = self.tok_batch_encode([context])[0][0].tolist()
            prompt, limit = self._fitted(prompt, limit)
            number = copies[id(request)]  # lm-eval asks for several answers by naming a request again
            copies[id(request)] += 1
            seed = f"{self._seed}:{request.idx}:{number}:{context}"
            config = self._plain_config(kwargs)
            if config is None and self._joint is not None:
                raise UserError(
                    f"{self.label} answers greedily or by sampling with temperature, top_k and top_p, but a task asks "
                    f"for {', '.join(sorted(kwargs))}: leave that task out."
                )
            if config is not None:
                rows[index] = self._row(request, prompt, [u for u in until if u], limit, config, seed)
            elif kwargs["do_sample"] or self._after_prompt:
                # One by one: the answer must not depend on its neighbours, and is decoded after its own prompt.
                torch.manual_seed(int(hashlib.sha256(seed.encode()).hexdigest()[:15], 16))
                self._prompt = prompt if self._after_prompt else None
                answers[index] = super().generate_until([limited(request, limit)], disable_tqdm=True)[0]
                self._prompt = None
                self.cache_hook.add_partial("generate_until", request.args, answers[index])
            else:
                slow.append((index, limited(request, limit)))
        if rows:
            self._decode(rows, answers)
        if slow:
            found = super().generate_until([request for _, request in slow], disable_tqdm)
            for (index, _), answer in zip(slow, found, strict=True):
                answers[index] = answer
        return answers

    def _plain_config(self, kwargs: dict[str, Any]) -> GenerationConfig | None:
        """The settings of `generate` for these kwargs; None where they need more than greedy, top-k or top-p."""
        given = {name: v for name, v in kwargs.items() if name != "temperature" or kwargs["do_sample"]}
        config, others = self.model._prepare_generation_config(None, **given)
        mode = config.get_generation_mode()
        ours = mode == GenerationMode.GREEDY_SEARCH or (
            mode == GenerationMode.SAMPLE
            and all(getattr(config, name, None) in plain for name, plain in _WARPERS.items())
        )
        if others or not ours or config.guidance_scale not in (None, 1) or config.watermarking_config is not None:
            return None
        return config

    @property
    def end_tokens(self) -> list[int]:
        """The tokens that end an answer: the tokenizer's end of text and those that the model generates with."""
        ends = self.model.generation_config.eos_token_id
        return sorted({self.eot_token_id, *(ends if isinstance(ends, list) else [] if ends is None else [ends])})

    def _row(
        self, request: Instance, prompt: list[int], until: list[str], limit: int, config: GenerationConfig, seed: str
    ) -> AnswerRow:
        sampling = None
        if config.do_sample:
            top_p = 1.0 if config.top_p is None else config.top_p
            sampling = Sampling(config.temperature or 1.0, config.top_k or 0, top_p, random.Random(seed))
        config.do_sample = False  # what is left to transformers are the processors, not the sampling
        config.max_length = len(prompt) + limit
        self.model._prepare_special_tokens(config, True, device=self.device)
        processors = self.model._get_logits_processor(config, input_ids_seq_length=len(prompt), device=self.device)
        return AnswerRow(
            request,
            prompt,
            until,
            frozenset(self.end_tokens),
            limit,
            max(len(stop.encode()) for stop in until) + 2,
            processors,
            sampling,
        )

    def _decode(self, rows: dict[int, AnswerRow], answers: list[str]) -> None:
        """Fills in the answers of the rows, each under the index of its request."""
        indices = list(rows)

        def choose(numbers: Sequence[int], logits: Tensor) -> list[int | None]:
            some = [rows[indices[n]] for n in numbers]
            if not torch.isfinite(logits.amax(-1)).all():
                raise UserError(f"The logits of {self.label} are not finite: it cannot be evaluated.")
            for row, token in zip(some, next_tokens(some, logits), strict=True):
                row.new.append(token)
            tails = self.tokenizer.batch_decode([row.new[-row.lookback :] for row in some])
            chosen: list[int | None] = []
            for n, row, tail in zip(numbers, some, tails, strict=True):
                ended = row.ended(tail)
                chosen.append(None if ended else row.new[-1])
                if ended:
                    self._prompt = row.prompt if self._after_prompt else None
                    text = self.tok_decode(row.new)
                    self._prompt = None
                    answers[indices[n]] = postprocess_generated_text(text, row.until, None)
                    self.cache_hook.add_partial("generate_until", row.request.args, answers[indices[n]])
            return chosen

        if self.rows == "auto":
            self.rows = self._room(max(len(row.prompt) + row.limit for row in rows.values()))
        prompts = [rows[i].prompt for i in indices]
        if self.reader is not None:
            decode(self.reader, prompts, choose, rows=self.rows, batch_tokens=self._batch_tokens)
        else:
            limit, pad = max(row.limit for row in rows.values()), self.tokenizer.pad_token_id
            decode_padded(self.model, prompts, choose, rows=self.rows, limit=limit, pad=pad)

    def fitting_rows(self, requests: Sequence[Instance]) -> int:
        """The number of answers to generate at one time: as it is set, else as many of the longest as memory allows."""
        if self._batch_size != "auto":
            return self._batch_size
        lengths = [1]
        for request in heapq.nlargest(_LONGEST, requests, key=lambda request: len(request.args[0])):
            context, given = request.args
            with suppress(Exception):  # a text that the tokenizer does not take is named when it is asked
                new = normalize_gen_kwargs(given, self.max_gen_toks)["max_gen_toks"]
                lengths.append(len(self.tok_batch_encode([context])[0][0]) + int(new))
        return self._room(min(max(lengths), self.max_length))

    def _room(self, length: int) -> int:
        """The number of sequences of `length` tokens decoded at one time, which use half of the free memory at most."""
        free = psutil.virtual_memory().available
        if self.device.type == "cuda":  # with what torch keeps for later
            kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            free = torch.cuda.mem_get_info(self.device)[0] + kept
        of_row = padded_row_bytes(self.model, length) if self.reader is None else self.reader.position_bytes * length
        return max(1, min(ROWS, free // 2 // of_row))

    def _padded_rows(self, requests: Sequence[tuple[Any, list[int], list[int]]]) -> int:
        """Sequences that HFLM scores at one time: as many as fit a quarter of the memory that the weights leave of the
        device's, whoever uses it, so that answers do not depend on the moment.
        """
        if self._batch_size != "auto":
            return self._batch_size
        room = device_memory(str(self.device)) - sum(weight.nbytes for weight in self.model.parameters())
        longest = max(len(context) + len(scored) for _, context, scored in requests)
        return max(1, min(ROWS, room // 4 // padded_row_bytes(self.model, longest)))

    def overflow(self, request: Instance) -> Overflow | None:
        """How a request exceeds the context, and what is read of it by the rule; None where it fits."""
        if request.request_type not in ("generate_until", "loglikelihood"):
            return None
        generates = request.request_type == "generate_until"
        text, following = request.args
        new = int(normalize_gen_kwargs(following, self.max_gen_toks)["max_gen_toks"]) if generates else 0
        written = text if generates else text + following
        # A token is a byte or more, but for those put before.
        if len(written.encode(errors="surrogatepass")) + 2 + new <= self.max_length:
            return None
        if generates:
            prompt = self.tok_batch_encode([text])[0][0].tolist()
        elif text:
            prompt, scored = self._encode_pair(text, following)
            new = len(scored) - 1
        else:
            prompt, new = [self.prefix_token_id], len(self.tok_encode(following, add_special_tokens=False)) - 1
        if self._excess(prompt, new) <= 0:
            return None
        read, left = fit(prompt, new, self._excess, self._rule(not generates)) or ([], new)
        return Overflow(self.max_length, len(prompt), len(read), left)

    def _rule(self, scored: bool) -> OverflowRule:
        """The rule; a continuation that is scored cannot be shrunk."""
        shrinks = self._overflow == "shrink_answer"
        return "truncate_left" if shrinks and scored else self._overflow or "skip"

    def _excess(self, tokens: Sequence[int], new: int) -> int:
        """By how many tokens a text and so many new ones exceed the context; of an ensemble, the worst member's."""
        own = len(tokens) + new - self.max_length
        return own if self._joint is None else max(own, self._joint.excess(tokens, new))

    def _fitted(self, prompt: list[int], new: int, *, scored: bool = False) -> tuple[list[int], int]:
        """What is read of a prompt, and the longest answer. Raises UserError where nothing can be asked."""
        fitted = fit(prompt, new, self._excess, self._rule(scored))
        if fitted is None:
            raise UserError(
                f"A prompt of {len(prompt)} tokens with up to {new} new ones does not fit the context of {self.label}, "
                f"{self.max_length}: leave its task out, or lower max_new_tokens."
            )
        return fitted
