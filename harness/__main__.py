"""`python -m harness` is `fusellm`."""

import sys
from pathlib import Path

if not sys.flags.safe_path:
    # `python -m` puts the current folder first, and what lies there would be imported in place of the libraries.
    sys.path[0] = str(Path(__file__).parents[1])

from harness.cli import main

main()
