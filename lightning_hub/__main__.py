"""``python -m lightning_hub`` and the ``lightning-hub`` command."""

from __future__ import annotations

import sys

from lightning_hub.cli import run


def main() -> None:
    """Run the command line of this process."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
