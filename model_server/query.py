"""What the resident model is asked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from model_server.batching.feature_cache import image_key
from model_server.protocol import Modality, Task

TASK_TOKEN: dict[Task, str] = {
    "caption": "[CAP]", "vqa": "[VQA]", "classify": "[CLS]",
    "ground": "[VG]", "segment": "[SEG]", "detect_change": "[CCD]",
}  # fmt: skip


@dataclass(frozen=True)
class Query:
    """One task on one tile, uint8 [H, W, 3] RGB; for detect_change `after` is the other tile, of the same shape.

    `gsd_m`: ground metres per pixel of the tile, None where unknown; the dense tasks choose their scale from it.
    `anchors`: float32 [S, 66], embeddings of the place and where in the tile they stand (see protocol.py), or None.
    """

    task: Task
    image: np.ndarray
    text: str = ""
    labels: tuple[str, ...] = ()
    detail: Literal["short", "full"] = "short"
    after: np.ndarray | None = None
    gsd_m: float | None = None
    modality: Modality = "optical"
    anchors: np.ndarray | None = None

    @property
    def tiles(self) -> int:
        return 1 if self.after is None else 2

    @cached_property
    def digest(self) -> bytes:
        """Of the image's pixels and shape: queries with the same one ask about the same tile."""
        return image_key(self.image)
