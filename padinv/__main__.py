"""python -m padinv invert IMAGE... --generator FILE --encoder FILE --out DIR
python -m padinv inspect FILE
"""

import argparse
import os
import sys

EXAMPLE = """\
example:
  python -m padinv invert holiday.jpg portraits/ more.zip \\
      --generator checkpoints/faces-64/generator.safetensors \\
      --encoder checkpoints/faces-64/padinv.safetensors --crop tight --out inverted

  Each face is found, aligned, inverted, and pasted back. In the folder inverted:
    reconstructions/holiday-1.png    codes/holiday-1.safetensors    compare/holiday-1.png    (face 1, the largest)
    pasted/holiday.jpg               the photograph with its inversions in place
    records/*.jsonl                  a line for each picture: MSE, PSNR, SSIM, LPIPS-Alex and landmarks of its faces
    report.json                      means, pictures with several faces, and the refused ones with reasons
  The same command again does only what is missing. On several GPUs: accelerate launch -m padinv invert ...

exit status: 0 all pictures inverted, 3 done but some were refused (see report.json; 0 under accelerate launch),
  1 stopped by an error, 2 wrong usage.
"""


def invert(args: argparse.Namespace) -> int:
    from padinv.ops.frozen import keep_memory
    from padinv.photos.folder import invert_photos

    keep_memory()
    report = invert_photos(
        args.pictures, args.generator, args.encoder, args.out, steps=args.steps, space=args.space, template=args.crop,
        aligned=args.aligned, largest=args.largest, pasted=not args.no_paste, identity=args.identity,
        batch=args.batch, compiled=args.compile, device=args.device, workers=args.workers,
    )  # fmt: skip
    if report is None:  # not the first of several processes
        return 0
    refused = report["refused"]
    print(f"{report['inverted']} of {report['pictures']} pictures inverted, {report['faces']} faces: {args.out}")
    if report["mean"]:
        print("mean: " + ", ".join(f"{key} {value:.4f}" for key, value in report["mean"].items()))
    say([f"{n} faces in {file}, each inverted" for file, n in report["several_faces"].items()], args.out)
    say([f"refused: {bad['reason']}" for bad in refused], args.out)
    launched = int(os.environ.get("WORLD_SIZE", 1)) > 1  # a launcher takes any other status for a crash
    return 3 if refused and not launched else 0


def inspect(args: argparse.Namespace) -> int:
    from padinv.files.checkpoints import inspect

    lines, readable = inspect(args.file)
    print("\n".join(lines))
    return 0 if readable else 1


def say(lines: list[str], out: str) -> None:
    """The first ten."""
    for line in lines[:10]:
        print(line, file=sys.stderr)
    if len(lines) > 10:
        print(f"… and {len(lines) - 10} more such lines: see {out}/report.json", file=sys.stderr)


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text}")
    return number


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m padinv", description="GAN inversion in W+ and padding space.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    sub = commands.add_parser("invert", help="invert the faces in photographs", epilog=EXAMPLE,
                              description="Invert the faces in photographs, and paste the results back.",
                              formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    sub.set_defaults(run=invert)
    sub.add_argument("pictures", nargs="+", metavar="PICTURE", help="image, folder (with sub-folders) or zip of images")
    sub.add_argument("--generator", required=True, metavar="FILE", help="checkpoint, of any format that padinv reads")
    sub.add_argument("--encoder", required=True, metavar="FILE", help="checkpoint of an encoder for that generator")
    sub.add_argument("--out", required=True, metavar="DIR", help="folder of the results")
    sub.add_argument("--steps", type=int, default=0, help="of gradient, after the encoder (default: %(default)s)")
    sub.add_argument("--space", choices=("w+p", "w+"), default="w+p", help="what they refine (default: %(default)s)")
    sub.add_argument("--crop", choices=("ffhq", "tight"), default="ffhq",
                     help="how faces are framed in the generator's images: as in FFHQ, or closer, as in UTKFace "
                          "(default: %(default)s)")  # fmt: skip
    sub.add_argument("--aligned", action="store_true", help="the pictures are crops of faces already: detect nothing")
    sub.add_argument("--largest", action="store_true", help="of several faces in a picture, invert the largest alone")
    sub.add_argument("--no-paste", action="store_true", help="do not write the photographs with the inversions in them")
    sub.add_argument("--identity", metavar="FILE", help="ArcFace weights (model_ir_se50.pth), to measure likeness")
    sub.add_argument("--batch", type=positive, default=16, metavar="N", help="faces at once (default: %(default)s)")
    sub.add_argument(
        "--compile", action="store_true", help="compile the generator first: a minute, then shorter --steps"
    )
    sub.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: a GPU where there is one)")
    sub.add_argument("--workers", type=int, metavar="N", help="processes that read pictures and find faces; 0: none")
    about = "Say what a file is, which networks it holds, and whether they can be read or why not; executes nothing."
    sub = commands.add_parser("inspect", help="say which networks a file holds", description=about,
                              epilog="exit status: 0 if a network can be read, else 1")  # fmt: skip
    sub.set_defaults(run=inspect)
    sub.add_argument("file", metavar="FILE", help="checkpoint of any project")
    args = parser.parse_args(arguments)
    try:
        return args.run(args)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"padinv: {error}")
    except KeyboardInterrupt:
        sys.exit("padinv: interrupted; the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
