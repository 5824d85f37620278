"""From the host to the model's device."""

from __future__ import annotations

import torch
from torch import Tensor


def staged(values: Tensor, device: torch.device) -> Tensor:
    """The same on the host, for a GPU in pinned memory: from there it fetches them while the host goes on."""
    return values.pin_memory() if device.type == "cuda" else values


def sent(values: Tensor, device: torch.device) -> Tensor:
    """The same on a device, as soon as it gets there; who uses them there waits by itself."""
    return staged(values, device).to(device, non_blocking=True)
