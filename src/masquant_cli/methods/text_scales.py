"""Text's own scales for every modality (eq. 12 or 14 for text alone), with the correction (CMC)
that a rank asks for: compensation.rank 0 is S_t and nothing else.

Reads smoothing.beta, learn and the schedule.
"""

from masquant_cli.algo.learning import learn_mas
from masquant_cli.algo.site import Learned, eq12, judged
from masquant_cli.methods.method import LEARNING, Layer, Method
from masquant_cli.recipe import SITE_KINDS


def solve(layer: Layer) -> dict[str, Learned]:
    solved = {}
    for kind, site in layer.sites.items():
        schedule = layer.schedule(kind)
        scale = eq12(site, layer.smoothing.beta)
        if schedule.epochs:
            scale = learn_mas(site, schedule, scale, only=(0,))
        said = "eq. 14" if schedule.epochs else "eq. 12"
        solved[kind] = judged(site, scale[0], f"text's {said} for all")
    return solved


METHOD = Method(solve, reads=("beta", *LEARNING), corrects=SITE_KINDS)
