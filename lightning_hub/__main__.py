"""``python -m lightning_hub`` and the ``lightning-hub`` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line of this process.

    ``python -m`` puts the working folder first on the search path, where a stray ``torch.py`` would be imported in
    place of the real one: it is taken off before anything else is imported.
    """
    if not sys.flags.safe_path and sys.argv[0].endswith("__main__.py"):
        del sys.path[0]
    from lightning_hub.cli import run  # only now, for the reason above

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
