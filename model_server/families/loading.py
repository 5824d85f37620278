"""Opens a published checkpoint's folder as a resident model."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from typing import cast

import torch

from model_server.checkpoints.adapters import find_family
from model_server.families.asking import Dialect, Speaker
from model_server.families.perceiver import PublishedPerceiver
from model_server.model.attention import Backend
from model_server.model.config import ModelConfig
from model_server.protocol import ModelInfo

EMBEDDED = Path(__file__).parents[1] / "weights" / "nano" / "config.json"
_HASHED = ("*.json", "*.safetensors", "*.bin", "*.pt")


def load(folder: Path, device: str = "cpu", label: str | None = None) -> PublishedPerceiver:
    """Load network, tokenizer and image processing of a published checkpoint, or of `checkpoint/` in its folder.

    label: what to call it in provenance; the folder's name where not given.

    Raises:
        WeightsError: no family knows the folder, or a part of it is missing, does not fit or cannot be computed.
    """
    folder = folder / "checkpoint" if (folder / "checkpoint").is_dir() else folder
    family = find_family(folder).NAME
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    opened = importlib.import_module(f"model_server.families.{family}").open_checkpoint(folder, device, dtype)
    dialect, speaker = cast(tuple[Dialect, Speaker], opened)
    info = ModelInfo(
        model=f"{family}:{label or folder.resolve().name}",
        weights_digest=digest(folder),
        attention_backend=Backend.AUTO,
        precision=speaker.precision,
        device=device,
    )
    return PublishedPerceiver(dialect, speaker, info, embedded_taxonomy())


def embedded_taxonomy() -> tuple[str, ...]:
    """The labels of the embedded model, for a classification that names none: published families have no list."""
    config = ModelConfig.from_json(EMBEDDED.read_text(encoding="utf-8"))
    merged = dict(config.merged_labels)
    return tuple(name for name in config.labels if name not in merged)


def digest(folder: Path) -> str:
    """Of all configs, tokenizers and tensors of a folder, names included: 16 hex digits."""
    sha = hashlib.sha256()
    for path in sorted({path for pattern in _HASHED for path in folder.rglob(pattern) if path.is_file()}):
        with path.open("rb") as file:
            sha.update(str(path.relative_to(folder)).encode() + hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()[:16]
