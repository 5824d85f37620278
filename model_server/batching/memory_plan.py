"""What fits beside the weights: how many sequences are written at a time, and how much is kept of images seen."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SEQUENCES = 16  # of each kind and priority; more are hardly faster on a CPU, and each waits longer
CACHE_BYTES = 256 * 2**20
SLOTS_SHARE, CACHE_SHARE = 0.3, 0.2  # of what is free at the start
UNKNOWN_FREE = 2 * 2**30  # planned with where the machine does not say


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes, and the places they give. Slots and cache fill up to these sizes only when they are needed."""

    free: int  # at the start, the weights loaded
    weights: int
    slots: int  # keys and values of all sequences that can be written at a time
    cache: int  # most that is kept of images
    sequences: int  # of each kind and priority

    @classmethod
    def of(cls, free: int, weights: int, sequence_bytes: int, lanes: int) -> MemoryPlan:
        """The largest that fits.

        Args:
            free: bytes that are free now.
            weights: bytes of the weights, which are loaded already.
            sequence_bytes: of one sequence of each kind, added up.
            lanes: priorities, each of which has slots of its own.
        """
        sequences = SEQUENCES
        while sequences > 1 and sequences * sequence_bytes * lanes > SLOTS_SHARE * free:
            sequences //= 2
        cache = min(CACHE_BYTES, int(CACHE_SHARE * free))
        return cls(free, weights, sequences * sequence_bytes * lanes, cache, sequences)

    def __str__(self) -> str:
        parts = {"free": self.free, "weights": self.weights, "slots": self.slots, "cache": self.cache}
        sizes = " ".join(f"{name}={size / 2**20:.0f}MiB" for name, size in parts.items())
        return f"{sizes} sequences={self.sequences}"


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take where a device keeps its tensors."""
    return _free_of_gpu(device) if device.type == "cuda" else _free_of_host()


def _free_of_gpu(device: torch.device) -> int:
    """What no process has, and what PyTorch holds of it without using it."""
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _free_of_host() -> int:
    """Of the machine, or of this process's control group where that allows less."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    except (OSError, ValueError):  # not Linux
        return UNKNOWN_FREE
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no control group, or an older kind
        return free
    return free if limit == "max" else min(free, max(int(limit) - used, 0))
