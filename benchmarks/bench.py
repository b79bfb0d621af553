"""Time what users wait for, against the plain reference in the same run: `python -m benchmarks.bench --help`.

Both take turns, and the median counts. The machine's peak is that of a large matrix product and of a large copy,
timed in the same run; multiply-adds are those of the plain reference. Before anything is timed, both must agree.
"""

import argparse
import contextlib
import copy
import ctypes
import gc
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import padinv
from benchmarks import reference
from padinv import Code, Encoder, Generator, GeneratorConfig
from padinv.measure.lpips import lpips
from padinv.model.tensors import atomic_write
from padinv.ops.frozen import keep_memory
from study import tables

PAPER = {  # the released encoder
    "input_resolution": 256, "widths": (64, 128, 256, 512), "depths": (3, 4, 14, 3), "se_reduction": 16,
    "pyramid_channels": 512, "head_channels": 512, "padding_channels": 512, "padding_depth": 2, "padding_level": 1,
    "padding": "outright", "layout": "centre",
}  # fmt: skip
ROWS = ("encode", "synthesise", "both", "refine", "train")
NETWORKS = ("avatars-64", "paper-256", "paper-1024")


def networks(name: str, device: str) -> tuple[Generator, Encoder]:
    """The shipped networks, or those of the paper with random weights."""
    if name == "avatars-64":
        folder = padinv.project_root() / "checkpoints" / name
        paths = folder / "generator.safetensors", folder / "padinv.safetensors"
        return padinv.load_generator(paths[0], device), padinv.load_encoder(paths[1], device)
    torch.manual_seed(0)
    G = Generator(GeneratorConfig(int(name.removeprefix("paper-")))).to(device)
    E = Encoder.for_generator(G, **PAPER)
    with torch.no_grad():  # one batch gives the statistics that batch norms divide by
        for module in E.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        E.train()(torch.rand(2, 3, 256, 256, device=device) * 2 - 1)
    layout = torch.channels_last if device == "cpu" else torch.preserve_format  # as load_generator has it
    return G.eval().requires_grad_(False).to(memory_format=layout), E.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------
# What is timed: functions without arguments, by ours and by the plain reference


def tasks(row: str, G: Generator, E: Encoder, batch: int, autocast: Callable) -> tuple[Callable, Callable]:
    """(ours, plain) for one row. Plain networks are copies in PyTorch's default layout."""
    device = G.const.device
    x = torch.rand(batch, 3, E.config.input_resolution, E.config.input_resolution, device=device) * 2 - 1
    target = torch.rand(batch, 3, G.resolution, G.resolution, device=device) * 2 - 1
    E.requires_grad_(row == "train").train(row == "train")
    copies = (copy.deepcopy(network).to(memory_format=torch.contiguous_format) for network in (G, E))
    layout = torch.channels_last if row == "train" else torch.contiguous_format  # as padinv.training has it
    E.to(memory_format=layout)
    perceptual = lpips("alex", device) if row in ("refine", "train") else None
    if row not in ("encode", "both", "train"):
        with torch.no_grad():
            start = E(x)

    def one(G: Generator, E: Encoder, encode: Callable, render: Callable, x: Tensor) -> Callable:
        if row in ("encode", "synthesise", "both"):

            @torch.no_grad()
            def run():
                with autocast():
                    code = encode(E, x) if row != "synthesise" else start
                    return code if row == "encode" else render(G, code)

            return run

        code = start.map(lambda t: t.clone().requires_grad_()) if row == "refine" else None
        optimizer = torch.optim.Adam(code.tensors if row == "refine" else E.parameters(), lr=0.0)  # no drift

        def step():
            optimizer.zero_grad(set_to_none=True)
            with autocast():
                y = render(G, encode(E, x) if row == "train" else code)
                loss = (y - target).square().mean() + 0.8 * perceptual(y, target).mean()
            loss.backward()
            optimizer.step()
            return y.detach()

        return step

    ours = one(G, E, Encoder.__call__, Generator.__call__, x.contiguous(memory_format=layout))
    return ours, one(*copies, reference.encode, reference.synthesis, x)


