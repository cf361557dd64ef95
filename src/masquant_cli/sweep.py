"""Many recipes, one after the other or over a fleet, each in a process of its own.

What is finished is skipped, what fails does not stop the rest, and recipes that calibrate alike
calibrate once: the first does it, the others wait for that and read what it wrote.
"""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from masquant_cli import pipeline, recipe_yaml
from masquant_cli.errors import (
    EXIT_ENVIRONMENT,
    EXIT_OK,
    ArtifactError,
    MasquantError,
    RecipeError,
)
from masquant_cli.launchers import LAUNCHERS, Handle, Launcher, NotStarted, Outcome
from masquant_cli.progress import NullProgress, Progress
from masquant_cli.recipe import Recipe
from masquant_cli.rundir import RunDir, calibration_of, disk_errors, fingerprint, read_manifest

PROGRAM = (sys.executable, "-m", "masquant_cli")
POLL = 0.1  # seconds
LOG = "run.log"  # of a run elsewhere: what it said on stderr


@dataclass(frozen=True)
class Member:
    """One recipe of a sweep. `calibration` is equal where two can share a calibration."""

    recipe: Recipe
    file: Path
    run_dir: Path
    calibration: str


@dataclass
class Row:
    """What became of a member: cached (was finished) | done | failed."""

    member: Member
    state: str
    code: int = EXIT_OK
    seconds: float = 0.0
    error: str | None = None
    document: dict = field(default_factory=dict)

    def plain(self) -> dict:
        return {
            "recipe": self.member.recipe.name,
            "file": str(self.member.file),
            "run_dir": str(self.member.run_dir),
            "state": self.state,
            "seconds": self.seconds,
            "exit_code": self.code,
            "error": self.error,
            "export_dir": self.document.get("export_dir"),
            "stages": self.document.get("stages") or {},
        }


def members(names: Sequence[str], run_root: Path, overrides: Sequence[str] = ()) -> list[Member]:
    """The recipes (files or shipped names), each with its run directory `run_root`/NAME.

    Raises one RecipeError that names every recipe that cannot be read, and one for two recipes
    that would share a name or a run directory.
    """
    found: list[Member] = []
    problems: list[RecipeError] = []
    for name in names:
        try:
            recipe = recipe_yaml.load(name, overrides)
            file = recipe_yaml.find(name).resolve()
            found.append(Member(recipe, file, run_root / recipe.name, _calibration(recipe)))
        except RecipeError as error:
            problems.append(error)
    _raise_all(problems)
    for index, member in enumerate(found):
        for other in found[:index]:
            if member.recipe.name == other.recipe.name:
                raise RecipeError(
                    f"two recipes are called {member.recipe.name}: {other.file} and {member.file}",
                    where="name", hint="a run directory takes its recipe's name; name each once",
                )  # fmt: skip
            if member.run_dir.resolve() == other.run_dir.resolve():
                raise RecipeError(
                    f"{member.run_dir} and {other.run_dir} are one folder",
                    where=member.recipe.name, hint="two recipes cannot share a run directory",
                )  # fmt: skip
    return found


def steps(chosen: Sequence[Member], reuse: Sequence[Path] = (), *, here: bool = True) -> list:
    """Per member the plan of its stages, or what is wrong with its run directory. `here`: the
    runs take place on this machine. Raises one RecipeError for all models and data that are not
    there."""
    found: list = []
    problems: list[RecipeError] = []
    for member in chosen:
        try:
            found.append(max(_plans(member, chosen, reuse, here), key=_finished_stages))
        except RecipeError as error:
            name = member.recipe.name
            problems.append(RecipeError(error.message, where=error.where or name, hint=error.hint))
        except ArtifactError as error:
            found.append(str(error))
    _raise_all(problems)
    return found


def _plans(member: Member, chosen: Sequence[Member], reuse: Sequence[Path], here: bool) -> list:
    """The plan of a member's stages. Elsewhere one for each device that `auto` may mean there,
    since this machine, a login node say, need not have what the others have."""
    recipe, lent = member.recipe, [*reuse, *_lenders(member, chosen)]
    devices = [recipe.device] if here or recipe.device != "auto" else ["cuda", "cpu"]
    recipes = [recipe.model_copy(update={"device": device}) for device in devices]
    return [pipeline.plan(r, member.run_dir, lent, download=False) for r in recipes]


def _finished_stages(planned) -> int:
    return sum(step.state == "cached" for step in planned)


