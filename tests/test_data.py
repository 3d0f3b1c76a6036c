"""common/data.py: formats and oddities, the cache, batches as a function of (seed, step), crops, and bad input.

About 20 seconds on 2 idle cores.
"""

import gzip
import itertools
import os
import signal
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as transforms
from PIL import Image
from torchvision.transforms import InterpolationMode

from common import data as module
from common.data import UserError, batches, generator, indices, load, resized_crop, uniforms

HERE = Path(__file__).resolve().parent.parent
REPRESENTATION = (0.08, 1.0), (3 / 4, 4 / 3), "bicubic"


def noise(height, width, seed=0):
    """A smooth random picture, uint8 [H, W, 3]: JPEG keeps it, and every place looks different."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def picture(path, height=40, width=48, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(height, width, seed)).save(path, **options)
    return path


def folder(place, count=6, classes=("ant", "bee"), splits=("train", "val")):
    for split, name, i in itertools.product(splits, classes, range(count)):
        picture(place / split / name / f"{i}.png", seed=hash((split == "val", classes.index(name), i)) % 1000)
    return place


def read(place, tmp_path, **options):
    return load(str(place), root=tmp_path / "root", **{"size": 16} | options)


def run(code, **environment):
    """A Python process of its own that runs from the project's root."""
    environment = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=HERE, stderr=subprocess.PIPE, text=True)


