"""Say what a file is, which networks it holds, and whether they can be read or why not; executes nothing."""

import argparse

EXAMPLE = """\
example:
  padinv inspect ffhq.pkl

exit status: 0 if a network can be read, else 1
"""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="checkpoint of any project")


def run(args: argparse.Namespace) -> int:
    from padinv.files.checkpoints import inspect

    lines, readable = inspect(args.file)
    print("\n".join(lines))
    return 0 if readable else 1
