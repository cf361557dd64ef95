"""Any exception as one clear error: what, where, hint, and an exit code from `errors`."""

import contextlib
import errno
import sys
import traceback
from dataclasses import asdict, dataclass

from masquant_cli import __version__, distributed
from masquant_cli.cli import render
from masquant_cli.cli.processes import Terminated
from masquant_cli.errors import (
    EXIT_BUG,
    EXIT_ENVIRONMENT,
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    EXIT_USAGE,
    MasquantError,
)

NETWORK = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3")

RESUMES = "run the same command again: finished layers, stages and answers are kept"


@dataclass(frozen=True)
class Failure:
    message: str
    where: str | None
    hint: str | None
    exit_code: int


def report(error: BaseException, *, json: bool) -> int:
    """Tell people on stderr, and scripts on stdout if they asked for JSON; once for all ranks."""
    if type(error).__name__ == "NoArgsIsHelpError":  # `masquant` alone: the help, on stderr
        print(error, file=sys.stderr)
        return EXIT_USAGE
    why, speaks = distributed.world().ending(asdict(explain(error)))
    failure = Failure(**why)
    if not speaks:
        return failure.exit_code
    if failure.exit_code == EXIT_BUG:
        traceback.print_exception(error, file=sys.stderr)
    print(f"error: {failure.message}", file=sys.stderr)
    if failure.where:
        print(f"  --> {failure.where}", file=sys.stderr)
    if failure.hint:
        print(f"  hint: {failure.hint}", file=sys.stderr)
    if json:
        with contextlib.suppress(OSError):  # stdout itself may be what is full
            render.output({"error": asdict(failure)}, True, render.stages)
    return failure.exit_code


def explain(error: BaseException) -> Failure:
    if isinstance(error, MasquantError):
        return Failure(error.message, error.where, error.hint, error.exit_code)
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        return Failure("interrupted", None, RESUMES, EXIT_INTERRUPTED)
    if isinstance(error, Terminated):
        return Failure("ended by SIGTERM", None, RESUMES, EXIT_TERMINATED)
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # a Typer usage error
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "masquant"
        return Failure(error.format_message(), None, f"{command} --help", EXIT_USAGE)
    return _environment(error) or Failure(
        f"{type(error).__name__}: {error}",
        _frame(error),
        f"this is a bug in masquant {__version__}; please report it with the traceback above",
        EXIT_BUG,
    )


def _environment(error: BaseException) -> Failure | None:
    """What the machine lacks, if that is what went wrong."""
    name, module, text = type(error).__name__, type(error).__module__, str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = error.filename or None
        hint = "free some space and run the same command again; it resumes"
        return Failure("the disk is full", where and str(where), hint, EXIT_ENVIRONMENT)
    if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
        where = error.filename and str(error.filename)
        return Failure("no permission to read or write this", where, None, EXIT_ENVIRONMENT)
    if (
        isinstance(error, MemoryError)
        or name == "OutOfMemoryError"
        or "can't allocate memory" in text
    ):
        hint = (
            "lower calibration.batch_tokens or evaluation.batch_size with --set, or use more memory"
        )
        return Failure("out of memory", None, hint, EXIT_ENVIRONMENT)
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("masquant"):
        hint = f"install it in {sys.prefix}, or run masquant doctor"
        return Failure(f"the package {error.name!r} is missing", None, hint, EXIT_ENVIRONMENT)
    network = module.split(".")[0] in NETWORK and not name.startswith("StrictDataclass")
    if isinstance(error, ConnectionError) or network:
        hint = "check the network, HF_ENDPOINT and HF_TOKEN; files already cached need none"
        first = text.strip().splitlines()[0] if text.strip() else name
        return Failure(f"the hub cannot be used: {first}", None, hint, EXIT_ENVIRONMENT)
    return None


def _frame(error: BaseException) -> str | None:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None
