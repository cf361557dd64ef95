"""`masquant bench kernels | layers | model`: options in, one JSON-able document out.

Defaults depend on the device: on a GPU the paper's model and token counts, on a CPU shapes and
counts that end within minutes.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from masquant_cli.bench import kernels, layers, measure, model, peers
from masquant_cli.bench.about import about, device_of
from masquant_cli.bench.roofline import measure_roof
from masquant_cli.bench.shapes import CPU_SHAPES, Linear, decoder, linear
from masquant_cli.bench.timing import Clock
from masquant_cli.errors import EnvironmentProblem, RecipeError
from masquant_cli.progress import Progress

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Options:
    """As given on the command line; None: the device's default."""

    device: str = "auto"
    model: str | None = None
    shapes: Sequence[str] = ()
    tokens: Sequence[int] | None = None
    ratios: Sequence[float] | None = None
    vision: Sequence[float] | None = None  # percent
    dtype: str | None = None
    repeats: int | None = None
    seed: int = 0
    batches: Sequence[int] | None = None
    sequence: int | None = None
    steps: int | None = None
    layers: int | None = None
    tiles: Path | None = None  # a table that `--tune` wrote
    output: Path | None = None
    quick: bool = False  # a roofline of tests, whose numbers mean nothing


def run_kernels(options: Options, progress: Progress) -> dict:
    """Every op at every shape, token count, rank ratio and vision share."""
    return _ops("kernels", options, progress, lambda settings, clock, roof: kernels.rows(
        settings, clock, roof, progress
    ))  # fmt: skip


def run_layers(options: Options, progress: Progress) -> dict:
    """Linears with their quantization, and with a model's four, the layer."""
    whole = not options.shapes and _model_name(options, device_of(options.device)) is not None
    return _ops("layers", options, progress, lambda settings, clock, roof: layers.rows(
        settings, clock, roof, progress, layer=whole
    ))  # fmt: skip


def _ops(what: str, options: Options, progress: Progress, rows) -> dict:
    device = device_of(options.device)
    _load_tiles(options, device)
    settings = op_settings(options, device)
    clock = Clock(device, **({"repeats": options.repeats} if options.repeats else {}))
    progress.note(f"{device.type}: measuring bandwidth and peaks")
    roof = measure_roof(device, small=options.quick)
    document = _header(what, options, device) | {
        "settings": {
            "linears": {x.name: x.shape for x in settings.linears},
            "tokens": list(settings.tokens),
            "rank_ratios": [0.0, *settings.ratios],
            "vision": [0.0, *settings.vision],
            "dtype": peers.say(settings.dtype),
            "repeats": clock.repeats,
        },
        "roofline": roof.as_dict(),
        "peers": peers.availability(),
    }
    return _collect(document, rows(settings, clock, roof), options, progress)


def op_settings(options: Options, device: torch.device) -> kernels.Settings:
    cuda = device.type == "cuda"
    default = (0.01, 0.02, 0.05) if cuda else (0.05,)
    ratios = options.ratios if options.ratios is not None else default
    vision = options.vision if options.vision is not None else (50, 100)
    return kernels.Settings(
        linears=_linears(options, device),
        tokens=options.tokens or ((1, 16, 256, 2048) if cuda else (1, 16, 256, 512)),
        ratios=[r for r in ratios if r],
        vision=[share / 100 for share in vision if share],
        dtype=_dtype(options, device),
        seed=options.seed,
    )


def _linears(options: Options, device: torch.device) -> Sequence[Linear]:
    if options.shapes:
        return [linear(text) for text in options.shapes]
    name = _model_name(options, device)
    return decoder(name).linears if name else [linear(text) for text in CPU_SHAPES]


def _model_name(options: Options, device: torch.device) -> str | None:
    return options.model or ("qwen2.5-vl-7b" if device.type == "cuda" else None)


def _dtype(options: Options, device: torch.device) -> torch.dtype:
    name = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if name not in DTYPES:
        raise RecipeError(f"{name!r} is no float dtype", where="--dtype", hint=", ".join(DTYPES))
    return DTYPES[name]


def run_model(options: Options, progress: Progress) -> dict:
    """Prefill and decode of a whole model, as the paper's Table 7 has them."""
    if options.shapes:
        raise RecipeError("a whole model has its own shapes", where="--shape")
    device = device_of(options.device)
    _load_tiles(options, device)
    cuda = device.type == "cuda"
    dtype = _dtype(options, device)
    vision = options.vision if options.vision is not None else ((0, 50, 100) if cuda else (0, 100))
    settings = model.Settings(
        decoder=decoder(options.model or ("qwen2.5-vl-7b" if cuda else "qwen2-100m")),
        batches=options.batches or ((1, 8) if cuda else (1,)),
        sequence=options.sequence or (2048 if cuda else 512),
        steps=options.steps or (32 if cuda else 16),
        ratios=options.ratios if options.ratios is not None
        else ((0.0, 0.01, 0.02, 0.05) if cuda else (0.0, 0.05)),
        vision=[share / 100 for share in vision],
        float_dtypes=(torch.bfloat16,) if cuda else (torch.float32, torch.bfloat16),
        dtype=dtype,
        layers=options.layers,
        seed=options.seed,
    )  # fmt: skip
    clock = Clock(device, repeats=options.repeats or (5 if cuda else 3))
    document = _header("model", options, device) | {
        "settings": {
            "model": settings.decoder.name,
            "layers": settings.layers or settings.decoder.layers,
            "sequence": settings.sequence,
            "decode_steps": settings.steps,
            "dtype": peers.say(dtype),
            "repeats": clock.repeats,
        }
    }
    return _collect(document, model.rows(settings, clock, progress), options, progress)


def _header(what: str, options: Options, device: torch.device) -> dict:
    return {"bench": what, "machine": about(device), "seed": options.seed}


def _collect(
    document: dict, tables: Iterator[list[dict]], options: Options, progress: Progress
) -> dict:
    """Rows as they come, into the output file too, so that an interrupted run keeps them."""
    document |= {"rows": []}
    for rows in tables:
        document["rows"] += rows
        for failure in measure.failures(rows):
            progress.warn(f"not timed, as it is wrong: {failure}")
        write(document, options.output)
    said = model.verdicts if document["bench"] == "model" else measure.verdicts
    document["verdict"] = said(document["rows"])
    document["failed"] = measure.failures(document["rows"])
    write(document, options.output)
    return document


def write(document: dict, path: Path | None) -> None:
    """JSON, whole or not at all. Raises RecipeError where it cannot be written."""
    if path is None:
        return
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(finite(document), indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
    except (IsADirectoryError, NotADirectoryError, FileExistsError) as error:
        raise RecipeError(f"cannot be written: {error}", where=str(path)) from None


def finite(value):
    """JSON has no infinity and no NaN: null instead."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not (abs(value) < float("inf")):
        return None
    return value


def _load_tiles(options: Options, device: torch.device) -> None:
    if options.tiles is None:
        return
    if device.type != "cuda":
        raise EnvironmentProblem("tiles are for GPUs", where="--tiles")
    from masquant_kernels.gpu.tiles import load_table

    try:
        load_table(options.tiles)
    except (OSError, ValueError, AttributeError) as error:
        raise RecipeError(f"not a table of tiles: {error}", where=str(options.tiles)) from None
