"""SmoothQuant: one scale for all modalities, from the range of the loudest (eq. 8 and 11).

Reads smoothing.beta.
"""

from masquant_cli.algo.site import Learned, SiteProblem, judged
from masquant_cli.algo.smoothing import closed_form_scale, uniform_absmax
from masquant_cli.methods.method import Method, each_site
from masquant_cli.recipe import Smoothing


def choose(site: SiteProblem, options: Smoothing) -> Learned:
    one = closed_form_scale(uniform_absmax(site.absmax), site.absmax_w, options.beta)
    return judged(site, one, "uniform eq. 8")


METHOD = Method(each_site(choose), reads=("beta",))
