"""``lightning-hub schema``: print the catalogue of options as JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lightning_hub.config.schema import SCHEMA_FILE
from lightning_hub.errors import ConfigError, ExitCode


def main(argv: Sequence[str]) -> int:
    """Print ``schema.json`` as it is shipped.

    Raises:
        ConfigError: It takes no arguments.
    """
    if argv and list(argv) != ["--json"]:
        remedy = "it prints the whole catalogue as JSON; cut out what you need with jq"
        raise ConfigError(f"no arguments are taken, {argv[0]!r:.80} was given", where="schema", remedy=remedy)
    sys.stdout.write(SCHEMA_FILE.read_text(encoding="utf-8"))
    return ExitCode.DONE
