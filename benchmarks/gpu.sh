#!/bin/bash
# Benchmarks on one GPU of 80 GB or more, in two parts of at most 4 minutes each:
#   benchmarks/gpu.sh wheels      first, where there is a network: fills build/gpu-wheels
#   benchmarks/gpu.sh functions   there: functions beside plain code, recorder, tiny families
#   benchmarks/gpu.sh models      there: Kontext and klein-9B at full size with random weights
# Results are benchmarks/gpu.json and gpu.md. Further words go to python -m benchmarks.gpu, such as
# --tiny --device cpu. That machine needs torch, transformers and peft; build/gpu-wheels travels with
# this folder. For wheels, GPU_PYTHON is its version of Python, such as 3.12, where it differs from
# here, and GPU_CUDA its CUDA, such as 128: bitsandbytes is then 4 to 10 MB instead of 43.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(dirname "$here")"
python="${PYTHON:-python3}"
wheels="$root/build/gpu-wheels"
site="$root/build/gpu-site"

if [ "${1:-}" = wheels ]; then
    version="${GPU_PYTHON:-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')}"
    rm -rf "$wheels"
    "$python" -m pip download --quiet --no-deps --only-binary :all: --dest "$wheels" \
        --python-version "$version" --platform manylinux2014_x86_64 --platform manylinux_2_24_x86_64 \
        --platform manylinux_2_28_x86_64 --constraint "$root/constraints.txt" \
        --requirement "$here/gpu_wheels.txt"
    "$python" - "$wheels" "${GPU_CUDA:-}" <<'PROGRAM'
import sys
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

folder, cuda = sys.argv[1:]
for path in Path(folder).glob("bitsandbytes-*.whl") if cuda else ():
    whole = path.rename(path.with_suffix(".whole"))
    with ZipFile(whole) as source, ZipFile(path, "w", ZIP_DEFLATED) as target:
        kept = (f"cuda{cuda}.so", "cpu.so")
        for entry in source.infolist():
            if "/libbitsandbytes_" not in entry.filename or entry.filename.endswith(kept):
                target.writestr(entry, source.read(entry))
    whole.unlink()
PROGRAM
    du -sh "$wheels"
    exit
fi

mkdir -p "$site"
ln -sfn "$root/examples" "$site/mteditflow_examples"
export PYTHONPATH="$root:$site${PYTHONPATH:+:$PYTHONPATH}"
missing="$("$python" - "$here/gpu_wheels.txt" <<'PROGRAM'
import sys
from importlib.metadata import PackageNotFoundError, version

for line in open(sys.argv[1]):
    name = line.partition("#")[0].strip()
    try:
        name and version(name)
    except PackageNotFoundError:
        print(name)
PROGRAM
)"
if [ -n "$missing" ] && [ -d "$wheels" ]; then
    # shellcheck disable=SC2086  # names, one word each
    "$python" -m pip install --quiet --no-deps --no-index --find-links "$wheels" --target "$site" \
        --upgrade $missing
fi
exec "$python" -m benchmarks.gpu "$@"
