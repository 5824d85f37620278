"""Decoding steps of few fixed shapes, which a GPU replays as CUDA graphs.

A step is some hundred small kernels, and launching them one by one takes a GPU longer than running them. A graph
launches all at once, but always the same ones on the same tensors: so sequences are padded to one of a few numbers of
them, and what changes from step to step stands in one tensor, which is copied to where the graph reads it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model_server.model.transfer import sent, staged

logger = logging.getLogger(__name__)

Write = Callable[[Tensor, int], Tensor]  # what a step is told [n, ...], and the expert of all -> what it found [n, ...]
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


def as_graph(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A CUDA graph of some work, which is not done now: what does it, and where it leaves its result."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
    return graph.replay, found


@dataclass(frozen=True)
class _Captured:
    """A step that can be done again: on what `told` then holds."""

    told: Tensor
    replay: Callable[[], None]
    found: Tensor


class StaticSteps:
    """Steps of up to `most` sequences.

    Args:
        write: does a step. The shapes within depend on the first argument's alone, nothing in it waits for the device,
            and rows of zeros harm no others. It changes tensors in place (the cache), which must stay where they are.
        device: of those tensors.
        capture: makes a step that can be done again; None = each is done anew.
    """

    def __init__(self, write: Write, most: int, device: torch.device, capture: Capture | None) -> None:
        self._write, self._most, self._device, self._capture = write, most, device, capture
        self._steps: dict[tuple[int, int], _Captured] = {}

    def __call__(self, told: Tensor, expert: int) -> Tensor:
        """One step: told [n, ...] on the host -> found [n, ...] on the device, valid until the next step."""
        n = len(told)
        padded = told.new_zeros(self._bucket(n), *told.shape[1:])
        padded[:n] = told
        known = self._steps.get((len(padded), expert))
        if known is None:
            return self._first(sent(padded, self._device), expert)[:n]
        known.told.copy_(staged(padded, self._device), non_blocking=True)
        known.replay()
        return known.found[:n]

    def _bucket(self, sequences: int) -> int:
        """To how many they are padded: the next power of two."""
        return min(1 << (sequences - 1).bit_length(), self._most)

    def _first(self, told: Tensor, expert: int) -> Tensor:
        """A step done kernel by kernel, which loads what cannot be loaded within a graph; its like are replayed."""
        found = self._write(told, expert)
        if self._capture is not None:
            try:
                replay, later = self._capture(lambda: self._write(told, expert))
            except RuntimeError:  # CUDA's: something here that no graph can hold, or no memory for one
                logger.exception("steps of %d sequences cannot be captured; from now on kernel by kernel", len(told))
                self._capture = None
            else:
                self._steps[len(told), expert] = _Captured(told, replay, later)
        return found
