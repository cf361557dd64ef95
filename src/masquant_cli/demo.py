"""The main job on the embedded model: four ways to run it, one table.

Float, round-to-nearest, SmoothQuant and MASQuant at W4A8 and W4A6, on the same samples. One
calibration serves them all, because it depends on neither the method nor the bits.
"""

from pathlib import Path

from masquant_cli import recipe_yaml
from masquant_cli.errors import RecipeError
from masquant_cli.pipeline import run
from masquant_cli.progress import NullProgress, Progress
from masquant_cli.recipe import Recipe

RECIPES = ("tiny-omni-w4a8", "tiny-omni-w4a6")
METHODS = ("rtn", "smoothquant", "masquant")


def demo(run_root: Path, *, progress: Progress | None = None, samples: int | None = None) -> dict:
    """Run and evaluate everything. Returns {"rows", "metrics", "export_dir", "load", "runs"}.

    A row holds method, bits, tasks {name: value}, sqnr_db {modality: dB} and the bytes of the
    quantized linears. `samples` caps the samples per task. Finished stages are reused.
    """
    from masquant_cli.models.loading import load_float
    from masquant_cli.stages.evaluate import evaluate
    from masquant_cli.stages.judge import load_beside
    from masquant_cli.stages.prepare import prepare_all

    progress = progress or NullProgress()
    first = recipe_yaml.load(RECIPES[0], _cap(samples))
    original = load_float(first.model, first.device)
    prepared = prepare_all(
        first.evaluation,
        original.processor,
        modalities=first.modalities,
        seed=first.seed,
        progress=progress,
    )

    def judge(model, float_model=None) -> dict:
        return evaluate(
            model,
            original.processor,
            first.evaluation,
            modalities=first.modalities,
            seed=first.seed,
            float_model=float_model,
            prepared=prepared,
            progress=progress,
        )

    found = judge(original.model)
    rows = [_row("float", "", found, None)]
    metrics = {name: task["metric"] for name, task in found["tasks"].items()}
    runs: dict[str, dict] = {}
    shared: list[Path] = []
    for name in RECIPES:
        for method in METHODS:
            recipe = recipe_yaml.load(name, [f"method={method}", *_cap(samples)])
            bits = f"W{recipe.weights.bits}A{recipe.activations.bits}"
            progress.note(f"{method} {bits}")
            done = run(
                _verified_if_ours(recipe),
                Path(run_root) / f"{name}-{method}",
                reuse=shared,
                progress=progress,
            )
            shared = shared or [Path(done["run_dir"])]
            runs[f"{name}-{method}"] = done
            model = load_beside(original.model, Path(done["export_dir"]), progress)
            size = done["stages"]["export"]["bytes"]["quantized"]
            rows.append(_row(method, bits, judge(model, original.model), size))
    ours = runs[f"{RECIPES[0]}-masquant"]["export_dir"]
    return {
        "rows": rows,
        "metrics": metrics,
        "export_dir": ours,
        "load": f"import masquant_cli; model = masquant_cli.load_quantized({ours!r})",
        "runs": runs,
    }


def _cap(samples: int | None) -> list[str]:
    """Overrides that cap every task of the shipped recipe."""
    if samples is None:
        return []
    if samples < 1:
        raise RecipeError("samples must be at least 1", where="--samples")
    tasks = recipe_yaml.load(RECIPES[0]).evaluation.tasks
    return [f"evaluation.tasks.{i}.samples={samples}" for i in range(len(tasks))]


def _verified_if_ours(recipe: Recipe) -> Recipe:
    """The baselines are not for shipping: spare their reload in a fresh process."""
    export = recipe.export.model_copy(update={"verify": recipe.method == "masquant"})
    return recipe.model_copy(update={"export": export})


def _row(method: str, bits: str, found: dict, size: int | None) -> dict:
    return {
        "method": method,
        "bits": bits,
        "tasks": {name: task["value"] for name, task in found["tasks"].items()},
        "sqnr_db": found.get("sqnr_db", {}),
        "kl": found.get("kl", {}),
        "flip_rate": found.get("flip_rate", {}),
        "bytes": size,
    }
