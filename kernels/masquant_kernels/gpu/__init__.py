"""The plain Triton backend: sm_80, 89, 90 and 100, and CPU tensors under TRITON_INTERPRET=1.

`smooth_quant.py` rounds activations, `lowrank.py` projects them, `gemm.py` multiplies;
`tiles.py` says with which tile. Importing this without Triton raises ImportError.
"""

from masquant_kernels.gpu import gemm_w4a16, integer, lowrank, smooth_quant

OPS = {
    "smooth_quant": smooth_quant.smooth_quant,
    "add_smooth_quant": smooth_quant.add_smooth_quant,
    "lowrank_down": lowrank.lowrank_down,
    "gemm_w4a8": integer.gemm_w4a8,
    "gemm_w8a8": integer.gemm_w8a8,
    "gemm_w4a16": gemm_w4a16.gemm_w4a16,
    "gemm_decode": integer.gemm_decode,
}
