#!/usr/bin/env bash
# Puts Mesa's software Vulkan driver (25.0, of Debian bookworm-backports) into runs/vulkan, without root and without
# touching the system's own Mesa, which ManiSkill refuses on Debian 12. `vla_rl/vulkan.py` finds it there. On another
# system, install its own Mesa 23 or newer instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if compgen -G "runs/vulkan/usr/share/vulkan/icd.d/lvp_icd*.json" >/dev/null; then
    echo "the driver is in runs/vulkan already; remove the folder to fetch it again"
    exit 0
fi
if ! [[ -r /usr/share/keyrings/debian-archive-keyring.gpg ]] || ! command -v apt-get >/dev/null; then
    echo "this takes the driver from Debian's packages, and this is no Debian: install your system's Mesa 23 or newer," >&2
    echo "with its Vulkan drivers (mesa-vulkan-drivers, vulkan-swrast, ...) and the Vulkan loader" >&2
    exit 1
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/debs" "$work/root" runs
for suite in bookworm-backports bookworm; do
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian $suite main"
done >"$work/sources.list"
apt() {
    apt-get -q -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=- \
        -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache" -t bookworm-backports "$@"
}
apt update
mapfile -t packages < <(apt -s install mesa-vulkan-drivers libvulkan1 | awk '/^Inst/ {print $2}')
if ((${#packages[@]} == 0)); then
    echo "the system's own packages are as new: nothing to fetch" >&2
    exit 0
fi
(cd "$work/debs" && apt download "${packages[@]}")
for package in "$work"/debs/*.deb; do dpkg -x "$package" "$work/root"; done
rm -rf runs/vulkan
mv "$work/root" runs/vulkan
ls runs/vulkan/usr/share/vulkan/icd.d/lvp_icd*.json
