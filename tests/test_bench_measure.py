"""What may be called fast: gates that fail what is wrong, medians, rooflines, plain words."""

import contextlib
import itertools
import json
import math
import time

import pytest
import torch
from masquant_kernels import dispatch, reference

from masquant_cli.bench import gate, kernels, layers, peers, timing
from masquant_cli.bench.cases import MODALITIES, cases
from masquant_cli.bench.measure import Candidate, compare, failures, verdicts
from masquant_cli.bench.operands import Tokens, Weights, activations, copies
from masquant_cli.bench.roofline import Roof, measure_roof
from masquant_cli.bench.shapes import PRESETS, Linear, decoder, linear
from masquant_cli.bench.timing import Clock
from masquant_cli.errors import RecipeError
from masquant_cli.progress import NullProgress

CPU = torch.device("cpu")
CLOCK = Clock(CPU, repeats=3, fill=1e-4)
ROOF = Roof(bandwidth=1e10, peaks={"float32": 1e11, "int8": 2e11})
SMALL = kernels.Settings([Linear("o", 200, 49)], [1, 5], [0.1], [0.5, 1.0], torch.float32)


# --- gate


def test_floats_measure_norm_and_largest_error():
    expected = torch.ones(4, 8)
    found = expected.clone()
    found[1, 2] += 0.01
    check = gate.floats(found, expected, 0.01)
    assert check.ok
    assert check.relative == pytest.approx(0.01 / math.sqrt(32))
    assert check.largest == pytest.approx(0.01)
    assert not gate.floats(found, expected, 0.001).ok
    found[1, 2] += 10  # one wild value among a million hides in the norm, not in the largest
    big = torch.ones(10**6)
    assert not gate.floats(
        big + torch.nn.functional.pad(torch.ones(1), (0, 10**6 - 1)), big, 0.1
    ).ok


def test_floats_want_nan_where_it_belongs_and_nowhere_else():
    expected = torch.tensor([[1.0, 2.0], [torch.nan, torch.nan]])
    assert gate.floats(expected.clone(), expected, 0.0).ok
    assert not gate.floats(expected.nan_to_num(), expected, 0.1).ok
    assert not gate.floats(torch.full((2, 2), torch.nan), expected, 0.1).ok
    assert not gate.floats(torch.ones(2, 3), expected, 0.1).ok


def test_integers_forgive_rare_ties_only_where_a_share_is_given():
    expected = torch.zeros(2000, dtype=torch.int8)
    tie, two, far = expected.clone(), expected.clone(), expected.clone()
    tie[0], two[:10], far[0] = 1, 1, 2
    assert gate.integers(expected, expected).ok
    assert not gate.integers(tie, expected).ok and gate.integers(tie, expected, 1e-3).ok
    assert not gate.integers(two, expected, 1e-3).ok and not gate.integers(far, expected, 1e-3).ok
    assert not gate.integers(expected.int(), expected).ok


@pytest.fixture
def backend(monkeypatch):
    """Put a function in front of the reference, as the only fast backend of CPUs."""

    def use(op, function):
        monkeypatch.setitem(dispatch.BACKENDS, "cpu", ("cpu", "reference"))
        if function:
            function.__module__ = "masquant_kernels.cpu"  # how backend_of knows it
        known = {"cpu": {op: function} if function else {}, "reference": reference.OPS}
        monkeypatch.setattr(dispatch, "_load", lambda name: known[name])
        dispatch.functions.cache_clear()

    yield use
    monkeypatch.undo()
    dispatch.functions.cache_clear()


def operands(tokens=5):
    weights = Weights(Linear("o", 200, 49), CPU)
    x = activations(weights.linear, Tokens(tokens, torch.float32), CPU)
    return weights, x, *reference.smooth_quant(x, weights.smooth_inv, None, 8)


def w4a8(tokens=5) -> dict:
    weights, x, q, scale = operands(tokens)
    return {
        "q": q, "scale": scale, "weight_packed": weights.packed4, "weight_scale": weights.scale,
        "weight_zero_point": None, "group_size": 0,
        "bias": None, "h": None, "lr_b": None, "modality": None, "dtype": x.dtype,
    }  # fmt: skip


