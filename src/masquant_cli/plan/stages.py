"""Seconds, memory and disk of each stage, from the tapes of its work and the rates of a machine.

What is written to disk is exact where tokens are known; what a run measures is in its manifests.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from masquant_cli.models.sites import layers_path
from masquant_cli.plan import work
from masquant_cli.plan.coverage import Coverage
from masquant_cli.plan.machine import Elsewhere, Here
from masquant_cli.plan.subject import Subject, carried, size
from masquant_cli.plan.tape import Tape, record
from masquant_cli.plan.work import META, Kind
from masquant_cli.stages.memory import SPARE, embedding_bytes
from masquant_cli.stages.verify import COMPARED
from masquant_cli.stages.walk import held_before_layers, tower_blocks

TOWER = 4  # positions in a tower for each token that it gives
STARTING = 7.0  # seconds until a fresh process answers
KEPT = 100 << 20  # bytes that allocators and libraries hold on to, measured
AGAIN = 4  # layers' weights that a method holds which runs layers again: smoothed, rounded
LAYER_CALL = 2e-4  # seconds of Python per layer and batch


@dataclass(frozen=True)
class Prediction:
    """One stage. Bytes of RAM are those of one process at its peak, on a CPU all of it; those of
    disk are all processes'."""

    seconds: float
    ram: int
    vram: int
    disk: int

    def plain(self) -> dict:
        return {
            "seconds": round(self.seconds, 1),
            "peak_bytes": self.ram,
            "peak_gpu_bytes": self.vram,
            "disk_bytes": self.disk,
        }


