"""Float weights of single sites, straight from the checkpoint's shards: never the whole model."""

from pathlib import Path

import torch

from masquant_cli.models.checkpoint import open_checkpoint
from masquant_cli.models.families import family_of
from masquant_cli.models.loading import read_config
from masquant_cli.models.sites import Site, find_sites
from masquant_cli.models.skeleton import build


class FloatWeights:
    """The sites of the float model in `folder`. Raises RecipeError where it cannot be read."""

    def __init__(self, folder: Path):
        config = read_config(folder)
        family = family_of(config)
        model = build(config, family, torch.float32)
        self.checkpoint = open_checkpoint(folder, model)
        self.sites: dict[tuple[int, str], Site] = {
            (layer.layer, site.key): site for layer in find_sites(model) for site in layer.sites
        }

    def read(self, layer: int, key: str) -> torch.Tensor:
        """The site's linears stacked along their outputs: fp32 [sum of outs, in]."""
        linears = self.sites[layer, key].linears
        weights = (self.checkpoint.read(f"{name}.weight", torch.float32) for name in linears)
        return torch.cat(list(weights))
