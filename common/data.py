"""Data sets as uint8 pictures, and batches that are a pure function of (seed, step, rank, world).

    train = load("cifar10", "train", size=32, root="data")
    for x, y, i in batches(train, batch=64, seed=0, device="cuda"):  # endless; x [64, 3, 32, 32] in [-1, 1]

Whatever is random comes from generators keyed by (seed, purpose, step), drawn for the global batch, then sliced:
resuming is exact, and 2 processes see what 2 accumulated pieces see.
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
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision import datasets

NAMES = ("shapes", "dsprites", "mnist", "fashion_mnist", "cifar10", "cifar100", "stl10", "celeba", "imagenet")
PUBLISHED = {  # torchvision's classes, and what they read under root
    "mnist": (datasets.MNIST, "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte"),
    "fashion_mnist": (datasets.FashionMNIST, "FashionMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte"),
    "cifar10": (datasets.CIFAR10, "cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta}"),
    "cifar100": (datasets.CIFAR100, "cifar-100-python/{train,test,meta}"),
    "stl10": (datasets.STL10, "stl10_binary/{train,test,unlabeled}_X.bin and {train,test}_y.bin"),
}
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
HIDDEN = (".", "__MACOSX")  # files and folders whose names begin so are skipped
FORMAT = 2  # of the cache: to be counted up whenever the same source would give other pictures
RESIDENT = 2 * 10**9  # bytes; larger sets stay memory-mapped (on CUDA: a quarter of the memory)
THREADS = max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # shared with torchrun's other processes
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
    factors: torch.Tensor | None = None  # [N, F], how each picture was made
    files: np.ndarray | None = None  # str [N], the paths of pictures that have files of their own
    flip: bool = True  # whether a mirrored picture belongs to the data set: digits do not

    def __len__(self):
        return len(self.files if self.images is None else self.images)

    def require_labels(self):
        """The labels, int64 [N]; UserError where pictures have none."""
        if self.labels is None or self.labels.min() < 0:
            raise UserError(f"{self.name} ({self.split}) has no labels: give a folder with a sub-folder a class")
        return self.labels


def load(name, split="train", size=32, root="data", skip_broken=False, rows=slice(None)):
    """Read one of NAMES, or a folder of pictures, as uint8 pictures [N, size, size, 3]; UserError where it cannot.

    size         in pixels: the largest centre square (celeba: 148 x 148), by Pillow's antialiased bicubic filter.
                 None: as published, or, of pictures in files, only their paths, for batches(crop=...)
    root         folder of the published files, in torchvision's layouts; root/cache is filled as needed
    skip_broken  leave out the files that cannot be decoded, saying how many, instead of refusing the set
    rows         slice(1000): a thousand pictures from all over the set, the same whenever asked; slice(1000, None): the
                 rest. A slice that covers the whole set leaves it in its published order.
    """
    root, drawn = Path(root), {"shapes": load_shapes, "dsprites": load_dsprites}
    if split not in ("train", "test"):
        raise UserError(f"there is no split {split!r}: choose train or test")
    if size is not None and size < 1:
        raise UserError(f"size {size} is not possible: give the pictures' side in pixels, 1 or more")
    try:
        if name not in drawn and name not in PUBLISHED:
            return load_files(name, split, size, root, skip_broken, rows)
        whole = drawn.get(name, load_published)(name, split, size, root)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {name}, or write to {root}/cache ({error}): mend it or change --root") from error
    chosen = permutation(len(whole), 0)[rows]
    if len(chosen) == len(whole):
        return whole
    if not len(chosen):
        raise UserError(f"{rows} picks none of the {len(whole)} pictures of {name}")
    factors = None if whole.factors is None else whole.factors[chosen]
    kept = {"images": whole.images[chosen], "labels": whole.labels[chosen], "factors": factors}
    return replace(whole, **kept, key=digest(whole.key, chosen.tolist()))


def load_published(name, split, size, root):
    reader, needed = PUBLISHED[name]
    part = {"split": split} if name == "stl10" else {"train": split == "train"}
    try:
        try:
            source = reader(root, download=False, **part)
        except Exception:  # not there, or damaged: each class has its own way of saying so
            root.mkdir(parents=True, exist_ok=True)
            with open(root / f"{name}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # one process downloads, the others wait
                source = reader(root, download=True, **part)
    except Exception as error:
        why = " ".join(str(error).split())
        raise UserError(f"cannot read or download {name} ({why}): put {needed} into {root}/") from error
    images = torch.as_tensor(source.data)
    key = digest(FORMAT, name, split, size, hashlib.sha256(np.ascontiguousarray(images)).digest())
    if name.endswith("mnist"):
        images = F.pad(images, (2, 2, 2, 2))[:, None].expand(-1, 3, -1, -1)  # padded: strokes stay exact
    elif name != "stl10":
        images = images.permute(0, 3, 1, 2)
    size = size or images.shape[2]
    images = resize(images, (size, size)).permute(0, 2, 3, 1).contiguous()
    labels = torch.as_tensor(source.labels if name == "stl10" else source.targets).long()
    return Data(name, split, size, images, key, root / "cache", labels, list(source.classes), flip=name != "mnist")


def load_files(name, split, size, root, skip_broken, rows):
    place, files, labels, classes = find_pictures(name, split, root, rows)
    timed = files if len(files) <= 200_000 else []  # asking for more takes minutes on a network disk
    stamps = [(status.st_size, status.st_mtime_ns) for status in (os.stat(place / file) for file in timed)]
    key = digest(FORMAT, name if name in NAMES else "folder", str(place.resolve()), size, files, stamps)
    images, broken, side = None, {}, size or 8

    def centre(height, width):
        square = min(height, width, 148 if name == "celeba" else height)
        return np.array([[(height - square) // 2, (width - square) // 2, square, square]])

    if size or skip_broken:  # without a size: packed tiny, only to learn which files are broken
        read = lambda file: cut(place / file, centre, side, "bicubic", turn=name not in NAMES)
        images, broken = pack(f"{name} {split}", root / "cache" / f"{key}.u8", (side, side, 3), len(files), read, files)
    if broken and not skip_broken:
        named = ", ".join(f"{files[row]}: {why}" for row, why in list(broken.items())[:3])
        raise UserError(f"{len(broken)} broken pictures in {place} ({named}, ...): mend them, or pass --skip-broken")
    if broken and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{name} {split}: left out {len(broken)} broken pictures of {len(files)}", file=sys.stderr)
    kept = [row for row in range(len(files)) if row not in broken]
    paths = np.array([f"{place}/{files[row]}" for row in kept], dtype=object)
    labels = labels if labels is None else labels[kept]
    return Data(name, split, size, images if size else None, key, root / "cache", labels, classes, files=paths)


def find_pictures(name, split, root, rows):
    """A split's folder, the paths in it of the chosen pictures, the same on every machine, labels, and classes."""
    imagenet = root / "imagenet" if (root / "imagenet").is_dir() else root
    folder = Path({"celeba": root / "celeba/img_align_celeba", "imagenet": imagenet}.get(name, name))
    train = folder / "train" if (folder / "train").is_dir() else folder
    if not folder.is_dir() or (name == "imagenet" and train == folder):
        known = f"{', '.join(NAMES)}, or a folder (--root holds celeba/img_align_celeba/ and imagenet/train/WNID/)"
        raise UserError(f"{name} is not there: {folder} is no folder of pictures; choose one of {known}")
    tests = [folder / part for part in ("val", "valid", "test") if train != folder and (folder / part).is_dir()]
    place = tests[0] if tests and split == "test" else train
    folders = sorted(entry.name for entry in os.scandir(train) if entry.is_dir() and not entry.name.startswith(HIDDEN))
    files = [os.path.join(below, name) for below, _, names in os.walk(place, followlinks=True) for name in names]
    files = sorted(file.removeprefix(f"{place}/") for file in files if file.lower().endswith(SUFFIXES))
    files = [file for file in files if not any(part.startswith(HIDDEN) for part in file.split("/"))]
    labels = classes = None
    if len(folders) > 1 and files and all("/" in file for file in files):
        owners = [file.split("/")[0] for file in files]
        if odd := set(owners) ^ set(folders) if place == train else set(owners) - set(folders):
            raise UserError(f"{place / min(odd)} holds no picture, or is not a class of {train}: remove that folder")
        labels, classes = torch.from_numpy(np.searchsorted(folders, owners)), folders
    mine, partition = range(len(files)), folder.parent / "list_eval_partition.txt"
    if name == "celeba" and partition.exists():
        part = dict(line.split() for line in partition.read_text().splitlines())
        mine = [row for row in mine if part[files[row]] == ("2" if split == "test" else "0")]
    elif not tests:  # a hash of the names holds out a tenth
        order, tenth = sorted(mine, key=lambda row: digest(files[row])), math.ceil(len(files) / 10)
        mine = sorted(order[:tenth] if split == "test" else order[tenth:])
    chosen = permutation(len(mine), 0)[rows]
    if not len(chosen):
        raise UserError(f"{place} holds no pictures for a {split} split, or this part: looked for {' '.join(SUFFIXES)}")
    mine = [mine[row] for row in chosen] if len(chosen) < len(mine) else list(mine)
    return place, [files[row] for row in mine], labels if labels is None else labels[mine], classes


