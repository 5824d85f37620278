"""Memory and processors, as much of them as this process may use."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from rs_tools.doctor.findings import Finding, Setup

# The embedded model's server held 1.06 GiB after one call of each task.
NEEDED = 1.2 * 2**30
_LARGER = "close other programs, or run rs-model-server on another machine and give rs-mcp --model-url"
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")  # Linux


def memory(setup: Setup, meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> Iterator[Finding]:
    """Free memory against what the embedded model needs."""
    if not meminfo.is_file():
        yield Finding("memory", "ok", "not known on this system")
        return
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    available = int(lines["MemAvailable"].split()[0]) * 1024
    limit = _number(cgroup / "memory.max")
    if limit is not None:
        available = min(available, int(limit - (_number(cgroup / "memory.current") or 0)))
    said = f"{available / 2**30:.1f} GiB available"
    if setup.model_url is None and setup.weights is None and available < NEEDED:
        found = f"{said}; a server of the embedded model takes about {NEEDED / 2**30:.1f} GiB"
        yield Finding("memory", "warning", found, _LARGER)
    else:
        yield Finding("memory", "ok", said)


def cores(setup: Setup, cgroup: Path = CGROUP) -> Iterator[Finding]:
    """Processors that this process may run on."""
    count = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    share = math.inf
    if (file := cgroup / "cpu.max").is_file():
        quota, period = file.read_text().split()
        share = math.inf if quota == "max" else int(quota) / int(period)
    if share < count:
        said = f"{count} cores, of which this process may use the time of {share:.1f}"
    else:
        said = f"{count} core{'s' * (count > 1)}"
    if setup.model_url is None and min(share, count) < 1:
        yield Finding("cores", "warning", f"{said}; answers will be slow", _LARGER)
    else:
        yield Finding("cores", "ok", said)


def _number(file: Path) -> int | None:
    """What a file of the control group holds; None where there is none, or no limit."""
    if not file.is_file():
        return None
    text = file.read_text().strip()
    return None if text == "max" else int(text)
