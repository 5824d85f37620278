"""Attention backends: which of them can serve a call, why not, and the flash packages behind one signature.

| backend | package | where |
| --- | --- | --- |
| `flash4` | `flash-attn-4` (`flash_attn.cute`) | compute capability 9 to 12, 16-bit, heads of 8 to 128 channels |
| `flash3` | `flash_attn_interface` (flash-attention, `hopper/`) | compute capability 9, 16-bit, heads up to 256 |
| `flash2` | `flash-attn` 2.x | compute capability 8 and above, 16-bit, heads up to 256 |
| `sdpa` | PyTorch, which picks a kernel itself | everywhere |
| `math` | none: the plain float32 equation | everywhere |

The flash packages know full and causal attention only, not masks. The limits follow the packages' own checks; where
those differ by device or direction, the narrower one stands here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

MaskKind = Literal["none", "causal", "tensor"]


class Backend(StrEnum):
    """`auto` is the first of the others, in this order, that supports a call: the fastest by their authors' figures."""

    AUTO = "auto"
    FLASH4 = "flash4"
    FLASH3 = "flash3"
    FLASH2 = "flash2"
    SDPA = "sdpa"
    MATH = "math"


class UnsupportedAttention(ValueError):
    """A backend that was asked for by name cannot serve a call; the message says why and what can."""


@dataclass(frozen=True)
class Call:
    """What decides whether a backend can serve: `capability` is the CUDA device's, None on any other device."""

    device: str
    dtype: torch.dtype
    head_width: int
    mask: MaskKind
    capability: tuple[int, int] | None = None

    @classmethod
    def of(cls, q: Tensor, mask: MaskKind) -> Call:
        """The call with these queries [..., d]."""
        cuda = q.device.type == "cuda"
        capability = torch.cuda.get_device_capability(q.device) if cuda else None
        return cls(q.device.type, q.dtype, q.shape[-1], mask, capability)


@dataclass(frozen=True)
class Package:
    """A flash package: where its two functions are and what they take."""

    module: str
    install: str
    capabilities: range  # major compute capabilities
    widest: int
    step: int  # head widths are multiples of it


PACKAGES = {
    Backend.FLASH4: Package("flash_attn.cute", "pip install --pre flash-attn-4", range(9, 13), 128, 8),
    Backend.FLASH3: Package("flash_attn_interface", "build hopper/ of Dao-AILab/flash-attention", range(9, 10), 256, 8),
    Backend.FLASH2: Package("flash_attn", "pip install flash-attn", range(8, 100), 256, 8),
}


@cache
def _load(package: Package) -> tuple[Any, str]:
    """The package's module, or None and why it cannot be imported. Asked for once a process."""
    try:
        module = importlib.import_module(package.module)
    except (ImportError, OSError) as error:
        return None, f"{package.module} cannot be imported ({error}); try: {package.install}"
    for name in ("flash_attn_func", "flash_attn_varlen_func"):
        if not hasattr(module, name):
            return None, f"{package.module} has no {name}; try: {package.install}"
    return module, ""


@cache
def refusal(backend: Backend, call: Call) -> str | None:
    """Why a backend cannot serve a call, or None where it can."""
    package = PACKAGES.get(backend)
    if package is None:
        return None
    if call.capability is None:
        return f"it needs a CUDA device, not {call.device}"
    low, high = package.capabilities[0], package.capabilities[-1]
    if call.capability[0] not in package.capabilities:
        wanted = f"{low}" if low == high else f"{low} or above" if high > 20 else f"{low} to {high}"
        return f"it needs compute capability {wanted}, this device has {call.capability[0]}.{call.capability[1]}"
    if call.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 or bfloat16, not {str(call.dtype).removeprefix('torch.')}"
    if call.head_width > package.widest or call.head_width % package.step:
        return f"its heads have up to {package.widest} channels, a multiple of {package.step}; these {call.head_width}"
    if call.mask == "tensor":
        return "it takes no mask, only full or causal attention"
    return _load(package)[1] or None


@cache
def choose(backend: Backend, call: Call) -> Backend:
    """The backend that serves a call.

    Raises:
        UnsupportedAttention: it was asked for by name and cannot.
    """
    others = [b for b in Backend if b is not Backend.AUTO]
    if backend is Backend.AUTO:
        return next(b for b in others if refusal(b, call) is None)
    reason = refusal(backend, call)
    if reason is not None:
        able = ", ".join(b for b in others if refusal(b, call) is None)
        raise UnsupportedAttention(f"{backend} cannot serve this call: {reason}; use auto, or one of {able}")
    return backend


def flash(backend: Backend, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    """A flash package on q [B, H, T, d] and k, v [B, G, S, d] -> [B, H, T, d]; causal is aligned at the end."""
    function = _function(backend, "flash_attn_func")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, T, H, d]
    return _first(function(q, k, v, softmax_scale=scale, causal=causal)).transpose(1, 2)


def flash_packed(backend: Backend, q: Tensor, k: Tensor, v: Tensor, bounds: tuple[Tensor, Tensor],
                 longest: tuple[int, int], causal: bool, scale: float | None) -> Tensor:  # fmt: skip
    """A flash package on packed runs: q [N, H, d] and k, v [M, G, d] -> [N, H, d].

    bounds: of the runs of queries and of keys, int32 [R + 1] on the device; longest: their longest runs.
    """
    function = _function(backend, "flash_attn_varlen_func")
    found = function(
        q, k, v, cu_seqlens_q=bounds[0], cu_seqlens_k=bounds[1], max_seqlen_q=longest[0], max_seqlen_k=longest[1],
        softmax_scale=scale, causal=causal,
    )  # fmt: skip
    return _first(found)


def _function(backend: Backend, name: str) -> Callable[..., Any]:
    module, reason = _load(PACKAGES[backend])
    if module is None:
        raise UnsupportedAttention(reason)
    return getattr(module, name)


def _first(found: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Some versions give the log-sum-exp beside the result."""
    return found[0] if isinstance(found, tuple) else found
