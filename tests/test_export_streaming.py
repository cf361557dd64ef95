"""Exports written and verified piece by piece: the file writer, layouts on disk, refusals."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import tiny_chat
import tiny_families
import tiny_quantized
import torch
from jobs import Interrupting
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from masquant_cli import pipeline
from masquant_cli.errors import EnvironmentProblem, RecipeError
from masquant_cli.models.checkpoint import open_checkpoint
from masquant_cli.models.modality import modality_ids
from masquant_cli.models.sites import find_sites, layers_path
from masquant_cli.recipe import Recipe
from masquant_cli.rundir import read_manifest
from masquant_cli.runtime.context import context_of
from masquant_cli.runtime.pack import SUFFIXES, export_shapes
from masquant_cli.shard_writer import Entry, new_shard
from masquant_cli.stages import export, fresh, verify, walk
from masquant_cli.stages.job import Job
from masquant_cli.stages.layout import lay_out, pieces


def odd_tensors() -> dict[str, torch.Tensor]:
    """Every dtype with odd sizes, so that a wrong order would leave tensors out of line."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, generator=generator) * 50

    return {
        "z.packed": noise(3, 5).to(torch.int8),
        "a.scale": noise(3, 1),
        "m.low": noise(2, 1, 7).half(),
        "b.brain": noise(5).bfloat16(),
        "c.steps": torch.tensor(7),
        "d.bytes": noise(3).abs().to(torch.uint8),
        "e.flag": torch.tensor([True, False, True]),
        "é.empty": torch.empty(0, 4),
        "f.double": noise(1, 1).double(),
        "g.short": noise(3).to(torch.int16),
        "h.int": noise(1).to(torch.int32),
    }


