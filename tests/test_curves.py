"""What reports compute from statistics, against values found by hand."""

import math

import pytest
import torch

from masquant_cli.algo.curves import (
    Bits,
    dominance,
    own_weight_db,
    range_ratios,
    rank_curve,
    rounded,
)

EXACT = Bits(weight=4, activation=16)  # activations as they are


def test_dominance_counts_channels_that_fired_and_gives_ties_to_the_first():
    absmax = torch.tensor([[1.0, 5, 2, 0, 0.1], [1.0, 3, 4, 0, 0.2]])
    assert dominance(absmax).tolist() == [0.5, 0.5]
    assert dominance(absmax[:, :3]).tolist() == pytest.approx([2 / 3, 1 / 3])
    assert dominance(torch.zeros(2, 3)).tolist() == [0, 0]


def test_range_ratios_leave_out_what_a_modality_never_fired():
    first, second = range_ratios(torch.tensor([[1.0, 5, 2, 0], [2.0, 2.5, 0, 0]]))
    assert first.tolist() == [2, 1, 1]
    assert second.tolist() == [1, 2]


@pytest.mark.parametrize(("scale", "ratio"), [([1.0, 1.0], 3.4 / 0.4), ([1.0, 2.0], 3.4 / 0.1)])
def test_own_weight_rounds_the_smoothed_weight(scale, ratio):
    # 7, 3.4 round to 7, 3; smoothed by 1, 2 they are 7, 6.8 and round to 7, 7.
    weight, rows = torch.tensor([[7.0, 3.4]]), torch.tensor([[0.0, 1.0]])
    found = own_weight_db(weight, torch.tensor(scale), rows, EXACT)
    assert found == pytest.approx(20 * math.log10(ratio), abs=1e-4)


def test_own_weight_quantizes_activations():
    # 127 steps of 1/127: 0.3 * 127 = 38.1 rounds to 38.
    weight, rows = torch.tensor([[0.0, 7.0]]), torch.tensor([[1.0, 0.3]])
    found = own_weight_db(weight, torch.ones(2), rows, Bits(4, 8))
    assert found == pytest.approx(20 * math.log10(0.3 / (0.3 - 38 / 127)), abs=1e-3)


WEIGHT = torch.tensor([[7.0, 0.0], [0.0, 7.0]])  # 4 bits hold it
SCALE = torch.tensor([3.0, 2.0])
ROWS = torch.tensor([[3.0, 0.0], [0.0, 20.0]])  # smoothed: 1 and 10
SIGNAL = 21.0**2 + 140.0**2


def curve(**seen):
    ratios = (0.0, 0.5, 0.99, 1.0)
    return rank_curve(WEIGHT, rounded(WEIGHT, EXACT), SCALE, ROWS, ratios, EXACT, **seen)


@pytest.mark.parametrize("seen", [{"gram": 5 * ROWS.T @ ROWS}, {"rows": ROWS}])
def test_rank_curve_by_hand(seen):
    # The residual is diag(14, 7), its image diag(14, 70): whitening repairs the second first.
    found = curve(**seen)
    assert found.ranks == (0, 1, 1, 2)

    def left(noise):
        return pytest.approx(10 * math.log10(SIGNAL / noise), abs=1e-3)

    assert found.cmc[:3] == (left(14**2 + 70**2), left(14**2), left(14**2))
    assert found.svd[:3] == (left(14**2 + 70**2), left(70**2), left(70**2))
    assert found.cmc[3] > 100 and found.svd[3] > 100
    # exp of the entropy of (2/3, 1/3) and of (5/6, 1/6)
    assert found.effective_unwhitened == pytest.approx(1.88988, abs=1e-4)
    assert found.effective_whitened == pytest.approx(1.56925, abs=1e-4)


def test_a_base_may_be_rounded_elsewhere():
    # Steps of 0.5 and 1 for the rows; other integers on the same grid.
    weight = torch.tensor([[3.5, 1.3], [7.0, -2.2]])
    assert rounded(weight, EXACT).tolist() == [[3.5, 1.5], [7, -2]]
    integers = torch.tensor([[7, 2], [7, -3]], dtype=torch.int8)
    assert rounded(weight, EXACT, integers).tolist() == [[3.5, 1.0], [7, -3]]


def test_one_row_cannot_ask_for_two_columns():
    found = curve(rows=ROWS[1:])
    assert found.cmc[1] == pytest.approx(found.cmc[3], abs=1e-4)
    assert found.cmc[3] == pytest.approx(10 * math.log10(SIGNAL / 14**2), abs=1e-3)


def test_wide_and_tall_sites_keep_their_orientation():
    generator = torch.Generator().manual_seed(3)
    for n_out, n_in in ((11, 4), (3, 9)):
        weight = torch.randn(n_out, n_in, generator=generator)
        rows = torch.randn(40, n_in, generator=generator)
        scale = torch.rand(n_in, generator=generator) + 0.5
        base = rounded(weight, Bits(8))
        found = rank_curve(
            weight, base, scale, rows, (0.0, 0.4, 1.0), Bits(8, 16), gram=rows.T @ rows
        )
        assert found.ranks == (0, int(0.4 * min(n_out, n_in)), min(n_out, n_in))
        assert found.cmc[0] == found.svd[0] < found.cmc[1] < found.cmc[2]
        assert found.cmc[1] >= found.svd[1]
        assert found.cmc[2] > 80
