"""How every quantized layer learns the modality of its tokens.

The modules that receive a batch (the model and its inner models) share one ModalityContext.
A pre-hook on the outermost of them turns `input_ids` into modality ids; sites read them
from the context while that forward pass runs, and a post-hook takes them away again, so
ids of one batch can never be applied to the next.
"""

import contextlib
import logging
import threading
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from masquant_cli.models.modality import modality_ids as ids_of_tokens

CONTEXT = "_masquant_context"
# mm_token_type_ids as Transformers' processors write them.
_TYPE_IDS = {1: "vision", 2: "video", 3: "audio"}
log = logging.getLogger(__name__)


class Batch:
    """Modalities of the tokens of one forward pass. ids: int64 [batch, tokens]."""

    def __init__(self, ids: Tensor, mixed: bool):
        self.ids = ids
        self._modality: dict[torch.device, Tensor] | None = {} if mixed else None

    def on(self, device: torch.device) -> Tensor | None:
        """int32 [batch * tokens] as the ops take it, made once for all layers on a device.

        None when every token is of the base modality: then there is no low-rank work.
        """
        if self._modality is None:
            return None
        if device not in self._modality:
            self._modality[device] = self.ids.flatten().to(device, torch.int32)
        return self._modality[device]

    def take(self, tokens: Tensor) -> "Batch":
        """Those `tokens` alone: int64 [n], counted through the batch."""
        if self._modality is None:
            return Batch(tokens, mixed=False)  # of the ids nothing but their number is asked
        part = Batch(tokens, mixed=True)
        part._modality[tokens.device] = self.on(tokens.device)[tokens]
        return part


_NOTHING = None, None, None
_BASE = Batch(torch.empty(0, dtype=torch.int64), mixed=False)


class _State(threading.local):
    """What is true during one forward pass, per thread."""

    owner: nn.Module | None = None  # the outermost module of the pass
    source: Tensor | None = None  # the input_ids that `batch` was computed from
    batch: Batch | None = None
    forced: Tensor | None = None  # set by `modality_ids`
    cache: dict | None = None  # site -> the outputs that its linears will ask for (mas_linear.py)
    unnormed: tuple = _NOTHING  # a norm, the tensor it left to its site to norm, and its weight
    warned = False


