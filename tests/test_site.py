"""The site of the docs builds without warnings, loads nothing from elsewhere, and has a search that
works from a folder."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runs.screenshots import browser_page

ROOT = Path(__file__).parents[1]
LOADS = re.compile(  # what a browser fetches by itself; a link waits for a click
    r"""<(?:script|img|iframe|source|video)\b[^>]*\bsrc=["']?([^"'\s>]+)"""
    r"""|<link\b(?=[^>]*\brel=["']?(?:stylesheet|icon|preconnect|preload|manifest))[^>]*\bhref=["']?([^"'\s>]+)"""
    r"""|@import\s+["']([^"']+)|\burl\(["']?([^"')]+)"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="needs the extra `docs`")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not built.returncode, built.stderr
    return folder


def remote(text: str) -> list[str]:
    """The addresses on other hosts from which a page or a style sheet loads something."""
    addresses = ["".join(groups) for groups in LOADS.findall(text)]
    return [address for address in addresses if re.match(r"(https?:)?//", address)]


def test_remote_addresses_are_detected() -> None:
    assert remote('<script src="https://a.org/x.js"></script><a href="https://b.org">b</a>') == [
        "https://a.org/x.js"
    ]
    assert remote("<link rel=stylesheet href=//c.org/y.css>") == ["//c.org/y.css"]
    assert remote("@font-face{src:url(https://d.org/z.woff)}") == ["https://d.org/z.woff"]
    assert not remote('<link rel="next" href="https://e.org"><img src="f.png">')


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = [page for kind in ("html", "css") for page in site.rglob(f"*.{kind}")]
    assert len(pages) > 30
    loads = {page.name: remote(page.read_text("utf-8")) for page in pages}
    assert not {name: found for name, found in loads.items() if found}


@pytest.mark.skipif(
    (shutil.which("chromium") or shutil.which("google-chrome")) is None,
    reason="no Chromium on this machine",
)
def test_a_word_in_the_search_leads_to_its_page(site: Path) -> None:
    asked: list[str] = []
    with browser_page("en-GB") as page:
        page.on("request", lambda request: asked.append(request.url))
        page.goto((site / "index.html").as_uri())
        page.locator(".md-search__input").press_sequentially("Hounsfield")
        page.locator(".md-search-result__item a").first.click()
        page.wait_for_url("**/data.html*")
        assert "Hounsfield" in page.locator("article").inner_text()
    assert asked
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked)
