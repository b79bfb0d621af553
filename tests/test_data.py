import io
import os
import pickle
import struct
import sys
import warnings
import zipfile
import zlib
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from padinv.images import datasets
from padinv.model.tensors import file_hash
from study import avatars, sets

ROOT = Path(__file__).resolve().parents[1]
PINNED_SAMPLE = {
    "hair": "dreads01",
    "hat": "none",
    "glasses": "none",
    "facial_hair": "none",
    "eyes": "happy",
    "eyebrows": "upDown",
    "mouth": "smile",
    "clothes": "collarAndSweater",
    "skin": "#6d4a3a",
    "hair_colour": "#f59797",
    "clothes_colour": "#65c9ff",
    "background": "#cdeac0",
}
PINNED_PIXELS = "4490281f283cf0b00286dda881f740a18b413b872e410eaf78879be0ba2bb208"


def encoded(image, kind="PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def picture(width=32, height=32, seed=0) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), np.uint8))


def png_header(width, height) -> bytes:
    """A PNG that claims a size but holds next to nothing, as a decompression bomb does."""

    def block(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return (
        b"\x89PNG\r\n\x1a\n"
        + block(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + block(b"IDAT", zlib.compress(bytes(1000)))
        + block(b"IEND", b"")
    )


def make_zip(path, entries) -> Path:
    with zipfile.ZipFile(path, "w") as z:
        for name, content in entries:
            z.writestr(name, content)
    return path


# ---------------------------------------------------------------- values


def test_float_and_uint8_are_inverse():
    u8 = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = datasets.to_float(u8)
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    assert torch.equal(datasets.to_uint8(x), u8)
    assert torch.equal(datasets.to_uint8(x.double()), u8)
    assert datasets.to_uint8(torch.tensor([-3.0, 3.0, 0.0])).tolist() == [0, 255, 128]


def test_float_and_uint8_refuse_the_other_kind():
    with pytest.raises(TypeError, match="float32.*uint8"):
        datasets.to_float(torch.zeros(1))
    with pytest.raises(TypeError, match="uint8.*floats"):
        datasets.to_uint8(torch.zeros(1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="NaN"):
        datasets.to_uint8(torch.tensor([float("nan")]))


# ---------------------------------------------------------------- single images


def test_read_image_sources_agree(tmp_path):
    want = torch.from_numpy(np.array(picture(20, 12))).permute(2, 0, 1)
    path = tmp_path / "a.png"
    picture(20, 12).save(path)
    with path.open("rb") as file:
        found = [datasets.read_image(s) for s in (path, str(path), path.read_bytes(), file)]
    assert all(torch.equal(x, want) for x in found)
    assert found[0].shape == (3, 12, 20) and found[0].is_contiguous()
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        datasets.read_image(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match="resolution: got 0"):
        datasets.read_image(path, 0)


def test_centre_crop_then_area_average():
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = np.array(picture())
    x = datasets.read_image(encoded(Image.fromarray(wide)), 16)
    want = np.array(picture()).reshape(16, 2, 16, 2, 3).mean((1, 3))
    assert np.abs(x.permute(1, 2, 0).numpy() - want).max() <= 0.5
    tall = datasets.read_image(encoded(Image.fromarray(wide.transpose(1, 0, 2))), 16)
    assert torch.equal(tall, x.transpose(1, 2))
    assert datasets.read_image(encoded(picture(21, 33)), 16).shape == (3, 16, 16)  # a fractional ratio
    fine = np.indices((64, 64)).sum(0) % 2 * 255  # a checkerboard aliases unless it is averaged
    grey = datasets.read_image(encoded(Image.fromarray(fine.astype(np.uint8))), 20).float()
    assert (grey - 127.5).abs().max() < 16
    assert datasets.read_image(encoded(picture(16, 16)), 64).shape == (3, 64, 64)  # smaller: scaled up


def test_extreme_width_is_cropped():
    assert datasets.read_image(encoded(Image.new("RGB", (20000, 64), "red")), 32)[:, 5, 5].tolist() == [255, 0, 0]


def test_grey_palette_and_cmyk_become_rgb():
    grey = picture().convert("L")
    for image, kind in (
        (grey, "PNG"),
        (grey.convert("1"), "PNG"),
        (picture().quantize(16), "PNG"),
        (picture().convert("CMYK"), "TIFF"),
    ):
        x = datasets.read_image(encoded(image, kind))
        assert torch.equal(x, torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)), image.mode


def test_alpha_is_composited_on_white():
    clear = np.zeros((16, 16, 4), np.uint8)
    clear[8:] = (10, 20, 30, 255)
    clear[:4, :, 3] = 128  # half-transparent black
    x = datasets.read_image(encoded(Image.fromarray(clear)))
    assert x[:, 12, 0].tolist() == [10, 20, 30] and x[:, 6, 0].tolist() == [255] * 3
    assert (x[:, 0, 0].float() - 127).abs().max() <= 1
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    assert datasets.read_image(encoded(palette, transparency=1)).unique().tolist() == [255]


def test_sixteen_bits_become_eight():
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    for kind in ("PNG", "TIFF"):
        x = datasets.read_image(encoded(Image.fromarray(ramp), kind))
        assert torch.equal(x[0].flatten(), torch.arange(256, dtype=torch.uint8)) and torch.equal(x[0], x[2])
    wide = Image.fromarray(np.full((16, 16), 65535, np.int32))
    assert datasets.read_image(encoded(wide, "TIFF")).unique().tolist() == [255]
    for value in (np.int32(1 << 20), np.int32(-1), np.float32(0.5)):
        scan = encoded(Image.fromarray(np.full((16, 16), value)), "TIFF")
        with pytest.raises(ValueError, match="scan.tif.*range of the values is unknown"):
            datasets.read_image(scan, name="scan.tif")


@pytest.mark.parametrize(("orientation", "corner"), [(3, (15, 31)), (6, (0, 15)), (8, (31, 0))])
def test_exif_rotation_is_applied(orientation, corner):
    image = Image.new("RGB", (32, 16), "white")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    x = datasets.read_image(encoded(image, exif=exif))
    assert x.shape == ((3, 16, 32) if orientation == 3 else (3, 32, 16))
    assert x[:, corner[0], corner[1]].tolist() == [255, 0, 0]


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (16, 16), c) for c in ("red", "blue")]
    x = datasets.read_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert x[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an image"),
        (b"hello, this is text", "not an image"),
        (encoded(picture())[:-1500], "cannot be decoded"),
        (encoded(picture(64, 64), "JPEG")[:900], "cannot be decoded"),
        (encoded(picture())[:20], "not an image|cannot be decoded"),
        (encoded(Image.new("RGB", (1, 1))), "1 x 1 pixels, expected 8"),
        (encoded(Image.new("RGB", (4000, 3))), "4000 x 3 pixels"),
        (png_header(20000, 5000), "too large .20000 x 5000"),
        (png_header(100000, 100000), "too large"),
        (png_header(64, 64), "cannot be decoded"),
    ],
)
def test_bad_images_are_refused_by_name(content, message, tmp_path):
    path = tmp_path / "bad one.png"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=f"bad one.png: .*({message})"):
            datasets.read_image(path, 16)


