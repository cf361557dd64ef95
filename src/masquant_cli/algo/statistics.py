"""Streamed statistics of one site's input, for one modality. Nothing is hoarded.

One pass suffices for every method: with G = X.T @ X of unsmoothed activations, the Gram of
smoothed ones is G / (s s.T), so no smoothing ever needs another pass over the data.
"""

from dataclasses import dataclass, field

import torch


@dataclass
class InputStatistics:
    """Accumulates over calls of `update(x [n, in])`. All sums are fp32.

    absmax [in], abs_sum [in], count, gram [in, in] (optional) over *all* tokens, and `rows`:
    a uniform random sample of at most `keep` tokens (bottom-k of seeded keys), in random order.
    """

    width: int
    keep: int
    with_gram: bool
    generator: torch.Generator
    device: torch.device | str = "cpu"
    count: int = 0
    absmax: torch.Tensor = field(init=False)
    abs_sum: torch.Tensor = field(init=False)
    gram: torch.Tensor | None = field(init=False, default=None)
    rows: torch.Tensor = field(init=False)
    _keys: torch.Tensor = field(init=False)

    def __post_init__(self):
        self.absmax = torch.zeros(self.width, device=self.device)
        self.abs_sum = torch.zeros(self.width, device=self.device)
        if self.with_gram:
            self.gram = torch.zeros(self.width, self.width, device=self.device)
        self.rows = torch.zeros(0, self.width, device=self.device)
        self._keys = torch.zeros(0, dtype=torch.float64)

    def update(self, x: torch.Tensor) -> None:
        n = x.shape[0]
        # Keys are drawn for every token, so the sample does not depend on how tokens are batched.
        keys = torch.rand(n, dtype=torch.float64, generator=self.generator)
        if n == 0:
            return
        x = x.float()
        magnitude = x.abs()
        self.absmax = torch.maximum(self.absmax, magnitude.amax(0))
        self.abs_sum += magnitude.sum(0)
        if self.gram is not None:
            self.gram.addmm_(x.T, x)
        self.count += n
        self._sample(x, keys)

    def _sample(self, x: torch.Tensor, keys: torch.Tensor) -> None:
        if len(self._keys) == self.keep:
            chosen = keys < self._keys[-1]
            x, keys = x[chosen.to(x.device)], keys[chosen]
        keys = torch.cat([self._keys, keys])
        rows = torch.cat([self.rows, x])
        order = keys.argsort(stable=True)[: self.keep]
        self._keys, self.rows = keys[order], rows[order.to(rows.device)]

    def tensors(self) -> dict[str, torch.Tensor]:
        """absmax, mean_abs [in] f32; count [1] i64; rows [n, in] f32; gram [in, in] f32 if kept."""
        found = {
            "absmax": self.absmax,
            "mean_abs": self.abs_sum / max(self.count, 1),
            "count": torch.tensor([self.count]),
            "rows": self.rows,
        }
        return found if self.gram is None else {**found, "gram": self.gram}