def cut(path, boxes, size, filter, turn, draft=False):
    """Parts of a picture file, resized: uint8 [views, size, size, 3]; or, as a str, why it cannot be read.

    boxes maps (height, width) to the parts (top, left, height, width), [views, 4]; turn obeys the EXIF tag; draft lets
    libjpeg decode at 1/2, 1/4 or 1/8, if that leaves twice the final size to the filter.
    """
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            if turn and picture.getexif().get(0x0112, 1) > 4:  # the orientation tag: turned by 90 degrees
                width, height = height, width
            boxes = boxes(height, width)
            shrink = 2 * size / boxes[:, 2:].min()
            if draft and shrink < 1:
                picture.draft("RGB", tuple(math.ceil(side * shrink) for side in picture.size))
            picture = ImageOps.exif_transpose(picture) if turn else picture
            if picture.mode.startswith("I"):  # 16-bit grey: convert() would turn all above 255 white
                picture = Image.fromarray((np.asarray(picture) / 257).clip(0, 255).round().astype(np.uint8))
            if picture.has_transparency_data:  # laid on white: convert() would show the colours under it
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            picture = picture.convert("RGB")
        parts = []
        for top, left, h, w in boxes * ([picture.height / height, picture.width / width] * 2):
            box = left, top, min(left + w, picture.width), min(top + h, picture.height)
            parts.append(np.asarray(picture.resize((size, size), Image.Resampling[filter.upper()], box=box)))
        return np.stack(parts)
    except Exception as error:  # a broken file makes Pillow raise nearly anything
        return str(error) or type(error).__name__


