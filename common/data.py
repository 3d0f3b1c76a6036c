"""Data sets as uint8 pictures, and batches that are a pure function of (seed, step, rank, world).

    train = load("cifar10", "train", size=32, root="data")
    for x, y, i in batches(train, batch=64, seed=0, device="cuda"):  # endless; x [64, 3, 32, 32] in [-1, 1]

Published files are read by torchvision's classes, folders of pictures by Pillow into a memory-mapped cache; `shapes` is
drawn. No generator state is kept: whatever is random comes from fresh generators keyed by (seed, purpose, step), drawn
for the global batch and then sliced. So resuming is exact, and 2 processes see what 2 accumulated pieces see.
"""

import fcntl
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import time
import warnings
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision import datasets

NAMES = ("shapes", "dsprites", "mnist", "fashion_mnist", "cifar10", "cifar100", "stl10", "celeba", "imagenet")
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
PUBLISHED = {  # torchvision's classes, and what they read under root
    "mnist": (datasets.MNIST, "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte"),
    "fashion_mnist": (datasets.FashionMNIST, "FashionMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte"),
    "cifar10": (datasets.CIFAR10, "cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta}"),
    "cifar100": (datasets.CIFAR100, "cifar-100-python/{train,test,meta}"),
    "stl10": (datasets.STL10, "stl10_binary/{train,test,unlabeled}_X.bin and {train,test}_y.bin"),
}
HIDDEN = (".", "__MACOSX")  # files and folders whose names begin so are skipped
FORMAT = 1  # of the cache: to be counted up whenever the same source would give other pictures
RESIDENT = 2 * 10**9  # bytes; larger sets stay memory-mapped (on CUDA: a quarter of the memory)
VIEW = 0xF11B  # the random stream of a picture's first view; the second's is the next number
DRAWS = 23  # random numbers of a view: 10 areas, 10 aspect ratios, top, left, flip


class UserError(ValueError):
    """What the user got wrong, in one line that says how to mend it. Scripts print it and exit with status 2."""


@dataclass(eq=False)
class Data:
    """One split of a data set: N pictures."""

    name: str
    split: str
    size: int | None
    images: torch.Tensor | None  # uint8 [N, S, S, 3], perhaps memory-mapped; None where only the files were asked for
    key: str  # hex digits that identify content and preprocessing: a safe name for files derived from the pictures
    cache: Path  # the folder where such files may be kept; it may not exist yet
    labels: torch.Tensor | None = None  # int64 [N]; -1: this picture has none
    classes: list[str] | None = None  # the labels' names
    factors: torch.Tensor | None = None  # [N, F], how each picture was made (celeba: attributes, 0 or 1)
    factor_names: list[str] | None = None
    files: np.ndarray | None = None  # bytes [N], the paths of pictures that have files of their own
    flip: bool = True  # whether a mirrored picture belongs to the data set: digits do not
    upright: bool = False  # whether files are turned as their EXIF tag says: not in the named sets, by convention

    def __len__(self):
        return len(self.files if self.images is None else self.images)

    def take(self, n):
        """n pictures from all over the set, the same whenever it is asked; the whole set where n >= len(self)."""
        if n >= len(self):
            return self
        rows = np.random.default_rng(0).permutation(len(self))[:n]
        columns = {name: getattr(self, name) for name in ("images", "labels", "factors", "files")}
        columns = {name: None if column is None else column[rows] for name, column in columns.items()}
        return replace(self, **columns, key=digest(self.key, n))

    def require_labels(self):
        """The labels, int64 [N]; UserError where pictures have none."""
        if self.labels is None or self.labels.min() < 0:
            cure = "give a folder with a sub-folder a class, or another data set"
            raise UserError(f"{self.name} ({self.split}) has no labels, and this needs them: {cure}")
        return self.labels


def load(name, split="train", size=32, root="data", skip_broken=False):
    """Read one of NAMES, or a folder of pictures, as uint8 pictures [N, size, size, 3].

    split        "train" or "test" ("train+unlabeled" is train, but stl10 adds its 100,000 unlabelled pictures to it).
                 Where a folder has no test pictures, a fixed tenth is held out; dsprites is not split at all.
    size         in pixels: the largest centre square, by Pillow's antialiased bicubic filter; mnist and fashion_mnist
                 are padded from 28 to 32 first, celeba starts from the centre 148 x 148. None: as published, or, of
                 pictures in files, only the paths, which batches(crop=...) decodes in full
    root         folder of the published files, in torchvision's layouts; root/cache is filled as needed
    skip_broken  leave out the files that cannot be decoded, saying how many, instead of refusing the set
    """
    root, cache = Path(root), Path(root) / "cache"
    if split not in ("train", "test", "train+unlabeled"):
        raise UserError(f"there is no split {split!r}: choose train or test")
    if size is not None and size < 1:
        raise UserError(f"size {size} is not possible: give the pictures' side in pixels, 1 or more")
    if name != "stl10":
        split = split.removesuffix("+unlabeled")
    try:
        if name in ("shapes", "dsprites"):
            return load_shapes(split, size or 32, cache) if name == "shapes" else load_dsprites(split, size or 64, root)
        if name in PUBLISHED:
            return load_published(name, split, size, root)
        if name == "celeba":
            return load_celeba(split, size, root / "celeba", cache, skip_broken)
        return load_folder(name, split, size, root, skip_broken)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {name}: {brief(error)}") from error


