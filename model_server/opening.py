"""Which model a server's `--weights` mean: our own checkpoint, or a published one, here or on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from model_server.checkpoints.files import read_json
from model_server.checkpoints.hub import locate
from model_server.perceiver import DEFAULT_WEIGHTS, Perceiver
from model_server.precision import Precision
from model_server.resident import Resident


def open_weights(weights: str | None, device: str, precision: str = Precision.AUTO) -> Resident:
    """Load them; None = the embedded model.

    Raises:
        WeightsError: there are none of that name, they cannot be fetched, or they are no checkpoint that can be loaded.
        UnknownPrecision: `precision` is none of `Precision`.
    """
    if weights is None:
        return Perceiver.load(DEFAULT_WEIGHTS, device, precision)
    found = locate(weights)
    if not is_published(found.folder):
        return Perceiver.load(found.folder, device, precision)
    from model_server.families.loading import load

    return load(found.folder, device, found.label, precision)


def is_published(folder: Path) -> bool:
    """Whether a folder is laid out as published checkpoints are; our own names no `model_type`."""
    if any((folder / part).exists() for part in ("checkpoint", "adapter", "adapter_config.json")):
        return True
    path = folder / "config.json"
    return path.is_file() and "model_type" in read_json(path)
