"""Calibration layer by layer: hidden states in memory or on disk, interrupted and taken up."""

import functools
import json
import weakref
from pathlib import Path

import pytest
import tiny_chat
import tiny_models
import torch
import transformers
from jobs import Interrupting, small
from test_families_run import TEXT, recipe

from masquant_cli import pipeline, shards
from masquant_cli.distributed import World
from masquant_cli.errors import EnvironmentProblem, RecipeError
from masquant_cli.models import capture, loading
from masquant_cli.models.capture import embed, run_layer
from masquant_cli.models.hidden import Store
from masquant_cli.models.sites import find_sites
from masquant_cli.models.skeleton import load_skeleton
from masquant_cli.recipe import Model, Resources
from masquant_cli.stages import calibrate as stage
from masquant_cli.stages.job import Job
from masquant_cli.stages.memory import embeds_at_once, room_for_hidden
from masquant_cli.stages.samples import groups, row_keys


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole")
    pipeline.run(small(), run_dir, until="calibrate")
    return run_dir / "calibrate"


def layers_of(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [shards.load(path) for path in sorted((folder / "layers").glob("*.safetensors"))]


def same(one: Path, other: Path, rtol: float = 0) -> None:
    for a, b in zip(layers_of(one), layers_of(other), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=rtol, atol=rtol, msg=key)


def test_statistics_are_the_same_with_hidden_states_on_disk(whole, tmp_path):
    seen = set()

    class Watching(Interrupting):
        def advance(self, n=1, tokens=0):
            seen.update(p.name for p in (tmp_path / "calibrate" / stage.SCRATCH).glob("*-*"))

    tight = small("resources.max_memory=1MB")
    assert pipeline.plan(tight, whole.parent)[0].state == "cached"  # outside every fingerprint
    pipeline.run(tight, tmp_path, until="calibrate", progress=Watching("", 0))
    assert {name.split("-")[0] for name in seen} == {"hidden", "arguments"}
    same(whole, tmp_path / "calibrate")
    assert not (tmp_path / "calibrate" / stage.SCRATCH).exists()
    outputs = json.loads((tmp_path / "calibrate" / "manifest.json").read_text())["outputs"]
    assert not [name for name in outputs if "scratch" in name]


@pytest.mark.parametrize("memory", ["1MB", "100GB"])
def test_an_interrupted_calibration_goes_on(whole, tmp_path, monkeypatch, memory):
    job = small(f"resources.max_memory={memory}")
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(job, tmp_path, until="calibrate", progress=Interrupting("calibrate", 2))
    files = sorted((tmp_path / "calibrate" / "layers").glob("*"))
    assert len(files) == 2
    times = [path.stat().st_mtime_ns for path in files]
    ran = []
    honest = stage.run_layer
    monkeypatch.setattr(stage, "run_layer", lambda s, i, b: (ran.append(i), honest(s, i, b)))
    pipeline.run(job, tmp_path, until="calibrate")
    assert min(ran) == (2 if memory == "1MB" else 0)  # on disk was what enters the third
    assert [path.stat().st_mtime_ns for path in files] == times
    same(whole, tmp_path / "calibrate")


def test_scratch_of_another_run_is_not_trusted(whole, tmp_path):
    job = small("resources.max_memory=1MB")
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(job, tmp_path, until="calibrate", progress=Interrupting("calibrate", 2))
    other = small("resources.max_memory=1MB", "calibration.rows=32")
    pipeline.run(other, tmp_path, until="calibrate")
    expected = layers_of(whole)[1]["mlp_in.text.rows"]
    assert torch.equal(layers_of(tmp_path / "calibrate")[1]["mlp_in.text.rows"], expected[:32])


def test_neither_rows_nor_sums_see_how_batches_are_formed(whole, tmp_path):
    for tokens in (1, 300):  # alone, and padded otherwise
        run_dir = tmp_path / str(tokens)
        pipeline.run(small(f"calibration.batch_tokens={tokens}"), run_dir, until="calibrate")
        for a, b in zip(layers_of(whole), layers_of(run_dir / "calibrate"), strict=True):
            for key in a:
                scale = float(a[key].abs().max()) or 1.0
                torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-4 * scale, msg=key)


