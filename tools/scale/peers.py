"""qwen2-100m on this CPU: the bare forward, masquant's stages and llm-compressor, interleaved."""

import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import median

import yaml

from scale import models
from scale.measure import job

# What the issue asks of each ratio: at most this.
LIMITS = {
    "calibrate / forward": 1.25,
    "calibrate with Grams / forward": 1.6,
    "run / llm-compressor": 1.0,
    "run with GPTQ / llm-compressor with GPTQ": 0.5,
    "peak / llm-compressor": 0.7,
    "peak with GPTQ / llm-compressor with GPTQ": 0.7,
}

# Steps that are not in every round, for they take long: every so many.
EVERY = {"masquant gptq": 3, "llm-compressor gptq": 3, "masquant checked": 3}


def recipe(model: Path, name: str, **changes) -> dict:
    """W8A8 of a text model: calibrate, smooth with two epochs of learning, export."""
    source = {
        "dataset": str(model / "calibration.jsonl"),
        "shuffle": False,
        "messages": [{"role": "user", "content": [{"text": "{text}"}]}],
    }
    made = {
        "name": name,
        "device": "cpu",
        "model": {"path": str(model), "dtype": "float32"},
        "modalities": ["text"],
        "calibration": {"gram": [], "sources": [source]},
        "method": "masquant-joint",
        "weights": {"bits": 8, "rounding": "nearest"},
        "activations": {"bits": 8},
        "smoothing": {"epochs": 2},
        "compensation": {"rank": 0},
        # The other tool does not check what it wrote; what that costs is measured apart.
        "export": {"verify": False},
    }
    return {**made, **changes}


def write_recipe(folder: Path, content: dict) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{content['name']}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


def peers(work: Path, other: str, rounds: int, say: Callable[[str], None], layers: int = 8) -> dict:
    """Medians of `rounds` rounds; `other` is the Python that has llm-compressor."""
    model = models.qwen2(work / f"qwen2-{layers}", layers)
    near = write_recipe(work, recipe(model, "near"))
    grams = {**recipe(model, "gptq")["calibration"]}
    del grams["gram"]
    weights = {"bits": 8, "rounding": "gptq"}
    gptq = write_recipe(work, recipe(model, "gptq", calibration=grams, weights=weights))
    checked = write_recipe(work, recipe(model, "checked", export={"verify": True}))

    def ours(path: str) -> dict:
        shutil.rmtree(work / "run", ignore_errors=True)
        return job("masquant", recipe=path, run_dir=str(work / "run"))

    def theirs(**options) -> dict:
        shutil.rmtree(work / "theirs", ignore_errors=True)
        out = str(work / "theirs")
        return job("llmcompressor", python=other, model=str(model), out=out, **options)

    steps = {
        "forward": lambda: job("forward", model=str(model)),
        "masquant": lambda: ours(near),
        "llm-compressor": theirs,
        "masquant gptq": lambda: ours(gptq),
        "llm-compressor gptq": lambda: theirs(gptq=True),
        "masquant checked": lambda: ours(checked),
    }
    found: dict[str, list[dict]] = {name: [] for name in steps}
    for turn in range(rounds):
        for name, step in steps.items():
            if turn % EVERY.get(name, 1):
                continue
            one = step()
            found[name].append(one)
            peak = one["peak_bytes"] / 1e9
            say(f"round {turn + 1}: {name} {one['seconds']:.1f} s, {peak:.2f} GB")
    return summary(found)


def summary(found: dict[str, list[dict]]) -> dict:
    """Medians and the issue's ratios, from the runs of each step."""

    def middle(name: str, pick: Callable[[dict], float]) -> float:
        return round(median(pick(one) for one in found[name]), 3)

    def stage(name: str) -> float:
        return middle(name, lambda one: one["stages"]["calibrate"])

    seconds = {name: middle(name, lambda one: one["seconds"]) for name in found}
    peaks = {name: middle(name, lambda one: one["peak_bytes"]) for name in found}
    calibrate = {"without Grams": stage("masquant"), "with Grams": stage("masquant gptq")}
    ratios = {
        "calibrate / forward": calibrate["without Grams"] / seconds["forward"],
        "calibrate with Grams / forward": calibrate["with Grams"] / seconds["forward"],
        "run / llm-compressor": seconds["masquant"] / seconds["llm-compressor"],
        "run with GPTQ / llm-compressor with GPTQ": seconds["masquant gptq"]
        / seconds["llm-compressor gptq"],
        "peak / llm-compressor": peaks["masquant"] / peaks["llm-compressor"],
        "peak with GPTQ / llm-compressor with GPTQ": peaks["masquant gptq"]
        / peaks["llm-compressor gptq"],
    }
    return {
        "seconds": seconds,
        "calibrate_seconds": calibrate,
        "import_seconds": {n: middle(n, lambda one: one["import_seconds"]) for n in found},
        "peak_bytes": peaks,
        "ratios": {k: {"is": round(v, 3), "at_most": LIMITS[k]} for k, v in ratios.items()},
        "runs": found,
    }
