"""The built site: links, pictures, mathematics and examples as files, and the pages in headless Chromium at two widths.

Screenshots of the whole pages are in docs/_build/screenshots afterwards.

The site is the one that `make docs` built last. If there is none, it is built here.
"""

from __future__ import annotations

import doctest
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest

import softk

ROOT = Path(__file__).parent.parent
SITE = ROOT / "docs" / "_build" / "html"
SCREENSHOTS = ROOT / "docs" / "_build" / "screenshots"
WIDTHS = {"phone": (390, 844), "desktop": (1280, 900)}
SHOWN = {
    "search": ("search.html?q=threshold", "#search-results a[href*='softk.threshold']"),
    "softk.topk": ("generated/softk.topk.html", "article dt"),
}
"""More pages that are shown, and what must be on them. The search page is blank without a query."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Page(HTMLParser):
    """The links, resources, anchors and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.anchors: set[str] = set()
        self.text: list[str] = []
        self.formulas = 0
        self._code = 0
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what the element refers to."""
        values = {name: value for name, value in attrs if value}
        if "id" in values:
            self.anchors.add(values["id"])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in ("img", "script", "source", "iframe"):
            self.resources += [values[name] for name in ("src", "srcset") if name in values]
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload"):
            self.resources.append(values["href"])
        self.formulas += tag == "math"
        self._code += tag in ("pre", "code", "script", "style")

    def handle_endtag(self, tag: str) -> None:
        """Note where code ends."""
        self._code -= tag in ("pre", "code", "script", "style")

    def handle_data(self, data: str) -> None:
        """Note text that is not code."""
        if not self._code:
            self.text.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    if (SITE / "index.html").exists():
        return SITE
    for module in ("sphinx", "myst_parser", "furo", "sphinx_copybutton", "ziamath"):
        pytest.importorskip(module, reason=f"the site is not built, and {module} is not installed")
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", str(ROOT / "docs"), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    """All pages of the site."""
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def test_links_lead_somewhere(pages: dict[Path, Page]) -> None:
    broken = []
    for path, page in pages.items():
        for link in page.links + page.resources:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                broken.append(f"{path.name}: {link} is not there")
            elif "_modules" in path.parts:  # the link of a source to its page names the module of the source
                continue
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                broken.append(f"{path.name}: {link} has no such anchor")
    assert not broken, "\n".join(broken)


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    loaded = [resource for page in pages.values() for resource in page.resources]
    for sheet in site.rglob("*.css"):
        loaded += re.findall(r"url\(\s*[\"']?([^\"')]+)", sheet.read_text())
    assert len(loaded) > 100
    outside = {resource for resource in loaded if re.match(r"(https?:)?//", resource)}
    assert not outside


def test_mathematics_is_drawn_by_the_browser(site: Path, pages: dict[Path, Page]) -> None:
    assert pages[site / "guide.html"].formulas > 30
    for path, page in pages.items():
        raw = re.findall(r"\\[a-zA-Z]{2,}|\$[^$\s][^$]*\$", "".join(page.text))
        assert not raw, f"{path.name} shows TeX: {raw[:3]}"


def test_every_function_has_a_page_with_an_example_and_its_source(site: Path, pages: dict[Path, Page]) -> None:
    names = re.findall(r"^   (softk\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    public = {f"softk.{name}" for name in softk.__all__ if not isinstance(getattr(softk, name), ModuleType)}
    assert public <= set(names)
    for name in names:
        path = site / "generated" / f"{name}.html"
        assert any("_modules/" in link for link in pages[path].links), f"{name} has no link to its source"
        is_function = name.rpartition(".")[2].islower()
        if is_function and not name.startswith("softk.testing."):
            assert "&gt;&gt;&gt;" in path.read_text(), f"{name} has no example"


def test_pages_show_the_version(site: Path, pages: dict[Path, Page]) -> None:
    for path in (site / "index.html", site / "generated" / "softk.topk.html"):
        assert f"softk {softk.__version__}" in "".join(pages[path].text)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=found)
        yield running
        running.close()


def opened(browser: Any, width: str, theme: str, faults: list[str]) -> Any:
    """A tab without a network, which appends failed requests and errors of scripts to `faults`."""
    size = dict(zip(("width", "height"), WIDTHS[width], strict=True))
    context = browser.new_context(viewport=size, color_scheme=theme, reduced_motion="reduce")
    tab = context.new_page()
    tab.route(re.compile("^https?:"), lambda route: route.abort())
    tab.on("requestfailed", lambda request: faults.append(f"{tab.url}: {request.url} failed"))
    tab.on("pageerror", lambda error: faults.append(f"{tab.url}: {error}"))
    return tab


#: What is wider than the window and cannot be scrolled into view, and pictures that did not load.
FAULTS = """() => {
    const faults = [];
    const page = document.scrollingElement;
    if (page.scrollWidth > page.clientWidth) faults.push(`scrolls: ${page.scrollWidth} > ${page.clientWidth}`);
    for (const element of document.querySelectorAll("article *")) {
        const box = element.getBoundingClientRect();
        if (box.width === 0 || box.right <= innerWidth + 1) continue;
        let around = element.parentElement;
        const scrolls = () => ["auto", "scroll"].includes(getComputedStyle(around).overflowX);
        while (around && !scrolls()) around = around.parentElement;
        if (!around) faults.push(`cut: <${element.tagName.toLowerCase()} class="${element.className}">`);
    }
    for (const image of document.images)
        if (!image.complete || image.naturalWidth === 0) faults.push(`broken picture: ${image.src}`);
    return faults;
}"""


@pytest.mark.parametrize("width", WIDTHS)
def test_pages_fit_the_window(site: Path, browser: Any, width: str) -> None:
    faults: list[str] = []
    tab = opened(browser, width, "light", faults)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    shown = sorted([*site.glob("*.html"), *site.glob("generated/*.html")])
    assert len(shown) > 40
    for path in shown:
        tab.goto(path.as_uri())
        if path.parent == site and path.stem not in SHOWN:
            tab.screenshot(path=SCREENSHOTS / f"{path.stem}-{width}.png", full_page=True)
        tab.evaluate("document.querySelectorAll('details').forEach(element => { element.open = true })")
        faults += [f"{path.name}: {fault}" for fault in tab.evaluate(FAULTS)]
    tab.context.close()
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", SHOWN)
def test_a_page_of_the_reference_and_a_search_are_shown(site: Path, browser: Any, name: str, width: str) -> None:
    tab = opened(browser, width, "light", [])  # the excerpts of results are fetched, which browsers refuse to files
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    address, present = SHOWN[name]
    tab.goto(f"{site.as_uri()}/{address}")
    tab.wait_for_selector(present)
    tab.screenshot(path=SCREENSHOTS / f"{name}-{width}.png", full_page=True)
    tab.context.close()


def test_pictures_are_dark_in_the_dark_theme(site: Path, browser: Any) -> None:
    brightness = {}
    for theme in ("light", "dark"):
        tab = opened(browser, "desktop", theme, [])
        tab.goto((site / "index.html").as_uri())
        tab.screenshot(path=SCREENSHOTS / f"index-{theme}.png", full_page=True)
        brightness[theme] = [mean(picture.screenshot()) for picture in tab.locator("article img:visible").all()]
        tab.context.close()
    assert len(brightness["light"]) > 0
    assert min(brightness["light"]) > 180
    assert max(brightness["dark"]) < 80


def mean(picture: bytes) -> float:
    """The mean brightness of a picture, from 0 to 255."""
    from PIL import Image

    return float(np.mean(np.asarray(Image.open(io.BytesIO(picture)).convert("L"))))


def test_copy_buttons_work(site: Path, browser: Any) -> None:
    faults: list[str] = []
    tab = opened(browser, "desktop", "light", faults)
    tab.goto((site / "generated" / "softk.topk.html").as_uri())
    tab.wait_for_selector("button.copybtn", state="attached")
    assert tab.locator("div.highlight pre").count() == tab.locator("button.copybtn").count()
    tab.evaluate("document.addEventListener('copy', () => { window.copied = document.activeElement.value })")
    tab.locator("div.highlight").first.hover()
    tab.locator("button.copybtn").first.click()
    copied = tab.evaluate("window.copied")
    assert softk.topk.__doc__ is not None
    examples = doctest.DocTestParser().get_examples(softk.topk.__doc__)
    words = copied.split()  # of the first of two blocks
    assert "softk.topk(np.asarray(" in copied
    assert words == "".join(example.source for example in examples).split()[: len(words)]
    tab.context.close()
    assert not faults, "\n".join(faults)
