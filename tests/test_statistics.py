"""Streamed statistics equal the ones computed from everything at once."""

import torch

from masquant_cli.algo import statistics
from masquant_cli.algo.low_rank import smoothed_gram
from masquant_cli.algo.statistics import InputStatistics


def collect(x: torch.Tensor, sizes: list[int], keep: int = 16, seed: int = 3) -> InputStatistics:
    found = InputStatistics(width=x.shape[1], keep=keep, with_gram=True)
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(len(x), dtype=torch.float64, generator=generator)
    for part, its_keys in zip(x.split(sizes), keys.split(sizes), strict=True):
        found.update(part, its_keys)
    return found


def test_any_split_gives_the_whole():
    x = torch.randn(90, 7, generator=torch.Generator().manual_seed(0)) * 3
    whole, parts = collect(x, [90]), collect(x, [1, 0, 50, 17, 22])
    assert parts.count == 90
    assert torch.equal(parts.absmax, x.abs().amax(0))
    torch.testing.assert_close(parts.tensors()["mean_abs"], x.abs().mean(0))
    torch.testing.assert_close(parts.tensors()["gram"], x.T @ x, rtol=1e-5, atol=1e-3)
    assert torch.equal(parts.rows, whole.rows)  # the sample does not see the batching


def test_rows_are_the_inputs_of_the_smallest_keys_in_their_order_however_they_come():
    g = torch.Generator().manual_seed(2)
    x, keys = torch.randn(300, 4, generator=g), torch.rand(300, dtype=torch.float64, generator=g)
    expected = x[keys.argsort()[:40]]
    for order in (
        torch.arange(300),
        torch.randperm(300, generator=g),
        keys.argsort(descending=True),
    ):
        found = InputStatistics(width=4, keep=40, with_gram=False)
        for part in order.split(7):
            found.update(x[part], keys[part])
        assert torch.equal(found.rows, expected)


def test_a_gram_of_several_blocks_is_whole():
    x = torch.randn(20, 600, generator=torch.Generator().manual_seed(6))
    found = collect(x, [9, 11])
    for _ in range(2):  # asking twice changes nothing
        torch.testing.assert_close(found.tensors()["gram"], x.T @ x, rtol=1e-5, atol=1e-4)


def test_sums_in_pieces_are_those_of_the_whole(monkeypatch):
    monkeypatch.setattr(statistics, "PIECE", 21)  # three rows of seven
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(5))
    found = collect(x, [50])
    assert torch.equal(found.absmax, x.abs().amax(0))
    torch.testing.assert_close(found.abs_sum.float(), x.abs().sum(0))


def test_rows_are_a_seeded_sample_without_repeats():
    x = torch.arange(400.0)[:, None].expand(400, 2).contiguous()
    rows = collect(x, [400], keep=50).rows[:, 0]
    assert len(rows) == 50 and len(rows.unique()) == 50
    assert not torch.equal(rows, rows.sort().values)  # random order: any prefix is a sample
    assert 120 < float(rows.mean()) < 280
    assert not torch.equal(rows, collect(x, [400], keep=50, seed=4).rows[:, 0])


def test_fewer_tokens_than_wanted_keeps_all_and_none_is_fine():
    x = torch.randn(5, 3)
    assert len(collect(x, [5]).rows) == 5
    empty = collect(x[:0], [0]).tensors()
    assert empty["count"].item() == 0 and empty["rows"].shape == (0, 3)


def test_gram_of_smoothed_activations_needs_no_second_pass():
    g = torch.Generator().manual_seed(1)
    x, s = torch.randn(60, 5, generator=g), torch.rand(5, generator=g) + 0.1
    torch.testing.assert_close(smoothed_gram(x.T @ x, s), (x / s).T @ (x / s))


def test_half_precision_is_summed_in_fp32():
    x = torch.full((4096, 2), 1 / 3, dtype=torch.bfloat16)
    found = collect(x, [64] * 64)
    expected = float(x[0, 0].double() ** 2 * 4096)
    assert (
        abs(float(found.tensors()["gram"][0, 0]) / expected - 1) < 1e-4
    )  # bf16 sums would be off by 40 %


def test_statistics_of_parts_merge_to_those_of_the_whole_to_the_bit():
    g = torch.Generator().manual_seed(8)
    x, keys = (
        torch.randn(300, 530, generator=g) * 9,
        torch.rand(300, dtype=torch.float64, generator=g),
    )
    batches = list(zip(x.split(31), keys.split(31), strict=True))
    whole = InputStatistics(width=530, keep=40, with_gram=True)
    for batch in batches:
        whole.update(*batch)
    for dealt in ([[3, 0, 9], [7, 1], [], [8, 2, 6, 5, 4]], [[*range(9, -1, -1)], []]):
        total = whole.empty()
        for mine in dealt:
            part = whole.empty()
            for i in mine:
                part.update(*batches[i])
            total.merge(part.state())
        for name, expected in whole.tensors().items():
            assert torch.equal(total.tensors()[name], expected), name
