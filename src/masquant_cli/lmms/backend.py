"""lmms-eval's tasks run on one of our models: what `masquant eval --backend lmms-eval` does."""

import difflib
import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from masquant_cli.algo.metrics import wilson
from masquant_cli.errors import EnvironmentProblem, MasquantError, RecipeError
from masquant_cli.progress import NullProgress, Progress
from masquant_cli.recipe import Recipe

INSTALL = "pip install 'masquant[lmms]'"
# Tasks write prompts for models by lmms-eval's names of them.
CALLED = {"qwen2_5_omni_thinker": "qwen2_5_omni"}


def evaluate(
    recipe: Recipe,
    folder: str | Path,
    tasks: Sequence[str],
    *,
    samples: int | None = None,
    output: Path | None = None,
    progress: Progress | None = None,
) -> dict:
    """{"model", "recipe", "backend", "tasks": {name: {metric, value, n, ci, ci_method, metrics}}}.

    `tasks` are names of lmms-eval's tasks, groups or tags, or files of tasks; `samples` is a limit
    per task. Values are in the units that a task's own code gives. Device, dtype, seed and batch
    size are the recipe's. Files that tasks write go to `output`, else to where they like.

    Raises EnvironmentProblem where lmms-eval or a task's data is missing, RecipeError for an
    unknown task.
    """
    progress = progress or NullProgress()
    require()
    progress.note("lmms-eval: reading its tasks")
    manager, names = _manager(tasks)
    modes = {
        simple: [n for n in names if _is_simple(manager, n) == simple] for simple in (True, False)
    }
    from masquant_cli.lmms import wrapper

    progress.note(f"loading {folder}")
    loaded = wrapper.load(folder, device=recipe.device, dtype=recipe.model.dtype)
    family = loaded.model.config.model_type
    manager.model_name = CALLED.get(family, family)
    found: dict[str, dict] = {}
    for simple, chosen in modes.items():
        if chosen:
            kind = wrapper.Masquant if simple else wrapper.MasquantChat
            model = kind(loaded=loaded, batch_size=recipe.evaluation.batch_size, progress=progress)
            found |= document(_run(model, manager, chosen, samples, recipe.seed, output))
    return {
        "model": str(folder),
        "recipe": recipe.name,
        "backend": f"lmms-eval {_version()}",
        "tasks": found,
    }


def require() -> None:
    """EnvironmentProblem unless lmms-eval can be imported."""
    if importlib.util.find_spec("lmms_eval") is None:
        raise EnvironmentProblem(
            "this backend needs the package lmms-eval", where="--backend lmms-eval", hint=INSTALL
        )
    try:
        import lmms_eval.evaluator  # noqa: F401
        from loguru import logger
    except ImportError as error:
        raise EnvironmentProblem(
            f"lmms-eval cannot be imported: {error}", where="--backend lmms-eval", hint=INSTALL
        ) from error
    logger.remove()  # it talks on stdout, which is for data
    logger.add(sys.stderr, level="WARNING", format="lmms-eval: {message}")


def document(results: dict[str, Any]) -> dict[str, dict]:
    """lmms-eval's results as our tasks: {name: {metric, value, n, ci, ci_method, metrics}}.

    `metric` is the first of the task's list, `metrics` has all; a value that is no number is
    None. The interval is Wilson's where all scores were 0 or 1, else value +- 1.96 of lmms-eval's
    standard errors, None where it knows none. Groups have the number of samples of their tasks.
    """
    found = {}
    counts = {name: n["effective"] for name, n in results["n-samples"].items()}
    for name, scores in {**results.get("groups", {}), **results["results"]}.items():
        numbers = {
            key: _number(value)
            for key, value in scores.items()
            if "," in key and "_stderr" not in key.partition(",")[0]
        }
        if not numbers:
            continue
        listed = (results.get("configs", {}).get(name) or {}).get("metric_list") or []
        first = [str(metric["metric"]) for metric in listed if isinstance(metric, dict)]
        main = next((k for m in first for k in numbers if k.partition(",")[0] == m), None)
        main = main or next(iter(numbers))
        metric, _, choice = main.partition(",")
        value, error = numbers[main], _number(scores.get(f"{metric}_stderr,{choice}"))
        members = results.get("group_subtasks", {}).get(name) or []
        n = counts.get(name, sum(counts.get(member, 0) for member in members))
        found[name] = {
            "metric": metric,
            "value": value,
            "n": n,
            **_interval(value, error, n),
            "metrics": {_short(key): number for key, number in numbers.items()},
        }
    return found


def _interval(value: float | None, error: float | None, n: int) -> dict:
    """{"ci", "ci_method"} of a mean of n scores with this standard error."""
    if value is None or error is None:
        return {"ci": None, "ci_method": None}
    # Scores in [0, 1] vary as much as their mean allows only if every one is 0 or 1.
    if 0 <= value <= 1 < n and math.isclose(error**2 * (n - 1), value * (1 - value), abs_tol=1e-9):
        return {"ci": list(wilson(round(value * n), n)), "ci_method": "wilson"}
    return {"ci": [value - 1.96 * error, value + 1.96 * error], "ci_method": "normal"}


