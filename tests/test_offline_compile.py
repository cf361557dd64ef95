"""What the GPU kernels compile to, for GPUs that are not here: tensor cores, and no spills.

A part of `python -m masquant_kernels.gpu.offline`, which compiles everything. It runs in a process
of its own, because Triton reads TRITON_INTERPRET, which other tests set, when it is imported.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton on this platform: nothing to compile with")

from masquant_kernels.gpu.machine_code import SHARED_LIMIT, Facts, Instruction, _early_arrivals

ARCHS = (80, 89, 90, 100)
KERNELS = Path(__file__).parents[1] / "kernels"


def run(*arguments):
    unwanted = ("TRITON_INTERPRET", "MASQUANT_BACKEND")
    clean = {k: v for k, v in os.environ.items() if k not in unwanted}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=clean | {"PYTHONPATH": os.pathsep.join([str(KERNELS), *sys.path[1:]])},
    )


@pytest.fixture(scope="module")
def compiled():
    """{arch: the kernels of a quick sweep}"""
    done = run("-m", "masquant_kernels.gpu.offline", "--quick", "--json")
    assert done.stdout, done.stderr
    rows = json.loads(done.stdout)
    return {arch: [row for row in rows if row["arch"] == arch] for arch in ARCHS}


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_are_what_their_chip_wants(compiled, arch):
    assert [row for row in compiled[arch] if row["problems"]] == []


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("entry", ["gemm_w4a8", "gemm_w8a8", "decode_w4a8"])
def test_integer_gemms_use_tensor_cores_and_no_local_memory(compiled, arch, entry):
    names = ("gemm_kernel", "split_kernel")
    kernels = [r for r in compiled[arch] if r["entry"] == entry and r["kernel"] in names]
    assert kernels
    for row in kernels:
        assert any("s8" in mma or "i8" in mma for mma in row["mma"]), row
        assert row["spills"] == 0 and row["permutes"] == 0
        assert 0 < row["shared"] <= SHARED_LIMIT[arch]


@pytest.mark.parametrize("bits", [4, 8])
def test_hopper_keeps_products_in_flight(compiled, bits):
    (row,) = [r for r in compiled[90] if r["entry"] == f"hopper_w{bits}a8"]
    assert any(m.startswith("wgmma.mma_async") and m.endswith("s32.s8.s8") for m in row["mma"])
    assert any(m.startswith("wgmma.mma_async") and "f32.bf16" in m for m in row["mma"])  # low rank
    assert row["waits"] and set(row["waits"]) == {1}
    assert row["spills"] == 0 and row["hazards"] == [] and row["permutes"] == 0
    assert row["early_arrivals"] == 0
    assert row["registers"] == 168  # 12 warps of them fill the register file


BAD = """
import json, sys, torch, triton, triton.language as tl
from masquant_kernels.gpu.offline import compiling

@triton.jit
def big(x, w, y, K, B: tl.constexpr):
    r = tl.arange(0, B)
    k = tl.arange(0, 64)
    acc = tl.zeros((B, B), tl.int32)
    for k0 in range(0, K, 64):
        a = tl.load(x + r[:, None] * K + k0 + k[None, :])
        b = tl.load(w + (k0 + k)[:, None] * B + r[None, :])
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    tl.store(y + r[:, None] * B + r[None, :], acc)

x = torch.empty(128, 256, dtype=torch.int8)
with compiling(80) as kernels:
    big[(1,)](x, x, torch.empty(128, 128, dtype=torch.int32), 256, B=128, num_warps=4, maxnreg=64)
(f,) = [k.facts() for k in kernels]
print(json.dumps([f.spills, f.permutes, list(f.mma)]))
"""


def test_a_bad_kernel_is_seen(tmp_path):
    """Few registers, and a weight whose inputs are not contiguous: it spills and shuffles bytes."""
    (tmp_path / "bad.py").write_text(BAD)
    done = run(tmp_path / "bad.py")
    assert done.returncode == 0, done.stderr
    spills, permutes, mma = json.loads(done.stdout)
    assert spills > 0 and permutes > 0 and any(".s8.s8" in m for m in mma)


def instructions(*lines):
    parsed = []
    for line in lines:
        name, _, operands = line.partition(" ")
        opcode, dot, modifiers = name.partition(".")
        parsed.append(Instruction(opcode, dot + modifiers, operands))
    return parsed


PRODUCT = "IGMMA.64x128x32.S8.S8 R88, R160, gdesc[UR8], R88, gsb0"
OTHER = "IGMMA.64x128x32.S8.S8 R88, R164, gdesc[UR8], R88, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
UNPACK = "LOP3.LUT R163, R4.reuse, 0xf0f0f0f0, RZ, 0xc0, !PT"


@pytest.mark.parametrize(
    ("lines", "hazard"),
    [
        ((UNPACK, PRODUCT, WAIT, OTHER, WAIT), None),
        ((UNPACK, PRODUCT, OTHER, WAIT), None),  # the wait covers the older one
        ((UNPACK, PRODUCT, WAIT), UNPACK),  # of this loop's step before
        ((PRODUCT, UNPACK, WAIT, OTHER, WAIT), UNPACK),
        (("LDSM.16.M88.4 R160, [R3]", PRODUCT, WAIT), "LDSM.16.M88.4 R160, [R3]"),
        ((PRODUCT, WAIT, OTHER, WAIT, "FADD R4, R90, R5"), "FADD R4, R90, R5"),
    ],
)
def test_registers_of_a_running_product(lines, hazard):
    facts = Facts("loop", 90, "", 168, 0, 0, (), tuple(instructions(*lines)))
    assert facts.hazards == (() if hazard is None else (hazard,))


BARRIER = "BAR.SYNC.DEFER_BLOCKING 0x0, 0x100"
ARRIVE = "SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR7+0x300e0], RZ"


@pytest.mark.parametrize(
    ("lines", "early"),
    [
        ((PRODUCT, WAIT, BARRIER, ARRIVE), 0),
        ((PRODUCT, WAIT, ARRIVE), 1),
        ((PRODUCT, BARRIER, WAIT, ARRIVE), 1),
        (("LDSM.16.M88.4 R160, [R3]", ARRIVE, BARRIER, ARRIVE), 1),
    ],
)
def test_a_slot_is_released_after_all_warps_are_done(lines, early):
    assert _early_arrivals(instructions(*lines)) == early
