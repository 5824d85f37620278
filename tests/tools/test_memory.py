"""What is freed goes back to the system, so that a call's steps do not add up."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest
from rasters import REPOSITORY

PROGRAM = """
import json, threading
import numpy as np
from rs_tools import memory

def resident():
    return memory._resident() // 2**20

memory.give_back()
kept = []

def work():
    parts = [np.ones(100_000, np.uint8) for _ in range(3000)]  # small enough to come from this thread's arena
    kept.append(parts[-1])  # and this one holds its end

before = resident()
thread = threading.Thread(target=work)
thread.start()
thread.join()
freed = resident()
memory.give_back()
print(json.dumps([before, freed, resident()]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep what is freed in other ways")
def test_what_a_thread_freed_is_given_back_where_the_process_has_grown() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    before, freed, after = json.loads(done.stdout)
    assert freed > before + 200  # else there was nothing to give back
    assert after < before + 50