def test_a_layer_at_a_time_is_in_memory(tmp_path, monkeypatch):
    honest, real = stage.run_layer, []

    def watching(skeleton, index, batch):
        layers = find_sites(skeleton.model)
        mine = {id(p) for p in skeleton.module(layers[index].module).parameters()}
        assert {id(p) for p in skeleton.model.parameters() if not p.is_meta} == mine
        assert not any(sample() for sample in alive)  # nor their pictures
        real.append(index)
        honest(skeleton, index, batch)

    choose, alive = stage.choose_samples, []

    def choosing(*args):
        chosen = choose(*args)
        alive.extend(map(weakref.ref, chosen.samples))
        return chosen

    monkeypatch.setattr(stage, "choose_samples", choosing)
    monkeypatch.setattr(stage, "run_layer", watching)
    pipeline.run(small(), tmp_path, until="calibrate")
    assert len(alive) > 10
    assert set(real) == set(range(max(real) + 1)) and max(real) >= 3


# --- what enters the layers


@pytest.fixture(autouse=True)
def processor(monkeypatch):
    made = loading.load_processor
    monkeypatch.setattr(
        loading, "load_processor", lambda f: made(f) if (f / "tokenizer.json").exists() else None
    )


def last_hidden(model, inputs: dict) -> torch.Tensor:
    seen = {}
    norm = model.get_decoder().norm
    handle = norm.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    with torch.no_grad():
        model(**inputs, use_cache=False)
    handle.remove()
    return seen["x"]


def walked(folder: Path, inputs: dict) -> capture.Batch:
    skeleton = load_skeleton(Model(path=str(folder)), "cpu")
    with skeleton.materialised_names(skeleton.names_outside_layers()):
        batch = embed(skeleton, inputs, torch.zeros_like(inputs["input_ids"]))
    for layer in find_sites(skeleton.model):
        with skeleton.materialised(layer.module):
            run_layer(skeleton, layer.layer, batch)
    return batch


def padded_text() -> dict:
    inputs = tiny_models.text_inputs(3, 14)
    inputs["attention_mask"][1, :5] = 0
    return inputs


def test_layers_of_two_kinds_get_their_own_masks_and_frequencies(tmp_path):
    torch.manual_seed(0)
    text = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    kinds = ["sliding_attention", "full_attention"] * 2
    config = transformers.Gemma3TextConfig(
        **text, num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=5,
        layer_types=kinds, rope_local_base_freq=100.0,
    )  # fmt: skip
    model = transformers.Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    model.save_pretrained(tmp_path)
    inputs = padded_text()
    batch = walked(tmp_path, inputs)
    assert torch.equal(batch.hidden[batch.real], last_hidden(model, inputs)[batch.real])
    (first, _), (second, _) = (batch.arguments.of(i, torch.device("cpu")) for i in (0, 1))
    assert not torch.equal(first["attention_mask"], second["attention_mask"])
    third = batch.arguments.of(2, torch.device("cpu"))[0]
    assert third["attention_mask"] is first["attention_mask"]  # kept once


def test_a_model_that_changes_hidden_states_between_its_layers_is_refused(tmp_path, monkeypatch):
    tiny_models.qwen2().save_pretrained(tmp_path)
    model_class = transformers.models.qwen2.modeling_qwen2.Qwen2DecoderLayer
    honest = model_class.__call__
    monkeypatch.setattr(model_class, "__call__", lambda self, x, **k: honest(self, x * 1.0, **k))
    with pytest.raises(RecipeError, match="between its decoder layers") as caught:
        walked(tmp_path, padded_text())
    assert caught.value.hint


def test_layers_that_return_tuples(tmp_path, monkeypatch):
    model = tiny_models.qwen2()
    model.save_pretrained(tmp_path)
    expected = last_hidden(model, padded_text())
    model_class = transformers.models.qwen2.modeling_qwen2.Qwen2DecoderLayer
    forward, call = model_class.forward, model_class.__call__
    wrapped = functools.wraps(forward)(lambda self, *a, **k: (forward(self, *a, **k),))
    monkeypatch.setattr(model_class, "forward", wrapped)
    batch = None

    def called(self, *args, **kwargs):  # as a decoder that expects them does
        out = call(self, *args, **kwargs)
        return out[0] if batch is None else out

    monkeypatch.setattr(model_class, "__call__", called)
    batch = walked(tmp_path, padded_text())
    assert torch.equal(batch.hidden[batch.real], expected[batch.real])


