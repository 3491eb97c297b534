"""``python -m lightning_hub`` and the ``lightning-hub`` command."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line of this process.

    ``python -m`` puts the working folder first on the search path. A file ``torch.py`` there would be imported instead
    of PyTorch. So the folder is removed from the path before any other import.
    """
    if not sys.flags.safe_path and sys.argv[0].endswith("__main__.py"):
        del sys.path[0]
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun has started this process
        from lightning_hub.parent import die_with_parent  # after the working folder is removed from the path

        die_with_parent()  # its agent may be killed while torch is imported
    from lightning_hub.runs.terminal import open_missing_streams

    open_missing_streams()
    from lightning_hub.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
