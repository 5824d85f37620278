"""What is packed for the CPU computes what was there before."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from model_server.model.config import debug
from model_server.model.packed import PackedLinear, can_pack, pack_decoder, pack_projections
from model_server.model.rsvlm import RSVLM

pytestmark = pytest.mark.skipif(not can_pack(torch.device("cpu")), reason="this build of PyTorch has no fused kernels")


@pytest.mark.parametrize("rows", [1, 12, 100])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_a_packed_projection_equals_the_plain_one(rows: int, bias: bool) -> None:
    plain = nn.Linear(24, 40, bias=bias)
    x = torch.randn(3, rows, 24)[:, ::2]  # not contiguous
    torch.testing.assert_close(PackedLinear(plain.weight, plain.bias)(x), plain(x))


@pytest.mark.parametrize("tied", [True, False])
@torch.inference_mode()
def test_a_packed_model_writes_and_reads_as_before(tied: bool) -> None:
    torch.manual_seed(0)
    config = debug()
    model = RSVLM(config).eval()
    if not tied:
        model.decoder.head = nn.Linear(config.decoder.width, config.decoder.vocab_size, bias=False)
    packed = copy.deepcopy(model)
    pack_decoder(packed.decoder)
    pack_projections(packed.sentence)
    assert not any(isinstance(m, nn.Linear) for m in (*packed.decoder.blocks.modules(), *packed.sentence.modules()))
    x, at, expert = torch.randn(2, 5, config.decoder.width), torch.arange(5).expand(2, 5), torch.zeros(2).long()
    before, after = (m.decoder.logits(m.decoder(x, at, "causal", expert)) for m in (model, packed))
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    ids, mask = torch.randint(0, 50, (2, 7)), torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    before, after = (m.read_questions(ids, mask).vectors for m in (model, packed))
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
