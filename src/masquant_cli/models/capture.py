"""Walking a decoder layer by layer over kept hidden states, seeing each site's input once.

The model runs in full only up to its first decoder layer; from there every layer is run on the
hidden states of the one before, exactly as the full forward would.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from masquant_cli.errors import RecipeError
from masquant_cli.models.sites import Site

DROPPED = ("past_key_values", "past_key_value", "use_cache", "cache_position")


@dataclass
class Batch:
    """What the next decoder layer gets: hidden [B, T, H], its other arguments, and who is who."""

    hidden: torch.Tensor
    arguments: dict[str, Any]
    ids: torch.Tensor  # [B, T] modality of each token
    real: torch.Tensor  # [B, T] bool, False for padding


class _Stop(Exception):
    """Raised by the hook to end the forward pass at the first decoder layer."""


@torch.no_grad()
def first_layer_inputs(
    model: nn.Module, first_layer: nn.Module, inputs: dict[str, torch.Tensor], ids: torch.Tensor
) -> Batch:
    """Embed one batch (towers included) and return what the first decoder layer would see."""
    caught: dict[str, Any] = {}

    def catch(_module, args, kwargs):
        caught["hidden"] = args[0] if args else kwargs["hidden_states"]
        caught["arguments"] = {
            k: v for k, v in kwargs.items() if k not in (*DROPPED, "hidden_states")
        }
        raise _Stop

    handle = first_layer.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        model(**inputs, use_cache=False)
    except _Stop:
        pass
    finally:
        handle.remove()
    if not caught:
        raise RecipeError(
            "the forward pass never reached the first decoder layer",
            hint="this model family may be laid out differently than masquant expects",
        )
    return Batch(caught["hidden"], caught["arguments"], ids, inputs["attention_mask"].bool())


@torch.no_grad()
def run_layer(layer: nn.Module, batch: Batch) -> None:
    """Advance `batch.hidden` through `layer`, in place of the full forward."""
    out = layer(batch.hidden, **batch.arguments)
    batch.hidden = out[0] if isinstance(out, tuple) else out


@contextlib.contextmanager
def watch_sites(
    model: nn.Module, sites: Sequence[Site], see: Callable[[Site, torch.Tensor], None]
) -> Iterator[None]:
    """Call `see(site, x)` with the input of each site's first linear while the block runs."""
    handles = []
    for site in sites:

        def hook(_module, args, site=site):
            see(site, args[0])

        handles.append(model.get_submodule(site.linears[0]).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
