"""Tensors must go when their function ends, not when Python next collects garbage: a cycle of
references that holds a few matrices per site adds up to gigabytes."""

import gc

import pytest
import torch

from masquant_cli.algo.block import learn_block
from masquant_cli.algo.gptq import gptq_round
from masquant_cli.algo.joint import learn_joint
from masquant_cli.algo.learning import Schedule, learn_mas, learn_uniform
from masquant_cli.algo.low_rank import best_low_rank, unwhitened_low_rank
from masquant_cli.algo.search import pooled_mean_abs, search_beta
from masquant_cli.algo.site import SiteProblem, eq12

X = torch.randn(120, 48, generator=torch.Generator().manual_seed(0))
W = torch.randn(40, 48, generator=torch.Generator().manual_seed(1))
SCHEDULE = Schedule(epochs=1, learning_rate=0.05, batch_rows=32, seed=0)


def site() -> SiteProblem:
    return SiteProblem(
        weight=W, rows=(X[:60], X[60:]), heldout=(X[:20], X[90:]),
        absmax=X.abs().amax(0).expand(2, -1), mean_abs=X.abs().mean(0).expand(2, -1),
        tokens=(60, 60), weight_bits=4, group_size=None, symmetric=True, activation_bits=8,
        rank=3, loss_weights=(1.0, 1.0),
    )  # fmt: skip


class _Block:
    """A layer that is one product."""

    def __len__(self):
        return 4

    def sample(self, index):
        return X[:8] @ W.T, torch.arange(8) % 2

    def run(self, index, scales):
        return (X[:8] / scales["a"][0]) @ (W * scales["a"][1]).T


WORK = {
    "gptq, gram": lambda: gptq_round(W, X.T @ X, 4),
    "gptq, rows": lambda: gptq_round(W, None, 4, rows=X[:10]),
    "low rank, gram": lambda: best_low_rank(W, 3, gram=X.T @ X),
    "low rank, rows": lambda: best_low_rank(W, 3, rows=X),
    "low rank, unwhitened": lambda: unwhitened_low_rank(W, 3),
    "mas": lambda: learn_mas(site(), SCHEDULE, eq12(site())),
    "uniform": lambda: learn_uniform(site(), SCHEDULE, eq12(site())[0]),
    "joint": lambda: learn_joint(site(), SCHEDULE, eq12(site())),
    "search": lambda: search_beta(site(), pooled_mean_abs(site()), (1.0, 1.0), 2),
    "block": lambda: learn_block(
        _Block(), {"a": torch.ones(2, 48)}, (1.0, 1.0), epochs=1, learning_rate=0.1, heldout=0.25,
        seed=0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WORK)
def test_no_tensor_waits_for_the_garbage_collector(name):
    WORK[name]()  # what is kept from a first call is no leak
    gc.collect()
    gc.disable()
    try:
        WORK[name]()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = [tuple(one.shape) for one in gc.garbage if isinstance(one, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert left == []
