"""Lays out `build/typing/vla_rl` as the wheel has it: type checkers do not see through an editable install.

`build/typing/vla_rl/core.py` stands for `vla_rl/core.py`, `build/typing/vla_rl/envs/gym.py` for `envs/gym.py` and so
on, after `package-dir` of pyproject.toml. The folders are real and the files are links: pyright silently passes by
links to folders. Usage: link_tree.py [root of the checkout]
"""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path

TREE = Path("build/typing")


def wanted_links(root: Path) -> dict[Path, Path]:
    """Link, below the tree, to the source file that it stands for: `vla_rl/envs/gym.py` to `root/envs/gym.py`."""
    tables = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    package_dir: dict[str, str] = tables["tool"]["setuptools"]["package-dir"]
    links: dict[Path, Path] = {}
    for package, folder in package_dir.items():
        for source in (root / folder).rglob("*.py"):
            links[Path(package.replace(".", "/")) / source.relative_to(root / folder)] = source
    return links


def make_link_tree(root: Path) -> Path:
    """Brings the tree up to date and returns it. What is right stays: another check may be reading it."""
    tree = root / TREE
    links = wanted_links(root)
    for path in sorted(tree.rglob("*"), reverse=True):  # what is in a folder before the folder
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif not path.is_symlink() or links.get(path.relative_to(tree)) != path.resolve():
            path.unlink()
    for name, source in links.items():
        link = tree / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(source, link.parent))
    return tree


if __name__ == "__main__":
    make_link_tree((Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent).resolve())
