"""Which implementation runs an op: the fastest one here that covers the case.

A backend is a module with `OPS = {op name: function}`. A function is called as
`function(out, *arguments)`: `out` holds the op's output tensors, uninitialised. It fills and
returns them (or returns new ones), or returns NotImplemented when it does not cover the case;
then the next backend is asked. The reference covers everything.
"""

import contextlib
import functools
import importlib
import os

import torch

# For each kind of device, best first. Modules are imported when first needed.
BACKENDS = {
    "cpu": ("cpu", "onednn", "reference"),
    "cuda": ("hopper", "triton", "reference"),
}
_MODULES = {
    "cpu": "masquant_kernels.cpu",
    "onednn": "masquant_kernels.onednn",
    "hopper": "masquant_kernels.gpu.hopper",
    "triton": "masquant_kernels.gpu",
    "reference": "masquant_kernels.reference",
}
VARIABLE = "MASQUANT_BACKEND"  # for debugging: ask one backend first; results do not change

_forced: str | None = os.environ.get(VARIABLE) or None


def call(name: str, rule, args: tuple, kwargs: dict):
    """Run op `name`. `rule` checks the arguments and makes the empty outputs."""
    out = rule(*args, **kwargs)
    given = args[0]
    if given.shape[0] == 0:
        return out
    for function in functions(name, given.device.type, _forced):
        result = function(out, *args, **kwargs)
        if result is not NotImplemented:
            return result
    raise AssertionError(f"the reference did not cover {name}")


@functools.cache
def functions(name: str, device: str, forced: str | None) -> tuple:
    """Implementations of an op to ask in turn, best first."""
    order = BACKENDS.get(device, ("reference",))
    if forced is not None:
        if forced not in _MODULES:
            raise ValueError(f"{VARIABLE} is one of {', '.join(_MODULES)}, not {forced!r}")
        order = (forced, "reference")
    return tuple(f for backend in order if (f := _load(backend).get(name)) is not None)


@functools.cache
def _load(backend: str) -> dict:
    """{op: function} of a backend; {} when it cannot be used on this machine."""
    try:
        module = importlib.import_module(_MODULES[backend])
    except ImportError:
        return {}
    return module.OPS


@contextlib.contextmanager
def force(backend: str | None):
    """Ask `backend` first, inside the block. For tests and benchmarks."""
    global _forced
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def backend_of(name: str, device: torch.device | str) -> str:
    """The backend that is asked first for an op on a device; for reports."""
    first = functions(name, torch.device(device).type, _forced)[0]
    return next(key for key, module in _MODULES.items() if first.__module__.startswith(module))


def describe(device: torch.device | str) -> str:
    """What multiplies 4-bit weights on a device, for people: "C, avx2", "onednn", "hopper"."""
    backend = backend_of("gemm_w4a8", device)
    if backend != "cpu":
        return backend
    return f"C, {importlib.import_module(_MODULES['cpu']).ISA}"
