"""The plain Triton backend: sm_80, 89, 90 and 100, and CPU tensors under TRITON_INTERPRET=1.

`smooth_quant.py` rounds activations, `lowrank.py` projects them, `gemm.py` multiplies;
`tiles.py` says with which tile. Importing this without Triton raises ImportError.
"""

from masquant_kernels.gpu.integer import gemm_decode, gemm_w4a8, gemm_w8a8
from masquant_kernels.gpu.smooth_quant import add_smooth_quant, smooth_quant

OPS = {f.__name__: f for f in (smooth_quant, add_smooth_quant, gemm_w4a8, gemm_w8a8, gemm_decode)}
