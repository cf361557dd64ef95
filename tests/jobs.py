"""A seconds-long job on the embedded model, for tests that need a whole run."""

from masquant_cli import recipe_yaml
from masquant_cli.recipe import Recipe

SMALL = (
    *(f"calibration.sources.{i}.limit=10" for i in range(4)),
    "calibration.rows=48",
    "calibration.min_tokens=1",
    "smoothing.epochs=1",
    "smoothing.batch_rows=32",
)


def small(*overrides: str, base: str = "tiny-omni-w4a8") -> Recipe:
    return recipe_yaml.load(base, [*SMALL, *overrides])


class Interrupting:
    """Progress that raises KeyboardInterrupt at the n-th unit of one stage."""

    def __init__(self, stage: str, after: int):
        self.wanted, self.after, self.current, self.done = stage, after, None, 0

    def stage(self, name, total, unit):
        self.current, self.done = name, 0

    def advance(self, n=1, tokens=0):
        self.done += n
        if self.current == self.wanted and self.done >= self.after and n:
            raise KeyboardInterrupt

    def note(self, text): ...

    def warn(self, text): ...