def tensors(result: Code | Tensor) -> tuple[Tensor, ...]:
    return result.tensors if isinstance(result, Code) else (result,)


def graphed(run: Callable) -> Callable:
    """The same kernels without the host: a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def seconds(run: Callable, device: str) -> float:
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(runs: dict[str, Callable], device: str, budget: float, least: int) -> dict[str, list[float]]:
    """Times of each, taken in turns until the budget in seconds is spent. All have run before."""
    times, end = {name: [] for name in runs}, time.perf_counter() + budget
    while len(times[next(iter(runs))]) < least or time.perf_counter() < end:
        for name, run in runs.items():
            times[name].append(seconds(run, device))
    return times


def peak_memory(run: Callable, device: str) -> float:
    """Bytes above what was held before, at most, while it runs; NaN where the system does not tell."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return float("nan")

    def field(name: str) -> int:
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))

    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc keeps freed blocks, which would hide what runs use
        libc.malloc_trim(0)
    clear.write_text("5")  # Linux: the peak starts anew
    before = field("VmRSS:")
    run()
    return field("VmHWM:") - before


def peaks(device: str, precisions) -> dict[str, float]:
    """Of this machine now: multiply-adds per second of a large product, bytes per second of a large copy."""
    size = 8192 if device == "cuda" else 2048
    found = {}
    for name in precisions:
        a = torch.randn(size, size, device=device, dtype=getattr(torch, name))
        out = torch.empty_like(a)
        best = min(seconds(lambda a=a, out=out: torch.mm(a, a, out=out), device) for _ in range(8))
        found[f"{name}_gmacs_per_s"] = round(size**3 / best / 1e9, 1)
    source = torch.zeros(2**28 if device == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    best = min(seconds(lambda: target.copy_(source), device) for _ in range(8))
    return found | {"copy_gb_per_s": round(2 * source.nbytes / best / 1e9, 1)}


def write_table(report: dict, folder: Path, name: str) -> None:
    """All rows of a report as CSV; those of the smallest batch as Markdown."""
    runs = [run for run in ("ours", "graph", "compiled", "plain") if any(run in row["ms"] for row in report["rows"])]
    rows = [
        {key: row[key] for key in ("network", "row", "batch", "precision")}
        | {f"{run}_ms": row["ms"].get(run) for run in runs}
        | {key: row[key] for key in ("speedup", "gmacs", "share_of_peak")}
        | {f"{run}_mb": row["peak_memory_mb"][run] for run in ("ours", "plain")}
        for row in report["rows"]
    ]
    few = [row for row in rows if row["batch"] == min(row["batch"] for row in rows)]
    columns = list(rows[0])
    peak = ", ".join(f"{key} {value:g}" for key, value in report["peak"].items())
    note = f"{report['device']}, {report['threads']} threads, torch {report['torch']}. Peak in the same run: {peak}."
    note += f" Left out: {'; '.join(report['left_out'])}." if report["left_out"] else ""
    tables.write_table(folder / name, few, columns, note, whole=(rows, columns))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS[:2], help="(%(default)s)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="(%(default)s)")
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 4, 16), help="(%(default)s)")
    parser.add_argument("--precisions", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    parser.add_argument("--seconds", type=float, default=20.0, help="for each row (%(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="of each row at least (%(default)s)")
    parser.add_argument(
        "--longest",
        type=float,
        default=float("inf"),
        help="seconds of a turn: rows that would take more are left out, which the report says",
    )
    parser.add_argument("--compile", action="store_true", help="refine by a compiled generator too (smallest batch)")
    parser.add_argument("--out", help="JSON (results/metrics/bench-cpu.json, or -gpu; none with --quick)")
    parser.add_argument("--quick", action="store_true", help="a minute: encode and synthesise one image")
    args = parser.parse_args(arguments)
    if args.quick:
        args.rows, args.batches, args.seconds, args.turns = ("both",), (1,), 5.0, 3
    keep_memory()  # as the commands do
    device = args.device
    out = Path(
        args.out or padinv.project_root() / "results/metrics" / f"bench-{'gpu' if device == 'cuda' else 'cpu'}.json"
    )
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    if device == "cpu" and Path("/proc/cpuinfo").exists():
        name = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    report = {
        "device": name, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "cuda": torch.version.cuda if device == "cuda" else None, "python": platform.python_version(),
        "padinv": padinv.__version__, "peak": peaks(device, args.precisions), "rows": [], "left_out": [],
    }  # fmt: skip
    print(json.dumps(report["peak"]))

    combinations = list(itertools.product(args.networks, args.precisions, args.batches, args.rows))
    built = None
    for network, precision, batch, row in tqdm(combinations, unit="row"):
        smaller = [r for r in report["rows"] if (r["network"], r["row"], r["precision"]) == (network, row, precision)]
        turn = sum(smaller[-1]["ms"].values()) / 1e3 * batch / smaller[-1]["batch"] if smaller else 0.0
        if turn > args.longest:
            report["left_out"].append(f"{network} {row} ×{batch} {precision}: a turn would take {turn:.0f} s")
            tqdm.write(report["left_out"][-1])
            continue
        if built != network:
            G, E = networks(network, device)
            built = network

        def autocast(precision=precision):
            return torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bfloat16")

        torch.manual_seed(1)
        ours, plain = tasks(row, G, E, batch, autocast)
        counter = FlopCounterMode(display=False)
        a = tensors(ours())
        with counter:
            b = tensors(plain())
        difference = max(float((s - t).abs().max() / t.abs().max().clamp(min=1)) for s, t in zip(a, b, strict=True))
        if precision == "float32" and not difference < 1e-4:
            sys.exit(f"bench: {network} {row} ×{batch} differs from the plain reference by {difference:.2g}")
        gmacs = counter.get_total_flops() / 2e9
        runs = {"ours": ours, "plain": plain}
        if device == "cuda" and row in ROWS[:3]:
            runs["graph"] = graphed(ours)
        if args.compile and row == "refine" and batch == min(args.batches):
            torch.manual_seed(1)
            runs["compiled"] = tasks(row, torch.compile(G), E, batch, autocast)[0]
            runs["compiled"]()
        memory = {name: round(peak_memory(runs[name], device) / 1e6, 1) for name in ("ours", "plain")}
        times = alternate(runs, device, args.seconds, args.turns)
        ms = {name: round(1e3 * statistics.median(t), 3) for name, t in times.items()}
        best = min(t for name, t in ms.items() if name != "plain")
        result = {
            "network": network, "row": row, "batch": batch, "precision": precision, "ms": ms,
            "speedup": round(ms["plain"] / best, 2), "turns": len(times["ours"]), "gmacs": round(gmacs, 2),
            "gmacs_per_s": round(gmacs / best * 1e3, 1),
            "peak_memory_mb": memory, "difference": float(f"{difference:.2g}"),
        }  # fmt: skip
        if precision == "bfloat16" and row == "both":
            torch.manual_seed(1)
            exact = tasks(row, G, E, batch, contextlib.nullcontext)[0]()
            distance = lpips("alex", device)(a[0].clamp(-1, 1), exact.clamp(-1, 1)).mean()
            result["lpips_to_float32"] = round(distance.item(), 5)
        report["rows"].append(result)
        tqdm.write(f"{network:11s} {row:10s} ×{batch:<2d} {precision:8s} {ms}  {result['speedup']}×")
    again = peaks(device, args.precisions)  # whatever else ran at one end of a long run lowers only that one
    report["peak"] = {key: max(value, again[key]) for key, value in report["peak"].items()}
    for result in report["rows"]:
        peak = report["peak"][f"{result['precision']}_gmacs_per_s"]
        result["share_of_peak"] = round(result["gmacs_per_s"] / peak, 3)
    if args.out or not args.quick:
        atomic_write(out, (json.dumps(report, indent=1) + "\n").encode())
        print(out)
    if not args.out and not args.quick:
        write_table(report, padinv.project_root() / "results/tables", out.stem)


if __name__ == "__main__":
    main()
