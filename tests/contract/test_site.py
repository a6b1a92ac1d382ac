"""The site as a browser shows it: nothing is cut off, wide and narrow; readable, light and dark."""

from __future__ import annotations

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
WIDTHS = (1280, 390)
# Shows each page at each width in a frame, and lists what reaches beyond it or must be scrolled.
PROBE = """<pre id="out"></pre><script>
async function main() {
  const found = [];
  for (const page of PAGES) for (const width of WIDTHS) {
    const frame = document.createElement("iframe");
    frame.style = `width: ${width}px; height: 900px; border: 0`;
    frame.src = page;
    const loaded = new Promise(resolve => frame.onload = resolve);
    document.body.appendChild(frame);
    await loaded;
    for (const element of frame.contentDocument.querySelectorAll("article *")) {
      if (element.closest(".headerlink, .copybtn") || !element.textContent.trim()) continue;
      const style = frame.contentWindow.getComputedStyle(element);
      const hidden = ["auto", "scroll", "hidden"].includes(style.overflowX) && element.clientWidth
        && element.scrollWidth > element.clientWidth + 1;
      if (hidden || element.getBoundingClientRect().right > width + 1)
        found.push(`${page} at ${width}: ${element.tagName} ${element.textContent.slice(0, 60)}`);
    }
    frame.remove();
  }
  document.getElementById("out").textContent = JSON.stringify(found);
}
main();
</script>"""

# Lists the texts that stand out too little from what is behind them, in both themes. As WCAG 2.2
# defines it (relative luminance; 4.5 : 1 is its success criterion 1.4.3).
CONTRAST = """<pre id="out"></pre><script>
function channels(color) { return color.match(/[\\d.]+/g).map(Number); }
function luminance(color) {
  const [r, g, b] = channels(color).slice(0, 3).map(value => value / 255)
    .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function behind(element, view) {
  for (; element; element = element.parentElement) {
    const color = view.getComputedStyle(element).backgroundColor;
    const alpha = channels(color)[3];
    if (alpha === undefined || alpha > 0.5) return color;
  }
  return "rgb(255, 255, 255)";
}
async function main() {
  const found = [];
  for (const page of PAGES) {
    const frame = document.createElement("iframe");
    frame.style = "width: 1280px; height: 900px; border: 0";
    frame.src = page;
    const loaded = new Promise(resolve => frame.onload = resolve);
    document.body.appendChild(frame);
    await loaded;
    const view = frame.contentWindow, inside = frame.contentDocument;
    for (const theme of ["light", "dark"]) {
      inside.body.dataset.theme = theme;
      const backgrounds = luminance(behind(inside.body, view));
      if ((theme === "dark") !== (backgrounds < 0.2)) found.push(`${page}: no ${theme} theme`);
      const told = new Set();
      for (const element of inside.querySelectorAll("article *")) {
        const own = [...element.childNodes].filter(node => node.nodeType === 3)
          .map(node => node.textContent.trim()).join("");
        if (!own || element.closest(".headerlink, .copybtn, svg")) continue;
        const text = luminance(view.getComputedStyle(element).color);
        const back = luminance(behind(element, view));
        const ratio = (Math.max(text, back) + 0.05) / (Math.min(text, back) + 0.05);
        const kind = `${element.tagName}.${element.className}`;
        if (ratio < 4.5 && !told.has(kind)) {
          told.add(kind);
          found.push(`${page}, ${theme}: ${kind} ${own.slice(0, 40)} ${ratio.toFixed(2)}`);
        }
      }
    }
    frame.remove();
  }
  document.getElementById("out").textContent = JSON.stringify(found);
}
main();
</script>"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("furo", "myst_parser", "sphinx_copybutton"):
        pytest.importorskip(package, reason="building the site takes pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", "docs", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium to look at the site with")
def test_nothing_is_cut_off(site: Path, address: str) -> None:
    assert BROWSER is not None
    pages = [f"{page.stem}.html" for page in (ROOT / "docs").glob("*.md")]
    assert all((site / page).is_file() for page in pages)
    settings = f"<script>const PAGES = {json.dumps(pages)}, WIDTHS = {list(WIDTHS)}</script>"
    (site / "probe.html").write_text(f"<body>{settings}{PROBE}")
    wide = '<article style="width: 900px">wider than a telephone</article>'
    (site / "wide.html").write_text(wide)
    (site / "probe-wide.html").write_text(
        f'<body><script>const PAGES = ["wide.html"], WIDTHS = {list(WIDTHS)}</script>'
        + PROBE.replace('"article *"', '"article"')
    )
    assert len(seen(f"{address}/probe-wide.html")) == 1, "the probe can see"
    assert not seen(f"{address}/probe.html")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium to look at the site with")
def test_text_can_be_read_in_light_and_in_dark(site: Path, address: str) -> None:
    pages = [f"{page.stem}.html" for page in (ROOT / "docs").glob("*.md")]
    settings = f"<script>const PAGES = {json.dumps(pages)}</script>"
    (site / "contrast.html").write_text(f"<body>{settings}{CONTRAST}")
    (site / "pale.html").write_text('<article><p style="color: #999">pale</p></article>')
    (site / "contrast-pale.html").write_text(
        f'<body><script>const PAGES = ["pale.html"]</script>{CONTRAST}'
    )
    assert seen(f"{address}/contrast-pale.html") == [
        "pale.html, light: P. pale 2.85",
        "pale.html: no dark theme",
        "pale.html, dark: P. pale 2.85",
    ], "the probe can see"
    assert not seen(f"{address}/contrast.html")


def seen(address: str) -> list[str]:
    """What a probe has found."""
    assert BROWSER is not None
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000"),
        *("--virtual-time-budget=120000", "--dump-dom", address),
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout
    found = re.search(r'<pre id="out">(.*?)</pre>', shown, re.DOTALL)
    assert found is not None and found[1], "the page has run to its end"
    return list(json.loads(html.unescape(found[1])))
