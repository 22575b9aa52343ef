"""The kernels of linear_logprobs_triton.py, which says what they compute: odds against the target, and factors of rows.

Left out: the product of odds and head, which is cuBLAS', and atomics: every sum has one order.
"""

# Kernels are Python to a type checker, whose loops and constants are none.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import triton
import triton.language as tl

# Sizes that change from batch to batch must not compile a kernel anew.
CHANGING = ["first_row", "rows", "down", "across", "first_tile", "plane"]


@triton.jit
def _bits_of(dots, dot_scale, cap_bits, CAPPED: tl.constexpr):
    """Logits in bits, their exponential's exponent to the base of 2, and the slope of the soft cap there."""
    if CAPPED:
        small = tl.exp2(-tl.abs(dots * dot_scale))
        inverse = 1 / (1 + small)
        tanh = (1 - small) * inverse
        bits = tl.where(dots * dot_scale < 0, -tanh, tanh) * cap_bits
        slopes = 4 * small * inverse * inverse  # 1 - tanh^2, without its cancellation
    else:
        bits = dots * dot_scale
        slopes = 1.0
    return bits, slopes


@triton.jit
def _odds_of(
    dots, target_bits, targets, columns, vocabulary, dot_scale, cap_bits, CAPPED: tl.constexpr, RAGGED: tl.constexpr
):
    """A tile's odds (with a cap times its slope), and of each row their sum and that of odds x log2 odds."""
    bits, slopes = _bits_of(dots, dot_scale, cap_bits, CAPPED)
    bits -= target_bits[:, None]
    if RAGGED:
        bits = tl.where((columns < vocabulary)[None, :], bits, -1e30)
    odds = tl.where(columns[None, :] != targets[:, None], tl.exp2(bits), 0.0)
    total = tl.sum(odds, 1)
    moment = tl.sum(odds * bits, 1)
    if CAPPED:
        odds = odds * slopes
    return odds, total, moment


