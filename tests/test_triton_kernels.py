"""Runs triton_checks.py, the Triton kernels on CPU tensors, in a process of its own.

Triton looks at TRITON_INTERPRET once, when it is imported: in this process it must stay off for
the tests that compile kernels, and something may have imported Triton before.
"""

import ast
import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

CHECKS = Path(__file__).with_name("triton_checks.py")
NAMES = [
    node.name
    for node in ast.parse(CHECKS.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, list[str | None]]:
    """{check: for each of its cases None or what went wrong}"""
    report = tmp_path_factory.mktemp("triton") / "report.xml"
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(CHECKS)]
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=CHECKS.parents[1],
        capture_output=True,
        text=True,
    )
    assert report.exists(), done.stdout + done.stderr
    found: dict[str, list[str | None]] = {}
    for case in ET.parse(report).iter("testcase"):
        name = case.get("name", "")
        wrong = [f"{name}\n{child.text}" for child in case]  # failure, error or skipped
        found.setdefault(name.partition("[")[0], []).append("\n".join(wrong) or None)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_interpreted(outcomes, name):
    cases = outcomes.get(name)
    assert cases, f"{name} did not run"
    wrong = [case for case in cases if case is not None]
    assert not wrong, f"{len(wrong)} of {len(cases)} cases:\n" + "\n".join(wrong)
