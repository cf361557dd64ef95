"""Which tile a kernel runs with: a lookup in tiles.json and hopper_tiles.json (for Gluon), by
architecture, op and shape.

The table maps arch -> op -> rows. A row holds a tile and the largest shape it is for
(max_tokens, max_outputs, max_columns; absent: any); the first row that fits is taken. Rows of an
architecture that is not listed are those of the next lower one. Nothing is tuned at run time:
`masquant bench --tune` measures `candidates` and writes a table for `load_table`.
"""

import contextlib
import functools
import itertools
import json
from pathlib import Path
from typing import NamedTuple

SHARED_MEMORY = {80: 163, 89: 99, 90: 227, 100: 227}  # KiB that one program may use
_DECODE = {
    "BT": (16,),
    "BN": (64, 128),
    "num_warps": (4,),
    "num_stages": (3, 5),
    "SPLIT": (1, 2, 4, 8, 16),
}
_GEMM = {
    "BT": (32, 64, 128, 256),
    "BN": (64, 128),
    "num_warps": (4, 8),
    "num_stages": (3, 4),
    "SPLIT": (1,),
}
_HOPPER = {
    "BT": (64, 128, 256),
    "BN": (128, 256),
    "STAGES": (3, 4, 5, 6),
    "num_warps": (8,),
    "SPLIT": (1,),
}
_SPACES = {  # what to vary when an op is tuned, by the start of its name
    "smooth_quant": {"BLOCK": (1024, 2048, 4096, 8192), "num_warps": (4, 8, 16), "SPLIT": (1,)},
    "lowrank_down": {
        "BT": (32, 64),
        "BR": (32, 64, 128),
        "BK": (64,),
        "num_warps": (4, 8),
        "num_stages": (3,),
        "SPLIT": (1, 2, 4, 8),
    },
    "decode_w4a8": _DECODE | {"BK": (128, 256)},
    "decode_w8a8": _DECODE | {"BK": (128, 256)},
    "decode_w4a16": _DECODE,
    "gemm_w4a8": _GEMM | {"BK": (128,)},
    "gemm_w8a8": _GEMM | {"BK": (128,)},
    "gemm_w4a16": _GEMM,
    "hopper": _HOPPER,
}
_BOUNDS = ("max_tokens", "max_columns", "max_outputs")


class Tile(NamedTuple):
    options: dict  # keyword arguments of the kernel's launch, num_warps and num_stages included
    split: int  # parts that the inputs are summed in (decode and lowrank_down), else 1


class _Row(NamedTuple):
    bounds: tuple  # as _BOUNDS; None: any
    tile: Tile

    def fits(self, shape: tuple) -> bool:
        return all(b is None or size <= b for b, size in zip(self.bounds, shape, strict=True))


_table: dict[int, dict[str, list[_Row]]] = {}
_forced: dict[str, Tile] = {}


@functools.lru_cache(4096)
def find(op: str, arch: int, tokens: int, columns: int, outputs: int = 0) -> Tile:
    """The tile of an op for a shape. Raises KeyError for an op that the table lacks."""
    if op in _forced:
        return _forced[op]
    for known in sorted(_table, reverse=True):
        if known <= arch and op in _table[known]:
            for row in _table[known][op]:
                if row.fits((tokens, columns, outputs)):
                    return row.tile
    raise KeyError(f"no tile for {op} on sm_{arch}")


def load_table(path: str | Path) -> None:
    """Put the rows of a table of tiles.json's form in front of those already there."""
    table = json.loads(Path(path).read_text(encoding="utf-8"))
    for arch, ops in table.items():
        for op, rows in ops.items():
            mine = _table.setdefault(int(arch), {})
            mine[op] = [_row(r) for r in rows] + mine.get(op, [])
    find.cache_clear()


def rows(arch: int) -> dict[str, list[dict]]:
    """{op: its tiles} for one architecture, as `override` takes them; for offline compilation."""
    return {
        op: [row.tile.options | {"SPLIT": row.tile.split} for row in found]
        for op, found in _table[arch].items()
    }


@contextlib.contextmanager
def override(op: str, tile: dict):
    """Use one tile for every shape of an op inside the block; "SPLIT" in it is Tile.split."""
    before = dict(_forced)
    _forced[op] = _tile(tile)
    find.cache_clear()
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
        find.cache_clear()


def candidates(op: str, arch: int) -> list[dict]:
    """Tiles worth timing for an op of the table, as `override` takes them: the table's own, then
    those of _SPACES that fit the chip."""
    known = max(a for a in _table if a <= arch and op in _table[a])
    found = rows(known)[op]
    for prefix, space in _SPACES.items():
        if op.startswith(prefix):
            tiles = (dict(zip(space, v, strict=True)) for v in itertools.product(*space.values()))
            found += [tile for tile in tiles if _fits(tile, op, arch)]
    return [tile for i, tile in enumerate(found) if tile not in found[:i]]


def _fits(tile: dict, op: str, arch: int) -> bool:
    """Whether a GEMM's sums stay within 128 registers a thread, its stages in shared memory."""
    if "BN" not in tile:
        return True
    sums = tile["BT"] * tile["BN"] // (32 * tile["num_warps"])
    if "grouped" in op or "fine" in op:
        sums *= 2  # those of the group and those of all groups
    if "STAGES" in tile:  # a ring of 128 inputs each, and a 16-bit tile of outputs
        weight = tile["BN"] * (64 if "w4" in op else 128)
        ring = tile["STAGES"] * (tile["BT"] * 128 + weight)
        staged = 2 * tile["BT"] * tile["BN"]
        return sums <= 128 and ring + staged + 1024 <= SHARED_MEMORY[arch] * 1024
    element = 1 if "a8" in op else 4 if "f32" in op else 2  # bytes of an activation
    stage = (tile["BN"] + tile["BT"] * element) * tile.get("BK", 128)
    return sums <= 128 and tile["num_stages"] * stage <= SHARED_MEMORY[arch] * 1024


def _row(entry: dict) -> _Row:
    bounds = tuple(entry.get(name) for name in _BOUNDS)
    return _Row(bounds, _tile({k: v for k, v in entry.items() if k not in _BOUNDS}))


def _tile(entry: dict) -> Tile:
    return Tile({k: v for k, v in entry.items() if k != "SPLIT"}, entry.get("SPLIT", 1))


for _name in ("tiles.json", "hopper_tiles.json"):
    load_table(Path(__file__).with_name(_name))