@triton.jit(do_not_specialize=CHANGING)
def odds_kernel(
    hidden, weight, odds_out, target_bits, target_ids, partials,
    first_row, rows, vocabulary, down, across, first_tile,
    hidden_stride, weight_stride, odds_stride, plane, tile_stride, dot_scale, cap_bits, shift,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr, HALVES: tl.constexpr, FLATTEN: tl.constexpr, PROGRAMS: tl.constexpr,
    STORE: tl.constexpr, CAPPED: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Odds [rows, columns] of one block, and per tile the sums of each row. Row tiles go first, in groups."""
    first_column = first_tile * COLUMNS
    for tile in tl.range(tl.program_id(0), down * across, PROGRAMS, flatten=FLATTEN):
        group = tile // (GROUP * across)
        size = tl.minimum(down - group * GROUP, GROUP)
        place = tile - group * GROUP * across
        row = (group * GROUP + place % size) * ROWS
        column = place // size * COLUMNS
        dots = tl.zeros([ROWS, COLUMNS], tl.float32)
        if DESCRIPTORS:
            for k in range(0, D, DEPTH):
                left = hidden.load([first_row + row, k])
                right = weight.load([first_column + column, k])
                dots = tl.dot(left, right.T, dots, input_precision="ieee")
        else:
            k = tl.arange(0, DEPTH)
            # Rows past the end are read as the last one, and their odds are 0.
            at_row = tl.minimum(row + tl.arange(0, ROWS), rows - 1) + first_row
            at_column = tl.minimum(first_column + column + tl.arange(0, COLUMNS), vocabulary - 1)
            left_at = hidden + at_row.to(tl.int64)[:, None] * hidden_stride + k[None, :]
            right_at = weight + at_column.to(tl.int64)[None, :] * weight_stride + k[:, None]
            for start in range(0, D, DEPTH):
                if D % DEPTH == 0:
                    left = tl.load(left_at + start)
                    right = tl.load(right_at + start)
                else:
                    left = tl.load(left_at + start, mask=(k < D - start)[None, :], other=0.0)
                    right = tl.load(right_at + start, mask=(k < D - start)[:, None], other=0.0)
                dots = tl.dot(left, right, dots, input_precision="ieee")

        in_block = row + tl.arange(0, ROWS)
        real = in_block < rows
        bits = tl.load(target_bits + first_row + in_block, mask=real, other=1e30) + shift
        targets = tl.load(target_ids + first_row + in_block, mask=real, other=0).to(tl.int32)
        columns = first_column + column + tl.arange(0, COLUMNS // HALVES)
        if HALVES == 2:
            low, high = tl.split(tl.permute(tl.reshape(dots, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
            odds, total, moment = _odds_of(low, bits, targets, columns, vocabulary, dot_scale, cap_bits, CAPPED, RAGGED)
            if STORE:
                odds_out.store([row, column], odds.to(odds_out.dtype))
            odds, more_total, more_moment = _odds_of(
                high, bits, targets, columns + COLUMNS // 2, vocabulary, dot_scale, cap_bits, CAPPED, RAGGED
            )
            if STORE:
                odds_out.store([row, column + COLUMNS // 2], odds.to(odds_out.dtype))
            total += more_total
            moment += more_moment
        else:
            odds, total, moment = _odds_of(
                dots, bits, targets, columns, vocabulary, dot_scale, cap_bits, CAPPED, RAGGED
            )
            if STORE and DESCRIPTORS:
                odds_out.store([row, column], odds.to(odds_out.dtype))
            if STORE and not DESCRIPTORS:
                out_at = odds_out + in_block.to(tl.int64)[:, None] * odds_stride
                out_at += (column + tl.arange(0, COLUMNS))[None, :]
                tl.store(out_at, odds.to(odds_out.dtype.element_ty), mask=real[:, None])
        partial_at = partials + (first_tile + column // COLUMNS).to(tl.int64) * tile_stride + in_block
        tl.store(partial_at, total, mask=real)
        tl.store(partial_at + plane, moment, mask=real)


@triton.jit
def target_dots_kernel(
    hidden, weight, target_ids, dots, hidden_stride, weight_stride, width, vocabulary, BLOCK: tl.constexpr
):
    """hidden_i . weight_target, one row a program; not a number where the weight has no such row."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ids + row).to(tl.int64)
    exists = (target >= 0) & (target < vocabulary)
    target = tl.where(exists, target, 0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        left = tl.load(hidden + row * hidden_stride + k, mask=k < width, other=0.0).to(tl.float32)
        right = tl.load(weight + target * weight_stride + k, mask=k < width, other=0.0).to(tl.float32)
        total += left * right
    tl.store(dots + row, tl.where(exists, tl.sum(total, 0), float("nan")))


@triton.jit(do_not_specialize=["first_row", "rows", "tiles"])
def sums_kernel(
    partials, sums, first_row, rows, tiles, plane, tile_stride, sums_stride, TILES: tl.constexpr, ROWS: tl.constexpr
):
    """Sums over the tiles of a block's rows, which are as many as ROWS a program, of odds and of moments."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    which = tl.program_id(1).to(tl.int64)
    total = tl.zeros([TILES, ROWS], tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        at = partials + which * plane + tile.to(tl.int64)[:, None] * tile_stride + row[None, :]
        total += tl.load(at, mask=(tile < tiles)[:, None] & (row < rows)[None, :], other=0.0)
    tl.store(sums + which * sums_stride + first_row + row, tl.sum(total, 0), mask=row < rows)


@triton.jit(do_not_specialize=["first_row"])
def factor_kernel(
    products, weight, target_ids, sums, target_slopes, factor, factor_scale, first_row, weight_stride, width,
    vocabulary, gain, own, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """w_t - sum_j o_j w_j / S of one row, divided by its largest element, which goes into the row's scale."""
    in_block = tl.program_id(0).to(tl.int64)
    row = first_row + in_block
    total = tl.load(sums + row)
    target = tl.load(target_ids + row).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < width
    product = tl.load(products + in_block * width + k, mask=inside, other=0.0)
    exists = (target >= 0) & (target < vocabulary)
    own_weight = tl.load(weight + target * weight_stride + k, mask=inside & exists, other=0.0).to(tl.float32)
    if CAPPED:
        own_weight *= tl.load(target_slopes + row)
    value = own_weight - product * tl.where(total > 0, 1 / total, 0.0)
    top = tl.max(tl.abs(value), 0)
    scaled = value * tl.where(top > 0, 1 / top, 0.0)
    tl.store(factor + row * width + k, scaled.to(factor.dtype.element_ty), mask=inside)
    tl.store(factor_scale + row, top * (total / (total + own)) * gain)


@triton.jit(do_not_specialize=["num_rows"])
def exact_kernel(
    hidden, weight, target_ids, sums, target_bits, target_slopes, logprobs, entropy, log_total, factor, factor_scale,
    num_rows, hidden_stride, weight_stride, width, vocabulary, gain, dot_scale, cap_bits, limit,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Values and factors of those rows whose sum is not below the limit, anew from their logits, one after the other.

    A program looks at ROWS rows that lie far apart. A row whose sum is not a number is left, as its numbers aren't any.
    """
    first = tl.program_id(0)
    step = tl.num_programs(0)
    mine = first + tl.arange(0, ROWS) * step
    beyond = tl.load(sums + mine, mask=mine < num_rows, other=0.0) >= limit
    if tl.max(beyond.to(tl.int32), 0) > 0:
        for row in range(first, num_rows, step):
            if tl.load(sums + row) >= limit:
                _exact_row(
                    hidden, weight, target_ids, target_bits, target_slopes, logprobs, entropy, log_total, factor,
                    factor_scale, tl.cast(row, tl.int64), hidden_stride, weight_stride, width, vocabulary, gain,
                    dot_scale, cap_bits, COLUMNS, CAPPED, BLOCK,
                )  # fmt: skip


@triton.jit
def _exact_row(
    hidden, weight, target_ids, target_bits, target_slopes, logprobs, entropy, log_total, factor, factor_scale, row,
    hidden_stride, weight_stride, width, vocabulary, gain, dot_scale, cap_bits,
    COLUMNS: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row against its largest logit so far. Its target, 2^-160 of the sums, is among them here."""
    k = tl.arange(0, BLOCK)
    inside = k < width
    left = tl.load(hidden + row * hidden_stride + k, mask=inside, other=0.0).to(tl.float32)
    maximum = -1e30
    total = 0.0
    moment = 0.0
    product = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        right_at = weight + tl.minimum(column, vocabulary - 1).to(tl.int64)[:, None] * weight_stride + k[None, :]
        right = tl.load(right_at, mask=inside[None, :], other=0.0).to(tl.float32)
        bits, slopes = _bits_of(tl.sum(right * left[None, :], 1), dot_scale, cap_bits, CAPPED)
        bits = tl.where(column < vocabulary, bits, -1e30)
        top = tl.maximum(maximum, tl.max(bits, 0))
        share = tl.exp2(bits - top)
        decay = tl.exp2(maximum - top)
        moment = (moment + (maximum - top) * total) * decay + tl.sum(share * (bits - top), 0)
        total = total * decay + tl.sum(share, 0)
        product = product * decay + tl.sum((share * slopes)[:, None] * right, 0)
        maximum = top
    ln2: tl.constexpr = 0.6931471805599453
    rest = tl.log2(total)
    tl.store(logprobs + row, (tl.load(target_bits + row) - maximum - rest) * ln2)
    tl.store(entropy + row, (rest - moment / total) * ln2)
    tl.store(log_total + row, (maximum + rest) * ln2)

    # The sum of a row whose target is no column is not a number, so this one is a column.
    own_at = weight + tl.load(target_ids + row).to(tl.int64) * weight_stride + k
    own_weight = tl.load(own_at, mask=inside, other=0.0).to(tl.float32)
    if CAPPED:
        own_weight *= tl.load(target_slopes + row)
    value = own_weight - product / total
    top = tl.max(tl.abs(value), 0)
    scaled = value * tl.where(top > 0, 1 / top, 0.0)
    tl.store(factor + row * width + k, scaled.to(factor.dtype.element_ty), mask=inside)
    tl.store(factor_scale + row, top * gain)


@triton.jit
def scaled_rows_kernel(factor, numbers, d_hidden, width, BLOCK: tl.constexpr):
    """One row a program, times its number."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    value = tl.load(factor + row * width + k, mask=k < width, other=0.0).to(tl.float32) * tl.load(numbers + row)
    tl.store(d_hidden + row * width + k, value.to(d_hidden.dtype.element_ty), mask=k < width)
