"""`masquant bench kernels | layers | model | --tune`: options, documents, tables, exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from masquant_kernels import reference

from masquant_cli.bench import commands, gate, kernels, model, tune
from masquant_cli.bench.commands import Options
from masquant_cli.bench.shapes import decoder, linear
from masquant_cli.bench.timing import Clock, Timed
from masquant_cli.cli import app, render_bench
from masquant_cli.progress import NullProgress

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "hidden_act": "silu", "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    """Rooflines of tiny sizes; what they say is not looked at."""
    from masquant_cli.bench import roofline

    monkeypatch.setattr(
        commands, "measure_roof", lambda device, small: roofline.measure_roof(device, small=True)
    )


def call(capsys, *args: str) -> tuple[int, str, str]:
    code = app.main(["bench", *args])
    return code, *capsys.readouterr()


def config(folder: Path, kind: str) -> str:
    text = TINY if kind == "qwen2" else {"text_config": TINY}
    if kind == "qwen2":
        text = {k: v for k, v in TINY.items() if k != "rope_parameters"}
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **text}))
    return str(folder)


# --- kernels and layers


@pytest.mark.parametrize("what", ["kernels", "layers"])
def test_document_and_table(quick, capsys, tmp_path, what):
    file = tmp_path / "out" / "x.json"
    arguments = (
        what, "--shape", "200x48", "--tokens", "1,3", "--rank-ratio", ".1", "--vision", "0,100%",
        "--repeats", "2", "--device", "cpu", "-q",
    )  # fmt: skip
    code, out, _ = call(capsys, *arguments, "--json", "--output", str(file))
    assert code == 0
    document = json.loads(out)
    assert json.loads(file.read_text()) == document
    assert document["bench"] == what and document["machine"]["device"] == "cpu"
    assert document["machine"]["versions"]["torch"] == torch.__version__
    assert document["settings"]["rank_ratios"] == [0.0, 0.1]
    assert {row["tokens"] for row in document["rows"]} == {1, 3}
    assert document["failed"] == [] and document["verdict"]
    code, out, _ = call(capsys, *arguments)
    assert code == 0
    for cell in ("200x48, T = 3", "dense float32", "rank 0.1, vision 100%", "floor", "measured: "):
        assert cell in out
    assert "faster than dense float at T" in out or "SLOWER at T" in out


def test_a_wrong_kernel_is_exit_code_1_and_one_document(quick, capsys, monkeypatch):
    wrong = gate.Check(False, 1.0, 1.0, "wrong")
    monkeypatch.setattr(gate, "check_op", lambda op, given, exact=False: ("cpu", wrong))
    arguments = ("kernels", "--shape", "128x16", "--tokens", "1", "--repeats", "1")
    code, out, err = call(capsys, *arguments, "--json")
    assert code == 1
    document = json.loads(out)
    assert any("gemm_w4a8 128x16 T=1: wrong" in text for text in document["failed"])
    assert "warning: not timed, as it is wrong: gemm_w4a8" in err
    code, out, _ = call(capsys, *arguments)
    assert code == 1 and "WRONG, not timed: gemm_w4a8" in out


def test_rows_are_kept_when_it_ends_early(quick, tmp_path):
    """Ctrl-C in the second table leaves the first in the file."""

    class Stops(NullProgress):
        def advance(self, n=1, tokens=0):
            raise KeyboardInterrupt

    file = tmp_path / "x.json"
    options = Options(shapes=("128x16",), tokens=(1, 2), repeats=1, output=file, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        commands.run_layers(options, Stops())
    assert {row["tokens"] for row in json.loads(file.read_text())["rows"]} == {1}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("layers", "--shape", "12"), "no shape"),
        (("layers", "--tokens", "0"), "--> --tokens"),
        (("layers", "--tokens", "a"), "--> --tokens"),
        (("layers", "--vision", "101"), "from 0 to 100"),
        (("layers", "--device", "tpu"), "no device"),
        (("layers", "--dtype", "int8", "--shape", "8x8"), "no float dtype"),
        (("kernels", "--model", "no/such/model"), "no such model"),
        (("model", "--model", "no-such-model"), "no such model"),
        ((), "needs a recipe"),
    ],
)
def test_bad_input_is_exit_code_2(capsys, arguments, said):
    code, out, err = call(capsys, *arguments)
    assert code == 2 and not out and said in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "arguments",
    [("--tune",), ("kernels", "--tune"), ("layers", "--device", "cuda")],
)
def test_without_a_gpu_is_exit_code_3_and_one_error(capsys, arguments):
    code, out, err = call(capsys, *arguments)
    assert code == 3 and not out
    assert err.count("error: ") == 1 and "no CUDA GPU" in err


def test_the_old_form_still_reaches_the_pipeline(monkeypatch, capsys, tmp_path):
    fake = SimpleNamespace(bench=lambda *_, **__: {"threads": 2})
    monkeypatch.setitem(sys.modules, "masquant_cli.pipeline", fake)
    monkeypatch.setattr("masquant_cli.pipeline", fake, raising=False)
    file = tmp_path / "b.json"
    code, out, _ = call(capsys, "-c", "tiny-omni-w4a8", "--json", "-o", str(file))
    assert code == 0 and json.loads(out) == json.loads(file.read_text()) == {"threads": 2}


def test_defaults_follow_the_device():
    cpu, cuda = (commands.op_settings(Options(), torch.device(d)) for d in ("cpu", "cuda"))
    assert [x.shape for x in cpu.linears][:2] == ["3584x18944", "18944x3584"]
    assert cpu.dtype == torch.float32 and cuda.dtype == torch.bfloat16
    assert [x.name for x in cuda.linears] == ["qkv", "o", "gate_up", "down"]
    assert cuda.tokens == (1, 16, 256, 2048) and list(cuda.ratios) == [0.01, 0.02, 0.05]


# --- model


@pytest.mark.parametrize("kind", ["qwen2", "qwen2_5_vl", "qwen2_5_omni_thinker"])
def test_a_random_model_is_checked_and_timed(capsys, tmp_path, kind):
    code, out, _ = call(
        capsys, "model", "--model", config(tmp_path, kind), "--sequence", "20", "--steps", "2",
        "--rank-ratio", "0,.1", "--vision", "0,100", "--batch", "2", "--repeats", "1", "--json",
        "--layers", "1",
    )  # fmt: skip
    assert code == 0
    document = json.loads(out)
    rows = [row for row in document["rows"] if not row["name"].startswith("dense")]
    forms = [(row["name"], row["rank_ratio"], row["vision"]) for row in rows]
    assert forms == [("W4A8", r, v) for r in (0, 0.1) for v in (0, 1)] + [
        ("W8A8", 0, v) for v in (0, 1)
    ]
    for row in rows:
        assert row["check"]["ok"] and 0 <= row["check"]["relative_error"] < 0.1
        assert row["prefill_seconds"] > 0 and row["decode_speedup"] > 0 and row["batch"] == 2
    four, eight = rows[0]["layers_bytes"], rows[-1]["layers_bytes"]
    assert four < eight < document["rows"][0]["layers_bytes"]
    assert rows[2]["memory_bytes"] > rows[0]["memory_bytes"]  # low rank has its price
    assert document["verdict"] and document["failed"] == []


def test_the_models_table_has_the_columns_of_table_7(capsys, tmp_path):
    code, out, _ = call(
        capsys, "model", "--model", config(tmp_path, "qwen2"), "--sequence", "8", "--steps", "1",
        "--rank-ratio", "0", "--vision", "0", "--repeats", "1", "-q",
    )  # fmt: skip
    assert code == 0
    for cell in (
        "batch",
        "prefill",
        "speed-up",
        "memory",
        "saving",
        "decode step",
        "dense float32",
    ):
        assert cell in out


def test_a_quantized_model_that_disagrees_is_not_timed(monkeypatch, tmp_path):
    real, calls = reference.gemm_w4a8, []

    def wrong(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs) * 1.5

    monkeypatch.setitem(reference.OPS, "gemm_w4a8", lambda _out, *a, **k: wrong(*a, **k))
    from masquant_kernels import dispatch

    dispatch.functions.cache_clear()
    settings = model.Settings(
        decoder(config(tmp_path, "qwen2")), (1,), 40, 1, (0.0,), (0.0,), (4,),
        float_dtypes=(torch.float32,), dtype=torch.float32,
    )  # fmt: skip
    fast = model.build(settings, CPU, torch.float32, bits=4)
    if dispatch.backend_of("gemm_w4a8", "cpu") == "reference":
        pytest.skip("no fast backend here to disagree with the reference")
    [rows] = model.rows(settings, Clock(CPU, repeats=1), NullProgress())
    monkeypatch.undo()
    dispatch.functions.cache_clear()
    assert calls and fast is not None
    assert len(rows) == 1 and not rows[0]["check"]["ok"] and "prefill_seconds" not in rows[0]


def test_prompts_hold_the_share_of_vision_and_no_placeholder_otherwise(tmp_path):
    settings = model.Settings(decoder(config(tmp_path, "qwen2")), sequence=20)
    ids = model.prompt(settings, 3, 0.5, CPU)
    assert ids.shape == (3, 20) and (ids == 299).sum(1).tolist() == [10, 10, 10]
    assert ids[ids != 299].max() < 150 and ids.min() >= 1
    assert model.scheme(settings, 4, 0.1).token_ids == {"vision": (299,)}


def test_resident_counts_shared_storage_once():
    shared = torch.nn.Linear(8, 8, bias=False)
    pair = torch.nn.ModuleList([shared, torch.nn.Linear(8, 8, bias=False)])
    pair[1].weight = torch.nn.Parameter(shared.weight.data[:4])
    assert model.resident(pair) == 8 * 8 * 4


# --- tune


def test_a_table_of_tiles_has_small_shapes_first_and_loads():
    rows = [
        {"op": "gemm_w4a8", "tokens": t, "columns": 64, "outputs": n, "tile": {"BT": t}}
        for t, n in ((256, 64), (16, 64), (256, 32))
    ]
    assert tune.table(90, rows) == {
        "90": {"gemm_w4a8": [
            {"max_tokens": 16, "max_columns": 64, "max_outputs": 64, "BT": 16},
            {"max_tokens": 256, "max_columns": 64, "max_outputs": 32, "BT": 256},
            {"max_tokens": 256, "max_columns": 64, "max_outputs": 64, "BT": 256},
        ]}
    }  # fmt: skip


class FakeTiles:
    """Tiles whose `override` makes the op slower or wrong, on a CPU."""

    def __init__(self, monkeypatch):
        self.now = None
        self.used = {}
        monkeypatch.setattr(tune.gate, "check_op", self.check)

    def candidates(self, name, arch):
        return [{"name": name, "rank": "wrong"}, {"name": name, "rank": "fast"}]

    def override(self, name, tile):
        import contextlib

        @contextlib.contextmanager
        def inside():
            self.now = self.used = tile
            yield
            self.now = None

        return inside()

    def check(self, op, given):
        good = not self.now or self.now["rank"] != "wrong"
        return tune.dispatch._forced, gate.Check(good, 0.0 if good else 1.0, 0.0)


def test_tuning_writes_right_and_faster_tiles_only(monkeypatch):
    pytest.importorskip("triton")
    tiles = FakeTiles(monkeypatch)
    seconds = {None: 2.0, "fast": 1.0, "wrong": 0.1}

    def times(self, runs):
        found = {}
        for name, run in runs.items():
            tiles.used = {}
            run(0)
            found[name] = Timed(seconds[tiles.used.get("rank")], 0.0, "a table")
        return found

    monkeypatch.setattr(Clock, "times", times)
    settings = kernels.Settings([linear("128x64")], [4, 32], dtype=torch.float32)
    rows = list(tune.search(tiles, 90, settings, Clock(CPU), NullProgress()))
    assert {row["op"] for row in rows} == {
        "smooth_quant", "lowrank_down_f32", "gemm_w4a16_f32", "decode_w4a16_f32",
        "decode_w4a8", "decode_w8a8", "gemm_w4a8", "gemm_w8a8", "hopper_w4a8", "hopper_w8a8",
    }  # fmt: skip
    assert all(row["tile"]["rank"] == "fast" and row["speedup"] == 2 for row in rows)
    seconds["fast"] = 1.99  # within noise of the shipped tile
    assert list(tune.search(tiles, 90, settings, Clock(CPU), NullProgress())) == []


def test_tiles_table_is_drawn(capsys):
    machine = {"name": "X", "device": "cuda", "versions": {"torch": "2"}}
    row = {"op": "gemm_w4a8", "shape": "8x8", "tokens": 4, "seconds": 2e-6, "speedup": 1.5}
    render_bench.tiles(
        {"machine": machine, "rows": [row | {"tile": {"BT": 16}}], "table": "tiles.json"}
    )
    out = capsys.readouterr().out
    assert "1.50x" in out and "BT 16" in out and "table: tiles.json" in out


def test_durations_read_well():
    found = [render_bench.duration(s) for s in (8.1e-7, 1.234e-5, 4.56e-3, 1.23)]
    assert found == ["0.81 us", "12.3 us", "4.56 ms", "1.23 s"]


def test_bench_stays_light_to_ask_for_help():
    code = "import sys, masquant_cli.cli.bench; print('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'kernels'}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "False", done.stderr


TUNED = """
import torch
from masquant_cli.bench import kernels, tune
from masquant_cli.bench.shapes import linear
from masquant_kernels import dispatch
from masquant_kernels.gpu import tiles
asked, find = [], tiles.find
tiles.find = lambda op, *shape: asked.append((op, shape)) or find(op, *shape)
for tokens, dtype in ((3, torch.float32), (20, torch.bfloat16)):
    settings = kernels.Settings([linear("128x64")], [tokens], dtype=dtype)
    cpu = torch.device("cpu")
    for work in tune._works(settings.linears[0], tokens, settings, cpu, 80):
        asked.clear()
        with dispatch.force("triton"):
            getattr(torch.ops.masquant, work.op)(*work.given.values())
        [(entry, (_, *shape))] = asked
        assert entry == work.entry, (entry, work.entry)
        assert shape[0] == tokens and (shape + [0])[2] == work.outputs, (shape, work)
        assert list(tiles.candidates(work.entry, 80)), work.entry
print("asked")
"""


def test_what_is_tuned_is_what_the_kernels_look_up():
    """The names in a table are those that tiles.find is asked for; under Triton's interpreter."""
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'kernels'}"}
    done = subprocess.run([sys.executable, "-c", TUNED], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "asked", done.stderr
