"""What every plain Triton kernel shares: where it may run, and how floats are rounded.

Under TRITON_INTERPRET=1 the kernels run on CPU tensors, for tests. The interpreter differs in
three ways, and `INTERPRET` (known when a kernel is compiled) is how kernels step around them:
it has no inline assembly, truncates f32 -> bf16, and multiplies bf16 as raw integers.
"""

import functools
import os

import torch
import triton
import triton.language as tl

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
ARCHS = (80, 89, 90, 100)  # what tiles.json was chosen for
# Chips with less shared memory than the next lower one of ARCHS; sm_89 has as little as they.
SMALL = (86, 120, 121)


@functools.cache
def arch_of(device: torch.device) -> int | None:
    """The one of ARCHS whose tiles serve a device; None where no kernel here runs."""
    if device.type == "cpu":  # the interpreter has no architecture: any tile serves
        return ARCHS[0] if INTERPRET.value else None
    if device.type != "cuda" or torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    chip = 10 * major + minor
    if chip in SMALL:
        return 89
    return max((arch for arch in ARCHS if arch <= chip), default=None)


def low_rank_stages(arch: int) -> int | None:
    """Stages of the loop over the rank, where it may not have those of its kernel.

    On sm_90 a product may run on while the next step of a pipelined loop writes its left operand,
    a factor converted in registers. Triton waits for it since 3.9; a loop of one stage always does.
    """
    version = tuple(int(n) for n in triton.__version__.split(".")[:2])
    return 1 if arch == 90 and version < (3, 9) else None


def backend_op(launch):
    """`launch(arch, out, *arguments)` -> the function that dispatch.py calls.

    Triton launches on the current device, so this makes the tensors' device the current one.
    """

    @functools.wraps(launch)
    def run(out, given, *args, **kwargs):
        device = given.device
        arch = arch_of(device)
        if arch is None:
            return NotImplemented
        if device.type == "cpu" or device.index == torch.cuda.current_device():
            return launch(arch, out, given, *args, **kwargs)
        with torch.cuda.device(device):
            return launch(arch, out, given, *args, **kwargs)

    return run


@triton.jit
def round_half_even(v):
    """As torch.round, for |v| < 2^22: beyond 2^23 a float has no room left for a fraction."""
    return (v + 12582912.0) - 12582912.0


@triton.jit
def cast(v, dtype: tl.constexpr):
    """f32 -> dtype, to nearest even."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = v.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return v.to(dtype)
