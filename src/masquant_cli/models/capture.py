"""Walking a decoder layer by layer over kept hidden states, seeing each site's input once.

The model runs in full only up to its first decoder layer. A dry pass through the rest, in which
every layer hands on what it got, tells what else each layer is given: its own mask, its own rotary
embeddings. From there `run_layer` does what the full forward would. Start at `embed`.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from masquant_cli.errors import RecipeError
from masquant_cli.models.sites import Site, layers_path
from masquant_cli.models.skeleton import Skeleton

DROPPED = ("past_key_values", "past_key_value", "use_cache", "cache_position")
DEEPSTACK = "_deepstack_process"  # the decoder's method that adds visual features after a layer


@dataclass(frozen=True)
class _Kept:
    """Stands for a tensor among `Arguments.tensors`."""

    index: int


@dataclass
class Arguments:
    """What each layer is given besides its hidden states. Tensors that layers share lie here once;
    `tensors` may be taken away between layers and given back."""

    tensors: list[Tensor] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    between: list[tuple | None] = field(default_factory=list)  # arguments of DEEPSTACK, per layer
    _seen: dict[int, tuple[Tensor, int]] = field(default_factory=dict, repr=False)

    def add(self, given: dict[str, Any]) -> None:
        self.layers.append(self._map(given, self._put))
        self.between.append(None)

    def add_between(self, given: tuple) -> None:
        self.between[-1] = self._map(given, self._put)

    def done(self) -> None:
        """Nothing more is added: tensors go to the CPU."""
        self.tensors = [tensor.to("cpu") for tensor in self.tensors]
        self._seen.clear()

    def of(self, layer: int, device: torch.device) -> tuple[dict[str, Any], tuple | None]:
        """The layer's keyword arguments, and those of DEEPSTACK after it, on `device`."""

        def get(value):
            return self.tensors[value.index].to(device) if isinstance(value, _Kept) else value

        return self._map(self.layers[layer], get), self._map(self.between[layer], get)

    def _put(self, value):
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._seen:  # the tensor is kept too, or its id might come again
            self._seen[id(value)] = value, len(self.tensors)
            self.tensors.append(value)
        return _Kept(self._seen[id(value)][1])

    def _map(self, value, leaf: Callable):
        if isinstance(value, dict):
            return {k: self._map(v, leaf) for k, v in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(self._map(v, leaf) for v in value)
        return leaf(value)


@dataclass
class Batch:
    """What the next decoder layer gets: hidden [B, T, H] on the CPU (None while it is stored
    elsewhere), its other arguments, and who is who."""

    hidden: Tensor | None
    arguments: Arguments
    ids: Tensor  # [B, T] modality of each token
    real: Tensor  # [B, T] bool, False for padding
    keys: Tensor  # [B, T] f64: a token's place in the order in which rows are sampled

    @property
    def marks(self) -> Tensor:
        """[B, T] modality of each token, -1 for padding."""
        return self.ids.masked_fill(~self.real, -1)


class _Stop(Exception):
    """Raised when the decoder has run dry: its output head is not wanted."""


@torch.no_grad()
def embed(
    skeleton: Skeleton, inputs: dict[str, Tensor], ids: Tensor, keys: Tensor | None = None
) -> Batch:
    """Embed one batch, towers included, and return what the decoder's layers would see.

    Called where all but the decoder's layers can run, inside `before_layers`. Raises RecipeError
    for a model that does something to the hidden states between layers that its family does not
    declare.
    """
    inputs = {k: v.to(skeleton.device) for k, v in inputs.items()}
    dry = _DryPass(skeleton, returns_tuple=False)
    dry.run(inputs)
    if dry.indexed:
        dry = _DryPass(skeleton, returns_tuple=True)
        dry.run(inputs)
    if dry.count < len(dry.layers):
        raise RecipeError(
            "this model changes hidden states between its decoder layers "
            f"(before layer {dry.count})", where=str(skeleton.path),
            hint="this model family may be laid out differently than masquant expects",
        )  # fmt: skip
    dry.arguments.done()
    real = inputs["attention_mask"].bool().cpu()
    keys = torch.zeros(real.shape, dtype=torch.float64) if keys is None else keys
    return Batch(dry.hidden.to("cpu"), dry.arguments, ids.cpu(), real, keys)


class _DryPass:
    """One forward in which decoder layers hand on what they get and note what they are given."""

    def __init__(self, skeleton: Skeleton, returns_tuple: bool):
        self.skeleton, self.returns_tuple = skeleton, returns_tuple
        path = layers_path(skeleton.model, skeleton.family)
        self.layers, self.decoder = skeleton.module(path), skeleton.module(path.rpartition(".")[0])
        self.arguments, self.hidden, self.count = Arguments(), None, 0
        self.indexed = False  # whether the decoder took [0] of what a layer returned

    def run(self, inputs: dict[str, Tensor]) -> None:
        """`count` layers got what the one before them returned."""
        replaced: list[tuple[nn.Module, str]] = []
        handle = self.decoder.register_forward_hook(self._stop)
        try:
            for index, layer in enumerate(self.layers):
                names = inspect.signature(layer.forward)
                layer.forward = functools.partial(self._layer, index, names)
                replaced.append((layer, "forward"))
            if self.skeleton.family.between == "deepstack":
                setattr(self.decoder, DEEPSTACK, self._between)
                replaced.append((self.decoder, DEEPSTACK))
            self.skeleton.model(**inputs, use_cache=False)
        except _Stop:
            pass
        finally:
            handle.remove()
            for module, name in replaced:
                delattr(module, name)  # an instance attribute hid the method

    def _layer(self, index: int, names: inspect.Signature, *args, **kwargs):
        given = dict(names.bind_partial(*args, **kwargs).arguments)
        for name, parameter in names.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        hidden = given.pop(next(iter(given)))
        if index != self.count or (index and hidden is not self.hidden):
            self.indexed = self.hidden is not None and hidden.shape == self.hidden.shape[1:]
            raise _Stop
        self.hidden, self.count = hidden, index + 1
        self.arguments.add({k: v for k, v in given.items() if k not in DROPPED})
        return (hidden,) if self.returns_tuple else hidden

    def _between(self, hidden: Tensor, *given) -> Tensor:
        self.arguments.add_between(given)
        return hidden

    def _stop(self, *_) -> None:
        raise _Stop


def layer_output(skeleton: Skeleton, index: int, hidden: Tensor, batch: Batch) -> Tensor:
    """What enters layer `index + 1` when `hidden` [B, T, H] enters layer `index`."""
    path = layers_path(skeleton.model, skeleton.family)
    given, between = batch.arguments.of(index, skeleton.device)
    out = skeleton.module(f"{path}.{index}")(hidden, **given)
    out = out[0] if isinstance(out, tuple) else out
    if between is not None:
        out = getattr(skeleton.module(path.rpartition(".")[0]), DEEPSTACK)(out, *between)
    return out


@torch.no_grad()
def run_layer(skeleton: Skeleton, index: int, batch: Batch) -> None:
    """Advance `batch.hidden` through a materialised layer, in place of the full forward."""
    out = layer_output(skeleton, index, batch.hidden.to(skeleton.device), batch)
    batch.hidden = out.to("cpu")


@contextlib.contextmanager
def watch_sites(
    model: nn.Module, sites: Sequence[Site], see: Callable[[Site, Tensor], None]
) -> Iterator[None]:
    """Call `see(site, x)` with each site's input while the block runs.

    Where the linears of a site are those of several experts, that is the input of them all.
    """
    handles = []
    for site in sites:

        def hook(_module, args, kwargs, site=site):
            see(site, args[0] if args else next(iter(kwargs.values())))

        module = model.get_submodule(site.source)
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
