"""Decoding steps of few fixed shapes, which a GPU replays as CUDA graphs.

A step is some hundred small kernels, and launching them one by one takes a GPU longer than running them. A graph
launches all at once, but always the same ones on the same tensors: so sequences are padded to one of a few numbers of
them, and what changes from step to step stands in one tensor, which is copied to where the graph reads it. On a CPU the
same steps run without a graph; nothing is won by them there but the comparison (see tests/model/test_static_steps.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model_server.model.transfer import sent

Write = Callable[[Tensor, int], Tensor]  # what a step is told [n, ...], and the expert of all -> what it found [n, ...]


@dataclass(frozen=True)
class _Graph:
    """A captured step, and where it reads and writes."""

    graph: torch.cuda.CUDAGraph
    told: Tensor
    found: Tensor


class StaticSteps:
    """Steps of up to `most` sequences.

    Args:
        write: does a step. The shapes within depend on the first argument's alone, nothing in it waits for the device,
            and rows of zeros harm no others. It changes tensors in place (the cache), which must stay where they are.
        device: of those tensors.
    """

    def __init__(self, write: Write, most: int, device: torch.device) -> None:
        self._write, self._most, self._device = write, most, device
        self._graphs: dict[tuple[int, int], _Graph] = {}

    def bucket(self, sequences: int) -> int:
        """To how many they are padded: the next power of two."""
        return min(1 << (sequences - 1).bit_length(), self._most)

    def __call__(self, told: Tensor, expert: int) -> Tensor:
        """One step: told [n, ...] on the host -> found [n, ...] on the device, valid until the next step."""
        n = len(told)
        padded = told.new_zeros(self.bucket(n), *told.shape[1:])
        padded[:n] = told
        if self._device.type != "cuda":
            return self._write(padded.to(self._device), expert)[:n]
        known = self._graphs.get((len(padded), expert))
        if known is None:
            return self._captured(padded, expert)[:n]
        known.told.copy_(padded.pin_memory(), non_blocking=True)
        known.graph.replay()
        return known.found[:n]

    def _captured(self, padded: Tensor, expert: int) -> Tensor:
        """What a step finds; its like are replayed from now on. Capturing runs nothing, so the cache changes once; the
        step before it loads what the kernels need, which cannot be captured."""
        told = sent(padded, self._device)
        found = self._write(told, expert)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            later = self._write(told, expert)
        self._graphs[len(padded), expert] = _Graph(graph, told, later)
        return found
