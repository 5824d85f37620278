"""Opens a published checkpoint's folder as a resident model."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path

import torch

from model_server.checkpoints.adapters import find_family
from model_server.families.asking import Opened
from model_server.families.perceiver import PublishedPerceiver
from model_server.model.attention import Backend
from model_server.model.config import ModelConfig
from model_server.precision import Precision, serving_dtype
from model_server.protocol import ModelInfo

EMBEDDED = Path(__file__).parents[1] / "weights" / "nano" / "config.json"
_HASHED = ("*.json", "*.safetensors", "*.bin", "*.pt")


def load(
    folder: Path, device: str = "cpu", label: str | None = None, precision: str = Precision.AUTO
) -> PublishedPerceiver:
    """Load network, tokenizer and image processing of a published checkpoint, or of `checkpoint/` in its folder.

    label: what to call it in provenance; the folder's name where not given.

    Raises:
        WeightsError: no family knows the folder, or a part of it is missing, does not fit or cannot be computed.
        UnknownPrecision: `precision` is none of `Precision`.
    """
    folder = folder / "checkpoint" if (folder / "checkpoint").is_dir() else folder
    family = find_family(folder).NAME
    dtype = serving_dtype(precision, torch.device(device))
    opened: Opened = importlib.import_module(f"model_server.families.{family}").open_checkpoint(folder, device, dtype)
    if precision == Precision.INT8:
        opened.speaker.quantise()
    info = ModelInfo(
        model=f"{family}:{label or folder.resolve().name}",
        weights_digest=digest(*opened.folders),
        attention_backend=Backend.AUTO,
        precision=opened.speaker.precision,
        device=device,
    )
    return PublishedPerceiver(opened.dialect, opened.speaker, info, embedded_taxonomy())


def embedded_taxonomy() -> tuple[str, ...]:
    """The labels of the embedded model, for a classification that names none: published families have no list."""
    config = ModelConfig.from_json(EMBEDDED.read_text(encoding="utf-8"))
    merged = dict(config.merged_labels)
    return tuple(name for name in config.labels if name not in merged)


def digest(*folders: Path) -> str:
    """Of all configs, tokenizers and tensors of some folders, names included: 16 hex digits."""
    found = {path: str(path.relative_to(own)) for own in folders for kind in _HASHED for path in own.rglob(kind)}
    sha = hashlib.sha256()
    for path, name in sorted(found.items()):
        with path.open("rb") as file:
            sha.update(name.encode() + hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()[:16]
