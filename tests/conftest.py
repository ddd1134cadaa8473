"""Settings of the whole test run."""

import os

# Tiny models gain nothing from threads, and two test processes with two threads each wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
# pytest-xdist sets it in its workers, and tables would be folded at 80 columns.
os.environ.pop("COLUMNS", None)
