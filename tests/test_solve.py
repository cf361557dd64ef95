"""How the solving stages go about a layer: one site at a time, and of large sites a part."""

import math
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from jobs import small
from masquant_kernels.quantizers import dequantize_weight, quantize_weight

from masquant_cli import shards
from masquant_cli.algo import site as site_module
from masquant_cli.algo.site import SiteProblem, base_error
from masquant_cli.models.sites import Site
from masquant_cli.stages import smooth
from masquant_cli.stages.base_weight import base_weight, pooled_gram, pooled_inputs

SITE = Site("mlp_out", 0, "", ("down",), 60, (50,))
RECIPE = small("weights.rounding=gptq")
JOB = SimpleNamespace(recipe=RECIPE, rounding="gptq")


def problem(rank: int = 2) -> SiteProblem:
    """Three modalities whose channels share a lot, so that rounding by GPTQ pays."""
    g = torch.Generator().manual_seed(0)
    shared = torch.randn(5, 60, generator=g)
    samples = [
        (torch.randn(70, 5, generator=g) @ shared + 0.3 * torch.randn(70, 60, generator=g)) * s
        for s in (1.0, 3.0, 0.5)
    ]
    return SiteProblem(
        weight=torch.randn(50, 60, generator=g) / math.sqrt(60),
        rows=tuple(x[20:26] for x in samples),
        heldout=tuple(x[:20] for x in samples),
        absmax=torch.stack([x.abs().amax(0) for x in samples]),
        mean_abs=torch.stack([x.abs().mean(0) for x in samples]),
        tokens=(70, 70, 70),
        weight_bits=4,
        group_size=None,
        symmetric=True,
        activation_bits=8,
        rank=rank,
        loss_weights=(1.0, 0.5, 2.0),
    )


def test_a_shard_gives_the_tensors_that_are_asked_for(tmp_path):
    path = tmp_path / "000.safetensors"
    names = ("mlp_out.1.text.count", "mlp_out.17.text.count", "mlp_out.1.text.rows")
    shards.save(path, {n: torch.ones(1) for n in names}, fingerprint="f", notes={})
    assert set(shards.load(path)) == set(names)
    assert set(shards.load(path, prefix="mlp_out.1.")) == {names[0], names[2]}
    assert set(shards.load(path, suffix=".count")) == {names[0], names[1]}
    assert set(shards.load(path, prefix="mlp_out.1.", suffix=".count")) == {names[0]}


def test_sites_are_read_when_asked_for_and_one_weight_stays(monkeypatch):
    sites = [Site("mlp_out", 0, "", ("down",), 8, (8,), "experts", e) for e in range(5)]
    alive, read = [], []

    def build(job, site, statistics):
        assert statistics == f"{site.key}."
        found = SimpleNamespace(weight=torch.zeros(8, 8), tokens=(site.expert,))
        alive.append(weakref.ref(found.weight))
        return found

    monkeypatch.setattr(smooth, "site_problem", build)
    job = SimpleNamespace(read=lambda stage, layer, prefix, suffix: read.append(prefix) or prefix)
    problems = smooth._Problems(job, sites)
    assert len(problems) == 5 and list(problems) == [site.key for site in sites] and not read
    for number, (key, found) in enumerate(problems.items()):
        assert found.tokens == (number,) and problems[key] is found
        assert sum(weight() is not None for weight in alive) == 1
        del found
    assert read == [f"{site.key}." for site in sites]


def test_rows_say_what_their_gram_says_where_none_was_kept():
    given = problem()
    scale = torch.rand(3, 60, generator=torch.Generator().manual_seed(1)) + 0.5
    for others in (1.0, 0.1, 0.0):
        found = pooled_inputs(JOB, SITE, given, scale, {}, others)["rows"]
        assert len(found) == (18 if others else 6)
        expected = pooled_gram(JOB, SITE, given, scale, {}, others)
        torch.testing.assert_close(found.T @ found, expected, rtol=1e-3, atol=1e-7)
    kept = {"mlp_out.vision.gram": given.rows[1].T @ given.rows[1]}
    assert set(pooled_inputs(JOB, SITE, given, scale, kept, 1.0)) == {"gram"}


def test_a_modality_of_one_token_is_in_the_gram_that_gptq_sees():
    one = problem().rows[1][:1]
    rows, heldout = ((x[0], one, x[2]) for x in (problem().rows, problem().heldout))
    given = replace(problem(), rows=rows, heldout=heldout, tokens=(70, 1, 70))
    scale = torch.ones(3, 60)
    gram = (one.double().T @ one.double()).float() * (1 + 1e-7)  # less itself this is rounding
    found = pooled_gram(JOB, SITE, given, scale, {"mlp_out.vision.gram": gram}, 1.0)
    torch.testing.assert_close(
        found, pooled_gram(JOB, SITE, given, scale, {}, 1.0), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("in_part", [False, True])
def test_the_best_rounding_is_found_on_a_part_and_made_for_all(rank, in_part, monkeypatch):
    if in_part:
        monkeypatch.setattr(site_module, "FEWEST_OUTPUTS", 24)
        monkeypatch.setattr(site_module, "PART", 1)
    given = problem(rank)
    assert (len(given.some_outputs()) == 24) == in_part
    scale = torch.ones(3, 60)
    found, how = base_weight(JOB, SITE, given, scale, {})
    nearest = quantize_weight(given.weight, 4)
    assert how.startswith("gptq") and found.q.shape == (50, 60)
    assert torch.equal(found.scale, nearest.scale)
    errors = [base_error(given, dequantize_weight(w), scale) for w in (found, nearest)]
    assert errors[0] < 0.8 * errors[1]
    plain = SimpleNamespace(recipe=RECIPE, rounding="nearest")
    rounded, how = base_weight(plain, SITE, given, scale, {})
    assert how == "nearest" and torch.equal(rounded.q, nearest.q)
