"""Pictures inside JSON: data URLs with the bytes of an image file, decoded to tiles. Nothing is ever fetched."""

from __future__ import annotations

import base64
import binascii
import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from model_server.protocol import MAX_TILE_SIDE

FORMATS = ("PNG", "JPEG", "WEBP")
_EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


class PictureError(ValueError):
    """An address that is no data URL, or a data URL that holds no picture this server reads."""


def tile_of(url: str) -> np.ndarray:
    """The picture of a data URL, uint8 [H, W, 3] RGB; transparent places show what lies beneath.

    Raises:
        PictureError: another kind of address, not base64, no PNG, JPEG or WebP of 8 bits a channel, or a side of more
            than `MAX_TILE_SIDE` pixels (known from the header: nothing is decoded then).
    """
    head, comma, payload = url.partition(",")
    if not head[:5].lower() == "data:" or not comma or not head.lower().endswith(";base64"):
        raise PictureError(
            "images are taken as data URLs only (data:image/png;base64,...), nothing is fetched: send the bytes of a "
            f"{', '.join(FORMATS)} file, or use rs-tools or rs-mcp, which read addresses and large rasters"
        )
    try:
        data = base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise PictureError(f"the image is not base64: {error}") from error
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check(image)
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise PictureError(f"the image is none of {', '.join(FORMATS)}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, PictureError):
            raise
        raise PictureError(f"the image cannot be decoded: {error}") from error


def _check(image: Image.Image) -> None:
    if max(image.size) > MAX_TILE_SIDE:
        raise PictureError(
            f"the image is {image.width}x{image.height}; a side may have {MAX_TILE_SIDE} pixels: send it smaller or "
            "in parts, or use rs-tools or rs-mcp, which cut large images into tiles and merge the answers"
        )
    if image.mode not in _EIGHT_BIT:
        raise PictureError(f"the image has mode {image.mode}; send 8 bits a channel, stretched as it should be seen")
