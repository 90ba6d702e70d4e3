#!/usr/bin/env bash
# Runs tests/FOLDER/NAME.py as a module, or lists the names there are.
# Usage: tools/run_named.sh benchmarks|experiments NAME argument...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$1 name=${2:-}
shift $(($# < 2 ? $# : 2))

# A file that can be run says so; helpers beside it have no __main__ line.
names=$(grep -l '__name__ == "__main__"' "tests/$folder"/*.py 2>/dev/null | sed 's#.*/##; s#\.py$##' | sort || true)
if [[ -z $name ]] || ! grep -qxF -- "$name" <<<"$names"; then
    [[ -z $name ]] || echo "There is no NAME=$name in tests/$folder." >&2
    {
        echo "Give NAME one of:"
        sed 's/^/    NAME=/' <<<"${names:-(none yet)}"
    } >&2
    exit 2
fi
exec .venv/bin/python -m "tests.$folder.$name" "$@"
