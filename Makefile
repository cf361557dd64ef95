# `make demo` and `make test` set everything up by themselves, once; later they need no network.
#
#   TORCH=auto   an installed torch is used as it is; else CUDA where nvidia-smi works, else CPU
#   TORCH=cpu    never CUDA          TORCH=cuda   always PyPI's default, the CUDA build
#
# An active virtual environment is used; otherwise .venv is made.

TORCH ?= auto
TORCH_VERSION ?= 2.13.0
PYTHON ?= python3
VENV ?= $(or $(VIRTUAL_ENV),.venv)
BIN := $(VENV)/bin
STAMP := $(VENV)/.masquant-installed

.PHONY: help demo test lint format install wheel clean gpu-check gpu-compile readme-table evidence scale

help:
	@echo "make demo     quantize the embedded model four ways and compare"
	@echo "make test     run the tests              (ARGS='-k recipe' to choose)"
	@echo "make lint     ruff, check only           make format: ruff, in place"
	@echo "make evidence  all methods x all bits, measured; under 40 minutes; docs/evidence.md"
	@echo "make scale    time and memory against a forward pass and another tool; docs/scale.md"
	@echo "make gpu-compile  every kernel for every GPU, without one; reads the machine code"
	@echo "make gpu-check  the kernels on this GPU: right, then how fast; under 10 minutes"
	@echo "make install  only set up $(VENV)        (TORCH=auto|cpu|cuda)"
	@echo "make wheel    build dist/*.whl"
	@echo "make clean    remove caches and builds; $(VENV) and runs/ stay"

demo: install
	$(BIN)/masquant demo $(ARGS)

# A file at a time on each core; more than one thread per worker would only fight for them.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMP)

$(STAMP): pyproject.toml tools/install.sh
	sh tools/install.sh "$(PYTHON)" "$(VENV)" "$(TORCH)" "$(TORCH_VERSION)"
	@touch $@

wheel: install
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

# Runs from a checkout: an installed torch, triton and Transformers are all it needs.
RUN_WITH := $(or $(wildcard $(BIN)/python),$(PYTHON))

# The sweep of every tile takes some 25 minutes of one core; ARGS='--quick' or --arch 90 are less.
gpu-compile: install
	$(BIN)/python -m masquant_kernels.gpu.offline $(ARGS)

gpu-check:
	$(RUN_WITH) tools/gpu_check.py $(ARGS)

# Resumable; ARGS='--quick' is one cell per method, '--plan' only lists what is to do.
evidence:
	$(RUN_WITH) tools/evidence/run.py $(ARGS)
	$(RUN_WITH) tools/readme_table.py

# Resumable by part: ARGS='peers --other ENV/bin/python', whose environment has llm-compressor.
scale:
	$(RUN_WITH) tools/scale/run.py $(or $(ARGS),all)

readme-table:
	$(RUN_WITH) tools/readme_table.py

clean:
	rm -rf build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
