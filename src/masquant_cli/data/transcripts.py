"""Transcripts as word error rates compare them."""

import functools
from collections.abc import Callable

from masquant_cli.data.text import normalise
from masquant_cli.errors import EnvironmentProblem


def normaliser(name: str) -> Callable[[str], str]:
    """`plain` is `data.text.normalise`; `whisper` is Whisper's for English: numbers as digits,
    British spellings, contractions and fillers made one. Raises EnvironmentProblem."""
    return normalise if name == "plain" else _whisper()


@functools.cache
def _whisper() -> Callable[[str], str]:
    try:
        from whisper_normalizer.english import EnglishTextNormalizer
    except ImportError as error:
        raise EnvironmentProblem(
            "normalising English transcripts needs the package 'whisper-normalizer'",
            hint='pip install "masquant[eval]", or set `normaliser: plain` for other numbers',
        ) from error
    return EnglishTextNormalizer()
