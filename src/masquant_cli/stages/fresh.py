"""The process that verifies an export: it has nothing but the folder and encoded inputs.

`python -m masquant_cli.stages.fresh FAMILY` imports what that family needs, then waits for one line
of JSON on stdin and writes the logits asked for.
"""

import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from masquant_kernels import dispatch
from safetensors.torch import load_file, save_file
from torch import Tensor

from masquant_cli.models.capture import Batch, run_layer
from masquant_cli.models.checkpoint import open_checkpoint
from masquant_cli.models.families import FAMILIES, family_of
from masquant_cli.models.sites import layers_path
from masquant_cli.models.skeleton import Skeleton, build
from masquant_cli.runtime.context import modality_ids
from masquant_cli.runtime.hf import check_files, load_quantized
from masquant_cli.runtime.install import install
from masquant_cli.runtime.scheme import Scheme
from masquant_cli.stages.walk import IDS, POSITIONS, unflatten, walk


def answer(folder: Path, asked: Path, answered: Path, device: str, whole: bool) -> None:
    """Write logits f32 [k, vocabulary] by kind of probe, at the positions in `asked`.

    `whole`: the folder is loaded as any user would. Otherwise the model is walked layer by layer:
    the same modules, filled from the same files by the same names.
    """
    probes = unflatten(load_file(asked))
    ids = {kind: inputs.pop(IDS) for kind, inputs in probes.items()}
    positions = {kind: inputs.pop(POSITIONS) for kind, inputs in probes.items()}
    with torch.no_grad(), dispatch.force("reference"):
        if whole:
            logits = _loaded(folder, device, probes, positions)
        else:
            logits = _walked(folder, device, probes, ids, positions)
    save_file({kind: tensor.contiguous() for kind, tensor in logits.items()}, answered)


def _loaded(folder: Path, device: str, probes: dict, positions: dict) -> dict[str, Tensor]:
    model = load_quantized(folder, dtype=torch.float32).to(device)
    logits = {}
    for kind, inputs in probes.items():
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        found = model(**inputs, use_cache=False).logits
        logits[kind] = found.flatten(0, 1)[positions[kind].to(device)].float().cpu()
    return logits


def _walked(folder: Path, device: str, probes: dict, ids: dict, positions: dict) -> dict:
    skeleton = quantized_skeleton(folder, torch.device(device))
    path = layers_path(skeleton.model, skeleton.family)

    def run(index: int, work: list[Batch]) -> None:
        with _filled(skeleton, f"{path}.{index}"):
            for batch in work:
                with modality_ids(skeleton.model, batch.ids.to(skeleton.device)):
                    run_layer(skeleton, index, batch)

    return walk(skeleton, probes, ids, positions, run)


def quantized_skeleton(folder: Path, device: torch.device) -> Skeleton:
    """An exported folder's model in fp32, its parameters and packed tensors on meta."""
    config = transformers.AutoConfig.from_pretrained(folder)
    scheme = Scheme.from_dict(
        json.loads((folder / "config.json").read_text())["quantization_config"]
    )
    family = family_of(config)
    model = build(config, family, torch.float32)
    install(model, scheme)
    checkpoint = open_checkpoint(folder, model)
    check_files(model, list(checkpoint.files))
    for name, buffer in list(model.named_buffers()):
        if not buffer.is_meta:
            path, _, own = name.rpartition(".")
            kept = checkpoint.read(name, buffer.dtype) if name in checkpoint.stored else buffer
            model.get_submodule(path)._buffers[own] = kept.to(device)
    return Skeleton(model, checkpoint, None, folder, device, torch.float32, family)


@contextlib.contextmanager
def _filled(skeleton: Skeleton, path: str) -> Iterator[None]:
    """`skeleton.materialised`, and the packed tensors of the submodule, which are buffers."""
    put = []
    try:
        with skeleton.materialised(path):
            for name, empty in list(skeleton.module(path).named_buffers(prefix=path)):
                if empty.is_meta:
                    owner, _, own = name.rpartition(".")
                    buffers = skeleton.module(owner)._buffers
                    put.append((buffers, own, empty))
                    buffers[own] = skeleton.checkpoint.read(name, empty.dtype).to(skeleton.device)
            yield
    finally:
        for buffers, own, empty in put:
            buffers[own] = empty


def _end_with_parent() -> None:
    """stdin closes when whoever asked is gone, however it ended."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    getattr(transformers, FAMILIES[sys.argv[1]].model_class)  # imported while nobody waits for it
    request = json.loads(sys.stdin.readline() or "null")
    if request is None:  # not wanted any more
        sys.exit(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    answer(*map(Path, request["paths"]), request["device"], request["whole"])
