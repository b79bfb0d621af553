"""The networks of any file that is read here, as safetensors.

python convert.py sources/ffhq/e4e --generator generator.safetensors --encoder e4e.safetensors
"""

import argparse

from padinv.files.checkpoints import load_encoder, load_generator, save_encoder, save_generator

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("source", help="of NVIDIA, of the authors of pSp, e4e or PadInv, or of ours")
parser.add_argument("--generator", help="file to write the generator to")
parser.add_argument("--encoder", help="file to write the encoder to, if there is one")
args = parser.parse_args()

if args.generator:
    save_generator(load_generator(args.source), args.generator)
if args.encoder:
    save_encoder(load_encoder(args.source), args.encoder)
