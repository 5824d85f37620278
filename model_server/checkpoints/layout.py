"""The files of our own checkpoint, and their digest; no torch, so that a folder can be looked at without loading it."""

from __future__ import annotations

import hashlib
from pathlib import Path

CONFIG, TENSORS, CALIBRATION = "config.json", "model.safetensors", "calibration.json"
DENSE_TENSORS, DENSE_CALIBRATION = "dense.safetensors", "dense.json"
TOKENIZER, SENTENCE_TOKENIZER = "tokenizer.json", "sentence_tokenizer.json"
REQUIRED = (CONFIG, TENSORS, CALIBRATION, TOKENIZER, SENTENCE_TOKENIZER)


def weights_digest(folder: Path) -> str:
    """Of config, calibration and tensors, 16 hex digits: what answers carry in their provenance.

    Raises:
        OSError: a file is missing or cannot be read.
    """
    sha = hashlib.sha256()
    dense = [name for name in (DENSE_CALIBRATION, DENSE_TENSORS) if (folder / name).is_file()]
    for name in (CONFIG, CALIBRATION, TENSORS, *dense):
        with (folder / name).open("rb") as file:
            sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()[:16]
