#!/usr/bin/env bash
# Puts bitsandbytes, with the library for CUDA 13.0 alone, into a folder that may travel to a machine without network:
#   tools/gpu_peer.sh [DIR]      (default: .peer; gpu_check.sh there puts it on PYTHONPATH)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$root/.peer}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3}" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: \
	--platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux2014_x86_64 \
	-d "$scratch" "bitsandbytes${BITSANDBYTES_VERSION:+==$BITSANDBYTES_VERSION}"
mkdir -p "$folder"
"${PYTHON:-python3}" - "$scratch" "$folder" << 'END'
import pathlib, sys, zipfile

wheel = next(pathlib.Path(sys.argv[1]).glob("*.whl"))
with zipfile.ZipFile(wheel) as archive:
    for name in archive.namelist():
        if not name.endswith(".so") or name.endswith(("_cuda130.so", "_cpu.so")):
            archive.extract(name, sys.argv[2])
print(wheel.name)
END
du -sh "$folder"
