"""Logits of a model whose weights are on disk, in the memory of one decoder layer.

Used on both sides of verification: what happens in a layer is the caller's. Start at `walk`.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from masquant_cli.models.capture import Batch, embed
from masquant_cli.models.checkpoint import Stored, read
from masquant_cli.models.sites import layers_path
from masquant_cli.models.skeleton import Skeleton

HEAD = 1 << 24  # weights of the output head that are in memory at a time
RunLayer = Callable[[int, list[Batch]], None]  # advances every batch through one layer
IDS, POSITIONS = "ids", "positions"  # of a probe, where a file holds them beside its inputs
Probes = dict[str, dict[str, Tensor]]  # kind of input -> what the model is given, by name


@torch.no_grad()
def walk(
    skeleton: Skeleton,
    probes: Probes,
    ids: Mapping[str, Tensor],
    positions: Mapping[str, Tensor],
    run_layer: RunLayer,
) -> dict[str, Tensor]:
    """Logits f32 [k, vocabulary] at `positions` of every probe, by its kind.

    probes: model inputs by kind; ids: int64 [B, T] modalities of their tokens; positions: int64
    [k] into the B * T tokens.
    """
    with before_layers(skeleton):
        work = {kind: embed(skeleton, inputs, ids[kind]) for kind, inputs in probes.items()}
    layers = skeleton.module(layers_path(skeleton.model, skeleton.family))
    for index in range(len(layers)):
        run_layer(index, list(work.values()))
    last = [batch.hidden.flatten(0, 1)[positions[kind]] for kind, batch in work.items()]
    logits = _head(skeleton, layers, torch.cat(last).to(skeleton.device)).float().cpu()
    parts = logits.split([len(part) for part in last])
    return {kind: part.clone() for kind, part in zip(work, parts, strict=True)}


@contextlib.contextmanager
def before_layers(skeleton: Skeleton, *, at_once: bool = False) -> Iterator[None]:
    """All that runs before the first layer works inside. Unless all of it is to be in memory
    `at_once`, blocks of towers have their weights only while they run, and of the word embeddings
    only the rows that are asked for are read."""
    if at_once:
        with skeleton.materialised_names(skeleton.names_outside_layers()):
            yield
        return
    words, blocks = skeleton.model.get_input_embeddings(), tower_blocks(skeleton)
    with contextlib.ExitStack() as stack:
        stack.enter_context(skeleton.materialised_names(held_before_layers(skeleton, blocks)))
        for path in blocks:
            stack.enter_context(_only_while_it_runs(skeleton, path))
        if _read_by_row(words):
            stored = _stored(skeleton, words)
            stack.enter_context(instead_of(words, partial(_rows, stored, skeleton)))
        yield


def held_before_layers(skeleton: Skeleton, blocks: Sequence[str]) -> list[str]:
    """What stays in memory until the first layer when towers are read by their `blocks`."""
    words, inside = skeleton.model.get_input_embeddings(), tuple(f"{path}." for path in blocks)
    by_row = {id(words.weight)} if _read_by_row(words) else set()
    return [
        name
        for name in skeleton.names_outside_layers()
        if not name.startswith(inside) and id(skeleton.model.get_parameter(name)) not in by_row
    ]


def _read_by_row(words: nn.Module) -> bool:
    return type(words) is nn.Embedding and words.max_norm is None


def tower_blocks(skeleton: Skeleton) -> list[str]:
    """Members of the module lists that are not decoder layers, outermost lists only."""
    # Phi-4's towers lie in its decoder, beside the layers.
    layers = layers_path(skeleton.model, skeleton.family)
    found: list[str] = []
    for path, module in skeleton.model.named_modules():
        nested = path.startswith((f"{layers}.", *(f"{outer}." for outer in found)))
        if isinstance(module, nn.ModuleList) and path != layers and not nested:
            found += [f"{path}.{index}" for index in range(len(module))]
    return found


@contextlib.contextmanager
def _only_while_it_runs(skeleton: Skeleton, path: str) -> Iterator[None]:
    module, open_now = skeleton.module(path), contextlib.ExitStack()

    def enter(*_) -> None:
        open_now.enter_context(skeleton.materialised(path))

    def leave(*_) -> None:
        open_now.close()

    handles = (
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(leave, always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _head(skeleton: Skeleton, layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    """[k, vocabulary]: what the model makes of `hidden` [k, H], the last layer's output.

    The model's own forward with layers that hand `hidden` on, so that its last norm, its head and
    whatever it does to logits are its own.
    """
    decoder = layers_path(skeleton.model, skeleton.family).rpartition(".")[0] + "."
    head = skeleton.model.get_output_embeddings()
    words = skeleton.model.get_input_embeddings()
    by_rows = type(head) is nn.Linear
    spare = {id(p) for p in words.parameters()} - {id(p) for p in head.parameters()}
    spare |= {id(head.weight)} if by_rows else set()
    towers = tuple(f"{path}." for path in tower_blocks(skeleton))
    wanted = [
        name
        for name in {*skeleton.names_outside_layers(), *skeleton.names(_path(skeleton, head))}
        if name.startswith((decoder, _path(skeleton, head)))
        and not name.startswith(towers)
        and id(skeleton.model.get_parameter(name)) not in spare
    ]
    given = hidden[None]
    with contextlib.ExitStack() as stack:
        stack.enter_context(skeleton.materialised_names(wanted))
        if by_rows:
            stored = _stored(skeleton, head)
            stack.enter_context(instead_of(head, partial(_linear, stored, head.bias)))
        for layer in layers:
            stack.enter_context(instead_of(layer, lambda *_, **__: given))
        logits = skeleton.model(inputs_embeds=torch.zeros_like(given), use_cache=False).logits
    return logits[0]


def _rows(stored: Stored, skeleton: Skeleton, ids: Tensor) -> Tensor:
    """Rows of an embedding, read one by one."""
    unique, where = ids.unique(return_inverse=True)
    rows = [_some_rows(stored, row, 1, skeleton.dtype) for row in unique.tolist()]
    return embedding(where, torch.cat(rows).to(skeleton.device))


def _linear(stored: Stored, bias: Tensor | None, x: Tensor) -> Tensor:
    """A linear whose weight [out, in] is read some rows at a time."""
    out, width = stored.shape
    step = max(1, HEAD // width)
    parts = []
    for row in range(0, out, step):
        weight = _some_rows(stored, row, min(step, out - row), x.dtype).to(x.device)
        parts.append(linear(x, weight))
    y = torch.cat(parts, -1)
    return y if bias is None else y + bias


def _some_rows(stored: Stored, first: int, count: int, dtype: torch.dtype) -> Tensor:
    width = stored.shape[1]
    start = stored.start + first * width * stored.dtype.itemsize
    return read(replace(stored, shape=(count, width), start=start), dtype)


def _stored(skeleton: Skeleton, module: nn.Module) -> Stored:
    return skeleton.checkpoint.stored[f"{_path(skeleton, module)}.weight"]


def _path(skeleton: Skeleton, wanted: nn.Module) -> str:
    return next(path for path, module in skeleton.model.named_modules() if module is wanted)


@contextlib.contextmanager
def instead_of(module: nn.Module, forward: Callable) -> Iterator[None]:
    """`module` runs `forward` in place of its own."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward  # an instance attribute hid the method


def flatten(probes: Probes) -> dict[str, Tensor]:
    """{"vision/pixel_values": tensor, ...}, as one file holds them."""
    return {f"{k}/{n}": t.contiguous() for k, inputs in probes.items() for n, t in inputs.items()}


def unflatten(tensors: dict[str, Tensor]) -> Probes:
    probes: Probes = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        probes.setdefault(kind, {})[name] = tensor
    return probes
