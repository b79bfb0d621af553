"""Options that commands share."""

import argparse


def positive(text: str) -> int:
    """A whole number from 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text}")
    return number


def layers(text: str) -> range:
    """FIRST-LAST, or one index."""
    first, _, last = text.partition("-")
    try:
        found = range(int(first), int(last or first) + 1)
    except ValueError:
        found = ()
    if not found:
        raise argparse.ArgumentTypeError(f"expected FIRST-LAST, the smaller first, as in 0-5, got {text!r}")
    return found


def add_networks(parser: argparse.ArgumentParser) -> None:
    """What `load_networks` reads."""
    parser.add_argument("--generator", required=True, metavar="FILE", help="checkpoint of any format that padinv reads")
    parser.add_argument("--encoder", metavar="FILE", help="checkpoint of an encoder for that generator; without one "
                        "the codes of pictures are searched for, which needs no training and takes longer")  # fmt: skip
    parser.add_argument("--steps", type=int, metavar="N",
                        help="of gradient (default: none after an encoder, 300 in a search)")  # fmt: skip
    parser.add_argument("--space", choices=("w+p", "w+", "w"), default="w+p",
                        help="what they move: W+ and the padding, W+ alone, or in a search one w for all layers "
                             "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--crop", choices=("ffhq", "tight", "center"), default="ffhq",
                        help="how the generator's images frame a picture: a face as in FFHQ, or closer, as in UTKFace; "
                             "or the largest centred square, for what has no face (default: %(default)s)")  # fmt: skip
    parser.add_argument("--batch", type=positive, metavar="N", help="pictures at once (default: what memory allows)")
    parser.add_argument("--bf16", action="store_true", help="round to 16 bits: a search in half the memory")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: a GPU where there is one)")


def load_networks(args: argparse.Namespace):
    from padinv.photos.networks import Networks

    return Networks.load(args.generator, args.encoder, args.device, template=args.crop, space=args.space,
                         steps=args.steps, batch=args.batch, bf16=args.bf16)  # fmt: skip


def written(files: list) -> None:
    print("written:", ", ".join(map(str, files)))
