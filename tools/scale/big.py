"""Vision-language models: W4A8 with compensation at 100 million weights and at three billion."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from scale import vision
from scale.measure import Failed, job, watched
from scale.peers import recipe, write_recipe
from scale.ranks import stage_seconds

GIB = 2**30
ASKED = {  # pictures, texts, pixels of a side, letters beside a picture
    "3b": {"images": 24, "texts": 10, "side": 224, "words": 30},
    "100m": {"images": 56, "texts": 8, "side": 336, "words": 102},
    "mini": {"images": 4, "texts": 4, "side": 56, "words": 20},
}
LIMIT = "6GB"


def vl_recipe(model: Path, name: str, **changes) -> dict:
    """W4A8 with a rank ratio of 0.05, on the model's own pictures and texts."""

    def source(file: str, *parts: dict) -> dict:
        messages = [{"role": "user", "content": list(parts)}]
        return {"dataset": str(model / file), "shuffle": False, "messages": messages}

    text = {"text": "{text}"}
    sources = [source("images.jsonl", {"image": "image"}, text), source("texts.jsonl", text)]
    made = recipe(
        model,
        name,
        modalities=["text", "vision"],
        calibration={"sources": sources},
        weights={"bits": 4},
        compensation={"rank": 0.05},
        export={"verify": True},
    )
    made["model"] = {"path": str(model)}
    return {**made, **changes}


def predicted(path: str, run_dir: Path, *more: str, threads: int = 2) -> dict:
    """What `--dry-run` says of the stages, and how long it took to say so."""
    run = [sys.executable, "-m", "masquant_cli", "run", "-c", path, "--run-dir", str(run_dir)]
    done = watched([*run, "--dry-run", "--json", *more], threads=threads)
    found = json.loads(done["stdout"])["prediction"]
    kept = ("on", "measured", "stages", "seconds", "size", "problems")
    return {"took_seconds": done["wall_seconds"], **{k: found[k] for k in kept if k in found}}


def predict(work: Path, say: Callable[[str], None]) -> dict:
    """The shipped recipe for Qwen2.5-VL at 7 and 72 billion weights, on one H200 and on eight.

    Nothing of it is measured: the plan counts operations and prices them for that machine.
    """
    found = {}
    for size in ("7b", "72b"):
        folder = work / f"vl-{size}"
        folder.mkdir(parents=True, exist_ok=True)
        vision.config_of(vision.SIZES[size]).save_pretrained(folder)
        for machine in ("h200", "h200x8"):
            of = ("--set", f"model.path={folder}", "--on", machine)
            name = f"{size} on {machine}"
            try:
                one = predicted("qwen-vl-w4a8", work / "nowhere", *of)
            except Failed as error:  # it says that it would not fit, and why
                found[name] = {"refused": str(error).splitlines()[-1]}
                say(f"{name}: {found[name]['refused']}")
                continue
            found[name] = one
            say(f"{name}: {one['seconds'] / 60:.1f} minutes")
    return {"predictions": found}


def vlm100m(work: Path, say: Callable[[str], None], rounds: int = 1) -> dict:
    """Seconds of the whole, with the base rounded to nearest and by GPTQ (the method's own)."""
    model = vision.qwen2_5_vl(work / "vl-100m", "100m", **ASKED["100m"])
    found = {}
    for rounding in ("nearest", "gptq"):
        weights = {"bits": 4, "rounding": rounding}
        content = vl_recipe(model, rounding, weights=weights, export={"verify": False})
        path = write_recipe(work, content)
        plan = predicted(path, work / "nowhere")
        runs = []
        for _ in range(rounds):
            shutil.rmtree(work / "run", ignore_errors=True)
            runs.append(job("masquant", recipe=path, run_dir=str(work / "run")))
        best = sorted(runs, key=lambda one: one["seconds"])[len(runs) // 2]
        found[rounding] = {**best, "tokens": tokens_of(work / "run"), "predicted": plan}
        said = plan["seconds"]
        say(f"{rounding}: {best['seconds']:.1f} s {best['stages']}; predicted {said:.1f} s")
    return {"runs": found}


def vl3b(work: Path, say: Callable[[str], None], size: str = "3b") -> dict:
    """The whole command within `LIMIT`, interrupted once and resumed.

    Where the machine's own limit is larger, memory is only measured: the sum of resident sets of
    the command and its children at every look, and the largest VmHWM.
    """
    model = vision.qwen2_5_vl(work / f"vl-{size}", size, **ASKED[size])
    bytes_on_disk = sum(f.stat().st_size for f in model.glob("*.safetensors"))
    say(f"{model}: {bytes_on_disk / 1e9:.2f} GB")
    run_dir = work / f"vl-{size}-run"
    shutil.rmtree(run_dir, ignore_errors=True)
    content = vl_recipe(
        model,
        f"vl-{size}",
        smoothing={},  # as shipped recipes have it: ten epochs, GPTQ
        resources={"max_memory": LIMIT},
    )
    path = write_recipe(work, content)
    plan = predicted(path, run_dir)
    say(f"predicted: {plan['seconds']:.0f} s")
    command = [sys.executable, "-m", "masquant_cli", "run", "-c", path, "--run-dir", str(run_dir)]

    def half_done() -> bool:
        """Half of the layers are calibrated."""
        whole = vision.SIZES[size]["text"]["num_hidden_layers"]
        return len(list((run_dir / "calibrate" / "layers").glob("*.safetensors"))) >= whole // 2

    log = work / f"vl-{size}.log"
    first = watched(command, interrupt=half_done, log=log)
    if first["code"] == 0:
        raise Failed("the run was to be interrupted, and went on to its end")
    say(f"interrupted after {first['wall_seconds']:.0f} s")
    second = watched(command, log=log)
    stages = stage_seconds(run_dir)
    peak = max(first["tree_peak_bytes"], second["tree_peak_bytes"])
    say(f"resumed, {second['wall_seconds']:.0f} s; peak {peak / 1e9:.2f} GB; {stages}")
    found = {
        "checkpoint_bytes": bytes_on_disk,
        "limit_bytes": 6 * 10**9,
        "tree_peak_bytes": peak,
        "rss_peak_bytes": max(first["rss_peak_bytes"], second["rss_peak_bytes"]),
        "within": peak <= 6 * 10**9,
        "interrupted": {k: first[k] for k in ("interrupted", "code", "wall_seconds")},
        "resumed_seconds": second["wall_seconds"],
        "stage_seconds": stages,
        "predicted": plan,
        "stage_peaks": stage_peaks(run_dir),
        "tokens": tokens_of(run_dir),
        "exported_bytes": sum(
            f.stat().st_size for f in (run_dir / "export" / "model").glob("*.safetensors")
        ),
        "verified": summary_of(run_dir, "export").get("verified"),
    }
    shutil.rmtree(run_dir, ignore_errors=True)
    return found


def summary_of(run_dir: Path, stage: str) -> dict:
    from masquant_cli.rundir import RunDir, read_manifest

    return read_manifest(RunDir(run_dir).stage(stage)).summary


def stage_peaks(run_dir: Path) -> dict[str, int]:
    from masquant_cli.rundir import STAGES, RunDir, read_manifest

    return {s: read_manifest(RunDir(run_dir).stage(s)).peak_bytes for s in STAGES}


def tokens_of(run_dir: Path) -> dict[str, int]:
    return summary_of(run_dir, "calibrate")["tokens"]
