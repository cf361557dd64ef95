"""Whether masquant can quantize a model, and what it finds in it: `masquant doctor --model`.

Reads config.json and, where there are any, the headers of the weights; the model is built on the
meta device. For a model it cannot quantize, it says what looks like a decoder and what is missing.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from torch import nn

from masquant_cli.errors import EnvironmentProblem, MasquantError, RecipeError
from masquant_cli.inspect.checkpoints import read_config
from masquant_cli.models.families import FAMILIES, SITES, family_of, kind_of
from masquant_cli.models.quantized import quantized_by
from masquant_cli.models.sites import LayerSites, find_sites, is_linear, layers_path

PACK = 128  # inputs are packed in blocks of so many; also the usual group size
_EXPERT = re.compile(r"\.experts\.\d+\.")
DOCS = "docs/models.md says how a family is added"


def support(path: str) -> dict:
    """A json-able document about a folder or hub id; "supported" is whether `run` would take it.

    Raises RecipeError when there is no config.json there, EnvironmentProblem when the hub cannot
    be asked.
    """
    folder = _folder(path)
    raw = read_config(folder)
    method = quantized_by(raw)
    document: dict[str, Any] = {
        "kind": "support",
        "path": path,
        "supported": False,
        "model_type": raw.get("model_type"),
        "architectures": raw.get("architectures") or [],
        "quantized_by": method,
        "problems": [],
        "warnings": [],
    }
    problems = document["problems"]
    if method is not None:
        problems.append(f"already quantized ({method}): start from the float checkpoint")
    if raw.get("auto_map"):
        document["warnings"].append(
            "the model brings code of its own, which is not run: only Transformers' classes are"
        )
    try:
        config = _transformers_config(folder)
        family = family_of(config)
        model = _build(config, family)
        document |= _found(model, config)
    except MasquantError as error:
        problems.append(error.message)
        document |= _unknown(folder, raw)
    else:
        document |= _sizes(model, document["layers"]["at"])
        document["files"] = None
        if method is None:  # else its tensors have other names and dtypes
            document["files"] = _files(folder, model, family, problems)
        document["warnings"] += [
            f"{name} cannot be calibrated with {family.model_type}'s processor yet (docs/models.md "
            "says why); leave it out of a recipe"
            for name in family.unfed
        ]
        document["warnings"] += _indivisible(document["widths"])
    document["supported"] = not problems
    return document


def _folder(path: str) -> Path:
    """Where config.json lies; of a hub model it alone is downloaded."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    from masquant_cli.models.resolve import BUILTIN, resolve
    from masquant_cli.recipe import Model

    local = Path(path).expanduser()
    if path.startswith(BUILTIN) or local.exists() or path.count("/") != 1 or path[0] in "./~":
        try:
            return resolve(Model(path=path))
        except RecipeError as error:
            raise RecipeError(error.message, where="--model", hint=error.hint) from None
    try:
        cached = try_to_load_from_cache(path, "config.json")
        return Path(
            cached if isinstance(cached, str) else hf_hub_download(path, "config.json")
        ).parent
    except ValueError as error:  # not the form of an id
        raise RecipeError(
            f"no such model folder or hub id: {path}", where="--model",
            hint="a folder that holds config.json, or an id like Qwen/Qwen2.5-VL-7B-Instruct",
        ) from error  # fmt: skip
    except OSError as error:
        from huggingface_hub.errors import HfHubHTTPError

        if isinstance(error, HfHubHTTPError):
            raise RecipeError(
                f"the hub has no config.json of {path} to give", where="--model",
                hint="check the id; a gated or private model needs `hf auth login`",
            ) from error  # fmt: skip
        raise EnvironmentProblem(
            f"the hub cannot be reached and {path} is not in the local cache", where="--model",
            hint="point --model at a folder that holds its config.json",
        ) from error  # fmt: skip


