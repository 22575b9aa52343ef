"""How the odds kernel of linear_logprobs_triton.py cuts its work: tiles by card, blocks by size. Data and arithmetic.

Left out: a search at run time. It costs the first step minutes and makes two runs differ.
"""

import math
from dataclasses import dataclass

# What a call may hold beside its outputs: a block of odds, its product with the head in float32, sums of tiles.
ODDS_BYTES = 176 << 20
PRODUCT_BYTES = 52 << 20
SUM_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tiles of rows x columns of logits on cards from `capability` on that give a block `shared_bytes`."""

    capability: tuple[int, int]
    shared_bytes: int  # of shared memory that a block asks for, at most
    descriptors: bool  # loads by the tensor memory accelerator, else by pointers
    rows: int
    columns: int
    depth: int  # columns of hidden and of the head a step
    group: int  # row tiles that share a tile of the head while it is in the cache
    warps: int
    stages: int
    halves: int = 1  # the odds of a tile are made in two halves: fewer registers
    persistent: bool = False  # one program a multiprocessor, which loads its next tile while it makes odds


# The first row that fits is taken. 9.0 is measured; the others follow Triton's own matmuls for those cards. A test
# compiles each for its cards and looks at the shared memory it asks for.
TILES = (
    Tiles((12, 0), 99 << 10, True, 128, 128, 64, group=16, warps=8, stages=3, persistent=True),
    Tiles((10, 0), 227 << 10, True, 128, 256, 64, group=22, warps=8, stages=3, persistent=True),
    Tiles((9, 0), 227 << 10, True, 128, 256, 64, group=22, warps=8, stages=3, halves=2, persistent=True),
    Tiles((8, 0), 163 << 10, False, 128, 256, 64, group=16, warps=8, stages=3),
    Tiles((8, 0), 99 << 10, False, 128, 128, 32, group=16, warps=4, stages=4),
)
# Rows a block by (multiprocessors, D), where what `block_rows` works out was measured to be slower.
MEASURED_ROWS = {(132, 640): 2048, (132, 896): 2816}


def tiles_for(capability: tuple[int, int], shared_bytes: int, aligned: bool) -> Tiles:
    """The row for a card that gives a block so much shared memory; descriptors ask for aligned inputs."""
    return next(
        tiles
        for tiles in TILES
        if tiles.capability <= capability and tiles.shared_bytes <= shared_bytes and (aligned or not tiles.descriptors)
    )


def block_rows(num_rows: int, width: int, tiles: Tiles, processors: int) -> int:
    """Rows a block: 2,048 to 4,224, so that the tiles of odds @ head, 128 x 256 in cuBLAS, fill whole waves."""
    across = ceil_div(width, 256)
    most = min(4224, PRODUCT_BYTES // (4 * width)) // 128

    def filled(down: int) -> float:
        return round(down * across / (ceil_div(down * across, processors) * processors), 2)

    found = 128 * max(range(min(16, most), most + 1), key=lambda down: (filled(down), -down))
    rows = MEASURED_ROWS.get((processors, width), found)
    return min(rows, ceil_div(num_rows, tiles.rows) * tiles.rows)


def block_columns(rows: int, vocabulary: int, tiles: Tiles, processors: int) -> int:
    """Columns a block: equal blocks within ODDS_BYTES, their tiles a multiple of the processors where that fits."""
    down, across = ceil_div(rows, tiles.rows), ceil_div(vocabulary, tiles.columns)
    most = max(ODDS_BYTES // (2 * rows * tiles.columns), 1)
    unit = processors // math.gcd(down, processors)
    most = most // unit * unit or most
    equal = ceil_div(across, ceil_div(across, most))
    even = ceil_div(equal, unit) * unit
    return min(even if even <= most else most, across) * tiles.columns


def sum_rows(num_rows: int, vocabulary: int, tiles: Tiles) -> int:
    """Rows a block where only sums are wanted: as many as their two float32 a tile of columns allow."""
    fit = max(SUM_BYTES // (8 * ceil_div(vocabulary, tiles.columns) * tiles.rows), 1)
    return min(fit, ceil_div(num_rows, tiles.rows)) * tiles.rows


def ceil_div(size: int, step: int) -> int:
    """How many steps reach size."""
    return -(-size // step)
