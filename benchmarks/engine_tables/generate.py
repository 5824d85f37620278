"""Captions of one view, greedy, against `transformers.generate` with the decoder exported as a Llama."""

from __future__ import annotations

import static_generate
import torch

from engine_tables.bench import STATIC, Bench
from model_server.checkpoints.store import load_checkpoint
from model_server.query import TASK_TOKEN
from model_server.writing import CAPTION_TOKENS


async def measure(bench: Bench) -> None:
    """Both sides read the same embeddings and must write the same tokens; see static_generate for what is left out."""
    perceiver, plain = bench.perceiver, load_checkpoint(bench.weights, "cpu").model
    with torch.inference_mode():
        images = [bench.fresh() for _ in range(max(bench.requests, STATIC))]
        visual = torch.cat([perceiver.model.encode(perceiver.pixels([image])).visual for image in images])
    tokenizer = perceiver.tokenizer
    how = static_generate.Writing(
        tokenizer.tasks[TASK_TOKEN["caption"]], tokenizer.end, tokenizer.pad, perceiver.writer.banned, CAPTION_TOKENS
    )
    llama = static_generate.as_llama(plain.decoder)
    sides = {
        "transformers.generate, one at a time": lambda: static_generate.static(llama, visual, how, 1),
        f"transformers.generate, batches of {STATIC}": lambda: static_generate.static(llama, visual, how, STATIC),
        f"a lane of {STATIC} places, projections not packed": lambda: static_generate.continuous(
            plain, visual, how, STATIC
        ),
        f"a lane of {STATIC} places": lambda: static_generate.continuous(perceiver.model, visual, how, STATIC),
    }
    rows, first = [], None
    for name, write in sides.items():
        written = write()
        first = first or written
        differ = sum(a != b for a, b in zip(written.ids, first.ids, strict=True))
        n, tokens = len(written.ids), sum(len(ids) + 1 for ids in written.ids)
        rows.append([name, f"{n / written.wall_s:.1f}", f"{1000 * written.cpu_s / n:.1f}", f"{tokens}", f"{differ}",
                     f"{first.wall_s / written.wall_s:.2f}", f"{first.cpu_s / written.cpu_s:.2f}"])  # fmt: skip
    header = ["captions of one view, greedy", "answers/s", "CPU ms/answer", "tokens", "answers that differ", "x (wall)",
              "x (CPU)"]  # fmt: skip
    bench.table("generate", header, rows)
