"""Training of the generator and of the encoders: one process or many, a CPU or GPUs, resumable to the bit.

python -m padinv.training generator --data build/avatars-128/train.zip --out generator.safetensors --workdir runs/g
accelerate launch -m padinv.training encoder --method padinv …
"""

import argparse
import dataclasses
import sys
import typing
from pathlib import Path

from padinv.training.encoder import EncoderTraining, train_encoder
from padinv.training.generator import GeneratorTraining, train_generator
from padinv.training.loop import Run, Stop
from padinv.training.regression import Regression, train_by_labels


def convert(field: dataclasses.Field, value: object) -> object:
    """A value as YAML read it in the type of its setting: YAML takes 1e-4 and 1e2 for text.

    Raises:
        ValueError: it has another type; names the setting.
    """
    kind, *none = typing.get_args(field.type) or (field.type,)  # `float | None` has both
    try:
        if kind is float and not isinstance(value, bool):
            value = float(value)
        elif kind is int and isinstance(value, float | str) and float(value).is_integer():
            value = int(float(value))
        elif kind is tuple and isinstance(value, list):
            value = tuple(value)
    except (TypeError, ValueError):  # no number, refused below
        pass
    if type(value) not in (kind, *none):
        raise ValueError(f"{field.name}: expected {kind.__name__}, got {value!r}")
    return value


def section_of(params: dict, name: str) -> dict:
    """A copy of a section of the parameters. ValueError if it is missing."""
    if name not in params:
        raise ValueError(f"--section: expected one of {sorted(params)}, got {name!r}")
    return dict(params[name] or {})


def configure(cls: type, section: dict, overrides: list[str]) -> Run:
    """A training configuration from a section of params.yaml and `key=value` overrides.

    Raises:
        ValueError: an unknown setting, or a value of another type than the setting's.
    """
    import yaml

    values = dict(section)
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"--set: expected key=value, got {override!r}")
        values[key] = yaml.safe_load(value)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"unknown training settings {unknown}; there are {sorted(fields)}")
    return cls(**{name: convert(fields[name], value) for name, value in values.items()})


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
        params = yaml.safe_load(Path(args.params).read_text()) or {}
        if args.what == "generator":
            section = section_of({"train_generator": {}} | params, args.section or "train_generator")
            if args.labels:
                section["labels"] = args.labels
            kind, train = (Regression, train_by_labels) if "labels" in section else (GeneratorTraining, train_generator)
            train(args.data, args.out, configure(kind, section, args.set), args.workdir, args.curves)
        else:
            section = section_of(params, args.section or "train_encoder")
            methods = section.pop("methods", {})
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
