"""Compile kernels for any NVIDIA GPU on a machine without one, by launching them for real.

    with compiling(90) as kernels:
        launch(...)          # a launcher, on CPU tensors: nothing runs, everything is compiled
    [kernel.facts() for kernel in kernels]

Triton's own launch path is kept, so signature, specialization and options are those of a real
launch; only its driver is replaced. TRITON_INTERPRET must be unset.
"""

import contextlib
import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from masquant_kernels.gpu.machine_code import Facts, facts

# SMs of an A100, an RTX 4090, an H100 and a B200: launchers size persistent grids by them.
PROCESSORS = {80: 108, 89: 128, 90: 132, 100: 148}


@dataclass(frozen=True)
class Compiled:
    name: str
    arch: int
    constants: str
    kernel: Any  # triton's CompiledKernel

    def facts(self) -> Facts:
        asm, shared = self.kernel.asm, self.kernel.metadata.shared
        return facts(self.name, self.arch, self.constants, asm["ptx"], asm["cubin"], shared)


@contextlib.contextmanager
def compiling(arch: int):
    """Inside, a launch compiles for `arch` and runs nothing. Yields the kernels, as they come."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    kernels: list[Compiled] = []
    launch, active = JITFunction.run, driver._active

    def compile_only(self, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        kernels.append(Compiled(self.__name__, arch, _constants(self, options), kernel))
        return kernel

    capability = torch.cuda.get_device_capability
    properties = torch.cuda.get_device_properties
    try:
        driver.set_active(_NoDriver(arch))
        JITFunction.run = compile_only
        torch.cuda.get_device_capability = lambda device=None: divmod(arch, 10)
        torch.cuda.get_device_properties = lambda device=None: _properties(arch)
        yield kernels
    finally:
        torch.cuda.get_device_capability = capability
        torch.cuda.get_device_properties = properties
        JITFunction.run, driver._active = launch, active


class _NoDriver:
    """What a launch asks of a driver before it runs anything. Each arch is a device of its own,
    since Triton keeps compiled kernels by device."""

    def __init__(self, arch: int):
        self.get_current_target = functools.partial(GPUTarget, "cuda", arch, 32)
        self.get_current_device = lambda: arch
        self.get_current_stream = lambda device: 0


def _properties(arch: int) -> SimpleNamespace:
    major, minor = divmod(arch, 10)
    return SimpleNamespace(major=major, minor=minor, multi_processor_count=PROCESSORS[arch])


def _constants(function: JITFunction, options: dict) -> str:
    return " ".join(f"{k}={v}" for k, v in options.items() if isinstance(v, int | str))
