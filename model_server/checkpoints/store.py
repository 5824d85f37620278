"""Our own checkpoint: a folder with `config.json`, `model.safetensors` (half precision, batch norms folded), the two
tokenizers and `calibration.json`. A model that finds boxes, masks and change has `dense.safetensors` and `dense.json`
beside them; without these it answers in text only. Nothing in it is pickled.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from model_server.calibration import Calibration, DenseCalibration
from model_server.checkpoints.layout import (
    CALIBRATION,
    CONFIG,
    DENSE_CALIBRATION,
    DENSE_TENSORS,
    REQUIRED,
    SENTENCE_TOKENIZER,
    TENSORS,
    TOKENIZER,
    weights_digest,
)
from model_server.model.config import ModelConfig
from model_server.model.dense import DenseBranch
from model_server.model.rsvlm import RSVLM
from model_server.text.tokenizer import TextTokenizer


class WeightsError(ValueError):
    """The folder is not a checkpoint that this code can load; the message says what is missing or misshapen."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model with everything it needs to read and write text."""

    model: RSVLM
    tokenizer: TextTokenizer
    sentence_tokenizer: Tokenizer
    calibration: Calibration
    digest: str  # of tensors, config and calibration, 16 hex digits
    dense: DenseBranch | None = None
    dense_calibration: DenseCalibration = field(default_factory=DenseCalibration)


def save_checkpoint(folder: Path, model: RSVLM, tokenizer: TextTokenizer, sentence_tokenizer: Tokenizer,
                    calibration: Calibration) -> None:  # fmt: skip
    """Write a checkpoint. The model's batch norms must be folded already (`fold_norms`)."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / TENSORS, metadata={"format": "pt"})
    (folder / TENSORS).chmod(0o644)  # safetensors writes it for its owner alone
    (folder / CONFIG).write_text(model.config.to_json() + "\n", encoding="utf-8")
    tokenizer.save(folder / TOKENIZER)
    sentence_tokenizer.save(str(folder / SENTENCE_TOKENIZER))
    save_calibration(folder, calibration)


def save_calibration(folder: Path, calibration: Calibration) -> None:
    (folder / CALIBRATION).write_text(calibration.to_json() + "\n", encoding="utf-8")


def save_dense(folder: Path, branch: DenseBranch, calibration: DenseCalibration) -> None:
    """Put a dense branch into a checkpoint that is there already; its config then names the branch's shape."""
    config = ModelConfig.from_json((folder / CONFIG).read_text(encoding="utf-8"))
    config = dataclasses.replace(config, dense=branch.config)
    state = {k: v.detach().half().contiguous() for k, v in branch.state_dict().items()}
    save_file(state, folder / DENSE_TENSORS, metadata={"format": "pt"})
    (folder / DENSE_TENSORS).chmod(0o644)
    (folder / CONFIG).write_text(config.to_json() + "\n", encoding="utf-8")
    (folder / DENSE_CALIBRATION).write_text(calibration.to_json() + "\n", encoding="utf-8")


def load_checkpoint(folder: Path, device: str = "cpu") -> Checkpoint:
    """Read a checkpoint in float32, ready to answer.

    Raises:
        WeightsError: a file is missing or unreadable, or the tensors do not fit the config.
    """
    for name in REQUIRED:
        if not (folder / name).is_file():
            raise WeightsError(f"{folder} is no checkpoint: {name} is missing")
    try:
        config = ModelConfig.from_json((folder / CONFIG).read_text(encoding="utf-8"))
        calibration = Calibration.from_json((folder / CALIBRATION).read_text(encoding="utf-8"))
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        raise WeightsError(f"{folder}: its config or calibration cannot be read: {error}") from error
    with torch.device("meta"):
        model = RSVLM(config)
    model = model.to_empty(device=device)
    model.backbone.fold_norms()
    try:
        with safe_open(folder / TENSORS, framework="pt", device=device) as tensors:
            state = {k: tensors.get_tensor(k).float() for k in tensors.keys()}  # noqa: SIM118 (not a dict)
        model.load_state_dict(state)
    except (SafetensorError, RuntimeError) as error:
        raise WeightsError(f"{folder}/{TENSORS} does not fit {CONFIG}: {error}") from error
    sentence_tokenizer = Tokenizer.from_file(str(folder / SENTENCE_TOKENIZER))
    sentence_tokenizer.enable_truncation(config.sentence.max_tokens)
    sentence_tokenizer.enable_padding()
    dense, dense_calibration = _load_dense(folder, config, device)
    return Checkpoint(
        model.eval().requires_grad_(False),
        TextTokenizer.load(folder / TOKENIZER),
        sentence_tokenizer,
        calibration,
        weights_digest(folder),
        dense,
        dense_calibration,
    )


def _load_dense(folder: Path, config: ModelConfig, device: str) -> tuple[DenseBranch | None, DenseCalibration]:
    if not (folder / DENSE_TENSORS).is_file():
        return None, DenseCalibration()
    if config.dense is None:
        raise WeightsError(f"{folder} has {DENSE_TENSORS}, but its {CONFIG} has no `dense`")
    try:
        calibration = DenseCalibration.from_json((folder / DENSE_CALIBRATION).read_text(encoding="utf-8"))
        with torch.device("meta"):
            branch = DenseBranch(config)
        with safe_open(folder / DENSE_TENSORS, framework="pt", device=device) as tensors:
            state = {k: tensors.get_tensor(k).float() for k in tensors.keys()}  # noqa: SIM118 (not a dict)
        branch.load_state_dict(state, assign=True)
    except (OSError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise WeightsError(f"{folder}: its {DENSE_CALIBRATION} cannot be read: {error}") from error
    except (SafetensorError, RuntimeError) as error:
        raise WeightsError(f"{folder}/{DENSE_TENSORS} does not fit {CONFIG}: {error}") from error
    branch.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] (missing in the stubs)
    return branch.eval().requires_grad_(False), calibration
