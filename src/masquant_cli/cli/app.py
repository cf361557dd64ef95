"""The commands, each a thin function, and `main`, the one place errors become exit codes.

Nothing heavy is imported up here, so that --help answers at once.
"""

import io
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from masquant_cli import __version__
from masquant_cli.cli import bench, compare, inspect, lmms, report, sweep
from masquant_cli.cli.common import (
    Against,
    Config,
    DryRun,
    Json,
    ModelDir,
    On,
    Quiet,
    Reuse,
    RunDir,
    Set,
    do,
    narrowed,
    read_recipe,
    show_plan,
)
from masquant_cli.cli.processes import working
from masquant_cli.errors import MasquantError, RecipeError

app = typer.Typer(
    name="masquant",
    help="Quantize a multimodal LLM so that every modality stays accurate.",
    epilog="Start with: masquant demo. Shipped recipes: masquant recipes.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.add_typer(bench.app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"masquant {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    config: Config, run_dir: RunDir = None, set_: Set = None, reuse: Reuse = None,
    json: Json = False, dry_run: DryRun = False, on: On = None, quiet: Quiet = False,
) -> None:  # fmt: skip
    """All stages: recipe in, low-bit checkpoint out.

    With several processes: torchrun --nproc-per-node N -m masquant_cli run ...
    """
    if on and not dry_run:
        raise RecipeError("--on is for --dry-run", where=f"--on {on}", hint="run it there")
    _stages("export", config, run_dir, set_, reuse, json, dry_run, quiet, on)


@app.command()
def calibrate(
    config: Config, run_dir: RunDir = None, set_: Set = None, reuse: Reuse = None,
    json: Json = False, dry_run: DryRun = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Collect per-modality activation statistics, layer by layer."""
    _stages("calibrate", config, run_dir, set_, reuse, json, dry_run, quiet)


@app.command()
def smooth(
    config: Config, run_dir: RunDir = None, set_: Set = None, reuse: Reuse = None,
    json: Json = False, dry_run: DryRun = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Choose the scales of every modality, calibrating if need be."""
    _stages("smooth", config, run_dir, set_, reuse, json, dry_run, quiet)


@app.command()
def compensate(
    config: Config, run_dir: RunDir = None, set_: Set = None, reuse: Reuse = None,
    json: Json = False, dry_run: DryRun = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Solve the low-rank corrections, after all they need."""
    _stages("compensate", config, run_dir, set_, reuse, json, dry_run, quiet)


@app.command()
def export(
    config: Config, run_dir: RunDir = None, set_: Set = None, reuse: Reuse = None,
    json: Json = False, dry_run: DryRun = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Write and verify the checkpoint, after all it needs."""
    _stages("export", config, run_dir, set_, reuse, json, dry_run, quiet)


@app.command("eval")
def evaluate(
    config: Config, run_dir: RunDir = None, set_: Set = None,
    model: ModelDir = None, against: Against = None,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this task, or a benchmark; repeatable."),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="At most this many per task.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget the answers kept so far.")] = False,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Score rows that were calibrated on, too.")
    ] = False,
    backend: Annotated[
        Literal["masquant", "lmms-eval"], typer.Option(help="Whose tasks --task names.")
    ] = "masquant",
    json: Json = False, dry_run: DryRun = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Score the tasks, and the distance from float by modality."""
    recipe, where = read_recipe(config, run_dir, set_)
    if backend == "lmms-eval":
        lmms.refuse({"--against": against, "--fresh": fresh, "--allow-overlap": allow_overlap})
        if dry_run:
            return show_plan(recipe, where, (), "export", json, task or ())
        return lmms.evaluate(recipe, where, model, task or (), samples, json, quiet)
    recipe = narrowed(recipe, task or (), samples)
    if dry_run:
        tasks = [t.name for t in recipe.evaluation.tasks]
        return show_plan(recipe, where, (), "export", json, tasks)

    def work(progress) -> dict[str, Any]:
        from masquant_cli import pipeline

        return pipeline.evaluate(
            recipe, where, model=model, against=against,
            fresh=fresh, allow_overlap=allow_overlap, progress=progress,
        )  # fmt: skip

    do(work, "evaluation", json, quiet)


app.command("compare")(compare.compare)
app.command("sweep")(sweep.sweep)
app.command("inspect")(inspect.inspect)
app.command("report")(report.report)


@app.command()
def demo(
    run_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="Where its runs live.", show_default=True)
    ] = Path("runs/demo"),
    samples: Annotated[
        int, typer.Option(min=1, help="At most this many per task; there are 500.")
    ] = 200,
    json: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Quantize the embedded model several ways; one table."""

    def work(progress) -> dict[str, Any]:
        from masquant_cli.demo import demo

        return demo(run_dir, progress=progress, samples=samples)

    do(work, "comparison", json, quiet)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe instead.")] = None,
    json: Json = False,
) -> None:
    """List the shipped recipes, or print one to start from."""
    from masquant_cli import recipe_yaml
    from masquant_cli.cli import render

    if name:
        file = recipe_yaml.find(name)
        document = {"path": file, "text": file.read_text(encoding="utf-8")}
        return render.output(document, json, lambda d: print(d["text"], end=""))
    found = {n: (file, recipe_yaml.load(str(file))) for n, file in recipe_yaml.shipped().items()}
    listing = {
        name: {"path": file, "model": r.model.path, "modalities": r.modalities,
               "weights": r.weights.bits, "activations": r.activations.bits}
        for name, (file, r) in found.items()
    }  # fmt: skip
    render.output({"recipes": listing}, json, render.recipe_list)


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Option(metavar="DIR|ID", help="What masquant finds in this model.")
    ] = None,
    json: Json = False,
) -> None:
    """Check this machine, or whether a model is supported."""
    from masquant_cli.cli import doctor as check
    from masquant_cli.cli import render

    if model is not None:
        document = check.examine_model(model)
        render.output(document, json, check.show_model)
        if not document["supported"]:
            raise typer.Exit(2)
        return
    report = check.examine()
    render.output(report, json, render.doctor)
    if report["problems"]:
        raise typer.Exit(3)


def _stages(until, config, run_dir, overrides, reuse, json, dry_run, quiet, on=None) -> None:
    recipe, where = read_recipe(config, run_dir, overrides)
    if dry_run:
        return show_plan(recipe, where, reuse or (), until, json, on=on)

    def work(progress) -> dict[str, Any]:
        from masquant_cli import pipeline

        return pipeline.run(recipe, where, until=until, reuse=reuse or (), progress=progress)

    do(work, "stages", json, quiet)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code. Every failure says what, where and what next."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path the terminal cannot show is no error
            stream.reconfigure(errors="backslashreplace")
    try:
        with working(argv):
            code = app(args=argv, prog_name="masquant", standalone_mode=False)
    except SystemExit:
        raise
    except BaseException as error:
        from masquant_cli.cli import failure

        return failure.report(error, json="--json" in argv)
    if code == 130:  # Typer turns Ctrl-C into this exit code
        from masquant_cli.cli import failure

        return failure.report(KeyboardInterrupt(), json="--json" in argv)
    return code if isinstance(code, int) else 0


__all__ = ["MasquantError", "app", "main"]
