"""MASQuant as the paper writes it: scales of its own for each modality (eq. 12-14), one base
weight smoothed for text, low-rank corrections for the others (eq. 22-26).

Reads smoothing.beta, learn, objective (eq. 14 of each linear, or the error of the whole layer),
the schedule and loss_weights. One scale serves the linears of a site: they read one input.
"""

from masquant_cli.algo.learning import learn_mas
from masquant_cli.algo.site import Learned, eq12, judged
from masquant_cli.methods.method import LEARNING, Layer, Method
from masquant_cli.recipe import SITE_KINDS


def solve(layer: Layer) -> dict[str, Learned]:
    options = layer.smoothing
    learned = options.learn and options.epochs
    if learned and options.objective == "block":
        found = layer.learn_block({k: eq12(site, options.beta) for k, site in layer.sites.items()})
        return {k: judged(site, found[k], "eq. 14, layer") for k, site in layer.sites.items()}
    solved = {}
    for kind, site in layer.sites.items():
        scale = eq12(site, options.beta)
        if learned:
            scale = learn_mas(site, layer.schedule(kind), scale)
        solved[kind] = judged(site, scale, "eq. 14" if learned else "eq. 12")
    return solved


METHOD = Method(
    solve, reads=("beta", "objective", "samples", "loss_weights", *LEARNING), corrects=SITE_KINDS
)
