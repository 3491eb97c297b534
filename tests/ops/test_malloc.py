"""Memory that a step has freed serves the next one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

STEPS = """
import resource
from lightning_hub.ops.malloc import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (8, 40, 100):  # MiB: below and above what glibc maps by itself
        b"x" * (size * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def step_faults():
    faults(), faults()
    return faults()

print(step_faults(), keep_freed_memory(), step_faults())
"""


@pytest.mark.parametrize("own", [{}, {"MALLOC_ARENA_MAX": "2"}], ids=["ours", "a person's own"])
def test_a_step_that_is_like_the_last_faults_no_page(own: dict[str, str]) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | own
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True, env=environment)
    before, is_kept, after = done.stdout.split()
    pages = 140 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert int(before) > pages / 2, "glibc maps large tensors again each time"
    assert is_kept == str(not own)
    assert int(after) > pages / 2 if own else int(after) < pages / 100
