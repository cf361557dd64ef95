"""A model of one Hopper block, to run hopper_kernels.py on a CPU as it is written.

The kernel's source is executed with this module in place of Gluon. Producer and consumers take
turns at random. Everything asynchronous is as late, and destroys as much, as hardware may: a TMA
load overwrites its buffer with garbage when it is issued and delivers when it likes; a wgmma
reads its operands when it is waited for; a TMA store reads shared memory when it is waited for.
So a slot that is given back too early, or read too early, makes wrong numbers, and a wrong phase
a deadlock. Layouts and registers are not modelled: test_offline_compile.py reads machine code.
"""

import builtins
import random
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import torch

GARBAGE = 0x55


class Deadlock(AssertionError):
    pass


class Turns:
    """Threads of which one runs at a time; at each step chance picks the next that can."""

    def __init__(self, seed: int):
        self.chance = random.Random(seed)
        self.ready = {}  # thread -> function: can it go on?
        self.in_flight = []  # TMA loads
        self.turn, self.error = None, None
        self.changed = threading.Condition()

    def run(self, parts) -> None:
        threads = [threading.Thread(target=self._run, args=part, daemon=True) for part in parts]
        self.ready = {t: lambda: True for t in threads}
        for t in threads:
            t.start()
        with self.changed:
            self._pass_on()
        for t in threads:
            t.join(60)
        if self.error:
            raise self.error
        assert not any(t.is_alive() for t in threads) and not self.in_flight

    def step(self, ready=lambda: True) -> None:
        """Let others run; come back once `ready`."""
        with self.changed:
            me = threading.current_thread()
            self.ready[me] = ready
            self._pass_on()
            self._await(me)

    def _run(self, function, arguments) -> None:
        me = threading.current_thread()
        try:
            with self.changed:
                self._await(me)
            function(*arguments)
        except BaseException as e:
            self.error = self.error or e
        with self.changed:
            del self.ready[me]
            self._pass_on()

    def _await(self, me) -> None:
        while self.turn is not me and self.error is None:
            self.changed.wait()
        if self.error is not None:
            raise SystemExit  # another part failed: end quietly, its error is the one to show

    def _pass_on(self) -> None:
        if self.in_flight and self.chance.random() < 0.3:
            self._deliver()
        while self.ready and not (able := [t for t, ready in self.ready.items() if ready()]):
            if not self.in_flight:
                self.error = self.error or Deadlock("all parts wait")
                break
            self._deliver()
        else:
            self.turn = self.chance.choice(able) if self.ready else None
        self.changed.notify_all()

    def _deliver(self) -> None:
        self.in_flight.pop(self.chance.randrange(len(self.in_flight)))()


class Shared:
    """A buffer in shared memory, or a part of one."""

    def __init__(self, data: torch.Tensor):
        self.data = data

    def index(self, i: int):
        assert 0 <= i < len(self.data), i
        part = self.data[i]
        return part if isinstance(part, Barrier) else Shared(part)

    def permute(self, order):
        return Shared(self.data.permute(order))

    def load(self, layout):
        return self.data.clone()

    def store(self, value):
        assert value.dtype == self.data.dtype and value.shape == self.data.shape
        self.data.copy_(value)


class Barrier:
    """An mbarrier: a phase ends when `count` arrived and all announced bytes came."""

    def init(self, count):
        self.count = self.missing = count
        self.bytes, self.phase = 0, 0

    def arrive(self, announced=0):
        assert self.missing > 0, "more arrivals than the barrier counts"
        self.missing -= 1
        self.add(announced)

    def add(self, announced):
        self.bytes += announced
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.count

    def done(self, parity):
        return self.phase % 2 != parity


class Described:
    """A TMA descriptor."""

    def __init__(self, d):
        self.base, self.block, self.layout = d.base, d.block_shape, d.layout
        self.dtype = d.base.dtype

    def inside(self, at):
        """What of the block at `at` lies inside the tensor: slices of the tensor, of the block."""
        first = [max(a, 0) for a in at]
        last = [min(a + b, s) for a, b, s in zip(at, self.block, self.base.shape, strict=True)]
        if any(f >= e for f, e in zip(first, last, strict=True)):
            return None
        outer = tuple(slice(f, e) for f, e in zip(first, last, strict=True))
        inner = tuple(slice(f - a, e - a) for f, e, a in zip(first, last, at, strict=True))
        return outer, inner


class Pointer:
    def __init__(self, base, at=0):
        assert base.is_contiguous(), "an address knows no strides"
        self.base, self.at = base.view(-1), at
        self.dtype = SimpleNamespace(element_ty=base.dtype)

    def __add__(self, offset):
        return Pointer(self.base, self.at + offset)


