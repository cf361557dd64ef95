"""One recipe being worked on: the float model, its sites, and what earlier stages wrote."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from masquant_cli import shards
from masquant_cli.algo.low_rank import rank_for
from masquant_cli.distributed import World
from masquant_cli.errors import ArtifactError, RecipeError
from masquant_cli.methods import find
from masquant_cli.models.modality import check_modalities, merge_video, token_ids_of
from masquant_cli.models.sites import LayerSites, Site, find_sites
from masquant_cli.models.skeleton import Skeleton, load_skeleton
from masquant_cli.progress import Progress
from masquant_cli.recipe import SITE_KINDS, Recipe
from masquant_cli.rundir import Manifest
from masquant_cli.runtime.scheme import Scheme


@dataclass
class Job:
    """One recipe being worked on. The float model is opened when a stage first needs it."""

    recipe: Recipe
    progress: Progress
    finished: dict[str, tuple[Path, Manifest]] = field(default_factory=dict)
    world: World = field(default_factory=World)
    _checked: set[Path] = field(default_factory=set)

    @cached_property
    def float(self) -> Skeleton:
        """The float model without its weights; parts of it are read when they are needed."""
        self.progress.note(f"opening {self.recipe.model.path}")
        with self.world.busy():
            skeleton = load_skeleton(self.recipe.model, self.recipe.device)
        check_modalities(skeleton.config, self.recipe.modalities, where="modalities")
        return skeleton

    @cached_property
    def layers(self) -> list[LayerSites]:
        layers = find_sites(self.float.model)
        group = self.recipe.weights.group_size
        for site in (site for layer in layers for site in layer.sites):
            if group and site.in_features % group:
                raise RecipeError(
                    f"group_size {group} does not divide the {site.in_features} inputs "
                    f"of {site.name}",
                    where="weights.group_size",
                    hint="choose a divisor, or leave group_size out for one scale per channel",
                )
        return layers

    @cached_property
    def scheme(self) -> Scheme:
        """What the exported quantization_config will say."""
        recipe = self.recipe
        tokens = merge_video(token_ids_of(self.float.config), recipe.modalities)
        ranks: dict[str, int] = {}
        for site in (site for layer in self.layers for site in layer.sites):
            # Layers may differ (experts, or no site of a kind); fewer columns are padded.
            ranks[site.kind] = max(ranks.get(site.kind, 0), self.rank(site))
        return Scheme(
            weight_bits=recipe.weights.bits,
            group_size=recipe.weights.group_size,
            symmetric=recipe.weights.symmetric,
            activation_bits=recipe.activations.bits,
            modalities=recipe.modalities,
            token_ids={m: tuple(ids) for m, ids in tokens.items()},
            ranks=ranks,
            sites=SITE_KINDS,
        )

    def rank(self, site: Site) -> int:
        """Columns of the site's correction; 0 where the method or the recipe has none."""
        compensation, method = self.recipe.compensation, find(self.recipe.method)
        if site.kind not in method.corrects or site.kind not in compensation.sites:
            return 0
        if len(self.recipe.modalities) == 1 or not compensation.rank:
            return 0
        side = min(site.in_features, sum(site.out_features))
        rank = rank_for(compensation.rank, site.in_features, sum(site.out_features))
        return min(side, max(rank, method.least_rank))

    @property
    def rounding(self) -> str:
        """How base weights are rounded: nearest | gptq."""
        wanted = self.recipe.weights.rounding
        return find(self.recipe.method).rounding if wanted == "auto" else wanted

    def weight(self, site: Site) -> torch.Tensor:
        """The site's linears stacked along their outputs, from disk: fp32 [sum of outs, in]."""
        # Filled part by part: of all experts of a layer it is large, and two would be twice that.
        weight = torch.empty(sum(site.out_features), site.in_features, device=self.float.device)
        for name, part in zip(site.linears, weight.split(site.out_features), strict=True):
            part.copy_(self.float.weight(name))
        return weight

    def read(
        self, stage: str, layer: int, prefix: str = "", suffix: str | tuple[str, ...] = ""
    ) -> dict[str, torch.Tensor]:
        """One layer's tensors of a finished stage, or those whose names begin and end so; the
        file is checked against its manifest when it is first asked for."""
        folder, manifest = self.finished[stage]
        path = shards.layer_file(folder, layer)
        relative = path.relative_to(folder).as_posix()
        if relative not in manifest.outputs:
            raise ArtifactError(
                f"the {stage} stage has no layer {layer}",
                where=str(path),
                hint="delete the stage's folder and run again",
            )
        wanted = None if path in self._checked else manifest.outputs[relative]
        found = shards.load(path, sha256=wanted, prefix=prefix, suffix=suffix)
        self._checked.add(path)
        return found
