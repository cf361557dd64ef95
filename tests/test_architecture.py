"""The shape that keeps the code readable: imports point one way, and some stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC, KERNELS = ROOT / "src", ROOT / "kernels"
# package or module of masquant_cli -> the ones it may import (besides itself)
MAY_IMPORT = {
    "benchmarks": set(),
    "distributed": {"errors", "progress", "ranks"},
    "ranks": {"distributed", "errors"},
    "errors": set(),
    "machine": set(),
    "metrics": set(),
    "progress": set(),
    "recipe": {"benchmarks"},
    "yaml_marks": {"errors"},
    "recipe_yaml": {"errors", "recipe", "yaml_marks"},
    "rundir": {"errors"},
    "rows": {"recipe", "rundir"},
    "shards": {"errors", "rundir"},
    "shard_writer": {"models", "rundir"},
    "algo": {"masquant_kernels"},
    "methods": {"algo", "recipe"},
    "models": {"errors", "machine", "recipe"},
    "data": {"errors", "recipe"},
    "runtime": {"errors", "algo", "models", "masquant_kernels"},
    "stages": {
        *("distributed", "errors", "machine", "progress", "recipe", "rundir", "shards"),
        *("shard_writer", "algo", "methods", "models", "data", "runtime", "masquant_kernels"),
    },
    "bench": {"errors", "progress", "algo", "models", "runtime", "masquant_kernels"},
    "pipeline": {
        *("distributed", "errors", "machine", "progress", "recipe", "rundir", "shards"),
        *("stages", "states"),
    },
    "states": {"recipe", "rundir", "stages"},
    "entries": {"errors", "pipeline", "recipe", "recipe_yaml"},
    "compare": {
        *("errors", "progress", "recipe", "rows", "rundir"),
        *("entries", "pipeline", "stages", "models"),
    },
    "report": {
        *("errors", "metrics", "progress", "recipe", "rows", "rundir", "shards"),
        *("algo", "models", "stages"),
    },
    "demo": {"errors", "progress", "recipe", "recipe_yaml", "entries", "compare"},
    "inspect": {"errors", "models", "recipe", "recipe_yaml", "rundir", "runtime"},
    "lmms": {"errors", "progress", "recipe", "algo", "data", "models", "runtime", "stages"},
    "launchers": {"errors"},
    "plan": {
        *("errors", "progress", "recipe", "rundir", "shards", "shard_writer"),
        *("algo", "data", "methods", "models", "runtime", "stages", "masquant_kernels"),
    },
    "sweep": {"errors", "progress", "recipe", "recipe_yaml", "rundir", "launchers", "pipeline"},
    "cli": {
        *("plan", "sweep", "yaml_marks"),
        *("distributed", "errors", "benchmarks", "metrics", "progress", "recipe", "recipe_yaml"),
        *("pipeline", "entries", "compare", "demo", "report", "masquant_kernels", "bench"),
        *("inspect", "lmms"),
    },
    "__main__": {"cli"},
    "__init__": {"models", "runtime"},
}
STDLIB_TORCH = {*sys.stdlib_module_names, "torch"}


def modules(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it; relative ones are made absolute."""
    package = path.relative_to(SRC if SRC in path.parents else KERNELS).parent.parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join(filter(None, (*up, node.module)))
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def within(path: Path) -> str:
    """Which row of MAY_IMPORT a file of masquant_cli belongs to."""
    return path.relative_to(SRC / "masquant_cli").parts[0].removesuffix(".py")


def is_module(name: str) -> bool:
    package = SRC / "masquant_cli"
    return bool(name) and ((package / name).is_dir() or (package / f"{name}.py").is_file())


def test_the_table_names_what_there_is():
    for here, allowed in MAY_IMPORT.items():
        for name in {here, *allowed} - {"masquant_kernels"}:
            assert is_module(name), name


@pytest.mark.parametrize("path", modules(SRC / "masquant_cli"), ids=lambda p: p.stem)
def test_imports_point_one_way(path):
    here = within(path)
    assert here in MAY_IMPORT, f"say in MAY_IMPORT what {here} may import"
    for name in imported(path):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0] if top == "masquant_cli" else top
        if top not in ("masquant_cli", "masquant_kernels") or target == here:
            continue
        if top == "masquant_cli" and not is_module(target):  # __version__, load_quantized
            continue
        assert target in MAY_IMPORT[here], f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("path", modules(SRC / "masquant_cli" / "algo"), ids=lambda p: p.stem)
def test_algorithms_are_tensor_functions_only(path):
    for name in imported(path):
        allowed = STDLIB_TORCH | {"masquant_kernels"}
        assert name.startswith("masquant_cli.algo") or name.split(".")[0] in allowed, name


@pytest.mark.parametrize("path", modules(KERNELS), ids=lambda p: p.stem)
def test_kernels_know_torch_and_triton_only(path):
    for name in imported(path):
        assert name.split(".")[0] in STDLIB_TORCH | {"triton", "masquant_kernels"}, name


def test_kernels_is_a_folder_and_not_a_package():
    # PyPI has a package `kernels`, and Transformers probes for it.
    assert not (KERNELS / "__init__.py").exists()


def test_nobody_imports_click():
    for path in [*modules(SRC), *modules(KERNELS)]:
        assert not {n for n in imported(path) if n.split(".")[0] == "click"}, path


def test_the_check_itself_sees_relative_and_local_imports(tmp_path, monkeypatch):
    package = tmp_path / "masquant_cli" / "algo"
    package.mkdir(parents=True)
    bad = package / "bad.py"
    bad.write_text("def f():\n    from ..stages import load\n    import click.core\n")
    monkeypatch.setitem(globals(), "SRC", tmp_path)
    assert imported(bad) == {"masquant_cli.stages.load", "click.core"}


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("masquant_cli", ("torch", "transformers", "datasets", "pydantic")),
        ("masquant_cli.cli.app", ("torch", "transformers", "datasets", "pydantic", "rich")),
        ("masquant_cli.recipe_yaml", ("torch", "transformers", "datasets")),
        ("masquant_cli.inspect", ("torch", "transformers", "datasets")),
        ("masquant_kernels", ("masquant_cli", "transformers")),
    ],
)
def test_light_imports_stay_light(module, heavy):
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    path = {"PYTHONPATH": f"{SRC}:{KERNELS}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=path)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
