"""What fits beside the weights, of the memory of the device that keeps them."""

from __future__ import annotations

import pytest
import torch

from model_server.batching.memory_plan import SEQUENCES, MemoryPlan, free_memory
from model_server.model.transfer import sent

GIB, MIB = 2**30, 2**20
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def test_the_plan_of_a_gpu_counts_its_memory_and_what_torch_holds_of_it_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 1)
    known = {"mem_get_info": (3 * GIB, 80 * GIB), "memory_reserved": 2 * GIB, "memory_allocated": 1 * GIB}
    for name, value in known.items():
        monkeypatch.setattr(torch.cuda, name, lambda of, value=value: value if of == gpu else pytest.fail(str(of)))
    assert free_memory(gpu) == 4 * GIB
    assert free_memory(torch.device("cpu")) != 4 * GIB


def test_the_plan_of_a_processor_does_not_ask_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: pytest.fail("asked"))
    assert free_memory(torch.device("cpu")) > 0


def test_fewer_sequences_are_planned_where_less_is_free() -> None:
    plenty, little = (MemoryPlan.of(free, 0, 10 * MIB, 2) for free in (8 * GIB, 256 * MIB))
    assert plenty.sequences == SEQUENCES
    assert little.sequences * 2 * 10 * MIB <= 0.3 * 256 * MIB < 2 * little.sequences * 2 * 10 * MIB
    assert little.cache < plenty.cache


@needs_cuda
def test_what_is_taken_of_a_gpu_is_not_free() -> None:
    gpu = torch.device("cuda")
    before = free_memory(gpu)
    taken = torch.empty(256 * MIB, dtype=torch.uint8, device=gpu)
    assert before - free_memory(gpu) >= 0.9 * taken.nbytes
    assert before <= torch.cuda.get_device_properties(gpu).total_memory


def test_what_is_sent_to_where_it_is_stays_itself() -> None:
    values = torch.arange(6)
    assert sent(values, torch.device("cpu")) is values


@needs_cuda
def test_what_is_sent_to_a_gpu_arrives_whole() -> None:
    values = torch.randint(0, 256, (64, 3, 256, 256), dtype=torch.uint8)
    assert torch.equal(sent(values, torch.device("cuda")).cpu(), values)
