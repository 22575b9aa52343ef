#!/usr/bin/env bash
# Says in one message all that this machine lacks, before gigabytes are downloaded. With a GPU (nvidia-smi works) more is needed.
# Usage: bin/check_machine.sh PYTHON. Exit 1 if something is missing.
set -euo pipefail

python=${1:-}
missing=()

if [[ -z $python ]] || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    missing+=("Python 3.11 or newer: apt-get install python3, or make PYTHON=/path/to/python")
else
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        missing+=("Python's venv module: apt-get install python3-venv")
    fi
    header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
    if [[ ! -f $header ]]; then # pycosat, which reasoning-gym needs, comes as source only; Triton compiles at run time
        missing+=("Python's headers ($header): apt-get install python3-dev")
    fi
fi
if ! command -v gcc >/dev/null; then
    missing+=("gcc: apt-get install gcc")
fi

least_gib=8 # PyTorch's ordinary Linux build brings its CUDA libraries along even where there is no GPU
if driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1); then
    least_gib=20        # packages 11 GiB, pip's copies while it unpacks, and a model
    least_driver=580.65 # CUDA 13.0's, which torch 2.11 is built with
    if [[ $(printf '%s\n' "$least_driver" "$driver" | sort --version-sort | head -n 1) != "$least_driver" ]]; then
        missing+=("an NVIDIA driver of at least $least_driver (this one is $driver): update it from your distribution, under WSL2 in Windows")
    fi
fi
free_gib=$(($(df --output=avail --block-size=1M . | tail -n 1) / 1024))
if ((free_gib < least_gib)); then
    missing+=("$least_gib GiB of free disk here (there are $free_gib)")
fi

if ((${#missing[@]})); then
    echo "To install the packages this machine needs:"
    printf -- '- %s\n' "${missing[@]}"
    exit 1
fi >&2