def _manager(tasks: Sequence[str]):
    """(lmms-eval's TaskManager, names of the tasks in it); files join its own tasks."""
    from lmms_eval.tasks import TaskManager

    if not tasks:
        raise RecipeError(
            "name the tasks to run", where="--task", hint="for example --task mmmu_val"
        )
    entries = {task: _entry(task) if _is_file(task) else (task, None) for task in tasks}
    groups = [Path(t).absolute().parent for t, (_, e) in entries.items() if e and "task" in e]
    manager = TaskManager(
        include_path=[str(place) for place in groups] or None,
        # Its own tasks are two thousand files.
        include_defaults=any(entry is None for _, entry in entries.values()),
    )
    for task, (name, entry) in entries.items():
        if entry is not None:
            manager.task_index[name] = entry
            manager.all_tasks.append(name)
        elif name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise RecipeError(
                f"lmms-eval has no task {name!r}",
                where=f"--task {task}",
                hint=f"did you mean {' or '.join(close)}?"
                if close
                else "see: lmms-eval tasks list",
            )
    return manager, list(dict.fromkeys(name for name, _ in entries.values()))


def _is_file(task: str) -> bool:
    return Path(task).suffix in (".yaml", ".yml")


def _entry(file: str) -> tuple[str, dict]:
    """Name of the task or group in a file, and what TaskManager's index would hold of it."""
    from lmms_eval.utils import load_yaml_config

    try:
        content = load_yaml_config(file, mode="simple")
        name = content["task"]
        if isinstance(name, list):
            return content["group"], {"type": "group", "task": -1, "yaml_path": file}
    except (OSError, KeyError, AttributeError, AssertionError, TypeError, ValueError) as error:
        raise RecipeError(
            f"not a file of an lmms-eval task ({type(error).__name__}: {error})",
            where=file,
            hint="such a file names its `task` and its `dataset_path`",
        ) from error
    kind = "python_task" if "class" in content else "task"
    return name, {"type": kind, "yaml_path": file}


def _is_simple(manager, name: str) -> bool:
    """Whether media and text suffice; not so where a task writes its own messages."""
    configs = [_config(manager, leaf) for leaf in _leaves(manager, name)]
    scored = {"loglikelihood", "multiple_choice"}
    if any(config.get("output_type") in scored for config in configs):
        return True
    return not any(config.get("doc_to_messages") for config in configs)


def _leaves(manager, name: str) -> list[str]:
    """The tasks of a group or tag; a task itself."""
    entry = manager.task_index.get(name, {"type": "task"})
    if entry["type"] in ("task", "python_task"):
        return [name]
    inside = entry["task"] if entry["task"] != -1 else _config(manager, name)["task"]
    members = [m if isinstance(m, str) else m.get("task", m.get("group")) for m in inside]
    return [leaf for m in members if isinstance(m, str) for leaf in _leaves(manager, m)]


def _config(manager, name: str) -> dict:
    from lmms_eval.utils import load_yaml_config

    path = manager.task_index.get(name, {}).get("yaml_path", -1)
    return {} if path == -1 else load_yaml_config(path, mode="simple")


def _run(
    model, manager, names: Sequence[str], samples: int | None, seed: int, output: Path | None
) -> dict:
    from lmms_eval.evaluator import simple_evaluate
    from tenacity import RetryError

    written = None
    if output is not None:  # as much of lmms-eval's own command line as its tasks look at
        told = {"model": "masquant", "tasks": ",".join(names), "log_samples_suffix": "masquant"}
        written = SimpleNamespace(output_path=str(output), process_with_media=True, **told)
    try:
        return simple_evaluate(
            model=model,
            tasks=list(names),
            task_manager=manager,
            limit=samples,
            bootstrap_iters=1000,
            log_samples=False,
            cli_args=written,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except MasquantError:
        raise
    except RetryError as error:  # lmms-eval tries five times, whatever went wrong
        raise _explained(error.last_attempt.exception(), names) from error
    except ImportError as error:
        raise _explained(error, names) from error


def _explained(error: BaseException, names: Sequence[str]) -> MasquantError:
    where, said = f"--task {', '.join(names)}", f"{type(error).__name__}: {error}"
    if isinstance(error, MasquantError):
        return error
    if isinstance(error, ImportError):
        return EnvironmentProblem(
            f"this task needs a package that is not installed ({error})", where=where, hint=INSTALL
        )
    if isinstance(error, OSError):  # the hub's errors, and a missing file
        return EnvironmentProblem(
            f"the task's data cannot be had ({said})",
            where=where,
            hint="is the hub reachable? some data sets need `hf auth login`",
        )
    return RecipeError(
        f"lmms-eval cannot run this task ({said})",
        where=where,
        hint="is it a task with pictures, sounds or videos, and one answer?",
    )


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        try:
            value = value.item()  # numpy's and torch's
        except (AttributeError, ValueError, RuntimeError):
            return None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _short(key: str) -> str:
    """`acc,none` -> acc: the filter that changes nothing is not worth a name."""
    metric, _, choice = key.partition(",")
    return metric if choice == "none" else key


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lmms-eval")
    except PackageNotFoundError:
        return "?"