# --- where hidden states lie


def test_the_store_spills_what_passes_its_budget_and_gives_it_back(tmp_path):
    g = torch.Generator().manual_seed(0)
    kept = {
        "a": [torch.randn(3, 5, generator=g), torch.ones(2, 2).bool()],
        "b": [torch.randn(7, generator=g).bfloat16(), torch.zeros(0, 4)],
        "c": [torch.randn(4, 6, generator=g).T, torch.arange(3)],  # not contiguous
    }
    store = Store(tmp_path / "s", budget=3 * 5 * 4 + 4 + 7 * 2)
    for name, tensors in kept.items():
        assert store.on_disk == (tmp_path / "s").exists() and store.on_disk is False
        store.put(name, tensors)
    assert store.on_disk and store.nbytes == 0
    for name, tensors in kept.items():
        for found, expected in zip(store.get(name), tensors, strict=True):
            assert found.dtype == expected.dtype and torch.equal(found, expected)
    store.checkpoint({"layer": 2})
    again = Store(tmp_path / "s", budget=10**9)
    assert again.resume() == {"layer": 2}
    assert torch.equal(again.get("c")[0], kept["c"][0])
    (tmp_path / "s" / "a").write_bytes(b"short")
    assert Store(tmp_path / "s").resume() is None and not (tmp_path / "s").exists()


def test_room_for_hidden_states_is_what_the_limit_leaves(monkeypatch):
    def room(limit: str) -> int:
        return room_for_hidden(Job(small(f"resources.max_memory={limit}"), Interrupting("", 0)))

    assert room("1MB") == 0
    large, larger = room("80GB"), room("90GB")
    assert 0 < large < 72e9 and abs(larger - large - 9e9) < 1e8
    assert not embeds_at_once(Job(small("resources.max_memory=1MB"), Interrupting("", 0)))
    assert Resources(max_memory="1.5GiB").max_bytes == 3 << 29
    assert Resources(max_memory="6GB").max_bytes == 6 * 10**9


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("", {}, 40e9 + 3e9),
        ("0::/", {"/sys/fs/cgroup/memory.max": "max"}, 40e9 + 3e9),
        ("0::/", {"/sys/fs/cgroup/memory.max": "16000000000"}, 8e9),  # what it has included
        ("0::/job/step", {"/sys/fs/cgroup/job/memory.max": "20000000000"}, 10e9),
        ("3:cpuset:/\n4:memory:/job\n0::/",
         {"/sys/fs/cgroup/memory/job/memory.limit_in_bytes": "12000000000"}, 6e9),
    ],
)  # fmt: skip
def test_processes_share_the_machines_memory_once(monkeypatch, groups, files, expected):
    from masquant_cli.stages import memory

    files |= {"/proc/self/cgroup": groups, "/proc/meminfo": f"MemAvailable: {80e9 / 1024:.0f} kB"}
    monkeypatch.setattr(memory, "_lines", lambda path: files.get(path, "").splitlines())
    monkeypatch.setattr(memory, "resident", lambda: int(3e9))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    world = World()
    world.local_size = 2
    job = Job(small(), Interrupting("", 0), world=world)
    assert memory.budget(job) == memory.machine_memory() == expected
    assert memory.budget(Job(small("resources.max_memory=6GB"), job.progress, world=world)) == 3e9


# --- samples


def test_batches_are_of_one_kind_and_similar_length():
    from masquant_cli.progress import NullProgress
    from masquant_cli.stages.samples import choose_samples

    job = Job(small("calibration.batch_tokens=200"), NullProgress())
    chosen = choose_samples(job.recipe, job.float, job.progress)
    found = groups(job.recipe, chosen)
    assert sorted(i for group in found for i in group) == list(range(len(chosen.samples)))
    for group in found:
        assert len(group) * max(chosen.lengths[i] for i in group) <= 200 or len(group) == 1
        media = {(bool(s.media("image")), bool(s.media("audio")))
                 for s in (chosen.samples[i] for i in group)}  # fmt: skip
        assert len(media) == 1


