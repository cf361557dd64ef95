"""What a compiled kernel's machine code says: registers, spills, tensor-core opcodes, main loop.

Read from PTX and, with the wheel's own cuobjdump and nvdisasm, from the cubin: no GPU is needed.
"""

import collections
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton

from masquant_kernels.gpu.tiles import SHARED_MEMORY

SHARED_LIMIT = {arch: kib << 10 for arch, kib in SHARED_MEMORY.items()}  # bytes

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_OPCODE = re.compile(r"^\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.\w+)*)\s*(.*)$")
_BRANCH = re.compile(r"`\((\.\w+)\)")
_PTX_MMA = re.compile(r"\b((?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)[\w.:]*)")
_SASS_MMA = re.compile(r"^(I|H|Q|D|B)G?MMA$|^UTC\w*MMA$")
_INTEGER_MMA = re.compile(r"^IG?MMA$|^UTCI\w*MMA$")

_WGMMA = re.compile(r"[IHQ]GMMA\.64x(\d+)x\S+ R(\d+), (?:R(\d+)|gdesc\[\w+\]), (?:.*(gsb0))?")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)")


@dataclass(frozen=True)
class Instruction:
    opcode: str  # IGMMA
    modifiers: str  # .64x128x32.S8.S8
    operands: str  # R24, R200, gdesc[UR8], R24, gsb0

    def __str__(self) -> str:
        return f"{self.opcode}{self.modifiers} {self.operands}"


@dataclass(frozen=True)
class Facts:
    """`main_loop`: the innermost loop of tensor-core instructions (integer ones first), or ()."""

    kernel: str
    arch: int
    constants: str  # tile sizes and other compile-time values
    registers: int
    spills: int  # instructions that store to or load from local memory
    shared: int  # bytes
    mma: tuple[str, ...]  # tensor-core opcodes of the PTX
    main_loop: tuple[Instruction, ...]
    early_arrivals: int = 0  # at an mbarrier, before all warps are done reading

    @property
    def shared_limit(self) -> int:
        return SHARED_LIMIT[self.arch]

    @property
    def permutes(self) -> int:
        """PRMT in the main loop: bytes moved one by one, which an int4 unpack must not need."""
        return sum(i.opcode == "PRMT" for i in self.main_loop)

    @property
    def waits(self) -> tuple[int, ...]:
        """For each wait for wgmma in the main loop, how many groups may stay in flight."""
        found = (_WAIT.match(str(i)) for i in self.main_loop)
        return tuple(int(m[1], 16) for m in found if m)

    @property
    def hazards(self) -> tuple[str, ...]:
        """Instructions of the main loop that touch registers of a wgmma still running."""
        return tuple(dict.fromkeys(_hazards(self.main_loop * 2)))


def facts(name: str, arch: int, constants: str, ptx: str, cubin: bytes, shared: int) -> Facts:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    code, labels = _parse(sass)
    opcodes = collections.Counter(i.opcode for i in code)
    return Facts(
        kernel=name,
        arch=arch,
        constants=constants,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spills=opcodes["STL"] + opcodes["LDL"],
        shared=shared,
        mma=tuple(sorted(set(_PTX_MMA.findall(ptx)))),
        main_loop=_main_loop(code, labels),
        early_arrivals=_early_arrivals(code),
    )


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([_TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def _parse(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions in order, and the index at which each label stands."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif (text := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line)) and (
            found := _OPCODE.match(text[1])
        ):
            code.append(Instruction(*found.groups()))
    return code, labels


def _main_loop(code: list[Instruction], labels: dict[str, int]) -> tuple[Instruction, ...]:
    loops = []
    for end, instruction in enumerate(code):
        target = _BRANCH.search(instruction.operands) if instruction.opcode == "BRA" else None
        if target and (start := labels[target[1]]) <= end:
            loops.append(code[start : end + 1])
    for kind in (_INTEGER_MMA, _SASS_MMA):
        holding = [loop for loop in loops if any(kind.match(i.opcode) for i in loop)]
        if holding:
            return tuple(min(holding, key=len))
    return ()


def _early_arrivals(code: list[Instruction]) -> int:
    """One thread arrives for all warps that read a buffer: after its own read of shared memory or
    its wait for wgmma, it must have met the others at a barrier."""
    early, alone = 0, False
    for i in code:
        if i.opcode in ("LDSM", "LDS") or _WAIT.match(str(i)):
            alone = True
        elif i.opcode == "BAR":
            alone = False
        elif i.opcode == "SYNCS" and i.modifiers == ".ARRIVE.TRANS64.A1T0":
            early += alone
    return early


def _hazards(code: tuple[Instruction, ...]) -> Iterator[str]:
    """A wgmma reads its left operand, when that is in registers, and updates its sums at any time
    until the wait that covers its group: nothing may write the one or touch the other before."""
    groups: list[tuple[set[int], set[int]]] = []  # of committed groups: fragments, sums
    fragments, sums = set(), set()
    for i in code:
        if found := _WGMMA.match(str(i)):
            width, total, left, commit = found.groups()
            sums |= set(range(int(total), int(total) + int(width) // 2))
            if left:
                fragments |= set(range(int(left), int(left) + 4))  # 64 rows x 32 bytes
            if commit:
                groups.append((fragments, sums))
                fragments, sums = set(), set()
        elif found := _WAIT.match(str(i)):
            groups = groups[max(0, len(groups) - int(found[1], 16)) :]
        else:
            running = [*groups, (fragments, sums)]
            used = {int(r) for r in re.findall(r"\bR(\d+)\b", i.operands)}
            if any(_written(i) & held or used & summed for held, summed in running):
                yield str(i)


def _written(i: Instruction) -> set[int]:
    target = re.match(r"R(\d+)\b", i.operands)
    if not target:
        return set()
    four = ".128" in i.modifiers or (i.opcode == "LDSM" and i.modifiers.endswith(".4"))
    two = ".64" in i.modifiers or ".WIDE" in i.modifiers
    return set(range(int(target[1]), int(target[1]) + (4 if four else 2 if two else 1)))
