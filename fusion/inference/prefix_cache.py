"""Forward passes over sequences with common prefixes: a prefix is computed once, and its keys and values are kept once.

All new tokens of a call lie in one unpadded row, and attention is computed here, sequence by sequence, through
transformers' registry of attention functions. A prefix is therefore never copied to the sequences that continue it,
sliding windows and caches of any layer follow from positions alone, and the result for a sequence does not depend on
what else is in the call (except for rounding). Whether all that holds for the model at hand is tested at start-up, not
assumed.

Decoding against a prefix that is stored once: Juravsky et al. 2024, Hydragen (arXiv 2402.05099).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fusion.inference.prefix_tree import Branching, CachedPrefix, PrefixTree
from fusion.modeling.context import context_length
from fusion.modeling.heads import find_head, float32_logits
from fusion.modeling.packing import device_of, dtype_of, own_forward, trial_tokens, trying
from fusion.modeling.sliding_windows import LONGEST_TRIAL, longest_window, wrong_windows

ATTENTION = "fusellm_prefixes"  # what the attention function is called in transformers' registry
_HARMLESS = {"dropout", "position_ids", "use_cache", "is_causal", "sliding_window"}
_TRIAL = 24  # tokens of the prefix that the trial caches
_COPIED = 2**22  # numbers of keys that exist in float32 at one time on a processor: 16 MB
_GROWTH = 128  # positions by which a row's memory grows


class UnsupportedModel(Exception):
    """Raised for a model whose logits cannot be computed this way; the message gives the reason."""


class DecodingBatch:
    """At most `room` sequences that continue one cached prefix; every decoding step appends one token to each."""

    def __init__(self, cached: CachedPrefix | None, room: int) -> None:
        self.cached = cached
        self._room = room
        self.lengths: list[int] = []
        """Of each sequence: the number of tokens after the cached prefix whose keys and values are stored."""
        self.keys: list[Tensor] = []  # a layer: [rows, H, capacity, D], more of both than are in use
        self.values: list[Tensor] = []
        self.tokens: list[list[int]] = []
        """Of each sequence: all tokens from the beginning of the text."""
        self.member_prefixes: list[list[CachedPrefix]] = []

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def start(self) -> int:
        """The position of the first token after the cached prefix."""
        return self.cached.length if self.cached else 0

    def add(self, started: CachedPrefix) -> None:
        """Adds a sequence whose tokens after the cached prefix are `started`."""
        n = len(self)
        if not self.keys:
            self.keys = [k.new_zeros(self._room, k.shape[0], 0, k.shape[2]) for k in started.keys]
            self.values = [v.new_zeros(self._room, v.shape[0], 0, v.shape[2]) for v in started.values]
        self.reserve(started.length + 1)
        for kept, new in zip([*self.keys, *self.values], [*started.keys, *started.values], strict=True):
            kept[n, :, : started.length] = new
        self.lengths.append(started.length)
        self.tokens.append(list(started.tokens))
        self.member_prefixes.append(list(started.member_prefixes))

    def drop(self, row: int) -> None:
        """Removes a sequence; the last one takes its index."""
        last = len(self) - 1
        if row != last:
            for kept in [*self.keys, *self.values]:
                kept[row] = kept[last]
        by_row: list[list[Any]] = [self.lengths, self.tokens, self.member_prefixes]
        for notes in by_row:
            notes[row] = notes[last]
            notes.pop()

    def reserve(self, positions: int) -> None:
        """Makes room for `positions` tokens of every sequence."""
        if positions <= self.keys[0].shape[2]:
            return
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                # Zeros: what lies beyond a row's end is multiplied by 0, which is 0 only if it is finite.
                new = old.new_zeros(*old.shape[:2], positions + _GROWTH, old.shape[3])
                new[:, :, : old.shape[2]] = old
                tensors[layer] = new


class _PrefillAttention:
    """Attention of several branchings or trees computed side by side in one call."""

    def __init__(self, branchings: "Sequence[Branching | PrefixTree]", device: torch.device, *, keep: bool) -> None:
        self._branchings = branchings
        self._device = device
        ends = torch.tensor([len(branching.tokens) for branching in branchings]).cumsum(0).tolist()
        self.spans = [slice(end - len(branching.tokens), end) for branching, end in zip(branchings, ends, strict=True)]
        self._masks: dict[tuple[int, int | None], Tensor] = {}
        self.keep = keep
        self.kept: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in branchings]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """out[A, T, D] of q[A, T, D], k[H, T, D], v[H, T, D]; A is a multiple of H (grouped queries)."""
        out = q.new_empty(*q.shape[:2], v.shape[2])
        attention = nn.functional.scaled_dot_product_attention
        heads, group = k.shape[0], q.shape[0] // k.shape[0]
        for number, (branching, span) in enumerate(zip(self._branchings, self.spans, strict=True)):
            keys, values = k[:, span], v[:, span]
            if self.keep:  # a copy, so that the whole call's keys are not kept alive
                self.kept[number][0].append(keys.clone())
                self.kept[number][1].append(values.clone())
            if branching.cached is not None:
                keys = torch.cat([branching.cached.keys[layer], keys], 1)
                values = torch.cat([branching.cached.values[layer], values], 1)
            n = span.stop - span.start
            if branching.is_plain(window):
                out[:, span] = attention(
                    q[None, :, span], keys[None], values[None], is_causal=True, scale=scale, enable_gqa=group > 1
                )[0]
                continue
            # Query heads that share keys are stacked as more queries: nothing is repeated.
            stacked = q[:, span].reshape(1, heads, group * n, -1)
            mask = self._mask(number, window).repeat(group, 1)
            attended = attention(stacked, keys[None], values[None], attn_mask=mask, scale=scale)
            out[:, span] = attended.reshape(q.shape[0], n, -1)
        return out

    def _mask(self, number: int, window: int | None) -> Tensor:
        if (number, window) not in self._masks:
            self._masks[number, window] = self._branchings[number].mask(window).to(self._device)
        return self._masks[number, window]


class _DecodeAttention:
    """Attention of one more token of every sequence of the decoding batches."""

    def __init__(self, groups: Sequence[DecodingBatch], device: torch.device) -> None:
        self._groups = groups
        self._lengths = [torch.tensor(rows.lengths, device=device) for rows in groups]
        self._hidden: dict[tuple[int, int | None], Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """out[A, N, D] of q[A, N, D], k[H, N, D], v[H, N, D], N being the sequences of all batches."""
        out = q.new_empty(*q.shape[:2], v.shape[2])
        start = 0
        for number, rows in enumerate(self._groups):
            span = slice(start, start + len(rows))
            start = span.stop
            out[:, span] = self._of_group(number, layer, q[:, span], k[:, span], v[:, span], scale, window)
        return out

    def _of_group(
        self, number: int, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        rows, lengths = self._groups[number], self._lengths[number]
        n, end = len(rows), max(rows.lengths) + 1
        keys, values = rows.keys[layer], rows.values[layer]
        at = torch.arange(n, device=lengths.device), slice(None), lengths
        keys[at], values[at] = k.transpose(0, 1), v.transpose(0, 1)
        heads, group = k.shape[0], q.shape[0] // k.shape[0]
        q = q.reshape(heads, group, n, -1)
        own = _scores(q.permute(2, 0, 1, 3).flatten(0, 1), keys[:n, :, :end].flatten(0, 1))  # [n * H, group, end]
        scores = own.unflatten(0, (n, heads)).permute(1, 2, 0, 3)
        if rows.cached is not None:
            cached = _scores(q.flatten(1, 2), rows.cached.keys[layer])
            scores = torch.cat([cached.unflatten(1, (group, n)), scores], 3)
        p = (scores * scale).masked_fill(self._hides(number, end, window), -torch.inf).softmax(-1).to(v.dtype)
        out = (p[..., rows.start :].permute(2, 0, 1, 3) @ values[:n, :, :end]).permute(1, 2, 0, 3)
        if rows.cached is not None:
            of_prefix = p[..., : rows.start].flatten(1, 2) @ rows.cached.values[layer]
            out = out + of_prefix.unflatten(1, (group, n))
        return out.flatten(0, 1)

    def _hides(self, number: int, end: int, window: int | None) -> Tensor:
        """bool[n, L + end]: what each row's new token does not see."""
        if (number, window) not in self._hidden:
            start, last = self._groups[number].start, self._lengths[number][:, None]
            at = torch.arange(start + end, device=last.device)
            hidden = at > start + last
            if window is not None:
                hidden |= start + last - at >= window
            self._hidden[number, window] = hidden
        return self._hidden[number, window]


