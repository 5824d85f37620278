"""A checkpoint of the debug config with seeded random weights: for tests and first looks, it has learned nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from model_server.calibration import Calibration, DenseCalibration
from model_server.checkpoints.store import save_checkpoint, save_dense
from model_server.model.config import debug
from model_server.model.dense import DenseBranch, start_branch
from model_server.model.rsvlm import RSVLM
from model_server.text.phrasings import TRAIN
from model_server.text.tokenizer import TextTokenizer
from model_server.training.start import sentence_parts


def write_debug_checkpoint(folder: Path, seed: int = 0, dense: bool = False) -> None:
    """Write it to `folder`; `dense`: with a branch for boxes, masks and change."""
    torch.manual_seed(seed)
    config = debug()
    phrases = [phrase for bank in TRAIN.values() for phrase in bank]
    tokenizer = TextTokenizer.train([*phrases, "yes", "no"], config.decoder.vocab_size)
    encoder, sentence_tokenizer = sentence_parts(config)
    decoder = dataclasses.replace(config.decoder, vocab_size=len(tokenizer))
    model = RSVLM(dataclasses.replace(config, decoder=decoder)).eval()
    model.sentence.load_state_dict(encoder.state_dict())
    model.backbone.fold_norms()
    save_checkpoint(folder, model, tokenizer, sentence_tokenizer, Calibration())
    if dense:
        branch = DenseBranch(config)
        start_branch(branch, model.backbone)
        save_dense(folder, branch, DenseCalibration())
