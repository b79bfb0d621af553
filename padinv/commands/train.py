"""Train a generator or an encoder; the options are those of padinv.training."""

import argparse

EXAMPLE = """\
example:
  padinv train generator --data my_images.zip --out g.safetensors --workdir runs/g --set images=2000000

  All options: padinv train generator --help. On several GPUs: accelerate launch -m padinv.training generator ...
"""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="generator|encoder ...", help="what, and how")


def run(args: argparse.Namespace) -> int:
    from padinv.training.__main__ import main

    main(args.arguments)
    return 0
