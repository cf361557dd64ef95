"""Peak memory of 8 layers against 32 of the same width, and against llm-compressor's."""

import shutil
from collections.abc import Callable
from pathlib import Path

from scale import models
from scale.measure import job
from scale.peers import recipe, write_recipe

GROWTH, AGAINST = 1.10, 0.7
SAMPLES = 16  # memory is asked here, not time


def depth(work: Path, other: str, say: Callable[[str], None], few: int = 8, many: int = 32) -> dict:
    """Every peak is VmHWM of a process of its own that quantizes the same samples to W8A8."""
    peaks: dict[str, int] = {}
    runs: dict[str, dict] = {}
    for layers in (few, many):
        model = models.qwen2(work / f"qwen2-{layers}", layers)
        content = recipe(model, f"depth-{layers}")
        content["calibration"]["sources"][0]["limit"] = SAMPLES
        path = write_recipe(work, content)
        for folder in ("run", "theirs"):
            shutil.rmtree(work / folder, ignore_errors=True)
        ours = job("masquant", recipe=path, run_dir=str(work / "run"))
        out = str(work / "theirs")
        theirs = job("llmcompressor", python=other, model=str(model), out=out, samples=SAMPLES)
        for folder in ("run", "theirs"):
            shutil.rmtree(work / folder, ignore_errors=True)
        for name, one in (("masquant", ours), ("llm-compressor", theirs)):
            key = f"{name}, {layers} layers"
            peaks[key], runs[key] = one["peak_bytes"], one
            say(f"{key}: {one['peak_bytes'] / 1e9:.3f} GB, {one['seconds']:.0f} s")
    ratios = {
        f"{many} layers / {few} layers": (
            peaks[f"masquant, {many} layers"] / peaks[f"masquant, {few} layers"],
            GROWTH,
        ),
        **{
            f"masquant / llm-compressor, {n} layers": (
                peaks[f"masquant, {n} layers"] / peaks[f"llm-compressor, {n} layers"],
                AGAINST,
            )
            for n in (few, many)
        },
    }
    return {
        "samples": SAMPLES,
        "peak_bytes": peaks,
        "ratios": {k: {"is": round(v, 3), "at_most": most} for k, (v, most) in ratios.items()},
        "runs": runs,
    }
