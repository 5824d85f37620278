"""How the tokens of an image, cut into tiles or not, become one run of tokens (LLaVA-NeXT's "anyres" and its kin).

A tiled image comes as its overview and then its tiles, row by row; the tiles' tokens are put together on one grid,
what was padding is cut away, and each row of the grid ends with a newline token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from model_server.model.config import MergeConfig


class TilesDoNotFit(ValueError):
    """The number of tiles is not that of the grid which the image's size calls for."""


def best_grid(size: tuple[int, int], grids: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The admitted (width, height) that keeps most of an image of `size` (width, height), then wastes least.

    Raises:
        TilesDoNotFit: the image has no pixels.
    """
    width, height = size
    if min(size) <= 0:
        raise TilesDoNotFit(f"an image of {width} x {height} pixels has no grid of tiles")

    def kept_and_waste(grid: tuple[int, int]) -> tuple[int, int]:
        scale = min(grid[0] / width, grid[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - grid[0] * grid[1]

    return max(grids, key=kept_and_waste)


def cut_padding(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """[D, H, W] of an image of `size` (width, height) that was padded to the grid's shape -> what is not padding."""
    width, height = size
    h, w = grid.shape[1:]
    if width / height > w / h:
        pad = (h - int(height * (w / width))) // 2
        return grid[:, pad : h - pad]
    pad = (w - int(width * (h / height))) // 2
    return grid[:, :, pad : w - pad]


def merge_tiles(tiles: Tensor, size: tuple[int, int] | None, config: MergeConfig, newline: Tensor | None) -> Tensor:
    """Tokens of one image's tiles [T, N, D], the overview first, -> [M, D]. size: (width, height) of the image.

    Raises:
        TilesDoNotFit: T is not 1 + the grid's tiles, N is not a tile's, or an image of several tiles comes without its
            size.
    """
    if not config.spatial:
        return tiles.flatten(0, 1)
    ending = [] if newline is None else [newline[None]]
    if len(tiles) == 1:
        return torch.cat((tiles[0], *ending))
    grid = _one_grid(tiles[1:], size, config)  # [D, H, W]
    if config.maxpool:
        grid = F.max_pool2d(grid, 2)
    elif newline is not None:
        if size is None:
            raise TilesDoNotFit("an image of several tiles needs its size in pixels, so that its padding can be cut")
        grid = _at_most(cut_padding(grid, size), config)
        grid = torch.cat((grid, newline[:, None, None].expand(-1, grid.shape[1], 1)), 2)
    tokens = grid.flatten(1).T
    return torch.cat((tiles[0], tokens)) if config.overview else tokens


def _one_grid(tiles: Tensor, size: tuple[int, int] | None, config: MergeConfig) -> Tensor:
    """[rows * columns, side * side, D] -> [D, rows * side, columns * side]."""
    columns, rows = 2, 2
    if config.grids:
        if size is None:
            raise TilesDoNotFit("an image of several tiles needs its size in pixels, which decides its grid")
        columns, rows = (n // config.tile for n in best_grid(size, config.grids))
    if len(tiles) != rows * columns:
        raise TilesDoNotFit(f"an image of size {size} is {columns} x {rows} tiles and an overview, not {len(tiles)}")
    side = config.side
    if tiles.shape[1] != side**2:
        raise TilesDoNotFit(f"a tile has {tiles.shape[1]} tokens; tiles are put together of {side} x {side}")
    grid = tiles.view(rows, columns, side, side, -1).permute(4, 0, 2, 1, 3)
    return grid.reshape(-1, rows * side, columns * side)


def _at_most(grid: Tensor, config: MergeConfig) -> Tensor:
    """Resize [D, H, W] where it is clearly larger than `max_tiles` tiles."""
    if config.max_tiles is None:
        return grid
    h, w = grid.shape[1:]
    times = math.sqrt(h * w / (config.max_tiles * config.side**2))
    if times <= 1.1:
        return grid
    return F.interpolate(grid[None], (int(h // times), int(w // times)), mode="bilinear")[0]
