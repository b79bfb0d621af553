"""Training of the generator and of the encoders: one process or many, a CPU or GPUs, resumable to the bit.

python -m padinv.training generator --data build/avatars-128/train.zip --out generator.safetensors --workdir runs/g
accelerate launch -m padinv.training encoder --method padinv …
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from padinv.training.encoder import EncoderTraining, train_encoder
from padinv.training.generator import GeneratorTraining, train_generator
from padinv.training.loop import Run, Stop
from padinv.training.regression import Regression, train_by_labels


def configure(cls: type, section: dict, overrides: list[str]) -> Run:
    """A training configuration from a section of params.yaml and `key=value` overrides; unknown keys are refused."""
    import yaml

    values = dict(section)
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"--set: expected key=value, got {override!r}")
        values[key] = yaml.safe_load(value)
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"unknown training settings {unknown}; there are {sorted(known)}")
    return cls(**values)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="padinv.training", description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("generator", "encoder"))
    parser.add_argument("--section", help="of the parameters (default: train_generator if there, or train_encoder)")
    parser.add_argument("--method", default="padinv", help="encoder: entry of the section's methods (%(default)s)")
    parser.add_argument("--base", help="encoder: checkpoint of the encoder that a residual one goes on from")
    parser.add_argument("--init", help="encoder: checkpoint whose weights training starts from")
    parser.add_argument("--labels", nargs="+", help="generator: regress images on these columns of their labels.csv")
    parser.add_argument("--data", required=True, help="folder or zip of images")
    parser.add_argument("--generator", help="encoder: checkpoint of the generator to invert")
    parser.add_argument("--out", required=True, help="safetensors file to write")
    parser.add_argument("--workdir", required=True, help="folder of the resumable state and of sample grids")
    parser.add_argument("--curves", help="folder for the training curves")
    parser.add_argument("--params", default="params.yaml", help="parameters (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a parameter")
    args = parser.parse_args(arguments)
    import yaml

    try:
        params = yaml.safe_load(Path(args.params).read_text())
        if args.what == "generator":
            section = dict(params[args.section] if args.section else params.get("train_generator", {}))
            if args.labels:
                section["labels"] = args.labels
            kind, train = (Regression, train_by_labels) if "labels" in section else (GeneratorTraining, train_generator)
            train(args.data, args.out, configure(kind, section, args.set), args.workdir, args.curves)
        else:
            section = dict(params[args.section or "train_encoder"])
            methods = section.pop("methods")
            if args.method not in methods:
                raise ValueError(f"--method: expected one of {sorted(methods)}, got {args.method!r}")
            method = dict(methods[args.method])
            section["encoder"] = section.get("encoder", {}) | method.pop("encoder", {})
            section |= method
            config = configure(EncoderTraining, section, args.set)
            if args.generator is None:
                raise ValueError("--generator: the checkpoint of the generator is needed")
            train_encoder(args.data, args.generator, args.out, config, args.workdir, args.curves, args.base, args.init)
    except (Stop, ValueError, OSError) as error:
        sys.exit(f"padinv.training: {error}")


if __name__ == "__main__":
    main()
