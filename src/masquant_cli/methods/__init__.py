"""Methods: one file each, one line in `recipe.Method`. They choose smoothing; nothing else.

A method sees one decoder layer at a time and returns scales; quantizers, sites, corrections,
packing and export are the same for all.
"""

import importlib

from masquant_cli.methods.method import Method


def find(name: str) -> Method:
    """The method of a recipe: `METHOD` in the file of its name."""
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}").METHOD
