#!/usr/bin/env bash
# Says in one message all that this machine lacks for the pinned GPU packages, before gigabytes are downloaded.
# Usage: bin/check_gpu.sh [PYTHON]. Exit 1 if something is missing.
set -euo pipefail

python=${1:-python3}
least_driver=580.65 # CUDA 13.0's, which torch 2.11 is built with
least_gib=20        # packages 11 GiB, pip's copies while it unpacks, and a model
missing=()

driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)
if [[ $(printf '%s\n' "$least_driver" "$driver" | sort --version-sort | head -n 1) != "$least_driver" ]]; then
    missing+=("an NVIDIA driver of at least $least_driver (this one is $driver): update it from your distribution")
fi
if ! command -v gcc >/dev/null; then
    missing+=("gcc, with which Triton builds its launchers: apt-get install gcc")
fi
header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))' 2>/dev/null)/Python.h || true
if [[ ! -f $header ]]; then
    missing+=("Python's headers, which Triton's launchers include ($header): apt-get install python3-dev")
fi
free_gib=$(($(df --output=avail --block-size=1M . | tail -n 1) / 1024))
if ((free_gib < least_gib)); then
    missing+=("$least_gib GiB of free disk here (there are $free_gib)")
fi

if ((${#missing[@]})); then
    echo "This machine has an NVIDIA GPU, but the GPU packages need:"
    printf -- '- %s\n' "${missing[@]}"
    exit 1
fi >&2
