"""Which samples calibrate: quotas, and how far each source is read."""

import pytest
from jobs import small

from masquant_cli.models.skeleton import Skeleton, load_skeleton
from masquant_cli.progress import NullProgress
from masquant_cli.recipe import Recipe
from masquant_cli.stages import samples as stage


class Listening(NullProgress):
    def __init__(self):
        self.stages, self.units, self.tokens = [], 0, 0

    def stage(self, name, total, unit):
        self.stages.append((name, total, unit))

    def advance(self, n=1, tokens=0):
        self.units += n
        self.tokens += tokens


@pytest.fixture(scope="module")
def loaded() -> Skeleton:
    """The embedded model without its weights."""
    return load_skeleton(small().model)


@pytest.fixture
def reads(monkeypatch) -> dict[str, int]:
    """How many samples were taken from each source, by the last word of its name."""
    counts: dict[str, int] = {}
    honest = stage.load_samples

    def counting(source, **words):
        name = source.dataset.rpartition("-")[2]
        for sample in honest(source, **words):
            counts[name] = counts.get(name, 0) + 1
            yield sample

    monkeypatch.setattr(stage, "load_samples", counting)
    return counts


def only(recipe: Recipe, *names: str) -> Recipe:
    """The recipe with these sources alone, in this order."""
    by_name = {s.dataset.rpartition("-")[2]: s for s in recipe.calibration.sources}
    sources = tuple(by_name[name] for name in names)
    calibration = recipe.calibration.model_copy(update={"sources": sources})
    return recipe.model_copy(update={"calibration": calibration})


def test_a_source_is_read_no_further_than_its_quota(loaded, reads):
    """Text is never full here, so choosing goes on to the end of the text alone."""
    recipe = small("calibration.tokens={text: 20000, vision: 8, audio: 30}")
    progress = Listening()
    chosen = stage.choose_samples(only(recipe, "vision", "audio", "text"), loaded, progress)
    assert reads["vision"] == 2  # four tokens each
    assert reads["text"] == 10  # its limit
    assert 0 < reads["audio"] < 10
    assert chosen.tokens["vision"] == 8 and chosen.tokens["audio"] >= 30
    assert len(chosen.samples) == sum(reads.values())
    assert progress.stages == [("choose samples", None, "samples")]
    assert (progress.units, progress.tokens) == (len(chosen.samples), sum(chosen.lengths))


def test_a_source_of_two_media_is_read_until_both_are_full(loaded, reads):
    recipe = small("calibration.tokens={text: 1, vision: 8, audio: 100000}")
    chosen = stage.choose_samples(only(recipe, "vision", "sum", "text"), loaded, NullProgress())
    assert reads == {"vision": 1, "sum": 10, "text": 1}
    assert len(chosen.samples) == 12


def test_without_quotas_everything_is_read(loaded, reads):
    stage.choose_samples(small(), loaded, NullProgress())
    assert set(reads.values()) == {10} and len(reads) == 4