def _scores(q: Tensor, keys: Tensor) -> Tensor:
    """The products [B, M, N] of q[B, M, D] and keys[B, N, D], in float32 where these are shorter.

    As in flash attention: there are models whose scores are in the hundreds. The keys are never all copied to float32.
    """
    if torch.finfo(keys.dtype).bits >= 32:
        return q @ keys.transpose(1, 2)
    if keys.is_cuda:
        return torch.bmm(q.to(keys.dtype), keys.transpose(1, 2), out_dtype=torch.float32)
    pairs = zip(*(x.split(max(1, _COPIED // keys[0].numel())) for x in (q, keys)), strict=True)
    return torch.cat([part.float() @ of_part.float().transpose(1, 2) for part, of_part in pairs])


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    shared: "_PrefillAttention | _DecodeAttention | _RecordingAttention | LayerOffset | None" = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The function registered with transformers: query[1, A, T, D], key and value[1, H, T, D] of new tokens."""
    if shared is None or attention_mask is not None:
        raise UnsupportedModel("its attention layers are not handed what its forward was called with")
    strange = sorted(name for name, v in options.items() if v is not None and name not in _HARMLESS)
    if strange:
        raise UnsupportedModel(f"its attention takes {', '.join(strange)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: Any = module.layer_idx
    return shared.attend(layer, query[0], key[0], value[0], scale, sliding_window).transpose(0, 1)[None], None


class _RecordingAttention:
    """Delegates to a prefill attention and records the sliding window that each layer passes."""

    def __init__(self, attention: _PrefillAttention, windows: dict[int, int | None]) -> None:
        self._attention, self._windows = attention, windows

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        self._windows[layer] = window
        return self._attention.attend(layer, q, k, v, scale, window)


class LayerOffset:
    """Delegates to an attention whose first layers belong to other models of an ensemble."""

    def __init__(self, shared: Any, first: int) -> None:
        self._shared, self._first = shared, first

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        attended: Tensor = self._shared.attend(self._first + layer, q, k, v, scale, window)
        return attended


class PrefixCachedModel:
    """A causal LM whose prefixes are cached. Its methods are called inside `with model.patched_attention():`.

    Raises UnsupportedModel when logits computed this way differ from the model's own.
    """

    def __init__(self, model: nn.Module, *, float32_logits: bool = False) -> None:
        """float32_logits: logits of a model in a shorter dtype are not rounded to it, where the form of its head is
        known. Default: they are the model's own.
        """
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION, _attend)
        self._model = model
        short = torch.finfo(dtype_of(model)).bits < 32
        self._float32_logits = float32_logits and short and find_head(model) is not None
        self.device = device_of(model)
        config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
        self.vocabulary = self.widest = int(config.vocab_size)
        self.positions = context_length(config)
        self.layers = int(config.num_hidden_layers)
        self.position_bytes = 0
        """Bytes of keys and values per token, over all layers."""
        self._windows: dict[int, int | None] = {}
        try:
            reason = self._disagreement()
        except UnsupportedModel:
            raise
        except Exception as error:  # whatever a model raises on inputs that it does not take
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if reason is not None:
            raise UnsupportedModel(reason)

    @contextmanager
    def patched_attention(self) -> Iterator[None]:
        """Replaces the model's attention inside the block; there the model can be called only through this class."""
        config: Any = self._model.config
        before = config._attn_implementation
        config._attn_implementation = ATTENTION
        try:
            with torch.inference_mode():
                yield
        finally:
            config._attn_implementation = before

    def read(self, branchings: Sequence[Branching | PrefixTree], wanted: Sequence[Sequence[int]]) -> Tensor:
        """logits[n, V] at the wanted tokens (indices into the tokens) of each branching or tree, in order."""
        return self._read(_PrefillAttention(branchings, self.device, keep=False), branchings, wanted)

    def prefill(
        self, branchings: Sequence[Branching | PrefixTree], wanted: Sequence[Sequence[int]] | None = None
    ) -> tuple[Tensor, list[CachedPrefix]]:
        """As `read`, by default at the last token of each, and the new tokens as cached prefixes of their own.

        The cached prefixes hold the keys and values of the new tokens only, not those of the prefixes they continue.
        """
        attention = _PrefillAttention(branchings, self.device, keep=True)
        logits = self._read(attention, branchings, wanted or [[len(branching.tokens) - 1] for branching in branchings])
        before = [branching.cached.tokens if branching.cached else () for branching in branchings]
        return logits, [
            CachedPrefix(len(branching.tokens), *kept, (*so_far, *branching.tokens))
            for branching, kept, so_far in zip(branchings, attention.kept, before, strict=True)
        ]

    def step(self, groups: Sequence[DecodingBatch], tokens: Sequence[int]) -> Tensor:
        """logits[N, V] after one more token of each of the N sequences of all batches, in their order."""
        for rows in groups:
            rows.reserve(max(rows.lengths) + 1)
        positions = [rows.start + length for rows in groups for length in rows.lengths]
        logits = self._forward(tokens, positions, list(range(len(tokens))), _DecodeAttention(groups, self.device))
        for row, token in zip((row for rows in groups for row in rows.tokens), tokens, strict=True):
            row.append(token)
        for rows in groups:
            rows.lengths[:] = [length + 1 for length in rows.lengths]
        return logits

    def _read(
        self, attention: Any, branchings: Sequence[Branching | PrefixTree], wanted: Sequence[Sequence[int]]
    ) -> Tensor:
        starts = [span.start for span in _PrefillAttention(branchings, self.device, keep=False).spans]
        return self._forward(
            [t for branching in branchings for t in branching.tokens],
            [p for branching in branchings for p in branching.positions],
            [start + i for start, indices in zip(starts, wanted, strict=True) for i in indices],
            attention,
        )

    def _forward(self, tokens: Sequence[int], positions: Sequence[int], wanted: Sequence[int], shared: Any) -> Tensor:
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor([list(tokens)], device=self.device),
            "position_ids": torch.tensor([list(positions)], device=self.device),
            "use_cache": False,
            "shared": shared,
        }
        index = torch.tensor(list(wanted), device=self.device)
        if self._float32_logits:
            backbone: Any = self._model.base_model
            return float32_logits(self._model, backbone(**inputs).last_hidden_state[0, index])
        logits: Tensor = own_forward(self._model, **inputs, logits_to_keep=index).logits[0]
        return logits

    def _disagreement(self) -> str | None:
        """The reason why this model is not supported, found with a few random tokens computed in every possible way, or
        None.
        """
        config: Any = self._model.config.get_text_config()  # type: ignore[operator, union-attr]
        if any(kind in str(getattr(config, "rope_parameters", "")) for kind in ("'dynamic'", "'longrope'")):
            return "its rotary positions depend on the longest sequence read at one time"
        with trying(self._model) as generator:
            # Beyond a window, and so long that an error of one position shows in a short type's rounding, too.
            for length in dict.fromkeys([_TRIAL, max(_TRIAL, longest_window(config, LONGEST_TRIAL) + 2)]):
                if reason := self._difference(min(length, (self.positions or length + 16) - 16), generator):
                    return reason
        return wrong_windows(config, self._windows)

    def _difference(self, length: int, generator: torch.Generator) -> str | None:
        """How the logits after a cached prefix of so many tokens differ from the model's own; None where they do not.

        Branches, a second continuation and decoding steps are read. What is allowed is a multiple of the difference
        that the model's own logits show when the same text is read with more behind it.
        """
        tokens = trial_tokens(self._model, (length + 16,), generator).tolist()
        cached, (trunk, one, other, third) = tokens[:length], [tokens[i : i + 4] for i in range(length, length + 16, 4)]
        texts = [[*cached, *trunk, *one], [*cached, *trunk, *other], [*cached, *third], [*cached, *trunk, *one, *third]]
        *own, longer = [
            own_forward(self._model, input_ids=torch.tensor([t], device=self.device), use_cache=False).logits[0].float()
            for t in texts
        ]
        with self.patched_attention():
            _, (kept,) = self.prefill([Branching(cached)])
            if len(kept.keys) != self.layers:
                return "not all of its layers compute attention through transformers' registry"
            self.position_bytes = sum(x.nbytes for x in [*kept.keys, *kept.values]) // kept.length
            branchings = [Branching(trunk, kept, [one, other]), Branching(third, kept)]
            watched = _RecordingAttention(_PrefillAttention(branchings, self.device, keep=False), self._windows)
            tree = self._read(watched, branchings, [range(12), range(4)])
            rows = DecodingBatch(kept, 2)
            _, started = self.prefill([Branching(trunk, kept), Branching(third[:1], kept)])
            for row in started:
                rows.add(row)
            steps = [self.step([rows], pair) for pair in zip(one[:3], third[1:], strict=True)]
        whole = torch.cat([own[0][length:], own[1][length + 4 :], own[2][length:]])
        expected = torch.stack([x for i in range(3) for x in (own[0][length + 4 + i], own[2][length + 1 + i])])
        noise = _rms(longer[length : length + 8] - whole[:8])
        apart = max(_rms(tree - whole), _rms(torch.cat(steps) - expected))
        spread = _rms(whole - whole.mean(-1, keepdim=True))
        if not apart <= max(max(1e-4, 8 * torch.finfo(dtype_of(self._model)).eps) * spread, 3 * noise):
            return f"its logits are not its own when read in parts (apart by {apart / spread:.2g} of their spread)"
        return None


def _rms(x: Tensor) -> float:
    return float(x.float().square().mean().sqrt())
