"""Move a code along a direction."""

import argparse
import json

from padinv.commands.options import add_networks, layers, load_networks, written

EXAMPLE = """\
example:
  padinv move me.png --direction checkpoints/faces-64/directions-w.safetensors --name glasses --strength -2 0 2 \\
      --crop tight --out moved.png --generator checkpoints/faces-64/generator.safetensors \\
      --encoder checkpoints/faces-64/padinv.safetensors

  One image for each strength, side by side in moved.png, their codes in moved.safetensors. Directions of your own:
  `padinv directions`.
"""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("code", metavar="CODE", help="code, or picture to invert")
    parser.add_argument("--direction", required=True, metavar="FILE", help="file of directions")
    parser.add_argument("--name", default="0", help="which of them: its name, or its number from 0 (default: 0)")
    parser.add_argument("--strength", type=float, nargs="+", default=[-3.0, 0.0, 3.0], metavar="S",
                        help="in standard deviations (default: -3 0 3)")  # fmt: skip
    parser.add_argument("--layers", type=layers, metavar="FIRST-LAST", help="w that move (default: all)")
    add_networks(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="picture to write, the codes beside it")


def run(args: argparse.Namespace) -> int:
    import torch

    from padinv.inversion.directions import move
    from padinv.model.tensors import read_metadata

    nets = load_networks(args)
    directions = nets.load_code(args.direction)
    known = [*map(str, range(len(directions)))]
    named = json.loads(read_metadata(args.direction).get("names", "[]"))
    if args.name not in known + named:
        raise ValueError(f"--name: expected one of {', '.join(named)}, or 0 to {known[-1]}, got {args.name!r}")
    direction = directions[(named if args.name in named else known).index(args.name)]
    written(nets.save(move(nets.code_of(args.code), direction, torch.tensor(args.strength), args.layers), args.out))
    return 0
