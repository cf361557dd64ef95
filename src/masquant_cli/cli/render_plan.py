"""What `--dry-run` says, as tables: the stages with their costs, then what comes of them."""

from typing import Any

from masquant_cli.cli.render import clock_face, draw_table, number, size


def plan(document: dict[str, Any]) -> None:
    found = document.get("prediction") or {}
    stages = found.get("stages", {})
    gpu = any(stage["peak_gpu_bytes"] for stage in stages.values())
    columns = ("stage", "state", "time", "memory", *(("GPU memory",) if gpu else ()), "disk", "why")
    rows = [
        (step["stage"], step["state"], *_cost(stages.get(step["stage"]), gpu), step["why"])
        for step in document["plan"]
    ]
    draw_table(columns, rows, right=tuple(range(2, 5 + gpu)))
    if found:
        _prediction(found)
    if document.get("tasks"):
        print("tasks:", ", ".join(document["tasks"]))
    print("run directory:", document["run_dir"])


def _cost(stage: dict[str, Any] | None, gpu: bool) -> tuple[str, ...]:
    if stage is None:
        return ("",) * (3 + gpu)
    sizes = ("peak_bytes", *(("peak_gpu_bytes",) if gpu else ()), "disk_bytes")
    return clock_face(stage["seconds"]), *(size(stage[key]) for key in sizes)


def _prediction(found: dict[str, Any]) -> None:
    print(f"in all: {clock_face(found['seconds'])} on {found['on']}")
    print()
    rows = [
        (kind, ", ".join(site["linears"]), f"{site['in']} -> {' + '.join(map(str, site['out']))}",
         str(site["sites"]), f"{site['weights'] / 1e6:,.1f} M", str(site["rank"] or ""),
         str(site["padded_inputs"] or ""))
        for kind, site in found["matched"].items()
    ]  # fmt: skip
    heads = ("quantized", "linears", "shape", "sites", "weights", "rank", "inputs padded")
    draw_table(heads, rows, right=(3, 4, 5, 6))
    print()
    rows = [(row["module"], str(row["tensors"]), size(row["bytes"])) for row in found["ignored"]]
    draw_table(("stays float", "tensors", "size"), rows, right=(1, 2))
    print()
    sizes, covered = found["size"], found["coverage"]
    bits, ratio = sizes["bits_per_weight"], sizes["files"] / max(1, sizes["source"])
    print(f"export: {size(sizes['files'])} ({number(ratio, '.2f')} of the float files), "
          f"{number(bits, '.2f')} bits per quantized weight")  # fmt: skip
    print(f"calibration: {covered['samples']} samples, {_tokens(covered)} ({covered['known']})")
    if found["model"]["known_from"] == "config":
        print("the model's weights are not here: sizes are those of its config.json")


def _tokens(covered: dict[str, Any]) -> str:
    return ", ".join(
        f"{n:,} {m} tokens{' (too few)' if m in covered['too_few'] else ''}"
        for m, n in covered["tokens"].items()
    )
