"""PadInv: GAN inversion with the padding space (arXiv 2203.11105).

>>> G = padinv.load_generator("checkpoints/avatars-128/generator.safetensors")
>>> E = padinv.load_encoder("checkpoints/avatars-128/padinv.safetensors")
>>> code = padinv.invert(x, E, G)  # x: [N, 3, R, R] in [−1, 1]
>>> y = G(code)
"""

from pathlib import Path

from padinv.files.checkpoints import export_generator, load_encoder, load_generator
from padinv.inversion.compiled import compile
from padinv.inversion.editing import Edit, analogy, blend, customize
from padinv.inversion.optimise import invert, project
from padinv.model.codes import Code, Padding
from padinv.model.encoder import Encoder, EncoderConfig
from padinv.model.generator import Generator, GeneratorConfig

__all__ = [
    "Code", "Edit", "Encoder", "EncoderConfig", "Generator", "GeneratorConfig", "Padding",
    "analogy", "blend", "compile", "customize", "export_generator", "invert", "load_encoder", "load_generator",
    "project", "project_root",
]  # fmt: skip
__version__ = "0.1.0"


def project_root() -> Path:
    """The folder with dvc.yaml, from the working directory upwards: notebooks run from anywhere inside it.

    Raises FileNotFoundError outside a checkout.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").exists():
            return folder
    raise FileNotFoundError(f"no dvc.yaml in {here} or above; run from inside the repository")
