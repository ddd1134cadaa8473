"""Checks on a model that has just been loaded."""

from typing import TYPE_CHECKING, Any

from fusion.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_loading(
    info: dict[str, Any], model: "PreTrainedModel", place: str, remedy: str = "fetch or convert the model again"
) -> None:
    """Raises UserError when a weight is missing (tied ones aside), superfluous or of another shape.

    The message ends in `remedy`. `info` is the result of `from_pretrained(output_loading_info=True)`.
    """
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs"):
        keys = sorted(str(key) for key in info.get(problem) or () if not (problem == "missing_keys" and key in tied))
        if keys:
            what = problem.replace("_", " ").replace("msgs", "messages")
            raise UserError(
                f"The weights in {place} do not fit its config.json ({len(keys)} {what}, first {keys[0]}): {remedy}."
            )


def code_was_refused(error: Exception) -> bool:
    """Whether transformers raised this because it would have had to run Python code of the model's folder."""
    return "trust_remote_code" in str(error)