def test_a_right_backend_passes_and_is_named(backend):
    backend("gemm_w4a8", lambda out, *args: out.copy_(reference.gemm_w4a8(*args)))
    name, check = gate.check_op("gemm_w4a8", w4a8(), exact=True)
    assert (name, check.ok, check.relative) == ("cpu", True, 0.0)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda out, *args: out,  # writes nothing: the poison shows
        lambda out, *args: out.copy_(reference.gemm_w4a8(*args) * 1.001),
        lambda out, *args: out.copy_(reference.gemm_w4a8(*args).flip(0)),
        lambda out, *args: (_ for _ in ()).throw(RuntimeError("does not compile")),
        lambda out, *args: reference.gemm_w4a8(*args)[:, :-1],
    ],
)
def test_a_wrong_backend_fails(backend, wrong):
    backend("gemm_w4a8", wrong)
    name, check = gate.check_op("gemm_w4a8", w4a8())
    assert name == "cpu" and not check.ok and check.what


def test_what_a_backend_does_not_cover_the_reference_serves(backend):
    backend("gemm_w4a8", lambda *_: NotImplemented)
    assert gate.check_op("gemm_w4a8", w4a8())[0] == "reference"
    backend("gemm_w4a8", None)
    assert gate.check_op("gemm_w4a8", w4a8())[0] == "reference"


def test_one_unwritten_row_among_many_tokens_is_seen(backend):
    def forgets_the_last(out, *args):
        out[:-1] = reference.gemm_w4a8(*args)[:-1]
        return out

    backend("gemm_w4a8", forgets_the_last)
    assert not gate.check_op("gemm_w4a8", w4a8(tokens=300))[1].ok


def swapped(given: dict, key: str) -> dict:
    """The two non-base modalities' entries of an argument exchanged."""
    value = given[key]
    if key == "modality":
        return given | {key: torch.where(value > 0, 3 - value, value).int()}
    order = [0, 2, 1] if len(value) == MODALITIES else [1, 0]
    return given | {key: value[order].contiguous()}


@pytest.mark.parametrize(
    ("op", "key"),
    [
        ("smooth_quant", "smooth_inv"), ("smooth_quant", "modality"),
        ("lowrank_down", "smooth_inv"), ("lowrank_down", "lr_a"), ("lowrank_down", "modality"),
        ("gemm_w4a8", "lr_b"), ("gemm_w8a8", "lr_b"),
    ],
)  # fmt: skip
def test_a_backend_that_swaps_two_modalities_fails(backend, op, key):
    """The inputs of gpu-check tell modalities apart."""
    right = getattr(reference, op)

    def swaps(_out, *args):
        named = dict(zip(case.given, args, strict=True))
        return right(**swapped(named, key))

    wanted = {"smooth_quant": "norm", "lowrank_down": "interleaved"}
    title = f"{op} {wanted.get(op, 'low rank interleaved')}"
    case = next(c for c in cases(CPU, large=False) if c.title.startswith(title))
    backend(op, swaps)
    assert not gate.check_op(op, case.given, case.exact)[1].ok
    backend(op, lambda _out, *args: right(*args))
    assert gate.check_op(op, case.given, case.exact)[1].ok


def test_the_cases_cover_every_op_dtype_and_kind_of_trouble():
    found = list(itertools.islice(cases(CPU, large=False), 200))
    ops = {case.op for case in cases(CPU, large=False)}
    assert ops == set(reference.OPS)
    assert len({case.title for case in found}) == len(found)
    x = [c.given["x"] for c in found if "x" in c.given]
    assert any(t.isnan().any() for t in x) and any((t == 0).all(1).any() for t in x)
    assert any(not t.is_contiguous() for t in x)
    assert all(c.exact for c in found if "integers" in c.title)


# --- operands


