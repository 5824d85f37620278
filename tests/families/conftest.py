"""Tiny recorded checkpoints that can be spoken to: the recordings hold no tokenizers, so each gets one of characters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from model_server.checkpoints.published import read_json

RECORDED = Path(__file__).parents[1] / "checkpoints" / "oracles"
SIGNS = "\n abcdefghijklmnopqrstuvwxyz0123456789[],.*?':{}<>|"


def character_tokenizer(vocabulary: int, specials: tuple[str, ...]) -> Tokenizer:
    """Ids 0 to n for the specials, then one for each sign, as far as they fit."""
    ids = {token: n for n, token in enumerate(specials)}
    for sign in SIGNS:
        if len(ids) < vocabulary - 1:
            ids.setdefault(sign, len(ids))
    ids["~"] = len(ids)
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="~"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(specials))
    return tokenizer


def spoken(family: str, folder: Path, specials: tuple[str, ...]) -> Path:
    """A copy of a recorded checkpoint with a tokenizer beside it."""
    shutil.copytree(RECORDED / family / "checkpoint", folder)
    vocabulary = read_json(folder / "config.json")["vocab_size"]
    character_tokenizer(vocabulary, specials).save(str(folder / "tokenizer.json"))
    return folder


def configure(folder: Path, **fields: object) -> Path:
    """Change fields of a copy's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


@pytest.fixture(scope="session")
def rsunivlm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families") / "rsunivlm"
    return spoken("rsunivlm", folder, ("<pad>", "<s>", "<|im_end|>", "<|im_start|>"))
