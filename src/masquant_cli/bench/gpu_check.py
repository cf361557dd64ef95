"""All that is to be learned from a GPU machine in one command, within ten minutes.

Correctness first, backend by backend, then timings. Every section is a process of its own with a
budget, and writes as it goes: one that hangs, crashes or is slow loses nothing of the others. A
backend that is wrong somewhere is not used in what follows. `tools/gpu_check.py` starts this.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch
from masquant_kernels import dispatch

from masquant_cli.bench import commands, kernels, layers, measure, model
from masquant_cli.bench.about import about, device_name, device_of
from masquant_cli.bench.cases import SMALL, cases
from masquant_cli.bench.gate import check_op
from masquant_cli.bench.roofline import measure_roof
from masquant_cli.bench.shapes import decoder
from masquant_cli.bench.timing import Clock
from masquant_cli.errors import CheckError, EnvironmentProblem, MasquantError, RecipeError
from masquant_cli.progress import NullProgress

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks" / "results"
LIMIT = 570.0  # seconds for everything
GRACE = 30.0  # a section that has not stopped by itself this long after its budget is stopped
# name -> seconds; correctness has one section per backend
TIMED = {"kernels": 90.0, "layers": 90.0, "model": 140.0}
CORRECTNESS = {"triton": 100.0, "hopper": 60.0, "cpu": 60.0, "onednn": 30.0}
WRONG = ("failed", "crashed", "hung")
Write = Callable[[dict], None]


def sections(device: torch.device) -> dict[str, float]:
    """{section: budget in seconds}, in the order in which they run."""
    backends = [b for b in reversed(dispatch.BACKENDS[device.type]) if b != "reference"]
    return {f"correctness {b}": CORRECTNESS[b] for b in backends} | TIMED


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code of docs/cli.md."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--output", type=Path, help="[default: benchmarks/results/GPU-DATE.json]")
    parser.add_argument("--small", action="store_true", help="tiny sizes: tries the code itself")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    try:
        if given.section:
            return _child(given)
        if given.dry_run:
            return _say_plan(given)
        return _check(given)
    except MasquantError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  hint: {error.hint}", file=sys.stderr)
        return error.exit_code


def _say_plan(given) -> int:
    for name, seconds in sections(torch.device(given.device)).items():
        print(f"{name}: at most {seconds:.0f} s")
    print(f"all: at most {LIMIT:.0f} s; result: {given.output or RESULTS / 'GPU-DATE.json'}")
    return 0


def _check(given) -> int:
    device = device_of(given.device)
    if given.output is None and (given.small or device.type != "cuda"):
        raise RecipeError("name an --output: only GPU results belong in benchmarks/results")
    path = given.output or RESULTS / file_name(device_name(device))
    began = time.monotonic()
    document: dict = {"machine": about(device), "commit": _commit(), "sections": {}}
    usable = list(dispatch.BACKENDS[device.type])
    for name, budget in sections(device).items():
        left = LIMIT - (time.monotonic() - began)
        backend = name.removeprefix("correctness ") if " " in name else None
        asked = backend or _force(usable, device)
        found = _run(name, asked, min(budget, left - GRACE), given, path)
        document["sections"][name] = found
        if backend and found["status"] in WRONG:
            usable.remove(backend)
        document["backends"] = usable
        document["seconds"] = round(time.monotonic() - began, 1)
        commands.write(document, path)
        print(f"{name}: {_summary(found)}", file=sys.stderr, flush=True)
    bad = [name for name, s in document["sections"].items() if s["status"] in WRONG]
    print(path)
    if bad:
        raise CheckError(f"not in order: {', '.join(bad)}", hint=f"details are in {path}")
    return 0


def _force(usable: list[str], device: torch.device) -> str | None:
    """Which backend to ask first: the best that is right; None where all are."""
    return None if len(usable) == len(dispatch.BACKENDS[device.type]) else usable[0]


def _run(name: str, backend: str | None, seconds: float, given, path: Path) -> dict:
    """One section in a process of its own; what it wrote, and how it ended."""
    if seconds <= 0:
        return {"status": "no time left", "rows": [], "seconds": 0.0}
    lines = path.with_name(f"{path.name}.{name.replace(' ', '-')}.part")
    lines.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "tools" / "gpu_check.py"), "--section", name]
    command += [
        "--device",
        given.device,
        "--until",
        str(time.time() + seconds),
        "--output",
        str(lines),
    ]
    command += ["--small"] * given.small
    environment = {**os.environ} | ({dispatch.VARIABLE: backend} if backend else {})
    began = time.monotonic()
    with lines.with_name(lines.name + ".log").open("w+", encoding="utf-8") as log:
        try:
            done = subprocess.run(
                command, stdout=log, stderr=log, env=environment, timeout=seconds + GRACE
            ).returncode
        except subprocess.TimeoutExpired:
            done = None
        log.seek(0)
        said = log.read()[-3000:]
    Path(log.name).unlink()
    found = _read(lines) | {"seconds": round(time.monotonic() - began, 1)}
    failed = measure.failures(r for r in found["rows"] if "check" in r)
    status = "out of time" if found.pop("stopped", False) else "ok" if found["rows"] else "nothing"
    status = "failed" if failed else status
    if done != 0:
        status = "hung" if done is None else "crashed"
        found["log"] = said
    return {"status": status, "failed": failed, **found}


def _read(lines: Path) -> dict:
    """What a section wrote, a line of JSON at a time; a line that was cut off is left out."""
    found: dict = {"rows": []}
    if lines.exists():
        for line in lines.read_text(encoding="utf-8").splitlines():
            try:
                part = json.loads(line)
            except ValueError:
                continue
            found["rows"] += part.pop("rows", [])
            found |= part
        lines.unlink()
    return found


def _summary(found: Mapping) -> str:
    lines = [f"{found['status']}, {len(found['rows'])} results in {found['seconds']:.0f} s"]
    lines += [f"  {text}" for text in found.get("failed", [])[:5]]
    if found.get("log"):
        lines += [f"  {text}" for text in found["log"].splitlines()[-3:]]
    return "\n".join([*lines, *(f"  {text}" for text in found.get("verdict", []))])


def file_name(device: str) -> str:
    """ "NVIDIA H200" -> nvidia-h200-2026-11-21.json."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"{slug}-{datetime.now(UTC):%Y-%m-%d}.json"


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True
        )
    except OSError:
        return None
    return done.stdout.strip() or None


