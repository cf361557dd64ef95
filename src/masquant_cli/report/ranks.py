"""SQNR against rank (the paper's Fig. 6) for a few sites, from statistics and float weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from masquant_cli.algo.curves import Bits, RankCurve, own_weight_db, rank_curve, rounded
from masquant_cli.algo.smoothing import closed_form_scale, uniform_absmax
from masquant_cli.errors import MasquantError
from masquant_cli.models.resolve import resolve
from masquant_cli.progress import Progress
from masquant_cli.recipe import Model
from masquant_cli.report.gather import Run, Site
from masquant_cli.report.weights import FloatWeights
from masquant_cli.rundir import fingerprint
from masquant_cli.stages import model_fingerprint

RATIOS = (0.0, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.16, 0.2, 0.3, 0.4)
MAS, UNIFORM = "MAS, own weight per modality (eq. 21)", "uniform smoothing (eq. 11)"


@dataclass(frozen=True)
class SiteCurves:
    """Of one site, per modality but the base: curves over RATIOS, and levels {what: dB}."""

    curves: dict[str, RankCurve]
    levels: dict[str, dict[str, float]]

    def lines(self) -> dict[str, dict[str, Sequence[float]]]:
        return {m: {"CMC": c.cmc, "unwhitened SVD": c.svd} for m, c in self.curves.items()}


def focus(runs: Sequence[Run]) -> Run | None:
    """The run whose curves are drawn: the first that is calibrated and corrected, else the first
    that is calibrated. It needs a modality besides the base."""
    able = [r for r in runs if "calibrate" in r.stages and len(r.modalities) > 1 and r.bits]
    return next((r for r in able if r.corrected and "smooth" in r.stages), next(iter(able), None))


def own_scales(run: Run) -> bool:
    """Whether the curves use the run's own scales; a uniform method has none to show."""
    return run.corrected and "smooth" in run.stages


def curves(
    run: Run, sites: Sequence[Site], runs: Sequence[Run], progress: Progress
) -> dict[Site, SiteCurves]:
    """The curves of `sites`. Raises MasquantError when the float model is not here as it was."""
    weights = FloatWeights(_float_folder(run))
    mbq = next((r for r in runs if r.method == "mbq" and _same_calibration(r, run)), None)
    found = {}
    for layer, kind in sites:
        found[layer, kind] = _site(run, layer, kind, weights.read(layer, kind), mbq)
        progress.advance(1)
    return found


def averages(found: Mapping[Site, SiteCurves]) -> tuple[dict, dict]:
    """Means over the sites, in dB: ({modality: {what: [dB]}}, {modality: {what: dB}})."""
    every = list(found.values())
    lines, levels = {}, {}
    for modality in every[0].curves:
        mine = [site.lines()[modality] for site in every]
        lines[modality] = {
            what: [sum(v) / len(v) for v in zip(*(m[what] for m in mine), strict=True)]
            for what in mine[0]
        }
        levels[modality] = {
            what: sum(site.levels[modality][what] for site in every) / len(every)
            for what in every[0].levels[modality]
        }
    return lines, levels


def _site(run: Run, layer: int, kind: str, weight: Tensor, mbq: Run | None) -> SiteCurves:
    statistics = run.tensors("calibrate", layer, (".absmax", ".rows", ".gram"), f"{kind}.")
    absmax = torch.stack([statistics[f"{kind}.{m}.absmax"] for m in run.modalities])
    absmax_w = weight.abs().amax(0)
    if own_scales(run):
        scale = run.tensors("smooth", layer, f"{kind}.scale")[f"{kind}.scale"].float()
    else:
        scale = torch.stack([closed_form_scale(own, absmax_w) for own in absmax])
    uniform = closed_form_scale(uniform_absmax(absmax), absmax_w)
    options = run.recipe["weights"]
    bits = Bits(
        options["bits"], run.recipe["activations"]["bits"],
        options.get("group_size"), options.get("symmetric", True),
    )  # fmt: skip
    share = (run.recipe.get("smoothing") or {}).get("heldout", 0.25)
    integers = None
    if own_scales(run):  # as the run rounded them, where that was not to nearest
        integers = run.tensors("compensate", layer, f"{kind}.weight").get(f"{kind}.weight")
    base = rounded(weight * scale[0], bits, integers)
    lines: dict[str, RankCurve] = {}
    levels: dict[str, dict[str, float]] = {}
    for m, modality in enumerate(run.modalities[1:], start=1):
        rows = statistics[f"{kind}.{modality}.rows"]
        judged = min(max(1, int(share * len(rows))), len(rows))  # the same rows as in smoothing
        heldout, rest = rows[:judged], rows[judged:] if judged < len(rows) else rows
        gram = statistics.get(f"{kind}.{modality}.gram")
        seen = {"gram": gram} if gram is not None else {"rows": rest}
        lines[modality] = rank_curve(weight, base, scale[m], heldout, RATIOS, bits, **seen)
        levels[modality] = {
            MAS: own_weight_db(weight, scale[m], heldout, bits),
            UNIFORM: own_weight_db(weight, uniform, heldout, bits),
        }
        if mbq is not None:
            theirs = mbq.tensors("smooth", layer, f"{kind}.scale")[f"{kind}.scale"].float()
            levels[modality]["MBQ"] = own_weight_db(weight, theirs[m], heldout, bits)
    return SiteCurves(lines, levels)


def _float_folder(run: Run) -> Path:
    spec = run.recipe.get("model")
    if not spec and "export" in run.stages:
        spec = run.stages["export"][1].reads.get("model")
    if not spec:
        raise MasquantError("the run does not say which float model it is of")
    model = Model(**spec)
    folder = resolve(model, download=False)
    if folder is None:
        raise MasquantError(f"{model.path} is not on this machine")
    was = run.stages["calibrate"][1].reads.get("the model's files")
    if was is not None and was != model_fingerprint(model, download=False):
        raise MasquantError(f"the files of {model.path} changed since the calibration")
    return folder


def _same_calibration(one: Run, other: Run) -> bool:
    if not {"calibrate", "smooth"} <= one.stages.keys():
        return False
    hashes = [fingerprint(r.stages["calibrate"][1].outputs) for r in (one, other)]
    return hashes[0] == hashes[1]
