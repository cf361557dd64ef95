"""Float weights of single sites, straight from the checkpoint's shards: never the whole model."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from masquant_cli.errors import RecipeError
from masquant_cli.models.families import family_of
from masquant_cli.models.index import weight_map
from masquant_cli.models.loading import read_config
from masquant_cli.models.names import disk_names
from masquant_cli.models.sites import Site, find_sites


class FloatWeights:
    """The sites of the float model in `folder`. Raises RecipeError where it cannot be read."""

    def __init__(self, folder: Path):
        import transformers

        config = read_config(folder)
        family = family_of(config)
        if family.subconfig:
            config = getattr(config, family.subconfig, config)
        with torch.device("meta"):
            skeleton = getattr(transformers, family.model_class)(config)
        self.folder = folder
        self.file_of = _files(folder)
        self.disk = disk_names(skeleton, self.file_of)
        self.sites: dict[tuple[int, str], Site] = {
            (layer.layer, site.key): site for layer in find_sites(skeleton) for site in layer.sites
        }

    def read(self, layer: int, kind: str) -> torch.Tensor:
        """The site's linears stacked along their outputs: fp32 [sum of outs, in]."""
        names = [f"{linear}.weight" for linear in self.sites[layer, kind].linears]
        parts = []
        for name in names:
            if name not in self.disk:
                raise RecipeError(f"no tensor on disk for {name}", where=str(self.folder))
            key = self.disk[name]
            path = self.folder / self.file_of[key]
            try:
                with safe_open(path, framework="pt") as shard:
                    parts.append(shard.get_tensor(key).float())
            except (OSError, SafetensorError) as error:
                raise RecipeError(
                    f"this shard cannot be read: {error}", where=str(path), hint="download it again"
                ) from error
        return torch.cat(parts)


def _files(folder: Path) -> dict[str, str]:
    """{tensor on disk: the file that holds it}."""
    try:
        if (found := weight_map(folder)) is not None:
            return found
        with safe_open(folder / "model.safetensors", framework="pt") as shard:
            return dict.fromkeys(shard.keys(), "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise RecipeError(
            f"the checkpoint's tensors cannot be listed: {error}",
            where=str(folder),
            hint="masquant reads safetensors; download the model again",
        ) from error