def test_vision_tokens_are_one_span_of_the_asked_share():
    ids = Tokens(10, torch.float32, 0.5).modality(CPU)
    assert ids.dtype == torch.int32 and ids.sum() == 5
    assert len(ids.unique_consecutive()) == 3
    assert Tokens(10, torch.float32).modality(CPU) is None
    assert Tokens(1, torch.float32, 0.3).modality(CPU) is None


def test_small_weights_are_rotated_and_large_ones_are_not(monkeypatch):
    monkeypatch.setattr("masquant_cli.bench.operands.cache_bytes", lambda _: 1000)
    small, large = torch.zeros(500, dtype=torch.int8), torch.zeros(4000, dtype=torch.int8)
    kept = copies(small, CPU)
    assert len(kept) == 4 and len({t.data_ptr() for t in kept}) == 4
    assert len(copies(large, CPU)) == 1


def test_resident_bytes_are_those_of_the_tensors():
    weights = Weights(Linear("o", 256, 64), CPU, ratio=0.1)
    assert weights.rank == 6
    low_rank = 2 * 6 * (256 + 64)
    assert weights.resident(4) == 64 * 128 + 4 * 64 + 4 * 2 * 256 + low_rank
    assert weights.resident(8) - weights.resident(4) == 64 * 128


# --- measure


def candidate(name, seconds, ok=True, **rest) -> Candidate:
    check = gate.Check(ok, 0.0, 0.0, "" if ok else "wrong")
    return Candidate(name, lambda _: time.sleep(seconds), lambda: check, 2e8, 1e6, "int8", **rest)


def test_speedups_are_against_the_fastest_dense_and_slower_stays_below_one(monkeypatch):
    class Hand:  # a clock that only the candidates move: a busy machine must not fail this
        now = 0.0

        def sleep(self, seconds):
            self.now += seconds

        def perf_counter(self):
            return self.now

    monkeypatch.setattr(timing, "time", hand := Hand())
    monkeypatch.setattr(time, "sleep", hand.sleep)
    rows = compare(
        [
            candidate("dense a", 4e-3, baseline=True), candidate("dense b", 2e-3, baseline=True),
            candidate("fast", 1e-3), candidate("slow", 6e-3), candidate("step", 1e-3, part=True),
        ],
        CLOCK, ROOF,
    )  # fmt: skip
    found = {row["name"]: row for row in rows}
    assert {row.get("against") for row in rows} == {"dense b", None}
    assert found["dense b"]["speedup"] == 1
    assert found["fast"]["speedup"] == pytest.approx(2)
    assert found["slow"]["speedup"] == pytest.approx(1 / 3)
    assert "speedup" not in found["step"]
    assert found["fast"]["floor_seconds"] == pytest.approx(2e8 / 2e11)
    assert found["fast"]["roofline"] == pytest.approx(1e-3 / found["fast"]["seconds"])


def test_what_is_wrong_is_reported_and_never_timed():
    ran = []
    bad = Candidate(
        "bad", lambda i: ran.append(i), lambda: gate.Check(False, 1.0, 1.0, "wrong"), 1, 1, "int8"
    )
    broken = Candidate("broken", lambda i: ran.append(i), lambda: 1 / 0, 1, 1, "int8")
    peer = candidate("peer", 0, ok=False, labels={"peer": True})
    rows = compare([bad, broken, peer, candidate("dense", 1e-4, baseline=True)], CLOCK, ROOF)
    assert ran == []
    assert all("seconds" not in row for row in rows[:3]) and "seconds" in rows[3]
    assert failures(rows) == ["bad: wrong", "broken: ZeroDivisionError: division by zero"]


def test_a_hopeless_dense_dtype_is_named_and_not_timed():
    rows = compare(
        [candidate("dense a", 1e-3, baseline=True), candidate("dense b", 2e-2, baseline=True)],
        CLOCK, ROOF,
    )  # fmt: skip
    assert "seconds" in rows[0]
    assert "skipped" in rows[1] and "seconds" not in rows[1]


