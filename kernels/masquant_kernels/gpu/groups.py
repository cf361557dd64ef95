"""Weights with several scales per row, and zero points: what their launchers need first."""

import torch
import triton
import triton.language as tl

MAX_COLUMNS = 2**31 // (127 * 128)  # more inputs could overflow an int32 sum


def group_of(group_size: int, groups: int, columns: int) -> int | None:
    """Inputs per scale as kernels know them: 0 for one scale per row; None where they cannot."""
    if columns > MAX_COLUMNS:
        return None
    if groups == 1:
        return 0
    return group_size if group_size in (32, 64) or group_size % 128 == 0 else None


def entry(name: str, group: int, dtype: torch.dtype | None) -> str:
    """The name under which tiles.json has a GEMM: groups and f32 dots need more registers.

    group: as group_of gives it; dtype: of the floats that its dots take, None for no such dot.
    """
    if dtype == torch.float32:
        name += "_f32"
    if group:
        name += "_grouped" if group % 128 == 0 else "_fine"
    return name


@triton.jit
def input_sums_kernel(q_ptr, sums_ptr, q_columns, size, BLOCK: tl.constexpr):
    """sums[t, i] = sum of q[t, k] over i * size <= k < (i + 1) * size; one program per (t, i)."""
    t, i = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for k in range(0, size, BLOCK):
        at = q_ptr + t * q_columns + i * size + k + lane
        total += tl.load(at, mask=k + lane < size, other=0).to(tl.int32)
    tl.store(sums_ptr + t * (q_columns // size) + i, tl.sum(total, 0))


def input_sums(q: torch.Tensor, group: int) -> torch.Tensor:
    """int8 [T, Kp] -> int32 [T, Kp / size]: a zero point z takes z times this off the product of
    `size` inputs, which are a group's, at most 128 (a kernel's step), or all where group is 0."""
    tokens, columns = q.shape
    size = min(group, 128) or columns
    sums = q.new_empty(tokens, columns // size, dtype=torch.int32)
    block = min(1024, triton.next_power_of_2(size))
    input_sums_kernel[sums.shape](q, sums, columns, size, BLOCK=block, num_warps=1)
    return sums
