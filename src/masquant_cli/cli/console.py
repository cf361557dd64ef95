"""Progress on stderr: a live bar on a terminal, otherwise a plain line now and then."""

import contextlib
import sys
import time
from typing import TextIO

from masquant_cli import distributed
from masquant_cli.progress import NullProgress

PLAIN_EVERY = 5.0  # seconds between progress lines where nothing can be redrawn


def progress(quiet: bool) -> "PlainProgress | LiveProgress | contextlib.nullcontext":
    """What suits stderr. Used as a context manager, so that a bar is always taken down."""
    if not distributed.world().main:
        return contextlib.nullcontext(NullProgress())
    if quiet or not sys.stderr.isatty():
        return PlainProgress(sys.stderr, quiet=quiet)
    return LiveProgress()


class PlainProgress:
    """Lines for logs: one when a stage begins and ends, one every few seconds in between."""

    def __init__(self, stream: TextIO, *, quiet: bool = False, clock=time.monotonic):
        self.stream, self.quiet, self.clock = stream, quiet, clock
        self.name = None

    def __enter__(self) -> "PlainProgress":
        return self

    def __exit__(self, kind, *_) -> None:
        self._end() if kind is None else None

    def stage(self, name: str, total: int | None, unit: str) -> None:
        self._end()
        self.name, self.total, self.unit = name, total, unit
        self.done = self.tokens = 0
        self.began = self.spoke = self.clock()
        self._say(f"{name}: {total} {unit}" if total is not None else name)

    def advance(self, n: int = 1, tokens: int = 0) -> None:
        if self.name is None:
            return
        self.done += n
        self.tokens += tokens
        now = self.clock()
        if now - self.spoke >= PLAIN_EVERY and self.done != self.total:
            self.spoke = now
            self._say(f"{self.name}: {self._state(now)}")

    def note(self, text: str) -> None:
        self._say(text)

    def warn(self, text: str) -> None:
        print(f"warning: {text}", file=self.stream, flush=True)

    def _end(self) -> None:
        if self.name is not None:
            seconds = self.clock() - self.began
            self._say(f"{self.name}: done in {clock_face(seconds)}{self._rate(seconds)}")
        self.name = None

    def _state(self, now: float) -> str:
        seconds = now - self.began
        of = f"/{self.total}" if self.total is not None else ""
        left = ""
        if self.total is not None and self.done:
            left = f", {clock_face(seconds * (self.total - self.done) / self.done)} left"
        return f"{self.done}{of} {self.unit}{self._rate(seconds)}{left}"

    def _rate(self, seconds: float) -> str:
        return f", {self.tokens / seconds:,.0f} tokens/s" if self.tokens and seconds > 0 else ""

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=self.stream, flush=True)


class LiveProgress:
    """A bar with tokens per second and time left; finished stages leave one line behind."""

    def __init__(self):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True, highlight=False)
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.task = None

    def __enter__(self) -> "LiveProgress":
        self.bars.start()
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self._end()
        self.bars.stop()

    def stage(self, name: str, total: int | None, unit: str) -> None:
        self._end()
        self.name, self.total, self.unit = name, total, unit
        self.done = self.tokens = 0
        self.began = time.monotonic()
        self.task = self.bars.add_task(name, total=total, count="", rate="")

    def advance(self, n: int = 1, tokens: int = 0) -> None:
        if self.task is None:
            return
        self.done += n
        self.tokens += tokens
        of = f"/{self.total}" if self.total is not None else ""
        count = f"{self.done}{of} {self.unit}"
        self.bars.update(self.task, advance=n, count=count, rate=self._rate())

    def note(self, text: str) -> None:
        self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", markup=False)

    def _rate(self) -> str:
        seconds = time.monotonic() - self.began
        return f"{self.tokens / seconds:,.0f} tokens/s" if self.tokens and seconds > 0 else ""

    def _end(self) -> None:
        if self.task is not None:
            self.bars.remove_task(self.task)
            parts = [f"{self.name}: done in {clock_face(time.monotonic() - self.began)}"]
            self.note(", ".join(filter(None, (*parts, self._rate()))))
        self.task = None


def clock_face(seconds: float) -> str:
    """1.2 s, 3:04, 2:03:04."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
