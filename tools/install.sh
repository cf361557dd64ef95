#!/bin/sh
# Make VENV able to run masquant from this checkout: install.sh PYTHON VENV TORCH TORCH_VERSION
# `make` calls it, and not again until pyproject.toml or this file changes.
set -eu
python=$1 venv=$2 torch=$3 torch_version=$4

case $torch in auto | cpu | cuda) ;; *)
    echo "TORCH is auto, cpu or cuda, not '$torch'" >&2
    exit 1
    ;;
esac

torch_in() { # the version of torch that interpreter $1 has, if masquant can use it
    "$1" - <<'PY' 2>/dev/null
import importlib.metadata, re, sys
version = importlib.metadata.version("torch")
print(version)
sys.exit(tuple(map(int, re.findall(r"\d+", version)[:2])) < (2, 11))
PY
}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "masquant needs Python 3.11 or newer, '$python' is $("$python" -V 2>&1);" \
        "try make PYTHON=python3.12" >&2
    exit 1
}
if [ ! -x "$venv/bin/python" ]; then
    outside=
    if [ "$torch" = auto ] && torch_in "$python" >/dev/null; then
        outside=--system-site-packages # that torch is used where it is
    fi
    "$python" -m venv $outside "$venv"
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

if version=$(torch_in "$venv/bin/python"); then
    echo "torch $version is installed and stays as it is"
elif [ -n "$version" ]; then
    echo "$venv has torch $version, masquant needs 2.11: update it or use another environment" >&2
    exit 1
else
    if [ "$torch" = auto ]; then
        if nvidia-smi -L >/dev/null 2>&1; then torch=cuda; else torch=cpu; fi
    fi
    case $torch-$(uname -s) in
        # Only a CPU build has "+cpu" in its version, so no index can turn it into the CUDA one.
        # Its dependencies come with ours below: the extra index is asked for torch alone.
        cpu-Linux) pip install --no-deps --no-compile --retries 1 "torch==$torch_version+cpu" \
            --extra-index-url https://download.pytorch.org/whl/cpu ;;
        cpu-* | cuda-*) pip install "torch==$torch_version" ;;
    esac
    version=$(torch_in "$venv/bin/python")
fi

# The dependencies must not replace the torch that was just chosen.
echo "torch==$version" >"$venv/masquant-constraints.txt"
# Without build isolation a second install needs no network.
pip install "hatchling>=1.27" editables
pip install --no-compile --no-build-isolation --constraint "$venv/masquant-constraints.txt" --editable '.[dev]'
