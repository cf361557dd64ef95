"""What a run directory holds, as plain data. Reads manifests, notes and small tensors only.

A stage counts when it is finished, whole, and made from the stage before it as that one is now;
anything else is named in `Run.missing`, in a sentence for people.
"""

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from masquant_cli import shards
from masquant_cli.errors import ArtifactError, RecipeError
from masquant_cli.models.families import kind_of
from masquant_cli.report.scores import evaluation, result_in
from masquant_cli.rundir import (
    RECIPE,
    STAGES,
    Manifest,
    RunDir,
    calibration_of,
    damaged_output,
    fingerprint,
    read_manifest,
    read_mapping,
)

Site = tuple[int, str]  # decoder layer, site kind
IN_LAYER = re.compile(r"\blayers\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class Run:
    """One run directory. Decibels are floats, None where a modality had no tokens."""

    path: Path
    label: str
    recipe: dict  # as JSON; only what its manifests say where there is no recipe.json
    stages: dict[str, tuple[Path, Manifest]]  # those that count, and where they lie
    heldout: dict[Site, dict[str, float]]  # {site: {modality: dB}}, what smoothing expects
    origin: dict[Site, str]
    corrections: dict[Site, dict[str, dict]]  # {site: {modality: note of compensate}}
    evaluation: dict | None
    missing: tuple[str, ...]

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.recipe.get("modalities") or ())

    @property
    def method(self) -> str:
        return self.recipe.get("method") or ""

    @property
    def bits(self) -> str:
        """ "W4A8", or "" before smoothing said so."""
        weights, activations = (self.recipe.get(k) or {} for k in ("weights", "activations"))
        if "bits" not in weights or "bits" not in activations:
            return ""
        return f"W{weights['bits']}A{activations['bits']}"

    @property
    def corrected(self) -> bool:
        return bool(self.corrections)

    @cached_property
    def measured(self) -> dict[Site, dict[str, float]]:
        """SQNR measured by `masquant eval`: mean in dB over the linears of a site."""
        found: dict[Site, dict[str, list[float]]] = {}
        for name, by_modality in ((self.evaluation or {}).get("sqnr_db_by_linear") or {}).items():
            found_in = IN_LAYER.search(name)
            if not found_in or kind_of(found_in[2]) is None:
                continue
            site = int(found_in[1]), kind_of(found_in[2])
            for modality, value in by_modality.items():
                if value is not None:
                    found.setdefault(site, {}).setdefault(modality, []).append(value)
        return {
            site: {m: sum(values) / len(values) for m, values in by.items()}
            for site, by in sorted(found.items())
        }

    @cached_property
    def layers(self) -> list[int]:
        """Decoder layers that calibration saw."""
        if "calibrate" not in self.stages:
            return []
        return _layers(self.stages["calibrate"][1])

    @cached_property
    def absmax(self) -> dict[Site, torch.Tensor]:
        """Per site the range of every modality's channels, f32 [M, in]; of experts the widest."""
        found: dict[Site, list[list[torch.Tensor]]] = {}
        for layer in self.layers:
            for name, tensor in self.tensors("calibrate", layer, ".absmax").items():
                kind, *_, modality, _ = name.split(".")
                ranges = found.setdefault((layer, kind), [[] for _ in self.modalities])
                ranges[self.modalities.index(modality)].append(tensor.float())
        return {
            site: torch.stack([torch.stack(one).amax(0) for one in ranges])
            for site, ranges in found.items()
        }

    @cached_property
    def of_experts(self) -> frozenset[Site]:
        """Sites that stand for those of several experts."""
        return frozenset(
            (layer, name.split(".")[0])
            for layer in self.layers
            for name in self.tensors("calibrate", layer, ".count")
            if name.split(".")[1].isdigit()
        )

    def tensors(
        self, stage: str, layer: int, ending: str | tuple[str, ...], kind: str = ""
    ) -> dict[str, torch.Tensor]:
        """Tensors of one layer of a stage that counts: those of a site kind with such an end.

        Raises ArtifactError when the file is damaged.
        """
        path = shards.layer_file(self.stages[stage][0], layer)
        try:
            with safe_open(path, framework="pt") as shard:
                names = (n for n in shard.keys() if n.startswith(kind) and n.endswith(ending))
                return {name: shard.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"cannot read this layer: {error}",
                where=str(path),
                hint="delete the stage's folder and run the recipe again",
            ) from error


