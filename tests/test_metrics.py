"""Scores against values worked out by hand."""

import math

import pytest
import torch

from masquant_cli.algo import metrics


def test_sqnr_is_ten_log_ten_of_the_energy_ratio():
    assert metrics.db(25.0, 0.25) == pytest.approx(20.0)
    assert metrics.db(25.0, 25.0) == pytest.approx(0.0)
    assert metrics.db(1.0, 100.0) == pytest.approx(-20.0)


def test_sqnr_stays_a_number_at_both_ends():
    assert metrics.db(4.0, 0.0) == metrics.db(4.0, 1e-30) == metrics.MAX_DB
    assert metrics.db(0.0, 4.0) == -metrics.MAX_DB


def test_energies_split_by_class_and_leave_negative_ids_out():
    y = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [9.0, 9.0]])
    other = y + torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.5], [5.0, 5.0]])
    got = metrics.energies(y, other, torch.tensor([0, 2, 0, -1]), 3)
    expected = torch.tensor([[6.0, 1.25], [0.0, 0.0], [9.0, 4.0]], dtype=torch.float64)
    assert torch.equal(got, expected)


def test_kl_against_the_definition():
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    by_hand = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert metrics.kl_nats(p.log()[None] + 7, q.log()[None]).item() == pytest.approx(by_hand)
    assert metrics.kl_nats(p.log()[None], p.log()[None]).item() == 0


def test_flips_count_changed_argmax_only():
    a = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    b = torch.tensor([[1.0, 9.0], [0.0, 3.0]])
    assert metrics.flips(a, b).tolist() == [False, True]


def test_wilson_against_a_published_example():
    # Brown, Cai, DasGupta (2001): the interval of 0 of 10 ends at z^2 / (n + z^2).
    low, high = metrics.wilson(0, 10)
    assert low == 0
    assert high == pytest.approx(0.27753, abs=1e-5)
    assert metrics.wilson(10, 10)[0] == pytest.approx(1 - high)
    assert metrics.wilson(8, 10) == pytest.approx((0.49016, 0.94331), abs=1e-4)
    with pytest.raises(ValueError, match="at least one"):
        metrics.wilson(0, 0)


def test_bootstrap_covers_the_ratio_and_repeats_with_its_seed():
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(2, 5, (400,), generator=generator)
    edits = (torch.rand(400, generator=generator) < 0.25).long() * 2
    low, high = metrics.bootstrap_ratio(edits, words, seed=0)
    ratio = float(edits.sum() / words.sum())
    assert low < ratio < high
    # The normal approximation of a ratio estimator, by hand.
    residual = edits - ratio * words
    half = 1.96 * float(residual.float().std()) * 400**0.5 / float(words.sum())
    assert high - low == pytest.approx(2 * half, rel=0.1)
    assert metrics.bootstrap_ratio(edits, words, seed=0) == (low, high)
    assert metrics.bootstrap_ratio(edits, words, seed=1) != (low, high)


def test_bootstrap_of_one_sample_is_a_point():
    assert metrics.bootstrap_ratio(torch.tensor([1]), torch.tensor([4]), seed=0) == (0.25, 0.25)
