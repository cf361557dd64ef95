"""One scale for all modalities, learned (eq. 10, after OmniQuant), from SmoothQuant's.

Reads smoothing.beta, learn, objective (the error of each linear, or of the whole layer) and the
schedule; loss_weights are the modalities' weights.
"""

from masquant_cli.algo.learning import learn_uniform
from masquant_cli.algo.site import Learned, judged
from masquant_cli.algo.smoothing import closed_form_scale, uniform_absmax
from masquant_cli.methods.method import LEARNING, Layer, Method


def solve(layer: Layer) -> dict[str, Learned]:
    options = layer.smoothing
    start = {
        kind: closed_form_scale(uniform_absmax(site.absmax), site.absmax_w, options.beta)
        for kind, site in layer.sites.items()
    }
    if not (options.learn and options.epochs):
        return {k: judged(site, start[k], "uniform eq. 8") for k, site in layer.sites.items()}
    if options.objective == "block":
        found = layer.learn_block({kind: one[None] for kind, one in start.items()})
        return {k: judged(site, found[k], "eq. 10, layer") for k, site in layer.sites.items()}
    return {
        kind: judged(site, learn_uniform(site, layer.schedule(kind), start[kind]), "eq. 10")
        for kind, site in layer.sites.items()
    }


METHOD = Method(solve, reads=("beta", "objective", "samples", "loss_weights", *LEARNING))