# --- inside a section's process ---------------------------------------------------------------


def _child(given) -> int:
    device = device_of(given.device)
    with given.output.open("w", encoding="utf-8") as stream:

        def write(part: dict) -> None:
            stream.write(json.dumps(commands.finite(part)) + "\n")
            stream.flush()

        kind, _, backend = given.section.partition(" ")
        if kind == "correctness":
            _correctness(device, backend, given.until, write, given.small)
        else:
            _timed(kind, device, given.until, write, given.small)
    return 0


def _correctness(device, backend: str, until: float, write: Write, small: bool) -> None:
    uncovered = 0
    for case in cases(device, large=not small, sizes=SMALL[:2] if small else SMALL):
        if time.time() > until:
            write({"stopped": True})
            break
        asked, check = check_op(case.op, case.given, case.exact)
        if asked != backend:  # the reference had to: this backend does not cover the case
            uncovered += 1
            continue
        write({"rows": [{"name": case.title, "backend": backend, "check": check.as_dict()}]})
    write({"not_covered": uncovered})


def _timed(kind: str, device, until: float, write: Write, small: bool) -> None:
    found: list[dict] = []
    before, longest = time.time(), 0.0
    for rows in _tables(kind, device, write, small):
        found += rows
        write({"rows": rows})
        now = time.time()
        before, longest = now, max(longest, now - before)
        if now + longest > until:  # another table may not end in time
            write({"stopped": True})
            break
    said = model.verdicts if kind == "model" else measure.verdicts
    write({"verdict": said(found)})


def _tables(kind: str, device, write: Write, small: bool):
    """The rows of a timed section, most telling first."""
    progress = NullProgress()
    clock = Clock(device, repeats=3 if small else 15)
    if kind == "model":
        return model.rows(_model_settings(device, small), Clock(device, repeats=3), progress)
    roof = measure_roof(device, small=small)
    write({"roofline": roof.as_dict()})
    options = commands.Options(
        device=device.type,
        shapes=("200x48",) if small else (),
        model=None if small else "qwen2.5-vl-7b",
        tokens=(1, 17) if small else (2048, 1, 16, 256),
        ratios=(0.05,) if kind == "kernels" else (0.01, 0.02, 0.05),
        vision=(100,),
    )
    settings = commands.op_settings(options, device)
    if kind == "kernels":
        return kernels.rows(settings, clock, roof, progress)
    return layers.rows(settings, clock, roof, progress, layer=not small)


def _model_settings(device, small: bool) -> model.Settings:
    if small:
        return model.Settings(
            decoder("qwen2-100m"), (1,), 24, 2, (0.0, 0.05), (1.0,), (4,),
            float_dtypes=(torch.float32,), dtype=torch.float32, layers=1,
        )  # fmt: skip
    wanted = decoder("qwen2.5-vl-7b")
    return model.Settings(wanted, steps=16, ratios=(0.0, 0.05, 0.02, 0.01), layers=_fitting(device))


def _fitting(device) -> int | None:
    """Fewer layers where 7B in bf16, its quantized form and a batch of 8 do not fit."""
    if device.type != "cuda":
        return 2
    total = torch.cuda.get_device_properties(device).total_memory
    return None if total > 40e9 else max(1, int(28 * (total - 10e9) / 30e9))


__all__ = ["EnvironmentProblem", "file_name", "main", "sections"]
