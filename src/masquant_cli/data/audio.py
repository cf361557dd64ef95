"""Audio columns as mono float32 waveforms, decoded by soundfile and resampled by soxr."""

import io
import re
from typing import Any

import numpy as np

from masquant_cli.data.media import file_of, read_bytes
from masquant_cli.errors import EnvironmentProblem, RecipeError

SAMPLING_RATE = 16_000  # every Sample holds audio at this rate


def decode_audio(value: Any, base: str | None, where: str) -> np.ndarray:
    """A column's value (bytes, path, {bytes, path} or {array, sampling_rate}) at 16 kHz.

    Returns float32 `[samples]`, channels averaged. Raises RecipeError when it cannot be decoded.
    """
    if isinstance(value, dict) and value.get("array") is not None:
        wave, rate = np.asarray(value["array"], dtype=np.float32), int(value["sampling_rate"])
    else:
        wave, rate = _decode(read_bytes(value, base, where, "audio"), where, file_of(value))
    if wave.ndim == 2:  # soundfile: [samples, channels]
        wave = wave.mean(axis=1)
    if wave.size == 0 or not np.isfinite(wave).all():
        problem = "has no samples" if wave.size == 0 else "holds NaN or infinity"
        raise RecipeError(f"the audio {problem}", where=where, hint="remove this row")
    return resample(wave, rate, SAMPLING_RATE)


def resample(wave: np.ndarray, rate: int, target: int) -> np.ndarray:
    """`wave` f32 `[samples]` from `rate` to `target` Hz, f32."""
    if rate == target:
        return np.ascontiguousarray(wave, dtype=np.float32)
    try:
        import soxr
    except ImportError as error:
        raise _missing("soxr") from error
    return soxr.resample(wave, rate, target).astype(np.float32, copy=False)


def _decode(data: bytes, where: str, name: str) -> tuple[np.ndarray, int]:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: libsndfile itself is missing
        raise _missing("soundfile") from error
    try:
        wave, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, TypeError, ValueError) as error:
        reason = re.sub("^Error opening <.*?>: ", "", str(error).strip().rstrip("."))
        raise RecipeError(
            f"the audio{name} cannot be decoded ({reason})",
            where=where,
            hint="wav, flac, ogg and mp3 can be read; convert or remove this row",
        ) from error
    return wave, rate


def _missing(package: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"reading audio needs the package {package!r}", hint=f"pip install {package}"
    )
