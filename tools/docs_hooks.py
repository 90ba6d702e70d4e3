"""What mkdocs does besides for this project: pages and links beyond docs/.

`ARCHITECTURE.md` becomes a page. Links to it and to the README lead to their pages; those to source files become plain
text, since the site does not hold the sources. A link to a file that is not there stays, and the strict build fails.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_PAGES = {"ARCHITECTURE.md": "architecture.md", "README.md": "index.md"}  # of the checkout's root -> of the site
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    root = Path(config.docs_dir).parent
    files.append(File.generated(config, "architecture.md", abs_src_path=str(root / "ARCHITECTURE.md")))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    docs = Path(config.docs_dir)
    return _LINK.sub(
        lambda link: site_link(link, page.file.src_uri, Path(page.file.abs_src_path or ""), docs), markdown
    )


def site_link(link: re.Match[str], uri: str, source: Path, docs: Path) -> str:
    """`link` of the page `uri`, which is made of the file `source`, as the site has it."""
    text, target, anchor = link[1], link[2], link[3] or ""
    if re.match(r"[a-z]+:", target):
        return link[0]
    path = Path(os.path.normpath(source.parent / target))
    if path.is_relative_to(docs):
        page = path.relative_to(docs).as_posix()
    elif path.exists() and path.is_relative_to(docs.parent):
        named = path.relative_to(docs.parent).as_posix()
        if named not in _PAGES:
            return text
        page = _PAGES[named]
    else:
        return link[0]
    return f"[{text}]({os.path.relpath(page, Path(uri).parent)}{anchor})"
