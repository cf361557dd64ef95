"""Model folders, exported or float, by config.json and the headers of their shards."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from masquant_cli.errors import ArtifactError, RecipeError
from masquant_cli.inspect import files
from masquant_cli.inspect.files import LOW_RANK, STORED, Tensor, parts
from masquant_cli.models.families import (
    DECODERS,
    FAMILIES,
    KIND_OF,
    SITES,
    dense_name,
    kind_of,
)
from masquant_cli.models.index import INDEX, weight_map
from masquant_cli.models.quantized import quantized_by
from masquant_cli.rundir import Manifest, read_manifest
from masquant_cli.runtime.scheme import QUANT_METHOD, Scheme

# Towers and the speaking half of an Omni model have layers too; DECODERS are the decoder's.
IN_EXPERT = re.compile(r"\.experts\.\d+$")
IN_DECODER = re.compile(r"(.+\.layers|layers)\.(\d+)\.(.+)\.(weight|weight_packed)")


@dataclass(frozen=True)
class Linear:
    """A linear of a decoder layer. `key` is its name on disk without the last part."""

    key: str
    layer: int
    kind: str  # of its site
    inputs: int
    outputs: int

    @property
    def site(self) -> str:
        """Name on disk of its site's tensors: they lie in the linear's own block, or beside the
        experts where that is what all of them read."""
        block = self.key.rpartition(".")[0]
        if self.kind == "mlp_in" and IN_EXPERT.search(block):
            block = block.rpartition(".")[0]
        return f"{block}.{self.kind}"


def folder(path: Path, shown: str | None = None) -> dict:
    """A folder that holds config.json: kind "checkpoint" when masquant wrote it, else "model"."""
    config = read_config(path)
    inner = config.get("thinker_config") or config
    method = quantized_by(config)
    ours = method == QUANT_METHOD and isinstance(config.get("quantization_config"), dict)
    tensors, found = _tensors(path, ours)
    by_name = {tensor.name: tensor for tensor in tensors}
    document = {
        "kind": "checkpoint" if ours else "model",
        "path": shown or str(path),
        "model_type": config.get("model_type"),
        "architectures": config.get("architectures") or [],
        "supported": config.get("model_type") in FAMILIES,
    }
    if ours:
        where = f"{path}/config.json"
        scheme = Scheme.from_dict(config["quantization_config"], where=where)
        linears = _packed(by_name, scheme, path, inner)
        document |= _scheme(scheme)
    else:
        linears = _dense(by_name)
        document["quantized_by"] = method
    owned = {name for linear in linears for name in _names(linear, by_name)}
    weights = sum(linear.inputs * linear.outputs for linear in linears)
    sizes = parts(tensors) if ours else _dense_sizes(tensors, owned)
    document |= {
        "layers": len({linear.layer for linear in linears}),
        "linears": len(linears),
        "weights_in_linears": weights,
        "sites": _sites(linears, by_name),
        "bytes": {**sizes, "files": sum(f["bytes"] for f in found)},
    }
    if ours:
        stored = sizes["quantized_linears"]
        document["bits_per_weight"] = {
            "without_low_rank": 8 * stored / weights,
            "with_low_rank": 8 * (stored + sizes["low_rank"]) / weights,
        }
        document["provenance"] = _provenance(path)
    return document | {"dtypes": files.dtypes(tensors), "files": found}


def provenance(manifest: Manifest) -> dict:
    """What an export's manifest says of where it comes from."""
    reads = manifest.reads
    return {
        "recipe": reads.get("name"),
        "model": (reads.get("model") or {}).get("path"),
        "seed": manifest.seed,
        "versions": manifest.versions,
        "fingerprint": manifest.fingerprint,
    }


def read_config(path: Path) -> dict:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is not a mapping")
        return config
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"config.json cannot be read: {error}",
            where=str(path / "config.json"),
            hint="write or download the model again",
        ) from error


def _tensors(path: Path, ours: bool) -> tuple[list[Tensor], list[dict]]:
    """Every tensor of the folder, and its files {"name", "bytes", "tensors"}."""
    problem = ArtifactError if ours else RecipeError
    try:
        listed = weight_map(path)
    except (OSError, ValueError) as error:
        raise problem(
            f"the list of shards cannot be read: {error}",
            where=str(path / INDEX),
            hint="write or download the model again",
        ) from error
    if listed is not None:
        names = sorted(set(listed.values()))
    else:
        whole = path / "model.safetensors"
        names = (
            [whole.name] if whole.exists() else sorted(p.name for p in path.glob("*.safetensors"))
        )
    lost = [name for name in names if not (path / name).is_file()]
    if lost or not names:
        what = f"the shard {lost[0]} is missing" if lost else "it holds no *.safetensors"
        raise problem(what, where=str(path), hint="write or download the model again")
    tensors, found = [], []
    for name in names:
        held, _ = files.read(path / name)
        tensors += held
        size = (path / name).stat().st_size
        found.append({"name": name, "bytes": size, "tensors": len(held)})
    return tensors, found


def _scheme(scheme: Scheme) -> dict:
    said = scheme.to_dict()
    return {
        "format_version": said["format_version"],
        "bits": f"W{scheme.weight_bits}A{scheme.activation_bits}",
        "weights": said["weights"],
        "activations": said["activations"],
        "modalities": said["modalities"],
        "base_modality": said["base_modality"],
        "token_ids": said["token_ids"],
        "ranks": {kind: scheme.rank(kind) for kind in scheme.sites},
    }


