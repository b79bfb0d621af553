"""Who a face is: the identity loss and metric, on ArcFace features. Users bring the weights."""

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from padinv.files.pickles import Record, errors_of, read_file, tensor
from padinv.measure.lpips import MIN_SIZE, check_images
from padinv.model.encoder import ResidualBlock

NAMES = {  # theirs -> ours
    "input_layer.": "stem.", "res_layer.": "residual.", "shortcut_layer.": "shortcut.", "fc1.": "squeeze.",
    "fc2.": "excite.", "output_layer.": "head.",
}  # fmt: skip


class ArcFace(nn.Module):
    """Who a face is (ArcFace, Deng et al. 2019): IResNet-50 with squeeze-and-excitation, 112² -> 512. Frozen.

    Images are float RGB [N, 3, S, S] in [-1, 1], faces aligned as the generator draws them. The middle of the face is
    cut out of them, as these weights were trained on closer crops, and resized to 112². Differentiable with respect
    to the images. Arithmetic is float32 under autocast too.

    Attributes:
        box: top, left and side of what is cut out, in sides of the image.
    """

    FFHQ_BOX = (35 / 256, 32 / 256, 188 / 256)  # pSp's, for faces framed as in FFHQ (Richardson et al. 2021)

    def __init__(self, box: tuple[float, float, float]):
        super().__init__()
        self.box = box
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
        widths = [64] + 3 * [64] + 4 * [128] + 14 * [256] + 3 * [512]
        firsts = (0, 3, 7, 21)
        self.body = nn.Sequential(
            *(ResidualBlock(widths[i], widths[i + 1], 2 if i in firsts else 1, 16) for i in range(24))
        )
        # Between the first two lies the dropout of training.
        self.head = nn.Sequential(
            nn.BatchNorm2d(512), nn.Identity(), nn.Flatten(), nn.Linear(512 * 7 * 7, 512), nn.BatchNorm1d(512)
        )

    def features(self, x: Tensor) -> Tensor:
        """Unit vectors [N, 512]."""
        check_images("x", x, MIN_SIZE)
        top, left, side = (round(part * x.shape[-1]) for part in self.box)
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()[:, :, top : top + side, left : left + side]  # [N, 3, side, side]
            x = F.interpolate(x, size=(112, 112), mode="bilinear", antialias=True)  # [N, 3, 112, 112]
            return F.normalize(self.head(self.body(self.stem(x))))  # [N, 512]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """1 − cosine [N] between the features of x and y, [N, 3, S, S] each: 0 for one face, about 1 for two people."""
        if x.shape != y.shape:
            raise ValueError(f"identity: expected x and y of one shape, got {list(x.shape)}, {list(y.shape)}")
        return 1 - (self.features(x) * self.features(y)).sum(1)


def arcface(
    weights: str | os.PathLike, device: torch.device | str = "cpu", box: tuple[float, float, float] = ArcFace.FFHQ_BOX
) -> ArcFace:
    """The frozen network of the identity loss and metric. Its weights cannot be shipped here: users bring their file.

    Args:
        weights: path of the state dict that is known as model_ir_se50.pth: input_layer.*, body.0.* to body.23.*,
            output_layer.*, saved by torch. Nothing in it is executed.
        device: where the network goes.
        box: as `ArcFace`; (0, 0, 1) for images that are close crops already.

    Raises:
        ValueError: no path, no such file, or other names or shapes of tensors in it; names the file.
    """
    if not os.fspath(weights):
        raise ValueError("identity: this term needs ArcFace weights, and none are shipped. Give the path of "
                         "model_ir_se50.pth (IR-SE50), or set the weight of the term to 0")  # fmt: skip
    with errors_of(weights):
        state = read_file(weights)
        if not isinstance(state, dict) or "input_layer.0.weight" not in state:
            found = ", ".join(map(str, list(state)[:4])) if isinstance(state, dict) else type(state).__name__
            raise ValueError("not the state dict of an IR-SE50 of ArcFace: expected tensors input_layer.*, body.*, "
                             f"output_layer.*, found {found or 'nothing'}")  # fmt: skip
        with torch.device("meta"):  # weights are assigned, so no random ones are ever made
            network = ArcFace(box)
        tensors, wrong = {}, []
        for ours, t in network.state_dict().items():
            theirs = ours
            for old, new in NAMES.items():
                theirs = theirs.replace(new, old)
            given = state.pop(theirs, None)
            if ours.endswith("num_batches_tracked"):
                tensors[ours] = torch.tensor(0)  # of training only, and missing in older files
            elif not isinstance(given, Record):
                wrong.append(f"{theirs} is missing")
            elif (given := tensor(given)).shape != t.shape:
                wrong.append(f"{theirs} is {list(given.shape)}, expected {list(t.shape)}")
            else:
                tensors[ours] = given.to(torch.float32, copy=True)
        wrong += [f"{theirs} is unknown" for theirs in state]
        if wrong:
            raise ValueError(f"not an IR-SE50 of ArcFace for 112² images and 512 features: {'; '.join(wrong[:4])}"
                             + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""))  # fmt: skip
    network.load_state_dict(tensors, assign=True)
    return network.eval().requires_grad_(False).to(device)


@torch.no_grad()
def similarity(x: Tensor, y: Tensor, network: ArcFace, batch: int = 16) -> Tensor:
    """The identity metric: cosine of ArcFace features of x and y, [N, 3, S, S] in [-1, 1] each, clamped as saving them
    would. Float32 [N] on the CPU: 1 for one face, about 0 for two people."""
    parts = zip(x.split(batch), y.split(batch), strict=True)
    return torch.cat([1 - network(a.clamp(-1, 1), b.clamp(-1, 1)).cpu() for a, b in parts])
