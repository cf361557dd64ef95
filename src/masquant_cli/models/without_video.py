"""Processors of models that also take video, on machines without torchvision.

Transformers' video processors need torchvision, and the processors of Qwen-VL and others insist
on one even where no sample holds a video. Here they are put together without it.
"""

import inspect
import json
from pathlib import Path
from typing import Any

from transformers import AutoFeatureExtractor, AutoTokenizer, ProcessorMixin

# Older releases (5.17) offer it at the top only where torchvision is.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.processing_auto import processor_class_from_name

from masquant_cli.models.omni_processor import MasquantOmniProcessor

PARTS = {
    "image_processor": AutoImageProcessor,
    "feature_extractor": AutoFeatureExtractor,
    "tokenizer": AutoTokenizer,
}
# Where a folder may name its processor's class, in the order in which AutoProcessor looks.
NAMED_IN = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
)
# Its text is expanded by code that asks the video processor even when there is no video.
INSTEAD = {"Qwen2_5OmniProcessor": MasquantOmniProcessor}


class WithoutVideo(ProcessorMixin):
    """Goes before a processor class, whose `video_processor` may then be None."""

    # Older releases' (5.17) Omni processors call this, and their own asks the video processor.
    replace_multimodal_special_tokens = MasquantOmniProcessor.replace_multimodal_special_tokens

    def check_argument_for_proper_class(self, argument_name, argument):
        if argument_name == "video_processor" and argument is None:
            return None
        return super().check_argument_for_proper_class(argument_name, argument)

    @property
    def model_input_names(self):
        parts = (getattr(self, name, None) for name in PARTS)
        names = [name for part in parts if part is not None for name in part.model_input_names]
        return list(dict.fromkeys([*names, "mm_token_type_ids"]))


def load_without_video(folder: Path) -> Any | None:
    """The folder's processor for text, pictures and sound; None where its class takes no video.

    Raises what Transformers raises for a folder whose other parts cannot be loaded.
    """
    found = processor_class_from_name(_class_name(folder) or "")
    if found is None:
        return None
    found = INSTEAD.get(found.__name__, found)
    accepted = inspect.signature(found.__init__).parameters
    if "video_processor" in accepted:
        found = type(found.__name__, (WithoutVideo, found), {})
    elif not issubclass(found, MasquantOmniProcessor):
        return None
    settings, _ = found.get_processor_dict(folder)
    given = {k: v for k, v in settings.items() if k in accepted and not k.endswith("processor")}
    for name, loader in PARTS.items():
        if name in accepted:
            given[name] = loader.from_pretrained(folder)
    given.setdefault("chat_template", getattr(given.get("tokenizer"), "chat_template", None))
    if "video_processor" in accepted:
        given["video_processor"] = None
    return found(**given)


def _class_name(folder: Path) -> str | None:
    for name in NAMED_IN:
        try:
            said = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(said, dict) and isinstance(said.get("processor_class"), str):
            return said["processor_class"]
    return None
