"""Measuring one cell, in a worker, into one JSON file that is whole or absent."""

import ast
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from evidence import synthetic
from evidence.plan import MODELS, ROOT, Cell, layer_methods, recipe_of
from masquant_cli import pipeline
from masquant_cli.compare import Judge
from masquant_cli.entries import Entry
from masquant_cli.progress import NullProgress
from masquant_cli.recipe import Recipe
from masquant_cli.rundir import fingerprint, versions, write_json

RESULTS = ROOT / "benchmarks" / "results" / "evidence"
RUNS = ROOT / "runs" / "evidence"
# What cells of synthetic layers depend on, beside the rest.
LAYERS = (
    *(Path(__file__).with_name(name) for name in ("synthetic.py", "layers.py")),
    ROOT / "src/masquant_cli/algo/theory.py",
)
# Source that numbers depend on. What reads recipes counts by the recipes it gives.
PACKAGES = ("algo", "methods", "models", "data", "runtime", "stages")
WITHOUT = (
    "gpu",
    "card.py",
    "bench.py",
    "verify.py",
    "judge.py",
    "export.py",
    "index.py",
    "leak.py",
    "eval_cache.py",
    "curves.py",
    "theory.py",
)
LEFT_OUT = ("run_dir", "sqnr_db_by_linear", "recipe")  # of a row: of this machine, or long


def result_file(cell: Cell) -> Path:
    return RESULTS / f"{cell.id}.json"


def finished(cell: Cell) -> dict | None:
    """The cell's document, if it was measured by this code with this recipe."""
    try:
        document = json.loads(result_file(cell).read_bytes())
        return document if document["fingerprint"] == cell_fingerprint(cell) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def cell_fingerprint(cell: Cell) -> str:
    """Of all that the cell's numbers depend on, library versions aside."""
    if cell.kind == "layer":
        recipes = [_said(cell.recipe(label)) for label in layer_methods()]
        layers = [bare(file.read_text(encoding="utf-8")) for file in LAYERS]
        return fingerprint([cell.where, recipes, layers, code_fingerprint()])
    recipe = _said(cell.recipe())
    recipe["model"]["path"] = cell.where
    return fingerprint([recipe, _model(cell.where), code_fingerprint()])


def _said(recipe: Recipe) -> dict:
    return recipe.model_dump(mode="json")


@cache
def _model(where: str) -> str:
    from masquant_cli.recipe import Model
    from masquant_cli.stages import model_fingerprint

    return model_fingerprint(Model(path=MODELS[where]))


@cache
def code_fingerprint() -> str:
    """Of masquant's code; docstrings and lines of comment do not count."""
    package, kernels = ROOT / "src" / "masquant_cli", ROOT / "kernels" / "masquant_kernels"
    files = [f for folder in (*(package / p for p in PACKAGES), kernels) for f in folder.rglob("*")]
    kept = {}
    for file in files:
        path = file.relative_to(ROOT)
        if file.suffix in (".py", ".c", ".h") and not {*path.parts} & {*WITHOUT}:
            text = file.read_text(encoding="utf-8")
            kept[path.as_posix()] = bare(text) if file.suffix == ".py" else text
    return fingerprint(kept)


def bare(text: str) -> str:
    """Python source without docstrings and comment lines; the same for every Python version."""
    said: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            said |= set(range(first.lineno, first.end_lineno + 1))
    lines = (line for n, line in enumerate(text.splitlines(), 1) if n not in said)
    return "\n".join(line for line in lines if line.strip() and line.strip()[0] != "#")


def calibrate(model: str) -> float:
    """The calibration that all of a model's cells share. Returns its seconds."""
    done = pipeline.run(recipe_of("W4A8", model, ()), _calibration(model), until="calibrate")
    return done["stages"]["calibrate"]["seconds"]


def measure(cell: Cell, also: Sequence[Cell] = (), keep: bool = False) -> dict:
    """Measure and write one cell, and the cells `also`, whose recipe and model are the same;
    `keep` the run directory, for the report."""
    began = time.process_time()
    found = _layer(cell) if cell.kind == "layer" else _run(cell, keep)
    document = {
        "fingerprint": cell_fingerprint(cell),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu_seconds": round(time.process_time() - began, 2),
        "versions": versions(),
        **found,
    }
    for one in (cell, *also):
        write_json(result_file(one), {"cell": asdict(one), **document})
    return document


def _run(cell: Cell, keep: bool) -> dict:
    recipe, run_dir = cell.recipe(), RUNS / cell.id
    done = pipeline.run(recipe, run_dir, reuse=[_calibration(cell.where)])
    judge = _judge(cell.where)
    row = judge.row(Entry(cell.label, recipe, run_dir), done, {})
    document = {"row": {k: v for k, v in row.items() if k not in LEFT_OUT}}
    if cell.label == "rtn" and cell.table == "methods":
        whole = judge.float_row(RUNS / cell.where / "float", beside=run_dir)
        document["float"] = {k: v for k, v in whole.items() if k not in LEFT_OUT}
    if not keep:
        shutil.rmtree(run_dir)
    return document


def _layer(cell: Cell) -> dict:
    from evidence import layers

    alpha, conditioning = cell.where.rsplit("-", 1)
    layer = synthetic.make(alpha, conditioning)
    first = cell.recipe("rtn")
    statistics = layers.statistics_of(layer, first.calibration.rows, first.seed)
    methods = {
        label: layers.measure(cell.recipe(label), layer, statistics) for label in layer_methods()
    }
    theorem = {
        m: synthetic.theorem1_loss_db(layer.ranges["vision"] / layer.ranges[m])
        for m in ("text", "audio")
    }
    return {"methods": methods, "theorem1_loss_db": theorem}


def _calibration(model: str) -> Path:
    return RUNS / model / "calibration"


@cache
def _judge(model: str) -> Judge:
    """This worker's float model and prepared inputs."""
    recipe = recipe_of("W4A8", model, ())
    return Judge(recipe, recipe.evaluation, NullProgress())


def quiet() -> None:
    """A worker's start: one thread, no bars."""
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
