"""From the host to the model's device."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(values: Tensor, device: torch.device) -> Tensor:
    """The same on a device. A GPU fetches them from pinned memory while the host goes on; they are not to be changed
    here meanwhile."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