def _is_finished(planned) -> bool:
    return not isinstance(planned, str) and _finished_stages(planned) == len(planned)


def sweep(
    chosen: Sequence[Member],
    *,
    launcher: str = "local",
    options: dict | None = None,
    overrides: Sequence[str] = (),
    reuse: Sequence[Path] = (),
    processes: int = 1,
    quiet: bool = False,
    program: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> dict:
    """Bring every member's run to its end; json-able {"runs", "launcher", "exit_code"}.

    The exit code is that of the first run (in the order given) that failed. Interrupted, the runs
    in progress are interrupted too, and KeyboardInterrupt is raised: the next call goes on.
    """
    progress = progress or NullProgress()
    rows: dict[str, Row] = {}
    here = launcher == "local"
    for member, planned in zip(chosen, steps(chosen, reuse, here=here), strict=True):
        if _is_finished(planned):
            rows[member.recipe.name] = Row(member, "cached", document=_exported(member))
    waiting = [m for m in chosen if m.recipe.name not in rows]
    if waiting:
        place = LAUNCHERS[launcher](options or {}, waiting[0].run_dir.parent / ".sweep")

        def calibrated(member: Member) -> list[Path] | None:
            return _calibrated(member, chosen, reuse, here)

        def start(member: Member, shared: Sequence[Path] | None) -> Handle:
            if shared is None:  # elsewhere the run may see what is not seen from here
                shared = [*reuse, *([] if here else _lenders(member, chosen))]
            progress.note(f"sweep: {member.recipe.name}, {len(waiting)} more waiting")
            try:
                with disk_errors(member.run_dir):
                    member.run_dir.mkdir(parents=True, exist_ok=True)
            except (MasquantError, OSError) as error:
                return NotStarted(f"{member.run_dir}: {error}")
            argv = command(member, overrides, shared, processes, quiet, program or PROGRAM)
            return place.start(argv, (member.run_dir / LOG).resolve())

        def ended(member: Member, outcome: Outcome) -> None:
            rows[member.recipe.name] = row = _row(member, outcome)
            if row.error:
                progress.warn(f"{member.recipe.name} failed: {row.error}")

        _queue(waiting, place, calibrated, start, ended)
    ordered = [rows[m.recipe.name] for m in chosen]
    code = next((row.code for row in ordered if row.code != EXIT_OK), EXIT_OK)
    return {"launcher": launcher, "runs": [row.plain() for row in ordered], "exit_code": code}


@dataclass
class _Running:
    """A run in progress. Others wait for its calibration if it `makes` one; `before`: when the
    one that lay there as it began, a stale one, had been finished."""

    member: Member
    handle: Handle
    makes: bool
    before: int | None

    def is_calibrating(self) -> bool:
        return self.makes and _calibrated_at(self.member) in (None, self.before)


def _calibrated_at(member: Member) -> int | None:
    """When a member's own calibration was finished, None where it is not."""
    try:
        return (RunDir(member.run_dir).stage("calibrate") / "manifest.json").stat().st_mtime_ns
    except OSError:
        return None


def _queue(
    waiting: list[Member],
    place: Launcher,
    calibrated: Callable[[Member], list[Path] | None],
    start: Callable[[Member, Sequence[Path] | None], Handle],
    ended: Callable[[Member, Outcome], None],
) -> None:
    """Start whoever may start, until nobody waits and nobody runs. Empties `waiting`."""
    running: list[_Running] = []
    with _interruptible() as interruption:
        try:
            while waiting or running:
                in_the_making = {r.member.calibration for r in running if r.is_calibrating()}
                for member in list(waiting):
                    if place.width is not None and len(running) >= place.width:
                        break
                    if member.calibration in in_the_making:
                        continue
                    shared, before = calibrated(member), _calibrated_at(member)
                    waiting.remove(member)
                    running.append(_Running(member, start(member, shared), shared is None, before))
                    if shared is None:
                        in_the_making.add(member.calibration)
                time.sleep(POLL)
                for run in [r for r in running if r.handle.done()]:
                    running.remove(run)
                    ended(run.member, run.handle.outcome())
        finally:
            interruption.armed = False  # a second Ctrl-C must not leave runs behind
            for run in running:
                run.handle.cancel()
            place.close()


def command(
    member: Member,
    overrides: Sequence[str],
    reuse: Sequence[Path],
    processes: int,
    quiet: bool,
    program: Sequence[str] = PROGRAM,
) -> list[str]:
    """The command line of one run, which says what it did in JSON; under torchrun for several
    processes."""
    python, *rest = program
    if processes > 1:
        many = f"--nproc-per-node={processes}"
        rest = ["-m", "torch.distributed.run", "--standalone", many, *rest]
    argv = [python, *rest, "run", "-c", str(member.file), "--run-dir", str(member.run_dir)]
    argv.append("--json")
    argv += [part for change in overrides for part in ("--set", change)]
    argv += [part for folder in reuse for part in ("--reuse", str(folder))]
    return [*argv, "--quiet"] if quiet else argv


def _calibrated(
    member: Member, chosen: Sequence[Member], reuse: Sequence[Path], here: bool
) -> list[Path] | None:
    """What to `--reuse` of a finished calibration: nothing where it is the run's own. None where
    there is none yet."""
    try:
        planned = [plan[0] for plan in _plans(member, chosen, reuse, here)]
    except MasquantError:  # the run itself will say so
        return None
    found = [step.folder for step in planned if step.state == "cached"]
    own = RunDir(member.run_dir).stage("calibrate")
    return [folder.parent for folder in found if folder != own] if found else None


def _lenders(member: Member, chosen: Sequence[Member]) -> list[Path]:
    """Where the runs that calibrate alike have their calibration. A damaged one lends nothing."""
    alike = [m for m in chosen if m is not member and m.calibration == member.calibration]
    found = []
    for folder in (calibration_of(RunDir(m.run_dir)) for m in alike):
        with contextlib.suppress(ArtifactError):
            if folder.parent not in found and read_manifest(folder):
                found.append(folder.parent)
    return found


def _row(member: Member, outcome: Outcome) -> Row:
    """A run that ended. A killed one is the machine's fault: mostly it ran out of memory."""
    document = outcome.document or {}
    if outcome.code == EXIT_OK and not outcome.lost:
        return Row(member, "done", seconds=outcome.seconds, document=document)
    said = document.get("error") or {}
    code, error = said.get("exit_code", outcome.code), said.get("message")
    if outcome.lost:
        code, error = EXIT_ENVIRONMENT, outcome.lost
    elif outcome.code < 0:
        name = signal.Signals(-outcome.code).name
        code, error = EXIT_ENVIRONMENT, f"killed by {name}"
        if name == "SIGKILL":
            error += ": was it out of memory?"
    error = error or f"exit code {outcome.code}"
    return Row(member, "failed", code or 1, outcome.seconds, " ".join(error.split()), document)


def _exported(member: Member) -> dict:
    return {"export_dir": str(RunDir(member.run_dir).stage("export") / "model")}


def _calibration(recipe: Recipe) -> str:
    """What a calibration depends on, as the recipe has it; `run --reuse` looks at the files too."""
    whole = recipe.model_dump(mode="json")
    keys = ("model", "modalities", "calibration", "seed", "device")
    return fingerprint({key: whole[key] for key in keys})


def _raise_all(problems: list[RecipeError]) -> None:
    if len(problems) == 1:
        raise problems[0]
    if problems:
        lines = [f"{p.where}: {p.message}" + (f" ({p.hint})" if p.hint else "") for p in problems]
        raise RecipeError("\n".join([f"{len(problems)} recipes cannot be run", *lines]))


@dataclass
class _Interruption:
    armed: bool = True


@contextlib.contextmanager
def _interruptible() -> Iterator[_Interruption]:
    """While open, a closed terminal interrupts like Ctrl-C does, and so does SIGTERM unless it
    raises something of its own already.

    Handlers of our own also undo an inherited "ignore", which children would inherit in turn.
    """
    state = _Interruption()

    def interrupt(number: int, frame) -> None:
        if not state.armed:
            return
        before = kept[signal.Signals(number).name]
        if number == signal.SIGTERM and callable(before):
            before(number, frame)
        raise KeyboardInterrupt

    names = [n for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
    if threading.current_thread() is not threading.main_thread():
        names = []
    kept = {name: signal.getsignal(getattr(signal, name)) for name in names}
    for name, handler in kept.items():
        if not (name == "SIGHUP" and handler is signal.SIG_IGN):  # nohup means it
            signal.signal(getattr(signal, name), interrupt)
    try:
        yield state
    finally:
        for name, handler in kept.items():
            signal.signal(getattr(signal, name), handler)
