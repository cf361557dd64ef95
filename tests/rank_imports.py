"""What a run of the embedded model imports sooner or later; its processes are forked with it."""

import datasets  # noqa: F401
import torch._dynamo  # noqa: F401
from transformers import (  # noqa: F401
    AutoProcessor,
    Qwen2_5OmniThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)

from masquant_cli.stages import calibrate, compensate, export, smooth  # noqa: F401