def gather(paths: Sequence[Path], reuse: Sequence[Path] = ()) -> list[Run]:
    """The runs in `paths`, each with a label of its own.

    A calibration that a run took from elsewhere is looked for in `reuse`, in the other runs and
    beside the run. Raises RecipeError for what is no run directory, ArtifactError for damage.
    """
    paths = [Path(p) for p in dict.fromkeys(paths)]
    runs = [_gather(path, [*reuse, *paths]) for path in paths]
    return [replace(run, label=label) for run, label in zip(runs, _labels(runs), strict=True)]


def _gather(path: Path, reuse: Sequence[Path]) -> Run:
    recipe = read_mapping(
        path / RECIPE, "this run's recipe", "run the recipe again in this directory"
    )
    manifests = {stage: read_manifest(path / stage) for stage in STAGES}
    if recipe is None and not any(manifests.values()):
        if alone := _float(path):
            return alone
        raise RecipeError(
            "not a run directory: neither a recipe.json nor a finished stage in it",
            where=str(path),
            hint="name directories that `masquant run` has written to",
        )
    stages, missing = _stages(path, manifests, reuse)
    said: dict = {}
    for stage in ("calibrate", "smooth", "compensate"):
        if stage in stages:
            said = _over(said, stages[stage][1].reads)
    keys = ("modalities", "calibration", "seed", "method", "weights", "activations", "smoothing")
    made = {key: said[key] for key in keys if key in said}
    if "compensate" in stages or recipe is None:  # smooth says only what it reads of it
        made |= {"compensation": said["compensation"]} if "compensation" in said else {}
    if recipe is None:
        missing.append("It has no recipe.json; what is known of its recipe is from its manifests.")
    elif changed := [key for key in made if _over(recipe, {key: made[key]}) != recipe]:
        missing.append(
            f"Its recipe.json is newer than its stages ({', '.join(changed)} differ); "
            "what the stages were made with is shown."
        )
    recipe = _over({"name": path.name, **(recipe or {})}, made)
    heldout, origin = _smooth_notes(stages, recipe)
    corrections = _compensate_notes(stages)
    if "compensate" in stages and not corrections:
        missing.append("It has no low-rank correction (its method or rank 0 asks for none).")
    if len(recipe.get("modalities") or ()) == 1:
        missing.append("It has one modality, so no modality dominates another.")
    scores = evaluation(path, stages, missing)
    return Run(path, "", recipe, stages, heldout, origin, corrections, scores, tuple(missing))


def _over(below: dict, above: dict) -> dict:
    """`above` over `below`; a section that several stages read parts of is put together."""
    both = {k: {**below[k], **v} for k, v in above.items() if isinstance(v, dict) and k in below}
    return {**below, **above, **both}


def _stages(
    path: Path, manifests: dict[str, Manifest | None], reuse: Sequence[Path]
) -> tuple[dict[str, tuple[Path, Manifest]], list[str]]:
    """The stages that count, and why the others do not."""
    found: dict[str, tuple[Path, Manifest]] = {}
    missing: list[str] = []
    smooth = manifests["smooth"]
    if calibration := _calibration(path, manifests["calibrate"], smooth, reuse):
        found["calibrate"] = calibration
        if lost := damaged_output(*calibration):
            del found["calibrate"]
            missing.append(f"The calibration's {lost} is gone or was changed.")
    elif smooth is not None:
        missing.append("Its calibration lies in another run that was not found (see --reuse).")
    else:
        missing.append("It is not calibrated.")
    before = smooth.upstream if smooth else ""
    for stage in STAGES[1:]:
        manifest = manifests[stage]
        if manifest is None:
            missing.append(f"Its {stage} stage never finished.")
            break
        if lost := damaged_output(path / stage, manifest):
            missing.append(f"Its {stage} stage is incomplete: {lost} is gone or was changed.")
            break
        if manifest.upstream != before:
            missing.append(f"Its {stage} stage is older than the stage before it.")
            break
        found[stage] = (path / stage, manifest)
        before = fingerprint(manifest.outputs)
    return found, missing


