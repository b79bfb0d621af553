"""Networks compiled for a CPU by OpenVINO, for where no gradient is wanted: `padinv.compile`."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from padinv.model.codes import Code, Padding
from padinv.model.encoder import Encoder
from padinv.model.generator import Generator

PRECISIONS = {"fp32": "f32", "bf16": "bf16"}  # ours -> OpenVINO's


def compile(network: Generator | Encoder, precision: str | None = None) -> "Compiled":
    """A network that is called as before and computes in OpenVINO, which takes less time (docs/benchmarks.md).

    Each batch size and layout of a code, with and without noise, is compiled at its first call, which takes seconds,
    with the weights of that moment: compile again after they change. The plain network still runs where a gradient is
    wanted, in training mode, with fresh noise, and for a residual encoder.

    Args:
        network: on a CPU. All its attributes are those of the compiled one too.
        precision: "fp32", which agrees with the plain network to 1e-4, or "bf16", which rounds as autocast does; by
            default bf16 where the CPU multiplies it by itself.

    Raises:
        ImportError: openvino is not installed.
        TypeError, ValueError: another network, another device or an unknown precision.
    """
    kinds = {Generator: CompiledGenerator, Encoder: CompiledEncoder}
    if type(network) not in kinds:
        raise TypeError(f"network: expected a Generator or an Encoder, got {type(network).__name__}")
    if network.const.device.type != "cpu":
        raise ValueError(f"network: expected one on a CPU, got {network.const.device}; there, torch.compile serves")
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"precision: expected one of {tuple(PRECISIONS)}, got {precision!r}")
    return kinds[type(network)](network, precision)


class Function(nn.Module):
    """What OpenVINO translates: a function of tensors, in a module."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.function(*inputs)


class Compiled:
    """A network, and its compiled forms by what they depend on."""

    def __init__(self, network: nn.Module, precision: str | None):
        try:
            import openvino
        except ImportError as error:
            raise ImportError("padinv.compile needs OpenVINO: pip install padinv[fast]") from error
        self.network, self.core, self.models = network, openvino.Core(), {}
        can = self.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self.precision = precision or ("bf16" if "BF16" in can else "fp32")

    def __getattr__(self, name: str):
        if name.startswith("__"):  # how copies and pickles ask an object that is not filled yet
            raise AttributeError(name)
        return getattr(self.network, name)

    def plain(self, *inputs: Tensor) -> bool:
        """Whether the network itself has to run."""
        graph = torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *self.network.parameters()))
        return graph or self.network.training or not all(t.numel() for t in inputs)

    def run(self, function: Callable, inputs: list[Tensor], layout=None) -> list[Tensor]:
        """`function(*inputs)`, a tuple; it depends on the layout and the inputs' shapes beside their values."""
        key = layout, *(t.shape for t in inputs)
        inputs = [t.detach().float().contiguous() for t in inputs]
        if key not in self.models:
            self.models[key] = self.translated(function, inputs)
        results = self.models[key]([t.numpy() for t in inputs])
        return [torch.from_numpy(results[i]) for i in range(len(results))]

    def translated(self, function: Callable, inputs: list[Tensor]):
        # openvino.convert_model does the same and reports it to Intel, unasked.
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

        frontend = FrontEndManager().load_by_framework("pytorch")
        with torch.no_grad(), torch.autocast("cpu", enabled=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer, that shapes become constants: they are in the key
            decoder = TorchScriptPythonDecoder(Function(function), example_input=tuple(inputs), shared_memory=False)
            model = frontend.convert(frontend.load(decoder))
        model.reshape({i: list(t.shape) for i, t in enumerate(inputs)})
        return self.core.compile_model(model, "CPU", {
            "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": PRECISIONS[self.precision],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        })  # fmt: skip


class CompiledGenerator(Compiled):
    def __call__(self, code: Code, noise: str = "const") -> Tensor:
        return self.synthesis(code.w, code.p, noise)

    def synthesis(self, w: Tensor, p: Padding | None = None, noise: str = "const") -> Tensor:
        self.network.check(w, p)
        code = Code(w, p)
        if noise not in ("const", "none") or self.plain(*code.tensors):
            return self.network.synthesis(w, p, noise)

        def function(*inputs: Tensor) -> tuple[Tensor]:
            return (self.network(filled(code, inputs), noise),)

        layout = p if p is None else (p.modulated, p.const is None, p.interior is None)
        return self.run(function, tensors(code), (noise, layout))[0]


class CompiledEncoder(Compiled):
    def __call__(self, x: Tensor, y: Tensor | None = None, code: Code | None = None) -> Code:
        if self.network.config.residual or y is not None or code is not None or self.plain(x):
            return self.network(x, y, code)

        def function(x: Tensor) -> tuple[Tensor, ...]:
            self.layout = self.network(x)
            return tuple(tensors(self.layout))

        outputs = self.run(function, [self.network.resized(x)])
        return filled(self.layout, outputs)


def tensors(code: Code) -> list[Tensor]:
    """Of a code, in the order of its `map`."""
    found = []
    code.map(lambda t: found.append(t) or t)
    return found


def filled(code: Code, tensors) -> Code:
    """A code of the same layout with other tensors, in that order."""
    parts = iter(tensors)
    return code.map(lambda _: next(parts))
