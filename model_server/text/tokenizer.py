"""The decoder's tokenizer: lower-case BPE over captions and answers, with the task tokens as specials.

Questions and labels do not pass through it; they are read by the sentence encoder's own tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TASK_TOKENS = ("[CAP]", "[CLS]", "[VQA]", "[VG]", "[REF]", "[SEG]", "[CCD]")
PAD, END = "<pad>", "<end>"
_SPACE = "▁"  # the mark of a word's beginning


class TextTokenizer:
    """Text to ids and back; `end` closes an answer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        self.pad, self.end = vocabulary[PAD], vocabulary[END]
        self.tasks = {t: vocabulary[t] for t in TASK_TOKENS}

    @classmethod
    def load(cls, path: Path) -> TextTokenizer:
        return cls(Tokenizer.from_file(str(path)))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> TextTokenizer:
        """Learn merges; every printable ASCII character stays writable. The same texts give the same tokens."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(_SPACE, prepend_scheme="always"),
                pre_tokenizers.Split(Regex("[0-9]"), "isolated"),
                pre_tokenizers.Split(Regex("[.,!?;:]"), "isolated"),
            ]
        )
        tokenizer.decoder = decoders.Metaspace(_SPACE, prepend_scheme="always")
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[PAD, END, *TASK_TOKENS], show_progress=False,
            initial_alphabet=[chr(c) for c in range(33, 127) if not chr(c).isupper()] + [_SPACE],
        )  # fmt: skip
        tokenizer.train_from_iterator(sorted(texts), trainer)
        return cls(tokenizer)

    def save(self, path: Path) -> None:
        self._tokenizer.save(str(path))

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids up to `end`; specials are left out."""
        ids = list(ids)
        if self.end in ids:
            ids = ids[: ids.index(self.end)]
        return self._tokenizer.decode(ids, skip_special_tokens=True).strip()
