"""Images a second of common.data beside torchvision's pipeline with as many workers, measured in one run.

    python tests/benchmarks/loader.py --folder DIR                 # DIR/train/CLASS/*.jpg, at 128x128
    python tests/benchmarks/loader.py --mnist ROOT                 # ROOT/MNIST/raw, 32x32 from memory
    python tests/benchmarks/loader.py --folder DIR --full          # random resized crops from whole files, 224x224

Each figure is the best of three rounds after a warm-up; the last column is the ratio.
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.data import batches, load

WORKERS = os.cpu_count()


def rate(stream, batch, seconds=4.0):
    """Images a second that `stream` delivers, the best of three rounds."""
    for _ in itertools.islice(stream, 3):
        pass
    best = 0.0
    for _ in range(3):
        start, n = time.perf_counter(), 0
        while (spent := time.perf_counter() - start) < seconds:
            next(stream)
            n += batch
        best = max(best, n / spent)
    return best


def forever(loader):
    while True:
        yield from loader


def torchvision_loader(dataset, batch):
    return forever(
        DataLoader(dataset, batch, shuffle=True, num_workers=WORKERS, drop_last=True, persistent_workers=True)
    )


def report(name, ours, theirs):
    print(f"{name:42s} {ours:12,.0f} img/s   torchvision {theirs:10,.0f} img/s   {ours / theirs:6.1f} x", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder of pictures with train/CLASS/")
    parser.add_argument("--mnist", type=Path, help="folder that holds MNIST/raw")
    parser.add_argument("--full", action="store_true", help="also random resized crops from whole files")
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as cache:
        if args.mnist:
            (Path(cache) / "MNIST").symlink_to((args.mnist / "MNIST").resolve())
            ours = batches(load("mnist", "train", 32, cache), args.batch, seed=0)
            pad = transforms.Compose([transforms.Pad(2), transforms.Grayscale(3), transforms.ToTensor()])
            theirs = torchvision_loader(datasets.MNIST(cache, train=True, transform=pad), args.batch)
            report("mnist, 32x32, from memory", rate(ours, args.batch), rate(theirs, args.batch))
        if args.folder:
            center = [transforms.Resize(128), transforms.CenterCrop(128), transforms.RandomHorizontalFlip()]
            theirs = datasets.ImageFolder(args.folder / "train", transforms.Compose([*center, transforms.ToTensor()]))
            ours = batches(load(str(args.folder), "train", 128, cache), args.batch, seed=0)
            report(
                "folder, 128x128, cached",
                rate(ours, args.batch),
                rate(torchvision_loader(theirs, args.batch), args.batch),
            )
        if args.folder and args.full:
            crop = transforms.RandomResizedCrop(224, interpolation=transforms.InterpolationMode.BICUBIC)
            augment = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor()])
            theirs = datasets.ImageFolder(args.folder / "train", augment)
            whole = load(str(args.folder), "train", None, cache)
            ours = batches(whole, args.batch, seed=0, crop=(1, 224, (0.08, 1.0), (3 / 4, 4 / 3), "bicubic"))
            report(
                "folder, 224x224 crops from whole files",
                rate(ours, args.batch),
                rate(torchvision_loader(theirs, args.batch), args.batch),
            )


if __name__ == "__main__":
    main()
