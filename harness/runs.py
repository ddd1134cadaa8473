"""Finished runs and their tables, read without anything heavy: from records alone, in a second or two."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from results.layout import Table

RUN_FILE = "run.json"
SUITES_FILE = "suites.json"
