"""Time encode + synthesise on this CPU: plain PyTorch, ours, and ours compiled: `python -m benchmarks.bench --help`.

All forms take turns in one run, and the median counts. The machine's peak is that of a large product of matrices, timed
in the same run; multiply-adds are those of the plain reference. Forms in float32 must agree before they are timed.
"""

import argparse
import contextlib
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import padinv
from benchmarks import reference
from padinv import Code, Encoder, Generator, GeneratorConfig
from padinv.inversion.optimise import draw
from padinv.measure.lpips import lpips
from padinv.model.tensors import atomic_write
from padinv.ops.memory import keep_memory
from study import tables

ENCODERS = {  # of the shipped generator, and of the paper's size
    "avatars-128": {"input_resolution": 128, "stem_stride": 2, "strides": (1, 2, 2, 2)},
    "paper-256": {
        "input_resolution": 256, "widths": (64, 128, 256, 512), "depths": (3, 4, 14, 3), "se_reduction": 16,
        "pyramid_channels": 512, "head_channels": 512, "padding_channels": 512, "padding_depth": 2, "padding_level": 1,
        "padding": "outright", "layout": "centre",
    },
}  # fmt: skip
PRECISIONS = ("fp32", "bf16")
FORMS = ("plain", "eager", "openvino")


def networks(name: str) -> tuple[Generator, Encoder]:
    """The generator that is shipped, or one of the paper's size with random weights; an encoder with random ones."""
    torch.manual_seed(0)
    if name == "paper-256":
        G = Generator(GeneratorConfig(256)).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    else:
        G = padinv.load_generator(padinv.project_root() / "checkpoints" / name / "generator.safetensors")
    E = Encoder.for_generator(G, **ENCODERS[name])
    with torch.no_grad():  # one batch gives the statistics that batch norms divide by
        for module in E.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        E.train()(torch.rand(2, 3, E.config.input_resolution, E.config.input_resolution) * 2 - 1)
    return G, E.eval().requires_grad_(False)


def forms(G: Generator, E: Encoder) -> dict[tuple[str, str], Callable]:
    """(form, precision) -> x -> its code, its image, and the seconds that each took."""

    def timed(encode: Callable, synthesise: Callable, autocast: bool) -> Callable:
        @torch.no_grad()
        def run(x: Tensor) -> tuple[Code, Tensor, tuple[float, float]]:
            with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
                start = time.perf_counter()
                code = encode(x)
                middle = time.perf_counter()
                y = synthesise(code)
                return code, y, (middle - start, time.perf_counter() - middle)

        return run

    plain = copy.deepcopy(G).to(memory_format=torch.contiguous_format)
    found = {}
    for precision in PRECISIONS:
        half = precision == "bf16"
        found["plain", precision] = timed(
            lambda x: reference.encode(E, x), lambda code: reference.synthesis(plain, code), half
        )
        found["eager", precision] = timed(E, G, half)
        found["openvino", precision] = timed(padinv.compile(E, precision), padinv.compile(G, precision), False)
    return found


def peaks() -> dict[str, float]:
    """Of this machine now: billions of multiply-adds per second of a large product, in float32 also of a convolution,
    since MKL's product leaves half of AVX-512 idle on AMD. Where a small product takes long, as in bfloat16 on a CPU
    that does not multiply it, that one counts."""

    def fastest(run: Callable, size: int) -> float:
        seconds = float("inf")
        for _ in range(8):
            start = time.perf_counter()
            run()
            seconds = min(seconds, time.perf_counter() - start)
        return round(size / seconds / 1e9, 1)

    found = {}
    for name, dtype in zip(PRECISIONS, (torch.float32, torch.bfloat16), strict=True):
        for size in (256, 512, 1024, 2048):
            a = torch.randn(size, size).to(dtype)
            found[name] = fastest(partial(torch.mm, a, a, out=torch.empty_like(a)), size**3)
            if size**3 / found[name] / 1e9 > 0.02:
                break
    sizes = (1, 256, 32, 32), (256, 256, 3, 3)
    x, weight = (torch.randn(size).contiguous(memory_format=torch.channels_last) for size in sizes)
    convolution = fastest(partial(F.conv2d, x, weight, padding=1), 32**2 * weight.numel())
    return found | {"fp32": max(found["fp32"], convolution)}