def _transformers_config(folder: Path):
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(folder)
    except Exception as error:  # each configuration class refuses values in its own way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RecipeError(
            f"Transformers {transformers.__version__} cannot read this config.json: {reason[:300]}",
            hint="a newer transformers may know the model",
        ) from error


def _build(config, family) -> nn.Module:
    import torch

    from masquant_cli.models.skeleton import build

    return build(config, family, getattr(config, "dtype", None) or torch.bfloat16)


def _found(model: nn.Module, config) -> dict:
    """Of a supported family: its class, decoder layers, sites, modalities and widths."""
    from masquant_cli.models.modality import token_ids_of

    layers = find_sites(model)
    path = layers_path(model)
    family = family_of(config)
    widths: dict[int, list[str]] = {}
    for site in (site for layer in layers for site in layer.sites):
        kinds = widths.setdefault(site.in_features, [])
        kinds += [site.kind] if site.kind not in kinds else []
    return {
        "family": family.model_type,
        "class": type(model).__name__,
        "decoder": path.rpartition(".")[0],
        "layers": {"at": path, "count": len(layers)},
        "sites": _groups(layers),
        "modalities": {"text": [], **token_ids_of(config)},
        "widths": [
            {
                "inputs": width,
                "sites": kinds,
                "divides_by_group_of_128": width % PACK == 0,
                "packed_to": -(-width // PACK) * PACK,
            }
            for width, kinds in sorted(widths.items())
        ],
        "tied_embeddings": _tied(model),
    }


def _groups(layers: list[LayerSites]) -> list[dict]:
    """Layers that are alike, together: which, and their sites' linears and shapes."""
    groups: dict[str, dict] = {}
    for layer in layers:
        experts = sum(site.expert is not None for site in layer.sites)
        sites: dict[str, dict] = {}
        for site in layer.sites:
            entry = sites.setdefault(
                site.kind, {"linears": [], "in": site.in_features, "out": [], "experts": None}
            )
            entry["experts"] = experts if site.experts else None
            for linear, out in zip(site.linears, site.out_features, strict=True):
                name = _EXPERT.sub(".experts.*.", linear.removeprefix(f"{layer.module}."))
                if name not in entry["linears"]:
                    entry["linears"].append(name)
                    entry["out"].append(out)
        group = groups.setdefault(json.dumps(sites), {"layers": [], "sites": sites})
        group["layers"].append(layer.layer)
    return list(groups.values())


def _tied(model: nn.Module) -> bool:
    head, words = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and getattr(head, "weight", None) is words.weight


def _sizes(model: nn.Module, layers: str) -> dict:
    """Parameters in all, in the decoder layers, in linears that are quantized; what stays float."""
    quantized = {name for layer in find_sites(model) for s in layer.sites for name in s.linears}
    holders = {path for name in quantized for path in _above(name)}
    kept: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if owner not in quantized:
            # The largest block around it that holds no quantized linear.
            part = next((path for path in _above(owner) if path not in holders), owner)
            part = re.sub(rf"^({re.escape(layers)})\.\d+", r"\1.*", part)
            kept[part] = kept.get(part, 0) + parameter.numel()
    return {
        "parameters": {
            "total": sum(p.numel() for p in model.parameters()),
            "decoder_layers": sum(p.numel() for p in model.get_submodule(layers).parameters()),
            "quantized": sum(model.get_submodule(name).weight.numel() for name in quantized),
        },
        "left_float": [{"module": name, "parameters": count} for name, count in kept.items()],
    }


def _above(path: str) -> list[str]:
    """The path and the paths around it, outermost first."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def _files(folder: Path, model: nn.Module, family, problems: list[str]) -> dict | None:
    """What the headers of the weights say; None when there are none here."""
    from masquant_cli.models.checkpoint import open_checkpoint
    from masquant_cli.models.index import INDEX

    if not (folder / INDEX).exists() and not any(folder.glob("*.safetensors")):
        return None
    try:
        checkpoint = open_checkpoint(folder, model)
    except RecipeError as error:
        problems.append(f"{error.message} ({error.hint})" if error.hint else error.message)
        return {"complete": False}
    stored = checkpoint.stored.values()
    return {
        "complete": True,
        "shards": len({tensor.file for tensor in stored}),
        "bytes": sum(tensor.nbytes for tensor in set(stored)),
    }


def _indivisible(widths: list[dict]) -> list[str]:
    return [
        f"{w['inputs']} inputs ({', '.join(w['sites'])}) are no multiple of {PACK}: "
        f"weights.group_size {PACK} does not fit them (one scale per channel does), "
        f"4-bit packing pads them to {w['packed_to']}"
        for w in widths
        if not w["divides_by_group_of_128"]
    ]


def _unknown(folder: Path, raw: dict) -> dict:
    """What looks like a decoder in a model that cannot be quantized, and what is missing."""
    fields = {
        name: value
        for place in (raw, raw.get("vision_config"), raw.get("audio_config"))
        if isinstance(place, dict)
        for name, value in place.items()
        if name.endswith(("_token_id", "_token_index"))
        and name.startswith(("image", "video", "audio"))
    }
    missing = []
    if raw.get("model_type") not in FAMILIES:
        missing.append(f"a row for {raw.get('model_type')!r} in the table of families ({DOCS})")
    found: dict[str, Any] = {"placeholders": fields, "missing": missing, "looks_like_decoder": None}
    try:
        model = _any_model(_transformers_config(folder), raw)
    except MasquantError:
        return found
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and _linears(module)
    }
    if not lists:
        missing.append("a list of decoder layers that hold nn.Linear")
        return found
    towers = ("vision", "visual", "audio", "image", "encoder")
    likely = [name for name in lists if not any(word in name for word in towers)]
    path = max(likely or lists, key=lambda n: sum(p.numel() for p in lists[n].parameters()))
    kinds = Counter(type(layer).__name__ for layer in lists[path])
    usual = kinds.most_common(1)[0][0]
    layer = next(layer for layer in lists[path] if type(layer).__name__ == usual)
    linears = _linears(layer)
    for kind in (kind for kind in SITES if kind not in set(map(kind_of, linears))):
        ways = " or ".join(" + ".join(way) for way in SITES[kind])
        missing.append(f"linears of {kind}: none is called {ways}")
    if len(kinds) > 1:
        counts = ", ".join(f"{count} {name}" for name, count in kinds.items())
        missing.append(f"layers that are alike: there are {counts}")
    stacked = [f"{name} {list(p.shape)}" for name, p in layer.named_parameters() if p.ndim == 3]
    if stacked:
        missing.append(f"experts as linears: {', '.join(stacked)} hold all of a layer's in one")
    found["looks_like_decoder"] = {
        "class": type(model).__name__,
        "layers": path,
        "count": len(lists[path]),
        "layer": usual,
        "linears": linears,
    }
    return found


def _linears(module: nn.Module) -> dict[str, list[int]]:
    return {
        name: [m.out_features, m.in_features] for name, m in module.named_modules() if is_linear(m)
    }


def _any_model(config, raw: dict) -> nn.Module:
    """The class that config.json names, or else the base model, on meta."""
    import torch
    import transformers

    named = [getattr(transformers, name, None) for name in raw.get("architectures") or ()]
    makers = [c._from_config for c in named if hasattr(c, "_from_config")]
    text = getattr(config, "get_text_config", lambda: config)()
    attempts = [(make, config) for make in (*makers, transformers.AutoModel.from_config)]
    for make, of in (*attempts, (transformers.AutoModelForCausalLM.from_config, text)):
        try:
            with torch.device("meta"):
                return make(of)
        except Exception:  # whatever a class that nobody tried here raises
            continue
    raise RecipeError("Transformers has no class for this model")
