"""`masquant bench --tune`: time the candidate tiles of the GPU kernels on this GPU.

Nothing is tuned at run time: this writes a table of the form of masquant_kernels/gpu/tiles.json,
which `--tiles` or `masquant_kernels.gpu.tiles.load_table` puts in front of the shipped one. A
candidate must agree with the reference, and beat the shipped tile by more than noise.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from masquant_kernels import dispatch, ops, reference

from masquant_cli.bench import commands, gate
from masquant_cli.bench.about import about, device_of
from masquant_cli.bench.kernels import Settings
from masquant_cli.bench.measure import Candidate, compare
from masquant_cli.bench.operands import EPS, Tokens, Weights, activations
from masquant_cli.bench.roofline import Roof
from masquant_cli.bench.shapes import Linear
from masquant_cli.bench.timing import Clock
from masquant_cli.errors import EnvironmentProblem
from masquant_cli.progress import Progress

NOISE = 1.03  # a tile must be this much faster than the shipped one to be written down
SHIPPED = "shipped"
RATIO = 0.05


def run_tune(options: commands.Options, progress: Progress) -> dict:
    """Writes the table and returns what was measured. EnvironmentProblem without a GPU."""
    device = device_of("cuda" if options.device == "auto" else options.device)
    if device.type != "cuda":
        raise EnvironmentProblem("tiles are tuned on a GPU", where="--tune")
    try:
        from masquant_kernels.gpu import common, tiles
    except ImportError as error:
        raise EnvironmentProblem(f"Triton is needed: {error}", where="--tune") from None
    arch = common.arch_of(device)  # whose rows this GPU reads
    if arch is None:
        raise EnvironmentProblem("no kernel of ours runs on this GPU", where="--tune")
    settings = commands.op_settings(options, device)
    path = options.output or Path(f"tiles-sm_{arch}.json")
    clock = Clock(device, **({"repeats": options.repeats} if options.repeats else {}))
    document = {"bench": "tune", "machine": about(device), "rows": [], "table": str(path)}
    for row in search(tiles, arch, settings, clock, progress):
        document["rows"].append(row)
        commands.write(table(arch, document["rows"]), path)
    return document | {"failed": [], "verdict": []}


@dataclass(frozen=True)
class Work:
    """One lookup in the table of tiles, and a call that makes it."""

    entry: str  # name in the table
    backend: str
    op: str
    given: Mapping
    outputs: int  # what the lookup calls so


def search(tiles, arch: int, settings: Settings, clock: Clock, progress: Progress) -> Iterator:
    """The fastest tile of every op, linear and token count, with its gain over the shipped one."""
    progress.stage("tune", len(settings.linears) * len(settings.tokens), "shapes")
    for linear in settings.linears:
        for tokens in settings.tokens:
            for work in _works(linear, tokens, settings, clock.device, arch):
                best = _best(tiles, arch, work, clock)
                if best is not None:
                    place = {"op": work.entry, "shape": linear.shape, "tokens": tokens}
                    yield place | {"columns": linear.k, "outputs": work.outputs} | best
            progress.advance(1)


def _works(linear: Linear, count: int, settings: Settings, device, arch: int) -> Iterator[Work]:
    weights = Weights(linear, device, settings.seed, RATIO)
    x = activations(linear, Tokens(count, settings.dtype), device)
    q, scale = reference.smooth_quant(x, weights.smooth_inv, None, 8)
    wide = "_f32" if x.dtype == torch.float32 else ""
    site = {"x": x, "smooth_inv": weights.smooth_inv, "modality": None, "bits": 8}
    site |= {"norm_weight": weights.norm, "eps": EPS, "up": None}
    yield Work("smooth_quant", "triton", "smooth_quant", site, 0)
    if weights.rank:
        vision = torch.ones(count, dtype=torch.int32, device=device)
        down = {"x": x, "smooth_inv": weights.smooth_inv, "modality": vision, "lr_a": weights.lr_a}
        down |= {"norm_weight": None, "eps": 0.0, "up": None}
        yield Work(f"lowrank_down{wide}", "triton", "lowrank_down", down, weights.rank)
    rest = {"bias": None, "h": None, "lr_b": None, "modality": None, "dtype": x.dtype}
    kind = "decode" if count <= ops.DECODE_TOKENS else "gemm"
    for bits, packed in ((4, weights.packed4), (8, weights.packed8)):
        given = {"q": q, "scale": scale, "weight_packed": packed, "weight_scale": weights.scale}
        given |= ({"weight_zero_point": None} if bits == 4 else {}) | {"group_size": 0} | rest
        op = f"gemm_w{bits}a8"
        yield Work(f"{kind}_w{bits}a8", "triton", op, given, linear.n)
        hopper = len(dispatch.functions(op, device.type, "hopper")) > 1  # not only the reference
        if arch == 90 and kind == "gemm" and hopper:
            yield Work(f"hopper_w{bits}a8", "hopper", op, given, linear.n)
    given = {"u": x, "weight_packed": weights.packed4, "weight_scale": weights.scale}
    given |= {"weight_zero_point": None, "group_size": 0} | rest
    yield Work(f"{kind}_w4a16{wide}", "triton", "gemm_w4a16", given, linear.n)


def _best(tiles, arch: int, work: Work, clock: Clock) -> dict | None:
    """{tile, seconds, speedup} of the fastest right tile; None when the shipped one is as good."""
    found = {SHIPPED: None} | {str(i): t for i, t in enumerate(tiles.candidates(work.entry, arch))}
    candidates = [_candidate(tiles, key, tile, work) for key, tile in found.items()]
    rows = {row["name"]: row for row in compare(candidates, clock, Roof(1.0, {"int8": 1.0}))}
    timed = {key: row["seconds"] for key, row in rows.items() if "seconds" in row}
    if not timed:
        return None
    key = min(timed, key=timed.get)
    shipped = timed.get(SHIPPED)  # None: it was wrong
    if key == SHIPPED or (shipped is not None and shipped < NOISE * timed[key]):
        return None
    gain = shipped / timed[key] if shipped is not None else None
    return {"tile": found[key], "seconds": timed[key], "speedup": gain}


def _candidate(tiles, key: str, tile: dict | None, work: Work) -> Candidate:
    call, arguments = getattr(torch.ops.masquant, work.op), tuple(work.given.values())

    def inside(run: Callable):
        with dispatch.force(work.backend):
            if tile is None:
                return run()
            with tiles.override(work.entry, tile):
                return run()

    def check():
        backend, found = inside(lambda: gate.check_op(work.op, work.given))
        if backend != work.backend:
            raise RuntimeError(f"{work.backend} does not cover this")
        return found

    return Candidate(key, lambda _i: inside(lambda: call(*arguments)), check, 0.0, 1.0, "int8")


def table(arch: int, rows: list[dict]) -> dict:
    """As tiles.json has them: the first row whose bounds hold is taken, so small shapes first."""
    bounds = {"max_tokens": "tokens", "max_columns": "columns", "max_outputs": "outputs"}
    found: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda r: [r[value] for value in bounds.values()]):
        entry = {key: row[value] for key, value in bounds.items()} | row["tile"]
        found.setdefault(row["op"], []).append(entry)
    return {str(arch): found}
