"""What a model starts from: published parts where its shapes have them, random ones for the debug config."""

from __future__ import annotations

import re
from collections import Counter

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from model_server.checkpoints.pretrained import load_efficientnet_lite2, load_minilm, minilm_tokenizer
from model_server.model.config import BackboneConfig, ModelConfig, SentenceConfig
from model_server.model.sentence import SentenceEncoder
from model_server.model.vision import Backbone
from model_server.text.phrasings import TRAIN


def start_backbone(backbone: Backbone, config: ModelConfig) -> None:
    """ImageNet weights for EfficientNet-Lite2's shape; others keep their random ones."""
    if config.backbone == BackboneConfig():
        load_efficientnet_lite2(backbone)


def sentence_parts(config: ModelConfig) -> tuple[SentenceEncoder, Tokenizer]:
    """The frozen sentence encoder and its tokenizer: MiniLM for its shape, else random over a small vocabulary."""
    encoder = SentenceEncoder(config.sentence).eval().requires_grad_(False)
    if config.sentence == SentenceConfig():
        load_minilm(encoder, config.sentence)
        tokenizer = Tokenizer.from_file(str(minilm_tokenizer()))
    else:
        tokenizer = _small_wordpiece(config.sentence.vocab_size)
    tokenizer.enable_truncation(config.sentence.max_tokens)
    tokenizer.enable_padding()
    return encoder, tokenizer


def _small_wordpiece(vocab_size: int) -> Tokenizer:
    """Single characters and the commonest words of the phrasings. (The library's trainer breaks ties at random.)"""
    specials, letters = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"], "abcdefghijklmnopqrstuvwxyz0123456789?'.,-"
    counts = Counter(w for bank in TRAIN.values() for phrase in bank for w in re.findall(r"[a-z]{2,}", phrase.lower()))
    words = sorted(counts, key=lambda w: (-counts[w], w))
    pieces = [*specials, *letters, *(f"##{c}" for c in letters), *words][:vocab_size]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer
