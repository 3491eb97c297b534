"""``lightning-hub schema``: print the catalogue of options as JSON, or as JSON Schema for editors."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from lightning_hub.config.json_schema import json_schema
from lightning_hub.config.schema import SCHEMA_FILE, shipped_schema
from lightning_hub.errors import ConfigError, ExitCode


def main(argv: Sequence[str]) -> int:
    """Print ``schema.json`` as it is shipped, or what is made of it.

    Raises:
        ConfigError: It takes no arguments but ``--json`` and ``--json-schema``.
    """
    if list(argv) == ["--json-schema"]:
        print(json.dumps(json_schema(shipped_schema()), indent=1))
        return ExitCode.DONE
    if argv and list(argv) != ["--json"]:
        remedy = "it prints the whole catalogue as JSON, or JSON Schema with --json-schema; cut out parts with jq"
        raise ConfigError(f"no arguments are taken, {argv[0]!r:.80} was given", where="schema", remedy=remedy)
    sys.stdout.write(SCHEMA_FILE.read_text(encoding="utf-8"))
    return ExitCode.DONE
