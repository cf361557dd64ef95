"""Where the runs of a sweep take place: here, on Slurm (through submitit) or on a Ray cluster.

A launcher's `start` puts one command line into a process of its own, somewhere, and returns a
handle with done(), outcome() and cancel(); at most `width` at a time (None: as many as there are).
"""

import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from masquant_cli.errors import EnvironmentProblem, RecipeError

GRACE = 30  # seconds that an interrupted run gets to leave in order
REQUEUES = 1000  # how often a Slurm job may reach its time limit; submitit's default is 3
# AutoExecutor's own parameters; all others are the cluster's and take its name as a prefix.
SUBMITIT_OPTIONS = (
    *("name", "nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node"),
    *("mem_gb", "timeout_min", "stderr_to_stdout"),
)
SUBMITIT_DEFAULTS = {"name": "masquant", "timeout_min": 24 * 60}  # submitit's own is 5 minutes


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code (negative: the signal that killed it), the JSON document
    on its stdout if there is one, and its wall seconds."""

    code: int
    document: dict | None
    seconds: float
    lost: str | None = None  # why nothing is known, where its machine or its job is gone


class Handle(Protocol):
    def done(self) -> bool: ...

    def outcome(self) -> Outcome: ...

    def cancel(self) -> None: ...


class Launcher(Protocol):
    width: int | None

    def start(self, argv: Sequence[str], log: Path) -> Handle: ...

    def close(self) -> None: ...


class Process:
    """A command in its own session here; stderr goes where ours does, or to the file `log`."""

    def __init__(self, argv: Sequence[str], folder: str | Path, log: str | Path | None = None):
        self.began = time.monotonic()
        # A pipe that is not read would block the run. Open until its end:
        self.stdout = tempfile.TemporaryFile()  # noqa: SIM115
        with contextlib.ExitStack() as stack:
            stderr = stack.enter_context(open(log, "ab")) if log else None
            self.process = subprocess.Popen(
                list(argv), cwd=folder, stdin=subprocess.DEVNULL, stdout=self.stdout,
                stderr=stderr, start_new_session=True,
            )  # fmt: skip

    def done(self) -> bool:
        return self.process.poll() is not None

    def outcome(self) -> Outcome:
        """Waits for the end."""
        code = self.process.wait()
        seconds = round(time.monotonic() - self.began, 3)
        self.stdout.seek(0)
        text = self.stdout.read().decode(errors="replace")
        try:
            document = json.loads(text)
        except ValueError:
            document = None
        return Outcome(code, document if isinstance(document, dict) else None, seconds)

    def cancel(self) -> None:
        """Interrupt it as Ctrl-C would; after GRACE seconds, kill it and what it started."""
        with contextlib.suppress(ProcessLookupError):
            if not self.done():
                os.killpg(self.process.pid, signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(GRACE)
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def work(argv: Sequence[str], folder: str, log: str) -> Outcome:
    """Run a command to its end; interrupted, interrupt it. What jobs on other machines call."""
    process = Process(argv, folder, log)
    try:
        return process.outcome()
    except BaseException:
        process.cancel()
        raise


class Local:
    """One run after the other on this machine."""

    width = 1

    def __init__(self, options: Mapping[str, Any], folder: Path):
        if options:
            raise _unknown("local", "has no options")

    def start(self, argv: Sequence[str], log: Path) -> Handle:
        return Process(argv, Path.cwd())

    def close(self) -> None: ...


class Resumable:
    """What a Slurm job executes. A job that Slurm preempts or times out is queued again, where
    the run goes on."""

    def __call__(self, argv: Sequence[str], folder: str, log: str) -> Outcome:
        return work(argv, folder, log)

    def checkpoint(self, *arguments):
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *arguments)


class Submitit:
    """A Slurm job for each run. Options: submitit's, `partition` and the like for Slurm itself;
    `cluster=local` uses this machine; `at_once=N` keeps no more than N jobs in the queue."""

    def __init__(self, options: Mapping[str, Any], folder: Path):
        options = dict(options)
        self.width = _at_once(options)
        submitit = _extra("submitit", "slurm")
        cluster = options.pop("cluster", "slurm")
        if cluster == "slurm" and not shutil.which("sbatch"):
            raise EnvironmentProblem(
                "there is no Slurm here: sbatch is not on the PATH", where="--launcher submitit",
                hint="start the sweep on a login node; --launcher-set cluster=local tries it here",
            )  # fmt: skip
        _refuse_many_tasks(options, f"{cluster}_")
        named = {
            k if k in SUBMITIT_OPTIONS or k.startswith(f"{cluster}_") else f"{cluster}_{k}": value
            for k, value in options.items()
        }
        try:
            self.executor = submitit.AutoExecutor(
                folder / "%j", cluster=cluster, slurm_max_num_timeout=REQUEUES
            )
            self.executor.update_parameters(**{**SUBMITIT_DEFAULTS, **named})
        except (NameError, AssertionError, TypeError, ValueError, RuntimeError) as error:
            raise _unknown("submitit", str(error)) from error

    def start(self, argv: Sequence[str], log: Path) -> Handle:
        try:
            job = self.executor.submit(Resumable(), list(argv), os.getcwd(), str(log))
        except (RuntimeError, OSError) as error:  # sbatch refused it, with submitit's own errors
            return NotStarted(_last_line(error))
        return _SubmititJob(job)

    def close(self) -> None: ...


@dataclass
class _SubmititJob:
    job: Any

    def done(self) -> bool:
        return self.job.done()

    def outcome(self) -> Outcome:
        try:
            return self.job.result()
        except Exception as error:  # submitit's own, or whatever its job raised
            return Outcome(1, None, 0.0, f"job {self.job.job_id}: {_last_line(error)}")

    def cancel(self) -> None:
        self.job.cancel(check=False)


@dataclass(frozen=True)
class NotStarted:
    """A run that its machine or its cluster did not take: it is over as it begins."""

    why: str

    def done(self) -> bool:
        return True

    def outcome(self) -> Outcome:
        return Outcome(1, None, 0.0, self.why)

    def cancel(self) -> None: ...


class Ray:
    """A Ray task for each run. Options: `address` of the cluster (default: the one Ray finds, or
    one on this machine) and those of ray.remote (num_cpus, num_gpus, memory, ...)."""

    def __init__(self, options: Mapping[str, Any], folder: Path):
        options = dict(options)
        self.width = _at_once(options)
        self.ray = _extra("ray", "ray")
        self.left: list[Any] = []  # cancelled tasks
        try:
            address = options.pop("address", None)
            self.task = self.ray.remote(work).options(**{"num_cpus": 1, **options})
            self.ray.init(address=address, log_to_driver=False, ignore_reinit_error=True)
        except ConnectionError as error:
            raise EnvironmentProblem(
                f"Ray cannot be reached: {_last_line(error)}", where="--launcher ray",
                hint="give the cluster's address: --launcher-set address=HOST:PORT",
            ) from error  # fmt: skip
        except (TypeError, ValueError) as error:
            raise _unknown("ray", _last_line(error)) from error

    def start(self, argv: Sequence[str], log: Path) -> Handle:
        reference = self.task.remote(list(argv), os.getcwd(), str(log))
        return _RayTask(self.ray, reference, self.left)

    def close(self) -> None:
        """Cancelled tasks get some time to pass the interruption on."""
        self.ray.wait(self.left, num_returns=len(self.left), timeout=GRACE) if self.left else None
        self.ray.shutdown()


@dataclass
class _RayTask:
    ray: ModuleType
    reference: Any
    left: list[Any]

    def done(self) -> bool:
        return bool(self.ray.wait([self.reference], timeout=0)[0])

    def outcome(self) -> Outcome:
        try:
            return self.ray.get(self.reference)
        except self.ray.exceptions.RayError as error:
            return Outcome(1, None, 0.0, f"Ray: {_last_line(error)}")

    def cancel(self) -> None:
        """As Ctrl-C in the task, which passes it on to the run."""
        self.ray.cancel(self.reference, force=False)
        self.left.append(self.reference)


LAUNCHERS = {"local": Local, "submitit": Submitit, "ray": Ray}


def _at_once(options: dict[str, Any]) -> int | None:
    """Takes `at_once` out of the options."""
    width = options.pop("at_once", None)
    if width is None or (type(width) is int and width > 0):
        return width
    raise RecipeError(
        f"at_once={width} is not a number of runs", where="--launcher-set",
        hint="how many runs may go on at the same time: 1 or more",
    )  # fmt: skip


def _refuse_many_tasks(options: Mapping[str, Any], prefix: str) -> None:
    """submitit starts its function once for each task: the second would find the run locked."""
    for name, value in options.items():
        key = name.removeprefix(prefix)
        if key in ("nodes", "tasks_per_node", "ntasks_per_node") and value != 1:
            raise RecipeError(
                f"{name}={value}: a run is one task on one node", where="--launcher-set",
                hint="for several GPUs of a node: gpus_per_node=N, and sweep --processes N",
            )  # fmt: skip


def _extra(package: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise EnvironmentProblem(
            f"--launcher {package} needs the package {package}", where=f"--launcher {package}",
            hint=f"pip install 'masquant[{extra}]'",
        ) from error  # fmt: skip


def _unknown(launcher: str, reason: str) -> RecipeError:
    return RecipeError(
        f"the launcher {launcher} does not take these options: {reason}",
        where="--launcher-set", hint="docs/sweep.md lists them",
    )  # fmt: skip


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
