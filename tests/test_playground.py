"""notebooks/09_playground in JupyterLab, in a real browser: a slider moves, the picture changes."""

import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import websocket
from PIL import Image

from padinv import Code

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "chromium-headless-shell")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None,
    reason="no Chromium on the PATH; on Debian: apt-get install chromium-headless-shell (elsewhere Chromium or Chrome)",
)


def wait(question, seconds: float, what: str):
    """The first true answer, asked again and again; TimeoutError names what did not come."""
    end = time.monotonic() + seconds
    while not (answer := question()):
        if time.monotonic() > end:
            raise TimeoutError(f"after {seconds} s still no {what}")
        time.sleep(0.2)
    return answer


@contextmanager
def running(command: list, log: Path, **options):
    """A process that ends with the block, and with it its group; JupyterLab asked to end ends its kernels."""
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True, **options)
        try:
            yield process
        finally:
            for sent in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, sent)
                    process.wait(timeout=15)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    pass


def get(url: str):
    """The JSON at a URL, or None if nothing answers yet."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return json.load(reply)
    except OSError:
        return None


@pytest.fixture
def lab(tmp_path):
    """JupyterLab on a free port of loopback, in a copy of the notebook and with nobody's settings: its URL."""
    work = tmp_path / "work"
    (work / "notebooks").mkdir(parents=True)
    shutil.copy(ROOT / "notebooks" / "09_playground.ipynb", work / "notebooks")
    for name in ("dvc.yaml", "data", "checkpoints"):
        (work / name).symlink_to(ROOT / name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    own |= {"IPYTHONDIR": str(tmp_path / "ipython"), "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root"]
    command += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={work}"]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url=None"]
    with running(command, tmp_path / "lab.log", env=os.environ | own, cwd=work) as process:
        wait(lambda: process.poll() is not None or get(f"http://127.0.0.1:{port}/api"), 120, "JupyterLab")
        assert process.poll() is None, (tmp_path / "lab.log").read_text()
        yield f"http://127.0.0.1:{port}"


class Page:
    """A page of Chromium, through the DevTools protocol."""

    def __init__(self, port: int):
        target = next(t for t in get(f"http://127.0.0.1:{port}/json/list") if t["type"] == "page")
        self.socket = websocket.create_connection(target["webSocketDebuggerUrl"], timeout=30, suppress_origin=True)
        self.count, self.events = 0, []
        self.call("Page.enable")
        self.call("Page.setInterceptFileChooserDialog", enabled=True)

    def call(self, method: str, **params) -> dict:
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": params}))
        while (reply := json.loads(self.socket.recv())).get("id") != self.count:
            self.events.append(reply)
        assert "error" not in reply, f"{method}: {reply['error']}"
        return reply["result"]

    def js(self, expression: str):
        """Value of an expression, awaited; None where it raises, as while a page is loading."""
        reply = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        return None if "exceptionDetails" in reply else reply["result"].get("value")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def click(self, selector: str) -> None:
        """A click in the middle of an element, once it is there."""
        box = f"document.querySelector({selector!r}).getBoundingClientRect()"
        x, y = wait(lambda: self.js(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({box})"), 30, selector)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def choose_files(self, selector: str, paths: list[Path]) -> None:
        """Click a button that asks for files, and give it these."""
        start = len(self.events)
        self.click(selector)

        def chooser():
            self.call("Page.enable")  # whatever is asked, events come along
            return next((e["params"] for e in self.events[start:] if e["method"] == "Page.fileChooserOpened"), None)

        node = wait(chooser, 30, "file chooser")["backendNodeId"]
        self.call("DOM.setFileInputFiles", backendNodeId=node, files=list(map(str, paths)))

    def press(self, key: str, times: int = 1) -> None:
        for _ in range(times):
            for kind in ("keyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)


@pytest.fixture
def page(tmp_path):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command += ["--remote-debugging-port=0", f"--user-data-dir={tmp_path / 'chromium'}", "--window-size=1200,900"]
    with running([*command, "about:blank"], tmp_path / "chromium.log"):
        ready = tmp_path / "chromium" / "DevToolsActivePort"
        wait(lambda: ready.is_file() and ready.read_text().strip(), 60, "Chromium")
        page = Page(int(ready.read_text().split()[0]))
        yield page
        page.screenshot(tmp_path / "end.png")  # of a failure too
        page.socket.close()


# The bytes of the picture that the page shows, in base64.
PICTURE = """(async () => {
    const bytes = new Uint8Array(await (await fetch(document.querySelector('img.padinv-result').src)).arrayBuffer());
    return btoa(Array.from(bytes, b => String.fromCharCode(b)).join(''));
})()"""


def picture(page: Page) -> np.ndarray | None:
    """The pixels of the result, or None while there is none."""
    data = page.js(PICTURE)
    return data and np.array(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


@needs_browser
def test_a_slider_moves_and_the_picture_changes(lab, page, tmp_path):
    page.call("Page.navigate", url=f"{lab}/doc/tree/notebooks/09_playground.ipynb")

    def idle():
        state = {"execution_state": "idle", "connections": 1}
        return any(state.items() <= kernel.items() for kernel in get(f"{lab}/api/kernels") or ())

    wait(idle, 120, "kernel")
    page.click(".lm-MenuBar-item:nth-child(4)")  # Run
    page.click("[data-command='runmenu:run-all']")
    wait(lambda: picture(page) is not None, 120, "picture")
    page.js("document.querySelector('img.padinv-result').scrollIntoView()")
    before = picture(page)
    page.screenshot(tmp_path / "before.png")
    assert before.shape[0] >= 64 and before.std() > 10, "an empty picture"

    page.js("document.querySelector('.padinv-blend .noUi-handle').focus()")
    page.press("ArrowRight", times=10)
    wait(lambda: np.abs(picture(page) - before.astype(int)).mean() > 1, 60, "other picture")
    wait(idle, 60, "end of the computation")
    page.screenshot(tmp_path / "after.png")
    page.press("ArrowLeft", times=20)
    wait(lambda: np.array_equal(picture(page), before), 60, "first picture again")

    Image.fromarray(before).save(tmp_path / "mine.png")
    (tmp_path / "broken.png").write_bytes(b"not an image")
    page.choose_files(".widget-upload", [tmp_path / "mine.png", tmp_path / "broken.png"])
    text = "document.querySelector('.jp-Notebook').innerText"
    wait(lambda: "broken.png: not an image" in (page.js(text) or ""), 60, "message about the broken file")
    assert page.js("[...document.querySelector('.widget-dropdown select').options].at(-1).text") == "mine.png"

    page.click(".padinv-save")
    saved = tmp_path / "work" / "runs" / "playground" / "edit-001.safetensors"
    wait(saved.is_file, 30, "saved code")
    assert len(Code.load(saved)) == 1 and saved.with_suffix(".png").is_file()
