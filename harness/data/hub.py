"""Data sets on the hub: whether it answers, and the commit that a revision of a data set stands for."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path


@contextmanager
def offline_unless_reachable() -> Iterator[None]:
    """Goes offline where the hub does not answer, so that each data set is looked up in the cache without waiting."""
    import datasets
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or _answers():
        yield
        return
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = False


@cache
def _answers() -> bool:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info("EleutherAI/lambada_openai", timeout=5)
    except HfHubHTTPError:
        return True
    except Exception:  # of whichever HTTP library the hub's client uses
        return False
    return True


@cache
def dataset_commit(name: str, revision: str = "main") -> str | None:
    """The commit that a revision of a data set on the hub stands for, asked once in a process.

    Where the hub does not answer it is the one that was read last, from the cache. None where that is not known either:
    reading the data set then says what is the matter.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        with offline_unless_reachable():
            try:
                # For the place that it gets, CACHE/snapshots/COMMIT, where it is found without the hub, too.
                return Path(hf_hub_download(name, "README.md", repo_type="dataset", revision=revision)).parent.name
            except EntryNotFoundError:
                return HfApi().dataset_info(name, revision=revision, timeout=15).sha
    except Exception:  # of whichever HTTP library the hub's client uses
        return None


def dataset_fingerprint(name: str, revision: str = "main") -> str:
    """The name of a data set on the hub with the commit that is read, as keys hold it."""
    return f"hub:{name}@{dataset_commit(name, revision) or f'{revision} (commit not known)'}"