class ModalityContext:
    """Plain object, not a module: reached through `module.__dict__`, absent from state dicts.

    `copy.deepcopy` and pickle give a copy its own fresh context (a hook that closed over the
    original would tie the copy to it).
    """

    def __init__(self, modalities: Sequence[str], token_ids: Mapping[str, Sequence[int]]):
        self.modalities = tuple(modalities)
        self.token_ids = {m: tuple(ids) for m, ids in token_ids.items()}
        self.state = _State()

    def __reduce__(self):
        return ModalityContext, (self.modalities, self.token_ids)

    def batch(self, ids: Tensor) -> Batch:
        """Check ids, once for all layers; the one time in a pass that the device is waited for."""
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"modality ids are integers, got {ids.dtype}")
        ids = ids.long()
        if not ids.numel():
            return Batch(ids, mixed=False)
        if torch.compiler.is_compiling():  # values cannot be looked at
            return Batch(ids, mixed=True)
        low, high = torch.stack(ids.aminmax()).tolist()
        if low < 0 or high >= len(self.modalities):
            raise ValueError(
                f"modality ids lie in 0..{len(self.modalities) - 1} ({', '.join(self.modalities)}),"
                f" got {low}..{high}"
            )
        return Batch(ids, mixed=high > 0)

    def current(self, shape: torch.Size) -> Batch:
        """The batch that hidden states of shape [..., in] belong to; ValueError if none fits."""
        state = self.state
        if state.batch is not None:
            batch = state.batch
        elif state.forced is not None:  # a layer called on its own, inside `modality_ids`
            batch = self.batch(state.forced)
        elif len(self.modalities) == 1:
            return _BASE
        else:
            raise ValueError(
                "the modality of these tokens is unknown: a quantized layer ran outside the "
                "model's forward pass; wrap it in masquant_cli.runtime.modality_ids(model, ids)"
            )
        tokens, expected = shape[:-1], batch.ids.shape
        if tokens != expected and tokens != (batch.ids.numel(),):
            raise ValueError(
                f"modality ids have shape {tuple(expected)}, hidden states {tuple(shape)}: "
                "they do not describe the same tokens"
            )
        return batch

    @contextlib.contextmanager
    def routed(self, shape: torch.Size, tokens: Tensor):
        """Within, hidden states are those of `tokens` [n] alone, out of states of `shape`."""
        state = self.state
        before, state.batch = state.batch, self.current(shape).take(tokens)
        try:
            yield
        finally:
            state.batch = before

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Start a pass at `module`, or leave the ids of the module around it in place."""
        state = self.state
        input_ids = kwargs.get("input_ids")
        if input_ids is None and args and isinstance(args[0], Tensor):
            input_ids = None if args[0].is_floating_point() else args[0]
        inner = state.owner is not None and state.owner is not module
        if inner and (input_ids is None or input_ids is state.source):
            return
        if not inner:
            state.owner, state.cache, state.unnormed = module, {}, _NOTHING
        state.batch = None  # nothing stale may survive an error below
        state.batch, state.source = self._identify(input_ids, kwargs), input_ids

    def leave(self, module: nn.Module) -> None:
        state = self.state
        if state.owner is module:
            state.owner = state.source = state.batch = state.cache = None
            state.unnormed = _NOTHING

    def _identify(self, input_ids: Tensor | None, kwargs: dict) -> Batch | None:
        embeds, forced = kwargs.get("inputs_embeds"), self.state.forced
        shape = None
        if input_ids is not None:
            shape = input_ids.shape
        elif isinstance(embeds, Tensor):
            shape = embeds.shape[:-1]
        # A decode step after a forced prompt: its one token speaks for itself.
        decoding = input_ids is not None and shape[-1] == 1
        if forced is not None and shape is not None and (forced.shape == shape or not decoding):
            if forced.shape != shape:
                raise ValueError(
                    f"modality ids have shape {tuple(forced.shape)}, the batch {tuple(shape)}"
                )
            return self.batch(forced)
        if input_ids is not None:
            return self.batch(ids_of_tokens(input_ids, self.token_ids, self.modalities))
        if shape is None:
            return None
        types = kwargs.get("mm_token_type_ids")
        if isinstance(types, Tensor) and types.shape == shape:
            return self.batch(self._from_types(types))
        if len(self.modalities) > 1 and not self.state.warned:
            self.state.warned = True
            log.warning(
                "masquant: called with inputs_embeds alone, so every token is treated as %s; pass "
                "input_ids or mm_token_type_ids, or use masquant_cli.runtime.modality_ids",
                self.modalities[0],
            )
        return self.batch(torch.zeros(shape, dtype=torch.int64, device=embeds.device))

    def _from_types(self, types: Tensor) -> Tensor:
        ids = torch.zeros_like(types, dtype=torch.int64)
        for value, name in _TYPE_IDS.items():
            if name == "video" and name not in self.modalities:
                name = "vision"
            if name in self.modalities:
                ids.masked_fill_(types == value, self.modalities.index(name))
        return ids


def attach(context: ModalityContext, modules: Sequence[nn.Module]) -> None:
    """Hook a context to the modules that receive a batch, outermost first."""
    for module in modules:
        module.__dict__[CONTEXT] = context
        module.register_forward_pre_hook(_enter, with_kwargs=True)
        module.register_forward_hook(_leave, always_call=True)


# Traced, what one frame notes for the next would be guessed from the first pass.
@torch.compiler.disable
def _enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
    module.__dict__[CONTEXT].enter(module, args, kwargs)


@torch.compiler.disable
def _leave(module: nn.Module, _args, _output) -> None:
    module.__dict__[CONTEXT].leave(module)


def context_of(model: nn.Module) -> ModalityContext:
    """The context of a quantized model (or of a wrapper around it)."""
    for module in model.modules():
        if CONTEXT in module.__dict__:
            return module.__dict__[CONTEXT]
    raise ValueError(f"{type(model).__name__} has no masquant layers")


@contextlib.contextmanager
def modality_ids(model: nn.Module, ids: Tensor):
    """State the modality of every token instead of deriving it from input_ids.

    ids: int [batch, tokens], indices into the checkpoint's `modalities` (0 is the base). Needed
    for calls with inputs_embeds alone and for running a layer outside the model. Within
    generate(), decode steps are derived from the generated token again. Raises ValueError for
    ids out of range, and on a call whose tokens have another shape.
    """
    context = context_of(model)
    context.batch(ids)  # a bad value is an error here, not layers deep
    before, context.state.forced = context.state.forced, ids
    try:
        yield
    finally:
        context.state.forced = before