def load_published(name, split, size, root):
    reader, needed = PUBLISHED[name]
    part = {"split": split} if name == "stl10" else {"train": split == "train"}
    try:
        try:
            source = reader(root, download=False, **part)
        except Exception:  # not there, or damaged: each class has its own way of saying so
            root.mkdir(parents=True, exist_ok=True)
            with open(root / f"{name}.lock", "w") as lock:  # one process downloads, the others wait
                fcntl.flock(lock, fcntl.LOCK_EX)
                source = reader(root, download=True, **part)
    except Exception as error:
        raise UserError(f"cannot read or download {name} ({brief(error)}): put {needed} into {root}/") from error
    images = torch.as_tensor(source.data)
    key = digest(FORMAT, name, split, size, hashlib.sha256(np.ascontiguousarray(images)).digest())
    if name.endswith("mnist"):
        images = F.pad(images, (2, 2, 2, 2))[..., None].expand(-1, -1, -1, 3)  # padded: strokes stay exact
    elif name == "stl10":
        images = images.permute(0, 2, 3, 1)
    images = resize(images, size or images.shape[1]).contiguous()
    labels = torch.as_tensor(source.labels if name == "stl10" else source.targets).long()
    size, classes = images.shape[1], list(source.classes)
    return Data(name, split, size, images, key, root / "cache", labels, classes, flip=name != "mnist")


def load_folder(name, split, size, root, skip_broken):
    """imagenet or a folder: train/ and the first of val/, valid/, test/, or one set; classes are its sub-folders."""
    folder = Path(name)
    if name == "imagenet":
        folder = root / name if (root / name).exists() else root
        if not (folder / "train").is_dir():
            raise UserError(f"imagenet is not there: put it into train/WNID/ and val/WNID/ under {root / name}/")
    elif not folder.is_dir():
        wrong = "is a file" if folder.exists() else "is neither a data set nor a folder"
        raise UserError(f"{name} {wrong}: choose one of {', '.join(NAMES)}, or a folder of pictures")
    train, test = folder, None
    if (folder / "train").is_dir():
        train = folder / "train"
        test = next((folder / part for part in ("val", "valid", "test") if (folder / part).is_dir()), None)
    place = test if test and split == "test" else train
    files = find_pictures(place)
    owners = [file.partition("/")[0] for file in files if "/" in file]
    classes = sorted(entry.name for entry in os.scandir(train) if entry.is_dir() and not entry.name.startswith(HIDDEN))
    columns = {}
    if len(owners) == len(files) and len(classes) > 1:
        odd = set(owners) ^ set(classes) if place == train else set(owners) - set(classes)
        if odd:
            wrong = "holds no picture" if place == train else f"is not a class of {train}"
            raise UserError(f"{place / min(odd)} {wrong}: remove that folder")
        number = {owner: label for label, owner in enumerate(classes)}
        columns["labels"] = torch.tensor([number[owner] for owner in owners])
    rows = range(len(files)) if test else held_out(files, split)
    data = load_files(name, split, size, place, files, rows, root / "cache", skip_broken, **columns)
    return replace(data, classes=classes if columns else None)


def load_celeba(split, size, folder, cache, skip_broken):
    """The aligned pictures, read directly; the published partition and attributes where their files are there."""
    names = "img_align_celeba", "list_eval_partition.txt", "list_attr_celeba.txt"
    place, partition, attributes = (folder / name for name in names)
    if not place.is_dir():
        raise UserError(f"celeba is not there: put its aligned pictures into {place}/")
    files, names, columns = find_pictures(place), None, {}
    rows = held_out(files, split)
    if partition.exists():
        part = dict(line.split() for line in partition.read_text().splitlines())
        rows = [row for row, file in enumerate(files) if part[file] == ("2" if split == "test" else "0")]
    if attributes.exists():
        _, names, *table = [line.split() for line in attributes.read_text().splitlines()]
        values = {file: values for file, *values in table}
        columns["factors"] = torch.tensor([[value == "1" for value in values[file]] for file in files]).long()
    data = load_files("celeba", split, size, place, files, rows, cache, skip_broken, **columns)
    return replace(data, factor_names=names)


