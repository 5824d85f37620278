"""Descriptions of models and backends as tables for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from model_server.model.backends import Backend, Call, choose, refusal
from model_server.model.describe import Description


def print_description(found: Description, precision: str, console: Console) -> None:
    """Parts and parameters, then operations and memory."""
    table = Table(title=f"{found.name}: parameters", title_justify="left")
    table.add_column("part")
    table.add_column("total", justify="right")
    for column in found.columns:
        table.add_column(f"active, {column}".replace(": ", "\n"), justify="right")
    for part in found.parts:
        table.add_row(part.name, amount(part.total), *(amount(part.active[c]) for c in found.columns))
    table.add_section()
    table.add_row("all", amount(found.total), *(amount(found.active(c)) for c in found.columns), style="bold")
    console.print(table)
    work = Table(title="one image and its text", title_justify="left", show_header=False)
    work.add_column()
    work.add_column(justify="right")
    work.add_row("visual tokens of an image", f"{found.visual_tokens:,}")
    work.add_row("FLOPs to encode an image", amount(found.image_flops))
    work.add_row("FLOPs of the decoder over its tokens", amount(found.prefill_flops))
    work.add_row(f"FLOPs of a token behind {found.context:,} others", amount(found.token_flops))
    work.add_row(f"weights in {precision}", size(found.weight_bytes(precision)))
    work.add_row(f"cache of a sequence of {found.context:,} tokens in {precision}", size(found.cache_bytes(precision)))
    console.print(work)
    console.print("FLOPs: a multiplication and its addition are two. Memory for intermediate results comes on top.")


def print_backends(call: Call, console: Console) -> None:
    """Which backends can serve a call here, and why the others cannot."""
    capability = "" if call.capability is None else f", compute capability {call.capability[0]}.{call.capability[1]}"
    dtype = str(call.dtype).removeprefix("torch.")
    table = Table(title=f"causal attention on {call.device}{capability}, {dtype}, heads of {call.head_width} channels",
                  title_justify="left")  # fmt: skip
    table.add_column("backend")
    table.add_column("here")
    for backend in Backend:
        if backend is Backend.AUTO:
            table.add_row(backend, f"takes {choose(backend, call)}")
        else:
            table.add_row(backend, refusal(backend, call) or "yes")
    console.print(table)


def amount(n: int) -> str:
    """1,234,567 -> 1.23 M."""
    for unit, factor in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= factor:
            return f"{n / factor:.2f} {unit}"
    return str(n)


def size(n: int) -> str:
    """Bytes, in binary units."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if n >= 1 << power:
            return f"{n / (1 << power):.2f} {unit}"
    return f"{n} B"