def entries(tensors) -> dict[str, Entry]:
    return {name: Entry(t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def test_the_writer_gives_the_librarys_own_bytes_in_whatever_order_tensors_come(tmp_path):
    tensors = odd_tensors()
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    for order in (list(tensors), sorted(tensors), sorted(tensors, reverse=True)):
        with new_shard(tmp_path / "ours.safetensors", entries(tensors)) as shard:
            for name in order:
                shard.write(name, tensors[name])
        theirs, ours = (tmp_path / f"{who}.safetensors" for who in ("theirs", "ours"))
        assert ours.read_bytes() == theirs.read_bytes()
    found = load_file(ours)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    with safe_open(ours, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_writer_copies_bytes_and_writes_views(tmp_path):
    x = torch.arange(30, dtype=torch.float32).reshape(5, 6)
    raw = bytes(x.numpy())
    file = tmp_path / "x.safetensors"
    with new_shard(file, {"x": Entry(x.dtype, (5, 6)), "t": Entry(x.dtype, (6, 5))}) as shard:
        shard.write("t", x.T)
        shard.copy("x", [raw[:7], raw[7:64], memoryview(raw)[64:]])
    found = load_file(file)
    assert torch.equal(found["x"], x) and torch.equal(found["t"], x.T)


@pytest.mark.parametrize(
    "fill",
    [
        lambda s: s.write("x", torch.zeros(2, 3)),
        lambda s: (s.write("x", torch.zeros(2, 3)), s.write("x", torch.zeros(2, 3))),
        lambda s: s.write("x", torch.zeros(3, 2)),
        lambda s: s.write("x", torch.zeros(2, 3).bfloat16()),
        lambda s: s.write("other", torch.zeros(2, 3)),
        lambda s: s.copy("x", [bytes(23)]),
        lambda s: s.copy("x", [bytes(20), bytes(5)]),
        lambda s: None,
    ],
    ids=["one-missing", "twice", "shape", "dtype", "unknown", "short", "long", "nothing"],
)
def test_the_writer_refuses_what_its_header_does_not_say_and_leaves_nothing(tmp_path, fill):
    announced = {"x": Entry(torch.float32, (2, 3)), "y": Entry(torch.int8, (4,))}
    with pytest.raises(ValueError), new_shard(tmp_path / "file.safetensors", announced) as shard:
        fill(shard)
    assert list(tmp_path.iterdir()) == []


def split(folder: Path, parts: int, again: dict[str, str]) -> None:
    """Turn model.safetensors into shards; `again` stores tensors a second time, name -> name."""
    whole = load_file(folder / "model.safetensors")
    whole |= {twin: whole[name].clone() for name, twin in again.items()}
    (folder / "model.safetensors").unlink()
    index = {}
    for i in range(parts):
        name = f"part-{i}.safetensors"
        part = {k: t for j, (k, t) in enumerate(sorted(whole.items())) if j % parts == i}
        save_file(part, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    content = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory) -> Path:
    """A bf16 checkpoint in three shards whose head is tied to its embeddings, and is stored too."""
    tokenizer = tiny_chat.tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=200, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("text")
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    split(folder, 3, {"model.embed_tokens.weight": "lm_head.weight"})
    return folder


def recipe(folder: Path, **more) -> Recipe:
    talk = [
        {"role": "user", "content": [{"text": "{question}"}]},
        {"role": "assistant", "content": [{"text": "{answer}"}]},
    ]
    source = {"dataset": "builtin:tiny-omni/calibration-text", "messages": talk, "limit": 6}
    return Recipe.model_validate(
        {
            "name": "streamed",
            "model": {"path": str(folder), "dtype": "bfloat16"},
            "modalities": ["text"],
            "calibration": {"sources": [source], "rows": 32, "min_tokens": 1},
            "method": "smoothquant",
            **more,
        }
    )


@pytest.fixture(scope="module")
def exported(text_folder, tmp_path_factory) -> Path:
    """A finished run whose export was verified layer by layer."""
    run_dir = tmp_path_factory.mktemp("run")
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(verify, "WHOLE", 0)
        patched.setattr(export, "fresh_process", watched(patched))
        done = pipeline.run(recipe(text_folder), run_dir)
    assert done["stages"]["export"]["verified"]["text"] < 1e-5
    tensors = [t for f in run_dir.glob("export/model/*.safetensors") for t in load_file(f).items()]
    packed = sum(t.nbytes for k, t in tensors if k.endswith(SUFFIXES))
    weights = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 200)
    assert done["stages"]["export"]["bits_per_weight"] == round(8 * packed / weights, 3)
    assert done["stages"]["export"]["bytes"]["float"] == 2 * weights
    return run_dir


def watched(patched):
    """`fresh_process`, and a look at what is asked of it."""
    honest = export.fresh_process

    def ask(*arguments):
        assert not verify.fits(arguments[2], 10, None)
        return look(*arguments)

    look = verify._ask
    patched.setattr(verify, "_ask", ask)
    return honest


def test_shards_names_and_ties_stay_as_they_are_on_disk(text_folder, exported):
    folder = exported / "export/model"
    file = "model.safetensors.index.json"
    before, after = (json.loads((f / file).read_text()) for f in (text_folder, folder))
    kept = {k: f for k, f in before["weight_map"].items() if "_proj.weight" not in k}
    assert {k: f for k, f in after["weight_map"].items() if k in kept} == kept
    stored = {f: load_file(folder / f) for f in set(before["weight_map"].values())}
    assert {k: f for f, found in stored.items() for k in found} == after["weight_map"]
    total = sum(t.nbytes for found in stored.values() for t in found.values())
    assert after["metadata"]["total_size"] == total
    for name, where in kept.items():
        assert torch.equal(stored[where][name], load_file(text_folder / where)[name]), name
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(kept)
    for name, where in after["weight_map"].items():
        if name.endswith(".weight_packed"):
            assert before["weight_map"][name.removesuffix("_packed")] == where


def test_an_export_is_the_same_bytes_again_and_a_head_that_is_not_stored_stays_away(
    text_folder, exported, tmp_path
):
    folder = Path(shutil.copytree(text_folder, tmp_path / "model"))
    for path in folder.glob("part-*"):
        save_file(
            {k: t for k, t in load_file(path).items() if k != "lm_head.weight"},
            path,
            metadata={"format": "pt"},
        )
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(content))
    first, second = (Job(recipe(f), Interrupting("", 0)) for f in (text_folder, folder))
    for job in (first, second):
        job.finished = finished(exported)
    again, headless = tmp_path / "again", tmp_path / "headless"
    for job, where in ((first, again), (second, headless)):
        layout = lay_out(job.float.checkpoint, job.layers, job.scheme)
        export._write_weights(job, layout, where)
        assert layout.nbytes == sum(
            t.nbytes for f in where.glob("*s") for t in load_file(f).values()
        )
    for path in sorted(again.glob("*.safetensors")):
        assert path.read_bytes() == (exported / "export/model" / path.name).read_bytes()
    names = {k for f in headless.glob("*.safetensors") for k in load_file(f)}
    assert "lm_head.weight" not in names and "model.embed_tokens.weight" in names


def finished(run_dir: Path) -> dict:
    stages = ("calibrate", "smooth", "compensate")
    return {s: (run_dir / s, read_manifest(run_dir / s)) for s in stages}


def test_a_disk_that_is_too_small_is_known_before_anything_is_written(
    text_folder, exported, tmp_path, monkeypatch
):
    job = Job(recipe(text_folder, export={"verify": False}), Interrupting("", 0))
    job.finished = finished(exported)
    needed = sum(p.stat().st_size for p in (exported / "export/model").rglob("*"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, needed // 2))
    with pytest.raises(EnvironmentProblem, match=r"needs 0\.00 GB, .* has 0\.00 GB left") as caught:
        export.export(job, tmp_path, "")
    assert caught.value.exit_code == 3 and not list(tmp_path.rglob("*.*safetensors*"))


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_a_damaged_shard_is_known_before_anything_is_written(
    text_folder, exported, tmp_path, damage
):
    folder = Path(shutil.copytree(text_folder, tmp_path / "model"))
    shard = folder / "part-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5]) if damage == "truncated" else shard.unlink()
    job = Job(recipe(folder, export={"verify": False}), Interrupting("", 0))
    job.finished = finished(exported)
    with pytest.raises(RecipeError, match="part-1"):
        export.export(job, tmp_path / "export", "")
    assert not (tmp_path / "export").exists()


def test_a_source_that_is_cut_while_it_is_copied_is_one_clear_error(text_folder, tmp_path):
    folder = Path(shutil.copytree(text_folder, tmp_path / "model"))
    checkpoint = open_checkpoint(folder, Qwen2ForCausalLM(Qwen2Config.from_pretrained(folder)))
    shard = folder / "part-0.safetensors"
    last = max((s for s in checkpoint.tensors.values() if s.file == shard), key=lambda s: s.start)
    assert sum(map(len, pieces(last))) == last.nbytes
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(RecipeError, match=f"{last.key} cannot be read: the file ends"):
        list(pieces(last))


def test_what_is_promised_of_a_site_is_what_its_packing_gives():
    model = tiny_families.model("llava")
    for options in ({}, {"group_size": 16, "symmetric": False}, {"weight_bits": 8}):
        scheme = tiny_quantized.scheme_of(model, **options)
        found = tiny_quantized.site_tensors(model, scheme)
        promised = {}
        for layer in find_sites(model):
            for site in layer.sites:
                promised |= export_shapes(site, scheme)
        assert {k: (t.dtype, tuple(t.shape)) for k, t in found.items()} == promised


@pytest.mark.parametrize(
    "name",
    ["qwen2_5_vl", "qwen3_vl", "qwen2_5_omni_thinker", "gemma3", "idefics3", "llama", "gemma2"],
)
def test_walking_an_export_layer_by_layer_gives_the_loaded_models_logits(
    name, tmp_path, monkeypatch
):
    model = tiny_families.model(name)
    folder = tiny_quantized.export(model, tiny_quantized.scheme_of(model), tmp_path)
    inputs = tiny_families.inputs(name)
    positions = {"x": verify._positions(inputs["attention_mask"], 3)[::3]}
    context = context_of(fresh.quantized_skeleton(folder, torch.device("cpu")).model)
    ids = {"x": modality_ids(inputs["input_ids"], context.token_ids, context.modalities)}
    monkeypatch.setattr(walk, "HEAD", 700)  # the head in several slices
    with torch.no_grad(), fresh.dispatch.force("reference"):
        whole = fresh._loaded(folder, "cpu", {"x": inputs}, positions)["x"]
        walked = fresh._walked(folder, "cpu", {"x": inputs}, ids, positions)["x"]
    assert whole.shape == (len(positions["x"]), model.config.get_text_config().vocab_size)
    assert float((walked - whole).norm() / whole.norm()) < 1e-5


def test_positions_are_real_tokens_seeded_and_few():
    mask = torch.ones(1, 300, dtype=torch.int64)
    mask[0, :100] = 0
    found = verify._positions(mask, 5)
    assert len(found) == verify.COMPARED == len(found.unique()) and int(found.min()) >= 100
    assert torch.equal(found, verify._positions(mask, 5))
    assert not torch.equal(found, verify._positions(mask, 6))
    assert torch.equal(verify._positions(mask[:, :103], 5), torch.tensor([100, 101, 102]))


def test_what_fits_is_loaded_as_a_whole(exported, monkeypatch):
    folder = exported / "export/model"
    assert verify.fits(folder, 10, None)
    files = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    assert not verify.fits(folder, 10, files)
    assert not verify.fits(folder, 10**7, None)  # the logits alone


def test_a_16_bit_model_is_verified_in_fp32(text_folder):
    job = Job(recipe(text_folder), Interrupting("", 0))
    wide = verify.in_fp32(job.float)
    assert job.float.dtype == torch.bfloat16 and wide.dtype == torch.float32
    layer = f"{layers_path(wide.model)}.1"
    with wide.materialised(layer):
        weight = wide.module(layer).mlp.up_proj.weight
        assert weight.dtype == torch.float32
        assert torch.equal(weight, job.float.weight(f"{layer}.mlp.up_proj"))
    assert {p.dtype for p in job.float.model.parameters()} == {torch.bfloat16}
    assert wide.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert not any(isinstance(m, nn.Linear) and not m.weight.is_meta for m in wide.model.modules())
