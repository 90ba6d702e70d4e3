"""The documentation as a whole: its links, its pages that are made of code, its imports, and the strict build."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from tests.unit.html_page import NEEDS_CHROMIUM, in_browser
from tests.unit.test_packaging import ROOT, load_tool
from vla_rl.train.metric_dictionary import GROUPS, metric_names

DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "results" not in page.relative_to(DOCS).parts)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")

reference = load_tool("make_reference")
hooks = load_tool("docs_hooks")


def prose(page: Path) -> str:
    """The page without fenced and inline code."""
    return re.sub(r"`[^`\n]*`", "`code`", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE))


def anchors(page: Path) -> set[str]:
    """Of its headings, as the site and its like make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M), flags=re.M)
    plain = (re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower() for heading in headings)
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


# ------------------------------------------------------------------------------------------------------ links and nav
@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "ARCHITECTURE.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path):
    for target in LINK.findall(prose(page)):
        assert not target.startswith(("http:", "/")), target
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert file.is_relative_to(ROOT), f"{page.name} links to {target}, outside of the checkout"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}, which has no such heading"


def test_every_page_is_in_the_navigation():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = [page for entry in settings["nav"] for value in entry.values() for page in _pages_of(value)]
    assert len(listed) == len(set(listed))
    assert set(listed) == {page.relative_to(DOCS).as_posix() for page in PAGES} | {"architecture.md"}


def _pages_of(value: str | list) -> list[str]:
    return [value] if isinstance(value, str) else [page for entry in value for page in entry.values()]


@pytest.mark.parametrize(
    ("page", "link", "shown"),
    [
        ("index.md", "[a](../ARCHITECTURE.md)", "[a](architecture.md)"),
        ("concepts/warm_start.md", "[a](../../ARCHITECTURE.md#the-picture)", "[a](../architecture.md#the-picture)"),
        ("concepts/warm_start.md", "[a](../../README.md)", "[a](../index.md)"),
        ("concepts/warm_start.md", "[the file](../../envs/vector.py)", "the file"),
        ("concepts/warm_start.md", "[a](../metrics.md#learning)", "[a](../metrics.md#learning)"),
        ("index.md", "[a](../nowhere.py)", "[a](../nowhere.py)"),  # which the strict build finds
        ("index.md", "[a](https://a.example/x)", "[a](https://a.example/x)"),
        ("../ARCHITECTURE.md", "[a](docs/metrics.md)", "[a](metrics.md)"),
    ],
)
def test_links_beyond_the_site(page: str, link: str, shown: str):
    uri = "architecture.md" if page.startswith("..") else page
    found = hooks._LINK.fullmatch(link)
    assert found is not None
    assert hooks.site_link(found, uri, Path(os.path.normpath(DOCS / page)), DOCS) == shown


# ------------------------------------------------------------------------------------------------------ made of code
@pytest.mark.parametrize("name", reference.PAGES)
def test_reference_is_in_step_with_the_code(name: str):
    assert (DOCS / name).read_text() == reference.PAGES[name](), "run: make reference"


def test_every_config_of_a_recipe_explains_itself():
    configs = {config for root in reference.ROOTS for config in reference.walk(root)}
    assert len(configs) > 60
    undocumented = [c.__name__ for c in configs if (c.__doc__ or "").startswith(f"{c.__name__}(")]
    assert undocumented == [], "these have no docstring but the one that dataclass makes of the fields"


def test_config_reference_shows_types_and_defaults():
    @dataclasses.dataclass(frozen=True)
    class Inner:
        """Inner."""

        size: int = 3

    @dataclasses.dataclass(frozen=True)
    class Outer:
        """Outer: what it is."""

        rate: float
        names: tuple[str, ...] = ("a",)
        inner: Inner = dataclasses.field(default_factory=lambda: Inner(4))
        limit: int | None = None

    Outer.__annotations__ |= {"inner": Inner}  # names of a function's own classes cannot be looked up
    section = reference.section(Outer, ["train.outer"])
    assert section.splitlines()[0] == "### Outer"
    assert "at `train.outer`" in section
    assert "Outer: what it is." in section
    for row in (
        "| `rate` | float | must be given |",
        "| `names` | tuple of str | `('a',)` |",
        "| `inner` | [Inner](#inner) | `Inner(size=4)` |",
        "| `limit` | int or None | `None` |",
    ):
        assert row in section


def test_metric_dictionary_has_no_name_twice():
    for group in GROUPS:
        names = [name for metric in group.metrics for name in metric.names]
        twice = {name for name in names if names.count(name) > 1}
        # one number, which each of two algorithms makes its own way
        assert twice <= {"update/distillation"}, group.title
    assert {"iteration", "update/ratio_error_first", "eval/success_rate_low", "update/q_data"} <= metric_names()


# -------------------------------------------------------------------------------------------------- code on all pages
@pytest.mark.parametrize("page", [p for p in PAGES if "```py" in p.read_text()], ids=lambda p: p.stem)
def test_what_a_page_imports_is_there(page: Path):
    """Of pages whose listings need a server or another simulator too: names move, and listings are forgotten."""
    found = 0
    for listing in re.findall(r"^```(?:python|py)\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE):
        for node in ast.walk(ast.parse(listing)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vla_rl"):
                module = importlib.import_module(node.module or "")
                assert [a.name for a in node.names if not hasattr(module, a.name)] == [], node.module
                found += 1
    assert found


# ---------------------------------------------------------------------------------------------------------- the build
class _Loaded(HTMLParser):
    """What a page loads by itself, and its links."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "img", "iframe", "video", "source"):
            self.loads.append(values.get("src") or "")
        elif tag == "link" and values.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(values.get("href") or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + done.stdout
    return folder


def test_strict_build_has_every_page(site: Path):
    for page in PAGES:
        assert (site / page.relative_to(DOCS)).with_suffix(".html").exists(), page
    assert "chunk contract" in (site / "architecture.html").read_text()
    assert "ratio_error_first" in (site / "search" / "search_index.js").read_text()


def test_site_asks_the_network_for_nothing(site: Path):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        found = _Loaded()
        found.feed(page.read_text())
        assert [x for x in found.loads if re.match(r"(https?:)?//", x)] == [], page.name
        local = [x.partition("?")[0] for x in found.loads if x and not x.startswith("data:")]
        if page.name != "404.html":  # whose links are absolute: a server's answer to any address
            assert [x for x in local if not (page.parent / x).exists()] == [], page.name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?(https?:)?//", sheet.read_text()), sheet.name


@NEEDS_CHROMIUM
def test_search_works_from_a_folder(site: Path, tmp_path: Path):
    """Opened as a file, where a browser starts no worker."""
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    address = (site / "index.html").as_uri() + "?q=likelihood"
    command = [*browser, "--virtual-time-budget=20000", "--dump-dom", address]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'md-search-result__meta">(\d+) matching documents', dom)
    assert found is not None
    assert int(found[1]) >= 3


@NEEDS_CHROMIUM
@pytest.mark.parametrize("page", ["index.html", "configs.html"])
def test_pages_fit_a_phone(site: Path, page: str):
    text = (site / page).read_text()
    widths = in_browser(site, text, "document.documentElement.scrollWidth + ' ' + window.innerWidth", width=500)
    wide, window = map(int, widths.split())
    assert wide <= window
