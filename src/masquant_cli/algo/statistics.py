"""Streamed statistics of one site's input, for one modality. Nothing is hoarded.

One pass suffices for every method: with G = X.T @ X of unsmoothed activations, the Gram of
smoothed ones is G / (s s.T), so no smoothing ever needs another pass over the data.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

PIECE = 1 << 20  # elements whose magnitudes are held at once: they stay in the cache


@dataclass
class InputStatistics:
    """Accumulates over calls of `update(x [n, in], keys [n])`. Grams are fp32.

    absmax [in], abs_sum [in], count, gram [in, in] (optional; its upper triangle of blocks until
    `tensors` is called) over *all* tokens, and the inputs of the `keep` tokens with the smallest keys. A token's key is drawn at random once, so the
    sample is uniform and does not depend on how tokens are batched or in which order they come.
    """

    width: int
    keep: int
    with_gram: bool
    device: torch.device | str = "cpu"
    count: int = 0
    absmax: Tensor = field(init=False)
    abs_sum: Tensor = field(init=False)
    gram: Tensor | None = field(init=False, default=None)
    kept: Tensor = field(init=False)  # [n, in] in no order
    keys: Tensor = field(init=False)  # [n] f64, theirs

    def __post_init__(self):
        self.absmax = torch.zeros(self.width, device=self.device)
        # In fp64 it hardly depends on the order in which batches come.
        self.abs_sum = torch.zeros(self.width, dtype=torch.float64, device=self.device)
        if self.with_gram:
            self.gram = torch.zeros(self.width, self.width, device=self.device)
        self.kept = torch.zeros(0, self.width, device=self.device)
        self.keys = torch.zeros(0, dtype=torch.float64)

    def update(self, x: Tensor, keys: Tensor) -> None:
        """x: floats [n, in]. keys: f64 [n] on the CPU."""
        if not len(x):
            return
        for part in x.split(max(1, PIECE // self.width)):
            magnitude = part.abs()
            torch.maximum(self.absmax, magnitude.amax(0), out=self.absmax)
            self.abs_sum += magnitude.sum(0, dtype=torch.float32)
        if self.gram is not None:
            wide = x.float()
            for block in self._blocks():  # one triangle; `tensors` mirrors it
                self.gram[block, block.start :].addmm_(wide[:, block].T, wide[:, block.start :])
        self.count += len(x)
        self.sample(x, keys)

    def sample(self, x: Tensor, keys: Tensor) -> None:
        """Keep those of x [n, in] whose keys are among the smallest so far."""
        full = len(self.keys) == self.keep
        candidates = (keys < self.keys.max()).nonzero()[:, 0] if full else torch.arange(len(keys))
        if not len(candidates):
            return
        together = torch.cat([self.keys, keys[candidates]])
        chosen = together.argsort(stable=True)[: self.keep]
        stays = torch.zeros(len(together), dtype=torch.bool)
        stays[chosen] = True
        old = len(self.keys)
        free = (~stays[:old]).nonzero()[:, 0]  # places of rows that are pushed out
        new = candidates[stays[old:]]
        rows = x[new.to(x.device)].float()
        self.keys[free], self.kept[free.to(x.device)] = keys[new[: len(free)]], rows[: len(free)]
        if len(new) > len(free):
            self.keys = torch.cat([self.keys, keys[new[len(free) :]]])
            self.kept = torch.cat([self.kept, rows[len(free) :]])

    def state(self) -> dict[str, Tensor]:
        """All there is, for `merge`."""
        found = {name: getattr(self, name) for name in ("absmax", "abs_sum", "kept", "keys")}
        found["count"] = torch.tensor([self.count])
        return found if self.gram is None else {**found, "gram": self.gram}

    def empty(self) -> "InputStatistics":
        """The same kind of statistics, of no tokens yet."""
        return InputStatistics(self.width, self.keep, self.with_gram, self.device)

    def merge(self, state: dict[str, Tensor]) -> None:
        """Add what other statistics, of other tokens, gave as their `state`."""
        torch.maximum(self.absmax, state["absmax"], out=self.absmax)
        self.abs_sum += state["abs_sum"]
        self.count += int(state["count"])
        if self.gram is not None:
            self.gram += state["gram"]
        self.sample(state["kept"], state["keys"])

    def _blocks(self) -> list[slice]:
        step = max(256, -(-self.width // 8))
        return [slice(i, min(i + step, self.width)) for i in range(0, self.width, step)]

    @property
    def rows(self) -> Tensor:
        """[n, in] f32 in the order of their keys: random, so that any part of them is a sample."""
        return self.kept[self.keys.argsort(stable=True).to(self.kept.device)]

    def tensors(self) -> dict[str, Tensor]:
        """absmax, mean_abs [in] f32; count [1] i64; rows [n, in] f32; gram [in, in] f32 if kept."""
        if self.gram is not None:
            for block in self._blocks():
                self.gram[block.stop :, block] = self.gram[block, block.stop :].T
        found = {
            "absmax": self.absmax,
            "mean_abs": (self.abs_sum / max(self.count, 1)).float(),
            "count": torch.tensor([self.count]),
            "rows": self.rows,
        }
        return found if self.gram is None else {**found, "gram": self.gram}
