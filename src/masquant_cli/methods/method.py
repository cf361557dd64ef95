"""What a method is given, and what it must return."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from masquant_cli.algo.block import Block, Scales, learn_block
from masquant_cli.algo.learning import Schedule
from masquant_cli.algo.site import Learned, SiteProblem
from masquant_cli.recipe import SiteKind, Smoothing

SCHEDULE = ("epochs", "learning_rate", "batch_rows")
LEARNING = ("learn", *SCHEDULE)


@dataclass(frozen=True)
class Layer:
    """One decoder layer. What costs a pass over the model is a function: call it if needed."""

    modalities: tuple[str, ...]  # the first is the base
    sites: Mapping[str, SiteProblem]  # by key: a site's kind, or "mlp_out.17" of an expert
    smoothing: Smoothing
    seeds: Mapping[str, int]
    sensitivity: Callable[[], Mapping[str, torch.Tensor]]  # [M] per site, text is 1
    block: Callable[[], Block]

    def schedule(self, key: str) -> Schedule:
        """How long to learn one site; no epochs where the recipe says learn: false."""
        options = self.smoothing
        epochs = options.epochs if options.learn else 0
        return Schedule(epochs, options.learning_rate, options.batch_rows, self.seeds[key])

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
    """How scales are chosen, and what follows from the choice.

    `solve` returns the scales of a layer's sites; `reads` are the keys of `smoothing` it looks at.
    `needs` "sensitivity" or "block" where the model must see samples again. `corrects` are the
    site kinds that get a low-rank correction, of at least `least_rank` columns, where the recipe
    wants one. `rounding` of the base weight, nearest | gptq, where the recipe leaves it open.
    """

    solve: Callable[[Layer], dict[str, Learned]]
    reads: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    corrects: tuple[SiteKind, ...] = ()
    least_rank: int = 0
    rounding: str = "nearest"

    def ignored(self, smoothing: Smoothing) -> list[str]:
        """Keys that differ from their defaults and that this method does not read; a schedule is
        left in peace, since recipes for several methods have one."""
        default = Smoothing()
        keys = set(Smoothing.model_fields) - {*self.reads, *SCHEDULE, "heldout"}
        return sorted(k for k in keys if getattr(smoothing, k) != getattr(default, k))

    def prepared(self, smoothing: Smoothing) -> tuple[str, ...]:
        """What must be ready before the first layer: `needs`, and layers for objective block."""
        block = "objective" in self.reads and smoothing.objective == "block"
        learned = smoothing.learn and smoothing.epochs
        return (*self.needs, *(("block",) if block and learned else ()))


def each_site(
    choose: Callable[[SiteProblem, Smoothing], Learned],
) -> Callable[[Layer], dict[str, Learned]]:
    """A layer's solution from a function that looks at one site alone."""

    def solve(layer: Layer) -> dict[str, Learned]:
        return {kind: choose(site, layer.smoothing) for kind, site in layer.sites.items()}

    return solve
