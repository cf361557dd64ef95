"""Transformers integration (being written)."""


def register() -> None:
    """Register with Transformers."""
