"""A headless chromium that walks through a site and says what it saw of every page."""

from __future__ import annotations

import functools
import http.server
import json
import queue
import shutil
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PHONE, DESKTOP = (390, 844), (1300, 900)

# Served beside the site, so that it may look into its frames. Several at a time; what it found is posted.
WALK = """<!doctype html><meta charset="utf-8"><title>walk</title><body><script>
const {visits, query} = ORDERS;
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
async function opened(path, [width, height]) {
  const frame = document.createElement("iframe");
  Object.assign(frame, {width, height, src: path});
  await new Promise((done) => { frame.onload = done; document.body.append(frame); });
  await frame.contentDocument.fonts.ready;
  await Promise.all([...frame.contentDocument.images].map((image) => image.decode().catch(() => {})));
  for (let turn = 1; turn <= 100; turn++) { // a busy browser drops a picture, or has its size later
    const missing = [...frame.contentDocument.images].filter((image) => !image.naturalWidth);
    if (!missing.length) break;
    if (turn % 20 === 0) missing.forEach((image) => { image.src = image.src; });
    await wait(50);
  }
  await wait(100); // the theme's script gives tables and code their boxes
  return frame;
}
function seen(frame) {
  const view = frame.contentWindow, page = frame.contentDocument, root = page.documentElement;
  const copy = page.querySelector("article").cloneNode(true);
  copy.querySelectorAll("pre, code").forEach((code) => code.remove());
  return {
    title: page.querySelectorAll("h1").length,
    navigation: page.querySelectorAll(".md-nav").length,
    overflow: root.scrollWidth - view.innerWidth,
    cut: [...page.querySelectorAll("article pre > code, article .md-typeset__scrollwrap")]
      .map((box) => box.scrollWidth - box.clientWidth).filter((pixels) => pixels > 0),
    broken: [...page.images].filter((image) => !image.naturalWidth).map((image) => image.src),
    pictures: page.querySelector("article").querySelectorAll("img").length,
    equations: [...page.querySelectorAll("math")].map((math) => math.getBoundingClientRect().height),
    raw: copy.textContent.match(/\\$\\$|\\\\[([]|\\\\[a-z]{2,}/g) || [],
    blocks: page.querySelectorAll("article .highlight pre").length,
    copied: page.querySelectorAll("article .md-clipboard, article [data-md-type=copy]").length,
    elsewhere: view.performance.getEntriesByType("resource").map((entry) => entry.name)
      .filter((name) => !name.startsWith(location.origin) && !name.startsWith("data:")),
  };
}
async function searched() {
  const frame = await opened("/?q=" + query, [1280, 900]);
  let found = [];
  for (let turn = 0; turn < 200 && !found.length; turn++) {
    await wait(50);
    found = [...frame.contentDocument.querySelectorAll(".md-search-result__item a")].map((a) => a.href);
  }
  frame.remove();
  return found;
}
async function themes() {
  const frame = await opened("/", [1280, 900]), body = frame.contentDocument.body, found = [];
  for (let turn = 0; turn < 2; turn++) {
    found.push(body.dataset.mdColorScheme);
    frame.contentDocument.querySelector("[data-md-component=palette] label:not([hidden])").click();
    await wait(100);
  }
  frame.remove();
  return found;
}
async function walked() {
  const report = [];
  async function some() {
    while (visits.length) {
      const [path, size] = visits.shift(), frame = await opened("/" + path, size);
      report.push({path, width: size[0], ...seen(frame)});
      frame.remove();
    }
  }
  await Promise.all([some(), some(), some()]);
  return report;
}
(async () => {
  let report;
  try {
    report = {pages: await walked(), found: await searched(), themes: await themes()};
  } catch (error) {
    report = {error: String(error.stack)};
  }
  await fetch("/report", {method: "POST", body: JSON.stringify(report)});
})();
</script>"""


class Walk(NamedTuple):
    """``pages``: what was seen, a row a visit. ``found``: the search's links. ``themes``: before and after a click."""

    pages: list[dict[str, Any]]
    found: list[str]
    themes: list[str]
    console: list[str]


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128  # several pages at once ask for all of their parts


def walk(site: Path, visits: Sequence[tuple[str, tuple[int, int]]], scratch: Path, query: str) -> Walk:
    """Pages in windows of a size, in one browser. TimeoutError where it does not answer for four minutes."""
    orders = json.dumps({"visits": list(visits), "query": query})
    reports: queue.Queue[dict[str, Any]] = queue.Queue()

    class Handler(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            if self.path != "/walk":
                return super().do_GET()
            self._answer(WALK.replace("ORDERS", orders).encode())

        def do_POST(self) -> None:
            reports.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self._answer(b"")

        def _answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    handler = functools.partial(Handler, directory=site)
    log = scratch / "chromium.log"
    with Server(("127.0.0.1", 0), handler) as server, log.open("w") as stderr:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [
            str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--enable-logging=stderr", "--log-level=0", "--remote-debugging-port=0",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={scratch / 'profile'}",
            f"http://127.0.0.1:{server.server_port}/walk",
        ]  # fmt: skip
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            report = reports.get(timeout=240)
        except queue.Empty:
            raise TimeoutError(
                f"no report from the browser in four minutes:\n{log.read_text()[-4000:]}"
            ) from None
        finally:
            browser.terminate()
            browser.wait(30)
            server.shutdown()
    assert "error" not in report, report["error"]
    console = [line for line in log.read_text().splitlines() if "CONSOLE" in line]
    return Walk(report["pages"], report["found"], report["themes"], console)
