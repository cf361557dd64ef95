"""Launchers of the integer GEMMs: gemm_w4a8, gemm_w8a8 and gemm_decode."""

import torch
import triton

from masquant_kernels.gpu import tiles
from masquant_kernels.gpu.common import backend_op, low_rank_stages
from masquant_kernels.gpu.decode import DECODE_TOKENS, FINISH_BLOCK, finish_kernel, split_kernel
from masquant_kernels.gpu.gemm import gemm_kernel
from masquant_kernels.gpu.groups import entry, group_of, input_sums


@backend_op
def gemm_w4a8(
    arch, out, q, scale, weight_packed, weight_scale, weight_zero_point, group_size,
    bias, h, lr_b, modality, dtype,
):  # fmt: skip
    weight = weight_packed, weight_scale, weight_zero_point
    return _run(arch, out, q, scale, weight, group_size, bias, h, lr_b, modality, 4)


@backend_op
def gemm_w8a8(
    arch, out, q, scale, weight_packed, weight_scale, group_size, bias, h, lr_b, modality, dtype
):  # fmt: skip
    weight = weight_packed, weight_scale, None
    return _run(arch, out, q, scale, weight, group_size, bias, h, lr_b, modality, 8)


@backend_op
def gemm_decode(
    arch, out, q, scale, weight_packed, weight_scale, weight_zero_point, group_size,
    bias, weight_bits, dtype,
):  # fmt: skip
    weight = weight_packed, weight_scale, weight_zero_point
    return _run(arch, out, q, scale, weight, group_size, bias, None, None, None, weight_bits)


def _run(arch, out, q, scale, weight, group_size, bias, h, lr_b, modality, bits):
    packed, w_scale, zero = weight
    scale = scale.contiguous()
    tokens, columns = q.shape
    outputs, groups = w_scale.shape
    group = group_of(group_size, groups, columns)
    if group is None:
        return NotImplemented
    sums = None if zero is None else input_sums(q, group)
    few = h is None and tokens <= DECODE_TOKENS
    name = ("decode_w" if few else "gemm_w") + ("4a8" if bits == 4 else "8a8")
    name = entry(name, group, None if h is None else h.dtype)
    tile = tiles.find(name, arch, tokens, columns, outputs)
    step = tile.options["BK"]
    fixed = {
        "BITS": bits,
        "GROUP": group,
        # The last step reaches past the end of a row.
        "RAGGED": columns % step != 0 or (bits == 8 and packed.shape[1] != columns),
    }
    steps = -(-columns // step)
    each = -(-steps // tile.split)  # steps of one part
    if each < steps:
        parts = -(-steps // each)
        _split(out, q, scale, weight, sums, bias, parts, each * step, fixed | tile.options)
        return out
    modalities, rank = (1, 1) if h is None else (lr_b.shape[0] + 1, lr_b.shape[1])
    grid = triton.cdiv(tokens, tile.options["BT"]) * triton.cdiv(outputs, tile.options["BN"])
    gemm_kernel[(grid,)](
        q, scale, packed, w_scale, zero, sums, bias, h, lr_b, modality, out,
        tokens, outputs, columns, packed.shape[1], groups, modalities, rank,
        LOW_RANK_STAGES=low_rank_stages(arch), **fixed, **tile.options,
    )  # fmt: skip
    return out


def _split(out, q, scale, weight, sums, bias, parts, span, options):
    """The decode form: `parts` programs for each tile of outputs, each over `span` inputs."""
    packed, w_scale, zero = weight
    tokens, columns = q.shape
    outputs, groups = w_scale.shape
    bits, group = options["BITS"], options["GROUP"]
    dtype = torch.float32 if group else torch.int32
    summed = q.new_empty(parts, tokens, outputs, dtype=dtype)
    split_kernel[(triton.cdiv(outputs, options["BN"]), parts)](
        q, packed, w_scale, zero, sums, summed,
        tokens, outputs, columns, packed.shape[1], groups, span, **options,
    )  # fmt: skip
    finish_kernel[(triton.cdiv(outputs, FINISH_BLOCK), tokens)](
        summed, scale, w_scale, zero, sums, bias, out, tokens, outputs,
        BITS=bits, GROUP=group, SPLIT=parts, BLOCK=FINISH_BLOCK,
    )  # fmt: skip
