"""Which concept a phrase means, and whether the dense branch was taught anything like it.

A phrase is known where its sentence vector has a cosine of at least `KNOWN` with that of some phrasing of training,
and no thing that was only ever taught as absent is nearer. `KNOWN` is where, with MiniLM, words that no training used
part from things that no training showed: 41 of 44 held-out phrases are known (not "tanker", "edifice" and
"lookalike"), and 186 of the 198 phrasings of training when each is left out in turn. Of the 23 things taught as absent,
each left out in turn, none is taken for known; at 0.61 one would be ("water tower"), at 0.55 four.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from model_server.text.concepts import CONCEPTS, DISTRACTORS

KNOWN = 0.62


@dataclass(frozen=True)
class Meaning:
    """A phrase as the dense branch takes it: its unit sentence vector [S], and its concept, None where unknown."""

    vector: Tensor
    concept: str | None

    @property
    def known(self) -> bool:
        return self.concept is not None


class KnownPhrases:
    """The phrasings of training as `embed` (phrases -> unit vectors [N, S]) sees them."""

    def __init__(self, embed: Callable[[Sequence[str]], Tensor]) -> None:
        taught = [(phrase, concept.name) for concept in CONCEPTS.values() for phrase in concept.said]
        self._embed = embed
        self._concepts = [name for _, name in taught]
        vectors = embed([*(phrase for phrase, _ in taught), *DISTRACTORS])
        self._taught, self._absent = vectors[: len(taught)], vectors[len(taught) :]

    def read(self, phrases: Sequence[str]) -> dict[str, Meaning]:
        """What each distinct phrase means."""
        distinct = sorted(set(phrases))
        if not distinct:
            return {}
        vectors = self._embed(distinct)
        nearest = (vectors @ self._taught.T).max(1)
        absent = (vectors @ self._absent.T).amax(1)
        known = (nearest.values >= KNOWN) & (nearest.values >= absent)
        return {
            phrase: Meaning(vector, self._concepts[row] if sure else None)
            for phrase, vector, row, sure in zip(
                distinct, vectors, nearest.indices.tolist(), known.tolist(), strict=True
            )
        }
