"""A model that answers NaN has no score; every judge of a model asks this first."""

import torch
from torch import Tensor

from masquant_cli.errors import CheckError


def finite_or_fail(logits: Tensor, what: str) -> None:
    """Raise CheckError unless every logit is a number; -inf is a legal way to forbid a token."""
    if bool(torch.isnan(logits).any() | (logits == torch.inf).any()):
        raise CheckError(
            "the model's logits hold NaN or infinity",
            where=what,
            hint="the weights or scales are broken: calibrate again, or try model.dtype=float32",
        )
