"""The test images of a folder, zip or LMDB as a zip of lossless WebP at a generator's resolution.

python test_set.py sources/church/test checkpoints/church/generator.safetensors data/church/test.zip
"""

import argparse
import json

from tqdm import tqdm

from padinv.images.datasets import ImageDataset
from padinv.model.tensors import read_metadata
from study.sets import encode_webp, write_zip

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("source", help="folder, zip or LMDB of images")
parser.add_argument("generator", help="checkpoint whose resolution they get")
parser.add_argument("out", help="zip to write")
parser.add_argument("--images", type=int, help="evenly spread over the source (default: all)")
args = parser.parse_args()

source = ImageDataset(args.source, json.loads(read_metadata(args.generator)["config"])["resolution"])
n = min(args.images or len(source), len(source))
chosen = [i * len(source) // n for i in range(n)]
names = [f"{i:06d}.webp" for i in chosen]
encoded = ((name, encode_webp(source[i])) for i, name in zip(tqdm(chosen, unit="image"), names, strict=True))
write_zip(args.out, encoded, [{"file": name, "source": source.names[i]} for i, name in zip(chosen, names, strict=True)])
