"""The page, in Gradio: a few components around the functions of `padinv.app.studio`."""

import functools
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from padinv.app import studio as studios
from padinv.app.studio import FINE, MAX_BYTES, MAX_STEPS, Face, Studio

TITLE = "PadInv: pictures as codes of a generator"
KEPT = 3600, 86400  # seconds from one removal of old uploads and results to the next, and how old they may be
# Nothing that the page could be talked into loads anything from elsewhere.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"
CSS = """footer { display: none !important }
.image-frame, .image-frame img { width: 100%; height: 100%; object-fit: contain }"""


def gradio():
    """The package. Raises ImportError that names the command which installs it."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import, which would ask a server for its version
    try:
        import gradio
    except ImportError as error:
        raise ImportError(f'the page needs the package gradio ({error}). Fix: pip install -e ".[app]"') from error
    return gradio


def shown(f: Callable) -> Callable:
    """Errors of the library become messages in the page."""

    @functools.wraps(f)
    def shows(*args, **kwargs):
        try:
            return f(*args, **kwargs)
        except (ImportError, MemoryError, OSError, RuntimeError, ValueError) as error:
            raise gradio().Error(str(error) or type(error).__name__, duration=None, print_exception=False) from None

    return shows


def pixels(image: Tensor):
    """uint8 [3, H, W] as Gradio takes it."""
    return image.permute(1, 2, 0).numpy()


def build(networks: dict[str, Callable[[], Studio]], folder: str):
    """The page as `gradio.Blocks`.

    Args:
        networks: name -> what loads them, once each; the first is open at the start.
        folder: for uploads and results; the only one that the page reads or writes.
    """
    os.environ["GRADIO_TEMP_DIR"] = folder
    gr = gradio()
    load = functools.cache(lambda name: networks[name]())
    first = next(iter(networks))
    start = load(first)

    def gallery(studio: Studio) -> list:
        return [(pixels(image), f"{i + 1}") for i, image in enumerate(studio.samples)]

    def layers(studio: Studio) -> dict:
        last = studio.nets.G.num_ws - 1
        return {"maximum": last, "value": min(FINE, last)}

    def result(name: str, code, face: Face):
        """What a new code shows: the image, the photograph with it, the two downloads."""
        studio = load(name)
        place = tempfile.TemporaryDirectory(dir=folder)  # goes when the next one takes its place in the session
        files = studios.saved(studio, code, place.name)
        images = pixels(studios.drawing(studio, code)), pixels(studios.pasted(studio, face, code))
        return code, place, *images, *(gr.DownloadButton(value=path, interactive=True) for path in files)

    def needed(chosen, what: str):
        if chosen is None:
            raise ValueError(f"{what}: none yet; pick or upload a picture, and press the button that inverts it")
        return chosen

    def image(label: str, height: int, kind: str = "png"):
        return gr.Image(label=label, height=height, interactive=False, format=kind, min_width=100,
                        elem_id=label.replace(" ", "-"), buttons=["download", "fullscreen"])  # fmt: skip

    @shown
    def switch(name):
        studio = load(name)
        return (gallery(studio), gr.Radio(value=studio.nets.template),
                gr.Radio(choices=list(studio.ways), value=studio.ways[0]),
                gr.Dropdown(choices=list(studio.directions), value=next(iter(studio.directions))),
                gr.Slider(**layers(studio)), *(gr.DownloadButton(value=None, interactive=False) for _ in range(2)),
                *[None] * 12)  # fmt: skip

    @shown
    def pick(name, event: gr.SelectData):
        photo = load(name).samples[event.index]
        return photo, pixels(photo), "center", None

    @shown
    def upload(name, path):
        photo = studios.uploaded(path)
        return photo, pixels(photo), load(name).nets.template

    @shown
    def invert(name, photo, template, way, steps, progress=gr.Progress()):  # noqa: B008
        face = studios.inverted(load(name), needed(photo, "picture"), template, way, int(steps), progress)
        return face, pixels(studios.drawing(load(name), face.code))

    @shown
    def blend(name, face, second, strength, first_w):
        code = studios.blended(needed(face, "first picture"), needed(second, "second picture"), strength, first_w)
        return result(name, code, face)

    @shown
    def edit(name, face, before, after, template, drawn, strength, progress=gr.Progress()):  # noqa: B008
        needed(face, "first picture")
        if not before or not after:
            raise ValueError("before, after: upload the two pictures of the pair first")
        studio = load(name)
        pair = studios.uploaded(before), studios.uploaded(after)
        return result(name, studios.edited(studio, face, pair, template, drawn == "drawn", strength, progress), face)

    @shown
    def take(name, path):
        studio = studios.with_directions(load(name), path)
        return studio, gr.Dropdown(choices=list(studio.directions), value=next(iter(studio.directions)))

    @shown
    def move(name, studio, face, direction, amount):
        code = studios.moved(studio or load(name), needed(face, "first picture"), {direction: amount})
        return result(name, code, face)

    @shown
    def go_on(name, face, code):
        drawn = studios.drawing(load(name), needed(code, "result"))
        return Face(face.photo, face.matrix, studios.to_float(drawn)[None], code), pixels(drawn)

    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=KEPT) as page:
        picture, face, second, code, place, more = (gr.State() for _ in range(6))
        gr.Markdown(f"# {TITLE}")
        with gr.Row():
            with gr.Column():
                name = gr.Dropdown(list(networks), value=first, label="networks", visible=len(networks) > 1)
                gr.Markdown("Pick a picture, or upload one:")
                samples = gr.Gallery(gallery(start), show_label=False, columns=4, height=285, elem_id="samples",
                                     allow_preview=False, format="png", interactive=False, buttons=[])  # fmt: skip
                file = gr.File(label=f"picture, up to {MAX_BYTES >> 20} MB", elem_id="upload", height=120)
                template = gr.Radio([("a face, as in FFHQ", "ffhq"), ("a face, close", "tight"),
                                     ("the middle", "center")], value=start.nets.template, label="crop")  # fmt: skip
                way = gr.Radio(list(start.ways), value=start.ways[0], label="invert by")
                steps = gr.Slider(1, MAX_STEPS, studios.STEPS, step=1, label="steps", elem_id="steps")
                with gr.Row():
                    one = gr.Button("Invert", variant="primary", elem_id="invert")
                    two = gr.Button("Invert as second", elem_id="invert-second")
            with gr.Column():
                with gr.Row():
                    chosen, mine, other = (image(label, 200) for label in ("picture", "first", "second"))
                with gr.Tab("Blend"):
                    share = gr.Slider(0, 1, 1, label="details of the second in the contour of the first")
                    first_w = gr.Slider(
                        0, **layers(start), step=1, elem_id="first-w",
                        label="first w of the second (0: all, as in the paper, with its shapes)",
                    )  # fmt: skip
                    go_blend = gr.Button("Blend", elem_id="blend")
                with gr.Tab("Edit as a pair shows"):
                    with gr.Row():
                        before = gr.File(label="before", height=120, elem_id="before")
                        after = gr.File(label="after", height=120, elem_id="after")
                    drawn = gr.Radio([("drawn into the picture", "drawn"), ("added to the code", "added")],
                                     value="drawn", label="the change is")  # fmt: skip
                    strength = gr.Slider(0, 1, 1, label="strength")
                    go_edit = gr.Button("Edit", elem_id="edit")
                with gr.Tab("Move along a direction"):
                    names = list(start.directions)
                    direction = gr.Dropdown(names, value=names[0], label="direction", elem_id="direction")
                    amount = gr.Slider(-4, 4, 0, step=0.25, label="standard deviations, or lengths of a .npy or .pt",
                                       elem_id="amount")  # fmt: skip
                    given = gr.File(label="other directions: .safetensors of padinv, .npy or .pt", height=120,
                                    elem_id="directions")  # fmt: skip
                    go_move = gr.Button("Move", elem_id="move")
                with gr.Row():
                    shape, whole = image("result", 280), image("in the photograph", 280, "jpeg")
                with gr.Row():
                    go_first = gr.Button("Go on from the result")
                    get_picture = gr.DownloadButton("Download picture", interactive=False, elem_id="get-picture")
                    get_code = gr.DownloadButton("Download code", interactive=False, elem_id="get-code")

        results = [code, place, shape, whole, get_picture, get_code]
        one_at_a_time = {"concurrency_limit": 1, "concurrency_id": "networks"}
        name.change(switch, name, [samples, template, way, direction, first_w, get_picture, get_code, picture, face,
                                   second, code, place, chosen, mine, other, shape, whole, more, given],
                    **one_at_a_time)  # fmt: skip
        samples.select(pick, name, [picture, chosen, template, file])
        file.upload(upload, [name, file], [picture, chosen, template])
        settings = [name, picture, template, way, steps]
        inverts = one.click(invert, settings, [face, mine], **one_at_a_time)
        inverts.success(shown(lambda name, face: result(name, face.code, face)), [name, face], results, **one_at_a_time)
        two.click(invert, settings, [second, other], **one_at_a_time)
        go_blend.click(blend, [name, face, second, share, first_w], results, **one_at_a_time)
        go_edit.click(edit, [name, face, before, after, template, drawn, strength], results, **one_at_a_time)
        given.upload(take, [name, given], [more, direction], **one_at_a_time)
        go_move.click(move, [name, more, face, direction, amount], results, **one_at_a_time)
        go_first.click(go_on, [name, face, code], [face, mine], **one_at_a_time)
    return page


def launch(page, host: str, port: int | None, **options):
    """Serve it, to nobody but who reaches that address, with no file but its own in reach: (app, URL)."""
    gr = gradio()
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none from elsewhere
    app, url, _ = page.launch(
        server_name=host, server_port=port, share=False, quiet=True, max_file_size=MAX_BYTES, allowed_paths=[],
        ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False, footer_links=[], theme=theme, css=CSS,
        app_kwargs={"middleware": [policy()]}, **options,
    )  # fmt: skip
    return app, url


def policy():
    """Middleware that sends POLICY with every answer."""
    from starlette.middleware import Middleware
    from starlette.types import Message, Receive, Scope, Send

    class Policy:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send):
            async def sent(message: Message):
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
                await send(message)

            await self.app(scope, receive, sent)

    return Middleware(Policy)


def serve(generator, encoder=None, device="auto", host="127.0.0.1", port=None, browser=False) -> None:
    """Open the page and serve it until Ctrl-C, for the networks of these files or for those in checkpoints/ here.

    Raises:
        FileNotFoundError: neither are there. ImportError: no Gradio. OSError: the port
            is taken. ValueError: as `Networks.load`.
    """
    gradio()
    if generator:
        networks = {Path(generator).stem: lambda: studios.opened(generator, encoder, device)}
    else:
        networks = {
            name: functools.partial(studios.opened, *files, device, f"data/{name}/outside.zip")
            for name, files in studios.shipped(".").items()
        }
    with tempfile.TemporaryDirectory(prefix="padinv-app-") as folder:
        page = build(networks, folder)
        try:
            _, url = launch(page, host, port, prevent_thread_lock=True, inbrowser=browser)
        except (OSError, OverflowError) as error:  # the latter of a port beyond 65535
            raise OSError(f"--host {host}, --port {port}: cannot listen there; give another port, or none, for the "
                          f"first that is free ({error})") from error  # fmt: skip
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # the folder goes then too
        print(f"{TITLE}: {url} (Ctrl-C ends it)", flush=True)
        try:
            page.block_thread()
        finally:
            page.close(verbose=False)
