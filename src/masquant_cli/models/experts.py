"""Experts layers: each expert's linears by name, where Transformers keeps two tensors for all.

`unfuse` turns a model's fused experts ([E, 2I, H] and [E, H, I] parameters) into `Experts`, which
gives the same result from linears called `...mlp.experts.17.gate_proj`. Routers are left alone.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from masquant_cli.errors import RecipeError

GATE_UP, DOWN = "gate_up_proj", "down_proj"  # the fused parameters, as Transformers 5 names them
LINEARS = ("gate_proj", "up_proj", "down_proj")  # of one expert; the first two lie in GATE_UP


class Expert(nn.Module):
    """down_proj(act_fn(gate_proj(x)) * up_proj(x)) for the tokens routed here."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, act_fn: nn.Module):
        super().__init__()
        for name, weight in zip(LINEARS, (gate, up, down), strict=True):
            self.add_module(name, _linear(weight))
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """The experts of one layer, as children "0", "1", ...; takes and gives what the fused one does.

    While an expert runs, its `tokens` are the flat indices of the tokens it is given.
    `context`, set by runtime.install, tells quantized experts the modality of those tokens.
    """

    context = None

    def __init__(self, fused: nn.Module):
        super().__init__()
        gate_up, down = getattr(fused, GATE_UP), getattr(fused, DOWN)
        gates, ups = gate_up.detach().chunk(2, 1)  # views: the memory is not spent twice
        for index, weights in enumerate(zip(gates, ups, down.detach(), strict=True)):
            self.add_module(str(index), Expert(*weights, fused.act_fn))
        self.count = len(down)
        self.train(fused.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index int [T, k], top_k_weights [T, k] -> [T, H]."""
        out = torch.zeros_like(hidden_states)
        for index, tokens, place in routes(top_k_index, self.count):
            y = self._run(index, hidden_states, tokens)
            y = y * top_k_weights[tokens, place, None]
            out.index_add_(0, tokens, y.to(out.dtype))
        return out

    def _run(self, index: int, hidden_states: Tensor, tokens: Tensor) -> Tensor:
        expert = self._modules[str(index)]
        if self.context is not None:
            with self.context.routed(hidden_states.shape, tokens):
                return expert(hidden_states[tokens])
        expert.tokens = tokens
        try:
            return expert(hidden_states[tokens])
        finally:
            expert.tokens = None

    def extra_repr(self) -> str:
        return f"experts={self.count}"


def routes(top_k_index: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, tokens [n], places [n]) of every expert that was chosen, in ascending order.

    top_k_index int [T, k] names the experts of each token; top_k_index[tokens, places] == expert.
    """
    flat, k = top_k_index.flatten(), top_k_index.shape[1]
    order, start = flat.argsort(stable=True), 0
    # The one time in a layer that the device is waited for.
    for index, size in enumerate(torch.bincount(flat, minlength=experts).tolist()):
        if size:
            chosen = order[start : start + size]
            yield index, chosen // k, chosen % k
            start += size


def routed(model: nn.Module, linear: str, per_token: Tensor) -> Tensor:
    """What `per_token [B, T]` says of the tokens that `linear` is running on.

    [n] for an expert's, while it runs on n routed tokens; as it is for any other linear.
    """
    tokens = getattr(model.get_submodule(linear.rpartition(".")[0]), "tokens", None)
    return per_token if tokens is None else per_token.flatten()[tokens.to(per_token.device)]


def is_fused(module: nn.Module) -> bool:
    """Whether `module` holds the weights of several experts in 3-D parameters."""
    parameters = (module._parameters.get(name) for name in (GATE_UP, DOWN))
    return all(parameter is not None and parameter.ndim == 3 for parameter in parameters)


def unfuse(model: nn.Module, block: str = "mlp.experts") -> nn.Module:
    """Replace the fused experts of every decoder layer, in place; returns the model.

    `block` is their path in a layer. Meta parameters give meta linears, real ones are viewed.
    Raises RecipeError for experts that compute something else than `Expert` does.
    """
    for name, module in list(model.named_modules()):
        if re.search(rf"\.layers\.\d+\.{re.escape(block)}$", name) and is_fused(module):
            _refuse_unlike(name, module)
            parent, _, child = name.rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, child, Experts(module))
            owner._is_hf_initialized = True  # or Transformers looks for the fused parameters
    return model


@dataclass(frozen=True)
class Piece:
    """Where one expert's weight lies: whole[expert, start:] of a parameter [experts, outs, in].

    On disk the fused tensor may be [experts, in, outs]; shapes tell.
    """

    whole: str  # module key of the fused parameter
    expert: int
    experts: int
    start: int
    outs: int


def pieces(model: nn.Module) -> dict[str, Piece]:
    """{module key of an expert's weight: its place in the fused parameter} of an unfused model."""
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, Experts):
            continue
        for index in range(module.count):
            prefix, expert = f"{name}.{index}", module.get_submodule(str(index))
            inner, outer = expert.gate_proj.out_features, expert.down_proj.out_features
            gate_up = partial(Piece, f"{name}.{GATE_UP}", index, module.count, outs=2 * inner)
            found[f"{prefix}.gate_proj.weight"] = gate_up(start=0)
            found[f"{prefix}.up_proj.weight"] = gate_up(start=inner)
            down = Piece(f"{name}.{DOWN}", index, module.count, start=0, outs=outer)
            found[f"{prefix}.down_proj.weight"] = down
    return found


def per_expert(transforms: Sequence) -> list:
    """Transformers' weight conversions for a model whose experts have linears of their own.

    Conversions that stack experts are left out; where a file calls an expert's linears something
    else (w1, w3, w2), a renaming takes their place.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    kept = []
    for transform in transforms:
        targets = [target.rpartition(".")[2] for target in transform.target_patterns]
        if not isinstance(transform, WeightConverter) or targets not in ([GATE_UP], [DOWN]):
            kept.append(transform)
            continue
        names = LINEARS[:2] if targets == [GATE_UP] else LINEARS[2:]
        for source, name in zip(transform.source_patterns, names, strict=False):
            theirs = re.search(r"\*\\?\.(\w+)\\?\.weight$", source)
            if theirs and theirs[1] != name:
                renaming = WeightRenaming(rf"experts\.(\d+)\.{theirs[1]}\.", rf"experts.\1.{name}.")
                renaming.scope_prefix = transform.scope_prefix
                renaming.base_model_prefix = transform.base_model_prefix
                kept.append(renaming)
    return kept


def _linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made


def _refuse_unlike(name: str, module: nn.Module) -> None:
    """Layouts that Transformers marks on the module, and shapes that do not fit the plain one."""
    gate_up, down = getattr(module, GATE_UP), getattr(module, DOWN)
    marked = (
        getattr(module, "has_bias", False)
        or getattr(module, "is_transposed", False)
        or getattr(module, "has_post_expert_norm", False)
        or not getattr(module, "is_concatenated", True)
        or not getattr(module, "has_gate", True)
        or set(dict(module.named_parameters())) != {GATE_UP, DOWN}
    )
    experts, hidden, inner = down.shape
    if marked or tuple(gate_up.shape) != (experts, 2 * inner, hidden):
        raise RecipeError(
            f"these experts ({type(module).__name__}) are laid out in a way that is not "
            "supported yet",
            where=name,
            hint="supported are gated experts without biases, gate and up stacked",
        )
