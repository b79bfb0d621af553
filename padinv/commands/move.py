"""Move a code along a direction."""

import argparse

from padinv.commands.options import add_networks, layers, load_networks, written

EXAMPLE = """\
example:
  padinv move me.png --direction checkpoints/faces-64/directions-w.safetensors --name glasses --strength -2 0 2 \\
      --crop tight --out moved.png --generator checkpoints/faces-64/generator.safetensors \\
      --encoder checkpoints/faces-64/padinv.safetensors

  One image for each strength, side by side in moved.png, their codes in moved.safetensors. Directions of your own:
  `padinv directions`. Or one of w that another project found for the same generator, such as a boundary of
  InterFaceGAN, as .npy or .pt; strength 1 then adds what is in the file:
  padinv move me.png --direction age.pt --strength -3 3 --crop tight --out aged.png \\
      --generator checkpoints/faces-64/generator.safetensors --encoder checkpoints/faces-64/padinv.safetensors
"""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("code", metavar="CODE", help="code, or picture to invert")
    parser.add_argument("--direction", required=True, metavar="FILE",
                        help="directions: .safetensors of padinv, .npy or .pt of others")  # fmt: skip
    parser.add_argument("--name", default="0", help="which of them: its name, or its number from 0 (default: 0)")
    parser.add_argument("--strength", type=float, nargs="+", default=[-3.0, 0.0, 3.0], metavar="S",
                        help="in standard deviations, or in lengths of a .npy or .pt (default: -3 0 3)")  # fmt: skip
    parser.add_argument("--layers", type=layers, metavar="FIRST-LAST", help="w that move (default: all)")
    add_networks(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="picture to write, the codes beside it")


def run(args: argparse.Namespace) -> int:
    import torch

    from padinv.inversion.directions import move

    nets = load_networks(args)
    named, directions = nets.load_directions(args.direction)
    known = [*map(str, range(len(directions)))]
    if args.name not in known + named:
        raise ValueError(f"--name: expected one of {', '.join(named)}, or 0 to {known[-1]}, got {args.name!r}")
    direction = directions[(named if args.name in named else known).index(args.name)]
    written(nets.save(move(nets.code_of(args.code), direction, torch.tensor(args.strength), args.layers), args.out))
    return 0
