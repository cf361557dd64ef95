"""How long work tells its caller how far it is. The library never prints.

`cli/console.py` draws it; anything else with these four methods will do.
"""

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
