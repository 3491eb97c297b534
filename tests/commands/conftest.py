"""Runs that the verbs look at: made as the tests of ``runs`` make them."""

from __future__ import annotations

from tests.runs.conftest import folder, root, run, write_some

__all__ = ["folder", "root", "run", "write_some"]
