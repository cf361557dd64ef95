"""What lies at a path: a recipe, a run, a stage, a shard, a checkpoint or a float model.

Only reads: recipes, manifests and the headers of safetensors files. Neither torch nor a model is
loaded, so that 70 billion weights answer as quickly as seven. Start at `inspect`.
"""

from pathlib import Path

from masquant_cli import recipe_yaml
from masquant_cli.errors import RecipeError
from masquant_cli.inspect import checkpoints, files, runs
from masquant_cli.models.resolve import BUILTIN, resolve
from masquant_cli.recipe import Model, Recipe


def inspect(path: str) -> dict:
    """A json-able document; its "kind" is recipe, run, stage, shard, checkpoint or model.

    `path` may also be the name of a shipped recipe or of the built-in model. Raises RecipeError
    for what is none of these, ArtifactError for damage.
    """
    if path.startswith(BUILTIN):
        return checkpoints.folder(resolve(Model(path=path)), shown=path)
    place = Path(path).expanduser()
    if place.is_dir():
        if runs.is_run(place):
            return runs.run(place)
        if runs.is_stage(place):
            return runs.stage(place)
        if (place / "config.json").exists():
            return checkpoints.folder(place)
        if path not in recipe_yaml.shipped():
            raise RecipeError(
                "this folder is neither a run nor a model: it has no recipe.json, manifest.json "
                "or config.json",
                where=path,
                hint=_nearby(place),
            )
    if place.suffix == ".safetensors":
        return files.shard(place)
    return _recipe(path)


def _recipe(path: str) -> dict:
    try:
        file = recipe_yaml.find(path)
    except RecipeError as error:
        if Path(path).suffix in recipe_yaml.SUFFIXES or error.hint is None:
            raise
        raise RecipeError(
            "there is nothing at this path, and no shipped recipe has this name",
            where=path,
            hint=error.hint,
        ) from None
    recipe = recipe_yaml.load(path)
    return {
        "kind": "recipe",
        "path": str(file),
        "name": recipe.name,
        **runs.said(recipe),
        "model": _model(recipe),
        "recipe": recipe.model_dump(mode="json"),
    }


def _model(recipe: Recipe) -> dict:
    """The recipe's model: its path and, where its files are on this machine, what they hold."""
    spec = recipe.model
    here = None
    local = spec.path.startswith(BUILTIN) or Path(spec.path).expanduser().is_dir()
    if local and (folder := resolve(spec, download=False)) is not None:
        held = checkpoints.folder(folder)
        keys = ("model_type", "layers", "sites", "linears", "weights_in_linears", "bytes")
        here = {key: held[key] for key in keys}
    return {**spec.model_dump(mode="json"), "files": here}


def _nearby(place: Path) -> str:
    """Where in or above this folder there is something to look at."""
    for folder in (place / "model", place / "export" / "model", place.parent, place.parent.parent):
        if runs.is_run(folder) or runs.is_stage(folder) or (folder / "config.json").exists():
            return f"did you mean {folder}?"
    shards = sorted(place.glob("*.safetensors"))
    if shards:
        return f"name one of its files, for example {shards[0]}"
    return "name a run directory, a folder that holds config.json, a shard or a recipe"
