"""What stands in front of a site, done by the site: RMSNorm, and SiLU(gate) * up.

A module takes its original's place only where it is the same function. It hands its work to the
site behind it only while nobody looks: with a hook in between, or for a gradient, it computes
its plain definition, so an observer sees what it would see in the float model.
"""

import functools
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from masquant_cli.runtime.context import ModalityContext


class MasRMSNorm(nn.Module):
    """weight * x / sqrt(mean x^2 + eps), usually done by the site that reads it.

    Then `forward` returns x itself and notes in the context that x is still to be normed.
    """

    def __init__(self, norm: nn.Module, context: ModalityContext):
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon
        self.train(norm.training)
        self.context = context
        self.readers: tuple[nn.Module, ...] = ()  # the block that is given the output; its linears

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.plain(x)
        state, weight = self.context.state, self._parameters["weight"]
        # The block's output may be watched all the same (output_attentions).
        block, *linears = self.readers
        if state.cache is None or block._forward_pre_hooks or _watched(self, *linears):
            return self.plain(x)
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return self.plain(x)
        state.unnormed = self, x, weight  # which may be elsewhere (offloaded) when we are through
        return x

    def plain(self, x: Tensor) -> Tensor:
        """As Transformers does it: normed in fp32, scaled in x's dtype."""
        normed = x.float() * torch.rsqrt(
            x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon
        )
        return self.weight * normed.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class GatedMLP(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)), the middle part done by down_proj's site."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        for name, child in mlp.named_children():
            self.add_module(name, child)
        self.train(mlp.training)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj
        return down(silu(gate) * up) if _watched(down) else down(gate, up)


def _watched(*modules: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def is_rms_norm(norm: nn.Module) -> bool:
    """Whether `norm` computes what MasRMSNorm does (Gemma's, for one, scales by 1 + weight)."""
    return (
        type(norm).__name__.endswith("RMSNorm")
        and set(norm.state_dict()) == {"weight"}
        and isinstance(getattr(norm, "variance_epsilon", None), float)
        and "forward" not in norm.__dict__
        and _plain_norm(type(norm))
    )


def is_gated_mlp(mlp: nn.Module) -> bool:
    """Whether `mlp` computes down_proj(silu(gate_proj(x)) * up_proj(x)) and holds nothing else."""
    names = {name for name, _ in mlp.named_children()}
    if names != {"gate_proj", "up_proj", "down_proj", "act_fn"} or "forward" in mlp.__dict__:
        return False
    if set(mlp.named_parameters(recurse=False)) or set(mlp.named_buffers(recurse=False)):
        return False
    x = _probe()
    return torch.equal(mlp.act_fn(x), silu(x)) and _plain_mlp(type(mlp))


@functools.cache
def _plain_norm(cls: type) -> bool:
    """The class's own `forward`, run on a stand-in that has nothing but a weight and an eps."""
    norm = SimpleNamespace(weight=_probe()[0] + 3, variance_epsilon=0.1)
    norm_of_x = MasRMSNorm.plain(norm, _probe())
    return _same(cls, norm, norm_of_x)


@functools.cache
def _plain_mlp(cls: type) -> bool:
    mlp = SimpleNamespace(
        gate_proj=lambda x: 2 * x + 1,
        up_proj=lambda x: x * x - 2,
        down_proj=lambda x: 3 * x + 5,
        act_fn=silu,
    )
    x = _probe()
    return _same(cls, mlp, mlp.down_proj(silu(mlp.gate_proj(x)) * mlp.up_proj(x)))


def _same(cls: type, stand_in: SimpleNamespace, expected: Tensor) -> bool:
    try:
        found = cls.forward(stand_in, _probe())
    except (AttributeError, TypeError):  # it reads or takes more than the stand-in has
        return False
    return isinstance(found, Tensor) and torch.allclose(found, expected, rtol=1e-5, atol=0)


def _probe() -> Tensor:
    return torch.linspace(-2, 3, 24, device="cpu", dtype=torch.float32).view(3, 8)