def _calibration(
    path: Path, own: Manifest | None, smooth: Manifest | None, reuse: Sequence[Path]
) -> tuple[Path, Manifest] | None:
    """The calibration that the run's smoothing was made from; its own when it has no smoothing."""
    if smooth is None:
        return (path / "calibrate", own) if own else None
    beside = sorted(p for p in path.absolute().parent.iterdir() if p.is_dir())
    others = (other / "calibrate" for other in (*map(Path, reuse), *beside))
    for folder in (path / "calibrate", calibration_of(RunDir(path)), *others):
        # A stranger that is damaged or not ours to read is no concern of this run.
        with contextlib.suppress(ArtifactError, OSError):
            manifest = read_manifest(folder)
            if manifest and fingerprint(manifest.outputs) == smooth.upstream:
                return folder, manifest
    return None


def _layers(manifest: Manifest) -> list[int]:
    names = (Path(name) for name in manifest.outputs if name.startswith("layers/"))
    return sorted(int(name.stem) for name in names if name.suffix == ".safetensors")


def _notes(stages: dict, stage: str) -> dict[int, dict]:
    if stage not in stages:
        return {}
    folder, manifest = stages[stage]
    found = {}
    for layer in _layers(manifest):
        path = shards.layer_file(folder, layer)
        if (header := shards.read_header(path)) is None:
            raise ArtifactError(
                "this layer's notes cannot be read",
                where=str(path),
                hint="delete the stage's folder and run the recipe again",
            )
        found[layer] = header["notes"]
    return found


def _smooth_notes(stages: dict, recipe: dict) -> tuple[dict, dict]:
    heldout, origin = {}, {}
    for layer, notes in _notes(stages, "smooth").items():
        for kind, ours in _by_kind(notes).items():
            values = zip(*(note["heldout_sqnr_db"] for note in ours), strict=True)
            means = map(_mean, values)
            heldout[layer, kind] = dict(zip(recipe["modalities"], means, strict=True))
            origins = [note.get("origin", "") for note in ours]
            origin[layer, kind] = max(dict.fromkeys(origins), key=origins.count)
    return heldout, origin


def _compensate_notes(stages: dict) -> dict[Site, dict[str, dict]]:
    found: dict[Site, dict[str, dict]] = {}
    for layer, notes in _notes(stages, "compensate").items():
        corrections = {key: note for key, note in notes.items() if "rank" in note}
        for modality in dict.fromkeys(key.rpartition(".")[2] for key in corrections):
            ours = {k: n for k, n in corrections.items() if k.endswith(f".{modality}")}
            for kind, several in _by_kind(ours).items():
                means = {k: _mean([note.get(k) for note in several]) for k in several[0]}
                one = several[0] if len(several) == 1 else means
                found.setdefault((layer, kind), {})[modality] = one
    return found


def _by_kind(notes: dict[str, dict]) -> dict[str, list[dict]]:
    """Notes of a layer by site kind: several where its experts have sites of their own."""
    found: dict[str, list[dict]] = {}
    for key, note in notes.items():
        found.setdefault(key.split(".")[0], []).append(note)
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _float(path: Path) -> Run | None:
    """A folder that holds an evaluation alone: the float row of `masquant compare`."""
    if (result := result_in(path / "eval" / "result.json")) is None:
        return None
    said = "It holds an evaluation alone, of a model that is not quantized here."
    recipe = {"name": path.resolve().name, "model": {"path": result.get("model")}}
    return Run(path, "", recipe, {}, {}, {}, {}, result, (said,))


def _labels(runs: Sequence[Run]) -> list[str]:
    """Method, bits and, where that leaves two alike, what tells them apart."""

    def rank(run: Run) -> str:
        ranks = (run.recipe.get("compensation") or {}).get("rank")
        return "" if ranks is None or not run.corrected else f"r {ranks:g}"

    plain = [" ".join(filter(None, (r.method, r.bits))) or r.path.name for r in runs]
    finer = [" ".join(filter(None, (p, rank(r)))) for p, r in zip(plain, runs, strict=True)]
    labels = [f if plain.count(p) > 1 else p for p, f in zip(plain, finer, strict=True)]
    return [
        f"{label} ({run.path.resolve().name})" if labels.count(label) > 1 else label
        for label, run in zip(labels, runs, strict=True)
    ]
