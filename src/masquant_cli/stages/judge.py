"""eval and bench on folders: load the model in question and, when needed, its float original."""

import json
from pathlib import Path

from torch import nn

from masquant_cli.data.benchmarks import reading_of
from masquant_cli.data.samples import load_samples, refuse_kinds
from masquant_cli.errors import RecipeError
from masquant_cli.models.loading import Loaded, load_float
from masquant_cli.progress import Progress
from masquant_cli.recipe import Model, Recipe
from masquant_cli.rundir import RunDir, calibration_of, write_json
from masquant_cli.runtime import load_quantized
from masquant_cli.stages import leak, model_fingerprint
from masquant_cli.stages.bench import bench
from masquant_cli.stages.evaluate import evaluate


def evaluate_folder(
    recipe: Recipe,
    folder: Path,
    *,
    against: Path | None,
    progress: Progress,
    run: RunDir,
    fresh: bool = False,
    allow_overlap: bool = False,
) -> dict:
    """The recipe's evaluation of one folder; quantized ones are also compared with float.

    Answers are kept in, and taken from, RUN/eval/<model fingerprint>; the result is written
    there and to RUN/eval/result.json. Rows that the run calibrated on are refused.
    """
    if not recipe.evaluation.tasks:
        raise RecipeError(
            "the recipe has no evaluation tasks", where="evaluation.tasks",
            hint="add tasks, or name benchmarks with --task; `masquant recipes tiny-omni-w4a8` "
            "prints an example",
        )  # fmt: skip
    for task in recipe.evaluation.tasks:  # before anything large is loaded
        refuse_kinds(task.source, recipe.modalities, reading_of(task))
    quantized = is_quantized(folder)
    calibrated = leak.calibrated_on(calibration_of(run))
    if calibrated is None and run.stage("export").exists():
        progress.warn("this run's calibration is gone: overlap with it is not checked")
    fingerprint = model_fingerprint(Model(path=str(folder)))
    float_model = None
    if quantized:
        original = _float(recipe, against, progress)
        float_model, processor = original.model, original.processor
        model = load_beside(original.model, folder, progress)
    else:
        loaded = load_float(Model(path=str(folder), dtype=recipe.model.dtype), recipe.device)
        model, processor = loaded.model, loaded.processor
    kept = run.path / "eval" / fingerprint[:12]
    found = evaluate(
        model,
        processor,
        recipe.evaluation,
        modalities=recipe.modalities,
        seed=recipe.seed,
        float_model=float_model,
        progress=progress,
        cache=kept,
        fresh=fresh,
        calibrated=calibrated,
        allow_overlap=allow_overlap,
    )
    found = {
        "model": str(folder),
        "model_fingerprint": fingerprint,
        "recipe": recipe.name,
        **found,
    }
    for path in (kept / "result.json", run.path / "eval" / "result.json"):
        write_json(path, found)
    return found


def bench_folder(recipe: Recipe, folder: Path, *, against: Path | None, progress: Progress) -> dict:
    """Interleaved timings of float and quantized, on a prompt with the recipe's media."""
    if not is_quantized(folder):
        raise RecipeError(
            "this folder holds a float model; bench compares one with its quantized form",
            where=str(folder), hint="give --model an exported folder",
        )  # fmt: skip
    original = _float(recipe, against, progress)
    model = load_beside(original.model, folder, progress)
    source = recipe.calibration.sources[0]
    sample = next(load_samples(source, seed=recipe.seed, modalities=recipe.modalities))
    return bench(
        original.model,
        model,
        original.processor,
        recipe.bench,
        sample=sample,
        seed=recipe.seed,
        progress=progress,
    )


def is_quantized(folder: Path) -> bool:
    """Whether a model folder carries masquant's quantization_config. RecipeError if no model."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text())
        return (config.get("quantization_config") or {}).get("quant_method") == "masquant"
    except (OSError, ValueError, AttributeError) as error:
        raise RecipeError(
            f"not a model folder: {error}", where=str(folder),
            hint="point --model at a folder that holds config.json",
        ) from error  # fmt: skip


def _float(recipe: Recipe, against: Path | None, progress: Progress) -> Loaded:
    progress.note(f"loading {against or recipe.model.path}")
    spec = Model(path=str(against), dtype=recipe.model.dtype) if against else recipe.model
    return load_float(spec, recipe.device)


def load_beside(float_model: nn.Module, folder: Path, progress: Progress) -> nn.Module:
    """An exported folder on the device and in the dtype of its float model."""
    progress.note(f"loading {folder}")
    return load_quantized(folder, dtype=float_model.dtype).to(float_model.device).eval()
