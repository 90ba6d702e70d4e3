"""A page as its reader meets it: text and tags, and what a real browser makes of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

NEEDS_CHROMIUM = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium: apt-get install chromium")
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags nest, and keeps text and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text.replace("<wbr>", ""))  # a place where a word may break
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def assert_nothing_comes_from_outside(self, text: str) -> None:
        for tag, attributes in self.tags:
            assert tag not in ("link", "iframe")
            for name in ("src", "href") if tag != "a" else ():
                assert (attributes.get(name) or "data:").startswith("data:")
        assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text) == []
        assert "@import" not in text
        assert "url(" not in text
        assert "default-src 'none'" in text


def in_browser(folder: Path, text: str, expression: str, *, width: int = 1200) -> str:
    """What the JavaScript `expression` is in a window of `width` pixels, 1.5 s after the page is there."""
    probe = (
        "<script>addEventListener('load', () => setTimeout(() => { document.title = 'probe:' + ("
        f"{expression}); }}, 1500));</script></body>"
    )
    (folder / "probe.html").write_text(text.replace("</body>", probe), encoding="utf-8")
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    size = [f"--window-size={width},900", "--virtual-time-budget=4000"]
    command = [*browser, *size, "--dump-dom", (folder / "probe.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r"<title>probe:(.*?)</title>", dom, re.DOTALL)
    assert found is not None, dom[:500]
    return unescape(found.group(1))
