"""Samples as one padded batch of model inputs.

`encode` renders the chat template, calls the model's processor and checks that every image,
audio and video really became placeholder tokens: media that a template or processor drops
silently is the oldest bug of calibration.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from masquant_cli.data.audio import SAMPLING_RATE, resample
from masquant_cli.data.chat import MEDIA
from masquant_cli.data.samples import Sample
from masquant_cli.errors import RecipeError


def encode(processor, samples: Sequence[Sample], *, for_generation: bool) -> dict[str, Tensor]:
    """Left-padded batch for `model(**batch)`: input_ids i64 [B, S], attention_mask i64 [B, S]
    and what the processor makes of the media (pixel_values, input_features, ...).

    With `for_generation` a last assistant message is left out and the template's generation
    prompt is added. Raises RecipeError when the processor cannot take the samples.
    """
    tokenizer = tokenizer_of(processor)
    media = {} if processor is tokenizer else _media(processor, samples)
    texts = [render(processor, sample, for_generation=for_generation) for sample in samples]
    kwargs: dict[str, Any] = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    bos = getattr(tokenizer, "bos_token", None)
    if bos and texts[0].startswith(bos):
        kwargs["add_special_tokens"] = False  # the template wrote it already
    try:
        batch = processor(text=texts, **kwargs, **media)
    except (ValueError, TypeError, IndexError, AttributeError, RuntimeError, KeyError) as error:
        raise RecipeError(
            f"the model's processor refused the samples ({type(error).__name__}: {error})",
            where=_span(samples),
            hint="text that contains a placeholder such as <|image_pad|> is a common cause",
        ) from error
    batch = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
    if processor is not tokenizer:
        _check_placeholders(processor, samples, batch)
    return batch


def encode_scored(processor, samples: Sequence[Sample]) -> tuple[dict[str, Tensor], Tensor]:
    """`encode` of whole chats, and bool [B, S]: the tokens that a score is taken over.

    These are the tokens of the last message if it is the assistant's, its end marker
    included; otherwise every text token that is neither special nor a placeholder.
    Raises RecipeError when an assistant message is followed by another one.
    """
    batch = encode(processor, samples, for_generation=False)
    tokenizer = tokenizer_of(processor)
    special = torch.tensor(sorted(special_ids(tokenizer) | set(placeholders(processor))))
    mask = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for row, sample in enumerate(samples):
        ids = batch["input_ids"][row]
        roles = [message["role"] for message in sample.messages]
        if roles[-1] == "assistant":
            count, skipped = _answer_span(processor, tokenizer, sample, ids.tolist())
            mask[row, len(ids) - count : len(ids) - skipped] = True
        elif "assistant" in roles:
            raise RecipeError(
                "the last message is not the assistant's, so it is unclear what to score",
                where=sample.where or None,
                hint="end the messages with the assistant, or leave the assistant out",
            )
        else:
            mask[row] = ~torch.isin(ids, special)
    return batch, mask & batch["attention_mask"].bool()


def with_answer(sample: Sample, answer: str) -> Sample:
    """The sample with `answer` as its last message, in place of an assistant's if there is one."""
    content = [{"type": "text", "text": answer}]
    messages = [*_prompt(sample.messages), {"role": "assistant", "content": content}]
    return replace(sample, messages=messages)


def render(processor, sample: Sample, *, for_generation: bool) -> str:
    """The chat template's text for one sample, one placeholder per image, audio or video."""
    messages = _prompt(sample.messages) if for_generation else sample.messages
    plain = processor is tokenizer_of(processor)  # a text model's template wants strings
    chat = [{"role": m["role"], "content": _content(m["content"], plain)} for m in messages]
    holder = processor if getattr(processor, "chat_template", None) else tokenizer_of(processor)
    if not getattr(holder, "chat_template", None):
        raise RecipeError(
            "the model has no chat template",
            hint="use an instruction-tuned model, or add chat_template.jinja to its folder",
        )
    try:
        return holder.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=for_generation
        )
    except Exception as error:  # jinja2 errors, and whatever a template's own code raises
        roles = ", ".join(m["role"] for m in messages)
        raise RecipeError(
            f"the model's chat template refused the messages ({type(error).__name__}: {error})",
            where=sample.where or None,
            hint=f"the roles were: {roles}; some templates take no system message",
        ) from error


def tokenizer_of(processor):
    """A processor's tokenizer; a text model's processor is the tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


def special_ids(tokenizer) -> set[int]:
    """Ids of all special tokens, the added ones (<|im_start|>) included."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}


def placeholders(processor) -> dict[int, str]:
    """Placeholder token id -> content type ("image", "audio", "video")."""
    tokenizer, found = tokenizer_of(processor), {}
    for kind in MEDIA:
        # The tokenizer's comes first: Gemma 3 calls the marker before an image `image_token`.
        for holder in (tokenizer, processor):
            token = getattr(holder, f"{kind}_token", None)
            token = getattr(token, "content", token)
            if isinstance(token, str):
                found.setdefault(tokenizer.convert_tokens_to_ids(token), kind)
                break
    return found


