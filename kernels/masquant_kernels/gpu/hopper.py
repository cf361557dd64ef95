"""The Hopper backend: integer GEMMs for sm_90, where there are enough tokens to fill the machine.

Anything else (other chips, groups, zero points, few tokens, shapes that TMA cannot address, a
Triton without Gluon) is left to plain Triton. Tiles were chosen by compiling (offline.py) and
arithmetic, not by measurements: hopper_tiles.json.
"""

import functools
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from masquant_kernels.gpu import tiles
from masquant_kernels.gpu.common import backend_op

try:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from masquant_kernels.gpu import hopper_kernels
    from masquant_kernels.gpu.hopper_kernels import hopper_gemm
except AttributeError as e:  # Gluon is experimental: its names move
    raise ImportError(f"this Triton's Gluon is not known here: {e}") from e

STEP, HALF, RANKS = (getattr(hopper_kernels, name).value for name in ("STEP", "HALF", "RANKS"))
MIN_TOKENS = 65  # with fewer, weights are read for too few products: plain tiles are smaller
MAX_COLUMNS = 2**31 // (127 * 128)  # 16 * nibble * int8 summed over more could leave int32
GROUP = 16  # tiles of tokens that share the L2 cache, hopper_kernels._origin
_ALIGNED = 16  # bytes: what TMA asks of addresses and row strides
_ELEMENT = {torch.int8: gl.int8, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@backend_op
def gemm_w4a8(
    arch, out, q, scale, weight_packed, weight_scale, weight_zero_point, group_size,
    bias, h, lr_b, modality, dtype,
):  # fmt: skip
    if weight_zero_point is not None:
        return NotImplemented
    weight = (weight_packed, weight_scale, group_size)
    return _gemm(4, arch, out, q, scale, *weight, bias, h, lr_b, modality)


@backend_op
def gemm_w8a8(
    arch, out, q, scale, weight_packed, weight_scale, group_size, bias, h, lr_b, modality, dtype
):
    weight = (weight_packed, weight_scale, group_size)
    return _gemm(8, arch, out, q, scale, *weight, bias, h, lr_b, modality)


OPS = {f.__name__: f for f in (gemm_w4a8, gemm_w8a8)}


def _gemm(bits, arch, out, q, scale, weight, weight_scale, group_size, bias, h, lr_b, modality):
    tokens, columns = q.shape
    outputs = len(weight)
    if h is None or not h.shape[1]:
        h = lr_b = modality = None
    if (
        arch != 90
        or group_size
        or tokens < MIN_TOKENS
        or not 0 < columns <= MAX_COLUMNS
        or not outputs
        or not _addressable(q)
        or not _addressable(weight)
        or (h is not None and h.dtype != torch.bfloat16)
    ):
        return NotImplemented
    tile = tiles.find(f"hopper_w{bits}a8", arch, tokens, columns, outputs).options
    rows, channels = tile["BT"], tile["BN"]
    rank, modalities, h_desc, b_desc = 0, 1, None, None
    if h is not None:
        modalities, rank = len(lr_b) + 1, lr_b.shape[1]
        h, rank = _addressable_columns(h, rank)
        h_desc = _describe(h, rows, RANKS)
        b_desc = _describe(_channel_major(lr_b), channels, RANKS)
    staged = out.dtype in _ELEMENT and _addressable(out)
    blocks = -(-tokens // rows) * -(-outputs // channels)
    hopper_gemm[(min(blocks, _processors(q.device)),)](
        _describe(q, rows, HALF),
        _describe(weight, channels, HALF),
        h_desc,
        b_desc,
        _describe(out, rows, channels) if staged else None,
        None if staged else out,
        scale.contiguous(),
        weight_scale,
        bias,
        modality,
        tokens,
        outputs,
        columns // STEP,
        rank,
        BITS=bits,
        M=modalities,
        GROUP=GROUP,
        **tile,
    )
    return out


def _addressable(t: Tensor) -> bool:
    """Whether TMA can read or write the rows of a contiguous tensor."""
    return t.data_ptr() % _ALIGNED == 0 and t.shape[1] * t.element_size() % _ALIGNED == 0


def _addressable_columns(h: Tensor, rank: int) -> tuple[Tensor, int]:
    """h [T, (M-1) * rank] as it is, or with the columns of each modality padded by zeros.

    The second is a small copy; ranks that are multiples of 8 do without it.
    """
    if rank % (_ALIGNED // h.element_size()) == 0 and _addressable(h):
        return h, rank
    parts = h.view(len(h), -1, rank)
    parts = torch.nn.functional.pad(parts, (0, -rank % RANKS))
    return parts.flatten(1), parts.shape[2]


class _Copy(NamedTuple):
    of: weakref.ref
    version: int | None  # of the tensor when it was copied
    tensor: Tensor


_copies: dict[int, _Copy] = {}  # by id: comparing tensors as keys would cost a launch's time


def _channel_major(lr_b: Tensor) -> Tensor:
    """lr_b f16 [M-1, R, N] -> bf16 [(M-1) * N, R rounded up to RANKS], zero padded; kept as long
    as lr_b lives and is not written to."""
    key = id(lr_b)
    version = None if lr_b.is_inference() else lr_b._version
    kept = _copies.get(key)
    if kept is not None and kept.of() is lr_b and kept.version == version:
        return kept.tensor
    copy = lr_b.transpose(1, 2).to(torch.bfloat16)
    copy = torch.nn.functional.pad(copy, (0, -lr_b.shape[1] % RANKS))
    copy = copy.flatten(0, 1).contiguous()
    if not (lr_b.is_cuda and torch.cuda.is_current_stream_capturing()):  # else filled on replay
        _copies[key] = _Copy(weakref.ref(lr_b, lambda _: _copies.pop(key, None)), version, copy)
    return copy


def _describe(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A contiguous matrix as TMA sees it: in blocks of rows x columns."""
    layout = _layout(rows, columns, t.dtype)
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, columns], layout)


@functools.cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], _ELEMENT[dtype])


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
