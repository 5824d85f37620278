"""Whether a loaded checkpoint computes what its authors' code computed: recorded results against ours, in float32."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from model_server.checkpoints.adapters import find_family
from model_server.checkpoints.published import Report
from model_server.checkpoints.store import WeightsError
from model_server.model.attention import Backend, attention_backend

TOLERANCE = 1e-4
IDS = "ids"
KINDS = ("features", "embeddings", "logits", IDS)  # of a checkpoint none of these may go without a comparison
TEXT_CASES = "text_cases.json"


@dataclass
class Comparison:
    """Largest difference by kind of output, the cases that ran, and which recorded tensors were looked at."""

    worst: dict[str, tuple[float, str]] = field(default_factory=dict)  # kind -> (difference, where)
    counts: dict[str, int] = field(default_factory=dict)
    cases: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    recorded: set[str] = field(default_factory=set)
    exact: set[str] = field(default_factory=set)  # kinds that are equal or not
    wanted: Sequence[str] = ()  # kinds without which it has not passed

    def expect(self, names: Iterable[str]) -> None:
        """Name recorded results, so that it can be said which of them nothing was compared with."""
        self.recorded |= set(names)

    def tensor(self, kind: str, name: str, ours: Tensor, recorded: Tensor) -> None:
        """The largest absolute difference; infinite for another shape or where either is not finite. Where both are
        empty nothing is compared."""
        difference = math.inf
        if ours.shape == recorded.shape:
            gap = (ours.double() - recorded.double()).abs()
            if not gap.numel():
                return
            difference = float(gap.max())
        self._add(kind, name, math.inf if math.isnan(difference) else difference)

    def ids(self, name: str, ours: Iterable[int], recorded: Iterable[int]) -> None:
        """Token ids: all the same, or not. Where there are none on either side nothing is compared."""
        found, expected = list(ours), list(recorded)
        if found or expected:
            self.same(IDS, name, found, expected)

    def same(self, kind: str, name: str, ours: object, recorded: object) -> None:
        """Equal, or not."""
        self.exact.add(kind)
        self._add(kind, name, 0.0 if ours == recorded else math.inf)

    def _add(self, kind: str, name: str, difference: float) -> None:
        self.seen.add(name)
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if kind not in self.worst or difference > self.worst[kind][0]:
            self.worst[kind] = (difference, name)

    @property
    def left_out(self) -> list[str]:
        return sorted(self.recorded - self.seen)

    @property
    def absent(self) -> list[str]:
        """Wanted kinds of which nothing was compared."""
        return [kind for kind in self.wanted if kind not in self.counts]

    @property
    def passed(self) -> bool:
        """Something was compared, of each wanted kind, and all of it agrees."""
        agrees = all(value <= TOLERANCE for value, _ in self.worst.values())
        return bool(self.worst) and not self.absent and agrees


@dataclass(frozen=True)
class Verification:
    """What `verify` found in a folder."""

    family: str
    checkpoint: Path | None  # None: what is recorded needs none
    report: Report
    comparison: Comparison


def verify(folder: Path) -> Verification:
    """Load the checkpoint in a folder of recorded results (in it or in its `checkpoint/`) and run every case; a folder
    of recorded strings has no checkpoint.

    As when the results were recorded, one thread runs and attention is the plain equation (FUSAR-GPT's is PyTorch's):
    rounding grows in random weights, and other kernels round otherwise (they are held to the plain equation elsewhere).

    Raises:
        WeightsError: no adapter knows the checkpoint, its tensors do not fit, or what was recorded is not there or
            cannot be run.
    """
    try:
        return _verify_text(folder) if (folder / TEXT_CASES).is_file() else _verify_checkpoint(folder)
    except WeightsError:
        raise
    except (KeyError, OSError, SafetensorError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise WeightsError(f"what is recorded in {folder} is not whole: {said}") from error
    except ValueError as error:
        raise WeightsError(f"a case recorded in {folder} cannot be run: {error}") from error


def _verify_checkpoint(folder: Path) -> Verification:
    nested = folder / "checkpoint"
    checkpoint = nested if nested.is_dir() else folder
    name = find_family(checkpoint).NAME
    recorded = f"model_server.checkpoints.recorded.{name}"
    if importlib.util.find_spec(recorded) is None:
        raise WeightsError(f"{folder} is a checkpoint of {name}, for which nothing is recorded to compare with")
    comparison = Comparison(wanted=KINDS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), attention_backend(Backend.MATH):
            compare = importlib.import_module(recorded).compare
            report = compare(folder, checkpoint, comparison)
    finally:
        torch.set_num_threads(threads)
    return Verification(name, checkpoint, report, comparison)


def _verify_text(folder: Path) -> Verification:
    from model_server.checkpoints.recorded.rsunivlm_text import compare

    comparison = Comparison()
    compare(folder, comparison)
    return Verification("rsunivlm", None, Report(), comparison)


def lines(found: Verification) -> list[str]:
    """The verification as text."""
    comparison = found.comparison
    out = [f"{found.family}: {found.checkpoint or 'strings and pictures'}"]
    unused = f", {len(found.report.unused)} of them unused by the authors' code too" if found.report.unused else ""
    if found.checkpoint is not None:
        out.append(f"tensors: none missing, unexpected or mis-shaped{unused}")
    out.append(f"cases: {', '.join(comparison.cases)}")
    for kind, (value, where) in comparison.worst.items():
        said = ("all the same" if value == 0 else "different") if kind in comparison.exact else f"{value:.1e}"
        out.append(f"  {kind:<12} {comparison.counts[kind]:>4} compared   largest difference {said}   ({where})")
    if comparison.absent:
        out.append(f"nothing was compared of: {', '.join(comparison.absent)}")
    if comparison.left_out:
        out.append(f"recorded but not compared: {', '.join(comparison.left_out)}")
    out.append(f"{'passed' if comparison.passed else 'FAILED'} at a tolerance of {TOLERANCE:g}")
    return out


class Taps:
    """Inputs and outputs of submodules during a forward pass, by the names given: `name.in` and `name.out`."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.modules = modules
        self.found: dict[str, Tensor] = {}

    def __enter__(self) -> Self:
        self._handles = [m.register_forward_hook(self._hook(name)) for name, m in self.modules.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.found[f"{name}.in"], self.found[f"{name}.out"] = inputs[0], output

        return keep
