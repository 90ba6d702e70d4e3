#!/usr/bin/env bash
# Installs Debian's Chromium, in which tests look at reports and the documentation, where it is missing.
set -euo pipefail
if command -v chromium >/dev/null; then
    exit 0
fi
if [[ $EUID != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "no chromium here: tests of pages are skipped; on Debian: sudo apt-get install chromium" >&2
    exit 0
fi
apt-get -qq update
DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium >/dev/null
chromium --version