def test_break_even_is_said_in_words():
    rows = [
        {"name": name, "shape": "8x8", "tokens": t, "speedup": s}
        for name, speeds in {"both": (0.5, 2.0), "never": (0.25, 0.5), "dense x": (1, 1)}.items()
        for t, s in zip((1, 16), speeds, strict=True)
    ]
    assert verdicts(rows) == [
        "8x8 both: faster than dense float at T = 16 (2.00x); SLOWER at T = 1 (2.00x the time); "
        "breaks even between T = 1 and 16",
        "8x8 never: SLOWER at T = 1, 16 (4.00x the time, 2.00x the time)",
    ]


def test_the_clock_alternates_and_counts_calls():
    order = []
    runs = {name: lambda i, name=name: order.append((name, i)) or time.sleep(1e-4) for name in "ab"}
    times = Clock(CPU, repeats=4, fill=1e-5).times(runs)
    assert all(5e-5 < t.seconds < 0.1 and t.how == "wall clock" for t in times.values())
    first = [
        name for (name, _), (before, _) in zip(order[1:], order, strict=False) if name != before
    ]
    assert "".join(first).endswith("aba")  # a b | b a | a b | b a: neighbours are one here
    indices = [i for name, i in order if name == "a"][4:]
    assert indices == list(range(len(indices)))  # every call gets the next copy


def test_the_roofline_is_the_larger_of_two_times():
    assert ROOF.floor(1e11, 1, "float32") == 1
    assert ROOF.floor(1, 2e10, "float32") == 2
    assert ROOF.floor(2e11, 1, "unheard of") == 1  # the best peak there is
    measured = measure_roof(CPU, small=True)
    assert measured.bandwidth > 1e8 and measured.peaks["int8"] >= measured.peaks["float32"] > 1e8


# --- shapes


def test_presets_have_the_published_shapes():
    shapes = {x.name: x.shape for x in decoder("qwen2.5-vl-7b").linears}
    assert shapes == {
        "qkv": "3584x4608", "o": "3584x3584", "gate_up": "3584x37888", "down": "18944x3584",
    }  # fmt: skip
    shapes = {x.name: x.shape for x in decoder("qwen2-100m").linears}
    assert shapes == {
        "qkv": "1024x1536", "o": "1024x1024", "gate_up": "1024x5632", "down": "2816x1024",
    }  # fmt: skip
    for name in PRESETS:
        assert decoder(name).layers >= 8


