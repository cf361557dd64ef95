"""Where a recipe's model lies on this machine. Needs neither torch nor transformers."""

from importlib.resources import files
from pathlib import Path

from masquant_cli import recipe as recipes
from masquant_cli.errors import EnvironmentProblem, RecipeError

BUILTIN = "builtin:"


def resolve(spec: recipes.Model, *, download: bool = True) -> Path | None:
    """The local folder of a model; a hub id is downloaded (or found in the cache).

    Without `download`, None for a hub id that is not in the cache.
    """
    if spec.path.startswith(BUILTIN):
        name = spec.path.removeprefix(BUILTIN)
        folder = Path(str(files("masquant_cli") / "assets" / name / "model"))
        if not (folder / "config.json").exists():
            raise RecipeError(
                f"there is no built-in model {name!r}", where="model.path",
                hint="the built-in model is builtin:tiny-omni",
            )  # fmt: skip
        return folder
    folder = Path(spec.path).expanduser()
    if folder.exists():
        if not (folder / "config.json").exists():
            raise RecipeError(
                "this is not a model folder: it has no config.json", where=str(folder),
                hint="point model.path at the folder that holds config.json and *.safetensors",
            )  # fmt: skip
        return folder
    if spec.path.count("/") != 1 or spec.path.startswith((".", "/", "~")):
        raise RecipeError(
            f"no such model folder: {spec.path}", where="model.path",
            hint="give an existing folder, a hub id like Qwen/Qwen2.5-VL-7B-Instruct, "
            "or builtin:tiny-omni",
        )  # fmt: skip
    return _download(spec) if download else _cached(spec)


def model_files(folder: Path) -> list[Path]:
    """Every file of a model folder, hidden ones left out, sorted."""

    def hidden(path: Path) -> bool:
        return any(part.startswith(".") for part in path.relative_to(folder).parts)

    return [p for p in sorted(folder.rglob("*")) if p.is_file() and not hidden(p)]


def _cached(spec: recipes.Model) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(spec.path, revision=spec.revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        return None


def _download(spec: recipes.Model) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    ignore = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.msgpack", "*.h5"]
    ignore += ["original/*", "consolidated*"]  # the same weights under their makers' names
    try:
        return Path(snapshot_download(spec.path, revision=spec.revision, ignore_patterns=ignore))
    except GatedRepoError as error:
        raise RecipeError(
            f"{spec.path} is gated", where="model.path",
            hint="accept its licence on the hub, then `hf auth login`",
        ) from error  # fmt: skip
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise RecipeError(
            f"the hub has no {spec.path} at revision {spec.revision or 'main'}",
            where="model.path", hint="check the id; a private model needs `hf auth login`",
        ) from error  # fmt: skip
    except (LocalEntryNotFoundError, OSError) as error:  # the hub's network errors are OSErrors
        raise EnvironmentProblem(
            f"the hub cannot be reached and {spec.path} is not in the local cache",
            where="model.path",
            hint="download it elsewhere (`hf download`) and point model.path at the folder",
        ) from error
