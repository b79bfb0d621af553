"""Open a page to play with: invert, blend, edit and move pictures in a browser."""

import argparse

EXAMPLE = """\
example:
  padinv app --generator ffhq.pkl

  Without --generator it takes the networks in checkpoints/ of the folder, a checkout, that it is started in. Needs
  Gradio: pip install -e ".[app]". The page is for this machine alone, and sends nothing anywhere.
"""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--generator", metavar="FILE", help="checkpoint, of any format that padinv reads")
    parser.add_argument("--encoder", metavar="FILE", help="checkpoint of an encoder for that generator")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: a GPU where there is one)")
    parser.add_argument("--port", type=int, help="(default: the first that is free from 7860 on)")
    parser.add_argument("--host", default="127.0.0.1",
                        help="where to listen; another than %(default)s lets others in, without password")  # fmt: skip
    parser.add_argument("--open", action="store_true", help="open it in a browser")


def run(args: argparse.Namespace) -> int:
    from padinv.app.page import serve

    serve(args.generator, args.encoder, args.device, args.host, args.port, args.open)
    return 0
