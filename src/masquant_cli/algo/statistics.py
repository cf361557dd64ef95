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
    """Accumulates over calls of `update(x [n, in], keys [n])`.

    absmax [in], abs_sum [in], count and the Gram [in, in] (optional) over *all* tokens, and the
    inputs of the `keep` tokens with the smallest keys. A token's key is drawn at random once, so
    the sample is uniform and does not depend on how tokens are batched or in which order they come.
    Products are fp32 and sums of batches fp64: rounded to fp32 in the end, they come out the same
    in any order of the batches, so in any number of processes (but for one element in some 1e8).
    """

    width: int
    keep: int
    with_gram: bool
    device: torch.device | str = "cpu"
    count: int = 0
    absmax: Tensor = field(init=False)
    abs_sum: Tensor = field(init=False)
    gram: list[Tensor] = field(init=False, default_factory=list)  # blocks: f64 [rows, in - first]
    kept: Tensor = field(init=False)  # [n, in] in no order
    keys: Tensor = field(init=False)  # [n] f64, theirs

    def __post_init__(self):
        self.absmax = torch.zeros(self.width, device=self.device)
        self.abs_sum = torch.zeros(self.width, dtype=torch.float64, device=self.device)
        if self.with_gram:
            for block in self._blocks():  # the triangle from the diagonal on; the other mirrors it
                shape = block.stop - block.start, self.width - block.start
                self.gram.append(torch.zeros(shape, dtype=torch.float64, device=self.device))
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
        if self.with_gram:
            wide = x.float()
            for block, total in zip(self._blocks(), self.gram, strict=True):
                total += wide[:, block].T @ wide[:, block.start :]
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
        return {**found, **{f"gram {i}": total for i, total in enumerate(self.gram)}}

    def empty(self) -> "InputStatistics":
        """The same kind of statistics, of no tokens yet."""
        return InputStatistics(self.width, self.keep, self.with_gram, self.device)

    def merge(self, state: dict[str, Tensor]) -> None:
        """Add what other statistics, of other tokens, gave as their `state`."""
        torch.maximum(self.absmax, state["absmax"], out=self.absmax)
        self.abs_sum += state["abs_sum"]
        self.count += int(state["count"])
        for i, total in enumerate(self.gram):
            total += state[f"gram {i}"]
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
        found = {
            "absmax": self.absmax,
            "mean_abs": (self.abs_sum / max(self.count, 1)).float(),
            "count": torch.tensor([self.count]),
            "rows": self.rows,
        }
        if self.with_gram:
            found["gram"] = gram = torch.empty(self.width, self.width, device=self.device)
            for block, total in zip(self._blocks(), self.gram, strict=True):
                gram[block, block.start :] = total
                gram[block.stop :, block] = gram[block, block.stop :].T
        return found
