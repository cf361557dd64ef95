"""Which modality a token belongs to: its id against the placeholder ids of the config.

Pure functions on tensors. How ids travel to the quantized layers of a running model is
`masquant_cli.runtime.context`.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from masquant_cli.errors import RecipeError
from masquant_cli.models.families import family_of

# modality -> what configs call its placeholder token, and the part that may hold its id instead
_PLACES = {
    "vision": ("image", "vision_config"),
    "video": ("video", "vision_config"),
    "audio": ("audio", "audio_config"),
}


def token_ids_of(config) -> dict[str, list[int]]:
    """Placeholder token ids by modality, as the config states them: {"vision": [151655], ...}.

    Keys are the family's ("vision", "video", "audio"); a text-only family gives {}.
    """
    family = family_of(config)
    if family.subconfig:
        config = getattr(config, family.subconfig, config)
    found: dict[str, list[int]] = {}
    for modality in family.modalities:
        word, tower = _PLACES[modality]
        values = (
            getattr(place, f"{word}_token_{ending}", None)
            for place in (config, getattr(config, tower, None))
            for ending in ("id", "index")
        )
        token = next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)
        if token is not None:
            found[modality] = [token]
    return found


def merge_video(token_ids: Mapping[str, Sequence[int]], modalities: Sequence[str]) -> dict:
    """`token_ids` with one entry per non-base modality in use; video joins vision unless listed.

    {"vision": [5], "video": [6], "audio": [7]} under (text, vision, audio) becomes
    {"vision": [5, 6], "audio": [7]}. Modalities not in use are dropped: their tokens are
    treated as the base modality.
    """
    merged: dict[str, list[int]] = {}
    for modality, tokens in token_ids.items():
        name = "vision" if modality == "video" and "video" not in modalities else modality
        if name in modalities[1:]:
            merged.setdefault(name, []).extend(tokens)
    return {m: sorted(merged[m]) for m in modalities if m in merged}


def modality_ids(input_ids: Tensor, token_ids, modalities: Sequence[str]) -> Tensor:
    """Index into `modalities` for every token; 0 (the base) for all that is not a placeholder.

    input_ids: int [...]. token_ids: {modality: [ids]}, or a model config to read them from.
    Returns int64 of the same shape on the same device.
    """
    if not isinstance(token_ids, Mapping):
        token_ids = token_ids_of(token_ids)
    ids = torch.zeros_like(input_ids, dtype=torch.int64)
    for modality, tokens in merge_video(token_ids, modalities).items():
        index = list(modalities).index(modality)
        for token in tokens:
            ids.masked_fill_(input_ids == token, index)
    return ids


def check_modalities(config, modalities: Sequence[str], *, where: str | None = None) -> None:
    """Raise RecipeError when a recipe names a modality whose tokens the model does not have."""
    if modalities[0] != "text":
        raise RecipeError(
            f"the base modality is {modalities[0]!r}; only text is supported as the base",
            where=where,
            hint="list text first under `modalities`",
        )
    known = token_ids_of(config)
    for modality in modalities[1:]:
        if modality not in known:
            raise RecipeError(
                f"model type {config.model_type!r} has no {modality} tokens",
                where=where,
                hint=f"its modalities are: text{''.join(', ' + m for m in known)}",
            )
