"""In which precision a model's network is kept and computes. Imports no torch: the command line offers the choices."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Precision(StrEnum):
    AUTO = "auto"  # bfloat16 on a GPU that computes in it, else float32
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"  # bfloat16, with the weights of the decoder's linear layers in eight bits: least memory


class UnknownPrecision(ValueError):
    """A precision that no model is served in."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no precision {name!r}; a model is served in one of {', '.join(Precision)}; try 'auto'")


def serving_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What weights and activations are kept in on a device; of `int8`, all but the weights that are rounded further.

    Raises:
        UnknownPrecision: the name is none of `Precision`.
    """
    import torch

    if precision not in list(Precision):
        raise UnknownPrecision(precision)
    half = precision in (Precision.BFLOAT16, Precision.INT8)
    if precision == Precision.AUTO and device.type == "cuda":
        half = torch.cuda.get_device_capability(device) >= (8, 0)  # older ones emulate it, slower than float32
    return torch.bfloat16 if half else torch.float32


def computed_in(precision: str, dtype: torch.dtype) -> str:
    """What answers say of it."""
    return Precision.INT8.value if precision == Precision.INT8 else str(dtype).removeprefix("torch.")
