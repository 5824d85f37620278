"""The configs by name: `nano` and `debug`, which are trained here, and the large ones of the papers.

The large ones are in their sound form; the adapters of published checkpoints read what those were trained with.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from model_server.model.config import (
    EXPERTS,
    AquilaConfig,
    DecoderConfig,
    DetailConfig,
    FusionConfig,
    LlavaConfig,
    MergeConfig,
    ModelConfig,
    ModulationConfig,
    QwenVisionConfig,
    QwenVLConfig,
    ViTConfig,
    debug,
    nano,
)

AnyConfig = ModelConfig | LlavaConfig | QwenVLConfig | AquilaConfig


def rsunivlm_1b() -> LlavaConfig:
    """SigLIP-so400m less its last layer, Qwen2-0.5B and three feed-forward experts a layer (arXiv 2412.05679)."""
    decoder = DecoderConfig(
        vocab_size=151936, width=896, layers=24, heads=14, kv_heads=2, ffn=4864, rope_base=1e6, experts=EXPERTS,
        qkv_bias=True, tied=True,
    )  # fmt: skip
    return LlavaConfig(name="rsunivlm-1b", vision=ViTConfig(), decoder=decoder)


def fuse_7b() -> LlavaConfig:
    """CLIP ViT-L/14@336, Vicuna-7B, the detail view, and injection before layers 2, 4, 6 and 8 (FUSE-RSVLM)."""
    vision = ViTConfig(
        style="clip", width=1024, layers=24, heads=16, ffn=4096, image_size=336, act="quick_gelu", norm_eps=1e-5
    )
    decoder = DecoderConfig(
        vocab_size=32000, width=4096, layers=32, heads=32, kv_heads=32, ffn=11008, norm_eps=1e-5, tied=False
    )
    return LlavaConfig(
        name="fuse-7b", vision=vision, decoder=decoder, merge=MergeConfig(visual_first=True), feature=23,
        details=DetailConfig(), inject_layers=(1, 3, 5, 7), inject_steps=True,
    )  # fmt: skip


def aquila_8b() -> AquilaConfig:
    """ConvNeXt-XXL at 1024 pixels, 32 x 32 queries of 85 keys each, Llama-3-8B, MDA (arXiv 2411.06074).

    The paper does not say which layers repeat SFI; here these are every eighth, each with weights of its own.
    """
    decoder = DecoderConfig(
        vocab_size=128256, width=4096, layers=32, heads=32, kv_heads=8, ffn=14336, rope_base=500000.0, norm_eps=1e-5,
        tied=False,
    )  # fmt: skip
    fusion = FusionConfig(grid=32, strides=(4, 8, 16, 32), query_from_last=False, mda_layers=(8, 16, 24), width=1024)
    return AquilaConfig(name="aquila-8b", decoder=decoder, fusion=fusion)


def fusar_7b() -> QwenVLConfig:
    """Qwen2.5-VL-7B with token-wise modulation of its visual tokens (FUSAR-GPT)."""
    decoder = DecoderConfig(
        vocab_size=152064, width=3584, layers=28, heads=28, kv_heads=4, ffn=18944, rope_base=1e6, qkv_bias=True,
        tied=False, rope_sections=(16, 24, 24),
    )  # fmt: skip
    return QwenVLConfig(
        name="fusar-7b", vision=QwenVisionConfig(), decoder=decoder, image_token=151655, modulation=ModulationConfig()
    )


NAMED: dict[str, Callable[[], AnyConfig]] = {
    "nano": nano,
    "debug": debug,
    "rsunivlm-1b": rsunivlm_1b,
    "fuse-7b": fuse_7b,
    "aquila-8b": aquila_8b,
    "fusar-7b": fusar_7b,
}


def build(config: AnyConfig) -> nn.Module:
    """The network of a config. Build large ones under `torch.device("meta")`: shapes without memory."""
    from model_server.model.aquila import AquilaVLM
    from model_server.model.llava import LlavaVLM
    from model_server.model.qwen_vl import QwenVLM
    from model_server.model.rsvlm import RSVLM

    match config:
        case ModelConfig():
            return RSVLM(config)
        case LlavaConfig():
            return LlavaVLM(config)
        case QwenVLConfig():
            return QwenVLM(config)
        case AquilaConfig():
            return AquilaVLM(config)
