"""Loading a resolved model: its configuration, its weights and its tokenizer."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fusion.errors import UserError, message_line
from fusion.modeling.loading import check_loading, code_was_refused
from harness.models.resolution import GENERATION_FILE, ResolvedModel
from harness.runtime.device import DType, compute_dtype
from harness.store.files import read_json_object

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast


def load_whole_config(resolved: ResolvedModel) -> Any:
    """The model's configuration as transformers reads it, of all its parts. Raises UserError when it cannot."""
    from transformers import AutoConfig

    return _load(
        resolved,
        lambda: AutoConfig.from_pretrained(
            resolved.folder, local_files_only=True, trust_remote_code=resolved.spec.trust_remote_code
        ),
    )


def load_config(resolved: ResolvedModel) -> Any:
    """The configuration of the text model, which is all of it where there are no other parts. Raises UserError."""
    return load_whole_config(resolved).get_text_config()


def load_model(resolved: ResolvedModel, dtype: DType | None = None, device: str = "cpu") -> "PreTrainedModel":
    """The model in evaluation mode, in `dtype` on `device`. Default of `dtype`: the spec's.

    Only safetensors are read, the network is not used, and code from the folder runs only where the spec allows it.
    Of generation_config.json only the ids of control tokens are taken: how an answer is decoded is the suite's to say.
    Raises UserError when a weight is missing, superfluous or of another shape, since the library would replace it by
    random numbers.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # Straight from the files: eight processes that load on the CPU first have eight models in the machine's memory.
    options: dict[str, Any] = {} if device == "cpu" else {"device_map": {"": device}}
    if resolved.spec.attn_implementation is not None:
        options["attn_implementation"] = resolved.spec.attn_implementation
    model, info = _load(
        resolved,
        lambda: AutoModelForCausalLM.from_pretrained(
            resolved.folder,
            # The default would be the checkpoint's own dtype.
            dtype=getattr(torch, compute_dtype(dtype or resolved.spec.dtype, device)),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=resolved.spec.trust_remote_code,
            output_loading_info=True,
            generation_config=control_tokens(resolved),
            **options,
        ),
    )
    check_loading(info, model, str(resolved.folder))
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


def load_without_weights(resolved: ResolvedModel) -> "PreTrainedModel":
    """The model in float32 on the CPU, as `load_model` gives it, but with parameters that nothing is written to.

    They take no memory until something is. For a process that another one sends the weights to.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    spec = resolved.spec
    options = {} if spec.attn_implementation is None else {"attn_implementation": spec.attn_implementation}
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = _load(
            resolved,
            lambda: AutoModelForCausalLM.from_config(
                load_whole_config(resolved), dtype=torch.float32, trust_remote_code=spec.trust_remote_code, **options
            ),
        )
    model._apply(lambda tensor: torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor)
    model.tie_weights()
    return model.eval()


def control_tokens(resolved: ResolvedModel) -> "GenerationConfig":
    """The ids of bos, eos and pad that the model generates with: those of its generation_config.json if it has one.

    No penalty, sampling, beam search or other setting of that file would be the same for all rows of a table, and
    transformers refuses to load or save some combinations of them. Raises UserError for what is no token id.
    """
    from transformers import GenerationConfig

    path = resolved.folder / GENERATION_FILE
    source = read_json_object(path, "correct it, or remove it") if path.is_file() else load_config(resolved).to_dict()
    ids = {f"{name}_token_id": source.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
    for name, value in ids.items():
        if not all(type(id) is int for id in (value if isinstance(value, list) else [value]) if id is not None):
            raise UserError(f"{path} has {name} = {value!r}, which is no token id: correct it.")
    return GenerationConfig(**ids)


def load_tokenizer(resolved: ResolvedModel) -> "PreTrainedTokenizerFast":
    """The fast tokenizer exactly as tokenizer.json describes it. Raises UserError when it cannot be read.

    It is not loaded by AutoTokenizer: a class named in the configuration may rebuild the pipeline from the vocabulary,
    and then splits some text (leading spaces, digits) differently from the text that the model was trained on.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer: PreTrainedTokenizerFast = _load(
        resolved, lambda: PreTrainedTokenizerFast.from_pretrained(resolved.folder, local_files_only=True)
    )
    return tokenizer


def _load(resolved: ResolvedModel, load: Callable[[], Any]) -> Any:
    """Calls `load` and turns whatever the libraries raise into a UserError that names the model."""
    try:
        return load()
    except UserError:
        raise
    except Exception as error:  # a broken file makes the libraries raise anything; `tokenizers` raises Exception itself
        if code_was_refused(error):
            raise UserError(
                f"The model {resolved.name} needs Python code that lies in {resolved.folder}, which is not run: if you "
                "trust it, set the role's trust_remote_code to true (`fusellm eval`: --trust-remote-code)."
            ) from error
        raise UserError(
            f"The model {resolved.name} in {resolved.folder} cannot be loaded ({message_line(error).rstrip('.')}): "
            "correct its files, or the role's settings."
        ) from error
