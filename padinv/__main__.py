"""The command `padinv`, also `python -m padinv`: one module of padinv.commands for each of its commands."""

import argparse
import sys
import warnings

from padinv.commands import app, blend, directions, edit, inspect, invert, move, train

COMMANDS = (invert, blend, edit, directions, move, app, train, inspect)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("padinv", description="GAN inversion in W+ and padding space.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        name, (first, *_) = command.__name__.rpartition(".")[2], command.__doc__.splitlines()
        sub = commands.add_parser(name, help=first.rstrip("."), description=command.__doc__, epilog=command.EXAMPLE,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
        command.add(sub)
        sub.set_defaults(run=command.run)
    args = parser.parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"padinv: {message}", file=sys.stderr)
            return args.run(args)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        full = "out of memory" in str(error) or "can't allocate memory" in str(error)
        sys.exit(f"padinv: out of memory; a smaller --batch, or --bf16, takes less ({str(error).splitlines()[0]})"
                 if full else f"padinv: {error}")  # fmt: skip
    except KeyboardInterrupt:
        goes_on = args.run in (invert.run, train.run)  # the others start anew
        sys.exit("padinv: interrupted" + "; the same command goes on from here" * goes_on)


if __name__ == "__main__":
    sys.exit(main())