def pack(title, path, shape, count, work, items):
    """uint8 [N, *shape], memory-mapped from a cache file, and which items are broken: {number: why}.

    Where there is no whole cache it is written, in parallel, and named when it is done, so that a kill leaves no half
    one: work(item) -> uint8 [m, *shape], or a str that says why not; `count` rows in all.
    """

    def cached():
        broken = dict(json.loads(Path(f"{path}.json").read_text()))
        pixels = np.memmap(path, np.uint8, "c").reshape(count - len(broken), *shape)  # ValueError: it was cut short
        return torch.from_numpy(pixels), broken

    with suppress(FileNotFoundError, ValueError):
        return cached()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, broken, told = Path(f"{path}.tmp"), [], time.monotonic()
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes wait; the system frees it when its holder dies
        with suppress(FileNotFoundError, ValueError):
            return cached()
        need, free = count * math.prod(shape) / 1e9, shutil.disk_usage(path.parent).free / 1e9
        if need > free:
            raise UserError(f"packing {title} takes {need:.1f} GB, {path.parent} has {free:.1f}: choose another --root")
        try:
            with open(temporary, "wb") as pixels:
                for number, rows in enumerate(ahead(work, items, THREADS)):
                    if isinstance(rows, str):
                        broken.append((number, rows))
                    else:
                        pixels.write(np.ascontiguousarray(rows))
                    done = pixels.tell() // math.prod(shape) + len(broken)
                    if time.monotonic() - told > 10 or done == count:
                        told, end = time.monotonic(), "\r" if sys.stderr.isatty() and done < count else "\n"
                        print(f"packing {title}: {done:,} of {count:,}", end=end, file=sys.stderr)
                if len(broken) == count:
                    raise UserError(f"{title}: none of {count} pictures can be read ({broken[0][1]})")
                pixels.flush()
                os.fsync(pixels.fileno())
            Path(f"{path}.json").write_text(json.dumps(broken))
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)
        return cached()


