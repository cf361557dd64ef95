"""Integer GEMMs through oneDNN, where the C kernels cannot be compiled.

Weights are expanded to 8 bits and reordered once per tensor, which costs a byte for each weight.
Without VNNI oneDNN adds pairs of products in 16 bits: 4-bit weights fit, 8-bit ones would be cut
off at 32767 without a word, so they are left to the reference there.
"""

import weakref

import torch
from torch import Tensor

from masquant_kernels.packing import unpack_int4
from masquant_kernels.reference import add_low_rank_and_bias

if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qlinear_prepack"):
    raise ImportError("this torch has no oneDNN")

VNNI = torch.cpu._is_vnni_supported()
_ready: dict[int, tuple] = {}  # id of a weight -> (its version, reordered weight)


def gemm_w4a8(
    out, q, scale, weight_packed, weight_scale, weight_zero_point, group_size,
    bias, h, lr_b, modality, dtype,
):  # fmt: skip
    if group_size or weight_zero_point is not None:
        return NotImplemented
    y = _multiply(q, weight_packed, 4) * scale[:, None] * weight_scale.T
    return add_low_rank_and_bias(y, bias, h, lr_b).to(dtype)


def gemm_w8a8(
    out, q, scale, weight_packed, weight_scale, group_size, bias, h, lr_b, modality, dtype
):  # fmt: skip
    if group_size or not VNNI:
        return NotImplemented
    y = _multiply(q[:, : weight_packed.shape[1]], weight_packed, 8)
    return add_low_rank_and_bias(y * scale[:, None] * weight_scale.T, bias, h, lr_b).to(dtype)


def gemm_decode(
    out, q, scale, weight_packed, weight_scale, weight_zero_point, group_size, bias, weight_bits,
    dtype,
):  # fmt: skip
    rest = (group_size, bias, None, None, None, dtype)
    if weight_bits == 8:
        return gemm_w8a8(out, q, scale, weight_packed, weight_scale, *rest)
    return gemm_w4a8(out, q, scale, weight_packed, weight_scale, weight_zero_point, *rest)


def _multiply(q: Tensor, packed: Tensor, bits: int) -> Tensor:
    """Exact integers: int8 [T, K] x stored weights [N, ...] -> f32 [T, N]."""
    out = packed.shape[0]
    ones, zeros = torch.ones(out), torch.zeros(out, dtype=torch.int32)
    unsigned = (q.to(torch.int16) + 128).to(torch.uint8)
    return torch.ops.onednn.qlinear_pointwise(
        unsigned, 1.0, 128, _reordered(packed, bits, q.shape[1]), ones, zeros, None,
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip


def _reordered(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The weight as oneDNN wants it, kept as long as the tensor it was made from."""
    key, version = id(packed), None if packed.is_inference() else packed._version
    known = _ready.get(key)
    if known is None or known[0] != version:
        # [N, K]: [K, N] is accepted too, and silently wrong when N = K
        weight = unpack_int4(packed, columns) if bits == 4 else packed
        known = version, torch.ops.onednn.qlinear_prepack(weight, None)
        _ready[key] = known
        weakref.finalize(packed, _ready.pop, key, None)
    return known[1]


OPS = {"gemm_w4a8": gemm_w4a8, "gemm_w8a8": gemm_w8a8, "gemm_decode": gemm_decode}
