"""The form in which a loaded network is served: cast to its precision, and packed where the processor gains by it."""

from __future__ import annotations

import torch

from model_server.checkpoints.store import Checkpoint
from model_server.model.half import halve, halve_dense
from model_server.model.int8 import quantise
from model_server.model.packed import can_pack, pack_decoder, pack_projections
from model_server.model.packed_fusion import pack_fusion
from model_server.model.packed_vision import pack_backbone, pack_dense
from model_server.precision import Precision


def cast(loaded: Checkpoint, precision: str, dtype: torch.dtype) -> None:
    """`dtype`: that of `precision.serving_dtype`."""
    if dtype == torch.bfloat16:
        halve(loaded.model)
        if loaded.dense is not None:
            halve_dense(loaded.dense)
    if precision == Precision.INT8:
        quantise(loaded.model)


def pack(loaded: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    """What is packed has no parameters any more: whoever counts their bytes does so before."""
    if not can_pack(device, dtype):
        return
    pack_backbone(loaded.model.backbone)
    pack_fusion(loaded.model)
    pack_decoder(loaded.model.decoder)
    pack_projections(loaded.model.sentence)
    if loaded.dense is not None:
        pack_dense(loaded.dense)
