"""Pairs of views a second: byol.py's batched augmentation beside torchvision's transforms in a DataLoader, in one run.

    python tests/benchmarks/augment.py [--data shapes] [--root data] [--preset small] [--device cpu]

The same operators, as likely, on the same pictures: crop, flip, jitter, greyscale, (blur at 224,) solarise, normalise.
torchvision works on Pillow's pictures, as in every recipe, in as many workers as there are cores; byol.py in two
threads. Who receives the views is one thread in both. Each figure is the best of three rounds after a warm-up.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import byol

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def rate(stream, batch, device, seconds=4.0):
    """Pairs of views a second that `stream` delivers."""
    best = 0.0
    for _ in range(3):
        next(stream)  # the first round's is the warm-up
        start, n = time.perf_counter(), 0
        while (spent := time.perf_counter() - start) < seconds:
            next(stream)
            n += batch
            if device == "cuda":
                torch.cuda.synchronize()
        best = max(best, n / spent)
    return best


def ours(args):
    """Normalised as byol.py's encoder does it first."""
    f = byol.Encoder(False, (), width=1, size=args.size)
    f.layers = torch.nn.Identity()
    for pair in byol.views(args, 0):
        yield [v.mul_(f.scale).add_(f.shift) for v in pair]


class Pairs(Dataset):
    """torchvision's two views of a picture."""

    def __init__(self, args):
        crop = {"scale": (args.crop_area, 1.0), "interpolation": transforms.InterpolationMode.BICUBIC}
        self.images, self.views = byol.read(args, "train").images.numpy(), []
        for p in args.views:
            steps = [transforms.RandomResizedCrop(args.size, **crop), transforms.RandomHorizontalFlip()]
            steps += [transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p["jitter"])]
            steps += [transforms.RandomGrayscale(p["grey"])]
            if p.get("blur"):
                blur = transforms.GaussianBlur(2 * (args.size // 20) + 1, (0.1, 2.0))
                steps += [transforms.RandomApply([blur], p["blur"])]
            if p.get("solarise"):
                steps += [transforms.RandomSolarize(128, p["solarise"])]
            steps += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
            self.views.append(transforms.Compose(steps))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        picture = Image.fromarray(self.images[i])
        return [view(picture) for view in self.views]


def theirs(args):
    loader = DataLoader(
        Pairs(args), args.batch, shuffle=True, drop_last=True, num_workers=os.cpu_count(), persistent_workers=True
    )
    while True:
        for pair in loader:
            yield [v.to(args.device, memory_format=torch.channels_last) for v in pair]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="shapes", help="pictures of one size, as for byol.py")
    parser.add_argument("--root", default="data", help="where they lie")
    parser.add_argument("--preset", default="small", choices=byol.PRESETS, help="whose views")
    parser.add_argument("--size", type=int, default=32, help="side of the pictures and the views")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    asked = parser.parse_args()
    flags = [word for name, value in vars(asked).items() for word in (f"--{name}", str(value))]
    with mock.patch.object(sys, "argv", ["byol.py", "--no-grey", *flags]):
        args = byol.parse()
    byol.start(args)
    torch.set_num_threads(1)
    args.whole = False
    found = {name: rate(make(args), args.batch, asked.device) for name, make in (("ours", ours), ("theirs", theirs))}
    for name, value in (("byol.py, batched", found["ours"]), ("torchvision, DataLoader", found["theirs"])):
        print(f"{args.preset}, {args.size}x{args.size}, {name:24s} {value:10,.0f} pairs of views a second")
    print(f"ratio {found['ours'] / found['theirs']:.1f}")


if __name__ == "__main__":
    main()
