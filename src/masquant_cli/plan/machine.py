"""What work costs on a machine: this one, measured in a few seconds, or one known by its numbers.

`Here` times the work itself. `Elsewhere` divides by peak rates: a prediction without measurement.
"""

import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from masquant_cli import shards
from masquant_cli.models.checkpoint import Checkpoint
from masquant_cli.models.checkpoint import read as read_tensor
from masquant_cli.plan.rates import CUBIC, PRODUCTS, QR, Bench, name_of
from masquant_cli.plan.tape import Call, Tape

PROBE = 32 << 20  # bytes that are written and read to see how fast that is


def disk_near(folder: Path) -> tuple[Path, int]:
    """Where `folder` is or will be, the nearest that is there already; and the bytes free there."""
    near = next(p for p in (folder, *folder.resolve().parents) if p.is_dir())
    return near, shutil.disk_usage(near).free


@dataclass
class Here:
    """This machine. `folder`: where the run will write; nothing is left there. `processes` share
    the work; each has the threads that torch has now."""

    device: torch.device
    folder: Path
    checkpoint: Checkpoint
    processes: int = 1
    bench: Bench = field(init=False)
    writing: float = field(init=False)  # seconds per byte, of a stage's shard
    loading: float = field(init=False)  # with its hash
    reading: float = field(init=False)  # of a float weight, as fp32

    def __post_init__(self):
        self.bench = Bench(self.device)
        self.writing, self.loading = self._shard()
        self.reading = self._weight()

    def seconds(self, tape: Tape) -> float:
        return self.bench.seconds(tape)

    def _shard(self) -> tuple[float, float]:
        near, _ = disk_near(self.folder)
        try:
            scratch = tempfile.mkdtemp(prefix=".masquant-plan-", dir=near)
        except OSError:  # the run will say so
            scratch = tempfile.mkdtemp()
        try:
            path = Path(scratch) / "probe.safetensors"
            tensors = {"probe": torch.ones(PROBE // 4)}
            began = time.perf_counter()
            shards.save(path, tensors, fingerprint="", notes={})
            written = time.perf_counter()
            from masquant_cli.rundir import file_sha256

            shards.load(path, sha256=file_sha256(path))
            loaded = time.perf_counter()
            file_sha256(path)
            hashed = time.perf_counter() - loaded
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return (written - began) / PROBE, (loaded - written - hashed) / PROBE

    def _weight(self) -> float:
        """Of the largest tensor that is not larger than the probe; a plan reads no other."""
        found = [s for s in self.checkpoint.tensors.values() if s.nbytes <= PROBE]
        if not found or not found[0].file.exists():
            return self.loading
        stored = max(found, key=lambda s: s.nbytes)
        began = time.perf_counter()
        read_tensor(stored, torch.float32)
        return (time.perf_counter() - began) / max(1, stored.nbytes)


@dataclass(frozen=True)
class Card:
    """An accelerator by its numbers: peak FLOPS by dtype, memory bytes/s and bytes."""

    name: str
    flops: dict[torch.dtype, float]
    bandwidth: float
    memory: int
    share: float = 0.6  # of the peak that large products reach
    launch: float = 6e-6
    factor: float = 4e11  # FLOPS of eigen-decompositions and QR, which reach little


CARDS = {
    "h200": Card(
        "NVIDIA H200",
        {torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 67e12, torch.float64: 67e12},
        4.8e12,
        141 * 10**9,
    ),
    "h100": Card(
        "NVIDIA H100 SXM",
        {torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 67e12, torch.float64: 67e12},
        3.35e12,
        80 * 10**9,
    ),
    "a100": Card(
        "NVIDIA A100 80 GB",
        {torch.bfloat16: 312e12, torch.float16: 312e12, torch.float32: 19.5e12,
         torch.float64: 19.5e12},
        2.0e12,
        80 * 10**9,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Elsewhere:
    """`processes` cards of one kind in one machine, with an NVMe disk and a plain CPU."""

    card: Card
    processes: int = 1
    reading: float = 1 / 2e9
    writing: float = 1 / 1e9
    loading: float = 1 / 1.2e9

    @property
    def memory(self) -> int:
        return self.card.memory

    def seconds(self, tape: Tape) -> float:
        return sum(n * self._call(call) for call, n in tape.calls.items())

    def _call(self, call: Call) -> float:
        card, tensors, name = self.card, call.tensors, name_of(call)
        if not tensors:
            return card.launch
        if name == "gptq_round":
            out, width = tensors[0].size
            steps = 12 * width * card.launch
            return steps + (2 * out * width**2 + width**3) / (card.flops[torch.float64] * 0.5)
        moved = sum(t.nbytes for t in tensors) / (card.bandwidth * 0.7)
        work, rate = 0.0, card.flops.get(tensors[0].dtype, 67e12) * card.share
        if name in PRODUCTS and len(tensors) >= 2:
            a, b = tensors[-2], tensors[-1]
            work = 2 * a.numel * (b.size[-1] if len(b.size) > 1 else 1)
        elif "attention" in name:
            b, heads, tokens, width = tensors[0].size
            work = 4 * b * heads * tokens**2 * width
        elif name in CUBIC:
            work, rate = 10 * tensors[0].numel * tensors[0].size[-1], card.factor
        elif name in QR:
            work, rate = 4 * tensors[0].numel * min(tensors[0].size[-2:]), card.factor
        return max(card.launch, moved, work / rate)


def elsewhere(text: str) -> Elsewhere:
    """`h200`, `h200x8`. Raises KeyError for a card that is not in the table, ValueError for what
    is no number of them."""
    name, times, count = text.lower().partition("x")
    card, number = CARDS[name], int(count) if times else 1
    if number < 1:
        raise ValueError(f"{number} cards")
    return Elsewhere(card, number)
