#!/bin/sh
# Run benchmarks/cuda.py on a machine without network: install from a folder of wheels what is missing there.
#
#     benchmarks/cuda.sh WHEELS [OPTIONS OF cuda.py]
#
# A package counts as missing if it is not there or older than this project asks for. Wheels go to a folder of their
# own, made for this run, and nothing of the machine's own packages is changed. PYTHON names another interpreter.
set -eu
if [ $# -lt 1 ] || [ ! -d "$1" ]; then
    echo "usage: benchmarks/cuda.sh WHEELS [OPTIONS OF cuda.py]; WHEELS is a folder" >&2
    exit 2
fi
wheels=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
missing=$("$python" benchmarks/gpu/missing.py "$wheels")
if [ -n "$missing" ]; then
    echo "installing for this run: $missing" >&2
    # Their needs are in the folder or on the machine; what is not shows at import, by name.
    # shellcheck disable=SC2086
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" $missing
fi
PYTHONPATH="$site:$PWD${PYTHONPATH:+:$PYTHONPATH}" "$python" -u benchmarks/cuda.py "$@"
