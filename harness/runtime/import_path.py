"""Which folder the project's own top-level packages are imported from."""

import sys
from importlib.util import find_spec
from pathlib import Path

SIBLINGS = ("fusion", "baselines", "results")


def prefer_own_packages() -> None:
    """Puts the folder of this package first on `sys.path` where another `fusion`, `baselines` or `results` hides ours.

    Those are common names for folders of one's own. Python looks in the current folder first (`python -m`, scripts,
    notebooks, PYTHONPATH), even before an editable installation, so that an empty folder `results` would be imported in
    place of the package. Raises ImportError where the other package has been imported already.
    """
    own = Path(__file__).parents[2]
    for name in SIBLINGS:
        imported = sys.modules.get(name)
        spec = imported.__spec__ if imported is not None else find_spec(name)
        places = list(spec.submodule_search_locations or [spec.origin or ""]) if spec is not None else []
        if any(Path(place).resolve() == own / name for place in places):
            continue
        if imported is not None:
            raise ImportError(
                f"{', '.join(places) or name} was imported in place of the package {name} of fusellm-harness: import "
                "harness first, or rename the other one."
            )
        if str(own) in sys.path[:1]:
            raise ImportError(f"The package {name} of fusellm-harness is missing in {own}: install it again.")
        sys.path.insert(0, str(own))
