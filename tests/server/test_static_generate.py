"""The benchmark against `transformers.generate` compares like with like: both sides write the same tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scripts import loaded

from model_server.model.config import debug
from model_server.model.rsvlm import RSVLM

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "static_generate.py"


@pytest.mark.parametrize("places", [3, 8])
def test_the_exported_llama_writes_the_tokens_of_the_lane_whoever_shares_its_steps(places: int) -> None:
    pytest.importorskip("transformers")
    bench = loaded(SCRIPT)
    torch.manual_seed(1)
    config = debug()
    model = RSVLM(replace(config, decoder=replace(config.decoder, tied=False))).eval()
    c = model.config.decoder
    for name, weight in model.decoder.named_parameters():
        if name.endswith("out.weight"):  # so that answers differ
            torch.nn.init.normal_(weight)
    visual = torch.randn(7, model.visual_tokens, c.width)
    banned = torch.zeros(c.vocab_size, dtype=torch.bool)
    banned[:4] = True
    ends = bench.continuous(model, visual, bench.Writing(5, c.vocab_size - 1, 0, banned, 6), 7).ids
    end = ends[0][3]  # a token that some answer holds: that one is shorter than others
    how = bench.Writing(task=5, end=end, pad=0, banned=banned, steps=6)
    ours = bench.continuous(model, visual, how, places)
    assert ours.ids == bench.static(bench.as_llama(model.decoder), visual, how, 4).ids
    assert len({len(ids) for ids in ours.ids}) > 1
    assert not {token for ids in ours.ids for token in ids} & set(range(4))
