"""Compile the CUDA kernels ahead of their first use: `python -m padinv.ops build [--arch 8.0 9.0]`."""

import argparse
import sys

import torch

from padinv.ops import cuda


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="padinv.ops", description=__doc__)
    parser.add_argument("what", choices=("build",))
    parser.add_argument("--arch", nargs="+", help="compute capabilities, such as 9.0 (default: of the GPUs here)")
    args = parser.parse_args(arguments)
    found = {"{}.{}".format(*torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())}
    archs = args.arch or sorted(found)
    if not archs:
        sys.exit("padinv.ops: no GPU here; give --arch, such as 9.0 for an H100")
    for arch in archs:
        try:
            print(cuda.build(arch))
        except RuntimeError as error:
            sys.exit(f"padinv.ops: sm_{arch}: {error}")


if __name__ == "__main__":
    main()