class Block:
    """The names that hopper_kernels.py imports, for one block of the grid."""

    def __init__(self, index: int, blocks: int, seed: int):
        self.turns = Turns(seed)
        self.products, self.stores = [], []
        self.gl = SimpleNamespace(
            constexpr=lambda v: v, static_range=range, int8=torch.int8, int32=torch.int32,
            int64=torch.int64, float32=torch.float32, bfloat16=torch.bfloat16,
            program_id=lambda axis: index, num_programs=lambda axis: blocks,
            cdiv=lambda a, b: -(-a // b), minimum=min, load=_load, store=_store,
            arange=lambda a, b, layout: torch.arange(a, b), max=lambda x, axis: x.amax(axis),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            expand_dims=torch.unsqueeze, convert_layout=lambda x, layout: x,
            inline_asm_elementwise=_assembly, allocate_shared_memory=_allocate,
            warp_specialize=lambda parts, warps, registers: self.turns.run(parts),
            shared_memory_descriptor=SimpleNamespace(
                reinterpret=lambda b, dtype, shape, layout: Shared(b.data.view(dtype).view(shape))
            ),
            **dict.fromkeys(
                ("BlockedLayout", "SliceLayout", "NVMMADistributedLayout", "DotOperandLayout"),
                lambda *_: None,
            ),
        )  # fmt: skip
        self.gluon = SimpleNamespace(jit=lambda f=None, **_: f or (lambda g: g))
        self.mbarrier = SimpleNamespace(
            MBarrierLayout=lambda: None, init=lambda b, count: b.init(count),
            wait=self._wait, expect=self._expect, arrive=self._arrive,
        )  # fmt: skip
        self.tma = SimpleNamespace(
            async_load=self._tma_load, async_store=self._tma_store, store_wait=self._store_wait
        )
        self.fence_async_shared = lambda: None
        self.warpgroup_mma_init = lambda acc: acc
        self.language = self.gl

    def _wait(self, barrier, parity):
        self.turns.step(lambda: barrier.done(parity))

    def _expect(self, barrier, announced):
        barrier.arrive(announced)
        self.turns.step()

    def _arrive(self, barrier, count, pred):
        assert count == 1
        if pred:
            barrier.arrive()
        self.turns.step()

    def _tma_load(self, source, at, barrier, target):
        assert target.data.shape == torch.Size(source.block) and target.data.dtype == source.dtype
        target.data.view(torch.uint8).fill_(GARBAGE)

        def deliver():
            target.data.zero_()
            if found := source.inside(at):
                target.data[found[1]] = source.base[found[0]]
            barrier.add(-target.data.numel() * target.data.element_size())

        self.turns.in_flight.append(deliver)
        self.turns.step()

    def _tma_store(self, target, at, source):
        def deliver():
            if found := target.inside(at):
                target.base[found[0]] = source.data[found[1]]

        self.stores.append(deliver)
        self.turns.step()

    def _store_wait(self, pendings):
        while len(self.stores) > pendings:
            self.stores.pop(0)()

    def warpgroup_mma(self, a, b, acc, is_async=False):
        def product():
            left, right = (x.data if isinstance(x, Shared) else x for x in (a, b))
            acc.add_((left.double() @ right.double()).to(acc.dtype))

        self.products.append(product)
        self.turns.step()
        return acc if is_async else self.warpgroup_mma_wait(0, (acc,))

    def warpgroup_mma_wait(self, num_outstanding, deps):
        while len(self.products) > num_outstanding:
            self.products.pop(0)()
        return deps[0]


def _load(pointer, mask, other):
    at, mask = torch.broadcast_tensors(pointer.at, mask)
    found = pointer.base[torch.where(mask, at, 0)]
    return torch.where(mask, found, torch.tensor(other, dtype=found.dtype))


def _store(pointer, value, mask):
    at, mask, value = torch.broadcast_tensors(pointer.at, mask, value)
    pointer.base[at[mask]] = value[mask]


def _allocate(dtype, shape, layout):
    if dtype == torch.int64:
        return Shared([Barrier() for _ in range(shape[0])])
    size = torch.Size(shape).numel() * dtype.itemsize
    return Shared(torch.full((size,), GARBAGE, dtype=torch.uint8).view(dtype).view(shape))


def _assembly(code, constraints, arguments, dtype, is_pure, pack):
    """PTX of the kernels' two unpackers, on four bytes at a time."""
    (given,) = arguments
    registers = {"$1": given.contiguous().view(torch.int32).long() & 0xFFFFFFFF}
    for op, to, a, b in re.findall(r"(\w+)\.b32 (\S+), (\S+), (\w+);", code):
        b = int(b, 0)
        value = {"shl": lambda x, b: x << b, "and": lambda x, b: x & b}[op](registers[a], b)
        registers[to] = value & 0xFFFFFFFF
    return registers["$0"].to(torch.int32).view(dtype).view(given.shape)


class Kernel:
    """`kernel[grid](*arguments)`, as Triton launches, for a function of a Gluon source file."""

    def __init__(self, path: Path, name: str, seed: int, mutate=lambda source: source):
        self.code = compile(mutate(path.read_text(encoding="utf-8")), str(path), "exec")
        self.name, self.seed = name, seed

    def __getitem__(self, grid):
        def launch(*arguments, num_warps, **options):
            for index in range(grid[0]):
                kernel = self._of(Block(index, grid[0], self.seed + index))
                kernel(*map(_argument, arguments), **options)

        return launch

    def _of(self, block: Block):
        names = {"__builtins__": vars(builtins) | {"__import__": lambda *_: block}}
        exec(self.code, names)
        return names[self.name]


def _argument(given):
    if hasattr(given, "block_shape"):
        return Described(given)
    return Pointer(given) if isinstance(given, torch.Tensor) else given
