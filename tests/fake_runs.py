"""Run directories written by hand, so that a report's numbers can be checked by hand."""

from pathlib import Path

import torch

from masquant_cli import recipe_yaml, shards
from masquant_cli.recipe import Model
from masquant_cli.rundir import Manifest, file_sha256, fingerprint, write_json, write_manifest
from masquant_cli.stages import model_fingerprint

KINDS = {"attn_in": 6, "attn_out": 5, "mlp_in": 6, "mlp_out": 9}
LINEARS = {
    "attn_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn_out": ("self_attn.o_proj",),
    "mlp_in": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp_out": ("mlp.down_proj",),
}
LAYERS = 3


def sqnr(layer: int, kind: str, modality: str) -> float:
    """What the smooth stage's notes say: 20 for text, 3 less for each next modality, and so on."""
    place = ("text", "vision", "audio").index(modality)
    return 20.0 - 3 * place - layer + list(KINDS).index(kind) / 4


def write(
    path: Path,
    *overrides: str,
    until: str = "export",
    rank: bool = True,
    calibrated: Path | None = None,
    recipe: bool = True,
    evaluated: bool = True,
    widths: dict[str, int] = KINDS,
) -> Path:
    """A run of the embedded model's recipe with `overrides`, finished up to the stage `until`.

    `calibrated` names a run whose calibration is taken over; `rank` False leaves corrections out.
    """
    made = recipe_yaml.load("tiny-omni-w4a8", overrides)
    whole = made.model_dump(mode="json")
    if recipe:
        write_json(path / "recipe.json", whole)
    upstream = ""
    for stage in ("calibrate", "smooth", "compensate", "export"):
        home = calibrated if stage == "calibrate" and calibrated else path
        if home == path:
            _stage(path / stage, stage, whole, upstream, rank, widths)
        upstream = fingerprint(_outputs(home / stage))
        if stage == until:
            break
    if evaluated and until == "export":
        evaluate(path, made.modalities)
    return path


def evaluate(path: Path, modalities, *, by_linear: bool = True, accuracy: float = 91.5) -> None:
    """eval/result.json; linears measure 10 dB more than the notes of their site, q_proj 13."""
    linears = {
        f"model.layers.{layer}.{linear}": {
            m: sqnr(layer, kind, m) + (13 if linear.endswith("q_proj") else 10) for m in modalities
        }
        for layer in range(LAYERS)
        for kind, names in LINEARS.items()
        for linear in names
    }
    result = {
        "model": str(path / "export" / "model"),
        "model_fingerprint": model_fingerprint(Model(path=str(path / "export" / "model"))),
        "tasks": {
            "picture": {"metric": "accuracy", "value": accuracy, "n": 40, "ci": [80.1, 96.4]},
            "speech": {"metric": "wer", "value": 7.25, "n": 40, "ci": [5.0, 9.0]},
        },
        "sqnr_db": {m: 30.0 - 2 * i for i, m in enumerate(modalities)},
        "kl": dict.fromkeys(modalities, 0.0015),
        "flip_rate": dict.fromkeys(modalities, 0.025),
    }
    if by_linear:
        result["sqnr_db_by_linear"] = linears
    write_json(path / "eval" / "result.json", result)


def absmax(layer: int, kind: str, place: int, width: int) -> torch.Tensor:
    """Text 1, 1, ...; vision 8 in the first two channels and 0.5 elsewhere; audio 0.25."""
    value = torch.full((width,), (1.0, 0.5, 0.25)[place])
    if place == 1:
        value[:2] = 8.0
    return value * (1 + layer)


def _stage(folder: Path, stage: str, recipe: dict, upstream: str, rank: bool, widths) -> None:
    modalities = recipe["modalities"]
    for layer in range(LAYERS) if stage != "export" else ():
        tensors, notes = {}, {}
        for kind, width in widths.items():
            if stage == "calibrate":
                generator = torch.Generator().manual_seed(layer)
                for m, name in enumerate(modalities):
                    rows = torch.randn(24, width, generator=generator)
                    tensors |= {
                        f"{kind}.{name}.absmax": absmax(layer, kind, m, width),
                        f"{kind}.{name}.rows": rows,
                    }
                    if kind == "attn_in":
                        tensors[f"{kind}.{name}.gram"] = rows.T @ rows
            elif stage == "smooth":
                steps = torch.arange(1, len(modalities) + 1)[:, None]
                tensors[f"{kind}.scale"] = steps * torch.ones(len(modalities), width)
                heldout = [sqnr(layer, kind, m) for m in modalities]
                notes[kind] = {"heldout_sqnr_db": heldout, "origin": "by hand"}
            elif rank:
                for m, name in enumerate(modalities[1:], start=1):
                    notes[f"{kind}.{name}"] = {
                        "rank": 1,
                        "residual_energy_left": 0.5,
                        "predicted_sqnr_db": 20.0,
                        "effective_rank_unwhitened": 40.0 + layer + m,
                        "effective_rank_whitened": 10.0 + layer + m,
                    }
                    tensors[f"{kind}.{name}.singular_values"] = torch.ones(2)
        shards.save(shards.layer_file(folder, layer), tensors, fingerprint="f", notes=notes)
    summary: dict = {}
    if stage == "calibrate":
        summary = {"samples": 7, "tokens": {m: 1000 * (i + 1) for i, m in enumerate(modalities)}}
    if stage == "export":
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "config.json").write_text("{}")
        (folder / "model" / "model.safetensors").write_bytes(str(recipe["method"]).encode())
        extra = 300 if rank else 0
        summary = {"bytes": {"float": 8000, "quantized": 2200 + extra, "total": 9000}}
    outputs = {p: file_sha256(folder / p) for p in _files(folder)}
    write_manifest(
        folder,
        Manifest(
            stage=stage, fingerprint=f"{stage}-0123456789", outputs=outputs, seed=5,
            seconds=61.5 if stage == "calibrate" else 2.25, peak_bytes=3_000_000_000,
            peak_gpu_bytes=0, summary=summary, versions={"python": "3.11.7", "torch": "2.11.0"},
            reads=_reads(stage, recipe), upstream=upstream,
            sizes={p: (folder / p).stat().st_size for p in outputs},
        ),
    )  # fmt: skip


def _reads(stage: str, recipe: dict) -> dict:
    if stage == "calibrate":
        builtin = model_fingerprint(Model(path="builtin:tiny-omni"))
        read = {"the model's files": builtin, "the data files": ["ab" * 32], "device": "cpu"}
        return read | {key: recipe[key] for key in ("modalities", "calibration", "seed")}
    if stage == "smooth":
        read = {key: recipe[key] for key in ("method", "weights", "activations", "smoothing")}
        return read | {"compensation": {k: recipe["compensation"][k] for k in ("rank", "sites")}}
    if stage == "compensate":
        return {"compensation": recipe["compensation"]}
    return {"name": recipe["name"], "model": {"path": recipe["model"]["path"]}}


def _files(folder: Path) -> list[str]:
    found = (p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    return sorted(p.relative_to(folder).as_posix() for p in found)


def _outputs(folder: Path) -> dict[str, str]:
    return {p: file_sha256(folder / p) for p in _files(folder)}
