"""The integer GEMM: one kernel for 4 and 8 bit weights, one scale per row or one per group.

y = (q @ Qw^T) * scale * weight_scale^T + h @ lr_b + bias
"""

import triton
import triton.language as tl

from masquant_kernels.gpu.epilogue import add_bias, add_low_rank, store, tile_order
from masquant_kernels.gpu.mainloop import centred, channel_sums, group_sums


@triton.jit(do_not_specialize=["T"])
def gemm_kernel(
    q_ptr, scale_ptr, w_ptr, w_scale_ptr, zero_ptr, sums_ptr, bias_ptr,
    h_ptr, lr_b_ptr, mod_ptr, y_ptr,
    T, N, q_columns, w_columns, G, M, R,
    BITS: tl.constexpr, GROUP: tl.constexpr, RAGGED: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BR: tl.constexpr = 32, SWIZZLE: tl.constexpr = 8, LOW_RANK_STAGES: tl.constexpr = None,
):  # fmt: skip
    """One tile of BN outputs for BT tokens. GROUP: inputs per weight scale, 0: all of them."""
    pid_t, pid_n = tile_order(tl.program_id(0), T, N, BT, BN, SWIZZLE)
    rt = pid_t * BT + tl.arange(0, BT)
    rn = pid_n * BN + tl.arange(0, BN)
    # Rows past the end wrap around: they need no mask in the loop and are never stored.
    if GROUP == 0:
        sums = channel_sums(
            q_ptr, w_ptr, rt % T, rn % N, 0, q_columns, q_columns, w_columns,
            BITS, BT, BN, BK, RAGGED,
        )  # fmt: skip
        y = centred(sums, zero_ptr, sums_ptr, rt % T, rn % N, BITS).to(tl.float32)
    else:
        y = group_sums(
            q_ptr, w_ptr, w_scale_ptr, zero_ptr, sums_ptr, rt % T, rn % N, 0, q_columns,
            q_columns, w_columns, G, BITS, GROUP, BT, BN, RAGGED,
        )  # fmt: skip
    y *= tl.load(scale_ptr + rt, mask=rt < T, other=0.0)[None, :]
    if GROUP == 0:
        y *= tl.load(w_scale_ptr + rn, mask=rn < N, other=0.0)[:, None]
    if h_ptr is not None:
        y = add_low_rank(y, h_ptr, lr_b_ptr, mod_ptr, rt, rn, T, N, M, R, BR, LOW_RANK_STAGES)
    y = add_bias(y, bias_ptr, rn, N)
    store(y, y_ptr, rt, rn, T, N)
