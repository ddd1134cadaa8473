"""The console command as a launcher starts it in tests: with small parts, and with a rank that can be killed.

PARTS (of the requests of an answer, and of documents), KILLED (the rank that ends when it has made one part, or -), and
the arguments of the command.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from harness import cli
from harness.evaluation import perplexity
from harness.evaluation.lm_eval import parts
from harness.runtime import distributed
from harness.store.leases import Leases


def main(size: str, killed: str, *arguments: str) -> None:
    parts.REQUESTS = perplexity._PART = int(size)
    if killed == str(distributed.local_rank()) and distributed.launched():
        own, made = Leases.make_missing, 0

        def until_killed(self: Leases, files: list[Path], make: Callable[[int], bool], **options: bool) -> None:
            def counted(number: int) -> bool:
                nonlocal made
                made += files[number].name.startswith("part-")
                if made == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                return make(number)

            own(self, files, counted, **options)

        Leases.make_missing = until_killed  # type: ignore[assignment, method-assign]
    sys.argv = ["fusellm", *arguments]
    cli.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
