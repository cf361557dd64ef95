"""Every launch that an entry of the tile tables stands for, as calls of the public ops.

For offline.py: on CPU tensors, so shapes are small; only what decides between compiled kernels
(dtypes, which operands there are, whether a row ends inside a step) is as in real use.
"""

import contextlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

import masquant_kernels.ops  # noqa: F401  registers torch.ops.masquant
from masquant_kernels import dispatch
from masquant_kernels.gpu import tiles

try:
    from masquant_kernels.gpu import hopper
except ImportError:  # a Triton without Gluon
    hopper = None

ARCHS = (80, 89, 90, 100)
OUTPUTS, COLUMNS, RANK, MODALITIES = 512, 4096, 96, 3
ZERO_POINT = "zero point"  # the variant
_GEMM = re.compile(r"(gemm|decode|hopper)_w(\d)a(\d+)(_f32)?(_grouped|_fine)?")


@dataclass(frozen=True)
class Launch:
    arch: int
    entry: str  # of the table: an op, or one of its forms
    tile: dict
    variant: str
    op: str
    arguments: dict

    def __call__(self) -> None:
        backend = "hopper" if self.entry.startswith("hopper") else "triton"
        with dispatch.force(backend), tiles.override(self.entry, self.tile):
            getattr(torch.ops.masquant, self.op)(**self.arguments)


def launches(arch: int) -> Iterator[Launch]:
    """Of one architecture; raises ValueError for an entry that nobody taught this file."""
    for entry, rows in _rows(arch).items():
        variants = _variants(entry)
        for tile, (name, (op, arguments)) in itertools.product(_distinct(rows), variants.items()):
            yield Launch(arch, entry, tile, name, op, arguments)


def _distinct(rows: list[dict]) -> list[dict]:
    """Tiles that are compiled apart: into how many parts a sum is split does not matter."""
    found = {}
    for tile in rows:
        found[frozenset((tile | {"SPLIT": tile["SPLIT"] > 1}).items())] = tile
    return list(found.values())


def _rows(arch: int) -> dict[str, list[dict]]:
    """{entry: its tiles}; as in tiles.find, a missing entry is that of the next lower arch."""
    found = {}
    for known in ARCHS:
        if known <= arch:
            with contextlib.suppress(KeyError):
                found |= tiles.rows(known)
    ours = arch == 90 and hopper is not None
    return {e: rows for e, rows in found.items() if ours or not e.startswith("hopper")}


def _variants(entry: str) -> dict[str, tuple[str, dict]]:
    """{name: (op, its arguments)}; the first stands for the entry when time is short."""
    if entry == "smooth_quant":
        return _smooth_quant()
    if entry in ("lowrank_down", "lowrank_down_f32"):
        return _lowrank_down(entry.endswith("f32"))
    if found := _GEMM.fullmatch(entry):
        kind, bits, activation_bits, f32, grouping = found.groups()
        groups = {None: (0,), "_grouped": (128,), "_fine": (32, 64)}[grouping]
        return _gemm(kind, int(bits), int(activation_bits), bool(f32), groups)
    raise ValueError(f"the tile tables have {entry!r}, which launches.py does not know")


def _smooth_quant() -> dict:
    x = torch.empty(32, COLUMNS, dtype=torch.bfloat16)
    given = {
        "x": x,
        "smooth_inv": torch.empty(MODALITIES, COLUMNS),
        "modality": torch.zeros(32, dtype=torch.int32),
        "bits": 8,
    }
    norm = {"norm_weight": torch.empty(COLUMNS, dtype=torch.bfloat16), "eps": 1e-6}
    return {
        "add, norm": ("add_smooth_quant", given | norm | {"residual": x}),
        "norm": ("smooth_quant", given | norm),
        "silu": ("smooth_quant", given | {"up": x}),
        "text, f32": ("smooth_quant", given | {"x": x.float(), "modality": None}),
    }


def _lowrank_down(f32: bool) -> dict:
    x = torch.empty(512, COLUMNS, dtype=torch.float32 if f32 else torch.bfloat16)
    given = {
        "x": x,
        "smooth_inv": torch.empty(MODALITIES, COLUMNS),
        "modality": torch.zeros(512, dtype=torch.int32),
        "lr_a": torch.empty(MODALITIES - 1, COLUMNS, RANK, dtype=torch.float16),
    }
    norm = {"norm_weight": torch.empty(COLUMNS, dtype=torch.bfloat16), "eps": 1e-6}
    return {
        "norm": ("lowrank_down", given | norm),
        "silu": ("lowrank_down", given | {"up": x}),
    }


def _gemm(kind: str, bits: int, activation_bits: int, f32: bool, groupings: tuple) -> dict:
    few = kind == "decode"
    tokens = 16 if few else 512
    dtype = torch.float32 if f32 else torch.bfloat16

    def given(
        columns: int = COLUMNS, extras: bool = True, zeros: bool = False, group=groupings[0]
    ) -> dict:
        groups = columns // group if group else 1
        padded = -(-columns // 128) * 128
        weight = {
            "weight_packed": torch.empty(
                OUTPUTS, padded // 2 if bits == 4 else columns, dtype=torch.int8
            ),
            "weight_scale": torch.empty(OUTPUTS, groups),
            "group_size": group,
        }
        if bits == 4:
            zero = torch.empty(OUTPUTS, groups, dtype=torch.int8) if zeros else None
            weight["weight_zero_point"] = zero
        if activation_bits == 8:
            inputs = {"q": torch.empty(tokens, padded, dtype=torch.int8)}
            inputs["scale"] = torch.empty(tokens)
        else:
            inputs = {"u": torch.empty(tokens, columns, dtype=dtype)}
        rest = dict.fromkeys(("bias", "h", "lr_b", "modality"))
        if extras:
            rest["bias"] = torch.empty(OUTPUTS, dtype=dtype)
        if extras and not few:
            factors = MODALITIES - 1
            rest["h"] = torch.empty(tokens, factors * RANK, dtype=dtype)
            rest["lr_b"] = torch.empty(factors, RANK, OUTPUTS, dtype=torch.float16)
            rest["modality"] = torch.zeros(tokens, dtype=torch.int32)
        return inputs | weight | rest | {"dtype": dtype}

    op = f"gemm_w{bits}a{activation_bits}"
    variants = {"rank, bias": given(), "bare": given(extras=False)}
    if bits == 4 and kind != "hopper":
        variants[ZERO_POINT] = given(zeros=True)
    if groupings == (0,):  # whole groups leave no rest
        variants["ragged"] = given(COLUMNS - 48)
    if len(groupings) > 1:
        variants["other group"] = given(group=groupings[1])
    if kind == "hopper":
        variants["f32 output"] = given() | {"dtype": torch.float32}
    return {name: (op, arguments) for name, arguments in variants.items()}
