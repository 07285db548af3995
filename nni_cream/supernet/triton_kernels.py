"""Kernels for GPUs: dilated depthwise convolutions, sums of columns, and cross products of matrices, group by group.

What torch has for these is slow: its dilated depthwise convolutions reach a few per cent of a card's bandwidth, and a
product whose inner dimension is all pixels of a batch, as that of a weight's gradient, runs on as many processors as
there are groups. ``docs/performance.md`` has what these kernels gain. They are written in Triton,
which comes with torch for CUDA; :func:`nni_cream.supernet.kernels.kernels_for` tells where they can be used.

Features are channels last: in memory a matrix [P, C], one row a pixel of an image. All sums are in the precision of the
tensors, those of half precision in single, without TF32, and come in the same order at every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_PIXELS: Final = 128
_ROWS: Final = 64
# Programs that a card has to be given to be busy.
_PROGRAMS: Final = 2048


# A kernel is compiled anew for every kind of number that it is given; of these it has no use for the kind.
_GEOMETRY: Final = (
    "pixels",
    "source_height",
    "source_width",
    "height",
    "width",
    "stride_y",
    "stride_x",
    "padding_y",
    "padding_x",
    "dilation_y",
    "dilation_x",
)


@triton.jit(do_not_specialize=_GEOMETRY)
def _convolve_kernel(
    source,
    weight,
    target,
    pixels,
    channels,
    source_height,
    source_width,
    height,
    width,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
    dilation_y,
    dilation_x,
    TAPS_Y: tl.constexpr,
    TAPS_X: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    STRIDED: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SUM: tl.constexpr,
):
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    there = channel < channels
    x = pixel % width
    y = (pixel // width) % height
    image = pixel // (width * height)
    total = tl.zeros([PIXELS, CHANNELS], dtype=SUM)
    for i in tl.static_range(TAPS_Y):
        for j in tl.static_range(TAPS_X):
            if TRANSPOSED:
                row = y + padding_y - i * dilation_y
                column = x + padding_x - j * dilation_x
                seen = (row >= 0) & (column >= 0)
                if STRIDED:
                    seen = seen & (row % stride_y == 0) & (column % stride_x == 0)
                    row = row // stride_y
                    column = column // stride_x
            else:
                row = y * stride_y - padding_y + i * dilation_y
                column = x * stride_x - padding_x + j * dilation_x
                seen = (row >= 0) & (column >= 0)
            seen = seen & (row < source_height) & (column < source_width) & (pixel < pixels)
            place = (image * source_height + row) * source_width + column
            value = tl.load(
                source + place[:, None] * channels + channel[None, :], mask=seen[:, None] & there[None, :], other=0.0
            )
            factor = tl.load(weight + (i * TAPS_X + j) * channels + channel, mask=there, other=0.0)
            total += value.to(SUM) * factor[None, :].to(SUM)
    inside = (pixel < pixels)[:, None] & there[None, :]
    tl.store(target + pixel[:, None] * channels + channel[None, :], total, mask=inside)


@triton.jit(do_not_specialize=(*_GEOMETRY[1:], "lines", "chunk"))
def _weight_gradient_kernel(
    features,
    grad,
    partial,
    lines,
    channels,
    source_height,
    source_width,
    height,
    width,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
    dilation_y,
    dilation_x,
    chunk,
    TAPS_Y: tl.constexpr,
    TAPS_X: tl.constexpr,
    TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SUM: tl.constexpr,
):
    tap = tl.arange(0, TAPS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    there = channel < channels
    known = tap < TAPS_Y * TAPS_X
    below = (tap // TAPS_X) * dilation_y - padding_y
    right = (tap % TAPS_X) * dilation_x - padding_x
    total = tl.zeros([TAPS, CHANNELS], dtype=SUM)
    for step in range(0, chunk):
        # A line of the output, of all images'.
        line = tl.program_id(0) * chunk + step
        row = (line % height) * stride_y + below
        seen = known & (row >= 0) & (row < source_height) & (tap * 0 + line < lines)
        before = ((line // height) * source_height + row) * source_width
        inside = there & (channel * 0 + line < lines)
        for x in range(0, width):
            column = x * stride_x + right
            mask = seen & (column >= 0) & (column < source_width)
            place = (before + column)[:, None] * channels + channel[None, :]
            value = tl.load(features + place, mask=mask[:, None] & there[None, :], other=0.0)
            slope = tl.load(grad + (line * width + x) * channels + channel, mask=inside, other=0.0)
            total += value.to(SUM) * slope[None, :].to(SUM)
    place = (tl.program_id(0) * channels + channel[None, :]) * (TAPS_Y * TAPS_X) + tap[:, None]
    tl.store(partial + place, total, mask=known[:, None] & there[None, :])


@triton.jit(do_not_specialize=("rows", "chunk"))
def _sums_kernel(
    matrix, partial, rows, columns, stride, chunk, SQUARES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    part = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], dtype=partial.dtype.element_ty)
    squares = tl.zeros([ROWS, COLUMNS], dtype=partial.dtype.element_ty)
    for start in range(0, chunk, ROWS):
        row = part * chunk + start + tl.arange(0, ROWS)
        value = tl.load(
            matrix + row[:, None] * stride + column[None, :],
            mask=(row < rows)[:, None] & (column < columns)[None, :],
            other=0.0,
        )
        total += value
        if SQUARES:
            squares += value * value
    place = partial + part * columns * (2 if SQUARES else 1) + column
    tl.store(place, tl.sum(total, axis=0), mask=column < columns)
    if SQUARES:
        tl.store(place + columns, tl.sum(squares, axis=0), mask=column < columns)


@triton.jit(do_not_specialize=("rows", "chunk", "groups"))
def _cross_kernel(
    first,
    second,
    partial,
    rows,
    chunk,
    left,
    right,
    first_stride,
    second_stride,
    groups,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    ROWS: tl.constexpr,
):
    part = tl.program_id(0)
    group = tl.program_id(1)
    blocks = tl.cdiv(right, RIGHT)
    a_column = (tl.program_id(2) // blocks) * LEFT + tl.arange(0, LEFT)
    b_column = (tl.program_id(2) % blocks) * RIGHT + tl.arange(0, RIGHT)
    result = tl.zeros([LEFT, RIGHT], dtype=partial.dtype.element_ty)
    for start in range(part * chunk, part * chunk + chunk, ROWS):
        row = start + tl.arange(0, ROWS)
        a = tl.load(
            first + row[:, None] * first_stride + group * left + a_column[None, :],
            mask=(row < rows)[:, None] & (a_column < left)[None, :],
            other=0.0,
        )
        b = tl.load(
            second + row[:, None] * second_stride + group * right + b_column[None, :],
            mask=(row < rows)[:, None] & (b_column < right)[None, :],
            other=0.0,
        )
        result = tl.dot(tl.trans(a), b, result, input_precision="ieee", out_dtype=partial.dtype.element_ty)
    place = ((part * groups + group) * left + a_column[:, None]) * right + b_column[None, :]
    tl.store(partial + place, result, mask=(a_column < left)[:, None] & (b_column < right)[None, :])


def _matrix(features: Tensor) -> Tensor:
    return features.contiguous(memory_format=torch.channels_last)


def _sum_of(tensor: Tensor) -> Any:
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def _rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _parts(rows: int, others: int, smallest: int) -> tuple[int, int]:
    """Divide rows among programs: return how many parts there are, and rows of each."""
    chunk = triton.next_power_of_2(max(smallest, triton.cdiv(rows * others, _PROGRAMS)))
    return triton.cdiv(rows, chunk), chunk


@torch.library.custom_op(
    "nni_cream::depthwise_convolution",
    mutates_args=(),
    schema="(Tensor source, Tensor weight, int[] size, int[] stride, int[] padding, int[] dilation, bool transposed)"
    " -> Tensor",
)
def convolve(
    source: Tensor,
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
) -> Tensor:
    """Convolve depthwise, or transpose that.

    Args:
        source: [N, C, H, W].
        weight: [C, 1, k, k].
        size: height and width of the result.
        stride: of the convolution.
        padding: likewise.
        dilation: likewise.
        transposed: whether to give the gradient of the convolution's input, of that of its output.

    Returns:
        [N, C, *size], channels last.
    """
    source = _matrix(source)
    images, channels, source_height, source_width = source.shape
    height, width = size
    target = torch.empty(
        (images, channels, height, width), dtype=source.dtype, device=source.device, memory_format=torch.channels_last
    )
    pixels, block = images * height * width, min(32, max(16, triton.next_power_of_2(channels)))
    with torch.cuda.device_of(source):
        _convolve_kernel[triton.cdiv(pixels, _PIXELS), triton.cdiv(channels, block)](
            source,
            # Neighbouring channels are read together.
            weight.flatten(1).t().contiguous(),
            target,
            pixels,
            channels,
            source_height,
            source_width,
            height,
            width,
            *stride,
            *padding,
            *dilation,
            TAPS_Y=weight.shape[2],
            TAPS_X=weight.shape[3],
            TRANSPOSED=transposed,
            STRIDED=tuple(stride) != (1, 1),
            PIXELS=_PIXELS,
            CHANNELS=block,
            SUM=_sum_of(source),
        )
    return target


@torch.library.custom_op(
    "nni_cream::depthwise_weight_gradient",
    mutates_args=(),
    schema="(Tensor features, Tensor grad, int[] kernel, int[] stride, int[] padding, int[] dilation) -> Tensor",
)
def weight_gradient(
    features: Tensor,
    grad: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Return the gradient of a depthwise convolution's weight, [C, 1, k, k].

    Args:
        features: the input, [N, C, H, W].
        grad: the gradient of the output, [N, C, H', W'].
        kernel: height and width of the weight.
        stride: of the convolution.
        padding: likewise.
        dilation: likewise.
    """
    features, grad = _matrix(features), _matrix(grad)
    images, channels, height, width = grad.shape
    lines, block = images * height, min(32, max(16, triton.next_power_of_2(channels)))
    blocks = triton.cdiv(channels, block)
    parts, chunk = _parts(lines, blocks, 1)
    # Sums of half precision are of single.
    partial = grad.new_empty((parts, channels, 1, *kernel), dtype=torch.promote_types(grad.dtype, torch.float32))
    with torch.cuda.device_of(features):
        _weight_gradient_kernel[parts, blocks](
            features,
            grad,
            partial,
            lines,
            channels,
            *features.shape[2:],
            height,
            width,
            *stride,
            *padding,
            *dilation,
            chunk,
            TAPS_Y=kernel[0],
            TAPS_X=kernel[1],
            TAPS=triton.next_power_of_2(kernel[0] * kernel[1]),
            CHANNELS=block,
            SUM=_sum_of(grad),
            num_warps=1,
        )
    return partial.sum(0).to(grad.dtype)