def test_keys_depend_on_the_seed_and_the_sample_alone():
    real = torch.ones(2, 6, dtype=torch.bool)
    real[1, :2] = False
    keys = row_keys(7, [4, 9], real)
    assert torch.equal(row_keys(7, [9], torch.ones(1, 4, dtype=torch.bool))[0], keys[1, 2:])
    assert (keys[1, :2] == 1).all() and keys.dtype == torch.float64
    assert len(keys[real].unique()) == 10
    assert not torch.equal(row_keys(8, [4], real[:1]), keys[:1])


@pytest.mark.parametrize(
    ("flags", "dtype", "expected"),
    [("avx2 amx_bf16", "bfloat16", "bfloat16"), ("avx2 avx512_bf16", "bfloat16", "bfloat16"),
     ("avx2", "bfloat16", "float32"), ("avx2 amx_bf16", "float16", "float32"),
     ("avx2 amx_bf16", "float32", "float32")],
)  # fmt: skip
def test_bf16_is_computed_where_the_cpu_has_units_for_it(monkeypatch, flags, dtype, expected):
    monkeypatch.setattr(loading.Path, "read_text", lambda _: f"flags\t: fpu {flags}\n")
    config = transformers.Qwen2Config(dtype=dtype)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert loading.pick_dtype("auto", cpu, config) == getattr(torch, expected)
    assert loading.pick_dtype("auto", gpu, config) == getattr(torch, dtype)
    assert loading.pick_dtype("float32", gpu, config) == torch.float32


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory) -> Path:
    """A bf16 checkpoint without towers: its first weights are those of the word embeddings."""
    folder = tmp_path_factory.mktemp("text")
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=len(tiny_chat.tokenizer()), hidden_size=64, intermediate_size=96,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        )
    ).bfloat16()  # fmt: skip
    model.save_pretrained(folder)
    tiny_chat.tokenizer().save_pretrained(folder)
    return folder


def test_word_embeddings_that_do_not_fit_are_read_by_row(text_folder, tmp_path):
    for memory in ("1MB", "100GB"):
        job = recipe(text_folder, ["text"], [TEXT], resources={"max_memory": memory})
        pipeline.run(job, tmp_path / memory, until="calibrate")
    same(tmp_path / "100GB" / "calibrate", tmp_path / "1MB" / "calibrate")


@pytest.mark.parametrize("memory", ["1MB", "100GB"])
def test_a_machine_that_computes_in_another_dtype_does_not_go_on_where_one_was(
    text_folder, tmp_path, monkeypatch, memory
):
    job = recipe(text_folder, ["text"], [TEXT], resources={"max_memory": memory})
    monkeypatch.setattr(loading, "cpu_multiplies_bf16", lambda: True)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(job, tmp_path / "a", until="calibrate", progress=Interrupting("calibrate", 1))
    monkeypatch.setattr(loading, "cpu_multiplies_bf16", lambda: False)
    for name in ("a", "b"):
        pipeline.run(job, tmp_path / name, until="calibrate")
    same(tmp_path / "a" / "calibrate", tmp_path / "b" / "calibrate")


def test_ranks_that_would_compute_in_different_dtypes_are_told():
    class Two(World):
        def all_gather(self, mine):
            return ["bfloat16", mine]

    with pytest.raises(EnvironmentProblem, match="bfloat16 and float32") as caught:
        stage._same_dtype(Job(small(), Interrupting("", 0), world=Two()))
    assert "model.dtype=float32" in caught.value.hint


def test_a_bf16_checkpoint_computes_in_fp32_and_gives_fp32_statistics(text_folder, tmp_path):
    for dtype in ("float32", "bfloat16"):
        job = recipe(text_folder, ["text"], [TEXT])
        job = job.model_copy(update={"model": Model(path=job.model.path, dtype=dtype)})
        pipeline.run(job, tmp_path / dtype, until="calibrate")
    wide, narrow = (layers_of(tmp_path / d / "calibrate") for d in ("float32", "bfloat16"))
    for a, b in zip(wide, narrow, strict=True):
        for key in a:
            assert (
                a[key].dtype == b[key].dtype == (torch.int64 if "count" in key else torch.float32)
            )
            error = float((a[key].float() - b[key].float()).norm() / a[key].float().norm())
            assert error < 0.05, key
