"""Compile kernels for any NVIDIA GPU on a machine without one, by launching them for real.

    with compiling(90) as kernels:
        launch(...)          # a launcher, on CPU tensors: nothing runs, everything is compiled
    [kernel.facts() for kernel in kernels]

Triton's own launch path is kept, so signature, specialization and options are those of a real
launch; only its driver is replaced. TRITON_INTERPRET must be unset.

    python -m masquant_kernels.gpu.offline [--arch 90] [--only w4a8] [--quick]

compiles every tile of the tables in every variant (launches.py), says what became of each and
exits with 1 where one misses what is asked of it: tensor cores, no spills, its chip's memory.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from masquant_kernels.gpu import common
from masquant_kernels.gpu.launches import ARCHS, ZERO_POINT, Launch, launches
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
    launch, active, arch_of = JITFunction.run, driver._active, common.arch_of

    def compile_only(self, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        kernels.append(Compiled(self.__name__, arch, _constants(self, options), kernel))
        return kernel

    properties = torch.cuda.get_device_properties
    try:
        driver.set_active(_NoDriver(arch))
        JITFunction.run = compile_only
        common.arch_of = lambda device: arch
        torch.cuda.get_device_properties = lambda device=None: _properties(arch)
        yield kernels
    finally:
        torch.cuda.get_device_properties = properties
        JITFunction.run, driver._active, common.arch_of = launch, active, arch_of


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


@dataclass(frozen=True)
class Row:
    """What became of one kernel of a launch; or of a launch that did not compile."""

    launch: Launch
    facts: Facts | None
    error: str = ""

    @property
    def problems(self) -> list[str]:
        f, entry = self.facts, self.launch.entry
        if f is None:
            return [self.error]
        found = []
        if f.spills:
            found.append(f"{f.spills} spills")
        if f.shared > f.shared_limit:
            found.append(f"{f.shared} bytes of shared memory, the limit is {f.shared_limit}")
        if f.kernel in _INTEGER and not any(".s8.s8" in m or "kind::i8" in m for m in f.mma):
            found.append("no int8 tensor-core opcode")
        if f.kernel in _FLOAT and not f.mma:
            found.append("no tensor-core opcode")
        # Zero points of groups are bytes that each group's step widens; weights never are.
        widens = ("grouped" in entry or "fine" in entry) and self.launch.variant == ZERO_POINT
        if f.kernel in _INTEGER and "w4a8" in entry and f.permutes and not widens:
            found.append(f"{f.permutes} PRMT in the main loop")
        if f.kernel == "hopper_gemm" and (not f.waits or set(f.waits) != {1}):
            found.append(f"the main loop waits for all products: {f.waits}")
        if f.early_arrivals:
            found.append(f"{f.early_arrivals} slots are released by a warp that did not wait")
        if f.hazards:
            found.append(f"registers of a running wgmma are touched: {f.hazards[0]}")
        return found


# Kernels that must use tensor cores, on integers or on floats.
_INTEGER = ("gemm_kernel", "split_kernel", "hopper_gemm")
_FLOAT = ("gemm_w4a16_kernel", "parts_kernel")

# Entries of a quick sweep: of sm_80 and sm_90 all kinds, of the others integer GEMMs.
_QUICK = (
    re.compile("gemm_w[48]a8|decode_w4a8"),
    re.compile("(gemm|hopper)_w[48]a8(_grouped)?|decode_w4a8|gemm_w4a16|smooth_quant|lowrank_down"),
)


def sweep(archs, quick: bool = False, only: str = "") -> Iterator[Row]:
    """Compile the launches that the tables stand for; quick: some of each kind, in a minute."""
    for arch in archs:
        for launch in _chosen(arch) if quick else launches(arch):
            if re.search(only, launch.entry):
                yield from _rows(launch)


def _chosen(arch: int) -> Iterator[Launch]:
    """Of each entry the last tile, which is the largest, in its first variant."""
    variants, chosen = {}, {}
    for launch in launches(arch):
        if variants.setdefault(launch.entry, launch.variant) == launch.variant:
            chosen[launch.entry] = launch
    kinds = _QUICK[arch in (80, 90)]
    return (launch for entry, launch in chosen.items() if kinds.fullmatch(entry))


def _rows(launch: Launch) -> Iterator[Row]:
    error = "nothing was launched"
    with compiling(launch.arch) as kernels:
        try:
            launch()
        except Exception as e:
            error = f"{type(e).__name__}: {e}"
            kernels.clear()
    if not kernels:
        yield Row(launch, None, error)
    for kernel in kernels:
        yield Row(launch, kernel.facts())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, action="append", choices=ARCHS)
    parser.add_argument("--quick", action="store_true", help="one tile and variant of each entry")
    parser.add_argument("--only", default="", metavar="REGEX", help="entries that hold this")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = []
    for row in sweep(given.arch or ARCHS, given.quick, given.only):
        found.append(row)
        if not given.json:
            print(_line(row), flush=True)
    bad = sum(bool(row.problems) for row in found)
    if given.json:
        print(json.dumps([_record(row) for row in found], indent=1))
    else:
        print(
            f"{len(found)} kernels compiled with Triton {triton.__version__}, {bad} with problems"
        )
    return 1 if bad else 0


def _line(row: Row) -> str:
    at, f = row.launch, row.facts
    line = f"sm_{at.arch:<4}{at.entry:<24}{at.variant:<11}"
    if f is not None:
        line += f"{f.kernel:<20}{f.registers:>4} registers{f.shared / 1024:>7.1f} KiB  "
        line += f"{f.constants}  "
    return line + ("; ".join(row.problems) or "ok")


_DERIVED = ("permutes", "waits", "hazards")  # from the main loop, which is too long to print


def _record(row: Row) -> dict:
    at, f = row.launch, row.facts
    record = {"arch": at.arch, "entry": at.entry, "tile": at.tile, "variant": at.variant}
    if f is not None:
        record |= dataclasses.asdict(f) | {name: getattr(f, name) for name in _DERIVED}
        del record["main_loop"]
    return record | {"problems": row.problems}


if __name__ == "__main__":
    sys.exit(main())
