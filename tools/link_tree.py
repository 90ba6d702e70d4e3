"""Lays out `.typing/vla_rl` as the wheel has it, with links: type checkers do not see through an editable install.

`.typing/vla_rl/core.py -> ../../vla_rl/core.py`, `.typing/vla_rl/envs -> ../../envs`, and so on after `package-dir` of
pyproject.toml. Usage: link_tree.py [root of the checkout]
"""

from __future__ import annotations

import os
import shutil
import sys
import tomllib
from pathlib import Path


def wanted_links(root: Path) -> dict[str, Path]:
    """Name in the link tree (`vla_rl/envs`) to what it stands for (`root/envs`)."""
    tables = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    package_dir: dict[str, str] = tables["tool"]["setuptools"]["package-dir"]
    places = {name.replace(".", "/"): root / folder for name, folder in package_dir.items()}
    links: dict[str, Path] = {}
    for name, folder in places.items():
        if not any(other.startswith(f"{name}/") for other in places):
            links[name] = folder  # nothing is laid into it from elsewhere: one link for the whole folder
            continue
        links |= {f"{name}/{entry.name}": entry for entry in folder.iterdir() if entry.name != "__pycache__"}
    return links


def make_link_tree(root: Path) -> Path:
    """Brings `.typing` up to date and returns it. What is right stays: another check may be reading it."""
    tree = root / ".typing"
    links = wanted_links(root)
    folders = {str(parent) for name in links for parent in Path(name).parents}
    for path in sorted(tree.rglob("*"), reverse=True):
        name = path.relative_to(tree).as_posix()
        if name in links and path.is_symlink() and path.resolve() == links[name].resolve():
            continue
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif name not in folders:
            shutil.rmtree(path)
    for name, target in links.items():
        link = tree / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(target, link.parent), target_is_directory=target.is_dir())
    return tree


if __name__ == "__main__":
    make_link_tree(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent)