def ahead(work, items, threads):
    """map(work, items), done by threads that are a few results ahead of the reader. None cuts its tensors in turn."""
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pending = []
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > 3 * threads:
                yield pending.pop(0).result()
        yield from (task.result() for task in pending)


def digest(*values):
    return hashlib.sha256(repr(values).encode("utf-8", "surrogateescape")).hexdigest()[:16]


resize = partial(F.interpolate, mode="bicubic", antialias=True)  # of uint8: within one level of Pillow's result

# shapes: one light and one dark colour a picture; which of the two is the ground is a coin's toss, so that neither a
# colour nor a pixel's brightness tells the class. Shapes are signed distances, negative inside, with y upwards.
COLOURS = [[225, 200, 90], [120, 205, 225], [225, 165, 190], [110, 35, 55], [35, 45, 115], [30, 85, 60]]  # 3 and 3
union, overlap = torch.minimum, torch.maximum
circle = lambda x, y, radius: (x * x + y * y).sqrt() - radius
box = lambda x, y, width, height: overlap(x.abs() - width, y.abs() - height)


def edge_lines(x, y, corners):
    """Sorted distances to a polygon's edge lines: the largest is negative inside, the second in the star around it."""
    angles = (np.arange(corners) + 0.5) * 2 * np.pi / corners
    return torch.stack([x * np.sin(a) + y * np.cos(a) - np.cos(np.pi / corners) for a in angles]).sort(0).values


SHAPES = {  # each is its own mirror image, so that flipping a picture does not leave the data set
    "circle": lambda x, y: circle(x, y, 0.9),
    "square": lambda x, y: box(x, y, 0.76, 0.76),
    "triangle": lambda x, y: edge_lines(x / 1.15, (y + 0.15) / 1.15, 3)[-1] * 1.15,
    "pentagon": lambda x, y: edge_lines(x, y, 5)[-1],
    "star": lambda x, y: edge_lines(x / 0.4, y / 0.4, 5)[-2] * 0.4,
    "heart": lambda x, y: union((x.abs() + y.abs()) * 0.707 - 0.55, circle(x.abs() - 0.39, y - 0.39, 0.55)),
    "cross": lambda x, y: union(box(x, y, 0.3, 0.9), box(x, y, 0.9, 0.3)),
    "ring": lambda x, y: circle(x, y, 0.7).abs() - 0.22,
    "crescent": lambda x, y: overlap(circle(x, y, 0.95), -circle(x, y - 0.45, 0.72)),
    "arrow": lambda x, y: union(overlap(0.75 * x.abs() + 0.66 * y - 0.66, -y), box(x, y + 0.4, 0.28, 0.5)),
}


def render_shapes(labels, factors, size):
    """Anti-aliased pictures uint8 [N, size, size, 3]; `size` changes only the resolution."""
    front, back = (torch.tensor(COLOURS)[colour.long()][:, None, None] for colour in factors.T[:2])  # [N, 1, 1, 3]
    gradient, scale, rotation, right, up = factors.T[2:, :, None, None]  # [N, 1, 1]
    x = (torch.arange(size) + 0.5) * 2 / size - 1  # [S], pixel centres
    y = -x[:, None]  # [S, 1]
    ground = back + (20 * gradient.cos() * x + 20 * gradient.sin() * y)[..., None]
    u, v = (x - right) / scale, (y - up) / scale
    u, v = rotation.cos() * u + rotation.sin() * v, rotation.cos() * v - rotation.sin() * u
    pixels = torch.empty_like(u)
    for label, distance in enumerate(SHAPES.values()):
        rows = labels == label
        pixels[rows] = distance(u[rows], v[rows])
    cover = (0.5 - pixels * scale * size / 2).clamp(0, 1)[..., None]  # anti-aliasing: the share that is inside
    return (ground + cover * (front - ground)).round().byte()


