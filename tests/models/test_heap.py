# SPDX-License-Identifier: Apache-2.0
"""Memory that one step frees serves the next one."""

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, sys
import numpy as np
from fedneuro.models.heap import keep_heap

if sys.argv[1] == "keep":
    keep_heap()

def step():
    activations = [np.ones(2**21, np.float32) for _ in range(30)]
    while activations:
        activations.pop()

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept() -> None:
    faults = {
        how: int(subprocess.run([sys.executable, "-c", STEPS, how], check=True, capture_output=True, text=True).stdout)
        for how in ("as it is", "keep")
    }
    assert faults["keep"] < 1000 < faults["as it is"]
