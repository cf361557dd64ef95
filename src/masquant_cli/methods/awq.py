"""AWQ: one scale for all modalities, a power of the mean |x|, the power searched (eq. 9).

The error is the squared one over all tokens alike, with quantized activations unless they keep
16 bits. AWQ's clipping of weights, which eq. 9 does not have, is left out.
"""

from masquant_cli.algo.search import pooled_mean_abs, search_beta
from masquant_cli.algo.site import Learned, SiteProblem, judged
from masquant_cli.methods.method import Method, each_site


def choose(site: SiteProblem, _options) -> Learned:
    total = max(1, sum(site.tokens))
    shares = [n / total for n in site.tokens]
    one, beta = search_beta(site, pooled_mean_abs(site), shares, power=2)
    return judged(site, one, f"eq. 9, beta {beta:g}")


METHOD = Method(each_site(choose))
