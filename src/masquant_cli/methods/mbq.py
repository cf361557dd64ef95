"""MBQ: AWQ's search with the absolute error of each modality weighted by how much the model's own
loss feels it: the mean |gradient| at the layer's attention and MLP outputs, relative to text's.

As in its authors' code a weight is at least the median of all layers. Reads smoothing.samples.
"""

from masquant_cli.algo.search import pooled_mean_abs, search_beta
from masquant_cli.algo.site import Learned, judged
from masquant_cli.methods.method import Layer, Method


def solve(layer: Layer) -> dict[str, Learned]:
    felt = layer.sensitivity()
    solved = {}
    for kind, site in layer.sites.items():
        total = max(1, sum(site.tokens))
        weights = felt[kind].tolist()
        shares = [n / total * w for n, w in zip(site.tokens, weights, strict=True)]
        one, beta = search_beta(site, pooled_mean_abs(site), shares, power=1)
        said = "/".join(f"{w:.2g}" for w in weights)
        solved[kind] = judged(site, one, f"eq. 9, beta {beta:g}, modality weights {said}")
    return solved


METHOD = Method(solve, reads=("samples",), needs=("sensitivity",))
