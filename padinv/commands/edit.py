"""Do to pictures what one pair of pictures shows."""

import argparse
import sys
from pathlib import Path

from padinv.commands.options import add_networks, load_networks, written

EXAMPLE = """\
example:
  padinv edit me.png you.png --before face.png --after face-with-hat.png --crop tight --draw --out hats \\
      --generator checkpoints/faces-64/generator.safetensors \\
      --encoder checkpoints/faces-64/padinv.safetensors

  Writes hats/me.png and hats/me.safetensors, and so on. With --draw the change is drawn into each picture, which is
  then inverted: truer, and for pictures alone. Without, the difference of the pair's codes is added to each code.

exit status: 0 all edited, 3 done but some were refused, 1 stopped by an error, 2 wrong usage.
"""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("targets", nargs="+", metavar="TARGET", help="picture or code to edit")
    parser.add_argument("--before", required=True, metavar="FILE", help="picture or code without the change")
    parser.add_argument("--after", required=True, metavar="FILE", help="the same with it")
    add_networks(parser)
    parser.add_argument("--strength", type=float, default=1.0,
                        help="of the change; -1 undoes it, with --draw 0 to 1 (default: %(default)s)")  # fmt: skip
    parser.add_argument("--draw", action="store_true", help="draw the change into the pictures, then invert them")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the results")


def run(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from padinv.inversion.editing import analogy, customize

    nets = load_networks(args)
    plain = nets if nets.E is None else replace(nets, steps=0)  # refinement adds what each of a pair lacks
    read = nets.image if args.draw else plain.code_of
    before, after = read(args.before), read(args.after)
    taken, bad = set(), 0
    for target in args.targets:
        stem = name = Path(target).stem
        while name.casefold() in taken:
            name = f"{name}~2" if name == stem else f"{stem}~{int(name.rpartition('~')[2]) + 1}"
        taken.add(name.casefold())
        try:
            if args.draw:
                code = nets.invert(analogy(nets.image(target), before, after, args.strength))
            else:
                code = customize(nets.code_of(target), before, after, args.strength)
        except (ValueError, OSError) as error:  # the others go on
            print(f"refused: {error}", file=sys.stderr)
            bad += 1
            continue
        written(nets.save(code, Path(args.out) / f"{name}.png"))
    return 3 if bad else 0
