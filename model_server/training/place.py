"""The device that a stage trains on: its parameters, batches and random numbers are made there.

Inside `on(device)` torch makes new tensors on the chosen device; what comes from numpy or a file is put there by name
(`tensor`, `here`). On a CPU nothing is different from not using this module. It has not been run on a GPU yet.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from enum import StrEnum
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

_Batch = TypeVar("_Batch")


class Device(StrEnum):
    """`auto`: a GPU where torch sees one, else the CPU."""

    AUTO = "auto"
    CUDA = "cuda"
    CPU = "cpu"


def chosen(device: Device) -> torch.device:
    """The device meant; of several processes on one machine each has its own GPU.

    Raises:
        ValueError: a GPU is wanted and torch sees none.
    """
    there = torch.cuda.is_available()
    if device is Device.CUDA and not there:
        raise ValueError(f"this torch ({torch.__version__}) sees no GPU: let --device be auto or cpu")
    if device is Device.CPU or not there:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


@contextmanager
def on(device: Device) -> Iterator[None]:
    """New tensors are on the chosen device."""
    found = chosen(device)
    if found.type == "cpu":
        yield
        return
    with torch.device(found):
        yield


def here() -> torch.device:
    """Where new tensors are made."""
    return torch.get_default_device()


def tensor(array: np.ndarray) -> Tensor:
    """An array's values, here."""
    return torch.from_numpy(array).to(here())


def half(enabled: bool) -> torch.autocast:
    """bfloat16 where it is safe, here."""
    return torch.autocast(here().type, torch.bfloat16, enabled=enabled)


def in_memory() -> torch.device:
    """As a context: what pictures are drawn and validation is done in, whatever the chosen device."""
    return torch.device("cpu")


def put(batch: _Batch) -> _Batch:
    """A batch, a dataclass of tensors and lists of tensors, here."""

    def moved(value: Any) -> Any:
        return [each.to(here()) for each in value] if isinstance(value, list) else value.to(here())

    return replace(batch, **{f.name: moved(getattr(batch, f.name)) for f in fields(batch)})  # pyright: ignore[reportArgumentType] (a dataclass)
