"""Packing: several passages in one sequence, none of which may attend to another; positions restart with each.

In transformers 5.23 `create_causal_mask` detects the passages itself wherever positions do not grow by one, for eager,
sdpa and flex attention, any batch size, sliding windows included, but only if it is given `position_ids`, no
`attention_mask` and no cache. A model creates a cache unless told `use_cache=False`, in training too, and then the
passages silently attend to each other. Flash attention detects passages only in batches of one sequence. The rule that
holds for the model at hand is therefore tested at start-up, not assumed.

A mask hides products that were computed for nothing: with four passages in a sequence, seven eighths of the attention's
products are masked. `passages` is therefore tried first: an attention of our own over `sdpa` that computes one passage
at a time.

The padding at the end of a sequence is one more passage: its positions restart at 0.

Where nothing keeps packed passages apart (recurrent and convolutional layers, attention biases by distance alone), a
sequence holds a single passage, padded on the right, which a causal model cannot attend to.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from fusion.errors import UserError
from fusion.modeling.attention import attend_by_passage
from fusion.modeling.sliding_windows import LONGEST_TRIAL, longest_window, wrong_windows

Packing = Literal["passages", "positions", "flat", "mask", "single"]
PACKINGS: tuple[Packing, ...] = ("passages", "positions", "flat", "mask", "single")
_BY_PASSAGE = "fusellm_by_passage"  # the name of `attend_by_passage` among the attentions of transformers


def packed_inputs(
    packing: Packing,
    input_ids: Tensor,
    position_ids: Tensor,
    dtype: torch.dtype,
    passage_lengths: Sequence[Sequence[int]] | None = None,
) -> dict[str, Any]:
    """The arguments of a model's forward under which the passages of input_ids[B, T] do not attend to each other.

    position_ids[B, T] restart at 0 with each passage; `passage_lengths` are the same in lengths, a list for each
    sequence. Default: counted, for which the host waits for the device. `passages` passes them, for a model with
    our own attention (`attending_by_passage`); `positions` relies on the model's own detection; `flat` joins the
    batch to one sequence of B * T, for flash attention; `mask` adds an explicit mask [B, 1, T, T] in `dtype` (the
    model's); `single` is for sequences of one passage each. The order of the hidden states is the same for all.
    """
    if packing == "single":
        return {"input_ids": input_ids, "use_cache": False}
    if packing == "flat":
        input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
    inputs: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
    if packing == "mask":
        inputs["attention_mask"] = passage_mask(position_ids, dtype)
    if packing == "passages":
        inputs["passage_lengths"] = passage_lengths or [
            torch.unique_consecutive(p, return_counts=True)[1].tolist() for p in _passage_numbers(position_ids)
        ]
    return inputs


def _passage_numbers(position_ids: Tensor) -> Tensor:
    """int64[B, T]: the number of the passage that a position belongs to, from position_ids[B, T] that restart with
    each.
    """
    return (position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1).cumsum(1)


@contextmanager
def attending_by_passage(
    model: nn.Module, packing: Packing, windows: dict[int, int | None] | None = None
) -> Iterator[None]:
    """Inside the block, for `passages`, the model has the attention that needs `passage_lengths`; afterwards its own
    again.

    The backward pass must be inside the block too: activation checkpointing recomputes the attention there. `windows`
    receives the sliding window that each layer asks for, by the layer's number.
    """
    if packing != "passages":
        yield
        return
    before = model.config._attn_implementation  # type: ignore[union-attr]
    if before != "sdpa" or not _layer_kinds(model) <= {"full_attention", "sliding_attention"}:
        raise ValueError(f"its layers are {', '.join(sorted(_layer_kinds(model)))} under {before}")

    def recorded(module: nn.Module, *states: Any, sliding_window: int | None = None, **options: Any) -> Any:
        assert windows is not None
        windows[getattr(module, "layer_idx", 0)] = sliding_window
        return attend_by_passage(module, *states, sliding_window=sliding_window, **options)

    AttentionInterface.register(_BY_PASSAGE, attend_by_passage if windows is None else recorded)
    model.set_attn_implementation(_BY_PASSAGE)  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]


def passage_mask(position_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive causal mask [B, 1, T, T], 0 or the most negative number, for position_ids[B, T] as above."""
    passage = _passage_numbers(position_ids)
    at = torch.arange(passage.shape[1], device=passage.device)
    seen = (passage[:, :, None] == passage[:, None, :]) & (at[:, None] >= at)
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def check_packing(model: nn.Module) -> Packing:
    """The first of `PACKINGS` under which packed passages of this causal LM do not attend to each other.

    Tested with a few random tokens on the model itself, in evaluation mode, without gradients: the logits of a passage
    must equal those of the passage alone and must not change with its neighbours' tokens. Passages are longer than the
    model's sliding windows where these are short; where they are long, its layers must ask for the windows that its
    configuration states. Warns when only one of the last three packings holds. Raises `UserError` when none holds.
    """
    failures = []
    for packing in PACKINGS:
        if packing == "mask" and _layer_kinds(model) != {"full_attention"}:
            kinds = ", ".join(sorted(_layer_kinds(model) - {"full_attention"}))
            failures.append(f"mask: the model has layers of {kinds}, for which one mask does not serve")
            continue
        try:
            failure = _leak(model, packing)
        except Exception as error:  # whatever a model raises on inputs that it does not take
            failure = f"{type(error).__name__}: {error}".splitlines()[0]
        if failure is None:
            if packing not in ("passages", "positions"):
                how = ": one passage a sequence, padded on the right" if packing == "single" else ""
                warnings.warn(
                    f"{type(model).__name__} does not find packed passages by their positions ({'; '.join(failures)}): "
                    f"packing is done with '{packing}'{how}",
                    stacklevel=2,
                )
            return packing
        failures.append(f"{packing}: {failure}")
    raise UserError(
        f"{type(model).__name__} with attention {getattr(model.config, '_attn_implementation', None)!r} lets packed "
        f"passages see each other ({'; '.join(failures)}): load it with attn_implementation='sdpa' or 'eager', or "
        "choose another model."
    )


def own_forward(model: nn.Module, **inputs: Any) -> Any:
    """Calls the forward of the model's class, even where the training loop replaced that of the instance."""
    return type(model).forward(model, **inputs)


@contextmanager
def trying(model: nn.Module) -> Iterator[torch.Generator]:
    """Evaluation mode, no gradients and a generator of its own inside the block; every module's mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield torch.Generator().manual_seed(0)
    finally:
        for module, mode in modes:
            module.training = mode


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's input embeddings."""
    return model.get_input_embeddings().weight.device  # type: ignore[operator]


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the model's first floating-point parameter."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def trial_tokens(model: nn.Module, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Random token ids int64[*shape] for a trial on the CPU, none of which the configuration names.

    Placeholders of images and padding may be treated otherwise than text.
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    named = {
        number
        for given in (model.config.to_dict(), config.to_dict())  # type: ignore[operator, union-attr]
        for name, value in given.items()
        if name.endswith(("token_id", "token_index", "token_ids"))
        for number in (value if isinstance(value, list) else [value])
    }
    plain = torch.tensor([i for i in range(config.vocab_size) if i not in named])
    return plain[torch.randint(len(plain), tuple(shape), generator=generator)]


def _leak(model: nn.Module, packing: Packing) -> str | None:
    """The fault found with two sequences of two passages and padding, and with one beyond a sliding window, or None."""
    windows: dict[int, int | None] = {}
    # Lengths of the passages; the 2 stand for padding. A single passage is followed by padding alone.
    rows = ((8, 2), (4, 6)) if packing == "single" else ((3, 5, 2), (4, 6))
    with trying(model) as generator:
        if reason := _leaks(model, packing, rows, generator, windows):
            return reason
        if packing == "passages" and (reason := wrong_windows(model.config, windows)):
            return reason
        beyond = longest_window(model.config, LONGEST_TRIAL - 2) + 2
        return _leaks(model, packing, ((beyond, 3),), generator, windows) if beyond > 2 else None


def _leaks(
    model: nn.Module,
    packing: Packing,
    rows: Sequence[Sequence[int]],
    generator: torch.Generator,
    windows: dict[int, int | None],
) -> str | None:
    """The fault found with packed passages of these lengths, the same number of tokens in each row, or None."""
    dtype, device = dtype_of(model), device_of(model)
    eps = torch.finfo(dtype).eps

    def logits(tokens: Tensor, lengths: Sequence[Sequence[int]], how: Packing) -> Tensor:
        positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
        inputs = packed_inputs(how, tokens.to(device), positions.to(device), dtype)
        with attending_by_passage(model, how, windows):
            out = own_forward(model, **inputs).logits
        return out.reshape(*tokens.shape, -1).float()

    tokens, others = trial_tokens(model, (2, len(rows), sum(rows[0])), generator)
    packed = logits(tokens, rows, packing)
    size = packed.abs().max()
    for r, lengths in enumerate(rows):
        start = 0
        for n in lengths[:1] if packing == "single" else lengths:
            part = slice(start, start + n)
            alone = logits(tokens[r : r + 1, part], ((n,),), "single")
            # The same tokens, in a product of another shape: rounding differs, positions must not.
            if not (packed[r, part] - alone[0]).abs().max() <= max(1e-4, 8 * eps) * size:
                return "a packed passage does not give what it gives alone"
            mixed = others.clone()
            mixed[r, part] = tokens[r, part]
            # The same shapes: what is masked is exactly 0, so that any difference beyond the last digits is a leak.
            if not (packed[r, part] - logits(mixed, rows, packing)[r, part]).abs().max() <= 8 * eps * size:
                return "a packed passage changes with its neighbours"
            start += n
    return None


def _layer_kinds(model: nn.Module) -> set[str]:
    """The attention kinds of the layers, in transformers' names."""
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    if kinds := getattr(config, "layer_types", None):
        return set(kinds)
    slides = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return {"sliding_attention" if slides else "full_attention"}
