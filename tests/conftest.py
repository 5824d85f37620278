"""What all tests share: a tiny real checkpoint, and where the labelled data lie."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def debug_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the debug config with random weights."""
    from model_server.checkpoints.debug import write_debug_checkpoint

    folder = tmp_path_factory.mktemp("weights") / "debug"
    write_debug_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def dense_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a branch for boxes, masks and change, random too."""
    from model_server.checkpoints.debug import write_debug_checkpoint

    folder = tmp_path_factory.mktemp("weights") / "dense"
    write_debug_checkpoint(folder, dense=True)
    return folder


@pytest.fixture(scope="session")
def labelled_data() -> Path:
    """The directory of labelled sets (RS_DATA, or ../shared/data); the test is skipped where there is none."""
    folder = Path(os.environ.get("RS_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "ucm" / "records.jsonl").is_file():
        pytest.skip(f"no labelled data in {folder}; set RS_DATA to a directory of record sets")
    return folder


@pytest.fixture(scope="session")
def oracles() -> Path:
    """Recorded results of published code (RS_ORACLES, or ../shared/reference/oracles); skipped where there are none."""
    folder = Path(os.environ.get("RS_ORACLES", ROOT.parent / "shared" / "reference" / "oracles"))
    if not (folder / "README.md").is_file():
        pytest.skip(f"no recorded results in {folder}; set RS_ORACLES to their directory")
    return folder


SPECIALS = {
    "rsunivlm": ("<pad>", "<s>", "<|im_end|>", "<|im_start|>"),
    "mfrsvlm": ("<pad>", "<s>", "</s>"),
}


@pytest.fixture(scope="session")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes copies of tiny recorded checkpoints that can be spoken to: the recordings hold no tokenizer, so each copy
    gets one of characters. Further arguments replace fields of its config.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    def copy(family: str, **fields: object) -> Path:
        folder = tmp_path_factory.mktemp("spoken") / family
        shutil.copytree(Path(__file__).parent / "checkpoints" / "oracles" / family / "checkpoint", folder)
        config = {**json.loads((folder / "config.json").read_text()), **fields}
        (folder / "config.json").write_text(json.dumps(config))
        signs = [*SPECIALS[family], *"\n abcdefghijklmnopqrstuvwxyz0123456789[],.*?':{}<>|"][: config["vocab_size"] - 1]
        ids = {sign: n for n, sign in enumerate([*signs, "~"])}
        tokenizer = Tokenizer(models.WordLevel(ids, unk_token="~"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer.decoder = decoders.Fuse()
        tokenizer.add_special_tokens(list(SPECIALS[family]))
        tokenizer.save(str(folder / "tokenizer.json"))
        return folder

    return copy
