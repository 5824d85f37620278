"""One attention function: backends against the plain one, what they refuse and why, rotary positions, the cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from scripts import loaded

from model_server.model.attention import KVCache, Runs, attend, attend_packed, attention_backend, rotary_table, rotate
from model_server.model.backends import PACKAGES, Backend, Call, UnsupportedAttention, choose, refusal

HOPPER = Call("cuda", torch.bfloat16, 64, "causal", (9, 0))
KERNELS = [Backend.SDPA, *PACKAGES]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_the_fused_backend_equals_the_float32_reference(groups: int, masked: bool) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, groups, 9, 8), torch.randn(2, groups, 9, 8)
    mask = None
    if masked:
        mask = torch.rand(2, 1, 5, 9) > 0.4
        mask[..., 0] = True
    torch.testing.assert_close(
        attend(q, k, v, mask, Backend.SDPA), attend(q, k, v, mask, Backend.MATH), atol=1e-5, rtol=1e-5
    )


def kernel_or_skip(backend: Backend) -> torch.device:
    """The device that a backend can be tested on here."""
    if backend is Backend.SDPA:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip(f"{backend} needs a CUDA device, there is none here")
    device = torch.device("cuda")
    reason = refusal(backend, Call.of(torch.empty(1, 64, dtype=torch.bfloat16, device=device), "causal"))
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    return device


def grown(*shape: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape).to(device, dtype).requires_grad_()


def outcome(backend: Backend, packed: bool, device: torch.device, causal: bool) -> list[torch.Tensor]:
    """Result and gradients of grouped attention: one batch, or runs of 5, 0, 3 and 5 queries over longer keys."""
    torch.manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if packed:
        q = grown(13, 4, 64, device=device, dtype=dtype)
        k, v = (grown(20, 2, 64, device=device, dtype=dtype) for _ in range(2))
        queries, keys = Runs.of((5, 0, 3, 5), device), Runs.of((7, 0, 4, 9), device)
        y = attend_packed(q, k, v, queries, keys, causal, backend)
    else:
        q = grown(2, 4, 5, 64, device=device, dtype=dtype)
        k, v = (grown(2, 2, 7, 64, device=device, dtype=dtype) for _ in range(2))
        y = attend(q, k, v, "causal" if causal else None, backend)
    (y.float() * torch.arange(64, device=device)).sum().backward()
    return [x.detach().float() for x in (y, *(p.grad for p in (q, k, v) if p.grad is not None))]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", KERNELS)
def test_every_backend_equals_the_reference_forward_and_backward(backend: Backend, packed: bool, causal: bool) -> None:
    device = kernel_or_skip(backend)
    loose = 1e-4 if device.type == "cpu" else 2e-2  # the packages compute in bfloat16
    found, expected = (outcome(b, packed, device, causal) for b in (backend, Backend.MATH))
    assert len(found) == 4
    for ours, theirs in zip(found, expected, strict=True):
        scale = theirs.abs().max().clamp(min=1)
        torch.testing.assert_close(ours / scale, theirs / scale, atol=loose, rtol=loose)


@pytest.mark.parametrize("backend", [Backend.SDPA, Backend.MATH])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_runs_equal_each_run_alone(backend: Backend, causal: bool) -> None:
    torch.manual_seed(0)
    lengths = (4, 1, 6, 4)
    q, k, v = (torch.randn(15, heads, 8) for heads in (4, 2, 2))
    packed = attend_packed(q, k, v, Runs.of(lengths), causal=causal, backend=backend, scale=0.3)
    alone = []
    for run in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        a, b, c = (x.transpose(0, 1)[None] for x in run)
        alone.append(attend(a, b, c, "causal" if causal else None, backend, 0.3)[0].transpose(0, 1))
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_runs_that_do_not_fit_the_tensors_are_refused() -> None:
    x = torch.randn(5, 1, 8)
    with pytest.raises(ValueError, match="5 queries in 2 runs of 6"):
        attend_packed(x, x, x, Runs.of((3, 3)))
    with pytest.raises(ValueError, match="5 keys in 1 runs of 5 do not fit"):
        attend_packed(x, x, x, Runs.of((3, 2)), Runs.of((5,)))


def test_causal_lets_the_last_query_see_the_last_key() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)
    seen = torch.tensor([[True, True, True, True, False], [True] * 5])
    for backend in (Backend.SDPA, Backend.MATH):
        torch.testing.assert_close(attend(q, k, v, "causal", backend), attend(q, k, v, seen, Backend.MATH))


@pytest.mark.parametrize(
    ("backend", "call", "reason"),
    [
        (Backend.FLASH2, Call("cpu", torch.float32, 64, "none"), "needs a CUDA device, not cpu"),
        (Backend.FLASH3, Call("cuda", torch.bfloat16, 64, "none", (8, 0)), "capability 9, this device has 8.0"),
        (Backend.FLASH4, Call("cuda", torch.bfloat16, 64, "none", (8, 6)), "capability 9 to 12, this device has 8.6"),
        (Backend.FLASH2, Call("cuda", torch.bfloat16, 64, "none", (7, 5)), "capability 8 or above"),
        (Backend.FLASH4, Call("cuda", torch.float32, 64, "none", (9, 0)), "float16 or bfloat16, not float32"),
        (Backend.FLASH4, Call("cuda", torch.float16, 256, "none", (10, 0)), "up to 128 channels"),
        (Backend.FLASH2, Call("cuda", torch.float16, 72 + 4, "none", (9, 0)), "a multiple of 8; these 76"),
        (Backend.FLASH2, Call("cuda", torch.float16, 64, "tensor", (9, 0)), "takes no mask"),
    ],
)
def test_a_backend_says_in_words_why_it_cannot_serve_a_call(backend: Backend, call: Call, reason: str) -> None:
    assert reason in (refusal(backend, call) or "")
    with pytest.raises(UnsupportedAttention, match="use auto, or one of") as caught:
        choose(backend, call)
    assert reason in str(caught.value)
    assert choose(Backend.AUTO, call) not in (backend, Backend.MATH, Backend.AUTO)


def test_a_package_that_is_not_installed_is_named_with_how_to_get_it() -> None:
    for backend in PACKAGES:
        reason = refusal(backend, HOPPER)
        assert reason is None or PACKAGES[backend].install in reason


def test_auto_takes_the_fused_kernel_on_a_cpu_and_a_named_backend_holds_within_its_block() -> None:
    q = torch.randn(1, 2, 3, 8)
    assert choose(Backend.AUTO, Call.of(q, "tensor")) is Backend.SDPA
    with attention_backend(Backend.FLASH4), pytest.raises(UnsupportedAttention, match="flash4 cannot serve this call"):
        attend(q, q, q, None)
    assert attend(q, q, q, None).shape == q.shape


class FakeFlash:
    """A package's two functions, told apart from ours by where heads stand; the equation is the reference's."""

    @staticmethod
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attend(q, k, v, "causal" if causal else None, Backend.MATH, softmax_scale).transpose(1, 2), None

    @staticmethod
    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None,
                               causal=False):  # fmt: skip
        queries, keys = (Runs.of(bounds.diff().tolist()) for bounds in (cu_seqlens_q, cu_seqlens_k))
        assert (max_seqlen_q, max_seqlen_k) == (max(queries.lengths), max(keys.lengths))
        return attend_packed(q, k, v, queries, keys, causal, Backend.MATH, softmax_scale)


@pytest.mark.parametrize("backend", PACKAGES)
def test_flash_packages_are_called_with_heads_last_and_cumulative_lengths(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout and arguments only: no kernel runs here."""
    from model_server.model import attention, backends

    monkeypatch.setattr(backends, "_load", lambda package: (FakeFlash, ""))
    monkeypatch.setattr(attention, "choose", lambda named, call: named)
    for packed in (False, True):
        found = outcome(backend, packed, torch.device("cpu"), causal=True)
        for ours, theirs in zip(found, outcome(Backend.MATH, packed, torch.device("cpu"), True), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_rotary_scores_depend_on_distance_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(i: int, j: int) -> torch.Tensor:
        a, b = (rotate(x, *rotary_table(torch.tensor([[p]]), 16, 10000.0)) for x, p in ((q, i), (k, j)))
        return (a * b).sum()

    torch.testing.assert_close(score(3, 1), score(52, 50), atol=1e-4, rtol=1e-4)
    assert abs(float(score(3, 1) - score(3, 2))) > 1e-3


def test_the_cache_returns_what_was_written_and_reorders_rows() -> None:
    cache = KVCache(layers=1, batch=2, heads=1, length=4, width=3, like=torch.zeros(1))
    first, second = torch.randn(2, 1, 2, 3), torch.randn(2, 1, 1, 3)
    cache.write(0, first, first)
    cache.advance(2)
    k, _ = cache.write(0, second, second)
    assert torch.equal(k, torch.cat((first, second), 2))
    cache.advance(1)
    cache.select(torch.tensor([1, 1, 0]))
    assert cache.data.shape[2] == 3
    assert torch.equal(cache.data[0, 0, 0, :, :2], first[1])
    assert torch.equal(cache.data[0, 0, 2, :, :2], first[0])


def test_the_gpu_benchmark_runs_its_shapes_and_says_where_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """The shapes by the fused kernel on a CPU, cut down; no time is taken here."""
    module = loaded(Path(__file__).parents[2] / "benchmarks" / "gpu_attention.py")
    cpu = torch.device("cpu")
    for shape in module.SHAPES:
        small = dataclasses.replace(shape, batch=min(shape.batch, 1), tokens=min(shape.tokens, 9),
                                    lengths=tuple(n % 7 + 1 for n in shape.lengths[:4]))  # fmt: skip
        q, k, v = module.inputs(small, cpu)
        found, expected = (module.runner(small, b, cpu)(q, k, v).float() for b in (Backend.SDPA, Backend.MATH))
        torch.testing.assert_close(found, expected, atol=3e-2, rtol=3e-2)
        assert module.measure(small, Backend.FLASH4, cpu, 1).refused
    if not torch.cuda.is_available():
        assert module.main([]) == 2
        assert "no CUDA device" in capsys.readouterr().err
