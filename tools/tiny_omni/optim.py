"""Muon for the matrices inside the networks, AdamW for the rest.

torch.optim.Muon orthogonalises in bf16, which has no fast matmul on this CPU; this is the same
update in fp32.
"""

import math

import torch


@torch.no_grad()
def orthogonalise(matrix, steps: int = 5):
    """Approximately U V^T of `matrix` = U S V^T (Newton-Schulz, quintic)."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / wide.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


class Muon(torch.optim.Optimizer):
    """Momentum, then an orthogonalised step with AdamW's root mean square."""

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                buffer = state.setdefault("momentum", torch.zeros_like(param))
                buffer.lerp_(param.grad, 1 - group["momentum"])
                nesterov = param.grad.lerp(buffer, group["momentum"])
                scale = 0.2 * math.sqrt(max(param.shape))
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(orthogonalise(nesterov), alpha=-group["lr"] * scale)


class Pair:
    """Both optimizers behind one schedule: linear warm-up, then cosine to 2 % of the peak."""

    def __init__(self, named_params, lr: float, weight_decay: float, total: int, warmup: int = 50):
        named = [(name, param) for name, param in named_params if param.requires_grad]
        plain = ("embed_tokens", "lm_head", "conv", "patch_embed", "head")
        matrices = [p for n, p in named if p.ndim == 2 and not any(part in n for part in plain)]
        chosen = {id(p) for p in matrices}
        rest = [p for _, p in named if id(p) not in chosen]
        self.lr, self.total, self.warmup = lr, total, warmup
        self.params = matrices + rest
        self.parts = [
            Muon(matrices, lr, weight_decay),
            torch.optim.AdamW(rest, lr, betas=(0.9, 0.98), weight_decay=0.01),
        ]

    def step(self, step: int) -> float:
        done = min(1.0, step / self.total)
        factor = min(1.0, (step + 1) / self.warmup) * (
            0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))
        )
        norm = torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.lr * factor
            part.step()
            part.zero_grad(set_to_none=True)
        return float(norm)

    def state_dict(self):
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states):
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
