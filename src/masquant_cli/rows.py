"""One row of a comparison: what a run scores and what it costs, as `compare` and `report` have it.

A number that is not known is None.
"""

from collections.abc import Mapping
from typing import get_args

from masquant_cli.recipe import Modality
from masquant_cli.rundir import Manifest

PER_MODALITY = ("sqnr_db", "sqnr_end_db", "kl", "flip_rate")
OF_TASK = ("value", "ci", "n", "metric", "overlap")
FLOAT_BITS = 16  # what a float weight counts, whatever the dtype it is loaded in


def row(who: Mapping, evaluation: Mapping | None, manifests: Mapping[str, Manifest]) -> dict:
    """`who` ({"name", "method", "bits", "recipe", "run_dir"}) with scores and costs.

    `evaluation` is what `pipeline.evaluate` returns, `manifests` are those of the run's finished
    stages. The seconds leave the calibration out, which runs share; peaks are over all stages.
    """
    found, made = evaluation or {}, manifests.values()
    own = [m.seconds for stage, m in manifests.items() if stage != "calibrate"]
    sizes = manifests["export"].summary.get("bytes", {}) if "export" in manifests else {}
    quantized, dense = sizes.get("quantized"), sizes.get("float")  # float: two bytes a weight
    return {
        **who,
        "tasks": {name: _task(task) for name, task in (found.get("tasks") or {}).items()},
        **{key: in_order(found.get(key)) for key in PER_MODALITY},
        "sqnr_db_by_linear": found.get("sqnr_db_by_linear"),
        "bits_per_weight": FLOAT_BITS * quantized / dense if quantized and dense else None,
        "bytes": quantized,
        "seconds": sum(own) if own else None,
        "peak_bytes": max((m.peak_bytes for m in made), default=None),
        "peak_gpu_bytes": max((m.peak_gpu_bytes for m in made), default=None),
    }


def in_order(by_modality: Mapping[str, float | None] | None) -> dict[str, float | None] | None:
    """As modalities are listed everywhere else; JSON files sort their keys."""
    if by_modality is None:
        return None
    return {m: by_modality[m] for m in get_args(Modality) if m in by_modality}


def _task(task: Mapping) -> dict:
    return {key: task[key] for key in OF_TASK if key in task}
