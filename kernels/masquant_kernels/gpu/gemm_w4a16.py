"""gemm_w4a16: four-bit weights become floats in registers and meet activations that stay floats.

    y = u @ ((Qw - zero) * weight_scale)^T + h @ lr_b + bias

Qw - zero is exact in 16 bits; products are summed in f32 and scaled after that.
"""

import torch
import triton
import triton.language as tl

from masquant_kernels.gpu import tiles
from masquant_kernels.gpu.common import INTERPRET, backend_op, low_rank_stages
from masquant_kernels.gpu.decode import DECODE_TOKENS, FINISH_BLOCK, finish_kernel
from masquant_kernels.gpu.epilogue import add_bias, add_low_rank, store, tile_order
from masquant_kernels.gpu.groups import entry, group_of
from masquant_kernels.gpu.mainloop import load, of_group


def _unpack_asm(pair: str, high_byte: str, minus: str, one: str) -> tl.constexpr:
    """Four bytes -> two registers of low, two of high nibbles as 16-bit floats.

    Without a conversion: a nibble, made 0..15 by flipping its sign bit, becomes the last bits of
    a power of two (its high byte is given); adding `minus`, that number and 8 below zero, leaves
    the value.
    """
    return tl.constexpr(f"""{{
        .reg .b32 low, high, power, minus, one;
        xor.b32 high, $4, 0x88888888;
        and.b32 low, high, 0x0F0F0F0F;
        shr.u32 high, high, 4;
        and.b32 high, high, 0x0F0F0F0F;
        mov.b32 power, 0x{high_byte * 4};
        mov.b32 minus, 0x{minus * 2};
        mov.b32 one, 0x{one * 2};
        prmt.b32 $0, low, power, 0x4140;
        prmt.b32 $1, low, power, 0x4342;
        prmt.b32 $2, high, power, 0x4140;
        prmt.b32 $3, high, power, 0x4342;
        fma.rn.{pair} $0, $0, one, minus;
        fma.rn.{pair} $1, $1, one, minus;
        fma.rn.{pair} $2, $2, one, minus;
        fma.rn.{pair} $3, $3, one, minus;
        }}""")


_BF16_ASM = _unpack_asm("bf16x2", high_byte="43", minus="C308", one="3F80")  # 128 + 8
_F16_ASM = _unpack_asm("f16x2", high_byte="64", minus="E408", one="3C00")  # 1024 + 8
_REGISTERS = tl.constexpr("=r,=r,=r,=r,r")


