"""Scanning images that are larger than memory: tile by tile, with the state carried from one to the next."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vision_mamba.scans import BIDIRECTIONAL


class Tile(NamedTuple):
    """What the scan of one tile takes, in the order of its tokens; letters and meanings as in `ScanCall`.

    The first route goes from the first tile to the last, the second, if there is one, from the last to the first.
    """

    x: Tensor  # (B, L, D) shared by the routes, or (B, L, K, D)
    dt: Tensor  # (B, L, K, D), or (B, L, K, R) with dt_weight
    B: Tensor  # (B, L, K, N)
    C: Tensor  # (B, L, K, N)


def scan_in_tiles(
    tiles: Sequence[Tile],
    A: Tensor,
    D: Tensor | None = None,
    dt_weight: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
) -> list[Tensor]:
    """Scan a sequence that comes in tiles, and get what one scan of the whole gives.

    A scan of a tile begins in the state that the one before ended in, so nothing but a state, (B, D, N), passes from
    tile to tile. Rows of patches make tiles of an image: the route along rows and its reverse, which are Vim's, go
    through one tile after the other. Routes along columns would come back to every tile for each column; they take
    tiles of columns.

    Args:
        tiles: of the sequence, in order. One at a time is asked for, once for each route, so that a sequence of ours
            may read or compute its items when they are; those of the results are kept.
        A: (K, D, N), K = 1 or 2 routes.
        D, dt_weight, dt_bias, dt_softplus: as in `ops.cross_selective_scan`.

    Returns: of each tile (B, L, D), the sum of the routes.
    Raises: ValueError for more than two routes, or another number of them than A has in a tile or parameter.
    Numerics: those of the scan; where a sum of two routes is rounded, it is rounded once more.

    >>> A, D = -torch.rand(2, 4, 3), torch.ones(2, 4)
    >>> B, C = torch.randn(2, 1, 10, 2, 3)
    >>> whole = Tile(torch.randn(1, 10, 4), torch.randn(1, 10, 2, 4), B, C)
    >>> tiles = [Tile(*parts) for parts in zip(*(part.split(4, 1) for part in whole))]
    >>> torch.allclose(torch.cat(scan_in_tiles(tiles, A, D), 1), scan_in_tiles([whole], A, D)[0], atol=1e-6)
    True
    """
    routes = A.shape[0]
    if routes > 2:
        raise ValueError(
            f"scan_in_tiles: A must be of one route or two, there and back, got {routes}; others do not go through "
            "tiles one after the other."
        )
    for name, parameter in (("D", D), ("dt_weight", dt_weight), ("dt_bias", dt_bias)):
        if parameter is not None and parameter.shape[0] != routes:
            raise ValueError(f"scan_in_tiles: {name} must be of A's {routes} routes, got {parameter.shape[0]}.")
    results: dict[int, Tensor] = {}
    for k in range(routes):
        state: Tensor | None = None
        for place in reversed(range(len(tiles))) if k else range(len(tiles)):
            whole = Tile(*tiles[place])
            for name, part in whole._asdict().items():
                if part.dim() == 4 and part.shape[2] != routes:
                    raise ValueError(
                        f"scan_in_tiles: {name} of tile {place} must be (batch, tokens, routes, ...) with A's {routes} "
                        f"routes, got {tuple(part.shape)}."
                    )
            tile = Tile(*(part[:, :, k : k + 1] if part.dim() == 4 else part for part in whole))
            length = tile.x.shape[1]
            indices = BIDIRECTIONAL.indices(1, length, device=tile.x.device)[k : k + 1]
            y, state = torch.ops.vision_mamba.cross_selective_scan(
                *tile[:2], A[k : k + 1], *tile[2:], _of(D, k), indices, _of(dt_weight, k),
                _of(dt_bias, k), state, dt_softplus, True, True,
            )  # fmt: skip
            results[place] = y if k == 0 else results[place] + y
    return [results[place] for place in range(len(tiles))]


def _of(parameter: Tensor | None, route: int) -> Tensor | None:
    return None if parameter is None else parameter[route : route + 1]
