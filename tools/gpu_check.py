"""`make gpu-check`: correctness and timings of the kernels on this machine's GPU.

Runs from a checkout, without installing: python tools/gpu_check.py. Needs torch, triton and, for
the whole model, Transformers. What it does is in src/masquant_cli/bench/gpu_check.py.
"""

import importlib.util
import sys
import types
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "kernels")]
if importlib.util.find_spec("torch") is None:
    print("error: torch is not installed\n  hint: make gpu-check PYTHON=...", file=sys.stderr)
    sys.exit(3)
if importlib.util.find_spec("wrapt") is None:
    # masquant_cli registers itself with Transformers through it; nothing is loaded from disk here.
    stand_in = types.ModuleType("wrapt")
    stand_in.when_imported = lambda _name: lambda function: function
    sys.modules["wrapt"] = stand_in

from masquant_cli.bench.gpu_check import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
