"""What a method is given, and what it must return."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from masquant_cli.algo.block import Block, Scales, learn_block
from masquant_cli.algo.learning import Schedule
from masquant_cli.algo.site import Learned, SiteProblem
from masquant_cli.recipe import SiteKind, Smoothing


@dataclass(frozen=True)
class Layer:
    """One decoder layer. What costs a pass over the model is a function: call it if needed."""

    modalities: tuple[str, ...]  # the first is the base
    sites: Mapping[SiteKind, SiteProblem]
    smoothing: Smoothing
    seeds: Mapping[SiteKind, int]
    sensitivity: Callable[[], Mapping[SiteKind, torch.Tensor]]  # [M] per site, text is 1
    block: Callable[[], Block]

    def schedule(self, kind: SiteKind) -> Schedule:
        """How long to learn one site; no epochs where the recipe says learn: false."""
        options = self.smoothing
        epochs = options.epochs if options.learn else 0
        return Schedule(epochs, options.learning_rate, options.batch_rows, self.seeds[kind])

    def learn_block(self, start: Scales) -> Scales:
        """The scales of all sites at once, by the error of the layer's output."""
        options, first = self.smoothing, next(iter(self.sites))
        return learn_block(
            self.block(),
            start,
            self.sites[first].loss_weights,
            epochs=options.epochs if options.learn else 0,
            learning_rate=options.learning_rate,
            heldout=options.heldout,
            seed=self.seeds[first],
        )


@dataclass(frozen=True)
class Method:
    """`solve` chooses the scales of a layer's sites. `corrects` are the site kinds that get a
    low-rank correction where the recipe wants one, of at least `least_rank` columns. `rounding` is
    how the base weight is rounded where the recipe leaves it to the method: nearest | gptq."""

    solve: Callable[[Layer], dict[str, Learned]]
    corrects: tuple[SiteKind, ...] = ()
    least_rank: int = 0
    rounding: str = "nearest"


def each_site(
    choose: Callable[[SiteProblem, Smoothing], Learned],
) -> Callable[[Layer], dict[str, Learned]]:
    """A layer's solution from a function that looks at one site alone."""

    def solve(layer: Layer) -> dict[str, Learned]:
        return {kind: choose(site, layer.smoothing) for kind, site in layer.sites.items()}

    return solve
