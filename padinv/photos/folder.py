"""Many photographs: every face in files, folders and zips of pictures is inverted, one folder holds the results."""

import json
import os
import statistics
import time
import zipfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path, PurePosixPath
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from padinv.images.datasets import ImageDataset, read_image, to_float, to_uint8
from padinv.images.viz import tile
from padinv.inversion.compiled import compile
from padinv.inversion.optimise import draw
from padinv.measure.identity import ArcFace, arcface, similarity
from padinv.measure.metrics import compare
from padinv.model.codes import Code
from padinv.model.tensors import atomic_write, file_hash, write_json
from padinv.photos.faces import NO_FACE, align, crop, cut, detect, detector, middle, paste
from padinv.photos.networks import Networks, encoded, fingerprint


@dataclass
class Item:
    """What a worker makes of one photograph: crops uint8 [N, 3, R, R] and points [N, 5, 2], or why there are none."""

    index: int
    crops: np.ndarray
    points: np.ndarray
    error: str | None = None


class Photos(Dataset):
    """The pictures of files, folders and zips, in a fixed order; photos[i] is an `Item` and never raises for a bad one.

    Attributes:
        sources: absolute path of each, that of an entry with its zip's before it.
        names: relative path of its results without suffix, no two alike whatever the case. Those of `known` (source ->
            name) are kept. Where a folder has more than 5,000 pictures, 256 sub-folders share the results.
    """

    MANY = 5000

    def __init__(
        self,
        paths: Sequence[str | os.PathLike],
        resolution: int,
        template: str | None = "ffhq",
        largest: bool = False,
        known: dict[str, str] | None = None,
    ):
        """resolution: of the crops. template: of `cut`, or None for pictures that are aligned. largest: leave the
        smaller faces out. Raises FileNotFoundError for a path that is absent, ValueError for a zip or folder without
        images."""
        self.resolution, self.template, self.largest, known = resolution, template, largest, known or {}
        self.sources, self.places, plain, seen = [], [], [], set()
        for path in dict.fromkeys(os.path.abspath(path) for path in paths):
            if not os.path.exists(path):
                raise FileNotFoundError(f"{path} does not exist; expected images, folders or zips of images")
            dataset = ImageDataset(path) if os.path.isdir(path) or zipfile.is_zipfile(path) else None
            for i, name in enumerate(dataset.names if dataset else [Path(path).name]):
                source = f"{path}/{name}" if dataset else path
                if source not in seen:
                    self.sources.append(source)
                    self.places.append((dataset, i))
                    plain.append(safe_name(name))
                seen.add(source)
        crowded = max(Counter(PurePosixPath(name).parent for name in plain).values(), default=0) > self.MANY
        taken, self.names = {name.casefold() for name in known.values()}, []
        for source, name in zip(self.sources, plain, strict=True):
            if source not in known:
                name = f"{crc32(os.fsencode(name)) % 256:02x}/{name}" if crowded else name
                free, n = name, 1
                while free.casefold() in taken:
                    free, n = f"{name}~{n + 1}", n + 1
                taken.add(free.casefold())
                name = free
            self.names.append(known.get(source, name))

    def __len__(self) -> int:
        return len(self.sources)

    def read(self, index: int, resolution: int | None = None) -> Tensor:
        """The whole picture, or its centred square at a resolution. Raises ValueError or OSError for a bad one."""
        dataset, i = self.places[index]
        if dataset is None:
            return read_image(self.sources[index], resolution)
        return read_image(dataset._bytes(dataset.names[i]), resolution, self.sources[index])

    def stamp(self, index: int) -> list[int]:
        """Changes when the file does: its size and time, of a zip for all that is in it."""
        dataset, _ = self.places[index]
        inside = dataset is not None and not dataset.path.is_dir()
        try:
            stat = os.stat(dataset.path if inside else self.sources[index])
        except OSError:
            return [0, 0]
        return [stat.st_size, stat.st_mtime_ns]

    def __getitem__(self, index: int) -> Item:
        none = Item(index, np.empty((0, 3, 0, 0), np.uint8), np.empty((0, 5, 2), np.float32))
        try:
            if self.template is None:
                none.crops = self.read(index, self.resolution)[None].numpy()
                return none
            photo = self.read(index)
            if self.template == "center":
                none.crops = cut(photo, self.template, self.resolution)[0][None].numpy()
                return none
            points = detect(photo)[: 1 if self.largest else None]
            if not len(points):
                raise ValueError(f"{self.sources[index]}: {NO_FACE}")
            crops = torch.stack([crop(photo, align(p, self.template), self.resolution) for p in points])
            return Item(index, crops.numpy(), points.numpy())
        except Exception as error:  # decoders and the detector raise almost anything; one picture must not end the run
            none.error = reason(self.sources[index], error)
            return none


