"""Find the codes of pictures, and paste what the generator draws of them back."""

import argparse
import os
import sys

from padinv.commands.options import add_networks

EXAMPLE = """\
example:
  padinv invert holiday.jpg portraits/ more.zip --crop tight --out inverted \\
      --generator checkpoints/faces-64/generator.safetensors \\
      --encoder checkpoints/faces-64/padinv.safetensors

  Each face is found, aligned, inverted, and pasted back. In the folder inverted:
    reconstructions/holiday-1.png    codes/holiday-1.safetensors    compare/holiday-1.png    (face 1, the largest)
    pasted/holiday.jpg               the photograph with its inversions in place
    records/*.jsonl                  a line for each picture: MSE, PSNR, SSIM, LPIPS-Alex and landmarks of its faces
    report.json                      means, pictures with several faces, and the refused ones with reasons
  The same command again does only what is missing. On several GPUs: accelerate launch -m padinv invert ...

  Any StyleGAN2 generator will do, without an encoder; of cars, cats or churches take the middle of each picture:
  padinv invert car.jpg --generator cars.pkl --crop center --out cars

exit status: 0 all pictures inverted, 3 done but some were refused (see report.json; 0 under accelerate launch),
  1 stopped by an error, 2 wrong usage.
"""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pictures", nargs="+", metavar="PICTURE",
                        help="image, folder (with sub-folders) or zip of images")  # fmt: skip
    add_networks(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--aligned", action="store_true",
                        help="the pictures are crops already: detect and paste nothing")  # fmt: skip
    parser.add_argument("--largest", action="store_true", help="of several faces in a picture, take the largest alone")
    parser.add_argument("--no-paste", action="store_true", help="do not write the pictures with the inversions in them")
    parser.add_argument("--identity", metavar="FILE", help="ArcFace weights (model_ir_se50.pth), to measure likeness")
    parser.add_argument("--compile", action="store_true",
                        help="compile the networks first: seconds to a minute, then less for each picture")  # fmt: skip
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read pictures and find faces; 0: none")


def run(args: argparse.Namespace) -> int:
    from padinv.ops.memory import keep_memory
    from padinv.photos.folder import invert_photos

    keep_memory()
    report = invert_photos(
        args.pictures, args.generator, args.encoder, args.out, steps=args.steps, space=args.space, template=args.crop,
        aligned=args.aligned, largest=args.largest, pasted=not args.no_paste, identity=args.identity,
        batch=args.batch, bf16=args.bf16, compiled=args.compile, device=args.device, workers=args.workers,
    )  # fmt: skip
    if report is None:  # not the first of several processes
        return 0
    refused = report["refused"]
    faces = "" if args.aligned or args.crop == "center" else f", {counted(report['faces'], 'face')}"
    print(f"{report['inverted']} of {counted(report['pictures'], 'picture')} inverted{faces}: {args.out}")
    if report["mean"]:
        print("mean: " + ", ".join(f"{key} {value:.4f}" for key, value in report["mean"].items()))
    say([f"{n} faces in {file}, each inverted" for file, n in report["several_faces"].items()], args.out)
    say([f"refused: {bad['reason']}" for bad in refused], args.out)
    launched = int(os.environ.get("WORLD_SIZE", 1)) > 1  # a launcher takes any other status for a crash
    return 3 if refused and not launched else 0


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def say(lines: list[str], out: str) -> None:
    """The first ten."""
    for line in lines[:10]:
        print(line, file=sys.stderr)
    if len(lines) > 10:
        print(f"… and {len(lines) - 10} more such lines: see {out}/report.json", file=sys.stderr)
