"""Processors of models that also take video, where torchvision is not installed."""

import importlib.util
import json

import pytest
import tiny_chat
import torch
from PIL import Image

from masquant_cli.data.inputs import encode
from masquant_cli.data.samples import Sample
from masquant_cli.errors import RecipeError
from masquant_cli.models import loading
from masquant_cli.models.without_video import load_without_video

TAKE_VIDEO = ("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor", "Glm4vProcessor")
WITHOUT = importlib.util.find_spec("torchvision") is None


def folder_of(tmp_path, processor_class: str):
    """As Qwen's folders are: no processor_config.json, the class named beside the pictures."""
    made = tiny_chat.processor()
    sound, picture = made.feature_extractor.to_dict(), made.image_processor.to_dict()
    named = {"processor_class": processor_class, "image_processor_type": "Qwen2VLImageProcessor"}
    content = json.dumps({**sound, **picture, **named})
    (tmp_path / "preprocessor_config.json").write_text(content)
    made.tokenizer.save_pretrained(tmp_path)
    return tmp_path


def asked(*parts: dict) -> Sample:
    content = [*parts, {"type": "text", "text": "what?"}]
    return Sample([{"role": "user", "content": content}], {}, "x", where="row 0")


PICTURE = {"type": "image", "image": Image.new("RGB", (56, 28), "red")}


@pytest.mark.parametrize("name", (*TAKE_VIDEO, "Qwen2_5OmniProcessor"))
def test_pictures_become_the_tokens_and_pixels_of_the_whole_processor(tmp_path, name):
    found = load_without_video(folder_of(tmp_path, name))
    got = encode(found, [asked(PICTURE), asked()], for_generation=False)
    wanted = encode(tiny_chat.processor(), [asked(PICTURE), asked()], for_generation=False)
    for key in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw"):
        assert torch.equal(got[key], wanted[key]), key
    assert int((got["input_ids"] == found.image_token_id).sum()) == 2  # 56x28 at 28x28 a token


@pytest.mark.skipif(not WITHOUT, reason="torchvision is installed")
def test_load_processor_falls_back_and_refuses_video_by_name(tmp_path):
    found = loading.load_processor(folder_of(tmp_path, "Qwen2_5_VLProcessor"))
    assert type(found).__name__ == "Qwen2_5_VLProcessor" and found.video_processor is None
    film = {"type": "video", "video": [PICTURE["image"]] * 2}
    with pytest.raises(RecipeError, match="cannot take video"):
        encode(found, [asked(film)], for_generation=False)


def test_a_folder_whose_processor_takes_no_video_is_not_ours(tmp_path):
    assert load_without_video(folder_of(tmp_path, "LlavaProcessor")) is None
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert load_without_video(tmp_path) is None