def find_pictures(folder):
    """The relative paths of all pictures below a folder, in the same order on every machine."""
    files = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(HIDDEN)]
        names = [name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(HIDDEN)]
        base = Path(place).relative_to(folder).as_posix()
        files += [f"{base}/{name}".removeprefix("./") for name in names]
    return sorted(files)


def held_out(files, split):
    """The rows of the train or test split of a set without splits: a hash of the names chooses a tenth for test."""
    order = sorted(range(len(files)), key=lambda row: digest(files[row]))
    tenth = math.ceil(len(files) / 10)
    return sorted(order[:tenth] if split == "test" else order[tenth:])


def load_files(name, split, size, place, files, rows, cache, skip_broken, **columns):
    """Those rows of the picture files under `place`, and of the columns (labels, factors) that belong to them."""
    files, columns = [files[row] for row in rows], {name: column[rows] for name, column in columns.items()}
    if not files:
        raise UserError(f"{place} holds no pictures for a {split} split: looked for {' '.join(SUFFIXES)}")
    stamps = []
    if len(files) <= 200_000:  # beyond that the names must do: asking for all takes minutes on a network disk
        stamps = [(status.st_size, status.st_mtime_ns) for status in (os.stat(place / file) for file in files)]
    upright, side = name not in NAMES, 148 if name == "celeba" else None
    key = digest(FORMAT, str(place.resolve()), size, "bicubic", upright, side, files, stamps)
    images, broken = None, {}

    def centre(height, width):
        square = min(height, width, side or height)
        return np.array([[(height - square) // 2, (width - square) // 2, square, square]])

    def pictures():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about odd EXIF data
            read = lambda file: cut(place / file, centre, size or 8, "bicubic", upright)
            for file, picture in zip(files, ahead(read, files, cores(), 32 * cores()), strict=True):
                if isinstance(picture, str):
                    broken[file] = picture
                else:
                    yield picture[0]
        if len(broken) == len(files):
            raise UserError(f"{place}: none of {len(files)} pictures can be read, {files[0]}: {broken[files[0]]}")

    if size or skip_broken:  # without a size: packed tiny, only to learn which files are broken
        images, broken = pack(f"{name} {split}", cache, key, (size or 8, size or 8, 3), len(files), pictures(), broken)
    if broken and not skip_broken:
        named = ", ".join(f"{file}: {why}" for file, why in list(broken.items())[:3]) + ", ..." * (len(broken) > 3)
        raise UserError(f"{len(broken)} broken pictures in {place} ({named}): mend them, or pass --skip-broken")
    if broken and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{name} {split}: left out {len(broken)} broken pictures of {len(files)}", file=sys.stderr)
    kept = [row for row, file in enumerate(files) if file not in broken]
    columns = {name: column[kept] for name, column in columns.items()}
    columns["files"] = np.array([os.fsencode(f"{place}/{files[row]}") for row in kept])  # one block: workers share it
    return Data(name, split, size, images if size else None, key, cache, upright=upright, **columns)


def cut(path, boxes, size, filter, upright, draft=False):
    """Parts of a picture file, resized: uint8 [views, size, size, 3]; or, as a str, why it cannot be read.

    boxes  from the picture's (height, width) to its parts (top, left, height, width), [views, 4]
    draft  let libjpeg decode at 1/2, 1/4 or 1/8, if that leaves twice the final size to the filter
    """
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            if upright and picture.getexif().get(0x0112, 1) > 4:  # the orientation tag: turned by 90 degrees
                width, height = height, width
            boxes = boxes(height, width)
            shrink = 2 * size / boxes[:, 2:].min()
            if draft and shrink < 1:
                picture.draft("RGB", tuple(math.ceil(side * shrink) for side in picture.size))
            picture = to_rgb(picture, upright)
        parts = []
        for top, left, h, w in boxes * ([picture.height / height, picture.width / width] * 2):
            box = left, top, min(left + w, picture.width), min(top + h, picture.height)
            parts.append(np.asarray(picture.resize((size, size), Image.Resampling[filter.upper()], box=box)))
        return np.stack(parts)
    except Exception as error:  # a broken file makes Pillow raise nearly anything
        return brief(error)


def to_rgb(picture, upright):
    if upright:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16-bit grey: convert() would turn all above 255 white
        picture = Image.fromarray((np.asarray(picture) / 257).clip(0, 255).round().astype(np.uint8))
    if picture.has_transparency_data:  # laid on white: convert() would show the colours under transparent pixels
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def pack(title, cache, key, shape, count, rows, broken):
    """cache/key: uint8 [N, *shape], memory-mapped, and the dict of broken files; written from `rows` on the first call.

    The folder gets its name when it is whole, so a kill leaves no half cache. Other processes wait for a lock, which
    the system frees when its holder dies.
    """
    folder, temporary = cache / key, cache / f"{key}.tmp"
    try:
        if not open_pack(folder, shape):
            cache.mkdir(parents=True, exist_ok=True)
            with open(cache / f"{key}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not open_pack(folder, shape):
                    for rest in (folder, temporary):  # damaged, or of a process that was killed
                        shutil.rmtree(rest, ignore_errors=True)
                    try:
                        write_pack(title, temporary, shape, count, rows, broken)
                        os.rename(temporary, folder)
                    finally:
                        shutil.rmtree(temporary, ignore_errors=True)
        return open_pack(folder, shape)
    except OSError as error:
        raise UserError(f"cannot use the cache {cache} ({brief(error)}): mend it, or give another --root") from error


def open_pack(folder, shape):
    """The pictures and the broken files of a cache folder; None where it is missing or damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        pixels = np.memmap(folder / "images.u8", np.uint8, "r", shape=(meta["count"], *shape))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has no read-only memory; nobody writes to this
            return torch.from_numpy(pixels), meta["broken"]
    except (FileNotFoundError, ValueError):
        return None


def write_pack(title, folder, shape, count, rows, broken):
    need, free = count * math.prod(shape) / 1e9, shutil.disk_usage(folder.parent).free / 1e9
    if need > free:
        raise UserError(f"packing {title} takes {need:.1f} GB, {folder.parent} has {free:.1f}: choose another --root")
    terminal, begun = sys.stderr.isatty(), time.monotonic()
    told, start, end = begun, "\r" * terminal, "" if terminal else "\n"
    folder.mkdir()
    with open(folder / "images.u8", "wb") as pixels, open(folder / "meta.json", "w") as meta:
        for done, row in enumerate(rows, 1):
            pixels.write(np.ascontiguousarray(row))
            now = time.monotonic()
            if now - told > (0.2 if terminal else 30) or done == count:
                told, left = now, (now - begun) / done * (count - done)
                print(f"{start}packing {title}: {done:,} of {count:,}, {left:,.0f} s left  ", end=end, file=sys.stderr)
        print(end="\n" * terminal, file=sys.stderr)
        json.dump({"count": pixels.tell() // math.prod(shape), "broken": broken}, meta)
        for file in (pixels, meta):
            file.flush()
            os.fsync(file.fileno())


def ahead(work, items, threads, depth):
    """map(work, items), done by threads that are up to `depth` results ahead of the reader."""
    with ThreadPoolExecutor(threads) as pool:
        pending = deque()
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        yield from (task.result() for task in pending)


def resize(images, size):
    """uint8 [N, H, H, C] -> [N, size, size, C], within one level of Pillow's antialiased bicubic filter."""
    if images.shape[1] == size:
        return images
    parts = [part.permute(0, 3, 1, 2) for part in images.split(4096)]
    parts = [F.interpolate(part, (size, size), mode="bicubic", antialias=True) for part in parts]
    return torch.cat(parts).permute(0, 2, 3, 1)


def digest(*values):
    return hashlib.sha256(repr(values).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def brief(error):
    return (str(error) or type(error).__name__).splitlines()[0]


def cores():
    """CPU cores for each process that torchrun started on this machine."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, available // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


# shapes: one light and one dark colour a picture; which of the two is the ground is a coin's toss, so that neither a
# colour nor a pixel's brightness tells the class. The ranges are tuned until pixels and random features tell little.
COLOURS = [[225, 200, 90], [120, 205, 225], [225, 165, 190], [110, 35, 55], [35, 45, 115], [30, 85, 60]]  # 3 and 3
FACTORS = ("foreground", "background", "gradient", "scale", "rotation", "x", "y")
GRADIENT = 20  # the ground's brightness changes by this much from the centre to an edge, of 255
SCALE = (0.7, 0.85)  # circumradius of the shape; 1 is half the picture
ROTATION = np.pi / 9  # either way
SHIFT = 0.1  # of the shape's centre, each way; 1 is half the picture


def edge_lines(x, y, corners):
    """Largest and second largest signed distance to the edge lines of the regular polygon with circumradius 1.

    Behind all lines is the polygon, beyond at most one of them the star that its prolonged edges draw.
    """
    first = second = torch.full_like(x, -9.0)
    for angle in (np.arange(corners) + 0.5) * 2 * np.pi / corners:
        line = x * np.sin(angle) + y * np.cos(angle) - np.cos(np.pi / corners)
        first, second = torch.maximum(first, line), torch.maximum(second, torch.minimum(first, line))
    return first, second


def circle(x, y, radius):
    return (x * x + y * y).sqrt() - radius


def box(x, y, width, height):
    return torch.maximum(x.abs() - width, y.abs() - height)


# Signed distances, negative inside, with y upwards: min is union, max is intersection, max(a, -b) is difference.
# Each shape is its own mirror image, so that flipping a picture does not leave the data set.
SHAPES = {
    "circle": lambda x, y: circle(x, y, 0.9),
    "square": lambda x, y: box(x, y, 0.76, 0.76),
    "triangle": lambda x, y: edge_lines(x / 1.15, (y + 0.15) / 1.15, 3)[0] * 1.15,
    "pentagon": lambda x, y: edge_lines(x, y, 5)[0],
    "star": lambda x, y: edge_lines(x / 0.4, y / 0.4, 5)[1] * 0.4,
    "heart": lambda x, y: torch.minimum((x.abs() + y.abs()) * 0.707 - 0.55, circle(x.abs() - 0.39, y - 0.39, 0.55)),
    "cross": lambda x, y: torch.minimum(box(x, y, 0.3, 0.9), box(x, y, 0.9, 0.3)),
    "ring": lambda x, y: circle(x, y, 0.7).abs() - 0.22,
    "crescent": lambda x, y: torch.maximum(circle(x, y, 0.95), -circle(x, y - 0.45, 0.72)),
    "arrow": lambda x, y: torch.minimum(
        torch.maximum(0.75 * x.abs() + 0.66 * y - 0.66, -y), box(x, y + 0.4, 0.28, 0.5)
    ),
}


def shape_factors(split, seed=0):
    """Ten balanced classes: labels int64 [N], N = 50,000 or for "test" 10,000, and factors float32 [N, 7]."""
    count = {"train": 50_000, "test": 10_000}[split]
    random = np.random.RandomState([seed, split == "test"])  # the generator whose stream NumPy promises to keep
    labels = random.permutation(count) % len(SHAPES)
    dark = 3 * random.randint(2, size=count)
    front, back = random.randint(3, size=count) + dark, random.randint(3, size=count) + 3 - dark
    gradient, rotation = random.uniform(-np.pi, np.pi, count), random.uniform(-ROTATION, ROTATION, count)
    scale, (right, up) = random.uniform(*SCALE, count), random.uniform(-SHIFT, SHIFT, (2, count))
    factors = np.stack([front, back, gradient, scale, rotation, right, up], axis=1).astype(np.float32)
    return torch.from_numpy(labels), torch.from_numpy(factors)


def render_shapes(labels, factors, size):
    """Anti-aliased pictures uint8 [N, size, size, 3]; `size` changes only the resolution."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for operations so short, threads wait for each other longer than they work
    front, back, gradient, scale, rotation, right, up = factors.T
    slopes = GRADIENT * gradient.cos(), GRADIENT * gradient.sin()
    pose = torch.stack([*slopes, scale, rotation.cos(), rotation.sin(), right, up])[..., None, None]  # [7, N, 1, 1]
    front, back = (torch.tensor(COLOURS)[colour.long()][:, None, None] for colour in (front, back))  # [N, 1, 1, 3]
    x = (torch.arange(size) + 0.5) * 2 / size - 1  # [S], pixel centres
    y = -x[:, None]  # [S, 1]
    images = torch.empty(len(labels), size, size, 3, dtype=torch.uint8)
    for label, distance in enumerate(SHAPES.values()):
        for rows in torch.nonzero(labels == label)[:, 0].split(max(1, 2**18 // size**2)):
            slope_x, slope_y, scale, cos, sin, right, up = pose[:, rows]
            u, v = (x - right) / scale, (y - up) / scale
            pixels = distance(cos * u + sin * v, cos * v - sin * u) * scale * size / 2  # [m, S, S]
            cover = (0.5 - pixels).clamp(0, 1)[..., None]  # anti-aliasing: the share of the pixel that is inside
            ground = back[rows] + (slope_x * x + slope_y * y)[..., None]
            images[rows] = (ground + cover * (front[rows] - ground)).round().byte()  # [m, S, S, 3]
    torch.set_num_threads(threads)
    return images


# dsprites: the published pictures lie in the order of their factors, so a row's number tells all of them.
DSPRITES = {"colour": 1, "shape": 3, "scale": 6, "orientation": 40, "x": 32, "y": 32}
HEART_TOP = np.array(  # right half of the outline, from the notch to the widest point: (u, v) in pixels at scale 1
    [[0, 0.2, 0.6, 1.4, 2.3, 3.3, 4.4, 5.4, 6.3, 7.2, 7.9, 8.7, 9.2, 9.4, 9.7],
     [5, 5.7, 6.7, 7.9, 8.6, 9.1, 9.4, 9.3, 9, 8.6, 7.9, 7.3, 6.4, 5.4, 4.5]]
)  # fmt: skip
HEART_BOTTOM = np.array(  # from the tip to the widest point
    [[0, 0.7, 1.3, 1.8, 2.2, 3, 3.9, 4.6, 5.3, 5.9, 6.2, 6.7, 7.1, 7.7, 8.1, 8.6, 9.1, 9.4, 9.6, 9.7],
     [-9.6, -8, -7.2, -6.6, -6.1, -5.3, -4.6, -3.8, -3.1, -2.7, -2.2, -1.8, -1.3, -0.7, 0, 0.8, 1.6, 2.5, 3.5, 4.5]]
)  # fmt: skip


def dsprites_factors(indices):
    """The six factors' classes, int64 [n, 6], of rows 0 to 737,279 of the published file; ValueError beyond it."""
    return np.stack(np.unravel_index(np.asarray(indices, np.int64), tuple(DSPRITES.values())), axis=-1)


def dsprites_images(indices):
    """Those rows' pictures as uint8 [n, 64, 64] of 0 and 1, a few pixels a picture off the published ones."""
    _, shape, scale, orientation, x, y = dsprites_factors(indices).T[..., None, None]  # each [n, 1, 1]
    angle = 2 * np.pi * (orientation % 39) / 39  # the published angles include both 0 and 2 pi
    scale = 0.5 + scale / 10
    pixel = np.arange(64) + 0.5
    right, up = (pixel - 16 - 32 * x / 31) / scale, (16 + 32 * y / 31 - pixel[:, None]) / scale
    u, v = np.abs(np.cos(angle) * right + np.sin(angle) * up), np.cos(angle) * up - np.sin(angle) * right
    inside = np.where(shape == 0, np.maximum(u, np.abs(v)) <= 9.6, (u / 12.8) ** 2 + (v / 7.2) ** 2 <= 1)
    heart = shape.ravel() == 2
    u, v = u[heart], v[heart]
    inside[heart] = (u <= 9.7) & (np.interp(u, *HEART_BOTTOM) <= v) & (v <= np.interp(u, *HEART_TOP))
    return inside.astype(np.uint8)


def load_shapes(split, size, cache):
    labels, factors = shape_factors(split)
    first = render_shapes(labels[:50], factors[:50], size)  # tells this renderer's pictures from another's
    key = digest("shapes", split, size, factors.numpy().tobytes(), first.numpy().tobytes())

    def pictures():
        yield from render_shapes(labels, factors, size).numpy()

    try:
        images, _ = pack(f"shapes {split}", cache, key, (size, size, 3), len(labels), pictures(), {})
    except UserError:  # the cache only saves time here
        images = render_shapes(labels, factors, size)
    return Data("shapes", split, size, images, key, cache, labels, list(SHAPES), factors, list(FACTORS))


def load_dsprites(split, size, root):
    """All 737,280 pictures, whatever the split: from the published file where it is there, else drawn."""
    name, count = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz", math.prod(DSPRITES.values())
    source = next((path for path in (root / name, root / "dsprites" / name) if path.exists()), None)
    stamp = (source.stat().st_size, source.stat().st_mtime_ns) if source else "drawn"
    key = digest(FORMAT, "dsprites", size, stamp)

    def pictures():
        blocks = np.arange(count).reshape(-1, 512)
        if source:  # streamed: unpacked, it is 3 GB
            file = zipfile.ZipFile(source).open("imgs.npy")  # noqa: SIM115
            np.lib.format.read_magic(file), np.lib.format.read_array_header_1_0(file)
            drawn = (np.frombuffer(file.read(512 * 4096), np.uint8).reshape(-1, 64, 64) for _ in blocks)
        else:
            drawn = ahead(dsprites_images, blocks, cores(), 2 * cores())
        for block in drawn:
            yield from resize(torch.from_numpy(255 * block)[..., None], size).numpy()

    images, _ = pack("dsprites", root / "cache", key, (size, size, 1), count, pictures(), {})
    factors = torch.from_numpy(dsprites_factors(np.arange(count)))
    known = {"labels": factors[:, 1], "classes": ["square", "ellipse", "heart"], "factors": factors}
    images = images.expand(-1, -1, -1, 3)
    return Data("dsprites", split, size, images, key, root / "cache", **known, factor_names=list(DSPRITES), flip=False)


def indices(n, batch, step, seed, rank=0, world=1, piece=0, pieces=1):
    """Which of n pictures a rank sees in one piece of a step: int64 [batch / (world * pieces)].

    The batches, joined, are one permutation after the other: all are full, and each n positions hold a picture once.
    A batch is cut into world * pieces equal slices, those of piece 0 first.
    """
    m = batch // (world * pieces)
    position = step * batch + (piece * world + rank) * m + np.arange(m)
    epoch, slot = np.divmod(position, n)
    chosen = np.empty(m, dtype=np.int64)
    for e in np.unique(epoch):
        chosen[epoch == e] = permutation(n, seed, int(e))[slot[epoch == e]]
    return chosen


@lru_cache(maxsize=4)
def permutation(n, seed, epoch):
    return np.random.default_rng([seed, 0x5EED, epoch]).permutation(n)


def uniforms(batch, k, step, seed, stream, rank=0, world=1, piece=0, pieces=1):
    """k random numbers for each picture of a rank's piece: float32 [batch / (world * pieces), k] in [0, 1).

    Rows of a table for the global batch: the same on every device, however it is cut. `stream`: one number a purpose.
    """
    m = batch // (world * pieces)
    first = (piece * world + rank) * m
    return np.random.default_rng([seed, stream, step]).random((batch, k), dtype=np.float32)[first : first + m]


def generator(seed, stream, step, device="cpu"):
    """A fresh torch.Generator for noise. Draw for the global batch, then slice; CUDA draws differ from the CPU's."""
    packed = b"".join(int(number).to_bytes(8, "little", signed=True) for number in (seed, stream, step))
    key = int.from_bytes(hashlib.sha256(packed).digest()[:8], "little") & (2**63 - 1)  # a sum would make seeds overlap
    return torch.Generator(device).manual_seed(key)


def batches(data, batch, seed, start=0, pieces=1, flip=True, crop=None, device="cpu", rank=None, world=None):
    """Endless iterator of (x, y, i) from step `start` on, prefetched; a step is `pieces` items.

    x  float32 [m, 3, S, S] in [-1, 1], channels_last, on the device; m = batch / (world * pieces)
    y  int64 [m], labels, or None where data has none
    i  int64 [m], the pictures' numbers in data

    batch        the global batch, over all ranks and pieces; UserError where it cannot be cut evenly
    flip         mirror every other picture at random, anew at each visit (never where data.flip is false)
    crop         (views, size, (s0, s1), (r0, r1), filter): random crops of s0 to s1 of the area, r0 to r1 times as wide
                 as high, resized by the "bicubic" or "bilinear" filter; x is then [m, views, 3, size, size]. Pictures
                 loaded with size=None are decoded in full, by worker processes.
    rank, world  torch.distributed's, if not given
    """
    grouped = dist.is_available() and dist.is_initialized()
    rank = rank if rank is not None else dist.get_rank() if grouped else 0
    world = world if world is not None else dist.get_world_size() if grouped else 1
    cuts = world * pieces
    if batch < 1 or batch % cuts:
        nearest = max(1, round(batch / cuts)) * cuts
        raise UserError(f"batch {batch} does not divide by {world} ranks x {pieces} pieces: the nearest is {nearest}")
    if data.images is None and crop is None:
        raise UserError(f"{data.name} was loaded without a size: give one, or ask for crops")
    device = torch.device(device)
    cuda, views = device.type == "cuda", crop[0] if crop else 1

    def requests():
        """The pictures' numbers [m] of each piece, and their random numbers [m, views, k]."""
        for step in itertools.count(start):
            for piece in range(pieces):
                cut = rank, world, piece, pieces
                i = indices(len(data), batch, step, seed, *cut)
                u = [uniforms(batch, DRAWS if crop else 1, step, seed, VIEW + view, *cut) for view in range(views)]
                yield torch.from_numpy(i), torch.from_numpy(np.stack(u, 1))

    def gather(request):  # always into fresh memory, so that nothing is overwritten while it is being copied
        i, u = (part.pin_memory() if cuda else part for part in request)  # copied without waiting for the device
        shape = len(i), *images.shape[1:]
        out = torch.empty(shape, dtype=torch.uint8, device=images.device, pin_memory=cuda and not resident)
        return i, u, torch.index_select(images, 0, i.to(images.device, non_blocking=True), out=out)

    if data.images is None:
        source = torch.utils.data.DataLoader(
            FullSizeCrops(data.files, data.upright, crop),
            sampler=requests(),  # the random numbers travel with the request: no worker needs a seed
            batch_size=None,
            num_workers=cores(),
            pin_memory=cuda,
            multiprocessing_context="forkserver" if cuda else None,  # CUDA does not survive a fork
        )
    else:
        room = torch.cuda.get_device_properties(device).total_memory // 4 if cuda else RESIDENT
        resident = data.images.numel() <= room
        images = data.images.to(device) if resident else data.images
        source = map(gather, requests()) if resident else ahead(gather, requests(), threads=1, depth=3)
    return finish(source, data, flip and data.flip, crop, device)


def finish(source, data, flip, crop, device):
    """Turns (i [m], u [m, views, k], uint8 pictures) into batches on the device."""
    labels = None if data.labels is None else data.labels.to(device)
    for item in source:
        if isinstance(item, str):
            raise UserError(item)
        i, u, x = (part.to(device, non_blocking=True) for part in item)
        mirror = u[..., -1] < 0.5  # [m, views]
        if crop and data.images is not None:
            views, size, scale, ratio, filter = crop
            x = to_float(x).repeat_interleave(views, 0)  # [m * views, 3, S, S]
            box = crop_boxes(u.flatten(0, 1), *x.shape[2:], scale, ratio)
            x = resized_crop(x, box, size, filter, mirror.flatten() if flip else None).clamp_(-1, 1)
            x = x.contiguous(memory_format=torch.channels_last).unflatten(0, (-1, views))
        else:
            mirror = mirror[..., None, None, None] if crop else mirror[..., None, None]
            x = to_float(torch.where(mirror, x.flip(-2), x) if flip else x)
        yield x, None if labels is None else labels.index_select(0, i), i


def to_float(x):
    """uint8 [..., H, W, 3] -> float32 [..., 3, H, W] in [-1, 1], in the same order in memory: channels_last."""
    return x.movedim(-1, -3).float().div_(127.5).sub_(1)


class FullSizeCrops:
    """What a worker does: from the pictures' numbers [m] and random numbers [m, views, DRAWS] to their crops."""

    def __init__(self, files, upright, crop):
        self.files, self.upright, self.crop = files, upright, crop

    def __getitem__(self, request):
        _, size, scale, ratio, filter = self.crop
        crops = []
        for i, u in zip(*request, strict=True):
            path = os.fsdecode(self.files[i])
            boxes = lambda height, width, u=u: crop_boxes(u, height, width, scale, ratio).numpy()
            crops.append(cut(path, boxes, size, filter, self.upright, draft=True))
            if isinstance(crops[-1], str):
                return f"{path} is broken ({crops[-1]}): mend or remove it, or use --skip-broken"
        return *request, torch.from_numpy(np.stack(crops))  # uint8 [m, views, size, size, 3]


def crop_boxes(u, height, width, scale, ratio):
    """Random boxes (top, left, height, width), int64 [n, 4], from uniforms u [n, DRAWS], by torchvision's rule."""
    u = u.double()
    area = height * width * (scale[0] + u[:, :10] * (scale[1] - scale[0]))  # ten tries a picture
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** u[:, 10:20]
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first, none = fits.int().argmax(1, keepdim=True), ~fits.any(1)
    aspect = min(max(width / height, ratio[0]), ratio[1])  # where none fits: the largest centre crop of allowed aspect
    w = torch.where(none, min(width, round(height * aspect)), w.gather(1, first)[:, 0])
    h = torch.where(none, min(height, round(width / aspect)), h.gather(1, first)[:, 0])
    top = torch.where(none, (height - h) // 2, (u[:, 20] * (height - h + 1)).floor())
    left = torch.where(none, (width - w) // 2, (u[:, 21] * (width - w + 1)).floor())
    return torch.stack([top, left, h, w], 1).long()


def resized_crop(x, box, size, filter="bicubic", flip=None):
    """Crop each picture of a batch and resize it, antialiased: two small matrix products; torchvision's results.

    x [B, 3, H, W] float; box [B, 4]: top, left, height, width; filter "bicubic" or "bilinear"; flip [B] bool: mirrors
    the result. -> [B, 3, size, size], not clamped (the bicubic filter overshoots).
    """

    def matrix(start, length, n):
        """Weights [B, size, n] of n pixels in the outputs; each row sums to 1."""
        start, scale = start.float()[:, None, None], length.float()[:, None, None] / size
        pixel, out = (torch.arange(count, device=x.device) + 0.5 for count in (n, size))
        t = ((pixel - start - out[:, None] * scale) / scale.clamp(min=1)).abs()  # distance in the filter's units
        weight = (1 - t).clamp(min=0)
        if filter == "bicubic":  # Keys' kernel with a = -1/2
            near, far = (1.5 * t - 2.5) * t * t + 1, ((2.5 - 0.5 * t) * t - 4) * t + 2
            weight = torch.where(t < 1, near, torch.where(t < 2, far, 0))
        weight = weight * ((pixel > start) & (pixel < start + scale * size))
        return weight / weight.sum(-1, keepdim=True)

    rows, columns = matrix(box[:, 0], box[:, 2], x.shape[2]), matrix(box[:, 1], box[:, 3], x.shape[3])
    if flip is not None:
        columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    return rows[:, None] @ x @ columns[:, None].mT
