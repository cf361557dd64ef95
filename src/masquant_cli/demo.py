"""The main job on the embedded model: `compare` on four methods at two activation widths.

Float, round to nearest, SmoothQuant, MASQuant as its paper has it and our default, on the same
samples. One calibration serves them all, because it depends on neither the method nor the bits.
"""

from pathlib import Path

from masquant_cli import recipe_yaml
from masquant_cli.compare import compare
from masquant_cli.entries import Entry
from masquant_cli.errors import RecipeError
from masquant_cli.progress import Progress
from masquant_cli.recipe import Recipe

RECIPES = ("tiny-omni-w4a8", "tiny-omni-w4a6")
METHODS = ("rtn", "smoothquant", "masquant", "masquant-joint")
OURS = "masquant-joint"


def demo(run_root: Path, *, progress: Progress | None = None, samples: int | None = None) -> dict:
    """What `compare` returns, with "export_dir", the checkpoint to look at, and "load", how.

    `samples` caps the samples per task. Finished stages and rows are reused.
    """
    loaded = [
        recipe_yaml.load(n, [f"method={m}", *_cap(samples)]) for n in RECIPES for m in METHODS
    ]
    rows = [
        Entry(name := f"{r.name}-{r.method}", _verified_if_ours(r), Path(run_root) / name)
        for r in loaded
    ]
    found = compare(rows, with_float=True, run_root=run_root, progress=progress)
    ours = found["runs"][f"{RECIPES[0]}-{OURS}"]["export_dir"]
    load = f"import masquant_cli; model = masquant_cli.load_quantized({ours!r})"
    return {**found, "export_dir": ours, "load": load}


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
    export = recipe.export.model_copy(update={"verify": recipe.method == OURS})
    return recipe.model_copy(update={"export": export})