def load_shapes(name, split, size, root):
    """Ten balanced classes; the same pictures on every machine."""
    count, size = {"train": 50_000, "test": 10_000}[split], size or 32
    random = np.random.RandomState([0, split == "test"])  # the generator whose stream NumPy promises to keep
    labels = random.permutation(count) % len(SHAPES)
    dark = 3 * random.randint(2, size=count)
    front, back = random.randint(3, size=count) + dark, random.randint(3, size=count) + 3 - dark
    gradient, rotation = random.uniform(-np.pi, np.pi, count), random.uniform(-np.pi / 9, np.pi / 9, count)
    scale, (right, up) = random.uniform(0.5, 0.85, count), random.uniform(-0.2, 0.2, (2, count))
    factors = np.stack([front, back, gradient, scale, rotation, right, up], axis=1).astype(np.float32)
    labels, factors = torch.from_numpy(labels), torch.from_numpy(factors)
    render = lambda rows: render_shapes(labels[rows], factors[rows], size).numpy()
    key = digest(name, split, size, factors.numpy().tobytes(), render(slice(50)).tobytes())
    blocks = torch.arange(count).split(max(1, 2**18 // size**2))
    images, _ = pack(f"{name} {split}", root / "cache" / f"{key}.u8", (size, size, 3), count, render, blocks)
    return Data(name, split, size, images, key, root / "cache", labels, list(SHAPES), factors)


DSPRITES = (1, 3, 6, 40, 32, 32)  # colours, shapes, scales, orientations, x, y: the order of the published pictures
# The heart's outline, right of the middle, above and below its widest point: u and v in pixels.
HEART_TOP = [0, 0.6, 1.4, 2.3, 4.4, 5.4, 7.2, 8.7, 9.7], [5, 6.7, 7.9, 8.6, 9.4, 9.3, 8.6, 7.3, 4.5]
HEART_TIP = [0, 0.7, 2.2, 3.9, 6.2, 7.7, 9.1, 9.4, 9.7], [-9.6, -8, -6.1, -4.6, -2.2, -0.7, 1.6, 2.5, 4.5]


def draw_dsprites(rows):
    """The pictures of those rows of the published file, a few pixels off: uint8 [n, 64, 64] of 0 and 1."""
    _, shape, scale, orientation, x, y = np.stack(np.unravel_index(rows, DSPRITES))[..., None, None]  # each [n, 1, 1]
    scale, angle = 0.5 + scale / 10, 2 * np.pi * (orientation % 39) / 39  # both 0 and 2 pi are among the angles
    pixel = np.arange(64) + 0.5
    right, up = (pixel - 16 - 32 * x / 31) / scale, (16 + 32 * y / 31 - pixel[:, None]) / scale
    u, v = np.abs(np.cos(angle) * right + np.sin(angle) * up), np.cos(angle) * up - np.sin(angle) * right
    inside = np.where(shape == 0, np.maximum(u, np.abs(v)) <= 9.6, (u / 12.8) ** 2 + (v / 7.2) ** 2 <= 1)
    heart = (u <= 9.7) & (np.interp(u, *HEART_TIP) <= v) & (v <= np.interp(u, *HEART_TOP))
    return np.where(shape == 2, heart, inside).astype(np.uint8)


def load_dsprites(name, split, size, root):
    """All 737,280 pictures, whatever the split: from the published file where it is there, else drawn."""
    source, count, size = root / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz", math.prod(DSPRITES), size or 64
    published = source.exists()
    key = digest(FORMAT, name, size, source.stat().st_mtime_ns if published else (HEART_TOP, HEART_TIP))

    def blocks():  # [512, 64, 64]
        with zipfile.ZipFile(source) as file:
            yield from np.load(file.open("imgs.npy")).reshape(-1, 512, 64, 64)

    def work(block):
        pictures = torch.from_numpy(block if published else draw_dsprites(block))
        return resize(255 * pictures[:, None], (size, size)).numpy()

    items = blocks() if published else np.arange(count).reshape(-1, 512)
    images, _ = pack(name, root / "cache" / f"{key}.u8", (size, size, 1), count, work, items)
    factors = torch.from_numpy(np.stack(np.unravel_index(np.arange(count), DSPRITES), 1))
    known = {"labels": factors[:, 1], "classes": ["square", "ellipse", "heart"], "factors": factors, "flip": False}
    return Data(name, split, size, images.expand(-1, -1, -1, 3), key, root / "cache", **known)


permutation = lru_cache(maxsize=4)(lambda n, *key: np.random.default_rng(key).permutation(n))


def indices(n, batch, step, seed, rank=0, world=1, piece=0, pieces=1):
    """Which of n pictures a rank sees in one piece of a step: int64 [batch / (world * pieces)]."""
    # The global batches, joined, are one permutation after the other; each is cut into slices, those of piece 0 first.
    m = batch // (world * pieces)
    first = step * batch + (piece * world + rank) * m
    epochs = range(first // n, (first + m - 1) // n + 1)
    return np.concatenate([permutation(n, seed, 0x5EED, e)[max(0, first - e * n) : first + m - e * n] for e in epochs])


def uniforms(batch, k, step, seed, stream, rank=0, world=1, piece=0, pieces=1):
    """k numbers in [0, 1) for each picture of a rank's piece, float32 [m, k]; `stream` is one number a purpose."""
    table = np.random.default_rng([seed, stream, step]).random((batch, k), dtype=np.float32)
    return np.split(table, world * pieces)[piece * world + rank]


def generator(seed, stream, step, device="cpu"):
    """A fresh torch.Generator for noise. Draw for the global batch, then slice; CUDA draws differ from the CPU's."""
    hashed = hashlib.sha256(np.array([seed, stream, step], "<i8")).digest()  # a sum would make seeds overlap
    key = int.from_bytes(hashed[:8], "little") & (2**63 - 1)
    return torch.Generator(device).manual_seed(key)


def batches(data, batch, seed, start=0, pieces=1, flip=True, crop=None, device="cpu", rank=None, world=None):
    """Endless iterator of (x, y, i) from step `start` on, prefetched; a step is `pieces` items.

    x     float32 [m, 3, S, S] in [-1, 1], channels_last, on the device; m = batch / (world * pieces)
    y, i  int64 [m]: labels, or None where data has none, and the pictures' numbers in data
    flip  mirror every other picture at random, anew at each visit (never where data.flip is false)
    crop  (views, size, (s0, s1), (r0, r1), filter): random crops of s0 to s1 of the area, r0 to r1 times as wide as
          high, resized by the "bicubic" or "bilinear" filter; x is then [m, views, 3, size, size], in any layout
    rank, world: torch.distributed's, if not given. UserError where the global batch cannot be cut evenly.
    """
    group = torch.distributed if torch.distributed.is_available() and torch.distributed.is_initialized() else None
    rank = rank if rank is not None else group.get_rank() if group else 0
    world = world if world is not None else group.get_world_size() if group else 1
    cuts = world * pieces
    if batch < 1 or batch % cuts:
        nearest = max(1, round(batch / cuts)) * cuts
        raise UserError(f"batch {batch} does not divide by {world} ranks x {pieces} pieces: the nearest is {nearest}")
    if data.images is None and crop is None:
        raise UserError(f"{data.name} was loaded without a size: give one, or ask for crops")
    views, side, scale, ratio, filter = crop or (1, None, None, None, None)
    device, flips = torch.device(device), flip and data.flip
    cuda, images, labels = device.type == "cuda", data.images, None if data.labels is None else data.labels.to(device)
    room = torch.cuda.get_device_properties(device).total_memory // 4 if cuda else RESIDENT
    resident = images is not None and images.numel() <= room
    images = images.to(device) if resident else images
    pin = lambda part: part.pin_memory() if cuda and not part.is_cuda else part  # to be copied without waiting

    def decode(request):
        path, u = request
        boxes = lambda height, width: crop_boxes(u, height, width, scale, ratio).numpy()
        crops = cut(path, boxes, side, filter, turn=data.name not in NAMES, draft=True)
        if isinstance(crops, str):
            raise UserError(f"{path} is broken ({crops}): mend or remove it, or use --skip-broken")
        return crops

    def fetch(number):
        """One piece: the pictures' numbers [m], random numbers [m, views, k], and the uint8 pictures or crops."""
        step, share = number // pieces, (rank, world, number % pieces, pieces)
        i = pin(torch.from_numpy(indices(len(data), batch, step, seed, *share)))
        u = [uniforms(batch, DRAWS if crop else 1, step, seed, VIEW + view, *share) for view in range(views)]
        u = pin(torch.from_numpy(np.stack(u, 1)))
        if images is not None:
            return i, u, pin(images.index_select(0, i.to(images.device, non_blocking=True)))
        crops = list(ahead(decode, zip(data.files[i.numpy()], u, strict=True), THREADS))
        return i, u, pin(torch.from_numpy(np.stack(crops)))

    def stream():
        numbers = itertools.count(start * pieces)
        for item in map(fetch, numbers) if resident else ahead(fetch, numbers, 1):
            i, u, x = (part.to(device, non_blocking=True) for part in item)
            mirror = (u[..., -1] < 0.5) & flips  # [m, views]
            if crop and images is not None:
                x = x.transpose(-1, -2).contiguous().float().div_(127.5).sub_(1).transpose(1, 2)  # [m, 3, S, S]
                boxes = (crop_boxes(u[:, view], *x.shape[2:], scale, ratio) for view in range(views))
                crops = (resized_crop(x, box, side, filter, mirror[:, view]) for view, box in enumerate(boxes))
                x = torch.stack([*crops]).clamp_(-1, 1).transpose(0, 1)
            else:
                x = torch.where(mirror.reshape(*x.shape[:-3], 1, 1, 1), x.flip(-2), x) if flips else x
                x = x.movedim(-1, -3).float().div_(127.5).sub_(1)  # the same order in memory: channels_last
            yield x, None if labels is None else labels.index_select(0, i), i

    return stream()


def crop_boxes(u, height, width, scale, ratio):
    """Random boxes (top, left, height, width), int64 [n, 4], from uniforms u [n, DRAWS], by torchvision's rule."""
    u = u.double()
    area = height * width * (scale[0] + u[:, :10] * (scale[1] - scale[0]))  # ten tries a picture
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** u[:, 10:20]
    limit = min(max(width / height, ratio[0]), ratio[1])  # the last try: the largest centre crop of allowed aspect
    w = F.pad((area * aspect).sqrt().round(), (0, 1), value=min(width, round(height * limit)))
    h = F.pad((area / aspect).sqrt().round(), (0, 1), value=min(height, round(width / limit)))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)
    w, h, last = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0], first[:, 0] == 10
    top = torch.where(last, (height - h) // 2, (u[:, 20] * (height - h + 1)).floor())
    left = torch.where(last, (width - w) // 2, (u[:, 21] * (width - w + 1)).floor())
    return torch.stack([top, left, h, w], 1).long()


def resized_crop(x, box, size, filter="bicubic", flip=None):
    """Crop and resize a batch x [B, 3, H, W], antialiased: two small matrix products; torchvision's results.

    box [B, 4]: top, left, height, width; flip [B] bool: mirror the result, [B, 3, size, size], which is not clamped.
    """

    def matrix(start, length, n, flip=None):
        """Weights [B, n, size] of n pixels in the outputs: rows of a table, for a box's pixels know only its length."""
        lengths = torch.arange(1, n + 1, device=x.device)[:, None, None]
        pixel, out = torch.arange(n + 1, device=x.device)[:, None], torch.arange(size, device=x.device) + 0.5
        t = (pixel + 0.5 - out * lengths / size).div_((lengths / size).clamp(min=1)).abs_()  # in the filter's units
        weight = (1 - t).clamp(min=0)
        if filter == "bicubic":  # Keys' kernel with a = -1/2: one cubic to 2, another on top of it to 1
            far = (2 - t).clamp(min=0)
            weight = weight * weight * (1 - 2 * weight) + far * far * (far - 1) / 2
        weight = weight * (pixel < lengths)  # [n, n + 1, size]: nothing from outside the box, as in row n
        weight = weight / weight.sum(1, keepdim=True)
        place = torch.arange(n, device=x.device) - start[:, None]  # [B, n]
        place = place.masked_fill_((place < 0) | (place >= length[:, None]), n) + (n + 1) * (length[:, None] - 1)
        if flip is not None:
            weight = torch.cat([weight, weight.flip(2)])
            place += n * (n + 1) * flip[:, None]
        return weight.flatten(0, 1).index_select(0, place.flatten()).unflatten(0, (-1, n))

    rows, columns = matrix(box[:, 0], box[:, 2], x.shape[2]), matrix(box[:, 1], box[:, 3], x.shape[3], flip)
    x = x.transpose(1, 2).flatten(1, 2) @ columns  # [B, H * 3, size]: the channels share a product
    return (rows.mT @ x.reshape(len(x), -1, 3 * size)).unflatten(2, (3, size)).transpose(1, 2)
