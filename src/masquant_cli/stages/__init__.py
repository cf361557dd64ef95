"""Stages: load artifacts, call the mathematics, save. The only place where the three meet.

Imports are lazy, so that planning a run needs no torch.
"""

import importlib
from collections.abc import Callable

from masquant_cli.recipe import Recipe
from masquant_cli.rundir import STAGES, fingerprint

# Raise a stage's number when its result changes for the same inputs.
VERSIONS = {"calibrate": 1, "smooth": 1, "compensate": 1, "export": 1}


def stage_function(name: str) -> Callable[..., dict]:
    assert name in STAGES
    return getattr(importlib.import_module(f".{name}", __name__), name)


def inputs_fingerprint(recipe: Recipe) -> str:
    """Hash of the model's files and of local data files, as they are now.

    Hub data sets count by id and revision: their content is not looked at here.
    """
    from masquant_cli.data.sources import local_files
    from masquant_cli.models.resolve import resolve
    from masquant_cli.shards import sampled_sha256

    folder = resolve(recipe.model)
    model = {
        p.name: sampled_sha256(p)
        for p in sorted(folder.iterdir())
        if p.is_file() and (p.suffix in (".safetensors", ".json", ".jinja", ".txt"))
    }
    data = [
        [str(i), [sampled_sha256(p) for p in local_files(source)]]
        for i, source in enumerate(recipe.calibration.sources)
    ]
    return fingerprint({"model": model, "data": data})