def test_a_config_file_is_read_and_a_wrong_one_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["qwen2-100m"]))
    assert decoder(str(tmp_path)).linears == decoder("qwen2-100m").linears
    assert decoder(str(tmp_path / "config.json")).hidden == 1024
    for text in ("{", "{}"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(RecipeError):
            decoder(str(tmp_path))
    for shape in ("12", "axb", "0x5", "3x", "1.5x2"):
        with pytest.raises(RecipeError, match="no shape"):
            linear(shape)


# --- kernels and layers


def by_name(tables) -> dict:
    return {(row["name"], row["tokens"]): row for rows in tables for row in rows}


def test_kernels_time_every_op_beside_dense():
    found = by_name(kernels.rows(SMALL, CLOCK, ROOF, NullProgress()))
    timed = {row["op"] for row in found.values() if "op" in row and "seconds" in row}
    assert timed == set(reference.OPS)
    assert failures(found.values()) == []
    assert found["gemm_decode W4", 1]["speedup"] > 0
    assert "speedup" not in found["smooth_quant + norm", 5]
    assert ("lowrank_down rank 0.1, vision 50%", 5) in found
    assert ("lowrank_down rank 0.1, vision 50%", 1) not in found  # half of one token
    for row in found.values():
        assert row["check"]["ok"] == ("seconds" in row) or "skipped" in row


def test_layers_state_the_price_of_low_rank_and_the_bytes():
    pair = kernels.Settings([linear("200x48"), linear("128x64")], [3], [0.1], [1.0], torch.float32)
    tables = list(layers.rows(pair, CLOCK, ROOF, NullProgress(), layer=True))
    assert [rows[0]["shape"] for rows in tables] == ["200x48", "128x64", "layer"]
    for rows in tables:
        found = {row["name"]: row for row in rows}
        assert failures(rows) == []
        assert "low_rank_overhead" in found["W4A8 rank 0.1, vision 100%"]
        assert "low_rank_overhead" in found["W4A8 rank 0.1, vision 0%"]
        assert found["W4A8"]["backend"] and found["W4A8"]["weight_bytes"] > 0
    names = {row["name"]: row for row in tables[0]}
    packed = 48 * 128 + 4 * 48 + 4 * 2 * 200  # int4 in blocks of 128 inputs, scales, 1 / s
    assert names["W4A8"]["weight_ratio_float32"] == pytest.approx(packed / (4 * 200 * 48))
    parts = [next(r for r in rows if r["name"] == "W4A8")["weight_bytes"] for rows in tables]
    assert parts[2] == parts[0] + parts[1]


def test_a_wrong_kernel_is_never_timed_in_a_layer(backend):
    backend("gemm_w4a8", lambda out, *args: out.copy_(reference.gemm_w4a8(*args) * 1.01))
    [first, _] = layers.rows(SMALL, CLOCK, ROOF, NullProgress())
    found = {row["name"]: row for row in first}
    assert "seconds" not in found["W4A8"] and "seconds" in found["W8A8"]
    assert any(text.startswith("W4A8 200x49 T=1: relative error") for text in failures(first))


def test_dense_and_exact_peers_are_held_to_exact_products():
    weights, x, q, scale = operands(tokens=20)
    for candidate in peers.dense(weights, x):
        assert candidate.check().ok, candidate.name
    for make in (peers.int_mm, peers.onednn):
        weights.scale *= 2  # a peer that ignored the scale would now be wrong
        for candidate in make(weights, q, scale, x.dtype):
            try:
                check = candidate.check()
            except RuntimeError as error:
                assert "VNNI" in str(error)
                continue
            vnni = torch.cpu._is_vnni_supported()
            assert check.ok or not vnni  # without it u8s8 saturates: seen, and not timed


def test_absent_libraries_are_said_to_be_absent(monkeypatch):
    monkeypatch.setattr(peers, "version", lambda name: None)
    assert set(peers.availability().values()) == {"not installed"}
    weights, x, *_ = operands()
    assert list(peers.libraries(weights, x)) == []


# --- GPUs, with a stand-in for torch.cuda: what is called, in which order


class FakeCuda:
    """Records; one millisecond of device time for each call or replay of a graph."""

    def __init__(self, monkeypatch, capturable: bool):
        self.log, self.now, self.capturing = [], 0.0, False
        fake = self

        class Event:
            def __init__(self, **_): ...

            def record(self):
                self.at = fake.now

            def synchronize(self): ...

            def elapsed_time(self, end):
                return end.at - self.at

        class Graph:
            def replay(self):
                fake.work("replay")

        @contextlib.contextmanager
        def graph(_graph):
            if not capturable:
                raise RuntimeError("operation not permitted when stream is capturing")
            fake.capturing = True
            yield
            fake.capturing = False

        for name, value in {
            "Event": Event, "CUDAGraph": Graph, "graph": graph, "synchronize": lambda *_: None,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)

    def work(self, what: str):
        if not self.capturing:
            self.log.append(what)
            self.now += 1.0


@pytest.mark.parametrize("capturable", [True, False])
def test_a_gpu_is_timed_by_replays_of_a_graph_where_it_can_be(monkeypatch, capturable):
    fake = FakeCuda(monkeypatch, capturable)

    class Flush:
        def zero_(self):
            fake.log.append("flush")

    monkeypatch.setattr("masquant_cli.bench.timing.cache_bytes", lambda _: 8)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: Flush())
    found = Clock(torch.device("cuda"), repeats=2).times({"a": lambda _: fake.work("call")})
    assert found["a"].seconds == 1e-3  # the flush is not counted
    assert found["a"].how == ("CUDA graph" if capturable else "CUDA events")
    assert fake.log[-4:] == ["flush", "replay" if capturable else "call"] * 2
    assert fake.log[:3] == ["call"] * 3  # kernels are compiled before
