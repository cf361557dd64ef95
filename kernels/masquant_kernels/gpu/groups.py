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


@triton.jit
def input_sums_kernel(q_ptr, sums_ptr, q_columns, G, group, BLOCK: tl.constexpr):
    """sums[t, g] = sum of q[t, k] over group g; one program per (t, g)."""
    t, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    total = tl.zeros([BLOCK], tl.int32)
    for k in range(0, group, BLOCK):
        inside = k + tl.arange(0, BLOCK)
        column = g * group + inside
        valid = (inside < group) & (column < q_columns)
        total += tl.load(q_ptr + t * q_columns + column, mask=valid, other=0).to(tl.int32)
    tl.store(sums_ptr + t * G + g, tl.sum(total, 0))


def input_sums(q: torch.Tensor, groups: int, group: int) -> torch.Tensor:
    """int8 [T, Kp] -> int32 [T, groups]: a zero point z takes z times this from a group's sum.

    group: inputs of a group, 0 for all.
    """
    tokens, columns = q.shape
    sums = q.new_empty(tokens, groups, dtype=torch.int32)
    size = group or columns
    block = min(1024, triton.next_power_of_2(size))
    input_sums_kernel[(tokens, groups)](q, sums, columns, groups, size, BLOCK=block, num_warps=1)
    return sums