@torch.library.custom_op("nni_cream::column_sums", mutates_args=(), schema="(Tensor matrix, bool squares) -> Tensor")
def column_sums(matrix: Tensor, squares: bool) -> Tensor:
    """Return the sums of the columns of [P, C], and where asked for those of their squares: [1 or 2, C]."""
    matrix = _rows(matrix)
    rows, columns = matrix.shape
    blocks = triton.cdiv(columns, 32)
    parts, chunk = _parts(rows, blocks, _ROWS)
    partial = matrix.new_empty((parts, 2 if squares else 1, columns))
    with torch.cuda.device_of(matrix):
        _sums_kernel[parts, blocks](
            matrix, partial, rows, columns, matrix.stride(0), chunk, SQUARES=squares, ROWS=_ROWS, COLUMNS=32
        )
    return partial.sum(0)


@torch.library.custom_op(
    "nni_cream::grouped_cross_product",
    mutates_args=(),
    schema="(Tensor first, Tensor second, int groups) -> Tensor",
)
def cross_product(first: Tensor, second: Tensor, groups: int) -> Tensor:
    """Return firstᵀ·second, group by group, of two matrices: [groups, left, right]."""
    first, second = _rows(first), _rows(second)
    rows, left, right = len(first), first.shape[1] // groups, second.shape[1] // groups
    a_block, b_block = (min(64, max(16, triton.next_power_of_2(width))) for width in (left, right))
    blocks = triton.cdiv(left, a_block) * triton.cdiv(right, b_block)
    parts, chunk = _parts(rows, groups * blocks, 2 * _ROWS)
    partial = first.new_empty((parts, groups, left, right))
    with torch.cuda.device_of(first):
        _cross_kernel[parts, groups, blocks](
            first,
            second,
            partial,
            rows,
            chunk,
            left,
            right,
            first.stride(0),
            second.stride(0),
            groups,
            LEFT=a_block,
            RIGHT=b_block,
            ROWS=_ROWS // 2,
        )
    return partial.sum(0)


