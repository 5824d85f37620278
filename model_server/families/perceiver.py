"""A published model as a resident one: queries become messages, words become typed answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from model_server.batching.engine_errors import QueryFailed
from model_server.families.asking import Dialect, Said, Speaker
from model_server.families.reading import UNCALIBRATED
from model_server.protocol import UNUSED_ANCHORS, ModelInfo, PerceiveRequest, Task, TaskNotServed, TileAnswer
from model_server.query import Query
from model_server.text.malformed import MalformedText

_BLANK = 64  # pixels a side


class PublishedPerceiver:
    """One loaded published checkpoint. Not thread-safe: the engine is its only caller."""

    def __init__(self, dialect: Dialect, speaker: Speaker, info: ModelInfo, taxonomy: Sequence[str]) -> None:
        self.dialect, self.speaker, self.info = dialect, speaker, info
        self.tasks: tuple[Task, ...] = dialect.tasks
        self.taxonomy = tuple(taxonomy)

    def warm_up(self) -> None:
        """Run the network once on a blank picture."""
        blank = np.full((_BLANK, _BLANK, 3), 127, np.uint8)
        asks = self.dialect.ask(Query("vqa", blank, text="Is there water?"))
        self.speaker.say([replace(ask, steps=2) for ask in asks])

    def route(self, task: Task) -> tuple[str, str]:
        """Task token and expert that serve a task; empty and `shared` where the family has none."""
        return self.dialect.route(task)

    def warnings(self, request: PerceiveRequest) -> list[str]:
        unused = [UNUSED_ANCHORS] if request.anchors and not self.dialect.anchored else []
        return [UNCALIBRATED, *unused, *self.dialect.cautions(request)]

    def answer(self, queries: Sequence[Query]) -> list[TileAnswer | QueryFailed]:
        """Answer a mixed batch, in order; all messages of all queries are said together. Words that do not hold what
        their format promises are a failure of their query alone.

        Raises:
            TaskNotServed: the family has no way to answer a query's task.
        """
        for query in queries:
            if query.task not in self.tasks:
                raise TaskNotServed(query.task, self.info.model, self.tasks)
        queries = [self._named(query) for query in queries]
        asks = [self.dialect.ask(query) for query in queries]
        said = iter(self.speaker.say([ask for some in asks for ask in some]))
        heard = [[next(said) for _ in some] for some in asks]
        return [self._read(query, words) for query, words in zip(queries, heard, strict=True)]

    def _read(self, query: Query, said: Sequence[Said]) -> TileAnswer | QueryFailed:
        try:
            return self.dialect.read(query, said)
        except MalformedText as error:
            return QueryFailed(f"the model's words for this {query.task} request cannot be read. {error}")

    def _named(self, query: Query) -> Query:
        return replace(query, labels=self.taxonomy) if query.task == "classify" and not query.labels else query
