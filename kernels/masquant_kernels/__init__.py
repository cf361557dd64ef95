"""Numeric kernels of masquant: quantizers and packing. Needs torch and nothing else.

Start with `quantizers.py`: it is the one definition of rounding that calibration,
export, the runtime and every fast path are held to.
"""

from masquant_kernels.packing import PACK_BLOCK, pack_int4, packed_columns, unpack_int4
from masquant_kernels.quantizers import (
    QWeight,
    dequantize_weight,
    qmax,
    quantize_rows,
    quantize_weight,
)

__all__ = [
    "PACK_BLOCK",
    "QWeight",
    "dequantize_weight",
    "pack_int4",
    "packed_columns",
    "qmax",
    "quantize_rows",
    "quantize_weight",
    "unpack_int4",
]
