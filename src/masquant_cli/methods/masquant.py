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
    scales = {kind: eq12(site, options.beta) for kind, site in layer.sites.items()}
    said = "eq. 12"
    if options.learn and options.epochs:
        if options.objective == "block":
            scales, said = layer.learn_block(scales), "eq. 14, layer"
        else:
            said = "eq. 14"
            for kind, site in layer.sites.items():
                scales[kind] = learn_mas(site, layer.schedule(kind), scales[kind])
    return {kind: judged(site, scales[kind], said) for kind, site in layer.sites.items()}


METHOD = Method(
    solve, reads=("beta", "objective", "samples", "loss_weights", *LEARNING), corrects=SITE_KINDS
)
