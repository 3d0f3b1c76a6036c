"""Images a second of the two feature networks of common.fid, and the seconds of one Fréchet distance.

python tests/benchmarks/fid.py [--device cuda]
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torchvision.models import inception_v3

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import fid


def rate(network, images, rounds):
    network(images)
    start = time.perf_counter()
    for _ in range(rounds):
        features, _ = network(images)
    features.sum().item()  # waits for a GPU
    return rounds * len(images) / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    random = fid.RandomFeatures(args.device)
    for size in (32, 64):
        images = torch.randint(0, 256, (100, 3, size, size), dtype=torch.uint8, device=args.device)
        print(f"random features, {size}x{size}: {rate(random, images, 10):,.0f} img/s", flush=True)
    weights = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False).state_dict()
    original, fid._load_weights = fid._load_weights, lambda path=None: weights  # random weights: the speed is the same
    inception = fid.Inception(device=args.device)
    fid._load_weights = original
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, device=args.device)
    print(f"inception, 32x32: {rate(inception, images, 2 if args.device == 'cpu' else 50):,.1f} img/s", flush=True)
    for dim in (496, 2048):
        a, b = fid.Stats(dim), fid.Stats(dim)
        a.update(torch.randn(3 * dim, dim)), b.update(torch.randn(3 * dim, dim) + 0.1)
        start = time.perf_counter()
        fid.frechet(a, b)
        print(f"Fréchet distance in {dim} dimensions: {time.perf_counter() - start:.2f} s", flush=True)


if __name__ == "__main__":
    main()
