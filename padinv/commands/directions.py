"""Find directions of a generator: the axes of its w (pca), of its styles (sefa), or those of labels (svm)."""

import argparse

from padinv.commands.options import add_networks, layers, load_networks, positive

EXAMPLE = """\
example:
  padinv directions --generator checkpoints/faces-64/generator.safetensors --count 8 --out directions.safetensors

  For directions of labels, a folder or zip of aligned images with a labels.csv (a column "file", and one for each
  label), which are inverted first:
  padinv directions --method svm --labelled faces.zip --label smiling hair=long --out labels.safetensors \\
      --generator checkpoints/faces-64/generator.safetensors --encoder checkpoints/faces-64/padinv.safetensors

  `padinv move` moves codes along them; strength 1 is one standard deviation.
"""
TRUE, FALSE = {"1", "true", "yes"}, {"0", "-1", "false", "no"}


def add(parser: argparse.ArgumentParser) -> None:
    add_networks(parser)
    parser.add_argument("--method", choices=("pca", "sefa", "svm"), default="pca", help="(default: %(default)s)")
    parser.add_argument("--count", type=positive, default=10, metavar="N", help="pca, sefa: directions (default: 10)")
    parser.add_argument("--layers", type=layers, metavar="FIRST-LAST", help="sefa: w that count (default: all)")
    parser.add_argument("--labelled", metavar="DIR", help="svm: folder or zip of images with a labels.csv")
    parser.add_argument("--label", nargs="+", default=[], metavar="COLUMN[=VALUE]",
                        help="svm: columns of yes and no, or the value that means yes")  # fmt: skip
    parser.add_argument("--out", required=True, metavar="FILE", help="safetensors file to write")


def run(args: argparse.Namespace) -> int:
    import torch

    from padinv.inversion.directions import pca_directions, sefa_directions
    from padinv.model.codes import Code
    from padinv.photos.networks import fingerprint

    if not (args.method == "svm") == bool(args.labelled) == bool(args.label):
        raise ValueError("--method svm, --labelled, --label: expected all three or none of them")
    nets = load_networks(args)
    names = [f"{args.method} {i + 1}" for i in range(args.count)]
    if args.method == "pca":
        directions = pca_directions(nets.G, args.count)
    elif args.method == "sefa":
        z = torch.randn(1000, nets.G.config.z_dim, generator=torch.Generator().manual_seed(0))
        directions = sefa_directions(nets.G, Code(nets.G.mapping(z.to(nets.G.w_avg))), args.count, args.layers)
    else:
        names = args.label
        directions = from_labels(nets, args.labelled, args.label)
    directions.save(args.out, names=names, generator=fingerprint(nets.G))
    print(f"written: {args.out}: {', '.join(names)}")
    return 0


def from_labels(nets, folder: str, labels: list[str]):
    """Directions of W+ (& P) for which the SVM's accuracies on a fifth of the images are printed."""
    import torch
    from tqdm import tqdm

    from padinv.images.datasets import ImageDataset, to_float
    from padinv.inversion.directions import svm_directions
    from padinv.model.codes import Code

    images = ImageDataset(folder, nets.G.resolution)
    if images.labels is None:
        raise ValueError(f"--labelled {folder}: has no labels.csv; expected one with a column 'file' and the labels")
    # In a fixed random order: the last fifth tests the SVM, and files are often sorted by what they show.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    true = torch.tensor([truths(images.labels, label) for label in labels]).T[order]  # [N, K]
    codes = []
    for part in tqdm(order.split(64), unit="batch"):
        code = nets.invert(to_float(images.tensor(part.tolist(), progress=False)))
        codes.append((code if nets.space == "w+p" else Code(code.w)).to("cpu"))
    directions, accuracy = svm_directions(Code.cat(codes), true)
    for label, share in zip(labels, accuracy.tolist(), strict=True):
        print(f"{label}: told right in {share:.0%} of the images held out (balanced; 50% is guessing)")
    return directions


def truths(rows: list[dict[str, str]], label: str) -> list[bool]:
    """Whether it holds, of each row. ValueError names what is wrong with the label."""
    column, equals, value = label.partition("=")
    if column not in rows[0]:
        columns = ", ".join(filter(None, rows[0]))  # None: of what a long row has beyond them
        raise ValueError(f"--label {label}: labels.csv has no column {column!r}; it has {columns}")
    words = [row[column].strip() for row in rows]
    if not equals and (other := {word.lower() for word in words} - TRUE - FALSE):
        raise ValueError(f"--label {label}: holds {sorted(other)[:5]}, neither yes nor no; give one, as "
                         f"{column}={sorted(other)[-1]}")  # fmt: skip
    true = [word == value if equals else word.lower() in TRUE for word in words]
    if len(set(true)) < 2:
        raise ValueError(f"--label {label}: {sum(true)} of {len(true)} images have it; both kinds are needed")
    return true
