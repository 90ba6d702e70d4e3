#!/usr/bin/env bash
# Puts Mesa's software Vulkan driver (25.0, of Debian bookworm-backports) into runs/vulkan, without root and without
# touching the system's own Mesa, which ManiSkill refuses on Debian 12. The benchmarks find it there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/debs" runs/vulkan
for suite in bookworm-backports bookworm; do
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian $suite main"
done >"$work/sources.list"
apt() {
    apt-get -q -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=- \
        -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache" -t bookworm-backports "$@"
}
apt update
mapfile -t packages < <(apt -s install mesa-vulkan-drivers libvulkan1 | awk '/^Inst/ {print $2}')
(cd "$work/debs" && apt download "${packages[@]}")
for package in "$work"/debs/*.deb; do dpkg -x "$package" runs/vulkan; done
ls runs/vulkan/usr/share/vulkan/icd.d/lvp_icd*.json
