"""A run's evaluation: RUN/eval/result.json, when it is of the export that lies there now."""

from pathlib import Path

from masquant_cli.recipe import Model
from masquant_cli.rundir import read_mapping
from masquant_cli.stages import model_fingerprint


def evaluation(path: Path, stages: dict, missing: list[str]) -> dict | None:
    """What `masquant eval` last said of this run's export as it is now."""
    if "export" not in stages:
        if (path / "eval" / "result.json").exists():
            missing.append("Its evaluation is left out: it has no export that the numbers are of.")
        return None
    model = stages["export"][0] / "model"
    mine = model_fingerprint(Model(path=str(model)), download=False)
    for file in (path / "eval" / mine[:12] / "result.json", path / "eval" / "result.json"):
        result = result_in(file)
        if result is not None and result.get("model_fingerprint") == mine:
            return result
    if (path / "eval" / "result.json").exists():
        missing.append("Its evaluation is left out: it is of another model or an older export.")
    else:
        missing.append("It has not been evaluated (masquant eval).")
    return None


def result_in(file: Path) -> dict | None:
    """An evaluation's result, None where there is no such file. Raises ArtifactError."""
    return read_mapping(file, "this evaluation", "delete it and run masquant eval again")
