"""Silence around calls of lm-eval and datasets, which print progress bars and advice of their own."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


@contextmanager
def quietly() -> Iterator[None]:
    """Silences progress bars and advice of lm-eval and datasets; compiles each template once instead of once a row."""
    import datasets
    from lm_eval import utils

    logger, bars = logging.getLogger("lm_eval"), datasets.are_progress_bars_disabled()
    level, compile_template = logger.level, utils.env.from_string
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    utils.env.from_string = cache(compile_template)
    try:
        yield
    finally:
        utils.env.from_string = compile_template
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
