"""`masquant bench --tune`: time the candidate tiles of the plain Triton kernels on this GPU.

Nothing is tuned at run time: this writes a table of the form of masquant_kernels/gpu/tiles.json,
which `--tiles` or `masquant_kernels.gpu.tiles.load_table` puts in front of the shipped one. A
candidate must agree with the reference, and beat the shipped tile by more than noise.
"""

from collections.abc import Callable, Iterator, Mapping
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


def search(tiles, arch: int, settings: Settings, clock: Clock, progress: Progress) -> Iterator:
    """The fastest tile of every op, linear and token count, with its gain over the shipped one."""
    progress.stage("tune", len(settings.linears) * len(settings.tokens), "shapes")
    for linear in settings.linears:
        for tokens in settings.tokens:
            for name, op, given in _work(linear, tokens, settings, clock.device):
                best = _best(tiles, arch, name, op, given, clock)
                if best is not None:
                    place = {"op": name, "shape": linear.shape, "tokens": tokens}
                    yield place | {"columns": linear.k, "outputs": linear.n} | best
            progress.advance(1)


def _work(linear: Linear, count: int, settings: Settings, device) -> Iterator[tuple]:
    """(name in the table, op, its arguments)."""
    weights = Weights(linear, device, settings.seed, RATIO)
    x = activations(linear, Tokens(count, settings.dtype), device)
    q, scale = reference.smooth_quant(x, weights.smooth_inv, None, 8)
    site = {"x": x, "smooth_inv": weights.smooth_inv, "modality": None, "bits": 8}
    front = {"norm_weight": weights.norm, "eps": EPS, "up": None}
    yield "smooth_quant", "smooth_quant", site | front
    vision = torch.ones(count, dtype=torch.int32, device=device)
    if weights.rank:
        down = {"x": x, "smooth_inv": weights.smooth_inv, "modality": vision, "lr_a": weights.lr_a}
        yield "lowrank_down", "lowrank_down", down | {"norm_weight": None, "eps": 0.0, "up": None}
    rest = {"bias": None, "h": None, "lr_b": None, "modality": None, "dtype": x.dtype}
    kind = "decode" if count <= ops.DECODE_TOKENS else "gemm"
    for bits, packed in ((4, weights.packed4), (8, weights.packed8)):
        given = {"q": q, "scale": scale, "weight_packed": packed, "weight_scale": weights.scale}
        given |= ({"weight_zero_point": None} if bits == 4 else {}) | {"group_size": 0} | rest
        yield f"{kind}_w{bits}a8", f"gemm_w{bits}a8", given
    given = {"u": x, "weight_packed": weights.packed4, "weight_scale": weights.scale}
    yield "gemm_w4a16", "gemm_w4a16", given | {"weight_zero_point": None, "group_size": 0} | rest


def _best(tiles, arch: int, name: str, op: str, given: Mapping, clock: Clock) -> dict | None:
    """{tile, seconds, speedup} of the fastest right tile; None when the shipped one is as good."""
    found = {SHIPPED: None} | {str(i): t for i, t in enumerate(tiles.candidates(name, arch))}
    candidates = [_candidate(tiles, key, tile, name, op, given) for key, tile in found.items()]
    rows = {row["name"]: row for row in compare(candidates, clock, Roof(1.0, {"int8": 1.0}))}
    timed = {key: row["seconds"] for key, row in rows.items() if "seconds" in row}
    if not timed:
        return None
    key = min(timed, key=timed.get)
    shipped = timed.get(SHIPPED, float("inf"))
    if key == SHIPPED or shipped < NOISE * timed[key]:
        return None
    gain = shipped / timed[key] if shipped < float("inf") else None
    return {"tile": found[key], "seconds": timed[key], "speedup": gain}


def _candidate(tiles, key: str, tile: dict | None, name: str, op: str, given: Mapping) -> Candidate:
    call, arguments = getattr(torch.ops.masquant, op), tuple(given.values())

    def inside(work: Callable):
        with dispatch.force("triton"):
            if tile is None:
                return work()
            with tiles.override(name, tile):
                return work()

    def check():
        backend, found = inside(lambda: gate.check_op(op, given))
        if backend != "triton":
            raise RuntimeError("Triton does not cover this")
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
