"""How many calibration tokens reached each expert, and what is done about those that few reached.

A router sends each token to a few experts, so an expert sees a part of the tokens and perhaps none
of a modality. What is kept of each is less, too, as there are many.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import safe_open

from masquant_cli import shards
from masquant_cli.models.sites import Site
from masquant_cli.progress import layer_ranges
from masquant_cli.recipe import Calibration
from masquant_cli.stages.job import Job

LEAST_ROWS = 16  # kept per expert and modality
GRAM_WIDTH = 512  # of an expert's input; each of some hundred experts would have such a Gram
ENOUGH = 8  # tokens from which an expert's range of a modality is believed
SCARCE = 32  # tokens of the base modality below which experts are warned about


def rows_kept(site: Site, calibration: Calibration) -> int:
    """Input rows that calibration keeps of each modality."""
    rows = calibration.rows
    return rows if site.expert is None else min(rows, max(LEAST_ROWS, rows // 8))


def keeps_gram(site: Site, calibration: Calibration) -> bool:
    """Whether calibration keeps the Gram of the site's inputs."""
    listed = site.kind in calibration.gram
    return listed and (site.expert is None or site.in_features <= GRAM_WIDTH)


def stand_ins(site: Site, tokens: Sequence[int]) -> list[int]:
    """For each modality the one whose scale it takes at this site: its own if it has tokens.

    An expert's modality of fewer than ENOUGH tokens takes the base's scale, and the base that of
    the modality with the most; with a scale from nothing, one token at run time would overflow.
    """
    least = 1 if site.expert is None else min(ENOUGH, max(1, *tokens))
    base = 0 if tokens[0] >= least else max(range(len(tokens)), key=tokens.__getitem__)
    return [m if count >= least else base for m, count in enumerate(tokens)]


def coverage(job: Job, folder: Path) -> dict[str, dict[str, float]] | None:
    """Per modality the tokens that an expert got: min and median over all experts of all layers,
    and how many experts got none (`without`); None for a model without experts.

    `folder` is that of a finished calibrate stage. Warns, once per modality, where experts saw
    little of it.
    """
    seen: dict[str, dict[int, list[int]]] = {name: {} for name in job.recipe.modalities}
    for layer in job.layers:
        experts = [site.key for site in layer.sites if site.expert is not None]
        if not experts:
            continue
        with safe_open(shards.layer_file(folder, layer.layer), framework="pt") as shard:
            for name, counts in seen.items():
                counts[layer.layer] = [
                    int(shard.get_tensor(f"{key}.{name}.count")) for key in experts
                ]
    if not any(seen.values()):
        return None
    for name, counts in seen.items():
        if line := scarcity(name, job.recipe.modalities[0], counts):
            job.progress.warn(line)
    every = {name: [n for layer in counts.values() for n in layer] for name, counts in seen.items()}
    return {
        name: {
            "min": min(counts),
            "median": statistics.median(counts),
            "without": counts.count(0),
        }
        for name, counts in every.items()
    }


def scarcity(name: str, base: str, counts: Mapping[int, Sequence[int]]) -> str | None:
    """What to say of the modality `name` when experts got these tokens of it, layer by layer."""
    every = [n for layer in counts.values() for n in layer]
    scarce = sum(n < SCARCE for n in every)
    lacking = [index for index, layer in counts.items() if 0 in layer]
    some = f"{every.count(0)} of {len(every)} experts, in {layer_ranges(lacking)}, saw no token"
    remedy = "more calibration samples would reach them"
    if name != base:
        if not lacking:
            return None
        return f"{name}: {some}; they get the {base} scale and no {name} correction: {remedy}"
    if not scarce:
        return None
    few = f"{base}: {scarce} of {len(every)} experts saw fewer than {SCARCE} tokens"
    if lacking:
        few += f"; {some} and get another modality's scale, or plain rounding if they saw nothing"
    return f"{few}: {remedy}"
