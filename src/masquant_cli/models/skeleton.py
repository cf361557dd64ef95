"""The float model without its weights: the real class on meta, weights brought in part by part.

So a job needs the memory of one decoder layer, however many there are. Buffers (rotary
frequencies, sinusoids) are real from the start. Start at `load_skeleton`.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from masquant_cli import recipe as recipes
from masquant_cli.errors import RecipeError
from masquant_cli.machine import give_back_memory
from masquant_cli.models import loading
from masquant_cli.models.checkpoint import Checkpoint, open_checkpoint
from masquant_cli.models.experts import unfuse
from masquant_cli.models.families import Family, family_of, model_class
from masquant_cli.models.resolve import resolve
from masquant_cli.models.sites import layers_path


@dataclass(frozen=True)
class Skeleton:
    """A float model in eval mode. `model`'s parameters lie on meta unless `materialised`."""

    model: nn.Module
    checkpoint: Checkpoint
    processor: Any
    path: Path
    device: torch.device
    dtype: torch.dtype
    family: Family

    @property
    def config(self) -> transformers.PretrainedConfig:
        return self.model.config

    def module(self, path: str) -> nn.Module:
        return self.model.get_submodule(path)

    def names(self, *paths: str) -> list[str]:
        """Parameters of these submodules, "" for all; tied ones under each of their names."""
        return [
            name
            for name, _ in self.model.named_parameters(remove_duplicate=False)
            if any(not path or name == path or name.startswith(f"{path}.") for path in paths)
        ]

    def names_outside_layers(self) -> list[str]:
        """Parameters of all that runs before the first decoder layer (and of the last norm)."""
        layers = f"{layers_path(self.model)}."
        head = self.model.get_output_embeddings()
        unused = {id(p) for p in head._parameters.values()} if head is not None else set()
        words = self.model.get_input_embeddings()
        unused -= {id(p) for p in words.parameters()}  # tied to the head
        return [
            name
            for name, parameter in self.model.named_parameters()
            if not name.startswith(layers) and id(parameter) not in unused
        ]

    def nbytes(self, *paths: str) -> int:
        """What these submodules weigh once materialised."""
        sizes = {id(p): p.numel() * p.dtype.itemsize for p in map(self._get, self.names(*paths))}
        return sum(sizes.values())

    @contextlib.contextmanager
    def materialised(self, *paths: str) -> Iterator[None]:
        """While open these submodules ("": all) hold their parameters on `device`.

        Those that an outer block holds already are left alone. Raises RecipeError when a tensor
        cannot be read or holds NaN or infinity.
        """
        with self.materialised_names(self.names(*paths)):
            yield

    @contextlib.contextmanager
    def materialised_names(self, names: Iterable[str]) -> Iterator[None]:
        """`materialised` for parameters by name."""
        put: list[tuple[dict, str, nn.Parameter]] = []
        try:
            self._put(names, put)
            yield
        finally:
            for owner, own, empty in put:
                owner[own] = empty
            if put:
                give_back_memory()

    def weight(self, name: str) -> Tensor:
        """The weight of a linear as stored, in fp32 on `device`: [out, in]."""
        return self.checkpoint.read(f"{name}.weight", torch.float32).to(self.device)

    def _put(self, names: Iterable[str], put: list) -> None:
        real: dict[int, nn.Parameter] = {}
        for name in names:
            owner, own = self._owner(name)
            empty = owner[own]
            if not empty.is_meta:
                continue
            if id(empty) not in real:  # tied parameters stay one tensor
                tensor = self.checkpoint.read(name, empty.dtype).to(self.device)
                real[id(empty)] = nn.Parameter(tensor, requires_grad=False)
            owner[own] = real[id(empty)]
            put.append((owner, own, empty))

    def _owner(self, name: str) -> tuple[dict[str, nn.Parameter], str]:
        path, _, own = name.rpartition(".")
        return self.model.get_submodule(path)._parameters, own

    def _get(self, name: str) -> nn.Parameter:
        owner, own = self._owner(name)
        return owner[own]


def load_skeleton(spec: recipes.Model, device: str = "auto") -> Skeleton:
    """The float model's skeleton with its processor. Raises RecipeError, EnvironmentProblem."""
    folder = resolve(spec)
    config = loading.read_config(folder)
    family = family_of(config)
    where = loading.pick_device(device)
    dtype = loading.pick_dtype(spec.dtype, where, config)
    model = build(config, family, dtype)
    checkpoint = open_checkpoint(folder, model)
    _fill_buffers(model, checkpoint, where)
    return Skeleton(
        model,
        checkpoint,
        loading.load_processor(folder),
        folder,
        where,
        dtype,
        family_of(model.config),
    )


def build(config: transformers.PretrainedConfig, family: Family, dtype: torch.dtype) -> nn.Module:
    """The family's Transformers class with all parameters and buffers on meta, as `dtype`.

    Buffers that no checkpoint holds are real, computed as `from_pretrained` computes them.
    """
    made = model_class(family)
    if family.subconfig and hasattr(config, family.subconfig):
        config = getattr(config, family.subconfig)
    try:
        with torch.device("meta"):
            model = made._from_config(config, dtype=dtype)
    except (AttributeError, ValueError, TypeError, KeyError) as error:
        raise RecipeError(
            f"Transformers cannot build {family.model_class}: {str(error).splitlines()[0]}",
            hint="is config.json complete?",
        ) from error
    for pattern, kept in model._get_dtype_plan(dtype).items():
        for name, parameter in model.named_parameters():
            if re.search(pattern.replace("*", ".*"), name):
                parameter.data = parameter.data.to(kept)
    for name, buffer in list(model.named_buffers()):
        path, _, own = name.rpartition(".")
        model.get_submodule(path)._buffers[own] = torch.empty_like(buffer, device="cpu")
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()  # on meta parameters this costs nothing
    return unfuse(model).eval().requires_grad_(False)


def _fill_buffers(model: nn.Module, checkpoint: Checkpoint, device: torch.device) -> None:
    """Buffers that the checkpoint holds, from there; all of them on `device`."""
    for name, buffer in list(model.named_buffers()):
        path, _, own = name.rpartition(".")
        if name in checkpoint.stored:
            buffer = checkpoint.read(name, buffer.dtype)
        model.get_submodule(path)._buffers[own] = buffer.to(device)
