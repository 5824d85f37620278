"""The sections of the page of results that commands of their own write, from the figures beside the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from model_server.evaluation.gallery import gallery_section
from model_server.evaluation.report import embeddings_section
from model_server.evaluation.scale import scale_section
from model_server.evaluation.text_boxes import section as text_boxes_section
from model_server.training.mechanisms import section as mechanisms_section

SECTIONS: tuple[Callable[[Path], list[str]], ...] = (
    text_boxes_section, mechanisms_section, scale_section, embeddings_section, gallery_section,
)  # fmt: skip


def appendix(folder: Path) -> list[str]:
    """Lines of every section whose figures lie in the folder, in the order of the page."""
    return [line for section in SECTIONS for line in section(folder)]
