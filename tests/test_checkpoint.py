"""The float checkpoint by its headers, and the model without its weights."""

import json
from pathlib import Path

import pytest
import tiny_chat
import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_families_run import shard

from masquant_cli.errors import RecipeError
from masquant_cli.models import loading
from masquant_cli.models.checkpoint import INDEX, open_checkpoint
from masquant_cli.models.sites import find_sites
from masquant_cli.models.skeleton import Skeleton, load_skeleton
from masquant_cli.recipe import Model

KINDS = ("omni_thinker", "qwen2_5_vl", "qwen2_vl", "qwen2")


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    getattr(tiny_models, request.param)().save_pretrained(folder, max_shard_size="200KB")
    return folder


@pytest.fixture(autouse=True)
def no_processor(monkeypatch):
    monkeypatch.setattr(loading, "load_processor", lambda _: None)


def skeleton_of(folder: Path, dtype: str = "float32") -> Skeleton:
    return load_skeleton(Model(path=str(folder), dtype=dtype), "cpu")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A plain decoder in three shards."""
    tiny_models.qwen2().save_pretrained(tmp_path / "model")
    shard(tmp_path / "model", 3)
    return tmp_path / "model"


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_materialised_it_is_the_loaded_model_bit_for_bit(saved, dtype):
    found = skeleton_of(saved, dtype)
    expected = type(found.model).from_pretrained(saved, dtype=getattr(torch, dtype))
    assert list(found.model.state_dict()) == list(expected.state_dict())
    assert all(p.is_meta for p in found.model.parameters())
    buffers = dict(expected.named_buffers())
    assert buffers and buffers.keys() == dict(found.model.named_buffers()).keys()
    for name, buffer in found.model.named_buffers():
        assert buffer.dtype == buffers[name].dtype and torch.equal(buffer, buffers[name]), name
    with found.materialised(""):
        for name, parameter in expected.named_parameters(remove_duplicate=False):
            mine = found.model.get_parameter(name)
            assert mine.dtype == parameter.dtype and torch.equal(mine, parameter), name
    assert all(p.is_meta for p in found.model.parameters())
    assert not found.model.training and found.dtype == getattr(torch, dtype)


def test_parts_are_brought_in_and_given_back(saved):
    found = skeleton_of(saved)
    first, second = (layer.module for layer in find_sites(found.model))
    with found.materialised(second):
        real = {n for n, p in found.model.named_parameters() if not p.is_meta}
        assert real == set(found.names(second)) and real
        with found.materialised(second, first):
            assert not any(p.is_meta for p in found.module(first).parameters())
        assert all(p.is_meta for p in found.module(first).parameters())
        assert not any(p.is_meta for p in found.module(second).parameters())
    assert all(p.is_meta for p in found.model.parameters())
    assert found.nbytes(second) == 4 * sum(p.numel() for p in found.module(second).parameters())
    linear = f"{second}.mlp.down_proj"
    expected = load_all(saved)[found.checkpoint.stored[f"{linear}.weight"].key]
    assert torch.equal(found.weight(linear), expected) and found.weight(linear).shape == (96, 200)


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for f in files(folder) for k, t in load_file(f).items()}


def test_a_full_omni_checkpoint(tmp_path):
    thinker = tiny_chat.omni()
    thinker.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    outer = {"model_type": "qwen2_5_omni", "thinker_config": config}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    shard(tmp_path, 2, prefix="thinker.", extra={"talker.model.norm.weight": torch.ones(4)})
    found = skeleton_of(tmp_path)
    assert type(found.model) is type(thinker)
    with found.materialised(""):
        for name, parameter in thinker.named_parameters():
            assert torch.equal(found.model.get_parameter(name), parameter), name


def tied(folder: Path) -> transformers.PreTrainedModel:
    text = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**text, **heads))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("stored", ["embedding", "head", "both", "both, different"])
def test_tied_weights_however_they_are_stored(tmp_path, stored):
    model = tied(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    if stored != "embedding":
        tensors["lm_head.weight"] = embedding.clone()
    if stored == "head":
        del tensors["model.embed_tokens.weight"]
    if stored == "both, different":
        tensors["lm_head.weight"][5, 7] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    found = skeleton_of(tmp_path)
    with found.materialised(""):
        head, words = found.model.lm_head.weight, found.model.model.embed_tokens.weight
        assert torch.equal(words, model.lm_head.weight)
        assert (head is words) == (stored != "both, different")
        assert torch.equal(head, tensors.get("lm_head.weight", embedding))
    together = found.nbytes("lm_head", "model.embed_tokens")
    assert together == 4 * 96 * 48 * (1 + (stored == "both, different"))
    with found.materialised("model.embed_tokens"):  # alone, as the first step needs it
        assert found.model.lm_head.weight.is_meta


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32),
     (torch.float32, torch.bfloat16), (torch.float32, None)],
)  # fmt: skip
def test_reading_casts_piece_by_piece(tmp_path, monkeypatch, stored, wanted):
    from masquant_cli.models import checkpoint

    monkeypatch.setattr(checkpoint, "CHUNK", 52)  # pieces of 13 or 26, none divides the tensor
    model = tiny_models.qwen2().to(stored)
    model.save_pretrained(tmp_path)
    found = open_checkpoint(tmp_path, model)
    for name, parameter in model.named_parameters():
        x = found.read(name, wanted)
        assert x.dtype == (wanted or stored) and torch.equal(x, parameter.to(wanted or stored))


def refused(folder: Path, *said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        skeleton_of(folder)
    text = f"{caught.value} {caught.value.where}"
    assert all(part in text for part in said), text
    assert caught.value.hint and "\n" not in text


def test_a_shard_that_is_missing_and_an_index_that_names_what_is_not_there(folder):
    index = json.loads((folder / INDEX).read_text())
    gone = files(folder)[1]
    content = gone.read_bytes()
    gone.unlink()
    refused(folder, gone.name, "missing", "index")
    gone.write_bytes(content)
    index["weight_map"]["model.ghost.weight"] = files(folder)[0].name
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, "model.ghost.weight", files(folder)[0].name)
    (folder / INDEX).write_text("{")
    refused(folder, "index", "cannot be read")
    (folder / INDEX).unlink()
    refused(folder, "index", "is missing")


@pytest.mark.parametrize("cut", [1, 5000, "header", "all"])
def test_a_truncated_shard(folder, cut):
    file = files(folder)[2]
    content = file.read_bytes()
    size = {"header": 60, "all": 0}.get(cut, len(content) - cut if isinstance(cut, int) else 0)
    file.write_bytes(content[:size])
    refused(folder, file.name, "truncated")


def test_a_file_that_is_no_safetensors_file_and_one_of_another_format(folder, tmp_path):
    files(folder)[0].write_bytes(b"\xff" * 4096)
    refused(folder, files(folder)[0].name)
    files(folder)[0].write_bytes((40).to_bytes(8, "little") + b"[1, 2" + b" " * 100)
    refused(folder, files(folder)[0].name)
    other = tmp_path / "bin"
    other.mkdir()
    (other / "config.json").write_text((folder / "config.json").read_text())
    refused(other, "model.safetensors is missing")
    (other / "pytorch_model.bin").write_bytes(b"")
    refused(other, ".bin")


def test_a_tensor_in_two_files_or_in_none_or_of_another_shape(folder):
    first, second, _ = files(folder)
    kept = load_file(first), load_file(second)
    name = next(iter(kept[0]))
    save_file({**kept[1], name: kept[0][name]}, second)
    refused(folder, name, first.name, second.name, "two files")
    save_file(kept[1], second)
    save_file({k: t for k, t in kept[0].items() if k != name}, first)
    refused(folder, name)  # the index says it is there
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][name]
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, "lacks 1 tensors", name)
    save_file({**kept[0], name: torch.ones(3)}, first)
    refused(folder, name, "[3]")
    save_file({**kept[0], name: kept[0][name].to(torch.int8)}, first)
    refused(folder, "already quantized")
    save_file({**kept[0], name: kept[0][name].to(torch.float8_e4m3fn)}, first)
    refused(folder, "F8_E4M3", "already quantized")


@pytest.mark.parametrize("ending", ["qweight", "weight_packed"])
def test_packed_weights_are_no_missing_shard(tmp_path, ending):
    """AutoGPTQ's folders say nothing of it in config.json."""
    tiny_models.qwen2().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    linear = "model.layers.0.mlp.down_proj"
    tensors[f"{linear}.{ending}"] = tensors.pop(f"{linear}.weight").to(torch.int32)
    save_file(tensors, file)
    refused(tmp_path, "already quantized", f"{linear}.{ending}")


def test_weights_that_are_no_numbers(folder):
    file = next(f for f in files(folder) if "model.norm.weight" in load_file(f))
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, file)
    found = skeleton_of(folder)  # headers do not say
    with pytest.raises(RecipeError, match=r"norm.*NaN"), found.materialised("model.norm"):
        pass
    assert found.module("model.norm").weight.is_meta
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, file)
    with pytest.raises(RecipeError, match="overflows float16"):
        skeleton_of(folder, "float16").checkpoint.read("model.norm.weight", torch.float16)
