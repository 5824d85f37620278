"""Files of a published checkpoint: JSON objects, and tensors that are read when they are asked for."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model_server.checkpoints.store import WeightsError

Tensors = dict[str, Callable[[], Tensor]]  # published name -> reads it


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        WeightsError: the file is missing or is no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise WeightsError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path} holds no JSON object")
    return found


def open_tensors(folder: Path) -> Tensors:
    """The tensors of a folder's `*.safetensors`, else of its `pytorch_model*.bin` or `adapter_model.bin` (unpickled as
    plain tensors only). Of several files an index, where there is one, says which belong together.

    Raises:
        WeightsError: there are none, a file cannot be read, one that an index names is not there, or two files hold
            a tensor of the same name.
    """
    files = _files(folder, "model", "*.safetensors")
    opened = [(path, _safetensors(path)) for path in files]
    if not opened:
        files = _files(folder, "pytorch_model", "pytorch_model*.bin") or sorted(folder.glob("adapter_model.bin"))
        opened = [(path, _pickled(path)) for path in files]
    found: Tensors = {}
    where: dict[str, str] = {}
    for path, own in opened:
        if twice := sorted(found.keys() & own.keys()):
            raise WeightsError(
                f"{folder} holds {twice[0]} in {where[twice[0]]} and in {path.name}: leave the files of one checkpoint"
            )
        found |= own
        where |= dict.fromkeys(own, path.name)
    if not found:
        raise WeightsError(f"{folder} holds no *.safetensors and no pytorch_model*.bin")
    return found


def _files(folder: Path, stem: str, pattern: str) -> list[Path]:
    """One kind of tensor files. Shards are those that the index names, unless one file beside them holds all."""
    suffix = Path(pattern).suffix
    index, whole = folder / f"{stem}{suffix}.index.json", folder / f"{stem}{suffix}"
    if not index.is_file() or whole.is_file():
        return [whole] if index.is_file() else sorted(folder.glob(pattern))
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict):
        raise WeightsError(f"{index} has no weight_map")
    names = sorted(set(named.values()))
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise WeightsError(f"{folder} is not whole: {index.name} names {', '.join(absent)}, which are not there")
    return [folder / name for name in names]


def _safetensors(path: Path) -> Tensors:
    try:
        file = safe_open(path, framework="pt")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"cannot read {path}: {error}") from error
    return {name: _reader(file, name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def _pickled(path: Path) -> Tensors:
    state = unpickled(path)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise WeightsError(f"{path} holds more than named tensors, or none")
    return {name: held(tensor) for name, tensor in state.items()}


def unpickled(path: Path) -> Any:
    """What `torch.save` wrote, plain tensors and containers only.

    Raises:
        WeightsError: it cannot be read, or holds other things.
    """
    try:
        # What was written before PyTorch 1.6 is no zip file and cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise WeightsError(f"cannot read {path}: {error}") from error


def _reader(file: Any, name: str) -> Callable[[], Tensor]:
    return lambda: file.get_tensor(name)


def held(tensor: Tensor) -> Callable[[], Tensor]:
    """Reads a tensor that is at hand."""
    return lambda: tensor
