"""Every method that works on one site, run on a synthetic layer by the product's own stages.

The stages get a job whose only site is the layer and whose calibration is the layer's tokens; the
numbers are of eq. 29 on fresh tokens. mbq needs a model's gradients and masquant-reference a whole
decoder layer: they have no place here.
"""

import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from masquant_kernels.quantizers import quantize_weight
from torch import Tensor

from evidence.synthetic import IN, MODALITIES, OUT, Layer
from masquant_cli import shards
from masquant_cli.algo import metrics
from masquant_cli.algo.linear import compensated_linear
from masquant_cli.algo.statistics import InputStatistics
from masquant_cli.models.sites import LayerSites, Site
from masquant_cli.progress import NullProgress
from masquant_cli.recipe import Recipe
from masquant_cli.stages.compensate import compensate
from masquant_cli.stages.job import Job
from masquant_cli.stages.smooth import smooth

SITE = Site("attn_in", 0, "", ("linear",), IN, (OUT,))


class LayerJob(Job):
    """A job of one site. `read` gives the statistics of the layer's tokens as calibration."""

    def __init__(self, recipe: Recipe, layer: Layer, statistics: dict[str, Tensor], folder: Path):
        super().__init__(recipe, NullProgress())
        self.statistics, self.folder = statistics, folder
        self.float = SimpleNamespace(device=torch.device("cpu"), weight=lambda _: layer.weight)
        self.layers = [LayerSites(0, "", (SITE,))]

    def read(self, stage: str, layer: int, prefix: str = "", suffix: str = "") -> dict[str, Tensor]:
        if stage == "calibrate":
            names = (n for n in self.statistics if n.startswith(prefix) and n.endswith(suffix))
            return {name: self.statistics[name] for name in names}
        return shards.load(shards.layer_file(self.folder / stage, layer))


def statistics_of(layer: Layer, rows: int, seed: int) -> dict[str, Tensor]:
    """What the calibrate stage would have written for the site."""
    found: dict[str, Tensor] = {}
    for m, name in enumerate(MODALITIES):
        generator = torch.Generator().manual_seed(seed * 31 + m)
        sums = InputStatistics(IN, rows, True)
        x = layer.tokens[name]
        sums.update(x, torch.rand(len(x), dtype=torch.float64, generator=generator))
        found |= {f"{SITE.kind}.{name}.{key}": value for key, value in sums.tensors().items()}
    return found


def measure(recipe: Recipe, layer: Layer, statistics: dict[str, Tensor]) -> dict[str, dict]:
    """{"sqnr_db": {modality: dB}, "own_db": the same if each modality had a quantized weight of
    its own, Q(W s_m), and no correction}, on the layer's fresh tokens."""
    with tempfile.TemporaryDirectory() as folder:
        job = LayerJob(recipe, layer, statistics, Path(folder))
        smooth(job, Path(folder) / "smooth", "")
        compensate(job, Path(folder) / "compensate", "")
        scale = job.read("smooth", 0)[f"{SITE.kind}.scale"]
        solved = job.read("compensate", 0)
    options, bits = recipe.weights, recipe.activations.bits
    form = options.bits, options.group_size, options.symmetric
    base = quantize_weight(layer.weight * scale[0], *form)
    if f"{SITE.kind}.weight" in solved:  # rounded by GPTQ, in the same scales
        base = base._replace(q=solved[f"{SITE.kind}.weight"])
    pairs = {
        m: tuple(solved[f"{SITE.kind}.{name}.{part}"] for part in ("lr_a", "lr_b"))
        for m, name in enumerate(MODALITIES)
        if f"{SITE.kind}.{name}.lr_a" in solved
    }
    found: dict[str, dict] = {"sqnr_db": {}, "own_db": {}}
    for m, name in enumerate(MODALITIES):
        x = layer.fresh[name]
        ids = torch.full((len(x),), m)
        own = quantize_weight(layer.weight * scale[m], *form)
        for key, weight, low_rank in (("sqnr_db", base, pairs), ("own_db", own, {})):
            y = compensated_linear(x, ids, weight, scale, bits, low_rank)
            signal, noise = metrics.energies(x @ layer.weight.T, y, torch.zeros_like(ids), 1)[0]
            found[key][name] = metrics.db(float(signal), float(noise))
    return found