def error(*args, **options):
    """The one line that the user sees."""
    with pytest.raises(UserError) as caught:
        load(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------- randomness of (seed, step)


def positions(steps, n=10, batch=4, seed=3, world=1, pieces=1, step=0):
    """What all ranks and pieces of these steps see, in the order of the global batches."""
    return np.concatenate(
        [
            indices(n, batch, s, seed, rank, world, piece, pieces)
            for s in range(step, step + steps)
            for piece in range(pieces)
            for rank in range(world)
        ]
    )


def test_indices_are_one_permutation_after_the_other():
    seen = positions(5)
    for epoch in (0, 1):
        order = np.random.default_rng([3, 0x5EED, epoch]).permutation(10)
        assert seen[10 * epoch : 10 * epoch + 10].tolist() == order.tolist()
    assert seen[:10].tolist() != seen[10:].tolist()
    assert seen.dtype == np.int64


@pytest.mark.parametrize("world, pieces", [(2, 1), (1, 2), (2, 2), (4, 1), (1, 4)])
def test_indices_do_not_depend_on_how_a_batch_is_cut(world, pieces):
    assert positions(7, world=world, pieces=pieces).tolist() == positions(7).tolist()
    assert indices(10, 4, 3, 0, rank=1, world=2).tolist() == indices(10, 4, 3, 0, piece=1, pieces=2).tolist()


def test_indices_out_of_order_other_seeds_and_batches_beyond_n():
    forwards = [indices(10, 4, step, 3).tolist() for step in range(9)]
    assert [indices(10, 4, step, 3).tolist() for step in reversed(range(9))] == forwards[::-1]
    assert positions(5, seed=4).tolist() != positions(5).tolist()
    assert np.bincount(indices(10, 35, 2, 0), minlength=10).tolist() != []
    assert np.bincount(positions(2, batch=35)).tolist() == [7] * 10


def test_uniforms_are_slices_of_one_table():
    whole = uniforms(8, 3, step=5, seed=1, stream=2)
    assert whole.shape == (8, 3) and whole.dtype == np.float32
    assert np.array_equal(whole, np.random.default_rng([1, 2, 5]).random((8, 3), dtype=np.float32))
    halves = [uniforms(8, 3, 5, 1, 2, rank=rank, world=2) for rank in (0, 1)]
    pieces = [uniforms(8, 3, 5, 1, 2, piece=piece, pieces=2) for piece in (0, 1)]
    assert np.array_equal(np.concatenate(halves), whole) and np.array_equal(np.concatenate(pieces), whole)
    for other in (uniforms(8, 3, 6, 1, 2), uniforms(8, 3, 5, 2, 2), uniforms(8, 3, 5, 1, 3)):
        assert not np.intersect1d(other, whole).size
    many = uniforms(100_000, 1, 0, 0, 0)
    assert abs(many.mean() - 0.5) < 0.005 and many.min() >= 0 and many.max() < 1


def test_generator_depends_on_each_number_and_seeds_do_not_overlap():
    draws = {torch.rand(1, generator=generator(*key)).item() for key in itertools.product(range(4), repeat=3)}
    assert len(draws) == 64
    again = [torch.randn(5, generator=generator(7, 1, 2)) for _ in range(2)]
    assert torch.equal(*again)


# ------------------------------------------------------------------------------------------------------------ batches


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return load("shapes", "test", 32, tmp_path_factory.mktemp("shapes"))


def test_batches_are_the_pictures_of_their_numbers_in_channels_last(shapes):
    iterator = batches(shapes, 16, seed=2, start=4, flip=False)
    for step in (4, 5):
        x, y, i = next(iterator)
        assert x.shape == (16, 3, 32, 32) and x.dtype == torch.float32
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert i.tolist() == indices(len(shapes), 16, step, 2).tolist()
        assert torch.equal(y, shapes.labels[i])
        assert torch.equal(((x + 1) * 127.5).round().byte(), shapes.images[i].permute(0, 3, 1, 2))


def test_round_trip_of_all_256_values():
    values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    data = module.Data("all", "train", 16, values, "0", Path("unused"))
    x, y, _ = next(batches(data, 1, seed=0))
    assert y is None and x.min() == -1 and x.max() == 1
    back = ((x.clamp(-1, 1) + 1) * 127.5).round().byte()
    assert torch.equal(back.flatten().sort().values, values.flatten().sort().values)


def test_flips_follow_their_stream_and_only_where_they_are_allowed(shapes):
    plain = [x for x, _, _ in itertools.islice(batches(shapes, 64, 1, flip=False), 3)]
    for step, (x, _, _) in enumerate(itertools.islice(batches(shapes, 64, 1), 3)):
        mirrored = torch.from_numpy(uniforms(64, 1, step, 1, module.VIEW)[:, 0] < 0.5)
        assert 16 < mirrored.sum() < 48
        assert torch.equal(x[mirrored], plain[step][mirrored].flip(-1))
        assert torch.equal(x[~mirrored], plain[step][~mirrored])
    fixed = module.replace(shapes, flip=False)
    assert torch.equal(next(batches(fixed, 64, 1))[0], plain[0])


@pytest.mark.parametrize("crop", [None, (2, 24, *REPRESENTATION)])
def test_ranks_and_pieces_cut_the_same_global_batch(shapes, crop):
    whole = [x for x, _, _ in itertools.islice(batches(shapes, 8, 5, crop=crop), 2)]
    pieces = [x for x, _, _ in itertools.islice(batches(shapes, 8, 5, pieces=2, crop=crop), 4)]
    ranks = [[x for x, _, _ in itertools.islice(batches(shapes, 8, 5, rank=r, world=2, crop=crop), 2)] for r in (0, 1)]
    for step in (0, 1):
        assert torch.equal(torch.cat(pieces[2 * step : 2 * step + 2]), whole[step])
        assert torch.equal(torch.cat([ranks[0][step], ranks[1][step]]), whole[step])


def test_a_batch_that_cannot_be_cut_names_the_nearest(shapes):
    with pytest.raises(UserError, match=r"nearest is 12$"):
        batches(shapes, 13, 0, pieces=3, world=2, rank=0)
    with pytest.raises(UserError, match=r"nearest is 4$"):
        batches(shapes, 1, 0, pieces=4)


def test_rows_are_a_fixed_choice_from_all_over_the_set(shapes):
    root = shapes.cache.parent
    few, rest = (load("shapes", "test", 32, root, rows=rows) for rows in (slice(100), slice(100, None)))
    order = np.random.default_rng(0).permutation(10_000)
    for part, rows in ((few, order[:100]), (rest, order[100:])):
        assert len(part) == len(rows) and torch.equal(part.images, shapes.images[rows])
        assert torch.equal(part.labels, shapes.labels[rows]) and torch.equal(part.factors, shapes.factors[rows])
    assert len(few.labels.unique()) == 10
    assert len({few.key, rest.key, shapes.key}) == 3
    for same in (slice(0, 100), slice(-10_000, 100, 1)):
        assert load("shapes", "test", 32, root, rows=same).key == few.key
    for whole in (slice(None), slice(10**9), slice(0, 10_000)):
        again = load("shapes", "test", 32, root, rows=whole)
        assert again.key == shapes.key and torch.equal(again.labels, shapes.labels)
    assert "picks none of the 10000" in error("shapes", "test", 32, root, rows=slice(10_000, None))


def test_missing_labels(shapes):
    assert torch.equal(shapes.require_labels(), shapes.labels)
    for labels in (None, torch.full((10_000,), -1)):
        with pytest.raises(UserError, match="no labels"):
            module.replace(shapes, labels=labels).require_labels()


# -------------------------------------------------------------------------------------------------------------- crops


@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
def test_resized_crop_equals_torchvision(filter):
    x = torch.rand(6, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    box = torch.tensor([[0, 0, 40, 50], [3, 5, 30, 20], [10, 0, 7, 50], [39, 49, 1, 1], [5, 6, 16, 16], [0, 20, 40, 9]])
    for size in (16, 64):
        ours = resized_crop(x, box, size, filter)
        mode = InterpolationMode(filter)
        theirs = [
            transforms.resized_crop(a, *b, [size, size], mode, antialias=True)
            for a, b in zip(x, box.tolist(), strict=True)
        ]
        assert (ours - torch.stack(theirs)).abs().max() * 255 < 0.02
        flip = torch.tensor([True, False] * 3)
        mirrored = torch.where(flip[:, None, None, None], ours.flip(-1), ours)
        assert torch.allclose(resized_crop(x, box, size, filter, flip), mirrored, atol=1e-6)


@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
def test_the_whole_picture_at_its_own_size_is_itself(filter):
    x = torch.rand(2, 3, 24, 24)
    box = torch.tensor([[0, 0, 24, 24]] * 2)
    assert torch.allclose(resized_crop(x, box, 24, filter), x, atol=1e-6)


def test_crop_boxes_keep_to_the_area_the_aspect_and_the_picture():
    u = torch.from_numpy(uniforms(4000, module.DRAWS, 0, 0, 0))
    top, left, height, width = module.crop_boxes(u, 300, 400, (0.08, 1.0), (3 / 4, 4 / 3)).double().T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 300).all() and (left + width <= 400).all()
    area, aspect = height * width / (300 * 400), width / height
    assert area.min() > 0.078 and area.max() > 0.95 and aspect.min() > 0.74 and aspect.max() < 1.35
    assert (top == 0).any() and (top + height == 300).any() and len(left.unique()) > 100
    free = (height < 290) & (width < 390)
    places = np.stack([(top / (300 - height))[free], (left / (400 - width))[free]])
    assert abs(np.corrcoef(places)[0, 1]) < 0.1
    strip = module.crop_boxes(u[:3], 10, 100, (0.5, 1.0), (3 / 4, 4 / 3))  # no try can fit: torchvision's fallback
    assert strip.tolist() == [[0, 43, 10, 13]] * 3
    square = module.crop_boxes(u, 300, 400, (0.5, 1.0), (1.0, 1.0))
    assert torch.equal(square[:, 2], square[:, 3])


def test_crops_in_memory_are_resized_crops_of_their_boxes(shapes):
    crop = (2, 24, *REPRESENTATION)
    x, _, i = next(batches(shapes, 8, 5, start=3, crop=crop))
    assert x.shape == (8, 2, 3, 24, 24) and x.abs().max() <= 1
    pictures = shapes.images[i].permute(0, 3, 1, 2).float() / 127.5 - 1
    for view in (0, 1):
        u = torch.from_numpy(uniforms(8, module.DRAWS, 3, 5, module.VIEW + view))
        box = module.crop_boxes(u, 32, 32, *REPRESENTATION[:2])
        expected = resized_crop(pictures, box, 24, "bicubic", u[:, -1] < 0.5).clamp(-1, 1)
        assert torch.allclose(x[:, view], expected, atol=1e-6)


def test_full_size_crops_are_a_function_of_seed_and_step(tmp_path):
    place = folder(tmp_path / "set", count=4)
    for entry in (place / "train").rglob("*.png"):  # large JPEGs, so that draft decoding is used
        picture(entry.with_suffix(".jpg"), 700, 900, seed=len(str(entry))).replace(entry.with_name(entry.stem + ".JPG"))
        entry.unlink()
    data = read(place, tmp_path, size=None)
    assert data.images is None and len(data) == 8 and data.labels.tolist() == [0] * 4 + [1] * 4
    crop = (2, 32, *REPRESENTATION)
    first = list(itertools.islice(batches(data, 8, 0, start=0, crop=crop), 3))
    again = next(batches(data, 8, 0, start=2, crop=crop))
    assert all(torch.equal(a, b) for a, b in zip(first[2], again, strict=True))
    x, y, i = first[0]
    assert x.shape == (8, 2, 3, 32, 32) and torch.equal(y, data.labels[i])
    for row, view in itertools.product((0, 5), (0, 1)):  # draft decoding moves pixels by about a level
        whole = np.asarray(Image.open(os.fsdecode(data.files[i[row]])))
        u = torch.from_numpy(uniforms(8, module.DRAWS, 0, 0, module.VIEW + view)[row : row + 1])
        box = module.crop_boxes(u, 700, 900, *REPRESENTATION[:2])
        whole = torch.from_numpy(whole.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        expected = resized_crop(whole, box, 32, "bicubic", u[:, -1] < 0.5)[0]
        assert (x[row, view] - expected).abs().mean() * 127.5 < 2
    with pytest.raises(UserError, match="without a size"):
        batches(data, 8, 0)


def test_a_broken_file_ends_full_size_crops_with_one_line(tmp_path):
    place = folder(tmp_path / "set", splits=["train"])
    (place / "train" / "bee" / "3.png").write_bytes(b"nothing")
    data = read(place, tmp_path, size=None)
    with pytest.raises(UserError, match=r"bee/3\.png") as caught:
        list(itertools.islice(batches(data, 8, 0, crop=(1, 8, *REPRESENTATION)), 3))
    assert "\n" not in str(caught.value)
    kept = read(place, tmp_path, size=None, skip_broken=True)
    assert len(kept) == len(data) - 1
    list(itertools.islice(batches(kept, 8, 0, crop=(1, 8, *REPRESENTATION)), 3))


def test_memory_mapped_sets_are_read_ahead_in_order(tmp_path, monkeypatch):
    data = read(folder(tmp_path / "set"), tmp_path)
    resident = list(itertools.islice(batches(data, 4, 0), 9))
    threads = []
    ahead = module.ahead
    monkeypatch.setattr(module, "ahead", lambda *args, **options: threads.append(1) or ahead(*args, **options))
    monkeypatch.setattr(module, "RESIDENT", 0)
    mapped = list(itertools.islice(batches(data, 4, 0), 9))
    assert threads
    for a, b in zip(resident, mapped, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------ files and their oddities


def only(tmp_path, **options):
    """The first picture of a folder that holds nothing else, without the tenth that is held out."""
    place = tmp_path / "one" / "train"
    (tmp_path / "one" / "val").mkdir(parents=True, exist_ok=True)
    return (
        load(str(place.parent), "train", root=tmp_path / "root", **{"size": 16} | options).images[0].numpy().astype(int)
    )


def save(tmp_path, image, name="a.png", **options):
    place = tmp_path / "one" / "train"
    place.mkdir(parents=True, exist_ok=True)
    image.save(place / name, **options)


def test_centre_square_resized_as_by_pillow(tmp_path):
    save(tmp_path, Image.fromarray(noise(40, 60)))
    square = Image.fromarray(noise(40, 60)).resize((16, 16), Image.Resampling.BICUBIC, box=(10, 0, 50, 40))
    assert np.array_equal(only(tmp_path), np.asarray(square))
    assert np.array_equal(only(tmp_path, size=40), noise(40, 60)[:, 10:50])
    assert only(tmp_path, size=100).shape == (100, 100, 3)


def test_cmyk_jpeg(tmp_path):
    save(tmp_path, Image.new("RGB", (20, 20), (200, 40, 90)).convert("CMYK"), "a.JPEG", format="JPEG", quality=95)
    assert np.abs(only(tmp_path) - [200, 40, 90]).max() < 8


def test_png_named_jpeg(tmp_path):
    save(tmp_path, Image.fromarray(noise(16, 16)), "a.JPEG", format="PNG")
    assert np.array_equal(only(tmp_path), noise(16, 16))


def test_grey_of_8_and_16_bits(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    save(tmp_path, Image.fromarray(ramp))
    assert np.array_equal(only(tmp_path), ramp[..., None].repeat(3, -1))
    save(tmp_path, Image.fromarray(ramp.astype(np.uint16) * 257))
    assert Image.open(tmp_path / "one/train/a.png").mode.startswith("I")
    assert np.array_equal(only(tmp_path), ramp[..., None].repeat(3, -1))


def test_transparency_shows_white_not_the_hidden_colour(tmp_path):
    pixels = np.zeros((16, 16, 4), dtype=np.uint8)
    pixels[..., 0] = 200  # red, hidden on the left, half visible on the right
    pixels[:, 8:, 3] = 128
    save(tmp_path, Image.fromarray(pixels))
    found = only(tmp_path)
    assert (found[:, :8] == 255).all()
    assert np.abs(found[:, 8:] - [227, 127, 127]).max() <= 1
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.paste(0, (0, 0, 8, 16))
    save(tmp_path, palette, transparency=0)
    found = only(tmp_path)
    assert (found[:, :8] == 255).all() and (found[:, 8:] == [10, 20, 30]).all()


@pytest.mark.parametrize("orientation, turns", [(3, 2), (6, 3), (8, 1)])
def test_exif_rotation_in_a_folder_of_ones_own_but_not_in_imagenet(tmp_path, orientation, turns):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(tmp_path / "imagenet" / "train" / "n01" / "a.JPEG", 30, 60, format="JPEG", exif=exif, quality=95)
    picture(tmp_path / "imagenet" / "train" / "n02" / "b.JPEG", 30, 60, format="JPEG", quality=95)
    (tmp_path / "imagenet" / "val").mkdir()
    raw = np.asarray(Image.fromarray(noise(30, 60)).crop((15, 0, 45, 30)).resize((16, 16), Image.Resampling.BICUBIC))
    named = load("imagenet", size=16, root=tmp_path)
    own = load(str(tmp_path / "imagenet"), size=16, root=tmp_path)
    assert np.abs(named.images[0].numpy().astype(int) - raw).mean() < 4
    assert np.abs(own.images[0].numpy().astype(int) - np.rot90(raw, turns)).mean() < 4
    assert torch.equal(named.images[1], own.images[1])
    whole = (1, 16, (1.0, 1.0), (1.0, 2.0), "bicubic")  # 30 x 60 turned is 60 x 30: its tallest allowed crop is square
    data = load(str(tmp_path / "imagenet"), size=None, root=tmp_path)
    x, _, i = next(batches(data, 2, 0, crop=whole, flip=False))
    if turns % 2:
        tall = ((x[i == 0][0, 0] + 1) * 127.5).permute(1, 2, 0).numpy()
        assert np.abs(tall - np.rot90(raw, turns)).mean() < 4


def test_layouts_labels_and_held_out_pictures(tmp_path):
    place = folder(tmp_path / "set", count=3, classes=("bee", "ant"), splits=("train", "test"))
    picture(place / "train" / "ant" / "deep" / "er" / "x.PNG")
    picture(place / "train" / "ant" / ".hidden.png")
    picture(place / "train" / "__MACOSX" / "x.png")
    train, test = (read(place, tmp_path, split=split) for split in ("train", "test"))
    assert train.classes == test.classes == ["ant", "bee"] and train.require_labels().tolist() == [0] * 4 + [1] * 3
    assert [os.fsdecode(f).rpartition("/")[2] for f in train.files] == [
        "0.png",
        "1.png",
        "2.png",
        "x.PNG",
        *("0.png", "1.png", "2.png"),
    ]
    assert test.labels.tolist() == [0, 0, 0, 1, 1, 1] and train.key != test.key

    classes_only = read(place / "train", tmp_path), read(place / "train", tmp_path, split="test")
    names = [set(data.files) for data in classes_only]
    assert len(names[0]) == 6 and len(names[1]) == 1 and not names[0] & names[1]
    assert classes_only[0].classes == ["ant", "bee"]

    picture(place / "train" / "loose.png")
    assert read(place, tmp_path).labels is None
    (place / "train" / "loose.png").unlink()
    picture(place / "test" / "flat.png")
    with pytest.raises(UserError, match="has no labels"):
        read(place, tmp_path, split="test").require_labels()


def test_imagenet_is_found_under_root_or_is_root(tmp_path):
    folder(tmp_path / "imagenet", count=2, classes=("n02", "n01"))
    under = load("imagenet", "test", 16, tmp_path)
    assert under.classes == ["n01", "n02"] and len(under) == 4
    assert torch.equal(load("imagenet", "test", 16, tmp_path / "imagenet").images, under.images)


def test_celeba(tmp_path):
    home, keep = tmp_path / "celeba", []
    for i in range(1, 13):
        keep.append(picture(home / "img_align_celeba" / f"{i:06}.jpg", 218, 178, seed=i).name)
    assert {len(load("celeba", split, 16, tmp_path)) for split in ("train", "test")} == {10, 2}
    (home / "list_eval_partition.txt").write_text("".join(f"{f} {i % 3}\n" for i, f in enumerate(keep)))
    test = load("celeba", "test", 16, tmp_path)
    assert [os.fsdecode(f)[-10:] for f in test.files] == keep[2::3]
    whole = Image.open(home / "img_align_celeba" / keep[2])
    square = whole.resize((16, 16), Image.Resampling.BICUBIC, box=(15, 35, 163, 183))
    assert np.array_equal(test.images[0], np.asarray(square))


def write_idx(place, name, array):
    place.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    (place / name).write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.mark.parametrize("name, home", [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_is_padded_and_grey(tmp_path, name, home):
    digits = np.random.default_rng(0).integers(0, 256, (7, 28, 28))
    for part in ("train", "t10k"):
        write_idx(tmp_path / home / "raw", f"{part}-images-idx3-ubyte", digits)
        write_idx(tmp_path / home / "raw", f"{part}-labels-idx1-ubyte", np.arange(7))
    data = load(name, root=tmp_path)
    assert data.images.shape == (7, 32, 32, 3) and data.labels.tolist() == list(range(7)) and len(data.classes) == 10
    assert np.array_equal(data.images[:, 2:30, 2:30, 1], digits) and data.images.sum() == 3 * digits.sum()
    assert data.flip == (name == "fashion_mnist")
    small = load(name, size=16, root=tmp_path)
    padded = Image.fromarray(np.pad(digits[3], 2).astype(np.uint8))
    expected = np.asarray(padded.resize((16, 16), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(small.images[3, :, :, 0].numpy() - expected).max() <= 1
    assert small.key != data.key


def test_stl10_is_turned_to_channels_last(tmp_path, monkeypatch):
    class STL10:
        classes = "ab"

        def __init__(self, root, split, download):
            self.data = np.arange(2 * 3 * 96 * 96, dtype=np.uint8).reshape(2, 3, 96, 96)
            self.labels = np.array([1, 0])

    monkeypatch.setitem(module.PUBLISHED, "stl10", (STL10, "files"))
    data = load("stl10", root=tmp_path, size=None)
    assert data.images[1, 5, 7].tolist() == STL10("", "", 0).data[1, :, 5, 7].tolist()
    assert data.require_labels().tolist() == [1, 0]


# ---------------------------------------------------------------------------------------------------------- the cache


@pytest.fixture
def opened(monkeypatch):
    """Counts the pictures that Pillow opens."""
    count = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **options: count.append(1) or original(*args, **options))
    return count


def test_a_second_load_reads_no_picture_and_changes_are_noticed(tmp_path, opened):
    place = folder(tmp_path / "set", count=3)
    first = read(place, tmp_path)
    assert len(opened) == 6
    assert torch.equal(read(place, tmp_path).images, first.images) and len(opened) == 6
    assert read(place, tmp_path, size=8).key != first.key and len(opened) == 12
    added = picture(place / "train" / "ant" / "9.png")
    assert len(read(place, tmp_path)) == 7 and len(opened) == 19
    os.utime(added, (1, 1))
    assert read(place, tmp_path).key != first.key and len(opened) == 26
    added.rename(place / "train" / "bee" / "9.png")
    assert read(place, tmp_path).labels.tolist() == [0] * 3 + [1] * 4 and len(opened) == 33
    key = read(place, tmp_path).key
    (place / "train" / "bee" / "9.png").rename(place / "train" / "bee" / "a.png")  # the same place in the order
    assert read(place, tmp_path).key != key
    (place / "train" / "bee" / "a.png").unlink()
    assert read(place, tmp_path).key == first.key and len(opened) == 40


def test_only_chosen_files_are_packed_and_the_two_parts_make_the_set(tmp_path, opened):
    place = folder(tmp_path / "set", count=10)
    few, rest = (read(place, tmp_path, rows=rows) for rows in (slice(6), slice(6, None)))
    assert len(opened) == 20 and len(few) == 6 and len(rest) == 14
    sizes = {entry.stem: entry.stat().st_size for entry in few.cache.glob("*.u8")}
    assert sizes == {few.key: 6 * 16 * 16 * 3, rest.key: 14 * 16 * 16 * 3}
    whole, order = read(place, tmp_path), np.random.default_rng(0).permutation(20)
    assert whole.files.tolist() == sorted(whole.files) == sorted([*few.files, *rest.files])
    for part, rows in ((few, order[:6]), (rest, order[6:])):
        assert part.files.tolist() == whole.files[rows].tolist() and part.classes == whole.classes
        assert torch.equal(part.images, whole.images[rows]) and torch.equal(part.labels, whole.labels[rows])
    count = len(opened)
    assert read(place, tmp_path, rows=slice(0, 6)).key == few.key
    assert read(place, tmp_path, rows=slice(10**9)).key == whole.key and len(opened) == count
    full = read(place, tmp_path, size=None, rows=slice(6))
    assert full.files.tolist() == few.files.tolist() and full.images is None
    assert "holds no pictures" in error(str(place), size=16, root=tmp_path / "root", rows=slice(20, None))


@pytest.mark.parametrize("bytes_left", [0, 1000])
def test_a_cache_that_was_cut_short_is_packed_again(tmp_path, opened, bytes_left):
    place = folder(tmp_path / "set")
    (place / "train" / "bee" / "3.png").write_bytes(b"nothing")
    data = read(place, tmp_path, skip_broken=True)
    expected = data.images.clone()
    os.truncate(data.cache / f"{data.key}.u8", bytes_left)
    assert torch.equal(read(place, tmp_path, skip_broken=True).images, expected) and len(opened) == 24
    (data.cache / f"{data.key}.u8.json").unlink()
    assert torch.equal(read(place, tmp_path, skip_broken=True).images, expected) and len(opened) == 36


def slow(place, tmp_path, ready="ready"):
    """Starts a process that makes the file `ready`, and when the file `go` exists packs a folder, slowly."""
    return run(
        f"""
import pathlib, time
from common import data
cut = data.cut
data.cut = lambda *args, **options: time.sleep(0.05) or cut(*args, **options)
pathlib.Path({str(tmp_path / ready)!r}).touch()
while not pathlib.Path({str(tmp_path / "go")!r}).exists():
    time.sleep(0.01)
data.load({str(place)!r}, size=16, root={str(tmp_path / "root")!r})
"""
    )


def wait(until, process):
    deadline = time.monotonic() + 60
    while not until():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)


def test_two_processes_at_once_end_with_one_good_cache(tmp_path):
    place = folder(tmp_path / "set", count=20)
    both = [slow(place, tmp_path, ready) for ready in ("one", "two")]
    for process, ready in zip(both, ("one", "two"), strict=True):
        wait((tmp_path / ready).exists, process)
    (tmp_path / "go").touch()
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert sum("packing" in text for text in errors) == 1  # the other waited
    key = read(place, tmp_path).key
    assert {entry.name for entry in (tmp_path / "root" / "cache").iterdir()} == {
        f"{key}.u8{suffix}" for suffix in ("", ".json", ".lock")
    }


def test_a_kill_while_building_leaves_no_half_cache(tmp_path):
    place, cache = folder(tmp_path / "set", count=40), tmp_path / "root" / "cache"
    process = slow(place, tmp_path)
    (tmp_path / "go").touch()
    wait(lambda: list(cache.glob("*.tmp")), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and list(cache.glob("*.tmp"))
    data = read(place, tmp_path)
    assert len(data) == 80 and not list(cache.glob("*.tmp"))
    assert all(picture.float().std() > 0 for picture in data.images)


def test_an_error_while_building_leaves_nothing(tmp_path, monkeypatch):
    place = folder(tmp_path / "set")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 100}))
    assert "takes 0.0 GB" in error(str(place), size=16, root=tmp_path)
    monkeypatch.undo()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    assert "No space left" in error(str(place), size=16, root=tmp_path)
    assert [entry.suffix for entry in (tmp_path / "cache").iterdir()] == [".lock"]


# ---------------------------------------------------------------------------------------------------------- bad input


def test_broken_pictures_are_named_all_at_once_or_left_out(tmp_path, capsys, opened):
    place = folder(tmp_path / "set", count=4)
    whole = picture(place / "train" / "ant" / "long.jpg", 200, 200).read_bytes()
    (place / "train" / "ant" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (place / "train" / "bee" / "empty.png").write_bytes(b"")
    (place / "train" / "bee" / "text.png").write_text("no picture")
    for _ in range(2):  # the second time from the cache
        line = error(str(place), size=16, root=tmp_path)
        assert "3 broken pictures" in line and "--skip-broken" in line
        assert all(name in line for name in ("ant/cut.jpg", "bee/empty.png", "bee/text.png"))
    assert len(opened) == 12
    capsys.readouterr()
    data = load(str(place), size=16, root=tmp_path, skip_broken=True)
    assert "left out 3 broken pictures of 12" in capsys.readouterr().err
    assert data.labels.tolist() == [0] * 5 + [1] * 4 and len(data.files) == len(data.images) == 9
    assert all(picture.float().std() > 0 for picture in data.images)
    for file in (place / "train").rglob("*.*"):
        file.write_bytes(b"")
    assert "none of 12" in error(str(place), size=16, root=tmp_path, skip_broken=True)


def test_bombs_are_broken_pictures(tmp_path, monkeypatch):
    place = folder(tmp_path / "set")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "decompression bomb" in error(str(place), size=16, root=tmp_path)


def test_wrong_names_folders_and_sizes(tmp_path):
    assert "cifar100" in error("cifar11", root=tmp_path) and "celeba" in error("cifar11", root=tmp_path)
    assert "is no folder" in error(str(tmp_path / "missing"), root=tmp_path)
    assert "is no folder" in error(str(picture(tmp_path / "a.png")), root=tmp_path)
    (tmp_path / "empty").mkdir()
    assert "holds no pictures" in error(str(tmp_path / "empty"), root=tmp_path)
    assert "train/WNID" in error("imagenet", root=tmp_path)
    assert "img_align_celeba" in error("celeba", root=tmp_path)
    for size in (0, -3):
        assert "size" in error("shapes", size=size, root=tmp_path)
    assert "train or test" in error("shapes", "valid", root=tmp_path)


def test_wrong_classes(tmp_path):
    place = folder(tmp_path / "set")
    (place / "train" / "nothing").mkdir()
    assert str(place / "train" / "nothing") + " holds no picture" in error(str(place), root=tmp_path)
    (place / "train" / "nothing").rmdir()
    picture(place / "val" / "wasp" / "x.png")
    assert "wasp holds no picture, or is not a class" in error(str(place), "test", root=tmp_path)


def test_caches_of_the_former_layout_are_left_alone(tmp_path):
    key = load("shapes", "test", 8, tmp_path / "new").key
    (tmp_path / "old" / "cache" / key).mkdir(parents=True)  # once a folder
    assert len(load("shapes", "test", 8, tmp_path / "old")) == 10_000


def test_unusable_cache_folders(tmp_path):
    place = folder(tmp_path / "set")
    (tmp_path / "cache").write_text("in the way")
    assert "--root" in error(str(place), size=16, root=tmp_path)


def test_folders_without_permission(tmp_path, monkeypatch):
    def refuse(place):
        raise PermissionError(13, "Permission denied", str(place))

    place = folder(tmp_path / "set")
    monkeypatch.setattr(module.os, "scandir", refuse)
    assert "Permission denied" in error(str(place), root=tmp_path) and str(place) in error(str(place), root=tmp_path)


def test_published_files_that_are_missing_or_broken_without_a_network(tmp_path, monkeypatch):
    def offline(*args, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    for name in module.PUBLISHED:
        line = error(name, root=tmp_path)
        assert str(tmp_path) in line and module.PUBLISHED[name][1] in line
    write_idx(tmp_path / "MNIST" / "raw", "train-images-idx3-ubyte", np.zeros((3, 28, 28)))
    for name in ("train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (tmp_path / "MNIST" / "raw" / name).write_bytes(gzip.compress(b"broken"))
    assert "mnist" in error("mnist", root=tmp_path)


# -------------------------------------------------------------------------------------------------------------- drawn


def test_shapes_are_balanced_and_the_same_bits_twice(shapes, tmp_path):
    again = load("shapes", "test", 32, tmp_path)
    assert torch.equal(again.images, shapes.images) and again.key == shapes.key
    assert shapes.images.shape == (10_000, 32, 32, 3) and len(shapes.classes) == 10
    assert torch.bincount(shapes.labels).tolist() == [1000] * 10
    assert shapes.factors.shape == (10_000, 7)


def test_shapes_are_no_worse_when_mirrored_or_enlarged(shapes):
    large = module.render_shapes(shapes.labels[:200], shapes.factors[:200], 64)
    halved = torch.nn.functional.avg_pool2d(large.permute(0, 3, 1, 2).float(), 2).permute(0, 2, 3, 1)
    assert (halved - shapes.images[:200].float()).abs().mean() < 2


def test_dsprites_rows_are_their_factors():
    row = lambda *factors: np.ravel_multi_index((0, *factors), module.DSPRITES)
    assert row(1, 2, 3, 4, 5) == 330885 and row(2, 5, 39, 31, 31) == 737279
    squares = module.draw_dsprites([row(0, scale, 0, 0, 0) for scale in (0, 5)])
    assert squares.sum((1, 2)).tolist() == [100, 400]
    hearts = module.draw_dsprites([row(2, scale, 0, 0, 0) for scale in range(6)]).sum((1, 2))
    assert np.abs(hearts.astype(int) - [58, 84, 108, 140, 182, 222]).max() <= 4  # as published
    for shape in range(3):
        turn = module.draw_dsprites([row(shape, 3, 0, 5, 6), row(shape, 3, 39, 5, 6)])
        assert np.array_equal(*turn)


def test_dsprites_reads_the_published_file(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "DSPRITES", (1, 2, 1, 1, 32, 32))
    pictures = np.random.default_rng(0).integers(0, 2, (2048, 64, 64), dtype=np.uint8)
    np.savez_compressed(tmp_path / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz", imgs=pictures)
    data = load("dsprites", size=64, root=tmp_path)
    assert np.array_equal(data.images[..., 2], 255 * pictures) and not data.flip
    assert data.labels.tolist() == [0] * 1024 + [1] * 1024 and data.factors[5].tolist() == [0, 0, 0, 0, 0, 5]
    x, _, i = next(batches(data, 4, 0))
    assert torch.equal(x[:, 0] > 0, torch.from_numpy(pictures[i] == 1))
    drawn = load("dsprites", size=16, root=tmp_path / "elsewhere")
    assert drawn.images.shape == (2048, 16, 16, 3) and drawn.key != data.key and drawn.images.float().std() > 20
    (tmp_path / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz").write_bytes(b"broken")
    assert "dsprites" in error("dsprites", size=64, root=tmp_path)