def model_inputs(model, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch on the model's device, float inputs in its dtype, unknown token types dropped."""
    known = inspect.signature(model.forward).parameters
    inputs, device = {}, model.device
    for name, tensor in batch.items():
        if name.endswith("token_type_ids") and name not in known:
            continue
        # Of a skeleton the first weights may be on meta: whoever runs it knows the device.
        inputs[name] = tensor if device.type == "meta" else tensor.to(device)
        if tensor.is_floating_point():
            inputs[name] = inputs[name].to(model.dtype)
    return inputs


def _prompt(messages: list[dict]) -> list[dict]:
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def _content(parts: list[dict], plain: bool) -> str | list[dict]:
    if plain and all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    # Templates look at the type alone; the media travel to the processor separately.
    return [part if part["type"] == "text" else {"type": part["type"]} for part in parts]


def _media(processor, samples: Sequence[Sample]) -> dict[str, Any]:
    """Keyword arguments that carry the media. Images nested per sample, audio flat."""
    kwargs: dict[str, Any] = {}
    images = [sample.media("image") for sample in samples]
    if any(images):
        _require(getattr(processor, "image_processor", None), "images", samples)
        kwargs["images"] = images
    videos = [sample.media("video") for sample in samples]
    if any(videos):
        _require(getattr(processor, "video_processor", None), "video", samples)
        kwargs["videos"] = [
            np.stack([np.asarray(frame) for frame in video]) for row in videos for video in row
        ]
    waves = [wave for sample in samples for wave in sample.media("audio")]
    if waves:
        extractor = getattr(processor, "audio_processor", None)
        extractor = extractor or getattr(processor, "feature_extractor", None)
        _require(extractor, "audio", samples)
        rate = getattr(extractor, "sampling_rate", None) or SAMPLING_RATE
        names = inspect.signature(type(processor).__call__).parameters
        if not {"audio", "audios"} & set(names):  # Voxtral's: only inside its own chat templates
            raise RecipeError(
                f"{type(processor).__name__} takes no audio beside the text",
                where=_span(samples),
                hint="audio cannot be calibrated with this processor yet; leave this source out",
            )
        name = "audios" if "audios" in names and "audio" not in names else "audio"
        kwargs[name] = [resample(wave, SAMPLING_RATE, rate) for wave in waves]
        kwargs["sampling_rate"] = rate
    return kwargs


def _require(part, what: str, samples: Sequence[Sample]) -> None:
    if part is None:
        raise RecipeError(
            f"the model's processor cannot take {what}",
            where=_span(samples),
            hint="remove this source, or use a model of that modality (video needs torchvision)",
        )


def _check_placeholders(processor, samples: Sequence[Sample], batch: Mapping[str, Tensor]) -> None:
    ids, kinds = batch["input_ids"], placeholders(processor)
    for kind in MEDIA:
        tokens = [token for token, its_kind in kinds.items() if its_kind == kind]
        counts = torch.isin(ids, torch.tensor(tokens, dtype=ids.dtype)).sum(1).tolist()
        for sample, count in zip(samples, counts, strict=True):
            wanted = len(sample.media(kind))
            if count < wanted:
                raise RecipeError(
                    f"{wanted} {kind} part(s) became {count} tokens: the model would not see them",
                    where=sample.where or None,
                    hint="the chat template ignores such content, or the media is too small",
                )
            if count and not wanted:
                raise RecipeError(
                    f"the text holds the model's {kind} placeholder but no {kind} comes with it",
                    where=sample.where or None,
                    hint="remove the placeholder from the text and add a content part instead",
                )


def _answer_span(processor, tokenizer, sample: Sample, ids: list[int]) -> tuple[int, int]:
    """(tokens from the answer's first to the end, tokens after its end marker)."""
    whole = render(processor, sample, for_generation=False)
    prompt = render(processor, sample, for_generation=True)
    shared = 0
    while shared < min(len(prompt), len(whole)) and prompt[shared] == whole[shared]:
        shared += 1
    tail = tokenizer(whole[shared:], add_special_tokens=False)["input_ids"]
    # A token may straddle the seam: count only what both tokenizations agree on.
    count = 0
    while count < min(len(tail), len(ids)) and tail[-1 - count] == ids[-1 - count]:
        count += 1
    special = special_ids(tokenizer)
    skipped = next((i for i in range(count) if ids[-1 - i] in special), 0)
    if count == skipped:
        raise RecipeError("the assistant's message is empty", where=sample.where or None)
    return count, skipped


def _span(samples: Sequence[Sample]) -> str | None:
    first, last = samples[0].where, samples[-1].where
    return first if len(samples) == 1 or not first else f"{first} to {last.rsplit(', ', 1)[-1]}"
