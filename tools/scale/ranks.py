"""Two gloo processes of one thread each against one process of one thread."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

from safetensors import safe_open

from scale import models
from scale.measure import watched
from scale.peers import recipe, write_recipe

LEAST, TOLERANCE = 1.6, 1e-6
STAGES = ("calibrate", "smooth", "compensate")


def ranks(work: Path, say: Callable[[str], None], *, layers: int = 8, rounds: int = 1) -> dict:
    """Seconds of calibrate and solve, from the runs' own manifests, interleaved."""
    model = models.qwen2(work / f"qwen2-{layers}", layers)
    content = recipe(model, "ranks")
    content["weights"]["rounding"] = "gptq"
    del content["calibration"]["gram"]
    path = write_recipe(work, content)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    stages: dict[int, dict] = {}
    for turn in range(rounds):
        for size in (1, 2):
            run_dir = work / f"ranks-{size}"
            shutil.rmtree(run_dir, ignore_errors=True)
            watched(command(size, path, run_dir), threads=1)
            stages[size] = stage_seconds(run_dir)
            seconds[size].append(sum(stages[size][s] for s in STAGES))
            say(f"round {turn + 1}: {size} process(es) {seconds[size][-1]:.1f} s {stages[size]}")
    apart = difference(work / "ranks-1" / "calibrate", work / "ranks-2" / "calibrate")
    speedup = median(seconds[1]) / median(seconds[2])
    return {
        "seconds": {str(size): round(median(s), 2) for size, s in seconds.items()},
        "stage_seconds": {str(size): s for size, s in stages.items()},
        "speedup": round(speedup, 3),
        "at_least": LEAST,
        "largest_relative_difference": apart,
        "difference_at_most": TOLERANCE,
    }


def command(size: int, recipe: str, run_dir: Path) -> list[str]:
    words = ["-m", "masquant_cli", "run", "-c", recipe, "--run-dir", str(run_dir)]
    if size == 1:
        return [sys.executable, *words]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    return [sys.executable, *launcher, *words]


def stage_seconds(run_dir: Path) -> dict[str, float]:
    from masquant_cli.rundir import STAGES, RunDir, read_manifest

    return {stage: read_manifest(RunDir(run_dir).stage(stage)).seconds for stage in STAGES}


def difference(one: Path, two: Path) -> float:
    """The largest relative difference of statistics: of a tensor's norm, not of an element."""
    worst = 0.0
    for file in sorted((one / "layers").glob("*.safetensors")):
        with safe_open(file, "pt") as a, safe_open(two / "layers" / file.name, "pt") as b:
            for key in a.keys():
                x, y = a.get_tensor(key).double(), b.get_tensor(key).double()
                worst = max(worst, float((x - y).norm() / x.norm().clamp_min(1e-30)))
    return worst
