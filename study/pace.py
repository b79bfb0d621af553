"""How fast P moves in refinement, as a share of the pace of w: looked at on images kept for choices.

    python -m study.pace padinv --data data/avatars-128/choice.zip --checkpoints checkpoints/avatars-128

What was chosen stands in `padinv.inversion.optimise.invert`.
"""

import argparse

from padinv.files.checkpoints import load_encoder, load_generator
from padinv.images.datasets import ImageDataset, to_float
from padinv.inversion.optimise import cosine, descend, draw, invert
from padinv.measure import metrics
from padinv.measure.lpips import lpips
from study import tables


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="study.pace", description=__doc__.split("\n\n")[0])
    parser.add_argument("encoder", help="file name of its checkpoint, without suffix")
    parser.add_argument("--data", required=True, help="folder or zip of images that no table reports")
    parser.add_argument("--checkpoints", required=True, help="folder of generator.safetensors and the encoder")
    args = parser.parse_args(arguments)
    G = load_generator(f"{args.checkpoints}/generator.safetensors")
    E = load_encoder(f"{args.checkpoints}/{args.encoder}.safetensors")
    x = to_float(ImageDataset(args.data, G.resolution).tensor(range(16)))  # [16, 3, R, R]
    start, rows = invert(x, E, G), []
    for steps in (10, 50):
        for pace in (0.1, 0.3, 1.0):
            paces = {start.w: 1.0} | dict.fromkeys(start.p.tensors, pace)
            code = descend(x, start, G, steps, paces, 0.03, cosine, lpips("alex"), 0.8)  # the settings of `invert`
            found = tables.summary(metrics.compare(draw(code, G), x))
            rows.append({"steps": str(steps), "pace": str(pace)} | found)
    print(tables.markdown_table(rows, ["steps", "pace", "mse", "lpips_alex", "lpips_vgg", "n_images"]))


if __name__ == "__main__":
    main()
