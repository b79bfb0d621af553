"""The page: what it does, without a browser; what it lets nobody do, over HTTP; and once in a real browser."""

import json
import os
import sys
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image

from padinv import Code, Encoder, Generator, GeneratorConfig, analogy
from padinv.app import page as pages
from padinv.app import studio as studios
from padinv.files.checkpoints import save_encoder, save_generator
from padinv.images.datasets import read_image, to_float
from padinv.inversion.directions import move, pca_directions
from padinv.photos.networks import Networks
from tests import test_playground as browser
from tests.test_commands import PORTRAIT, ROOT, SMALL, picture, tiny

page = browser.page  # a fixture


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder like a checkout, with two kinds of tiny networks."""
    folder = tmp_path_factory.mktemp("site")
    for name in ("bare", "whole"):
        save_generator(G := tiny(), folder / f"checkpoints/{name}/generator.safetensors")
    E = Encoder.for_generator(G, **SMALL)
    for head in (*E.padding.rings, E.padding.const):
        torch.nn.init.normal_(head.weight)
    for name in ("padinv", "padinv-split", "psp"):
        save_encoder(E, folder / f"checkpoints/whole/{name}.safetensors", half=False)
    d = Code(torch.randn(2, G.num_ws, 16))
    d.save(folder / "checkpoints/whole/directions-w.safetensors", names=["hat", "beard"])
    for i in range(3):
        picture(folder / f"data/whole/test/{i}.png", seed=i)
    return folder


@pytest.fixture(scope="module")
def studio(site) -> studios.Studio:
    return studios.opened(*studios.shipped(site)["whole"], "cpu", site / "data/whole/test")


@pytest.fixture
def face(studio) -> studios.Face:
    return studios.inverted(studio, studio.samples[0], "center", "encoder")


# ----------------------------------------------------------------------------------------------------------------------
# The functions behind it


def test_networks_by_what_is_there(site, tmp_path):
    found = studios.shipped(site)
    assert list(found) == ["whole", "bare"] and found["bare"][1] is None
    assert found["whole"][1].name == "padinv-split.safetensors"
    with pytest.raises(FileNotFoundError, match="no networks in .*dvc pull.* --generator FILE"):
        studios.shipped(tmp_path)


def test_what_lies_beside_a_generator_is_offered(site, studio, tmp_path):
    assert list(studio.directions) == ["hat", "beard"] and studio.ways == studios.WAYS
    assert studio.samples.equal(torch.stack([read_image(site / f"data/whole/test/{i}.png") for i in range(3)]))
    bare = studios.opened(*studios.shipped(site)["bare"], "cpu", site / "data/bare.zip")
    assert bare.ways == ("search",) and bare.samples.shape == (8, 3, 32, 32) and bare.samples.float().std() > 1
    assert bare.directions["axis 2"].w.equal(pca_directions(bare.nets.G, 8)[1].w)
    for name, template in (("faces-64", "tight"), ("ffhq-256", "ffhq"), ("cars", "center")):
        save_generator(tiny(), tmp_path / f"{name}.pkl")
        assert studios.opened(tmp_path / f"{name}.pkl", device="cpu").nets.template == template


def test_uploads_that_are_refused(tmp_path, monkeypatch):
    (tmp_path / "notes.png").write_text("no picture")
    Image.new("1", (20_000, 100)).save(tmp_path / "wide.png")
    Image.new("1", (9_000, 9_000)).save(tmp_path / "bomb.png")
    for name, message in (("notes.png", "^notes.png: not an image"), ("wide.png", "^wide.png: 20000 x 100 .* smaller"),
                          ("bomb.png", "^bomb.png: 9000 x 9000 .* 40 million")):  # fmt: skip
        if name != "notes.png":  # nothing is decoded
            monkeypatch.setattr(studios, "read_image", lambda *_, **__: pytest.fail("decoded"))
        with pytest.raises(ValueError, match=message):
            studios.uploaded(tmp_path / name)
    monkeypatch.setattr(studios, "MAX_BYTES", 10)
    with pytest.raises(ValueError, match="^notes.png: 0 MB, expected at most"):
        (tmp_path / "notes.png").write_bytes(bytes(11))
        studios.uploaded(tmp_path / "notes.png")


def test_every_way_to_a_code(studio):
    heard, codes = [], {}
    for way in studio.ways:
        codes[way] = studios.inverted(studio, studio.samples[1], "center", way, 2, heard.append).code
    assert heard == pytest.approx([1.0, 1 / 3, 2 / 3, 1.0, 1 / 3, 2 / 3, 1.0])
    x = to_float(studio.samples[1:2])
    assert codes["encoder"].w.equal(studio.nets.E(x).w) and not codes["search"].w.equal(codes["encoder"].w)
    errors = [(studio.nets.G(code) - x).square().mean() for code in codes.values()]
    assert errors[1] <= errors[0]
    for way, steps in (("guess", 2), ("search", 0), ("search", 10**6)):
        with pytest.raises(ValueError, match="steps"):
            studios.inverted(studio, studio.samples[1], "center", way, steps)
    with pytest.raises(ValueError, match="no face found; .*middle"):
        studios.inverted(studio, studio.samples[1].repeat(1, 4, 4), "ffhq", "encoder")


def test_a_face_is_cut_out_and_pasted_back(studio):
    photo = studios.uploaded(PORTRAIT)
    face = studios.inverted(studio, photo, "tight", "encoder")
    out = studios.pasted(studio, face, face.code)
    changed = (out.float() - photo.float()).abs().amax(dim=0) > 0
    assert changed[80:180, 180:270].float().mean() > 0.6 and not changed[300:].any()


def test_blends_edits_and_moves(studio, face):
    second = studios.inverted(studio, studio.samples[1], "center", "encoder")
    for first, taken in ((5, 5), (0, 0), (9, 7)):  # of w 0 to 7
        blend = studios.blended(face, second, first=first)
        assert blend.w[:, taken:].equal(second.code.w[:, taken:]) and blend.p.const.equal(face.code.p.const)
        assert blend.w[:, :taken].equal(face.code.w[:, :taken])
    assert studios.blended(face, second).w.equal(studios.blended(face, second, first=5).w)
    assert studios.blended(face, second, 0.0).w.equal(face.code.w)
    pair = studio.samples[1], studio.samples[0]
    added = studios.edited(studio, face, pair, "center", drawn=False, strength=1.0)
    torch.testing.assert_close(added.p.const, 2 * face.code.p.const - second.code.p.const)
    changed = studio.samples[1].clone()
    changed[:, 8:16, 8:16] = 255
    pair = studio.samples[1], changed
    drawn = studios.edited(studio, face, pair, "center", drawn=True, strength=1.0)
    expected = analogy(face.x, *(to_float(photo)[None] for photo in pair))
    torch.testing.assert_close(drawn.p.const, studio.nets.E(expected).p.const)
    with pytest.raises(ValueError, match="the same image twice"):
        studios.edited(studio, face, pair[:1] * 2, "center", drawn=True, strength=1.0)
    hat = studios.moved(studio, face, {"hat": 2.0, "beard": 0.0})
    assert hat.w.equal(move(face.code, studio.directions["hat"], 2.0).w)


def test_directions_from_outside(studio, face, tmp_path):
    torch.save(d := torch.randn(1, 16), tmp_path / "age.pt")
    Code(torch.randn(2, 8, 16)).save(tmp_path / "mine.safetensors", names=["hat", "scarf"])
    more = studios.with_directions(studio, tmp_path / "age.pt")
    assert list(more.directions) == ["age (age.pt)", "hat", "beard"] and list(studio.directions) == ["hat", "beard"]
    torch.testing.assert_close(studios.moved(more, face, {"age (age.pt)": 2.0}).w, face.code.w + 2 * d)
    more = studios.with_directions(studio, str(tmp_path / "mine.safetensors"))
    assert list(more.directions) == ["hat (mine.safetensors)", "scarf (mine.safetensors)", "hat", "beard"]
    torch.save(torch.randn(1, 24), tmp_path / "age.pt")
    for name, message in (("age.pt", r"a direction \[1, 24\] does not fit"), ("absent.npy", "expected a file")):
        with pytest.raises(ValueError, match=f"^{name}: {message}"):
            studios.with_directions(studio, tmp_path / name)


def test_downloads_are_the_picture_and_its_code(studio, face, tmp_path):
    image, file = studios.saved(studio, face.code, tmp_path)
    assert read_image(image).equal(studios.drawing(studio, face.code))
    assert Code.load(file).w.equal(face.code.w)


def test_without_gradio_the_fix_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"gradio.*pip install -e \"\.\[app\]\""):
        pages.serve("any")


def test_a_port_that_there_is_not_is_named(site):
    pytest.importorskip("gradio", reason='no Gradio; pip install -e ".[app]"')
    with pytest.raises(OSError, match="--port 99999: cannot listen there; give another port"):
        pages.serve(site / "checkpoints/bare/generator.safetensors", device="cpu", port=99999)


# ----------------------------------------------------------------------------------------------------------------------
# The server


@pytest.fixture
def server(studio, tmp_path, monkeypatch):
    """The page of the studio, served in this process: its URL and its folder."""
    pytest.importorskip("gradio", reason='no Gradio; pip install -e ".[app]"')
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    served = pages.build({"whole": lambda: studio}, str(tmp_path / "own"))
    _, url = pages.launch(served, "127.0.0.1", None, prevent_thread_lock=True)
    yield url, served
    served.close(verbose=False)


def ask(url: str, data: bytes | None = None, kind: str = "application/json") -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": kind}), timeout=30) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def upload(url: str, name: str, content: bytes) -> tuple[int, bytes]:
    head = f'Content-Disposition: form-data; name="files"; filename="{name}"'.encode()
    lines = [b"--x", head, b"", content, b"--x--"]
    return ask(f"{url}gradio_api/upload", b"\r\n".join(lines) + b"\r\n", "multipart/form-data; boundary=x")


def call(url: str, function: str, *data, session: str | None = None) -> str:
    """What a function of the page answers to somebody who calls it without the page: a stream of events."""
    content = {"data": data} | ({"session_hash": session} if session else {})
    status, body = ask(f"{url}gradio_api/call/{function}", json.dumps(content).encode())
    assert status == 200, body
    return ask(f"{url}gradio_api/call/{function}/{json.loads(body)['event_id']}")[1].decode()


def test_the_page_serves_nobody_else_and_nothing_else(server, tmp_path):
    url, served = server
    listening = {c.laddr.ip for c in psutil.Process().net_connections() if c.status == "LISTEN"}
    assert listening == {"127.0.0.1"} and not served.analytics_enabled and served.share is False
    with urllib.request.urlopen(url) as reply:
        assert reply.headers["content-security-policy"] == pages.POLICY
    mine = picture(tmp_path / "private.png")
    for path in (mine, ROOT / "README.md", "/etc/passwd", tmp_path / "own/../private.png"):
        assert ask(f"{url}gradio_api/file={path}")[0] in (403, 404)
        for function in ("upload", "take"):
            answer = call(url, function, "whole", {"path": str(path), "meta": {"_type": "gradio.FileData"}})
            assert "event: error" in answer and "event: complete" not in answer


def test_uploads_over_http(server, tmp_path, monkeypatch):
    url, _ = server
    status, body = upload(url, "mine.png", picture(tmp_path / "mine.png").read_bytes())
    (path,) = json.loads(body)
    assert status == 200 and Path(path).is_relative_to(tmp_path / "own")
    assert "event: complete" in call(url, "upload", "whole", {"path": path, "meta": {"_type": "gradio.FileData"}})
    (path,) = json.loads(upload(url, "notes.png", b"no picture")[1])
    answer = call(url, "upload", "whole", {"path": path, "meta": {"_type": "gradio.FileData"}})
    assert "event: error" in answer and "notes.png: not an image" in answer
    torch.save(torch.randn(1, 16), tmp_path / "age.pt")
    for content, said in (((tmp_path / "age.pt").read_bytes(), "age (age.pt)"), (b"none", "error")):
        (path,) = json.loads(upload(url, "age.pt", content)[1])
        answer = call(url, "take", "whole", {"path": path, "meta": {"_type": "gradio.FileData"}})
        assert said in answer and ("event: complete" in answer) == (said != "error")
    assert upload(url, "large.png", bytes(studios.MAX_BYTES + 1))[0] == 413


def test_results_do_not_pile_up_and_go_with_their_networks(server, tmp_path):
    url, served = server
    (path,) = json.loads(upload(url, "mine.png", picture(tmp_path / "mine.png").read_bytes())[1])
    call(url, "upload", "whole", {"path": path, "meta": {"_type": "gradio.FileData"}}, session="s")
    for function in ("invert", "invert_1"):
        call(url, function, "whole", "center", "encoder", 1, session="s")
    for first in (5, 0):
        assert "code.safetensors" in call(url, "blend", "whole", 1, first, session="s")
        assert len(list((tmp_path / "own").rglob("code.safetensors"))) == 1
    answer = json.loads(call(url, "switch", "whole", session="s").rpartition("data: ")[2])
    buttons = [given for given in answer if isinstance(given, dict) and given.get("interactive") is False]
    assert [given["value"] for given in buttons] == [None, None]
    assert not list((tmp_path / "own").rglob("code.safetensors")) and served.delete_cache == pages.KEPT


@pytest.mark.parametrize(("resolution", "last", "first"), [(8, 3, 3), (32, 7, 5)])
def test_the_first_w_of_a_blend(resolution, last, first, studio, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason='no Gradio; pip install -e ".[app]"')
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    G = Generator(GeneratorConfig(resolution, 16, 16, 2, 512, 16))
    served = pages.build({"any": lambda: replace(studio, nets=Networks(G, batch=1))}, str(tmp_path))
    (slider,) = (block for block in served.blocks.values() if block.elem_id == "first-w")
    assert (slider.minimum, slider.maximum, slider.value) == (0, last, first)


# ----------------------------------------------------------------------------------------------------------------------
# In a browser


@browser.needs_browser
def test_in_a_browser(site, page, tmp_path):
    """`padinv app` without arguments: invert, move, download, see an error; nothing comes from elsewhere."""
    pytest.importorskip("gradio", reason='no Gradio; pip install -e ".[app]"')
    (own := tmp_path / "tmp").mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1", "TMPDIR": str(own)}
    log = tmp_path / "app.log"
    with browser.running([sys.executable, "-m", "padinv", "app", "--device", "cpu"], log, env=environment, cwd=site):
        found = browser.wait(lambda: [w for w in log.read_text().split() if w.startswith("http")], 60, "server")
        url = found[0]

        def shows(selector: str):
            return page.js(f"document.querySelector({selector + ' img'!r})?.src")

        def press(selector: str) -> None:
            page.js(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
            page.click(selector)

        def slide(selector: str, value: int) -> None:
            """Again until it stays: a tab that is just shown puts its sliders back."""
            script = f"""(async slider => {{
                const number = slider.querySelector('input[type=number]');
                number.value = {value};
                number.dispatchEvent(new Event('input', {{bubbles: true}}));
                await new Promise(done => setTimeout(done, 500));
                return slider.querySelector('input[type=range]').value == {value};
            }})(document.querySelector({selector!r}))"""
            browser.wait(lambda: page.js(script), 30, f"{selector} at {value}")

        page.call("Network.enable")
        page.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
        page.call("Page.navigate", url=url)
        browser.wait(lambda: page.js("document.querySelectorAll('#samples img').length") == 8, 60, "pictures to pick")
        press("#blend")
        text = "document.body.innerText"
        browser.wait(lambda: "first picture: none yet; pick" in page.js(text), 30, "message")

        press("#samples .thumbnail-item")
        browser.wait(lambda: shows("#picture"), 30, "picture")
        slide("#steps", 5)
        press("#invert")
        before = browser.wait(lambda: shows("#result"), 60, "result")
        press("#get-code")
        code = browser.wait(lambda: next(iter(tmp_path.glob("*.safetensors")), None), 30, "download")
        assert len(Code.load(code)) == 1 and Code.load(code).p is not None

        page.js("[...document.querySelectorAll('[role=tab]')].find(tab => tab.innerText.startsWith('Move')).click()")
        browser.wait(lambda: page.js("document.querySelector('#move').offsetParent !== null"), 30, "tab")
        slide("#amount", 3)
        press("#move")
        browser.wait(lambda: shows("#result") not in (None, before), 60, "other result")

        before = shows("#result")
        torch.save(torch.randn(1, 16), tmp_path / "age.pt")
        page.choose_files("#directions button", [tmp_path / "age.pt"])
        value = "document.querySelector('#direction input').value"
        browser.wait(lambda: page.js(value) == "age (age.pt)", 30, "direction of another project")
        press("#move")
        browser.wait(lambda: shows("#result") not in (None, before), 60, "picture moved along it")

        (tmp_path / "notes.png").write_text("no picture")
        page.choose_files("#upload button", [tmp_path / "notes.png"])
        browser.wait(lambda: "notes.png: not an image" in page.js(text), 30, "message about the upload")
        asked = {e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"}
        assert list(own.glob("padinv-app-*/*"))
        assert len(asked) > 10 and not [u for u in asked if not u.startswith((url, "data:", "blob:"))]
    assert not list(own.glob("padinv-app-*")), "nothing stays behind"
