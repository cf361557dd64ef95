"""A Qwen2.5-Omni processor for text, pictures and sound that needs no torchvision.

Transformers' Qwen2_5OmniProcessor insists on a video processor, whose only implementation is
torchvision's. Folders saved with OmniProcessor name this class in processor_config.json; call
register() before AutoProcessor.from_pretrained reads such a folder.
"""

import re

from transformers import AutoProcessor, Qwen2_5OmniProcessor, Qwen2_5OmniThinkerConfig
from transformers.models.auto.processing_auto import processor_class_from_name

SPECIAL_TOKENS = ("image", "audio", "video")
BOUNDARY_TOKENS = ("vision_bos", "vision_eos", "audio_bos", "audio_eos")


class MasquantOmniProcessor(Qwen2_5OmniProcessor):
    """Qwen2_5OmniProcessor without its video_processor; everything else is inherited."""

    def __init__(
        self, image_processor=None, feature_extractor=None, tokenizer=None, chat_template=None
    ):
        # The parent passes video_processor positionally, so its own __init__ is skipped.
        super(Qwen2_5OmniProcessor, self).__init__(
            image_processor, feature_extractor, tokenizer, chat_template=chat_template
        )
        for kind in SPECIAL_TOKENS:
            setattr(self, f"{kind}_token", getattr(self.tokenizer, f"{kind}_token"))
            setattr(self, f"{kind}_token_id", getattr(self.tokenizer, f"{kind}_token_id"))
        for kind in BOUNDARY_TOKENS:
            setattr(self, f"{kind}_token", getattr(self.tokenizer, f"{kind}_token"))

    def replace_multimodal_special_tokens(self, text, audio_lengths, image_grid_thw, *_, **__):
        """Each placeholder in `text` repeated for every token of its picture or sound.

        Older releases (5.17) call this, and their own asks the video processor for its merge
        size even when there is no video; newer ones have a method per medium instead.
        """
        merged = self.image_processor.merge_size**2
        counts = {
            self.image_token: (int(grid.prod()) // merged for grid in image_grid_thw),
            self.audio_token: (int(length) for length in audio_lengths),
        }

        def repeated(found: re.Match) -> str:
            if (count := next(counts[found[0]], None)) is None:
                raise ValueError(f"the text has more {found[0]} than there are media")
            return found[0] * count

        pattern = "|".join(map(re.escape, counts))
        return [re.sub(pattern, repeated, sample) for sample in text]

    @property
    def model_input_names(self):
        names = (
            self.tokenizer.model_input_names
            + self.feature_extractor.model_input_names
            + self.image_processor.model_input_names
        )
        return list(dict.fromkeys([*names, "feature_attention_mask"]))


class _Key(Qwen2_5OmniThinkerConfig):
    """Some releases ignore registrations for a config class of their own; this one is ours."""


def register() -> None:
    """Make AutoProcessor resolve folders saved with MasquantOmniProcessor; safe to repeat."""
    for key in (Qwen2_5OmniThinkerConfig, _Key):
        if processor_class_from_name(MasquantOmniProcessor.__name__) is None:
            AutoProcessor.register(key, MasquantOmniProcessor, exist_ok=True)


# Importing this file may be what imports Transformers, whose import then asks for register()
# before it is defined; registering here covers that order.
register()
