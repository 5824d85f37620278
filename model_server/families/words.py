"""The tokenizer that comes with a published checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from model_server.checkpoints.files import read_json
from model_server.checkpoints.published import repetition_penalty, require
from model_server.checkpoints.store import WeightsError
from model_server.model.llava import IMAGE

PICTURE = "<image>"  # stands in a prompt where a picture belongs
_OTHERWISE: dict[str, tuple[object, ...]] = {
    "num_beams": (1,), "no_repeat_ngram_size": (0,), "min_new_tokens": (0,), "min_length": (0,),
    "bad_words_ids": ([],), "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "sequence_bias": ({}, []),
}  # fmt: skip
_CONFIGS = ("generation_config.json", "config.json", "tokenizer_config.json")


class NoTokenizer(WeightsError):
    """The checkpoint's folder holds no tokenizer that can be read: its model cannot be spoken to."""


class Words:
    """Text to ids and back. `ends` are the ids that close an answer; `picture` is the id of `<image>` where that is a
    token of the checkpoint's own (the layout of `transformers`); `penalty` what repeated tokens lose, 1 = nothing."""

    def __init__(
        self, tokenizer: Tokenizer, ends: frozenset[int], picture: int | None = None, penalty: float = 1.0
    ) -> None:
        self.tokenizer, self.ends, self.picture, self.penalty = tokenizer, ends, picture, penalty

    def with_picture(self, picture: int | None) -> Words:
        """The same words, `<image>` being a token of this id."""
        return Words(self.tokenizer, self.ends, picture, self.penalty)

    @classmethod
    def load(cls, folder: Path, *others: Path) -> Words:
        """From `tokenizer.json`, else through `transformers`; ends are read in all folders, the tokenizer in the first
        that has one.

        Raises:
            NoTokenizer: no folder holds one, or a package that reads it is missing.
            UnsupportedLayout: the checkpoint is to be decoded otherwise than greedily, which drawing lots is not: that
                the authors' scripts turn off too.
        """
        folders = (folder, *others)
        tokenizer = next((found for f in folders if (found := _read(f)) is not None), None)
        if tokenizer is None:
            raise NoTokenizer(
                f"{folder} holds no tokenizer: put the checkpoint's tokenizer.json (or tokenizer.model, or vocab.json "
                "and merges.txt) into it"
            )
        ends = frozenset(end for f in folders for end in _ends(f, tokenizer))
        if not ends:
            raise NoTokenizer(f"no file in {folder} says which token ends an answer (eos_token_id or eos_token)")
        return cls(tokenizer, ends, penalty=_penalty(folders))

    def prompt(self, text: str) -> list[int]:
        """Ids of a prompt with `IMAGE` for each `<image>`. Where that is no token, the pieces between are encoded one
        by one, as published, and a start token stands at the beginning only."""
        if self.picture is not None:
            return [IMAGE if i == self.picture else i for i in self.tokenizer.encode(text).ids]
        start = self.tokenizer.encode("").ids
        ids = list(start)
        for n, piece in enumerate(text.split(PICTURE)):
            ids += [IMAGE] * (n > 0)
            ids += self.tokenizer.encode(piece).ids[len(start) :]
        return ids

    def answer(self, text: str) -> list[int]:
        """Ids of an answer, without start and end."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def text(self, ids: Sequence[int]) -> str:
        """What ids say, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def _read(folder: Path) -> Tokenizer | None:
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises plain Exception
            raise NoTokenizer(f"cannot read {path}: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    if not any((folder / name).is_file() for name in ("tokenizer.model", "vocab.json")):
        return None
    try:
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (ImportError, OSError, ValueError) as error:
        raise NoTokenizer(
            f"{folder} keeps its tokenizer in an older form, which could not be read: {error}; "
            "try: pip install transformers sentencepiece protobuf"
        ) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise NoTokenizer(f"the tokenizer in {folder} has no fast form; save it as tokenizer.json and put that there")
    return backend


def _penalty(folders: Sequence[Path]) -> float:
    """`repetition_penalty`, which greedy decoding keeps, of the first generation_config.json that names it."""
    named = []
    for folder in folders:
        raw = read_json(folder / _CONFIGS[0]) if (folder / _CONFIGS[0]).is_file() else {}
        for key, off in _OTHERWISE.items():
            require(raw, key, [None, *off], _CONFIGS[0])
        named.append(repetition_penalty(folder))
    return next((penalty for penalty in named if penalty != 1), 1.0)


def _ends(folder: Path, tokenizer: Tokenizer) -> list[int]:
    found: list[int] = []
    for name in _CONFIGS:
        if not (folder / name).is_file():
            continue
        raw = read_json(folder / name)
        ids = raw.get("eos_token_id", (raw.get("text_config") or {}).get("eos_token_id"))
        found += [ids] if isinstance(ids, int) else list(ids or ())
        token = raw.get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        known = tokenizer.token_to_id(token) if isinstance(token, str) else None
        found += [] if known is None else [known]
    return found