def reason(source: str, error: Exception) -> str:
    """Why a picture is refused, with its name."""
    text = str(error) or type(error).__name__
    return text if os.path.basename(source) in text else f"{source}: {text}"


def safe_name(name: str) -> str:
    """A relative path without suffix that stays inside its folder and leaves room for the endings of results."""
    parts = [part for part in PurePosixPath(name.replace("\\", "_")).with_suffix("").parts if part not in ("/", "..")]
    return "/".join(os.fsdecode(os.fsencode(part)[:180]) for part in parts) or "picture"


def unchanged(x):
    return x


def batches(items: Iterable[Item], faces: int) -> Iterator[list[Item]]:
    """Consecutive items with at least so many faces together, the last ones with fewer."""
    group: list[Item] = []
    for item in items:
        group.append(item)
        if sum(len(i.crops) for i in group) >= faces or len(group) >= 4 * faces:
            yield group
            group = []
    if group:
        yield group


class Results:
    """The folder of results. A picture counts as done once its line stands in records/, written after its files.

    Each process appends to a file of records of its own, with the time in every line: of a picture the latest counts,
    whichever process wrote it. A line cut off by a crash is no line.
    """

    def __init__(self, folder: str | os.PathLike, numbered: bool, pasted: bool, generator: str | None = None):
        """numbered: pictures may have several faces. pasted: write photographs. generator: its `fingerprint`."""
        self.folder, self.numbered, self.pasted, self.generator = Path(folder), numbered, pasted, generator
        self.records: dict[str, dict] = {}  # source -> record, the latest of each
        for path in sorted((self.folder / "records").glob("*.jsonl")):
            for line in path.read_bytes().split(b"\n")[:-1]:
                try:
                    record = json.loads(line)
                    known = self.records.get(record["source"], {})
                    if record.get("time", 0) >= known.get("time", 0):  # lines of earlier versions have none
                        self.records[record["source"]] = record
                except (ValueError, KeyError, TypeError):
                    continue

    def settle(self, settings: dict, write: bool) -> None:
        """Check the settings of earlier runs into this folder, or note them; remove half-written files of a killed run.

        Raises:
            ValueError: the folder holds results of other settings.
        """
        path = self.folder / "settings.json"
        if path.exists() and self.records:
            before = json.loads(path.read_text())
            changed = sorted(k for k in settings if settings[k] != before.get(k))
            if changed:
                raise ValueError(f"{self.folder}: holds results of other settings ({', '.join(changed)}); give another "
                                 "--out, or remove that folder")  # fmt: skip
            for left in self.folder.rglob(".*.tmp") if write else ():
                left.unlink()
        elif write:
            write_json(path, settings)

    def files(self, name: str, faces: int) -> list[Path]:
        """All result files of a picture."""
        kinds = {"reconstructions": ".png", "codes": ".safetensors", "compare": ".png"}
        names = self.face_names(name, faces)
        files = [self.folder / kind / (face + suffix) for face in names for kind, suffix in kinds.items()]
        return files + ([self.folder / "pasted" / f"{name}.jpg"] if self.pasted else [])

    def face_names(self, name: str, faces: int) -> list[str]:
        # Always numbered, so that the second face of "x" never meets a picture called "x-2".
        return [f"{name}-{i + 1}" for i in range(faces)] if self.numbered else [name]

    def done(self, photos: Photos, index: int) -> bool:
        """Whether nothing is left to do: the files are there, or the picture was refused and is still the same."""
        record = self.records.get(photos.sources[index])
        if record is None:
            return False
        if "error" in record:
            return record["stamp"] == photos.stamp(index)
        return all(path.exists() for path in self.files(record["name"], len(record["faces"])))

    def write(self, photos: Photos, index: int, x: Tensor, y: Tensor, code: Code, points: Tensor, faces: list) -> dict:
        """Write the files of one picture and return its record. x, y: uint8 [N, 3, R, R], all on the CPU."""
        source, name = photos.sources[index], photos.names[index]
        for i, face in enumerate(self.face_names(name, len(x))):
            atomic_write(self.folder / "reconstructions" / f"{face}.png", encoded(y[i]))
            pair = torch.from_numpy(tile(to_float(torch.stack((x[i], y[i]))), columns=2)).permute(2, 0, 1)  # [3, h, w]
            atomic_write(self.folder / "compare" / f"{face}.png", encoded(pair))
            code[i].save(self.folder / "codes" / f"{face}.safetensors", generator=self.generator)
        if self.pasted:
            try:
                photo = photos.read(index)
            except Exception as error:  # it changed meanwhile; anything, as in Photos
                return {"source": source, "name": name, "error": reason(source, error), "stamp": photos.stamp(index)}
            squares = [align(p, photos.template) for p in points] if self.numbered else [middle(photo)]
            for image, square in zip(to_float(y), squares, strict=True):
                photo = paste(photo, image, square)
            atomic_write(self.folder / "pasted" / f"{name}.jpg", encoded(photo, "JPEG", quality=95, subsampling=0))
        return {"source": source, "name": name, "faces": faces}

    def report(self, photos: Photos) -> dict:
        """What became of the pictures, written to report.json."""
        found = [self.records[source] for source in photos.sources if source in self.records]
        good = [record for record in found if "error" not in record]
        faces = [face for record in good for face in record["faces"]]
        several = {r["source"]: len(r["faces"]) for r in good if len(r["faces"]) > 1}
        metrics = [key for key in faces[0] if key != "points"] if faces else []
        report = {
            "pictures": len(photos),
            "inverted": len(good),
            "faces": len(faces),
            "mean": {key: round(statistics.fmean(face[key] for face in faces), 6) for key in metrics},
            "several_faces": {readable(source): n for source, n in several.items()},
            "refused": [{"file": readable(r["source"]), "reason": readable(r["error"])} for r in found if "error" in r],
        }
        write_json(self.folder / "report.json", report)
        return report


