"""From the painted mask of classes to the answer of `segment`."""

from __future__ import annotations

from collections.abc import Sequence

from model_server.protocol import TileMasks
from rs_tools.calls import Call, Output, common
from rs_tools.looking import Seen
from rs_tools.painting import Maps, Painted, Painter, figures, picture, vectors
from rs_tools.results import Artifact, SegmentedClass, SegmentResult


class Knowledge:
    """Which of the classes the model knows; a class that one look does not know is not known."""

    def __init__(self) -> None:
        self.unknown: set[str] = set()

    def maps(self, answer: TileMasks) -> Maps:
        """What a painter takes of an answer."""
        self.unknown |= {label for label, known in zip(answer.labels, answer.known, strict=True) if not known}
        return Maps(answer.probabilities, answer.thresholds)


def segmented(
    call: Call, classes: Sequence[str], painter: Painter, knowledge: Knowledge, seen: Seen, painted: Painted | None
) -> SegmentResult:
    """The answer without its files; `painted` is None while the mask is unfinished."""
    found = []
    for value, label in enumerate(classes, 1):
        pixels, share, area = figures(painter, value)
        found.append(SegmentedClass(label=label, value=value, pixels=pixels, share=share, area_m2=area))
    warnings = _said(classes, found, knowledge, seen) if painted is not None else []
    if painted is not None:
        warnings += painted.warnings
    if painted is not None and painted.left_out:
        warnings.append(f"The vectors file holds the {len(painted.areas)} largest areas; the mask holds all.")
    return SegmentResult(classes=found, **common(call, seen, warnings))


def written(
    call: Call, output: Output, classes: Sequence[str], painted: Painted, result: SegmentResult
) -> list[Artifact]:
    """The mask, its outlines, and a picture of it where one is asked for."""
    outlines = vectors(output.store, call, painted.areas, classes, result.provenance, result.warnings)
    files = [painted.mask, outlines]
    return [*files, picture(call, output, painted.mask, classes)] if output.preview else files


def _said(classes: Sequence[str], found: Sequence[SegmentedClass], knowledge: Knowledge, seen: Seen) -> list[str]:
    warnings = []
    if unknown := [label for label in classes if label in knowledge.unknown]:
        names = ", ".join(map(repr, unknown))
        warnings.append(
            f"The model does not know {names}: this is far from everything that it was trained on, so what it marks is "
            "a guess. Try plainer words, such as 'water', 'forest' or 'road'."
        )
    if seen.valid and not any(one.pixels for one in found):
        warnings.append(f"No pixel reaches the threshold of {' or '.join(map(repr, classes))}.")
    return warnings
