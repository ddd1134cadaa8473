"""Which optional dependencies come with which extra of the distribution, and the sentence for one that is missing."""

EXTRAS: dict[str, tuple[str, ...]] = {
    "train": (
        "accelerate",
        "datasets",
        "huggingface_hub",
        "safetensors",
        "tensorboard",
        "tokenizers",
        "torch",
        "transformers",
    ),
    "suites": ("lm_eval",),
    "merge": ("mergekit",),
    "gguf": ("gguf", "google", "sentencepiece"),
    "deepspeed": ("deepspeed",),
}
"""Top-level modules by the extra that installs them; the same as [project.optional-dependencies] in pyproject.toml."""


def missing_extra(error: BaseException) -> str | None:
    """One sentence that names the extra to install when `error` is the failed import of an optional dependency.

    None for every other error: those are not the user's to correct.
    """
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    module = error.name.partition(".")[0]
    for extra, modules in EXTRAS.items():
        if module in modules:
            return f"This needs the package {module}, which is not installed: pip install 'fusellm-harness[{extra}]'."
    return None