@dataclass
class Planner:
    """One recipe on one machine. `base` is what a process holds before any work, `limit` what one
    may use."""

    subject: Subject
    coverage: Coverage
    machine: Here | Elsewhere
    base: int
    limit: int
    gpu: bool

    def __post_init__(self):
        job = self.job = self.subject.job
        self.kinds = work.kinds(job.layers)
        self.written = {k.layer.layer: self._statistics(k) for k in self.kinds}

    def stage(self, name: str) -> Prediction:
        return getattr(self, name)()

    def calibrate(self) -> Prediction:
        job, cover, machine = self.job, self.coverage, self.machine
        itemsize = job.float.dtype.itemsize
        samples, length = max(cover.batches, key=lambda b: b[0] * b[1])
        batches = cover.padded / (samples * length)
        mix = {m: int(n * samples * length / max(1, sum(cover.tokens.values())))
               for m, n in cover.tokens.items()}  # fmt: skip
        outside, read = self._outside()
        seconds = self.subject.seconds + 1.8 * cover.choosing
        tower = self._tower()
        seconds += read * machine.reading + machine.seconds(tower) / machine.processes
        peak = outside + tower.peak
        disk = 0
        for kind in self.kinds:
            run = work.forward(job, kind.layer, samples, length)
            seen = work.gathered(job, kind.layer, mix)
            each = machine.seconds(run) + machine.seconds(seen) + LAYER_CALL
            weights = job.float.nbytes(kind.layer.module)
            written = self.written[kind.layer.layer]
            step = weights * machine.reading + each * batches / machine.processes
            seconds += kind.count * (step + written * machine.writing)
            disk += kind.count * written
            peak = max(peak, weights + 2 * written + max(run.peak, seen.peak))
        hidden, others = self._entering()
        room = int((1 - SPARE) * self.limit) - self.base - (0 if self.gpu else peak)
        mine = (hidden + others) // machine.processes  # every process has its batches
        spills = mine > max(0, room)
        # On disk, what enters a layer stays until all that enters the next one is there.
        spilled = 2 * hidden + others if spills else 0
        # Then one batch is in memory, as it enters the layer and as it leaves.
        one = 2 * samples * length * job.float.config.get_text_config().hidden_size * itemsize
        kept = one if spills else mine
        return self._prediction(seconds, peak, disk, also=kept, spilled=spilled)

    def _entering(self) -> tuple[int, int]:
        """Bytes of all hidden states that enter a layer, and of what else layers are given: rotary
        embeddings, and a mask [B, 1, T, T] of booleans for samples that are padded together."""
        text, itemsize = self.job.float.config.get_text_config(), self.job.float.dtype.itemsize
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        kinds = len(set(getattr(text, "layer_types", None) or ("all alike",)))
        masks = sum(n * length**2 for n, length in self.coverage.batches if n > 1)
        others = kinds * (masks + 2 * self.coverage.padded * head * itemsize)
        return self.coverage.padded * text.hidden_size * itemsize, others

    def _outside(self) -> tuple[int, int]:
        """Bytes of towers and embeddings that are in memory together, and that are read: all once,
        or part by part for every batch where there is no room for them at once."""
        skeleton = self.job.float
        whole = skeleton.nbytes(*skeleton.names_outside_layers())
        if self.gpu or embedding_bytes(self.job) <= (1 - SPARE) * self.limit - self.base:
            return whole, whole
        blocks = tower_blocks(skeleton)
        parts = [skeleton.nbytes(block) for block in blocks]
        held = held_before_layers(skeleton, blocks)
        rest = skeleton.nbytes(*held) if held else 0
        batches = -(-len(self.coverage.batches) // self.machine.processes)
        return rest + max(parts, default=0), rest + sum(parts) * batches

    def smooth(self) -> Prediction:
        job, machine = self.job, self.machine
        seconds, peak, disk = 0.0, 0, 0
        for kind in self.kinds:
            tape = work.solved(job, kind.layer, self.coverage.tokens)
            each = machine.seconds(tape) + self._read(kind, machine.loading)
            scales = 4 * len(job.recipe.modalities) * sum(s.in_features for s in kind.layer.sites)
            seconds += kind.count * (each / machine.processes + scales * machine.writing)
            disk += kind.count * scales
            peak = max(peak, tape.peak)
        if work.looks_at_layers(job):
            seconds += self._layers_again()
            layers = [job.float.nbytes(kind.layer.module) for kind in self.kinds]
            peak = max(peak, AGAIN * max(layers))
        return self._prediction(seconds, peak, disk)

    def compensate(self) -> Prediction:
        job, machine = self.job, self.machine
        seconds, peak, disk = 0.0, 0, 0
        for kind in self.kinds:
            tape, written = work.compensated(job, kind.layer, self.coverage.tokens)
            each = machine.seconds(tape) + written * machine.writing
            if written:
                each += self._read(kind, machine.loading)
            seconds += kind.count * each / machine.processes
            disk += kind.count * written
            peak = max(peak, tape.peak + written)
        return self._prediction(seconds, peak, disk)

    def export(self) -> Prediction:
        job, machine, sizes = self.job, self.machine, size(self.subject)
        seconds, peak = 0.0, 0
        for kind in self.kinds:
            tape = work.packed(job, kind.layer)
            weights = self._weights(kind)
            seconds += kind.count * (machine.seconds(tape) + weights * machine.reading)
            peak = max(peak, tape.peak)
        seconds += (sizes["files"] + carried(self.subject)) * machine.writing
        if job.recipe.export.verify:
            seconds += STARTING + (sizes["source"] + sizes["total"]) * machine.reading
            probes, each = len(job.recipe.modalities), self.coverage.padded // self.coverage.samples
            logits = probes * COMPARED * job.float.config.get_text_config().vocab_size * 4
            for kind in self.kinds:
                tape = work.verified(job, kind.layer, probes * each)
                seconds += kind.count * machine.seconds(tape)
                peak = max(peak, tape.peak + 2 * logits)  # the reference's and the export's
        return self._prediction(seconds, peak, sizes["files"] + carried(self.subject))

    def _prediction(
        self, seconds: float, peak: int, disk: int, *, also: int = 0, spilled: int = 0
    ) -> Prediction:
        """`also` stays on the CPU on a machine with a GPU, where `peak` is the GPU's."""
        ram = self.base + KEPT + also + (min(peak, 2 << 30) if self.gpu else peak)
        return Prediction(seconds, ram, peak if self.gpu else 0, disk + spilled)

    def _statistics(self, kind: Kind) -> int:
        """Bytes of the tensors that calibrate writes for a layer."""
        tokens = self.coverage.tokens
        return sum(
            t.nbytes
            for site in kind.layer.sites
            for t in work.statistics(self.job, site, tokens).values()
        )

    def _weights(self, kind: Kind) -> int:
        stored = self.job.float.checkpoint.stored
        return sum(stored[f"{n}.weight"].nbytes for s in kind.layer.sites for n in s.linears)

    def _read(self, kind: Kind, loading: float) -> float:
        return self.written[kind.layer.layer] * loading + self._weights(kind) * self.machine.reading

    def _tower(self) -> Tape:
        """What embedding runs: the linears of towers, on all their tokens."""
        job, cover = self.job, self.coverage
        media = sum(n for m, n in cover.tokens.items() if m != job.recipe.modalities[0])
        positions = TOWER * media // max(1, len(cover.batches))
        model = job.float.model
        found = Tape()
        if not positions:
            return found
        with record() as recorder, torch.no_grad():
            for out, width in work.linears_outside(model, layers_path(model, job.float.family)):
                x = torch.empty(positions, width, dtype=job.float.dtype, device=META)
                y = F.linear(x, torch.empty(out, width, dtype=job.float.dtype, device=META))
                _ = F.gelu(y) + y
        return found.plus(recorder.tape, len(cover.batches))

    def _layers_again(self) -> float:
        """Methods that run layers on samples, forwards and backwards: a rough guess."""
        job, cover = self.job, self.coverage
        options = job.recipe.smoothing
        share = min(1.0, options.samples / max(1, cover.samples))
        times = 3 * (1 + (2 + options.epochs) * len(job.recipe.modalities))
        samples, length = max(cover.batches, key=lambda b: b[0] * b[1])
        one = sum(
            k.count * self.machine.seconds(work.forward(job, k.layer, samples, length))
            for k in self.kinds
        )
        return times * share * one * cover.padded / (samples * length)
