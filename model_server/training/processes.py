"""Training in several processes, each with its own share of every batch.

    accelerate launch --multi_gpu --num_processes 2 -m model_server.training DATA --run RUN

or `torchrun --nproc-per-node 2 -m ...`: either tells each process its place in the environment, and nothing of either
is needed here. (`accelerate launch --cpu` starts several processes under MPI only; `--multi_gpu` does on any machine.)

Every process makes the same model from the same seed and goes through the same order of batches, of which it computes
its own share. What a loss needs of the whole batch is brought together (`whole`, `mean`), gradients are averaged, and
so all take the step that one process would take with the whole batch, up to rounding. The main process alone writes
and speaks. Alone, a process computes exactly what it would without this module.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable

_PATIENCE = timedelta(hours=6)  # the others wait while the main process validates; the launcher ends them if it fails
_APART = 1_000_000_007  # between the seeds of processes


class UnevenBatch(ValueError):
    """The images of a batch do not divide among the processes."""


class OneProcessOnly(SystemExit):
    """A launcher started several processes of a command that is not spread over them; the text says what to run."""


def refuse_several(command: str) -> None:
    """End a process that is one of several.

    Raises:
        OneProcessOnly: naming the module to run, `command`.
    """
    if (several := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise OneProcessOnly(
            f"{command} trains in one process, and a launcher started {several}: each would do the same work and write "
            f"the same files. Run it alone: python -m {command} ..."
        )


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that a launcher started, as RANK and WORLD_SIZE tell; without them, be alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    distributed.init_process_group("gloo", timeout=_PATIENCE)
    spoken = sys.stdout
    try:
        with open(os.devnull, "w", encoding="utf-8") as silence:
            sys.stdout = spoken if is_main() else silence
            yield
    finally:
        sys.stdout = spoken
        distributed.destroy_process_group()


def count() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """This process's number; 0 is the main one."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_main() -> bool:
    return rank() == 0


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        distributed.barrier()


def log(path: Path) -> TextIO:
    """Open a log to write on; the main process's is the file, the others' goes nowhere."""
    return path.open("a", encoding="utf-8") if is_main() else Path(os.devnull).open("w", encoding="utf-8")


@contextmanager
def main_first() -> Iterator[None]:
    """The main process goes through the block before the others: what it writes there, they find."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


def share(batch: int) -> slice:
    """This process's rows of a batch.

    Raises:
        UnevenBatch: it does not divide.
    """
    each, left = divmod(batch, count())
    if left or not each:
        raise UnevenBatch(f"{batch} images do not divide among {count()} processes; let --batch be a multiple of them")
    return slice(rank() * each, (rank() + 1) * each)


def own_seed(seed: int) -> int:
    """A seed for what processes should draw differently; the main process keeps the given one."""
    return seed + rank() * _APART


def draw_apart() -> None:
    """From here on torch's random numbers differ between processes."""
    if not is_main():
        torch.manual_seed(own_seed(torch.initial_seed()))


class _Total(torch.autograd.Function):
    """The sum over processes of tensors of one shape; so is its gradient, each process's loss being one of a mean."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.contiguous().clone()
        distributed.all_reduce(out)
        return out

    @staticmethod
    @once_differentiable  # whose type makes `ctx` positional
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        out = grad_outputs[0].contiguous().clone()
        distributed.all_reduce(out)
        return out


def _total(x: Tensor) -> Tensor:
    out = _Total.apply(x)
    assert isinstance(out, Tensor)
    return out


def whole(x: Tensor) -> Tensor:
    """The rows [B, ...] of the whole batch from each process's share [B / processes, ...], with gradients."""
    if count() == 1:
        return x
    out = x.new_zeros(count() * len(x), *x.shape[1:], dtype=torch.float32)
    mine = share(len(out))
    return _total(torch.cat((out[: mine.start], x.float(), out[mine.stop :]))).to(x.dtype)


def mean(x: Tensor) -> Tensor:
    """The mean over processes, without gradients: of what a share's sum is divided by, or of a loss to be shown.

    Shares' sums divided by it have as their mean the whole batch's sum divided by the whole batch's divisor.
    """
    if count() == 1:
        return x
    out = x.detach().float().clone()
    distributed.all_reduce(out)
    return out / count()


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Let every process have the mean gradients. Those of a part that no process used stay None."""
    if count() == 1:
        return
    given = list(parameters)
    used = torch.tensor([float(p.grad is not None) for p in given])
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in given]
    flat = torch.cat([used, *(part.float().flatten() for part in parts)])
    distributed.all_reduce(flat)
    flat /= count()
    used, *means = flat.split([len(given), *(p.numel() for p in given)])
    for p, there, gradient in zip(given, used.tolist(), means, strict=True):
        p.grad = gradient.view_as(p).to(p.dtype) if there else None


class _WholeBatchNorm(nn.BatchNorm2d):
    """Batch norm by the statistics of all processes' shares. (`nn.SyncBatchNorm` does not run on a CPU.)"""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.running_mean is None or self.running_var is None:
            return super().forward(input)
        n = count() * input.numel() / input.shape[1]
        centre = _total(input.sum((0, 2, 3))) / n
        x = input - centre[:, None, None]
        variance = _total(x.square().sum((0, 2, 3))) / n
        with torch.no_grad():
            momentum = self.momentum or 0.0
            self.running_mean.lerp_(centre, momentum)
            self.running_var.lerp_(variance * n / (n - 1), momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return x * scale[:, None, None] + self.bias[:, None, None]


def share_norms(model: nn.Module) -> None:
    """Let the model's batch norms see the whole batch, in place; nothing where one process is alone."""
    if count() == 1:
        return
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm2d:
                norm = _WholeBatchNorm(child.num_features, child.eps, child.momentum)
                norm.load_state_dict(child.state_dict())
                norm.train(child.training)
                setattr(parent, name, norm)
