"""`masquant bench`: a run's two models end to end, or kernels, layers and random models."""

from pathlib import Path
from typing import Annotated, Any

import typer

from masquant_cli.cli.common import (
    Against,
    DryRun,
    Json,
    ModelDir,
    Quiet,
    RunDir,
    Set,
    do,
    read_recipe,
    show_plan,
)
from masquant_cli.errors import EXIT_CHECK, RecipeError

app = typer.Typer(rich_markup_mode=None, invoke_without_command=True)

Preset = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME", help="A preset, config.json, folder or hub id."),
]
Shape = Annotated[
    list[str] | None,
    typer.Option("--shape", metavar="KxN", help="Inputs x outputs of one linear; repeatable."),
]
Tokens = Annotated[str | None, typer.Option(metavar="T,...", help="Token counts: 1,16,256,2048.")]
Ratios = Annotated[
    str | None, typer.Option("--rank-ratio", metavar="R,...", help="Rank ratios: 0,.01,.02,.05.")
]
Vision = Annotated[
    str | None, typer.Option(metavar="P,...", help="Percent of vision tokens: 0,50,100.")
]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where to measure.")]
Dtype = Annotated[
    str | None, typer.Option(metavar="DTYPE", help="Of activations: float32, bfloat16, float16.")
]
Repeats = Annotated[int | None, typer.Option(min=1, help="Rounds, all compared in each.")]
Seed = Annotated[int, typer.Option(help="Of the random operands.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the JSON here too.")
]
Tiles = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Use a table of tiles that --tune wrote.")
]
Tune = Annotated[
    bool, typer.Option("--tune", help="Time the candidate tiles on this GPU; write a table.")
]


@app.callback(help="Time float against quantized on this machine, end to end, or part by part.")
def bench(
    context: typer.Context,
    config: Annotated[
        str | None,
        typer.Option("--config", "-c", metavar="RECIPE", help="A recipe file or a shipped recipe."),
    ] = None,
    run_dir: RunDir = None, set_: Set = None,
    model: ModelDir = None, against: Against = None, tune: Tune = False, output: Output = None,
    json: Json = False, dry_run: DryRun = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    if context.invoked_subcommand:
        return
    if tune:
        return _tune({"output": output}, json, quiet)
    if config is None:
        raise RecipeError(
            "bench needs a recipe, or a part to measure", where="masquant bench",
            hint="-c RECIPE times a run's two models; or: masquant bench kernels | layers | model",
        )  # fmt: skip
    recipe, where = read_recipe(config, run_dir, set_)
    if dry_run:
        return show_plan(recipe, where, (), "export", json)

    def work(progress) -> dict[str, Any]:
        from masquant_cli import pipeline

        return pipeline.bench(recipe, where, model=model, against=against, progress=progress)

    document = do(work, "benchmark", json, quiet)
    if output:
        from masquant_cli.bench import commands

        commands.write(document, output)


@app.command()
def kernels(
    model: Preset = None, shape: Shape = None, tokens: Tokens = None, ratios: Ratios = None,
    vision: Vision = None, device: Device = "auto", dtype: Dtype = None, repeats: Repeats = None,
    seed: Seed = 0, tune: Tune = False, tiles: Tiles = None, output: Output = None,
    json: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Every op on its own, beside dense float, other integer and fp8 products, and the roofline."""
    given = _given(model, shape, tokens, ratios, vision, device, dtype, repeats, seed)
    given |= {"tiles": tiles, "output": output}
    _tune(given, json, quiet) if tune else _measure("kernels", given, json, quiet)


@app.command()
def layers(
    model: Preset = None, shape: Shape = None, tokens: Tokens = None, ratios: Ratios = None,
    vision: Vision = None, device: Device = "auto", dtype: Dtype = None, repeats: Repeats = None,
    seed: Seed = 0, tiles: Tiles = None, output: Output = None,
    json: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """A decoder layer's linears with quantization and low rank included, beside dense float."""
    given = _given(model, shape, tokens, ratios, vision, device, dtype, repeats, seed)
    _measure("layers", given | {"tiles": tiles, "output": output}, json, quiet)


@app.command("model")
def whole_model(
    model: Preset = None, ratios: Ratios = None, vision: Vision = None,
    batch: Annotated[str | None, typer.Option(metavar="B,...", help="Batch sizes: 1,8.")] = None,
    sequence: Annotated[int | None, typer.Option(min=1, help="Tokens of the prompt.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Decode steps after it.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Only so many of its layers.")] = None,
    device: Device = "auto", dtype: Dtype = None, repeats: Repeats = None, seed: Seed = 0,
    tiles: Tiles = None, output: Output = None, json: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """A whole model with random weights: latency, speed-up, memory, saving; prefill and decode."""
    given = _given(model, None, None, ratios, vision, device, dtype, repeats, seed)
    given |= {"batches": _numbers("--batch", batch, int, 1), "sequence": sequence, "steps": steps}
    given |= {"layers": layers, "tiles": tiles, "output": output}
    _measure("model", given, json, quiet)


def _measure(what: str, given: dict[str, Any], json: bool, quiet: bool) -> None:
    def work(progress) -> dict[str, Any]:
        from masquant_cli.bench import commands

        return getattr(commands, f"run_{what}")(commands.Options(**given), progress)

    document = do(work, f"bench {what}", json, quiet)
    if document["failed"]:
        raise typer.Exit(EXIT_CHECK)


def _tune(given: dict[str, Any], json: bool, quiet: bool) -> None:
    def work(progress) -> dict[str, Any]:
        from masquant_cli.bench import commands, tune

        return tune.run_tune(commands.Options(**given), progress)

    do(work, "bench tune", json, quiet)


def _given(model, shape, tokens, ratios, vision, device, dtype, repeats, seed) -> dict[str, Any]:
    if device not in ("auto", "cpu", "cuda"):
        raise RecipeError(f"{device!r} is no device", where="--device", hint="auto, cpu or cuda")
    return {
        "model": model, "shapes": tuple(shape or ()), "device": device, "dtype": dtype,
        "tokens": _numbers("--tokens", tokens, int, 1),
        "ratios": _numbers("--rank-ratio", ratios, float, 0, 1),
        "vision": _numbers("--vision", vision, float, 0, 100),
        "repeats": repeats, "seed": seed,
    }  # fmt: skip


def _numbers(option: str, text: str | None, kind: type, low: float, high: float = float("inf")):
    """ "1,16,256" -> (1, 16, 256); RecipeError for anything else."""
    if text is None:
        return None
    try:
        values = tuple(kind(part) for part in text.replace("%", "").split(",") if part.strip())
    except ValueError:
        values = ()
    if not values or not all(low <= value <= high for value in values):
        bounds = f"at least {low:g}" if high == float("inf") else f"from {low:g} to {high:g}"
        hint = f"numbers with commas between them, {bounds}"
        raise RecipeError(f"cannot read {text!r}", where=option, hint=hint)
    return values
