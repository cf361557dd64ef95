"""MASQuant with the smoothing of all modalities, the base included, chosen for eq. 29 itself: the
bits and the rank are in the loop (algo/joint.py). The base is rounded by GPTQ. The default.

Reads smoothing.beta, learn, the schedule and loss_weights.
"""

from masquant_cli.algo.joint import learn_joint
from masquant_cli.algo.learning import learn_mas
from masquant_cli.algo.site import Learned, eq12
from masquant_cli.methods.method import LEARNING, Layer, Method
from masquant_cli.recipe import SITE_KINDS


def solve(layer: Layer) -> dict[str, Learned]:
    solved = {}
    for kind, site in layer.sites.items():
        schedule = layer.schedule(kind)
        scale = eq12(site, layer.smoothing.beta)
        if schedule.epochs and len(layer.modalities) > 1:  # eq. 14 of text alone is eq. 29
            scale = learn_mas(site, schedule, scale)
        solved[kind] = learn_joint(site, schedule, scale)
    return solved


METHOD = Method(
    solve, reads=("beta", "loss_weights", *LEARNING), corrects=SITE_KINDS, rounding="gptq"
)