def readable(text: str) -> str:
    """Without what a file name may hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def invert_photos(
    paths: Sequence[str | os.PathLike],
    generator: str,
    encoder: str | None,
    out: str | os.PathLike,
    steps: int | None = None,
    space: str = "w+p",
    template: str = "ffhq",
    aligned: bool = False,
    largest: bool = False,
    pasted: bool = True,
    identity: str | None = None,
    batch: int | None = None,
    bf16: bool = False,
    compiled: bool = False,
    device: str = "auto",
    workers: int | None = None,
) -> dict | None:
    """Invert every face in files, folders and zips of pictures, or go on with a run that was cut off.

    Writes to `out`, under the name of each picture with the number of the face (none where no face is looked for):
    reconstructions/*.png, codes/*.safetensors, compare/*.png (crop beside reconstruction) and, under the name alone,
    pasted/*.jpg; records/*.jsonl, a line for each picture with metrics and landmarks of its faces; settings.json;
    report.json. A file is written whole or not at all. Started by `accelerate launch`, process r of k takes every k-th
    picture from the r-th on.

    Args:
        paths: images, folders (with their sub-folders) and zips.
        generator, encoder: checkpoints of any format. Without an encoder codes are searched for (`padinv.project`).
        out: folder.
        steps, space, batch, bf16: of `Networks`. Results do not depend on the batch beyond rounding, but for the noise
            of a search.
        template: of `cut`.
        aligned: the pictures are crops already: centred squares are taken, and nothing is detected or pasted.
        largest: of several faces in a picture, take the largest alone.
        pasted: write the photographs with the inversions in them.
        identity: file of ArcFace weights (`measure.identity.arcface`), to measure likeness too; the template says
            where in the crop it looks, also where `aligned`.
        compiled: by torch.compile, for shorter steps after a minute; without steps on a CPU by `padinv.compile`, one
            picture at once unless `batch` says otherwise.
        device: "auto" for a GPU where there is one.
        workers: processes that read and look for faces; None for one fewer than cores, at most 8.

    Returns:
        The contents of report.json; None in all processes but the first.

    Raises:
        FileNotFoundError, ImportError, ValueError, OSError: a path is absent, the detector missing, a checkpoint or
            setting wrong, the results of other settings in `out`, or the disk full. A bad picture raises nothing: it is
            in the report.
    """
    from accelerate import PartialState

    if not aligned and template != "center":
        detector()  # if it is missing, say so before the work; and workers inherit it
    state = PartialState(cpu=device == "cpu", timeout=timedelta(days=30))  # no process waits in vain for the slowest
    place = state.device if device == "auto" else torch.device(device)
    nets = Networks.load(generator, encoder, place, template=template, steps=steps, space=space, batch=batch, bf16=bf16)
    results = Results(out, not aligned and template != "center", pasted and not aligned, fingerprint(nets.G))
    if compiled and (nets.steps or place.type != "cpu"):
        nets.G = torch.compile(nets.G)
    elif compiled:
        nets.G, nets.E = (compile(network, "bf16" if bf16 else "fp32") for network in (nets.G, nets.E))
        nets.bf16 = bf16  # rounds these as well
        nets.batch = batch or 1  # every number of pictures would take a compilation
    G = nets.G
    box = ArcFace.FFHQ_BOX if template == "ffhq" else (0, 0, 1)
    judge = arcface(identity, place, box) if identity else None
    photos = Photos(paths, G.resolution, None if aligned else template, largest,
                    {source: record["name"] for source, record in results.records.items()})  # fmt: skip
    settings = {
        "generator": file_hash(generator), "encoder": encoder and file_hash(encoder), "steps": nets.steps,
        "space": space, "template": None if aligned else template, "largest": largest,
        "identity": identity and file_hash(identity), "bf16": nets.bf16 or None,
    }  # fmt: skip
    results.settle(settings, write=state.is_main_process)
    state.wait_for_everyone()  # all know the same records before one is added
    mine = range(state.process_index, len(photos), state.num_processes)
    todo = [i for i in mine if not results.done(photos, i)]
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = max(1, min(8, cores - 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    loader = DataLoader(Subset(photos, todo), batch_size=None, num_workers=min(workers, len(todo)),
                        collate_fn=unchanged)  # fmt: skip
    log = results.folder / "records" / f"{state.process_index:05d}.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists():  # without a line that was cut off
        whole = log.read_bytes().rpartition(b"\n")
        if whole[2]:
            atomic_write(log, whole[0] + whole[1])
    bar = tqdm(total=len(mine), initial=len(mine) - len(todo), unit="picture", disable=not state.is_main_process,
               bar_format="{l_bar}{bar}| {n:.4g} of {total} [{elapsed}<{remaining}, {rate_fmt}]")  # fmt: skip
    pending: deque = deque()
    with open(log, "ab", buffering=0) as file, ThreadPoolExecutor(min(8, workers + 1)) as pool, bar:

        def settled(record: dict) -> None:
            file.write(json.dumps(record | {"time": time.time_ns()}).encode() + b"\n")

        for group in batches(loader, nets.batch):
            for item in group:
                if item.error:
                    name, stamp = photos.names[item.index], photos.stamp(item.index)
                    settled({"source": photos.sources[item.index], "name": name, "error": item.error, "stamp": stamp})
                    bar.update()
            group = [item for item in group if not item.error]
            if not group:
                continue
            started = bar.n

            def stepped(share: float, started: float = started, pictures: int = len(group)) -> None:
                bar.update(started + share * pictures - bar.n)

            x = to_float(torch.from_numpy(np.concatenate([item.crops for item in group]))).to(place)  # [N, 3, R, R]
            code = nets.invert(x, stepped)
            y = draw(code, G, nets.batch)
            values = compare(y, x, nets=("alex",))
            if judge is not None:
                values["identity"] = similarity(y, x, judge, nets.batch)
            x, y, code, start = to_uint8(x).cpu(), to_uint8(y).cpu(), code.to("cpu"), 0
            for item in group:
                end = start + len(item.crops)
                faces = [{key: float(f"{value[i]:.6g}") for key, value in values.items()} for i in range(start, end)]
                for face, points in zip(faces, item.points, strict=False):
                    face["points"] = np.round(points.astype(float), 2).tolist()
                part = x[start:end], y[start:end], code[start:end], torch.from_numpy(item.points)
                pending.append(pool.submit(results.write, photos, item.index, *part, faces))
                start = end
            # After a search, which is long, every picture is on record before the next begins.
            while len(pending) > (0 if nets.steps else 4 * nets.batch) or pending and pending[0].done():
                settled(pending.popleft().result())
        while pending:
            settled(pending.popleft().result())
    state.wait_for_everyone()
    report = Results(out, results.numbered, results.pasted).report(photos) if state.is_main_process else None
    state.destroy_process_group()
    return report
