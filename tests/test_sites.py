"""Families, sites, modality ids and names, on tiny models of the real classes."""

import types

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from torch import nn

from masquant_cli.errors import RecipeError
from masquant_cli.models.families import FAMILIES, family_of
from masquant_cli.models.modality import (
    check_modalities,
    merge_video,
    modality_ids,
    token_ids_of,
)
from masquant_cli.models.names import disk_names, new_disk_names
from masquant_cli.models.sites import find_sites

MODELS = {
    "qwen2_5_omni_thinker": tiny_models.omni_thinker,
    "qwen2_5_vl": tiny_models.qwen2_5_vl,
    "qwen2_vl": tiny_models.qwen2_vl,
    "qwen2": tiny_models.qwen2,
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


def test_every_decoder_linear_is_in_exactly_one_site(model):
    layers = find_sites(model)
    assert [layer.layer for layer in layers] == [0, 1]
    names = [name for layer in layers for site in layer.sites for name in site.linears]
    decoder = model.get_submodule(layers[0].module.rpartition(".")[0])
    inside = {
        f"{layers[0].module.rpartition('.')[0]}.{name}"
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear)
    }
    assert len(names) == len(set(names)) == 14
    assert set(names) == inside
    site = layers[1]["mlp_in"]
    assert site.module == f"{layers[1].module}.mlp.mlp_in"
    assert (site.in_features, site.out_features) == (96, (200, 200))
    assert [s.kind for s in layers[1].sites] == ["attn_in", "attn_out", "mlp_in", "mlp_out"]
    assert layers[0]["attn_in"].out_features == (96, 48, 48)


def test_a_meta_skeleton_gives_the_same_sites(model):
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    assert find_sites(skeleton) == find_sites(model)


def test_every_row_of_the_table_names_a_real_class():
    import transformers

    for family in FAMILIES.values():
        assert hasattr(transformers, family.model_class)


def test_unsupported_families_are_named():
    config = types.SimpleNamespace(
        model_type="mllama", architectures=["MllamaForConditionalGeneration"]
    )
    with pytest.raises(RecipeError, match=r"'mllama' .*MllamaForCond.* not supported") as caught:
        family_of(config)
    assert "qwen2_5_vl" in caught.value.hint


def test_a_site_that_is_not_linears_of_one_width_is_refused():
    model = tiny_models.qwen2()
    model.model.layers[1].self_attn.k_proj = nn.Linear(95, 48)
    with pytest.raises(RecipeError, match=r"share one input.*\[95, 96\]"):
        find_sites(model)
    model.model.layers[1].self_attn.k_proj = nn.Identity()
    with pytest.raises(RecipeError, match="found Identity") as caught:
        find_sites(model)
    assert caught.value.where == "model.layers.1"
    del model.model.layers[1].self_attn.k_proj
    with pytest.raises(RecipeError, match="k_proj"):
        find_sites(model)


def test_token_ids_come_from_the_config():
    assert token_ids_of(tiny_models.omni_thinker().config) == {
        "vision": [tiny_models.IMAGE],
        "video": [tiny_models.VIDEO],
        "audio": [tiny_models.AUDIO],
    }
    assert token_ids_of(tiny_models.qwen2().config) == {}


def test_video_is_vision_unless_it_is_separate():
    tokens = {"vision": [5], "video": [6], "audio": [7]}
    assert merge_video(tokens, ("text", "vision", "audio")) == {"vision": [5, 6], "audio": [7]}
    assert merge_video(tokens, ("text", "audio", "video")) == {"audio": [7], "video": [6]}
    ids = torch.tensor([[4, 5, 6, 7, 5]])
    assert modality_ids(ids, tokens, ("text", "vision", "audio")).tolist() == [[0, 1, 1, 2, 1]]
    separate = ("text", "audio", "vision", "video")
    assert modality_ids(ids, tokens, separate).tolist() == [[0, 2, 3, 1, 2]]
    assert modality_ids(ids, tokens, ("text",)).tolist() == [[0, 0, 0, 0, 0]]


def test_modality_ids_read_a_config_and_leave_padding_and_markers_to_the_base():
    inputs = tiny_models.omni_inputs()
    config = tiny_models.omni_thinker().config
    ids = modality_ids(inputs["input_ids"], config, ("text", "vision", "audio"))
    assert ids.dtype == torch.int64
    assert ids[1].tolist() == [0] * 9 + [1] * 4 + [0] * 5 + [2] * 10 + [0] * 5


def test_a_modality_that_the_model_lacks_is_refused():
    config = tiny_models.qwen2_vl().config
    check_modalities(config, ("text", "vision"))
    with pytest.raises(RecipeError, match="no audio tokens") as caught:
        check_modalities(config, ("text", "audio"))
    assert "vision" in caught.value.hint
    with pytest.raises(RecipeError, match="base"):
        check_modalities(config, ("vision", "text"))


def test_disk_names_cover_the_whole_state_dict(model, tmp_path):
    model.save_pretrained(tmp_path)
    disk = load_file(tmp_path / "model.safetensors")
    names = disk_names(model, disk)
    assert set(names) == set(model.state_dict())
    assert sorted(names.values()) == sorted(disk)
    for key, value in model.state_dict().items():
        assert torch.equal(disk[names[key]], value), key


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [("qwen2_5_omni_thinker", ""), ("qwen2_5_omni_thinker", "thinker."), ("qwen2_5_vl", "")],
)
def test_names_of_published_checkpoints(kind, prefix):
    """The layout of the files on the hub, whatever the module tree is called in this release."""
    model = MODELS[kind]()
    linear = find_sites(model)[1]["attn_in"].linears[0]
    disk = f"{prefix}model.layers.1.self_attn.q_proj.weight"
    names = disk_names(model, [disk, f"{prefix}lm_head.weight", "talker.model.norm.weight"])
    assert names[f"{linear}.weight"] == disk
    assert names["lm_head.weight"] == f"{prefix}lm_head.weight"
    assert len(names) == 2
    block = linear.rpartition(".")[0]
    new = new_disk_names([f"{linear}.weight_packed", f"{block}.attn_in.smooth_inv"], names)
    assert list(new.values()) == [
        f"{prefix}model.layers.1.self_attn.q_proj.weight_packed",
        f"{prefix}model.layers.1.self_attn.attn_in.smooth_inv",
    ]
    with pytest.raises(RecipeError, match="no name on disk"):
        new_disk_names(["elsewhere.smooth_inv"], names)
