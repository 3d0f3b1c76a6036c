"""Seconds of the linear probe to its optimum, beside a plain SGD loop that stops when it reaches the same accuracy.

    python tests/benchmarks/probe.py [--rows 50000] [--dim 2048] [--device cuda]

Synthetic features: ten classes, a spectrum that decays as real features' does. SGD: batches of 256, momentum 0.9, on
standardised features, with the best of three learning rates; it is given at most four times the probe's time for each.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import linear_probe

STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0)


def features(rows, dim, device, classes=10):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(rows) % classes
    scale = torch.arange(1, dim + 1) ** -0.5
    centres = 0.07 * torch.randn(classes, dim, generator=g)
    mixing = torch.linalg.qr(torch.randn(dim, dim, generator=g))[0]
    x = (centres[y] + torch.randn(rows, dim, generator=g)) * scale @ mixing
    return x.to(device), y.to(device)


def sgd(train, test, target, limit, rate):
    """Seconds until test accuracy reaches target (None: not within limit)."""
    mean, std = train[0].mean(0), train[0].std(0)
    x, test_x = (train[0] - mean) / std, (test[0] - mean) / std
    layer = torch.nn.Linear(x.shape[1], 10, device=x.device)
    optimiser = torch.optim.SGD(layer.parameters(), rate, momentum=0.9)
    start = time.perf_counter()
    while True:
        for rows in torch.randperm(len(x), device=x.device).split(256):
            optimiser.zero_grad()
            F.cross_entropy(layer(x[rows]), train[1][rows]).backward()
            optimiser.step()
        accuracy = (layer(test_x).argmax(1) == test[1]).double().mean().item()
        if accuracy >= target:
            return time.perf_counter() - start
        if time.perf_counter() - start > limit:
            return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    x, y = features(args.rows + 10_000, args.dim, args.device)
    train, test = (x[: args.rows], y[: args.rows]), (x[args.rows :], y[args.rows :])
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    result = linear_probe.probe(train, test, l2=STRENGTHS)
    seconds = time.perf_counter() - start
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    print(
        f"probe, {args.rows:,} x {args.dim:,}, 6 strengths: {seconds:.1f} s, {extra:.1f} GiB more memory, {result}",
        flush=True,
    )
    times = {rate: sgd(train, test, result["top1"], 4 * seconds, rate) for rate in (0.001, 0.01, 0.1)}
    told = ", ".join(f"rate {r}: {f'{t:.1f} s' if t else 'not reached'}" for r, t in times.items())
    print(f"SGD to the same accuracy: {told}")


if __name__ == "__main__":
    main()
