"""Large checkpoints over several devices and the disk, through `accelerate`.

The network is built without memory, its repeated blocks are given to devices in order until each is full, and what no
device holds lies in files. Tensors are then read straight to their places, one at a time, so that loading never needs
more memory than the result. Everything that is no repeated block stays on the main device.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from model_server.checkpoints.store import WeightsError

M = TypeVar("M", bound=nn.Module)
DISK = "disk"
BLOCKS = ("decoder.blocks", "tower.layers", "tower.blocks")


class MissingAccelerate(ImportError):
    """Spreading a model over devices needs `accelerate`, which is not installed."""


class DoesNotFit(WeightsError):
    """The devices have no room for a model, or for the parts of it that stay together."""


@dataclass(frozen=True)
class Spread:
    """How much of each device may be used, in the order in which they are filled, the main device first.

    room: bytes, or text like "20GiB", by GPU number or "cpu"; empty = all free memory of every GPU, then the CPU's.
    folder: for what fits nowhere; None = that is an error.
    """

    room: dict[int | str, int | str] = field(default_factory=dict)
    folder: Path | None = None

    def rooms(self) -> dict[int | str, int]:
        """Bytes of each device.

        Raises:
            MissingAccelerate: it is not installed.
        """
        try:
            from accelerate.utils import get_max_memory
        except ImportError as error:
            raise MissingAccelerate("spreading a model needs accelerate; try: pip install accelerate") from error
        found = get_max_memory(dict(self.room) or None)  # pyright: ignore[reportArgumentType] (its keys may be text)
        return {device: int(found[device]) for device in (self.room or found)}

    def devices(self, model: nn.Module) -> dict[str, int | str]:
        """The device of each block, and under "" of all else.

        Raises:
            DoesNotFit: there is no room; the message says how much is missing.
        """
        rooms = self.rooms()
        main = next(iter(rooms))
        blocks = {f"{parent}.{n}": block for parent in BLOCKS for n, block in _children(model, parent)}
        rooms[main] -= _size(model) - sum(map(_size, blocks.values()))
        if rooms[main] < 0:
            raise DoesNotFit(f"what stays together needs {-rooms[main]:,} bytes more than device {main!r} has")
        found: dict[str, int | str] = {"": main}
        order = list(rooms)
        for name, block in blocks.items():
            while order and rooms[order[0]] < _size(block):
                order.pop(0)
            if order:
                rooms[order[0]] -= _size(block)
            elif self.folder is None:
                raise DoesNotFit(f"no device has room for {name} ({_size(block):,} bytes); name a folder for it")
            found[name] = order[0] if order else DISK
        return found

    def empty(self, build: Callable[[], M], dtype: torch.dtype) -> M:
        """A model whose tensors have their places and no values yet; `fill` it, then `dispatch` it."""
        rooms = self.rooms()  # says first if accelerate is missing
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            model = build().to(dtype)
        places = self.devices(model)
        main, index = next(iter(rooms)), {}
        for name, p in list(model.named_parameters()):
            place = places.get(".".join(name.split(".")[:3]), main)
            data = self._file(name, p, index) if place == DISK else torch.empty_like(p, device=place)
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent).register_parameter(leaf, nn.Parameter(data, requires_grad=False))
        if index and self.folder is not None:
            (self.folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
        return model

    def _file(self, name: str, like: Tensor, index: dict[str, dict[str, object]]) -> Tensor:
        """A tensor that is a file, as `accelerate` reads them."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        index[name] = {"dtype": str(like.dtype).removeprefix("torch."), "shape": list(like.shape)}
        path = str(self.folder / f"{name}.dat")
        return torch.from_file(path, shared=True, size=like.numel(), dtype=like.dtype).view(like.shape)

    def dispatch(self, model: M) -> M:
        """Let each block's inputs and, from the disk, its tensors come to its device when it runs."""
        from accelerate import dispatch_model

        places = self.devices(model)
        if len(set(places.values())) == 1:
            return model
        main = places.pop("")
        rest = {name: main for name, _ in _pieces(model, set(places))}
        folder = None if self.folder is None else str(self.folder)
        with warnings.catch_warnings():
            # Parameters that stand beside modules must be named and are no modules. The call takes numbers of devices
            # too, which its annotations leave out.
            warnings.filterwarnings("ignore", "The following device_map keys do not match any submodules")
            dispatch_model(model, {**rest, **places}, main_device=main, offload_dir=folder)  # pyright: ignore[reportArgumentType]
        return model


def _children(model: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    module: nn.Module | None = model
    for part in name.split("."):
        module = dict(module.named_children()).get(part) if module is not None else None
    return [] if module is None else list(module.named_children())


def _pieces(model: nn.Module, blocks: set[str], prefix: str = "") -> list[tuple[str, nn.Module | nn.Parameter]]:
    """The largest parts that hold no block, and parameters beside them."""
    found: list[tuple[str, nn.Module | nn.Parameter]] = [
        (f"{prefix}{name}", p) for name, p in model.named_parameters(recurse=False)
    ]
    for name, child in model.named_children():
        path = f"{prefix}{name}"
        if path in blocks:
            continue
        if any(block.startswith(f"{path}.") for block in blocks):
            found += _pieces(child, blocks, f"{path}.")
        else:
            found.append((path, child))
    return found


def _size(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
