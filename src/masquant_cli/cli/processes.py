"""What SIGTERM and torchrun mean for a command: an end with a clear line, and ranks that meet."""

import contextlib
import os
import signal
from collections.abc import Iterator

from masquant_cli import distributed
from masquant_cli.errors import RecipeError

TOGETHER = ("run", "calibrate", "smooth", "compensate", "export")  # may have several processes


class Terminated(BaseException):
    """SIGTERM came, from a scheduler or from torchrun."""


@contextlib.contextmanager
def working(argv: list[str]) -> Iterator[None]:
    """While open, SIGTERM raises Terminated, and processes that torchrun started are one world."""
    with _sigterm_raises():
        if distributed.launched():
            _meet(argv)
        yield
        distributed.world().leave()


def _meet(argv: list[str]) -> None:
    if not distributed.join().main:  # one voice is enough
        os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = next((word for word in argv if not word.startswith("-")), None)
    if command not in TOGETHER:
        raise RecipeError(
            f"masquant {command or ''} runs in one process".replace("  ", " "),
            where="torchrun",
            hint=f"start it without torchrun; several processes are for {', '.join(TOGETHER)}",
        )


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    def end(number, _frame):
        signal.signal(number, signal.SIG_IGN)  # once is enough: what follows must not be cut short
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread: whoever started it has its own ways
        yield
        return
    try:
        yield
    except BaseException:  # reporting it is not to be cut short either
        if distributed.world().size > 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            before = signal.SIG_IGN
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
