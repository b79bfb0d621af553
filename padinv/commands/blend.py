"""Draw the contour of one picture with the details of another."""

import argparse

from padinv.commands.options import add_networks, layers, load_networks, written

EXAMPLE = """\
example:
  padinv blend me.png you.png --layers 5-9 --crop tight --out blend.png \\
      --generator checkpoints/faces-64/generator.safetensors \\
      --encoder checkpoints/faces-64/padinv-split.safetensors

  P and the coarse w of the first with the fine w of the second, in blend.png and, as a code, in blend.safetensors. Each
  may be a code as well. The fine w, 5-9 at 64² and 5-11 at 128², hold colours; with all of W+, the default and the
  paper's blend, the shapes of the second come along. Encoders trained with `swap`, as padinv-split is, part them best.
"""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("contour", metavar="A", help="picture or code that gives the contour")
    parser.add_argument("details", metavar="B", help="picture or code that gives the details")
    add_networks(parser)
    parser.add_argument("--strength", type=float, default=1.0, help="share of B, 0 to 1 (default: %(default)s)")
    parser.add_argument("--layers", type=layers, metavar="FIRST-LAST", help="w that B gives (default: all)")
    parser.add_argument("--out", required=True, metavar="FILE", help="picture to write, its code beside it")


def run(args: argparse.Namespace) -> int:
    from padinv.inversion.editing import blend

    nets = load_networks(args)
    if args.layers and args.layers.start >= nets.G.num_ws:
        raise ValueError(f"--layers: expected indices of w from 0 to {nets.G.num_ws - 1}, got {args.layers.start} on")
    shares = 1.0 if args.layers is None else [float(i in args.layers) for i in range(nets.G.num_ws)]
    code = blend(nets.code_of(args.contour), nets.code_of(args.details), args.strength, w=shares)
    written(nets.save(code, args.out))
    return 0
