"""How many times as fast codes are drawn with a cache as by the plain loop, which runs the network anew for each code.

    python tests/benchmarks/cached_sampling.py [vqvae2 vqgan_transformer igpt] [--side 32] [--batch 4] [--device cuda]

vqvae2's prior and the GPTs of vqgan_transformer and igpt, small ones with random weights, draw a grid both ways. The
random numbers are the same, so the codes must be, but where one falls between two roundings.
"""

import argparse
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import igpt
import vqgan_transformer
import vqvae2
from common.data import generator

CODES, WIDTH, LAYERS = 128, 64, 4


def pixelsnail(args):
    net = vqvae2.Prior(CODES, (args.side, args.side), 0, 32, 32, 3, 2, 2, 4, 0, 0, 0, 0.0).to(args.device).eval()
    y = torch.zeros(args.batch, dtype=torch.long, device=args.device)
    return [lambda cached=cached: vqvae2.draw(args, [net], y, 0, 0, cached=cached)[0] for cached in (True, False)]


def plain(args, network, start, n):
    """Codes [B, n] that follow the tokens `start`: network(tokens) -> logits of the next code."""
    tokens, random = start, generator(args.seed, 0, 0, args.device)
    for _ in range(n):
        p = igpt.probabilities(network(tokens), args.temperature, args.top_k, args.top_p)
        tokens = torch.cat([tokens, p.multinomial(1, generator=random)], 1)
    return tokens[:, start.shape[1] :]


def taming_gpt(args):
    n = args.side**2
    net = vqgan_transformer.GPT(CODES + 1, n + 1, LAYERS, 4, WIDTH).to(args.device).eval()
    start = torch.full((args.batch, 1), CODES, device=args.device)
    cached = lambda: vqgan_transformer.complete(args, net, start, args.side, start[:, :0], 0, 0)
    return cached, lambda: plain(args, lambda tokens: net(tokens)[:, -1, :CODES], start, n)


def image_gpt(args):
    net = igpt.GPT(CODES, args.side**2, LAYERS, WIDTH, 4).to(args.device).eval()
    torch.nn.init.normal_(net.wtet.weight)  # it starts at 0
    start = torch.zeros(args.batch, 0, dtype=torch.long, device=args.device)
    cached = lambda: igpt.complete(args, net, start, 0, 0)
    return cached, lambda: plain(args, lambda tokens: net(tokens)[0][:, -1], start, net.n)


DRAWS = {"vqvae2": pixelsnail, "vqgan_transformer": taming_gpt, "igpt": image_gpt}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", default=[*DRAWS], help=", ".join(DRAWS))
    parser.add_argument("--side", type=int, default=32, help="of the grid")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    asked = vars(parser.parse_args())
    args = SimpleNamespace(**asked, seed=0, temperature=1.0, top_k=0, top_p=1.0, codes=CODES, grid=asked["side"])
    for script in args.scripts:
        torch.manual_seed(0)
        seconds, found = [], []
        for way in DRAWS[script](args):
            began = time.perf_counter()
            found.append(way().flatten(1).cpu())
            seconds.append(time.perf_counter() - began)
        same, (cached, all_anew) = (found[0] == found[1]).float().mean(), seconds
        told = f"cached {cached:.1f} s, plain {all_anew:.1f} s: {all_anew / cached:.1f} times as fast"
        grids = f"{args.batch} grids of {args.side}x{args.side}"
        print(f"{script}, {grids}: {told}, {same:.2%} of the codes the same", flush=True)


if __name__ == "__main__":
    main()
