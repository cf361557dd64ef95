"""Ops in C for x86-64 CPUs: 4- and 8-bit weights stay packed in memory.

Importing this module compiles and loads the library (build.py) and compares it with exact
integers; ImportError says why it cannot be used here. `ISA` names the instruction set.
"""

import ctypes
import logging
import math
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int, c_int64, c_void_p

import torch

from masquant_kernels.cpu.build import load
from masquant_kernels.packing import PACK_BLOCK, pack_int4

log = logging.getLogger(__name__)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_LARGEST_PASS = 2048  # CHUNK in isa.h: groups and blocks must meet within it


class _Smooth(Structure):  # smooth.h
    _fields_ = [
        *((name, c_void_p) for name in ("x", "up", "smooth_inv", "norm_weight")),
        *((name, c_int64) for name in ("x_stride", "up_stride", "columns")),
        ("eps", c_float),
        ("type", c_int),
    ]


class _Gemm(Structure):  # gemm.h
    _fields_ = [
        *((n, c_void_p) for n in ("q", "scale", "u", "packed", "weight_scale", "zero", "bias")),
        *((n, c_void_p) for n in ("h", "lr_b", "modality", "y")),
        *((n, c_int64) for n in ("tokens", "padded", "columns", "out", "row_bytes")),
        *((n, c_int64) for n in ("groups", "group_size", "count", "rank", "u_stride")),
        *((n, c_int) for n in ("bits", "u_type", "bias_type", "h_type", "y_type", "threads")),
    ]


def bind(library: ctypes.CDLL) -> None:
    """Let the ops below call `library`."""
    global _quantize, _down, _multiply, _choose
    _quantize, _down = library.mq_smooth_quant, library.mq_lowrank_down
    _multiply, _choose = library.mq_gemm, library.mq_choose
    pointer = POINTER(_Smooth)
    _quantize.argtypes = [
        *(pointer, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int),
        *(c_void_p, c_void_p, c_int),
    ]
    _down.argtypes = [
        *(pointer, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int, c_int)
    ]
    _multiply.argtypes = [POINTER(_Gemm)]
    _quantize.restype = _down.restype = _multiply.restype = None
    _choose.restype = c_char_p


