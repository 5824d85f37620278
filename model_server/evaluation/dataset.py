"""The part of a data directory that one run evaluates, and the training records that its controls draw on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from model_server.evaluation.results import SetInfo
from model_server.protocol import TileObjects, TileVqa
from model_server.training.records import Record, read_records, set_names

T = TypeVar("T")


@dataclass(frozen=True)
class EvaluatedSet:
    """One set: the evaluated records, the training records (never the same images), and all its scene classes.

    `cache` is the folder that may keep features of the training images between runs. `found` and `answered` keep what
    the model has said about (record id, phrase or question, shown its mean colour only), so that no task asks again.
    """

    name: str
    split: str
    records: list[Record]
    train: list[Record]
    scenes: tuple[str, ...]
    info: SetInfo
    cache: Path
    found: dict[tuple[str, str, bool], TileObjects] = field(default_factory=dict)
    answered: dict[tuple[str, str, bool], TileVqa] = field(default_factory=dict)


def read_set(data_dir: Path, train_dir: Path, name: str, split: str, limit: int | None, cache: Path) -> EvaluatedSet:
    """Read one set. `limit` keeps that many images, evenly spread, for a quick look.

    The closed list of scenes is every class that the set has in either directory, whatever the split. Raises DataError
    where `data_dir` has no such set; a `train_dir` without it yields no training records.
    """
    everything = read_records(data_dir, [name], None)
    available = [record for record in everything if record.split == split]
    records = available if limit is None else evenly(available, limit)
    training = read_records(train_dir, [name], "train") if name in set_names(train_dir) else []
    evaluated = {record.id for record in records}
    sizes = Counter(f"{record.width}x{record.height}" for record in records).most_common()
    pixels = " ".join(filter(None, [sizes[0][0] if sizes else "", "mostly" if len(sizes) > 1 else ""]))
    return EvaluatedSet(
        name=name,
        split=split,
        records=records,
        train=[record for record in training if record.id not in evaluated],
        scenes=tuple(sorted({record.scene for record in everything + training if record.scene})),
        info=SetInfo(name, len(records), len(available), pixels),
        cache=cache,
    )


def evenly(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of the items, evenly spread over their order."""
    if len(items) <= most:
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]
