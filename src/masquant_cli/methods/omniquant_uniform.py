"""One scale for all modalities, learned (eq. 10, after OmniQuant), from SmoothQuant's.

Reads smoothing.beta, learn, objective (the error of each linear, or of the whole layer) and the
schedule; loss_weights are the modalities' weights.
"""

from torch import Tensor

from masquant_cli.algo.learning import learn_uniform
from masquant_cli.algo.site import Learned, SiteProblem, judged
from masquant_cli.algo.smoothing import closed_form_scale, uniform_absmax
from masquant_cli.methods.method import LEARNING, Layer, Method


def solve(layer: Layer) -> dict[str, Learned]:
    options = layer.smoothing
    learned = options.learn and options.epochs

    def start(site: SiteProblem) -> Tensor:
        return closed_form_scale(uniform_absmax(site.absmax), site.absmax_w, options.beta)

    if learned and options.objective == "block":
        found = layer.learn_block({k: start(site)[None] for k, site in layer.sites.items()})
        return {k: judged(site, found[k], "eq. 10, layer") for k, site in layer.sites.items()}
    solved = {}
    for kind, site in layer.sites.items():
        scale = start(site)
        if learned:
            scale = learn_uniform(site, layer.schedule(kind), scale)
        solved[kind] = judged(site, scale, "eq. 10" if learned else "uniform eq. 8")
    return solved


METHOD = Method(solve, reads=("beta", "objective", "samples", "loss_weights", *LEARNING))