def smooth_quant(out, x, smooth_inv, modality, bits, norm_weight=None, eps=0.0, up=None):
    q, scale = out
    s = _given(x, smooth_inv, norm_weight, eps, up)
    _quantize(
        byref(s), None, 0, None, x.shape[0], _pointer(modality), bits,
        q.data_ptr(), scale.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def add_smooth_quant(out, x, residual, smooth_inv, modality, bits, norm_weight=None, eps=0.0):
    q, scale, total = out
    s = _given(x, smooth_inv, norm_weight, eps, None)
    if residual.stride(1) != 1:
        return NotImplemented
    _quantize(
        byref(s), residual.data_ptr(), residual.stride(0), total.data_ptr(), x.shape[0],
        _pointer(modality), bits, q.data_ptr(), scale.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def lowrank_down(out, x, smooth_inv, modality, lr_a, norm_weight=None, eps=0.0, up=None):
    if not lr_a.is_contiguous():
        return NotImplemented
    s = _given(x, smooth_inv, norm_weight, eps, up)
    _down(
        byref(s), x.shape[0], modality.data_ptr(), lr_a.data_ptr(), lr_a.shape[0], lr_a.shape[2],
        out.data_ptr(), _DTYPES[out.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out


def gemm_w4a8(
    out, q, scale, weight_packed, weight_scale, weight_zero_point, group_size,
    bias, h, lr_b, modality, dtype,
):  # fmt: skip
    columns = weight_packed.shape[1] * 2
    weight = (weight_packed, weight_scale, weight_zero_point, group_size, 4, columns)
    return _gemm(out, q, scale, *weight, bias, h, lr_b, modality)


def gemm_w8a8(
    out, q, scale, weight_packed, weight_scale, group_size, bias, h, lr_b, modality, dtype
):  # fmt: skip
    weight = (weight_packed, weight_scale, None, group_size, 8, weight_packed.shape[1])
    return _gemm(out, q, scale, *weight, bias, h, lr_b, modality)


def gemm_decode(
    out, q, scale, weight_packed, weight_scale, weight_zero_point, group_size, bias, weight_bits,
    dtype,
):  # fmt: skip
    columns = weight_packed.shape[1] * (2 if weight_bits == 4 else 1)
    weight = (weight_packed, weight_scale, weight_zero_point, group_size, weight_bits, columns)
    return _gemm(out, q, scale, *weight, bias, None, None, None)


def _gemm(
    out, q, scale, packed, weight_scale, zero, group_size, bits, columns, bias, h, lr_b, modality
):  # fmt: skip
    if group_size and not _covers(group_size):
        return NotImplemented
    return _run(
        out, q.data_ptr(), scale.data_ptr(), None, 0, 0, q.shape[1], columns,
        packed, weight_scale, zero, group_size, bits, bias, h, lr_b, modality,
    )  # fmt: skip


def gemm_w4a16(
    out, u, weight_packed, weight_scale, weight_zero_point, group_size,
    bias, h, lr_b, modality, dtype,
):  # fmt: skip
    padded = weight_packed.shape[1] * 2
    return _run(
        out, None, None, u.data_ptr(), u.stride(0), _DTYPES[u.dtype], padded, u.shape[1],
        weight_packed, weight_scale, weight_zero_point, group_size, 4, bias, h, lr_b, modality,
    )  # fmt: skip


def _run(
    out, q, scale, u, u_stride, u_type, padded, columns,
    packed, weight_scale, zero, group_size, bits, bias, h, lr_b, modality,
):  # fmt: skip
    count, rank = (0, 0) if h is None else lr_b.shape[:2]
    g = _Gemm(
        q, scale, u, packed.data_ptr(), weight_scale.data_ptr(),
        _pointer(zero), _pointer(bias), _pointer(h), _pointer(lr_b), _pointer(modality),
        out.data_ptr(), out.shape[0], padded, columns, out.shape[1], packed.shape[1],
        weight_scale.shape[1], group_size, count, rank, u_stride, bits, u_type,
        0 if bias is None else _DTYPES[bias.dtype], 0 if h is None else _DTYPES[h.dtype],
        _DTYPES[out.dtype], torch.get_num_threads(),
    )  # fmt: skip
    _multiply(byref(g))
    return out


def _covers(group_size: int) -> bool:
    """Whole vectors a group, and groups that end with a block often enough for one pass."""
    if group_size % 32:
        return False
    return math.lcm(group_size, PACK_BLOCK) <= _LARGEST_PASS


def _given(x, smooth_inv, norm_weight, eps, up) -> _Smooth:
    norm_weight = None if norm_weight is None else norm_weight.float()
    s = _Smooth(
        x.data_ptr(), _pointer(up), smooth_inv.data_ptr(), _pointer(norm_weight),
        x.stride(0), 0 if up is None else up.stride(0), x.shape[1], eps, _DTYPES[x.dtype],
    )  # fmt: skip
    s.kept = norm_weight  # perhaps a copy, which only this struct points to
    return s


def _pointer(tensor) -> int | None:
    return None if tensor is None else tensor.data_ptr()


OPS = {
    "smooth_quant": smooth_quant,
    "add_smooth_quant": add_smooth_quant,
    "lowrank_down": lowrank_down,
    "gemm_w4a8": gemm_w4a8,
    "gemm_w8a8": gemm_w8a8,
    "gemm_w4a16": gemm_w4a16,
    "gemm_decode": gemm_decode,
}


def choose(avx2: bool = False) -> str:
    """Use the best instruction set here, or AVX2: "avx512-vnni" | "avx2"."""
    return _choose(int(avx2)).decode()


def _exact() -> bool:
    """Do the chosen inner loops sum integers exactly? Largest values, where overflow would show."""
    one = torch.ones(64)
    for tokens, bits in ((1, 4), (1, 8), (11, 4), (11, 8)):
        generator = torch.Generator().manual_seed(bits)
        limit = 7 if bits == 4 else 127
        w = torch.randint(-limit, limit + 1, (40, 2304), generator=generator, dtype=torch.int8)
        q = torch.randint(-127, 128, (tokens, 2304), generator=generator, dtype=torch.int8)
        w[:3], q[0] = limit, 127
        packed = pack_int4(w) if bits == 4 else w
        out = torch.full((tokens, 40), torch.nan)
        weight = (packed, one[:40, None], None, 0, bits, 2304)
        _gemm(out, q, one[:tokens], *weight, None, None, None, None)
        if not torch.equal(out, (q.long() @ w.long().T).float()):
            return False
    return True


bind(load())
ISA = choose()
if not _exact():
    ISA = choose(avx2=True)
    log.warning("masquant: AVX-512 kernels gave wrong sums on this processor, AVX2 is used")
    if not _exact():
        raise ImportError("the CPU kernels gave wrong sums on this processor")