# ---------------------------------------------------------------- datasets


def test_folder_and_zip_agree(tmp_path):
    folder = tmp_path / "images"
    names = ["b/2.PNG", "a.png", "c.webp"]
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(40, 20, seed=i).save(folder / name, lossless=True)
    (folder / "notes.txt").write_text("passed over")
    (folder / ".hidden.png").write_text("passed over")
    (folder / "labels.csv").write_text("\ufefffile,age\na.png,1\nc.webp,2\nb/2.PNG,0\n", encoding="utf-8")
    zipped = make_zip(
        tmp_path / "images.zip",
        [(p.relative_to(folder).as_posix(), p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()],
    )
    for path in (folder, str(zipped)):
        ds = datasets.ImageDataset(path, 16)
        assert len(ds) == 3 and ds.names == ["a.png", "b/2.PNG", "c.webp"]
        assert [row["age"] for row in ds.labels] == ["1", "0", "2"]
        assert ds[0].shape == (3, 16, 16) and ds[0].dtype == torch.uint8
        assert torch.equal(ds[-1], ds[2]) and datasets.ImageDataset(path)[0].shape == (3, 20, 40)
        assert torch.equal(ds.tensor(progress=False), torch.stack(list(ds)))
        assert torch.equal(ds.tensor([2, 0], progress=False), torch.stack([ds[2], ds[0]]))
        assert torch.equal(pickle.loads(pickle.dumps(ds))[1], ds[1])
        with pytest.raises(IndexError):
            ds[3]
    assert datasets.pixel_hash(datasets.ImageDataset(folder)) == datasets.pixel_hash(datasets.ImageDataset(zipped))


def test_zip_is_reopened_in_a_forked_process(tmp_path):
    entries = [(f"{i}.png", encoded(picture(seed=i))) for i in range(8)]
    ds = datasets.ImageDataset(make_zip(tmp_path / "x.zip", entries))
    want = ds.tensor(progress=False)
    for x in (b for _ in range(2) for b in torch.utils.data.DataLoader(ds, batch_size=8, num_workers=2)):
        assert torch.equal(x, want)


def test_missing_empty_and_corrupt_datasets(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing_here does not exist"):
        datasets.ImageDataset(tmp_path / "nothing_here")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no images in .*empty.*[*].png"):
        datasets.ImageDataset(empty)
    with pytest.raises(ValueError, match="no images in .*empty.zip"):
        datasets.ImageDataset(make_zip(tmp_path / "empty.zip", []))
    whole = make_zip(tmp_path / "whole.zip", [("a.png", encoded(picture()))]).read_bytes()
    for content in (b"", b"not a zip", whole[:-30]):
        (tmp_path / "broken.zip").write_bytes(content)
        with pytest.raises(ValueError, match="broken.zip is no folder and no readable zip"):
            datasets.ImageDataset(tmp_path / "broken.zip")


def test_labels_must_fit(tmp_path):
    image = encoded(picture())
    for table, message in (
        (b"file\nb.png\n", "1 images have no row, or a short one, the first is 'a.png'"),
        (b"name\na.png\n", "column 'file'"),
        (b"file,smiling\na.png\n", "or a short one, the first is 'a.png'"),
        (b"file\n\xff\xfe\n", "UTF-8"),
        (b"", "column 'file'"),
    ):
        path = make_zip(tmp_path / "x.zip", [("a.png", image), ("labels.csv", table)])
        ds = datasets.ImageDataset(path)
        assert len(ds.tensor(progress=False)) == 1, "who asks for no labels does not mind"
        with pytest.raises(ValueError, match=f"labels.csv: .*{message}"):
            _ = ds.labels


@pytest.mark.parametrize("name", ["page.eps", "picture.png"])
def test_no_file_reaches_a_program_of_its_own(name, tmp_path, monkeypatch):
    """Pillow hands PostScript to Ghostscript, which runs it, whatever the file is called."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(ValueError, match=f"{name}: not an image; expected a complete .bmp"):
        datasets.read_image(page, name=name)
    assert not (tmp_path / "ran").exists()


def test_damaged_entries_of_every_packing_are_left_out(tmp_path):
    for packing in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(tmp_path / "packed.zip", "w", packing) as z:
            for name in ("a.png", "b.png"):
                z.writestr(name, encoded(picture()))
            start = z.getinfo("a.png").header_offset + 200
        content = bytearray((tmp_path / "packed.zip").read_bytes())
        content[start : start + 48] = bytes(x ^ 255 for x in content[start : start + 48])
        (tmp_path / "packed.zip").write_bytes(content)
        ds = datasets.ImageDataset(tmp_path / "packed.zip")
        with pytest.warns(UserWarning, match="a.png: this entry of .* cannot be unpacked"):
            assert len(ds.tensor(progress=False, skip_bad=True)) == 1


def test_a_file_that_is_gone_is_left_out(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(encoded(picture()))
    ds = datasets.ImageDataset(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.warns(UserWarning, match="No such file.*a.png"):
        assert len(ds.tensor(progress=False, skip_bad=True)) == 1


def test_odd_names_in_a_zip_stay_in_memory(tmp_path):
    names = ["../up.png", "/abs.png", "a\\b.png", "sp ace/Ünï-π.png", "con.png"]
    path = make_zip(
        tmp_path / "odd.zip",
        [(n, encoded(picture())) for n in names] + [("__MACOSX/._con.png", b"junk"), ("dir.png/", b"")],
    )
    ds = datasets.ImageDataset(path, 16)
    assert ds.names == sorted(names) and len(ds.tensor(progress=False)) == 5
    assert [p.name for p in tmp_path.rglob("*")] == ["odd.zip"]


def test_bad_entries_are_named_or_left_out_loudly(tmp_path, monkeypatch):
    path = make_zip(
        tmp_path / "mixed.zip",
        [
            ("0.png", b"junk"),
            ("1.png", encoded(picture())),
            ("2.png", encoded(picture())[:-100]),
            *((f"{i}.png", encoded(picture(seed=i))) for i in (3, 4, 5)),
        ],
    )
    content = bytearray(path.read_bytes())
    content[content.index(encoded(picture(seed=4))) + 1000] ^= 255  # the checksum no longer fits
    path.write_bytes(content)
    ds = datasets.ImageDataset(path)
    ds._files["5.png"].flag_bits |= 1  # marked as encrypted
    with pytest.raises(ValueError, match="4 of 6 .*0.png.*2.png.*4.png.*unpacked.*5.png.*encrypted.*skip"):
        ds.tensor(progress=False)
    with pytest.raises(ValueError, match="mixed.zip/0.png"):
        ds[0]
    with pytest.warns(UserWarning, match="4 of 6 images .*0.png.*2.png.*left out"):
        x = ds.tensor(progress=False, skip_bad=True)
    assert torch.equal(x, torch.stack([ds[1], ds[3]]))
    assert list(ds.bad) == ["0.png", "2.png", "4.png", "5.png"]
    assert len(ds.tensor([1, 3], progress=False)) == 2 and not ds.bad
    with pytest.raises(ValueError, match="1 of 1 images"):  # nothing is left
        ds.tensor([0], progress=False, skip_bad=True)
    monkeypatch.setattr(datasets, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="3.png: unpacks to .* at most 1000"):
        ds[3]


def test_a_folder_of_the_worst_kind(tmp_path):
    plain = picture(64, 64)
    sideways = Image.Exif()
    sideways[0x0112] = 6  # "turn me clockwise by 90 degrees"
    files = {"grey.png": encoded(plain.convert("L")), "plain.png": encoded(plain), "text.png": b"not an image",
             "turned-by-exif.png": encoded(plain.rotate(90), exif=sideways), "truncated.png": encoded(plain)[:-100],
             "wide.png": encoded(plain.crop((0, 0, 64, 40))), "notes.txt": b"passed over"}  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    ds = datasets.ImageDataset(tmp_path, 16)
    with pytest.raises(ValueError, match="text.png"):
        ds.tensor(progress=False)
    assert set(ds.bad) == {"text.png", "truncated.png"}
    readable = [name for name in ds.names if name not in ds.bad]
    with pytest.warns(UserWarning, match="text.png"):
        converted = dict(zip(readable, ds.tensor(skip_bad=True, progress=False), strict=True))
    assert list(converted) == ["grey.png", "plain.png", "turned-by-exif.png", "wide.png"]
    assert torch.equal(converted["turned-by-exif.png"], converted["plain.png"])
    inside = make_zip(tmp_path / "x.zip", [(f"holiday/{name}", files[name]) for name in readable])
    assert datasets.pixel_hash(datasets.ImageDataset(inside, 16)) == datasets.pixel_hash(converted.values())


def test_images_of_several_sizes_need_a_resolution(tmp_path):
    path = make_zip(tmp_path / "x.zip", [(f"{s}.png", encoded(picture(s, s))) for s in (16, 24)])
    with pytest.raises(ValueError, match="24.png: 24 x 24 pixels, others have 16 x 16; give .* resolution"):
        datasets.ImageDataset(path).tensor(progress=False)
    assert datasets.ImageDataset(path, 16).tensor(progress=False).shape == (2, 3, 16, 16)


def test_works_without_tqdm(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    ds = datasets.ImageDataset(make_zip(tmp_path / "x.zip", [("a.png", encoded(picture()))]))
    assert ds.tensor().shape == (1, 3, 32, 32)


def test_pixel_hash_sees_every_pixel_and_the_order():
    x = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    y = x.clone()
    y[2, 2, 7, 7] ^= 1
    assert datasets.pixel_hash(x) == datasets.pixel_hash(list(x))
    assert datasets.pixel_hash(x) == datasets.pixel_hash(x.to(memory_format=torch.channels_last))
    assert len({datasets.pixel_hash(t) for t in (x, y, x.flip(0))}) == 3
    with pytest.raises(TypeError, match="float32"):
        datasets.pixel_hash(x.float())


# ---------------------------------------------------------------- avatars


def test_sampling_is_pinned():
    assert avatars.sample(0, "train", 0) == PINNED_SAMPLE
    rows = [avatars.sample(0, "train", i) for i in range(2000)]
    assert rows[7] == avatars.sample(0, "train", 7) and rows[7] != avatars.sample(1, "train", 7)
    for name, options in (avatars.INSIDE | avatars.COLOURS).items():
        share = {v: sum(r[name] == v for r in rows) / len(rows) for v in options}
        total = sum(options.values())
        assert all(abs(share[v] - w / total) < 0.04 and share[v] > 0 for v, w in options.items()), name


def test_domains_are_apart():
    tiers = (avatars.INSIDE, avatars.OUTSIDE, avatars.NEW)
    for name, options in avatars.SHAPES.items():
        assert sorted(options) == sorted(v for tier in tiers for v in tier.get(name, ()))
        assert len({*options}) == len(options)
    for domain, allowed in (("inside", tiers[:1]), ("outside", tiers[:2]), ("new", tiers[::2])):
        rows = [avatars.sample(0, "train", i, domain) for i in range(1000)]
        assert {avatars.domain_of(row) for row in rows} == {domain}
        for name in avatars.SHAPES:
            assert {row[name] for row in rows} == {v for tier in allowed for v in tier.get(name, ())}
        foreign = avatars.FOREIGN[domain]
        counts = {sum(row[name] in foreign[name] for name in foreign) for row in rows}
        assert counts == ({1, 2, 3} if foreign else {0})
        for row in rows:  # what is foreign shows
            assert row["hair"] not in foreign.get("hair", ()) or row["hat"] in ("none", *foreign["hat"])
    with pytest.raises(ValueError, match="domain: got 'far', expected one of .*outside"):
        avatars.sample(0, "train", 0, "far")


def test_no_test_image_or_true_result_has_the_colours_of_a_training_image():
    def colours(rows):
        return {tuple(r[k] for k in avatars.COLOURS) for r in rows}

    train = colours(sets.avatar_rows("train", count=3000))
    parts = {part: sets.avatar_rows(part) for part in sets.COUNTS if part != "train"}
    assert {part: len(rows) for part, rows in parts.items()} == {
        "choice": 500, "inside": 500, "outside": 500, "new": 500, "blending": 3 * 200, "editing": 12 * 202,
    }  # fmt: skip
    for part in ("inside", "outside", "new"):
        assert {row["domain"] for row in parts[part]} == {part}
    other = [row for rows in parts.values() for row in rows]
    assert not train & colours(other)
    for i, a in enumerate(avatars.COLOURS):  # but every pair of colours is on both sides
        for j, b in enumerate(avatars.COLOURS):
            assert {(r[a], r[b]) for r in other} <= {(x[i], x[j]) for x in train}


def test_ground_truth_is_what_it_says():
    for a, b, truth in avatars.blending_attributes(0, 50):
        assert all(truth[k] == (a if k in avatars.SHAPES else b)[k] for k in avatars.ATTRIBUTES)
        assert b["hat"] == "none"
    for edit, (name, old, new) in avatars.EDITS.items():
        assert (new in avatars.OUTSIDE.get(name, ())) == edit.endswith("_outside")
        before, after, targets, truths = avatars.editing_attributes(0, edit, 50)
        assert before[name] == old and after == before | {name: new}
        for target, truth in zip(targets, truths, strict=True):
            assert target[name] != new and target | {name: new} == truth
            assert old != "none" or target[name] == "none"


def test_rows_name_every_file_once():
    for part in sets.COUNTS:
        rows = sets.avatar_rows(part, count=5)
        assert len({r["file"] for r in rows}) == len(rows) == {"blending": 15, "editing": 144}.get(part, 5)
    with pytest.raises(ValueError, match="got 'val', expected one of"):
        sets.avatar_rows("val")


def test_unknown_attributes_are_refused():
    with pytest.raises(ValueError, match=r"attributes\['hat'\]: got 'crown', expected one of .*turban"):
        avatars.svg(avatars.sample(0, "inside", 0) | {"hat": "crown"})
    with pytest.raises(ValueError, match=r"attributes\['hair'\]: got None"):
        avatars.render({})


def test_a_missing_renderer_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ImportError, match="resvg_py.*pip install"):
        avatars._renderer.__wrapped__()  # beside the cache


def test_rendered_pixels_are_pinned(renderer):
    images = [avatars.render(avatars.sample(0, domain, 0, domain), 64) for domain in avatars.FOREIGN]
    assert images[0].shape == (3, 64, 64) and images[0].dtype == torch.uint8
    assert datasets.pixel_hash(images) == PINNED_PIXELS
    assert avatars.render(avatars.sample(0, "inside", 0), 32).shape == (3, 32, 32)


@pytest.mark.parametrize("part", [part for part in sets.COUNTS if part != "train"])
def test_the_shipped_sets_are_what_is_rendered(part, renderer):
    path = ROOT / f"data/avatars-128/{part}.zip"
    if not path.exists():
        pytest.skip(f"{path.name} is not pulled (dvc pull)")
    ds = datasets.ImageDataset(path)
    rows = sets.avatar_rows(part)
    assert ds.labels == sorted(rows, key=lambda row: row["file"])
    again = (avatars.render(row, ds[0].shape[-1]) for row in ds.labels[::250])
    assert datasets.pixel_hash(again) == datasets.pixel_hash(ds[i] for i in range(0, len(ds), 250))


def test_write_and_read_back(renderer, tmp_path):
    sets.write_avatars(tmp_path / "sub/editing.zip", "editing", resolution=16, count=1, progress=False)
    sets.write_avatars(tmp_path / "again.zip", "editing", resolution=16, count=1, workers=1, progress=False)
    assert (tmp_path / "sub/editing.zip").read_bytes() == (tmp_path / "again.zip").read_bytes()
    edits = sets.editing_set(tmp_path / "again.zip")
    assert set(edits) == set(avatars.EDITS)
    for parts in edits.values():
        assert set(parts) == {"before", "after", "targets", "truths"}
        assert all(x.shape == (1, 3, 16, 16) for x in parts.values())
        assert not torch.equal(parts["before"], parts["after"])
    sets.write_avatars(tmp_path / "blending.zip", "blending", resolution=16, count=2, progress=False)
    triples = sets.blending_set(tmp_path / "blending.zip")
    assert list(triples) == ["a", "b", "truth"] and all(x.shape == (2, 3, 16, 16) for x in triples.values())
    (a, b, truth), *_ = avatars.blending_attributes(0, 1)
    assert torch.equal(triples["truth"][0], avatars.render(truth, 16))
    with pytest.raises(ValueError, match="no ground truth"):
        sets.blending_set(make_zip(tmp_path / "x.zip", [("a.png", encoded(picture()))]))


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def broken():
        yield "a.webp", b"x"
        raise OSError(28, "No space left on device")

    (tmp_path / "x.zip").write_bytes(b"the old one")
    with pytest.raises(OSError, match="No space left"):
        sets.write_zip(tmp_path / "x.zip", broken(), [{"file": "a.webp"}])
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x.zip", b"the old one")]


def test_command_line(renderer, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    argv = f"data --out {out} --resolution 8 --parts train outside --count 3 --workers 1".split()
    monkeypatch.setattr("sys.argv", argv)
    sets.main()
    assert sorted(p.name for p in out.iterdir()) == ["outside.zip", "train.zip"]
    assert [row["domain"] for row in datasets.ImageDataset(out / "train.zip").labels] == ["inside", "outside", "inside"]
    assert "train.zip: 0.0 MB" in capsys.readouterr().out
    made = file_hash(out / "train.zip")
    for wanted, message in ((made, "is there already"), ("0" * 64, "sha256: expected 0000")):
        monkeypatch.setattr("sys.argv", [*argv[:6], "train", *argv[8:], "--sha256", wanted])
        with nullcontext() if wanted == made else pytest.raises(SystemExit, match=message):
            sets.main()
            assert message in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["data", "--help"])
    with pytest.raises(SystemExit):
        sets.main()
    assert "--parts" in capsys.readouterr().out


def test_photographs_are_split_with_their_labels(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "photos"
    (folder / "a").mkdir(parents=True)
    for i in range(5):
        Image.new("RGB", (40, 30), (50 * i, 0, 0)).save(folder / f"{'a/' if i < 2 else ''}{i}.png")
    (folder / "a" / "1.png").write_bytes(b"no image")
    names = ["a/0.png", "a/1.png", "2.png", "3.png", "4.png"]
    (folder / "labels.csv").write_text("file,age\n" + "".join(f"{n},{i}\n" for i, n in enumerate(names)))
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", f"data --photos {folder} --test 2 --resolution 16 --out {out}".split())
    with pytest.warns(UserWarning, match=r"a/1\.png"):
        sets.main()
    train, test = (datasets.ImageDataset(out / f"{part}.zip") for part in ("train", "test"))
    assert train.names == ["2.webp", "3.webp", "4.webp"] and [row["age"] for row in train.labels] == ["2", "3", "4"]
    assert test.names == ["a/0.webp"] and test.labels == [{"file": "a/0.webp", "age": "0"}]
    assert torch.equal(train[1], torch.tensor([150, 0, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 16, 16))
    triples, edits = sets.blending_set(out / "blending.zip"), sets.editing_set(out / "editing.zip")
    assert torch.equal(triples["a"][0], test[0]) and {x.shape for x in triples.values()} == {(1, 3, 16, 16)}
    for e in edits.values():
        changed = (e["before"] != e["after"]).any(dim=1)
        assert 0 < changed.float().mean() < 0.7
        assert torch.equal(e["targets"][0][:, ~changed[0]], e["truths"][0][:, ~changed[0]])
    assert sorted(edits) == ["clothes", "facial_hair", "glasses", "hair", "hat", "mouth"]
    monkeypatch.setattr("sys.argv", f"data --photos {folder} --test 5 --out {out}".split())
    with pytest.raises(SystemExit, match="test: expected 1 to 4 of the 5 photographs, got 5"):
        sets.main()
