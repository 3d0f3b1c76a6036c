"""How many of 100 reconstructions G(E(x)) of test shapes keep what x shows, in the eyes of a small classifier.

    python tests/benchmarks/reconstructions.py runs/bigbigan-shapes [--root data] [--seconds 90]

The classifier is trained on real shapes first, to tell the shape, its colour and the ground's colour; its accuracy on
real test pictures is printed beside the counts, and so is what chance would give: the counts for another x's G(E(x)).
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import bigbigan
from common.data import batches, load

HEADS = (10, 6, 6)  # shapes, colours of the shape, colours of the ground


def answers(data, rows):
    return torch.stack([data.labels[rows], *data.factors[rows, :2].long().T])


def classifier(data, seconds):
    """A residual network trained on data for so many seconds: x [B, 3, 32, 32] -> guesses [3, B]."""
    torch.manual_seed(0)
    trunk = bigbigan.Encoder("resnet10", data.size, mlp_width=8, z_dim=8).trunk
    net = nn.Sequential(trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(sum(HEADS)))
    net(torch.zeros(2, 3, data.size, data.size))  # makes the last layer
    net = net.to(memory_format=torch.channels_last)
    optimiser, start = torch.optim.AdamW(net.parameters(), 2e-3), time.monotonic()
    for x, _, rows in batches(data, 64, seed=0):
        if (spent := (time.monotonic() - start) / seconds) >= 1:
            break
        optimiser.param_groups[0]["lr"] = 2e-3 * (1 - spent)
        logits, wanted = net(x).split(HEADS, dim=1), answers(data, rows)
        optimiser.zero_grad()
        sum(F.cross_entropy(part, y) for part, y in zip(logits, wanted, strict=True)).backward()
        optimiser.step()
    net.eval()
    return lambda x: torch.stack([part.argmax(1) for part in net(x).split(HEADS, dim=1)])


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a finished run of bigbigan.py on shapes")
    parser.add_argument("--root", default="data", help="as the script's")
    parser.add_argument("--seconds", type=float, default=90, help="for the classifier")
    asked = parser.parse_args()
    sys.argv = ["bigbigan.py", "--out", asked.run, "--root", asked.root, "--device", "cpu"]
    args = bigbigan.parse()
    bigbigan.start(args)
    with torch.enable_grad():
        guess = classifier(load("shapes", "train", args.size, asked.root), asked.seconds)
    test = load("shapes", "test", args.size, asked.root)
    x = test.images[:2000].permute(0, 3, 1, 2).float() / 127.5 - 1
    wanted = answers(test, slice(2000))
    right = [f"{share:.3f}" for share in (guess(x) == wanted).double().mean(1).tolist()]
    print(f"classifier on real test pictures: shape {right[0]}, colour {right[1]}, ground {right[2]}")
    G, E, _ = bigbigan.restore(args)
    drawn = guess(G(bigbigan.posterior(args, E, x[:100])))
    for name, target in (("its own x", wanted[:, :100]), ("another x", wanted[:, :100].roll(1, 1))):
        kept = drawn == target
        counts = [*kept.sum(1).tolist(), int((kept[0] & kept[1]).sum()), int(kept.all(0).sum())]
        told = zip(("shape", "colour", "ground", "shape and colour", "all three"), counts, strict=True)
        print(f"of 100 reconstructions, kept of {name}: " + ", ".join(f"{k} {n}" for k, n in told))


if __name__ == "__main__":
    main()
