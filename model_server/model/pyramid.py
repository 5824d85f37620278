"""The ConvNeXt pyramid of `transformers` (Liu et al. 2022; Aquila's encoder, arXiv 2411.06074, section 3.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from model_server.model.config import ConvNeXtConfig

if TYPE_CHECKING:
    from transformers import ConvNextBackbone

STRIDES = (4, 8, 16, 32)


class MissingTransformers(ImportError):
    """The large configs' convolutional backbone comes from `transformers`, which is not installed."""


class ConvNeXtPyramid(nn.Module):
    """Normalised pixels of any size to maps at strides 4 to 32. It has no classifier, as in the paper."""

    def __init__(self, config: ConvNeXtConfig) -> None:
        """Raises MissingTransformers where `transformers` is not installed."""
        super().__init__()
        if len(config.widths) != len(STRIDES) or len(config.depths) != len(STRIDES):
            raise ValueError(f"a pyramid has four stages; got widths {config.widths} and depths {config.depths}")
        try:
            from transformers import ConvNextBackbone, ConvNextConfig
        except ImportError as error:
            raise MissingTransformers("a ConvNeXt needs transformers; try: pip install transformers") from error
        stages = [f"stage{i}" for i in range(1, 5)]
        raw = ConvNextConfig(
            hidden_sizes=list(config.widths), depths=list(config.depths),
            out_features=stages,  # pyright: ignore[reportCallIssue] (of its base class)
        )  # fmt: skip
        self.net: ConvNextBackbone = ConvNextBackbone(raw)
        self.widths: dict[int, int] = dict(zip(STRIDES, config.widths, strict=True))  # stride -> channels

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """float [B, 3, H, W] -> {stride: [B, C_s, H/s, W/s]}; each map is normalised over its channels."""
        return dict(zip(STRIDES, self.net(images).feature_maps, strict=True))