@triton.jit
def unpack_float(p, dtype: tl.constexpr):
    """Bytes of two nibbles -> (low, high) as floats, exact."""
    if dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            _BF16_ASM, _REGISTERS, [p], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    elif dtype == tl.float16:
        return tl.inline_asm_elementwise(
            _F16_ASM, _REGISTERS, [p], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:
        return ((p << 4).to(tl.int8) >> 4).to(dtype), (p >> 4).to(dtype)


@triton.jit
def float_sums(
    u_ptr, w_ptr, scale_ptr, zero_ptr, rt, rn, start, stop, u_stride, K, w_columns, G,
    GROUP: tl.constexpr, RAGGED: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """sum over inputs start <= k < stop of w[rn, k] * u[rt, k] -> f32 [BN, BT], w dequantized;
    without its scale where GROUP is 0. start: a multiple of 128. RAGGED: K is not."""
    work: tl.constexpr = tl.float32 if INTERPRET else u_ptr.dtype.element_ty
    # Three products make one of f32: with longer steps they take more registers than there are.
    STEP: tl.constexpr = 32 if GROUP == 32 or work == tl.float32 else 64
    j = tl.arange(0, STEP)
    u_row = u_ptr + rt[None, :].to(tl.int64) * u_stride + j[:, None]
    w_row = w_ptr + rn[:, None].to(tl.int64) * w_columns + j[None, :]
    if GROUP == 0 and zero_ptr is not None:
        zero = tl.load(zero_ptr + rn)[:, None].to(work)
    acc = tl.zeros((BN, BT), tl.float32)
    for k in range(start, stop, 128):
        for j0 in tl.static_range(0, 64, STEP):
            low, high = k + j0, k + j0 + 64  # first inputs of the two halves
            if GROUP != 0:  # ahead of the products, which hide how long these take
                scale0 = of_group(scale_ptr, rn, low // GROUP, G)[:, None]
                scale1 = of_group(scale_ptr, rn, high // GROUP, G)[:, None]
            u0 = load(u_row + low, low + j[:, None], K, RAGGED).to(work)
            u1 = load(u_row + high, high + j[:, None], K, RAGGED).to(work)
            w0, w1 = unpack_float(tl.load(w_row + k // 2 + j0), work)
            if zero_ptr is not None and GROUP == 0:
                w0 -= zero
                w1 -= zero
            elif zero_ptr is not None:
                w0 -= of_group(zero_ptr, rn, low // GROUP, G)[:, None].to(work)
                w1 -= of_group(zero_ptr, rn, high // GROUP, G)[:, None].to(work)
            # Sums of a step are added up apart. That ends its products within the step, as it
            # must: sm_90 reads the weights from registers that the next step writes.
            part = tl.dot(w0, u0, input_precision="tf32x3")
            if GROUP == 32 or GROUP == 64:
                acc += part * scale0
                part = tl.dot(w1, u1, input_precision="tf32x3")
            else:
                part = tl.dot(w1, u1, part, input_precision="tf32x3")
            acc += part if GROUP == 0 else part * scale1
    return acc


@triton.jit(do_not_specialize=["T"])
def gemm_w4a16_kernel(
    u_ptr, w_ptr, w_scale_ptr, zero_ptr, bias_ptr, h_ptr, lr_b_ptr, mod_ptr, y_ptr, parts_ptr,
    T, N, K, u_stride, w_columns, G, M, R, span,
    GROUP: tl.constexpr, RAGGED: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    BR: tl.constexpr = 32, SWIZZLE: tl.constexpr = 8, LOW_RANK_STAGES: tl.constexpr = None,
):  # fmt: skip
    """One tile of BN outputs for BT tokens; with parts_ptr the sum over one span of the inputs,
    to parts [S, T, N], for finish_kernel."""
    pid_t, pid_n = tile_order(tl.program_id(0), T, N, BT, BN, SWIZZLE)
    s = tl.program_id(1)
    rt = pid_t * BT + tl.arange(0, BT)
    rn = pid_n * BN + tl.arange(0, BN)
    y = float_sums(
        u_ptr, w_ptr, w_scale_ptr, zero_ptr, rt % T, rn % N, s * span,
        tl.minimum(s * span + span, K), u_stride, K, w_columns, G, GROUP, RAGGED, BT, BN,
    )  # fmt: skip
    if parts_ptr is not None:
        store(y, parts_ptr + s.to(tl.int64) * T * N, rt, rn, T, N)
    else:
        if GROUP == 0:
            y *= tl.load(w_scale_ptr + rn, mask=rn < N, other=0.0)[:, None]
        if h_ptr is not None:
            y = add_low_rank(y, h_ptr, lr_b_ptr, mod_ptr, rt, rn, T, N, M, R, BR, LOW_RANK_STAGES)
        store(add_bias(y, bias_ptr, rn, N), y_ptr, rt, rn, T, N)


@backend_op
def gemm_w4a16(
    arch, out, u, weight_packed, weight_scale, weight_zero_point, group_size,
    bias, h, lr_b, modality, dtype,
):  # fmt: skip
    tokens, columns = u.shape
    outputs, groups = weight_scale.shape
    group = group_of(group_size, groups, columns)
    if group is None:
        return NotImplemented
    few = h is None and tokens <= DECODE_TOKENS
    name = entry("decode_w4a16" if few else "gemm_w4a16", group, u.dtype)
    tile = tiles.find(name, arch, tokens, columns, outputs)
    options = tile.options
    blocks = -(-columns // 128)
    span = -(-blocks // tile.split) * 128
    split = -(-columns // span)
    parts = u.new_empty(split, tokens, outputs, dtype=torch.float32) if split > 1 else None
    modalities, rank = (1, 1) if h is None else (lr_b.shape[0] + 1, lr_b.shape[1])
    grid = triton.cdiv(tokens, options["BT"]) * triton.cdiv(outputs, options["BN"])
    gemm_w4a16_kernel[(grid, split)](
        u, weight_packed, weight_scale, weight_zero_point, bias, h, lr_b, modality, out, parts,
        tokens, outputs, columns, u.stride(0), weight_packed.shape[1], groups, modalities, rank,
        span, GROUP=group, RAGGED=columns % 128 != 0, LOW_RANK_STAGES=low_rank_stages(arch),
        **options,
    )  # fmt: skip
    if parts is not None:
        finish_kernel[(triton.cdiv(outputs, FINISH_BLOCK), tokens)](
            parts, None, weight_scale, None, None, bias, out, tokens, outputs,
            BITS=16, GROUP=group, SPLIT=split, BLOCK=FINISH_BLOCK,
        )  # fmt: skip
    return out
