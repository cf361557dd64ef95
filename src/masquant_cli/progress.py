"""How long work tells its caller how far it is. The library never prints.

`cli/console.py` draws it; anything else with these four methods will do.
"""

from collections.abc import Sequence
from typing import Protocol


class Progress(Protocol):
    def stage(self, name: str, total: int | None, unit: str) -> None:
        """A piece of work begins (and the one before it is over): `total` units, if known."""

    def advance(self, n: int = 1, tokens: int = 0) -> None:
        """`n` more units are done, and `tokens` more tokens went through the model."""

    def note(self, text: str) -> None:
        """One line worth reading while it runs."""

    def warn(self, text: str) -> None:
        """One line that must be seen, even under --quiet."""


class NullProgress:
    """Says nothing."""

    def stage(self, name: str, total: int | None, unit: str) -> None: ...

    def advance(self, n: int = 1, tokens: int = 0) -> None: ...

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...


def layer_ranges(indices: Sequence[int]) -> str:
    """[1, 2, 3, 7] as "layers 1-3, 7"."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    said = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"layer{'s' if len(indices) > 1 else ''} {said}"
