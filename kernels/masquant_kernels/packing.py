"""Two 4-bit integers to a byte, in blocks of 128 inputs ("nibble-block").

Byte j of a block holds input j in its low nibble and input 64 + j in its high one, so a
kernel turns one vector load into two contiguous vectors with a shift and a mask.
"""

import torch
from torch import Tensor

PACK_BLOCK = 128


def packed_columns(in_features: int) -> int:
    """Bytes per output row: 64 for every started block of 128 inputs."""
    return -(-in_features // PACK_BLOCK) * (PACK_BLOCK // 2)


def pack_int4(q: Tensor) -> Tensor:
    """int8 [out, in] with values in [-8, 7] -> int8 [out, ceil(in / 128) * 64].

    Nibbles are two's complement; the inputs that pad the last block are zero.
    """
    if q.ndim != 2 or q.dtype != torch.int8:
        raise ValueError(f"expected int8 [out, in], got {q.dtype} {tuple(q.shape)}")
    if q.numel() and (q.min() < -8 or q.max() > 7):
        raise ValueError("a 4-bit integer lies in [-8, 7]")
    out, columns = q.shape
    half = PACK_BLOCK // 2
    q = torch.nn.functional.pad(q, (0, 2 * packed_columns(columns) - columns))
    low, high = q.view(out, -1, 2, half).unbind(2)
    return ((low & 0xF) | (high << 4)).reshape(out, -1)


def unpack_int4(p: Tensor, in_features: int) -> Tensor:
    """int8 [out, ceil(in / 128) * 64] -> int8 [out, in], the inverse of `pack_int4`."""
    if p.ndim != 2 or p.dtype != torch.int8 or p.shape[1] != packed_columns(in_features):
        raise ValueError(
            f"{in_features} inputs pack into int8 [out, {packed_columns(in_features)}], "
            f"got {p.dtype} {tuple(p.shape)}"
        )
    half = PACK_BLOCK // 2
    p = p.view(p.shape[0], -1, half)
    low, high = (p << 4) >> 4, p >> 4  # arithmetic shifts carry the sign
    return torch.stack((low, high), 2).reshape(p.shape[0], -1)[:, :in_features].contiguous()
