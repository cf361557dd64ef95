"""Few tokens, one tile of outputs per many programs: each sums a part of the inputs (split-K).

`split_kernel` writes what every part sums to; `finish_kernel` adds the parts in order and does
the rest of the GEMM. Int32 parts are exact, f32 parts (grouped scales) are always added alike:
the same input gives the same bits every time.
"""

import triton
import triton.language as tl

from masquant_kernels.gpu.common import cast
from masquant_kernels.gpu.mainloop import channel_sums, group_sums

DECODE_TOKENS = 16  # tokens of the smallest tile; up to here splitting the inputs pays
FINISH_BLOCK = 256  # outputs of one program of finish_kernel


@triton.jit(do_not_specialize=["T"])
def split_kernel(
    q_ptr, w_ptr, w_scale_ptr, zero_ptr, sums_ptr, parts_ptr,
    T, N, q_columns, w_columns, G, span,
    BITS: tl.constexpr, GROUP: tl.constexpr, RAGGED: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """parts[s] = the sum over inputs s * span <= k < (s + 1) * span, for BN outputs.

    parts: [SPLIT, T, N]; int32, 16-fold at 4 bits and with zero points still in; f32 when grouped.
    """
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    s = tl.program_id(1)
    rt = tl.arange(0, BT)
    start = s * span
    stop = tl.minimum(start + span, q_columns)
    if GROUP == 0:
        part = channel_sums(
            q_ptr, w_ptr, rt % T, rn % N, start, stop, q_columns, w_columns,
            BITS, BT, BN, BK, RAGGED,
        )  # fmt: skip
    else:
        part = group_sums(
            q_ptr, w_ptr, w_scale_ptr, zero_ptr, sums_ptr, rt % T, rn % N, start, stop,
            q_columns, w_columns, G, BITS, GROUP, BT, BN, RAGGED,
        )  # fmt: skip
    at = parts_ptr + (s * T + rt)[None, :].to(tl.int64) * N + rn[:, None]
    tl.store(at, part, mask=(rt < T)[None, :] & (rn < N)[:, None])


@triton.jit(do_not_specialize=["T"])
def finish_kernel(
    parts_ptr, scale_ptr, w_scale_ptr, zero_ptr, sums_ptr, bias_ptr, y_ptr,
    T, N,
    BITS: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[t, n] = (sum over s of parts[s, t, n]) * scale[t] * weight_scale[n] + bias[n].

    Without scale[t] where the activations are floats, without weight_scale[n] where it is grouped.
    """
    t = tl.program_id(1)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    total = tl.load(parts_ptr + t.to(tl.int64) * N + n, mask=inside, other=0)
    for s in range(1, SPLIT):
        total += tl.load(parts_ptr + (s * T + t).to(tl.int64) * N + n, mask=inside, other=0)
    if GROUP == 0:
        if BITS == 4:
            total = total >> 4
        if zero_ptr is not None:
            zero = tl.load(zero_ptr + n, mask=inside, other=0).to(tl.int32)
            total -= zero * tl.load(sums_ptr + t)
    y = total.to(tl.float32)
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + t)
    if GROUP == 0:
        y *= tl.load(w_scale_ptr + n, mask=inside, other=0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + t.to(tl.int64) * N + n, cast(y, y_ptr.dtype.element_ty), mask=inside)
