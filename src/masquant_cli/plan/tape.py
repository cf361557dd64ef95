"""What the code would do, without doing it: the real functions run on meta tensors, every tensor
operation and the memory alive at its time are written down.

So a plan cannot drift from the code it plans. Start at `record`.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALL = (torch.ops.aten.all.default, torch.ops.aten.all.dim)


@dataclass(frozen=True)
class Shape:
    """A tensor as far as its cost goes."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return torch.Size(self.size).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Call:
    """One operation with its arguments, tensors as their shapes; equal ones count together."""

    op: Any  # a torch.ops overload
    arguments: tuple  # (positional, sorted keyword items)

    @property
    def tensors(self) -> list[Shape]:
        return [leaf for leaf in tree_leaves(self.arguments) if isinstance(leaf, Shape)]


@dataclass
class Tape:
    """How often each operation is done, and the most bytes of new tensors alive at once."""

    calls: Counter[Call] = field(default_factory=Counter)
    peak: int = 0

    def plus(self, other: "Tape", times: float = 1) -> "Tape":
        """Both, the other one `times` over: their memory is not needed at once."""
        calls = Counter(self.calls)
        for call, count in other.calls.items():
            calls[call] += count * times
        return Tape(Counter({c: n for c, n in calls.items() if n > 0}), max(self.peak, other.peak))


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.tape = Tape()
        self.alive = 0
        self.known = weakref.WeakKeyDictionary()
        self.agreed = weakref.WeakKeyDictionary()  # what all() gave; other booleans are false
        self.scalars: list[float] = []  # what the next numbers read from a tensor are, else 1
        self.answers: dict[Call, Shape | tuple[Shape, ...]] = {}  # meta kernels are slow

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = _Found()
        call = Call(func, (found.shapes(args), tuple((k, found.shapes(kwargs[k])) for k in kwargs)))
        if not (found.meta or self._makes_meta(kwargs)):
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return self._scalar(args[0])
        if func is torch.ops.aten.equal.default:
            return False
        self.tape.calls[call] += 1
        known = self.answers.get(call)
        if known is not None:
            out = tuple(map(_empty, known)) if isinstance(known, tuple) else _empty(known)
        else:
            out = func(*args, **kwargs)
            if not any(r.alias_info for r in func._schema.returns):
                fresh = _Found()
                shapes = fresh.shapes(out)
                if fresh.meta and not fresh.other:
                    self.answers[call] = shapes
        for leaf in out if isinstance(out, tuple | list) else (out,):
            if isinstance(leaf, torch.Tensor) and leaf.is_meta:
                self._remember(leaf)
                if func in ALL:
                    self.agreed[leaf.untyped_storage()] = True
        return out

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operation imports the compiler, which takes seconds

    @staticmethod
    def _makes_meta(kwargs) -> bool:
        device = kwargs.get("device")
        return device is not None and torch.device(device).type == "meta"

    def _scalar(self, tensor: torch.Tensor):
        """Comparisons of data have no answer here: equal numbers, checks that pass."""
        if tensor.dtype == torch.bool:
            return tensor.untyped_storage() in self.agreed
        value = self.scalars.pop(0) if self.scalars else 1.0
        return value if tensor.is_floating_point() else 0

    def _remember(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self.known:
            return
        size = storage.nbytes()
        self.known[storage] = size
        self.alive += size
        self.tape.peak = max(self.tape.peak, self.alive)
        weakref.finalize(storage, self._free, size)

    def use(self, nbytes: int) -> None:
        """Memory that is needed now and that no tensor here shows."""
        self.tape.peak = max(self.tape.peak, self.alive + nbytes)

    def _free(self, size: int) -> None:
        self.alive -= size


@contextlib.contextmanager
def record() -> Iterator[_Recorder]:
    """While open, operations on meta tensors are written to `.tape` of what is yielded."""
    recorder = _Recorder()
    with recorder:
        yield recorder


class _Found:
    """Arguments with shapes in the place of tensors, and what kinds of leaves they had."""

    def __init__(self):
        self.meta = self.other = False

    def shapes(self, value):
        if isinstance(value, torch.Tensor):
            self.meta |= value.is_meta
            return Shape(tuple(value.shape), value.stride(), value.dtype)
        if isinstance(value, list | tuple):
            return tuple(map(self.shapes, value))
        self.other = True
        if isinstance(value, float):  # a step's rate, say: it costs what any other does
            return 1.0
        return None if isinstance(value, torch.Generator) else value


def _empty(shape: Shape) -> torch.Tensor:
    return torch.empty_strided(shape.size, shape.stride, dtype=shape.dtype, device="meta")
