#!/usr/bin/env bash
# Makes .venv ready for a level of use, from nothing: `tools/setup.sh demo` (what the main job needs) or
# `tools/setup.sh dev` (that and the test tools). When .venv is ready, it needs neither the network nor another Python.
#
# Bash, because there may be no Python yet: it finds one (as root on Debian it installs one), and environment.py goes on.
# PYTHON=/path/to/python3.12 chooses the Python that .venv is made with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
LEVEL=${1:?usage: tools/setup.sh demo|dev}
SUPPORTED="3.11 3.12 3.13" # requires-python of pyproject.toml
unset PYTHONPATH PYTHONHOME # a ROS or conda shell sets them; .venv stands alone

fail() {
    printf '%s\n' "$@" >&2
    exit 1
}

version_of() { "$1" -I -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

is_supported() { [[ -n $1 && " $SUPPORTED " == *" $1 "* ]]; }

# Sets FOUND to a supported Python outside of .venv (an activated .venv must not be asked to rebuild itself), or to "",
# and SEEN to what was there instead.
find_python() {
    FOUND="" SEEN=""
    local name path version
    for name in "$@"; do
        while IFS= read -r path; do
            case $path in "$PWD/.venv/"*) continue ;; esac
            version=$(version_of "$path")
            if is_supported "$version"; then
                FOUND=$path
                return 0
            fi
            [[ -z $version ]] || SEEN+="${SEEN:+, }$path is Python $version"
        done < <(type -ap "$name" || true)
    done
}

if [[ -n ${PYTHON:-} ]]; then
    find_python "$PYTHON"
    [[ -n $FOUND ]] || fail "PYTHON=$PYTHON is not a usable Python: ${SEEN:-it does not run}." \
        "vla-rl needs one of Python $SUPPORTED; give the path of one, e.g. make PYTHON=/usr/bin/python3.12 demo"
    export VLA_RL_PYTHON_VERSION
    VLA_RL_PYTHON_VERSION=$(version_of "$FOUND")
fi

if [[ -x .venv/bin/python ]] && .venv/bin/python -I tools/environment.py is-ready "$LEVEL" 2>/dev/null; then
    exit 0
fi

if [[ -z ${PYTHON:-} ]]; then
    find_python python3 python3.13 python3.12 python3.11 python
    if [[ -z $FOUND && -z $SEEN && $EUID == 0 ]] && command -v apt-get >/dev/null; then
        echo "[set-up] no Python here: installing Debian's"
        apt-get -qq update || true
        DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends python3 python3-venv >/dev/null
        hash -r
        find_python python3
    fi
fi
if [[ -z $FOUND && -z $SEEN ]]; then
    fail "vla-rl needs one of Python $SUPPORTED, and there is no Python here." \
        "Install it, then run the same command again:" "    sudo apt-get install python3 python3-venv"
elif [[ -z $FOUND ]]; then
    fail "vla-rl needs one of Python $SUPPORTED, and there is only: $SEEN." \
        "Install one of these, then run the same command again (or name it: make PYTHON=/path/to/python3.12 demo)"
fi
exec "$FOUND" -I tools/environment.py make-ready "$LEVEL"
