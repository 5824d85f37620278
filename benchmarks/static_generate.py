"""What continuous decoding is worth against `transformers.generate` in static batches, on the same weights and prompts.

The decoder is exported as a Llama, which has no place for views, beams, MDA or visual tokens that see each other both
ways. So both sides do without: one upright view, greedy, causal from the first visual token on, and no second look at
the image. The prompts are the same embeddings, [visual | task token]; both sides prefill and decode them, and have to
write the same tokens. Experts: the first one, for all.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from model_server.model.attention import KVCache
from model_server.model.decoder import Block, Decoder
from model_server.model.experts import GranularExperts, SwiGLU
from model_server.model.generate import Hypothesis
from model_server.model.rsvlm import RSVLM
from model_server.model.slots import Lane, Prefix, prefill

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

REFILL = 4  # places that are free before others join: a prefill of one costs nearly what one of four does


@dataclass(frozen=True)
class Writing:
    """How the answers are written: the task's token, where they end, and what is never said (bool [vocabulary])."""

    task: int
    end: int
    pad: int
    banned: Tensor
    steps: int


@dataclass(frozen=True)
class Written:
    """The ids of each prompt's answer, the end token not among them, and what they took."""

    ids: list[tuple[int, ...]]
    wall_s: float
    cpu_s: float


def as_llama(decoder: Decoder) -> LlamaForCausalLM:
    """A Llama with the weights of a decoder that has not been packed: its first expert, without MDA and injection."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = decoder.config
    config = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.width, intermediate_size=c.ffn, num_hidden_layers=c.layers,
        num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tied, attention_bias=False, max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    if c.qkv_bias:
        raise ValueError("a Llama has no biases on queries, keys and values; this decoder has")
    llama = LlamaForCausalLM(config).eval()
    weights = {"model.embed_tokens.weight": decoder.embed.weight, "model.norm.weight": decoder.norm.weight}
    weights["lm_head.weight"] = decoder.embed.weight if decoder.head is None else decoder.head.weight
    for i, block in enumerate(decoder.blocks):
        assert isinstance(block, Block)
        weights |= {f"model.layers.{i}.{name}": weight for name, weight in _layer(block).items()}
    llama.load_state_dict(weights)
    return llama


def _layer(block: Block) -> dict[str, Tensor]:
    if not isinstance(block.experts, GranularExperts):
        raise ValueError("low-rank experts are not exported")
    expert = block.experts.experts[0]
    assert isinstance(expert, SwiGLU)
    q, k, v = block.qkv.weight.split([block.heads * block.head_width, *[block.kv_heads * block.head_width] * 2])
    return {
        "input_layernorm.weight": block.norm1.weight,
        "self_attn.q_proj.weight": q, "self_attn.k_proj.weight": k, "self_attn.v_proj.weight": v,
        "self_attn.o_proj.weight": block.out.weight,
        "post_attention_layernorm.weight": block.norm2.weight,
        "mlp.gate_proj.weight": expert.gate.weight, "mlp.up_proj.weight": expert.up.weight,
        "mlp.down_proj.weight": expert.down.weight,
    }  # fmt: skip


@torch.inference_mode()
def static(llama: LlamaForCausalLM, visual: Tensor, how: Writing, batch: int) -> Written:
    """Batches of `batch` prompts through `generate`, each until its longest answer has ended. visual: [N, P, D]."""
    ids: list[tuple[int, ...]] = []
    wall, cpu = time.perf_counter(), time.process_time()
    generate: Callable[..., Tensor] = cast("Any", llama).generate  # its own types say that a Llama has none
    for some in visual.split(batch):
        task = llama.get_input_embeddings()(torch.full((len(some), 1), how.task))
        prompt = torch.cat((some, task), 1)
        said = generate(
            inputs_embeds=prompt, attention_mask=torch.ones(prompt.shape[:2], dtype=torch.long), do_sample=False,
            max_new_tokens=how.steps, eos_token_id=how.end, pad_token_id=how.pad,
            suppress_tokens=how.banned.nonzero()[:, 0].tolist(),
        )  # fmt: skip
        ids += [_until(row, how.end) for row in said.tolist()]
    return Written(ids, time.perf_counter() - wall, time.process_time() - cpu)


def _until(ids: Sequence[int], end: int) -> tuple[int, ...]:
    return tuple(ids[: ids.index(end)] if end in ids else ids)


@torch.inference_mode()
def continuous(model: RSVLM, visual: Tensor, how: Writing, places: int) -> Written:
    """All prompts through a lane of `places`, the next joining as others end. visual: [N, P, D]."""
    lane = Lane(model, sequences=places, views=1, prompt=visual.shape[1] + 1, beams=1, steps=how.steps, end=how.end,
                banned=how.banned, length_power=0.0)  # fmt: skip
    waiting, said = deque(range(len(visual))), dict[Hashable, tuple[int, ...]]()

    def end(sequences: Mapping[Hashable, list[Hypothesis]]) -> None:
        said.update({key: found[0].ids for key, found in sequences.items()})

    wall, cpu = time.perf_counter(), time.process_time()
    while waiting or len(lane):
        if waiting and lane.free >= min(REFILL, len(waiting), places):
            rows = [waiting.popleft() for _ in range(min(lane.free, len(waiting)))]
            end(lane.join(rows, prefill(model, _causal(model, visual[rows]), how.task, None)))
        end(lane.step())
    return Written([said[i] for i in range(len(visual))], time.perf_counter() - wall, time.process_time() - cpu)


def _causal(model: RSVLM, visual: Tensor) -> Prefix:
    """The visual tokens behind the decoder as a Llama reads them: in order, and without the maps."""
    b, p, _ = visual.shape
    c = model.config.decoder
    cache = KVCache(c.layers, b, c.kv_heads, p, c.width // c.heads, visual)
    model.decoder(visual, torch.arange(p).expand(b, p), "causal", torch.zeros(b, dtype=torch.long), None, cache)
    return Prefix(cache.data, 0)
