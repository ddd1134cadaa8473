"""Where a command works: the folder `--root`, its artifact store, the device, and what stages cost on it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.runtime.device import usable_device
from harness.store.artifacts import Store
from harness.store.costs import Costs
from harness.store.paths import ARTIFACTS, MODELS


@dataclass(frozen=True)
class Workspace:
    """What every stage works with; two stages of one command share it."""

    root: Path
    """The folder that the user gave as `--root`."""
    store: Store
    """The artifacts below the root; a dry store only plans."""
    device: str
    """The torch device of this process, for example `cpu` or `cuda:0`."""
    costs: Costs
    """Estimates of time and memory on the device."""

    @property
    def models(self) -> Path:
        """The folder of fetched and converted models."""
        return self.root / MODELS


def open_workspace(
    root: Path,
    device: str,
    *,
    dry: bool = False,
    info: Mapping[str, Any] | None = None,
    flops: float | None = None,
    one_gpu: bool = False,
) -> Workspace:
    """The workspace below `root` on the device that `device` (`auto`, `cpu` or `cuda`) stands for.

    `dry` makes a workspace that only plans, `info` is written to every manifest, and `flops` are the floating-point
    operations a second to estimate with (default: measured on this machine when first needed). With `one_gpu` a process
    takes the first of several GPUs. Creates no files. Raises UserError where the machine has no such device.
    """
    usable = usable_device(device, dry=dry, one_gpu=one_gpu)
    costs = Costs(usable)
    if flops is not None:
        costs.flops = flops
    return Workspace(root, Store(root / ARTIFACTS, dry=dry, info=info), usable, costs)