def measure(runs: dict[tuple[str, str], Callable], x: Tensor, gmacs: float, budget: float) -> list[dict]:
    """A row for each precision: encode + synthesise x by every form, in turns until the seconds are spent.

    Compiled forms run once before, as they compile in their first call; others do not, which for a large batch takes a
    minute.
    """
    for (form, _), run in runs.items():
        if form == "openvino":
            run(x)
    times, results, end = {key: [] for key in runs}, {}, time.perf_counter() + budget
    while not results or time.perf_counter() < end:
        for key, run in runs.items():
            *results[key], seconds = run(x)
            times[key].append(seconds)
    code, y = results["plain", "fp32"]
    rows = []
    for precision in PRECISIONS:
        seconds = {form: times[form, precision] for form in FORMS}
        whole = {form: statistics.median(map(sum, seconds[form])) for form in FORMS}
        image = results["openvino", precision][1].clamp(-1, 1)
        rows.append({
            "batch": len(x), "precision": precision,
            **{f"{form}_ms": round(1e3 * whole[form], 2) for form in FORMS},
            "encode_ms": round(1e3 * statistics.median(a for a, _ in seconds["openvino"]), 2),
            "synthesise_ms": round(1e3 * statistics.median(b for _, b in seconds["openvino"]), 2),
            "speedup": round(whole["plain"] / whole["openvino"], 2), "turns": len(seconds["plain"]),
            "gmacs": round(gmacs * len(x), 2), "gmacs_per_s": round(gmacs * len(x) / whole["openvino"], 1),
            "lpips_to_fp32": round(lpips("alex")(image, y.clamp(-1, 1)).mean().item(), 5),
        })  # fmt: skip
    for form in ("eager", "openvino"):
        pairs = zip((*results[form, "fp32"][0].tensors, results[form, "fp32"][1]), (*code.tensors, y), strict=True)
        difference = max(float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in pairs)
        if not difference < 1e-4:
            sys.exit(f"bench: {form} ×{len(x)} differs from the plain reference by {difference:.2g}")
    return rows


def write_table(report: dict, folder: Path) -> None:
    columns = [key for key in report["rows"][0] if key not in ("gmacs", "gmacs_per_s", "turns")]
    peak = ", ".join(f"{key} {value:g}" for key, value in report["peak_gmacs_per_s"].items())
    note = (f"{report['device']}, {report['threads']} threads, torch {report['torch']}, openvino {report['openvino']}. "
            f"Peak in the same run, in billions of multiply-adds per second: {peak}.")  # fmt: skip
    tables.write_table(folder / "bench-cpu", report["rows"], columns, note)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--networks", nargs="+", choices=ENCODERS, default=tuple(ENCODERS), help="(%(default)s)")
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 4, 16), help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=15.0, help="for each network and batch (%(default)s)")
    parser.add_argument("--out", help="JSON (results/metrics/bench-cpu.json, with its table; none with --quick)")
    parser.add_argument("--quick", action="store_true", help="half a minute: one image")
    args = parser.parse_args(arguments)
    if args.quick:
        args.batches, args.seconds = (1,), 5.0
    keep_memory()  # as the commands do
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        name = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    report = {
        "device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "openvino": version("openvino"),
        "python": platform.python_version(), "padinv": padinv.__version__, "peak_gmacs_per_s": peaks(), "rows": [],
    }  # fmt: skip
    for network in args.networks:
        G, E = networks(network)
        size = E.config.input_resolution
        with FlopCounterMode(display=False) as counter:
            reference.synthesis(G, reference.encode(E, torch.zeros(1, 3, size, size)))
        for batch in tqdm(args.batches, desc=network):
            runs = forms(G, E)  # anew, since a compiled network keeps what it made for every batch
            z = torch.randn(batch, G.config.z_dim, generator=torch.Generator().manual_seed(1))
            x = draw(Code(G.mapping(z, truncation=0.7)), G, batch=1)  # [N, 3, R, R]
            rows = measure(runs, x, counter.get_total_flops() / 2e9, args.seconds)
            report["rows"] += [{"network": network} | row for row in rows]
            tqdm.write("\n".join(map(str, report["rows"][-2:])))
    again = peaks()  # whatever else ran at one end of a long run lowers only that one
    report["peak_gmacs_per_s"] = {key: max(value, again[key]) for key, value in report["peak_gmacs_per_s"].items()}
    for row in report["rows"]:
        peak = max(report["peak_gmacs_per_s"]["fp32"], report["peak_gmacs_per_s"][row["precision"]])  # fp32 serves both
        row["percent_of_peak"] = round(100 * row["gmacs_per_s"] / peak, 1)
    if args.quick and not args.out:
        return
    out = Path(args.out or padinv.project_root() / "results/metrics/bench-cpu.json")
    atomic_write(out, (json.dumps(report, indent=1) + "\n").encode())
    if not args.out:
        write_table(report, padinv.project_root() / "results/tables")
    print(out)


if __name__ == "__main__":
    main()