def _in_decoder(by_name: dict[str, Tensor], ending: str) -> Iterable[tuple[str, int, str, Tensor]]:
    for name, tensor in by_name.items():
        found = IN_DECODER.fullmatch(name)
        if found and found[4] == ending and kind_of(found[3]) and len(tensor.shape) == 2:
            yield name.removesuffix(f".{ending}"), int(found[2]), found[1], tensor


def _dense(by_name: dict[str, Tensor]) -> list[Linear]:
    return [
        Linear(key, layer, kind_of(_in_block(key)), tensor.shape[1], tensor.shape[0])
        for key, layer, prefix, tensor in _in_decoder(by_name, "weight")
        if prefix in DECODERS
    ]


def _packed(by_name: dict[str, Tensor], scheme: Scheme, path: Path, config: dict) -> list[Linear]:
    """The quantized linears. ArtifactError where a tensor that belongs to one is missing."""

    def want(name: str, shape: tuple[int, ...]) -> None:
        if name not in by_name:
            raise ArtifactError(f"{name} is missing from the checkpoint", where=str(path))
        if (has := by_name[name].shape) != shape:
            raise ArtifactError(
                f"{name} has shape {list(has)}, expected {list(shape)}", where=str(path)
            )

    linears, modalities = [], len(scheme.modalities)
    for key, layer, _, tensor in _in_decoder(by_name, "weight_packed"):
        linear = Linear(key, layer, kind_of(_in_block(key)), 0, tensor.shape[0])
        smooth = by_name.get(f"{linear.site}.smooth_inv")
        inputs = smooth.shape[-1] if smooth else 0
        linear = Linear(key, layer, linear.kind, inputs, tensor.shape[0])
        want(f"{linear.site}.smooth_inv", (modalities, inputs))
        packed = -(-inputs // 128) * 64 if scheme.weight_bits == 4 else inputs
        want(f"{key}.weight_packed", (linear.outputs, packed))
        groups = (linear.outputs, scheme.groups(inputs))
        want(f"{key}.weight_scale", groups)
        if not scheme.symmetric:
            want(f"{key}.weight_zero_point", groups)
        if rank := scheme.rank(linear.kind):
            want(f"{linear.site}.lr_a", (modalities - 1, inputs, rank))
            want(f"{key}.lr_b", (modalities - 1, rank, linear.outputs))
        linears.append(linear)
    found = {linear.layer for linear in linears}
    wanted = (config.get("text_config") or config).get("num_hidden_layers")
    lost = sorted(set(range(wanted or 0)) - found)
    if lost or not found:
        what = f"layer {lost[0]} has" if lost else "it has"
        raise ArtifactError(f"{what} no quantized linear", where=str(path))
    return linears


def _in_block(key: str) -> str:
    """`self_attn.q_proj` of `model.layers.0.self_attn.q_proj`."""
    return IN_DECODER.fullmatch(f"{key}.weight")[3]


def _names(linear: Linear, by_name: dict[str, Tensor]) -> list[str]:
    """Its own tensors, bias excluded, and its site's."""
    endings = (".weight", *STORED, *LOW_RANK)
    names = [f"{owner}{end}" for owner in (linear.key, linear.site) for end in endings]
    return [name for name in names if name in by_name]


def _dense_sizes(tensors: list[Tensor], owned: set[str]) -> dict[str, int]:
    total = sum(t.bytes for t in tensors)
    held = sum(t.bytes for t in tensors if t.name in owned)
    return {"linears": held, "other": total - held, "total": total}


def _sites(linears: list[Linear], by_name: dict[str, Tensor]) -> dict[str, dict]:
    """By kind, over all layers: linears, widths in the first layer, weights and bytes."""
    found: dict[str, dict] = {}
    for kind in SITES:
        own = [linear for linear in linears if linear.kind == kind]
        if not own:
            continue
        first = min(linear.layer for linear in own)
        order = list(KIND_OF)
        here = sorted(
            (linear for linear in own if linear.layer == first),
            key=lambda linear: order.index(dense_name(_in_block(linear.key))),
        )
        experts = len({block for x in here if IN_EXPERT.search(block := x.key.rpartition(".")[0])})
        if experts:  # all alike: one stands for them
            here = list({dense_name(_in_block(linear.key)): linear for linear in here}.values())
        # A site's linears share its tensors, which count once.
        names = {name for linear in own for name in _names(linear, by_name)}
        low_rank = sum(by_name[n].bytes for n in names if n.endswith(LOW_RANK))
        found[kind] = {
            "linears": [linear.key.rpartition(".")[2] for linear in here],
            "in": here[0].inputs,
            "out": [linear.outputs for linear in here],
            "weights": sum(linear.inputs * linear.outputs for linear in own),
            "bytes": sum(by_name[n].bytes for n in names) - low_rank,
            "low_rank_bytes": low_rank,
            **({"experts": experts} if experts else {}),
        }
    return found


def _provenance(path: Path) -> dict | None:
    """From the export stage around the folder; None where it was copied elsewhere."""
    stage = path.absolute().parent
    manifest = read_manifest(stage)
    if manifest is None or manifest.stage != "export" or path.absolute().name != "model":
        return None
    return provenance(manifest)
