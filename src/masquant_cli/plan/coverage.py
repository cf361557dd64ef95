"""How many tokens of each modality calibration will see.

Local samples are chosen as calibrate chooses them, for as long as that is quick; a hub data set is
never fetched for a plan, its tokens are what the recipe asks for.
"""

import math
import time
from dataclasses import dataclass, replace

from masquant_cli.data.sources import count_rows, local_files
from masquant_cli.errors import RecipeError
from masquant_cli.plan.subject import Subject
from masquant_cli.progress import NullProgress
from masquant_cli.stages.samples import _fills, choose_samples, groups, refuse_or_warn

PATIENCE = 6.0  # seconds for choosing samples
ROWS = 128  # of a source that asks for no number of rows or tokens and was not counted
MEDIA_SHARE = 0.75  # of a sample's tokens that are its media's
SAMPLE_TOKENS = 512  # of a sample that nobody looked at


@dataclass(frozen=True)
class Coverage:
    """Tokens by modality, how they are known (chosen | estimated | unknown), the padded batches
    [samples, length], and how long choosing took, which encodes every sample once."""

    tokens: dict[str, int]
    known: str
    samples: int
    batches: tuple[tuple[int, int], ...]
    skipped_long: int = 0
    choosing: float = 0.0

    @property
    def padded(self) -> int:
        return sum(n * length for n, length in self.batches)


class _Enough(Exception):
    pass


class _Watch(NullProgress):
    """Raises when choosing takes too long; counts what was chosen until then."""

    def __init__(self):
        self.began, self.samples, self.tokens = time.perf_counter(), 0, 0

    def advance(self, n: int = 1, tokens: int = 0) -> None:
        self.samples += n
        self.tokens += tokens
        if time.perf_counter() - self.began > PATIENCE:
            raise _Enough


def cover(subject: Subject) -> Coverage:
    """Raises RecipeError when a modality of the recipe gets no tokens."""
    recipe, skeleton = subject.job.recipe, subject.job.float
    local = all(_is_local(source) for source in recipe.calibration.sources)
    if not local or skeleton.processor is None:
        return _assumed(subject, "unknown", SAMPLE_TOKENS)
    watch = _Watch()
    try:
        chosen = choose_samples(recipe, skeleton, watch)
    except _Enough:
        each = watch.tokens / max(1, watch.samples)
        found = _assumed(subject, "estimated", each)
        return replace(found, choosing=PATIENCE * found.samples / max(1, watch.samples))
    choosing = time.perf_counter() - watch.began
    formed = groups(recipe, chosen)
    batches = tuple((len(g), max(chosen.lengths[i] for i in g)) for g in formed)
    return Coverage(
        dict(chosen.tokens), "chosen", len(chosen.samples), batches, chosen.skipped_long,
        choosing,
    )  # fmt: skip


def _is_local(source) -> bool:
    try:
        return bool(local_files(source))
    except RecipeError:
        return False


def _assumed(subject: Subject, known: str, per_sample: float) -> Coverage:
    """Tokens of all rows, as many as the recipe's quotas and limits allow. Samples with media count
    for these alone, and have a word to three of their tokens."""
    recipe = subject.job.recipe
    calibration, names = recipe.calibration, recipe.modalities
    base = names[0]
    length = max(8, min(int(per_sample), calibration.max_length))
    tokens = dict.fromkeys(names, 0)
    for source in calibration.sources:
        filled = _fills(source, names)
        each = length * (1.0 if filled == [base] else MEDIA_SHARE / len(filled))
        rows = count_rows(source) if known == "estimated" else source.limit
        if rows is None:  # as many as it takes
            asked = max(calibration.tokens.get(name, 0) for name in filled)
            rows = math.ceil(asked / each) or ROWS
        for name in filled:
            tokens[name] += max(1, int(rows * each))
    tokens = {m: min(n, calibration.tokens.get(m, n)) for m, n in tokens.items()}
    tokens[base] += int(sum(tokens[m] for m in names[1:]) * (1 - MEDIA_SHARE) / MEDIA_SHARE)
    refuse_or_warn(recipe, tokens, 0, NullProgress())  # what no source's messages use has none
    samples = max(1, round(sum(tokens.values()) / length))
    each = max(1, calibration.batch_tokens // length)
    batches = [(each, length)] * (samples // each)
    batches += [(samples % each, length)] if samples % each else []
    return Coverage(tokens, known, samples, tuple(batches))