def run_all() -> None:
    """Compile every kernel, and run it.

    Raises:
        Exception: of any kind, if that cannot be done here.
    """
    features, weight = torch.ones(1, 16, 4, 4, device="cuda"), torch.ones(16, 1, 3, 3, device="cuda")
    matrix, pairs = torch.ones(16, 16, device="cuda"), ((1, 1), (2, 2), (2, 2))
    convolve(features, weight, (4, 4), *pairs, False)
    convolve(features, weight, (4, 4), *pairs, True)
    weight_gradient(features, features, (3, 3), *pairs)
    cross_product(matrix, matrix, 1)
    column_sums(matrix, True)
    # Only then is it known whether they have failed.
    torch.cuda.synchronize()


def _flops(*sizes: int) -> int:
    result = 2
    for size in sizes:
        result *= size
    return result


@register_flop_formula(torch.ops.nni_cream.depthwise_convolution)
def _convolve_flops(source: Any, weight: Any, size: Any, *arguments: Any, **_: Any) -> int:
    transposed = arguments[3]
    pixels = source[2] * source[3] if transposed else size[0] * size[1]
    return _flops(source[0], pixels, *weight)


@register_flop_formula(torch.ops.nni_cream.depthwise_weight_gradient)
def _weight_gradient_flops(features: Any, grad: Any, kernel: Any, *_: Any, **__: Any) -> int:
    return _flops(*grad, *kernel)


@register_flop_formula(torch.ops.nni_cream.grouped_cross_product)
def _cross_flops(first: Any, second: Any, groups: int, **_: Any) -> int:
    return _flops(first[0], first[1], second[1] // groups)
