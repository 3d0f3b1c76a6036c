"""VQ-VAE-2: "Generating Diverse High-Fidelity Images with VQ-VAE-2", Ali Razavi, Aaron van den Oord, Oriol Vinyals,
NeurIPS 2019, 1906.00446.

A picture becomes a small map of discrete codes for its layout (top) and a larger one for its detail (bottom). Then a
PixelSNAIL learns the top maps of each class, and a PixelCNN the bottom maps that go with them: codes drawn in that
order and decoded are new pictures. Nothing is adversarial, so no mode of the data is forgotten.

    python vqvae2.py                                        # rendered shapes on a CPU: pictures and numbers
    python vqvae2.py --data cifar10                         # the 32x32 model on one GPU
    torchrun --nproc_per_node 8 vqvae2.py --data imagenet   # the paper's model
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from bisect import bisect_right
from functools import partial
from itertools import accumulate, count, islice, pairwise, product
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet50
from torchvision.utils import save_image

from common import fid, linear_probe
from common.data import NAMES, UserError, batches, generator, load

SCRIPT = Path(__file__).stem
CODES, DROPOUT, PICTURES, FAKES, TAUGHT, ORDER = range(6)  # streams of random numbers
RARE = 0.03  # a code chosen less often than this share of the mean is dead

# All by level is from the top down. A prior is: channels C, and inside its layers R; kernel; blocks of so many layers,
# behind each attention with so many heads or none; layers of 1x1 convolutions before the logits; layers over the codes
# of the level above, and their channels; dropout.
PAPER = dict(  # appendix A, Tables 1 (autoencoder) and 2 (priors), ImageNet; lr is not stated: the usual port's
    size=256, strides=(2, 4), channels=128, residual=64, depth=2, codes=512, code_dim=64, beta=0.25, decay=0.99,
    warmup=0, restart=False, flip=False, stages=(2_207_444, 1_600_000, 754_000), steps=4_561_444, batch=128,
    multiples=(1, 8, 4), lr=3e-4, lr_priors=3e-4, lr_end=1.0,
    priors=((512, 2048, 5, 4, 5, 8, 20, 0, 0, 0.1), (512, 1024, 5, 4, 5, 0, 0, 20, 1024, 0.1)),
    log_every=100, save_every=5000, fid_features="inception", fid_samples=50_000, fid_split="train",
    probe_samples=50_000, cas_samples=1_280_000, sweep_samples=10_000, classifier_steps=450_000)  # fmt: skip
FFHQ = dict(  # --preset paper --size 1024 --no-conditional: the tables' other columns; one attention in the middle
    strides=(2, 2, 8), stages=(304_741, 237_000, 57_400, 270_000), steps=869_141, multiples=(1, 8, 4, 2),
    priors=((512, 2048, 5, 4, 5, 8, 0, 0, 0, 0.5), (512, 1024, 5, 1, 20, 8, 0, 8, 1024, 0.3),
            (512, 1024, 5, 2, 5, 0, 0, 8, 1024, 0.25)))  # fmt: skip
SMALL = PAPER | dict(  # not in the paper: re-implementations'. Codes start when encoders know what to say
    size=32, strides=(2, 2), residual=32, warmup=100, restart=True, flip=True, stages=(40_000, 60_000, 60_000),
    steps=160_000, multiples=(1, 1, 1), lr_end=0.02,
    priors=((128, 128, 5, 4, 4, 8, 0, 0, 0, 0.3), (128, 128, 5, 4, 4, 0, 0, 3, 128, 0.3)),
    probe_samples=0, cas_samples=50_000, classifier_steps=5000)  # fmt: skip
DEMO = SMALL | dict(  # for a CPU
    strides=(2, 8), channels=64, code_dim=32, codes=256, stages=(700, 200, 700), steps=1600, batch=64,
    lr=1e-3, lr_priors=4e-3, priors=((64, 64, 3, 2, 2, 4, 0, 0, 0, 0.0), (64, 64, 3, 2, 3, 0, 0, 1, 64, 0.0)),
    log_every=25, save_every=300, fid_features="random", fid_samples=2000, fid_split="test", probe_samples=10_000,
    cas_samples=2000, sweep_samples=500, classifier_steps=200)  # fmt: skip
PRESETS = {"demo": DEMO, "small": SMALL, "paper": PAPER}


# ------------------------------------------------------------ the autoencoder
class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def coder(cin, cout, stride, channels, residual, depth, decode=False):
    """An encoder, [B, cin, h, w] -> [B, channels, h / stride, w / stride], or a decoder, its mirror image, to
    [B, cout, h * stride, w * stride]. No ReLU is in place: the skips take x as it is."""
    branch = lambda: [nn.ReLU(), nn.Conv2d(channels, residual, 3, 1, 1), nn.ReLU(), nn.Conv2d(residual, channels, 1)]
    residuals, n = [*(Residual(*branch()) for _ in range(depth)), nn.ReLU()], stride.bit_length() - 1
    if decode:
        shapes = pairwise([*[channels] * max(1, n - 1), *[channels // 2] * (n > 1), cout])
        double = [m for shape in shapes for m in (nn.ConvTranspose2d(*shape, 4, 2, 1), nn.ReLU())]
        return nn.Sequential(nn.Conv2d(cin, channels, 3, 1, 1), *residuals, *double[:-1])
    widths = [cin, channels // 2, *[channels] * (n - 1)]
    halve = [m for shape in pairwise(widths) for m in (nn.Conv2d(*shape, 4, 2, 1), nn.ReLU())]
    return nn.Sequential(*halve, nn.Conv2d(widths[-1], channels, 3, 1, 1), *residuals)


class Quantiser(nn.Module):
    """z [B, D, h, w] -> the nearest codes e [B, D, h, w], their numbers int64 [B, h, w], mean((sg[e] - z)^2). Codes are
    averages of the z that chose them: buffers, no parameters, and no part of the loss."""

    def __init__(self, codes, dim):
        super().__init__()
        bound = (3 / dim) ** 0.5  # codes of norm 1 or so, as z has at first (Sonnet)
        self.register_buffer("codes", torch.empty(codes, dim).uniform_(-bound, bound))
        # N_i = 1 beside m_i = e_i: from N_i = 0, as in a popular port, unused codes would fly off 1e5 times as far
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("sums", self.codes.clone())
        self.seen = []  # this step's z and their codes' numbers, a pair a piece

    @torch.compiler.disable
    @fid.full_precision()  # |e|^2 - 2 z.e cancels, and counts and sums round
    def forward(self, z, quantise=True):
        z = z.float()
        rows = z.detach().permute(0, 2, 3, 1).flatten(0, 2)
        ids = torch.addmm(self.codes.square().sum(1), rows, self.codes.T, alpha=-2).argmin(1)
        self.seen += [(rows, ids)] * self.training
        ids = ids.view(len(z), *z.shape[2:])
        e = self.look_up(ids) if quantise else z.detach()
        return e + (z - z.detach()), ids, F.mse_loss(z, e)  # straight-through: the value of e, the gradient of z

    def look_up(self, ids):
        return self.codes[ids].permute(0, 3, 1, 2)

    @torch.no_grad()
    def update(self, args, number, fresh=False, eps=1e-5):
        """The averages after a step, which used the old codes, over its pieces and ranks. Then all codes (`fresh`) or,
        by a restart, the dead become random z of the batch, by the seed and the number. How the codes fare, to log."""
        first, K = self.seen[0][0], len(self.codes)
        chosen = F.pad(torch.zeros_like(self.codes), (0, 1))  # s_i and n_i
        for rows, ids in self.seen:
            chosen.index_add_(0, ids, F.pad(rows, (0, 1), value=1.0))
        self.seen.clear()
        if args.world > 1:
            dist.all_reduce(chosen)
        self.sums.lerp_(chosen[:, :-1], 1 - args.decay)  # m_i
        self.counts.lerp_(n := chosen[:, -1], 1 - args.decay)  # N_i
        total = self.counts.sum()
        self.codes.copy_(self.sums / ((self.counts + eps) / (total + K * eps) * total)[:, None])
        dead = self.counts < (tau := RARE * n.mean())
        if fresh or args.restart:  # N_i = tau, not 1, which would decay for hundreds of steps before it counts as dead
            order = torch.randperm(len(first), generator=generator(args.seed, CODES, number))
            z = first[order[torch.arange(K) % len(first)].to(first.device)]
            if args.world > 1:
                dist.broadcast(z, 0)
            new = dead[:, None] | fresh
            self.counts.copy_(tau.where(new[:, 0], self.counts))
            self.sums.copy_(torch.where(new, tau * z, self.sums))
            self.codes.copy_(torch.where(new, z, self.codes))
        p = n / n.sum()  # perplexity: how many codes are in use
        return {"perplexity": (-p * (p + 1e-10).log()).sum().exp(), "dead": dead.float().sum()}


class VQVAE(nn.Module):
    """Levels from the top down: the top is quantised first, each lower one knowing what is decoded of those above."""

    def __init__(self, strides, channels, residual, depth, codes, dim):
        super().__init__()
        size, n = (channels, residual, depth), len(strides) - 1
        make = lambda network: nn.ModuleList(map(network, range(n + 1)))
        self.encoders = make(lambda i: coder(channels if i < n else 3, None, strides[i], *size))
        self.heads = make(lambda i: nn.Conv2d(channels + dim * (i > 0), dim, 1))
        self.quantisers = make(lambda i: Quantiser(codes, dim))
        self.decoders = make(lambda i: coder(dim * (i + 1), dim if i < n else 3, strides[i], *size, decode=True))
        double = lambda: nn.ConvTranspose2d(dim, dim, 4, 2, 1)
        self.ups = make(lambda i: nn.ModuleList(double() for _ in range(i)))  # one for each level above

    def merge(self, e):
        """Codes e [B, D, h, w] of the first levels, at the last one's size, joined."""
        maps = []
        for ups, own in zip(self.ups, e, strict=False):
            maps = [*(up(m) for up, m in zip(ups, maps, strict=True)), own]
        return torch.cat(maps, 1)

    def encode(self, x, quantise=True):
        """[B, 3, S, S] -> codes e and their numbers a level, the sum of commitment losses. No `quantise`: e is z."""
        features, e, ids, commitment = [], [], [], 0
        for network in reversed(self.encoders):
            features.append(x := network(x))
        for head, quantiser, h in zip(self.heads, self.quantisers, reversed(features), strict=True):
            h = torch.cat([self.decoders[len(e) - 1](self.merge(e)), h], 1) if e else h
            found = quantiser(head(h), quantise)
            e, ids, commitment = [*e, found[0]], [*ids, found[1]], commitment + found[2]
        return e, ids, commitment

    def decode(self, e):
        return self.decoders[-1](self.merge(e)).float()

    def decode_ids(self, ids):
        return self.decode([q.look_up(numbers) for q, numbers in zip(self.quantisers, ids, strict=True)]).clamp(-1, 1)

    def forward(self, x, side=4):
        """What the linear probe reads: the quantised codes of all levels, averaged to side x side each, flat."""
        return torch.cat([F.adaptive_avg_pool2d(e, side).flatten(1) for e in self.encode(x)[0]], 1)


# ------------------------------------------------------------ the priors: PixelSNAIL, PixelCNN
class Conv(nn.Conv2d):
    """A convolution with weights g v / |v|, |v| of each output. A causal one reads the rows above (i, j) and what is
    left of it: its v are masked in the last row from the centre on, before they are normalised. With `at` = (i, j) x is
    only [B, C, 1, 1] there, as is the result: a causal one remembers the x before, in a map of `shape`."""

    def __init__(self, cin, cout, kernel=1, causal=False, shape=None, bias=True):
        super().__init__(cin, cout, kernel, bias=bias)
        (high, wide), self.shape, self.kept = self.kernel_size, shape, None
        self.sides = (wide // 2, wide // 2, high - 1 if causal else high // 2, 0 if causal else high // 2)
        self.register_buffer("mask", torch.ones(high, wide), persistent=False)
        self.mask[-1, wide // 2 if causal else wide :] = 0
        self.g = nn.Parameter((self.weight * self.mask).detach().flatten(1).norm(dim=1)[:, None, None, None])

    def kernel(self):
        v = self.weight * self.mask
        return self.g * v / v.flatten(1).norm(dim=1)[:, None, None, None]

    def forward(self, x, at=None):
        if at and self.shape:
            (i, j), k = at, self.kernel_size[0]
            if at == (0, 0):
                self.past = x.new_zeros(*x.shape[:2], *(side + k - 1 for side in self.shape))
            self.past[:, :, i + k - 1, j + k // 2] = x[:, :, 0, 0]
            x = self.past[:, :, i : i + k, j : j + k]
        elif not at:
            x = F.pad(x, self.sides)
        return F.conv2d(x, self.kernel() if self.kept is None else self.kept, self.bias)  # kept: while codes are drawn


class GatedResidual(nn.Module):
    """x + a sigmoid(b), (a, b) = conv(elu(conv(elu(x)) + aux)) + condition + class."""

    def __init__(self, channels, residual, conv=Conv, aux=0, condition=0, classes=0, dropout=0.0):
        super().__init__()
        self.conv1, self.conv2, self.dropout = conv(channels, residual), conv(residual, 2 * channels), dropout
        self.aux = Conv(aux, residual) if aux else None
        self.condition = Conv(condition, 2 * channels, bias=False) if condition else None
        self.y = nn.Embedding(classes, 2 * channels) if classes else None

    def forward(self, x, at=None, aux=None, condition=None, y=None):
        h = self.conv1(F.elu(x), at)
        h = h if self.aux is None else h + self.aux(F.elu(aux))
        h = self.conv2(F.dropout(F.elu(h), self.dropout, self.training), at)
        h = h if self.condition is None else h + self.condition(condition)
        h = h if self.y is None else h + self.y(y)[..., None, None]
        return x + F.glu(h, 1)


class PixelBlock(nn.Module):
    """Causal layers; then a 1x1 convolution, or causal attention, whose keys know what enters the layers and leaves
    them. Each position attends to those before it in raster order, the first one to none: it gets 0."""

    def __init__(self, shape, width, residual, kernel, layers, heads, condition, classes, dropout):
        super().__init__()
        conv = lambda cin, cout: Conv(cin, cout, kernel, True, shape)
        layer = lambda: GatedResidual(width, residual, conv, 0, condition, classes, dropout)
        self.layers, self.heads, self.dropout = nn.ModuleList(layer() for _ in range(layers)), heads, dropout
        if heads:
            inputs, half = (width + 2, 2 * width + 2), width // 2
            self.query, self.key = (GatedResidual(c, width, dropout=dropout) for c in inputs)
            self.q, self.k, self.v = (Conv(c, half) for c in (*inputs, inputs[1]))
        self.out = GatedResidual(width, width, aux=half, dropout=dropout) if heads else Conv(width + 2, width)

    def forward(self, x, place, at, condition, y):
        h = x
        for layer in self.layers:
            h = layer(h, at, None, condition, y)
        query = torch.cat([h, place], 1)
        if not self.heads:
            return self.out(query)
        key, query = self.key(torch.cat([x, query], 1)), self.query(query)
        maps = (m.flatten(2).unflatten(1, (self.heads, -1)).mT for m in (self.q(query), self.k(key), self.v(key)))
        q, k, v = maps  # [B, heads, positions, C / 2 heads]
        n = torch.arange(q.shape[2], device=q.device)
        seen = (n[:, None] > n) | (n[:, None] + n == 0)  # the first sees itself: a softmax over nothing has no value
        if at:
            first = at == (0, 0)
            k, v = self.past = (k, v) if first else [torch.cat(pair, 2) for pair in zip(self.past, (k, v), strict=True)]
            n, seen = n + at[0] + at[1], (torch.arange(k.shape[2], device=q.device) < k.shape[2] - (not first))[None]
        z = F.scaled_dot_product_attention(q, k, v, seen, self.dropout * self.training) * (n > 0)[:, None]
        return self.out(h, aux=z.mT.flatten(1, 2).unflatten(2, h.shape[2:]))


class Prior(nn.Module):
    """p(ids | the level above, class), a product over positions: ids [B, h, w] -> logits [B, K, h, w], which at each
    position are a function of the ids before it in raster order."""

    def __init__(self, codes, shape, classes, width, residual, kernel, blocks, layers, heads, out, depth, c, dropout):
        super().__init__()
        self.codes, self.shape, half, more = codes, shape, kernel // 2, (kernel + 1) // 2
        self.stems = nn.ModuleList(Conv(codes, width, k) for k in ((half, kernel), (more, half)))
        # their windows, how far left, right, above, below (i, j): the rows above it; what is left of it
        self.stems[0].sides, self.stems[1].sides = (half, half, half, -1), (half, -1, more - 1, 0)
        sizes = (shape, width, residual, kernel, layers, heads, c, classes, dropout)
        self.blocks = nn.ModuleList(PixelBlock(*sizes) for _ in range(blocks))
        last = (GatedResidual(width, residual, classes=classes, dropout=dropout) for _ in range(out))
        self.out, self.logits = nn.ModuleList(last), Conv(width, codes)
        stack = [GatedResidual(c, c, lambda *shape: Conv(*shape, 3), dropout=dropout) for _ in range(depth)]
        self.stack = nn.Sequential(Conv(codes, c, 3), *stack) if depth else None  # over the codes above

    def one_hot(self, ids):  # [B, h, w] -> [B, K, h, w]; -1 is no code
        return (ids[..., None] == torch.arange(self.codes, device=ids.device)).float().permute(0, 3, 1, 2)

    def forward(self, ids, above=None, y=None, at=None):
        """`at` = (i, j): only the logits there, [B, K, 1, 1]; call it for all places in raster order."""
        (h, w), (i, j) = self.shape, at or (0, 0)
        rows, columns = ((torch.arange(n, device=ids.device) - n / 2) / n for n in (h, w))
        place = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).expand(len(ids), -1, -1, -1)
        if at in (None, (0, 0)):
            self.said = F.interpolate(self.stack(self.one_hot(above)), self.shape) if self.stack else None
        condition, x = self.said, 0
        for stem in self.stems:
            window = ids
            if at:
                window = F.pad(ids, stem.sides, value=-1)[:, i:, j:][:, : stem.kernel_size[0], : stem.kernel_size[1]]
            x = x + stem(self.one_hot(window), at)
        if at:
            place, condition = (m if m is None else m[:, :, i : i + 1, j : j + 1] for m in (place, condition))
        for block in self.blocks:
            x = block(x, place, at, condition, y)
        for layer in self.out:
            x = layer(x, y=y)
        return self.logits(F.elu(x))


@torch.no_grad()
def draw(args, priors, y, *key, given=(), cached=True):
    """Codes a level [n, h, w] of classes y [n], from the top down, by the seed and the key; the first may be given. A
    position costs one column of the network, whose layers keep what they have seen; `cached` False is the plain loop,
    all of the map for each position."""
    codes, random = list(given), generator(args.seed, *key, args.device)
    for level, prior in enumerate(priors):
        u = torch.rand(len(y), *prior.shape, generator=random, device=y.device)
        if level < len(given):
            continue
        above, ids = codes[-1] if level else None, torch.zeros_like(u, dtype=torch.long)
        for conv in (module for module in prior.modules() if isinstance(module, Conv)):
            conv.kept = conv.kernel()
        for i, j in product(*map(range, prior.shape)):
            logits = prior(ids, above, y, (i, j))[..., 0, 0] if cached else prior(ids, above, y)[..., i, j]
            p = F.softmax(logits.float() / args.temperature, dim=1)
            ids[:, i, j] = (p.cumsum(1) < u[:, i, j, None]).sum(1).clamp(max=prior.codes - 1)
        for module in prior.modules():
            module.kept = module.past = module.said = None  # gigabytes, at the paper's size
        codes.append(ids)
    return codes


# ------------------------------------------------------------ the objective
def vqvae_loss(mse, commitment, beta):  # equation 2; the averages replace its third term. beta is for x in [-1, 1]
    return mse + beta * commitment


def prior_loss(logits, ids):  # -log p(ids | ...), nats a code
    return F.cross_entropy(logits.float(), ids)


# ------------------------------------------------------------ the frame, the same in every script
# same as in bigbigan.py
def start(args):
    """Completes args by torchrun's rank, world and device, and joins the process group."""
    args.rank, args.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if cuda := args.device == "cuda":
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(args.device)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True
    if args.world > 1:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=torch.device(args.device) if cuda else None)


# same as in bigbigan.py
def average_gradients(args, *networks):
    """Mean over ranks, in one all_reduce, after the last backward pass of a step."""
    if args.world > 1:
        grads = [p.grad for network in networks for p in network.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for g, mean in zip(grads, (flat / args.world).split([g.numel() for g in grads]), strict=True):
            g.copy_(mean.view_as(g))


# same as in bigbigan.py
def read_checkpoint(args, name="checkpoint.pt"):
    """What Run.save wrote, or None where there is nothing; refuses another script's and another configuration's."""
    if not (path := args.out / name).exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        script, config = state["script"], state["config"]
    except Exception as error:  # a broken or foreign file raises half a dozen kinds
        raise UserError(f"{path} cannot be read as a checkpoint ({type(error).__name__}): move it away") from error
    differ = [f"{k} is {config.get(k)!r} there and {v!r} here" for k, v in args.config.items() if config.get(k) != v]
    if script != SCRIPT or differ:
        raise UserError(f"{path} is another run's, of {script}.py ({'; '.join(differ)}): give another --out")
    return state


# same as in bigbigan.py
class Run:
    """What training needs beside the method: to resume, to log, to save, and to leave in order when a signal comes."""

    def __init__(self, args, **parts):
        self.args, self.parts, self.signal, self.file = args, parts, 0, args.out / "log.jsonl"
        args.out.mkdir(parents=True, exist_ok=True)
        state = read_checkpoint(args) or {"step": 0, "seconds": 0.0, "best": math.inf}
        for name in (k for k in parts if k in state):  # a set would have another order on each rank
            parts[name].load_state_dict(state[name])
        self.step, self.best, self.began = state["step"], state["best"], time.time() - state["seconds"]
        self.logged = (self.step, time.time())
        if args.rank == 0 and self.file.exists():  # steps after the checkpoint will be logged again
            lines = [line for line in self.file.read_text().splitlines() if line.endswith("}")]
            self.file.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= self.step))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: setattr(self, "signal", number))

    def every(self, steps):
        return steps > 0 and (self.step % steps == 0 or self.step == self.args.steps)

    def check(self, values):
        if not all(torch.isfinite(v).all() for v in values):
            sys.exit(f"{SCRIPT}.py: not finite at step {self.step}; {self.args.out} keeps the last good checkpoint")

    def log(self, **values):
        """The means of `values`: one JSON object a line in log.jsonl, and a line on the terminal."""
        values = {k: torch.as_tensor(v).detach().mean() for k, v in values.items()}
        self.check(values.values())
        pace = (time.time() - self.logged[1]) / max(1, self.step - self.logged[0])  # seconds a step
        self.logged = (self.step, time.time())
        row = {"step": self.step} | {k: float(f"{v:.5g}") for k, v in values.items()}
        row["img_per_s"] = round(self.args.batch / pace, 1)
        if self.args.rank == 0:
            with open(self.file, "a") as file:
                print(json.dumps(row), file=file)
            left = time.strftime("%H:%M:%S", time.gmtime(pace * (self.args.steps - self.step)))
            end = "\r" if sys.stdout.isatty() and self.step < self.args.steps else "\n"
            print("  ".join(f"{k} {v:g}" for k, v in row.items()), f" {left} left", end=end, flush=True)

    def save(self, *names):
        """The state as each of `names`, then checkpoint.pt: to a temporary file, flushed, renamed over the old one."""
        self.check(p for part in self.parts.values() if isinstance(part, nn.Module) for p in part.parameters())
        state = {"script": SCRIPT, "config": self.args.config, "step": self.step, "best": self.best}
        state |= {"seconds": time.time() - self.began} | {k: part.state_dict() for k, part in self.parts.items()}
        for name in (*names, "checkpoint.pt") if self.args.rank == 0 else ():
            with open(self.args.out / f"{name}.tmp", "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(file.name, self.args.out / name)
        if self.args.world > 1:
            dist.barrier()  # the other ranks may read it next

    def leave_if_told(self):
        """After SIGTERM or Ctrl-C: a checkpoint, then the end. Several ranks agree on it every ten steps."""
        if self.args.world > 1 and self.every(10):
            told = torch.tensor(self.signal, device=self.args.device)
            dist.all_reduce(told, dist.ReduceOp.MAX)
            self.signal = int(told)
        if self.signal and (self.args.world == 1 or self.every(10)):
            self.save()
            sys.exit(128 + self.signal)


# ------------------------------------------------------------ training
def build(args):
    torch.manual_seed(args.seed)
    networks = [VQVAE(args.strides, args.channels, args.residual, args.depth, args.codes, args.code_dim)]
    for level, prior in enumerate(args.priors):
        side = args.size // math.prod(args.strides[level:])
        networks.append(Prior(args.codes, (side, side), args.classes, *prior))
    return [network.to(args.device, memory_format=torch.channels_last) for network in networks]


def read(args, split, n=0):
    return load(args.data, split, args.size, args.root, args.skip_broken, slice(n or None))


def stage_loss(args, networks, stage, x, y, quantise=True, shift=0):
    """Stage 0 teaches the autoencoder, 1 the top's prior and so on down, given the true codes above (`shift`: other
    pictures'). The loss, and parts to log. To store the codes would save next to nothing, and fix their flips."""
    if stage == 0:
        e, _, commitment = networks[0].encode(x, quantise)
        mse = F.mse_loss(networks[0].decode(e), x)
        return vqvae_loss(mse, commitment, args.beta), {"mse": mse, "commitment": commitment}
    with torch.no_grad():
        ids = networks[0].encode(x)[1]
    above = ids[stage - 2].roll(shift, 0) if stage > 1 else None
    loss = prior_loss(networks[stage](ids[stage - 1], above, y), ids[stage - 1])
    return loss, {f"nll_{args.levels[stage - 1]}": loss}


@torch.no_grad()
def measure(args, networks, stage, split="test", shift=0):
    """The stage's squared error or likelihood on 1000 pictures of a split."""
    pictures = batches(read(args, split, 1000), 100, 0, flip=False, device=args.device, rank=0, world=1)
    networks = [network.eval() for network in networks]
    losses = (stage_loss(args, networks, stage, x, y, True, shift)[1] for x, y, _ in islice(pictures, 10))
    return sum(float(next(iter(parts.values()))) for parts in losses) / 10


def train(args):
    data = read(args, "train")
    for known in (data, read(args, "test")) if args.conditional else ():
        if known.labels is None or known.labels.min() < 0:
            raise UserError(f"{args.data} has no labels: give a folder with a sub-folder a class, or --no-conditional")
    args.classes = args.config["classes"] = len(data.classes) if args.conditional else 0
    networks = build(args)
    groups = [{"params": network.parameters()} for network in networks]  # a network without gradients rests
    optimiser = torch.optim.Adam(groups, args.lr, fused=True)
    run = Run(args, autoencoder=networks[0], priors=nn.ModuleList(networks[1:]), optimiser=optimiser)
    for network in networks if args.compile else ():
        network.compile()
    autocast = torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.precision == "bf16")
    begins, stage = [0, *accumulate(args.stages[:-1])], None
    cut = (args.accumulate, args.flip, None, args.device, args.rank, args.world)

    while run.step < args.steps:
        if stage != (now := bisect_right(begins, run.step) - 1):  # the next stage, or the one that is resumed
            stage, done = now, run.step - begins[now]
            args.batch = args.config["batch"] * args.multiples[stage]
            stream = batches(data, args.batch, args.seed, done, *cut)
            if stage and not done:
                optimiser.state.clear()
                if run.best < math.inf:  # the stage before ends in its best weights
                    run.best, key = math.inf, "priors" if stage > 1 else "autoencoder"
                    run.parts[key].load_state_dict(read_checkpoint(args, "best.pt")[key])
        share = min(1.0, (run.step - begins[stage]) / args.stages[stage]) if stage else 0.0
        fall = args.lr_end + (1 - args.lr_end) * (1 + math.cos(math.pi * share)) / 2
        lr = args.lr_priors * fall if stage else args.lr
        for group in optimiser.param_groups:
            group["lr"] = lr
        networks[0].train(stage == 0), networks[stage].train()
        optimiser.zero_grad()
        for piece, (x, y, _) in enumerate(islice(stream, args.accumulate)):
            number = (run.step * args.accumulate + piece) * args.world + args.rank  # dropout is of the piece's own
            torch.manual_seed(generator(args.seed, DROPOUT, number).initial_seed())
            with autocast:
                loss, parts = stage_loss(args, networks, stage, x, y, quantise=stage > 0 or run.step >= args.warmup)
            (loss / args.accumulate).backward()
        average_gradients(args, networks[stage])
        optimiser.step()
        for i, quantiser in enumerate(networks[0].quantisers if stage == 0 else ()):
            found = quantiser.update(args, 3 * run.step + i, fresh=run.step == args.warmup - 1)
            parts |= {f"{k}_{args.levels[i]}": value for k, value in found.items()}
        run.step += 1

        if run.every(args.log_every):
            run.log(stage=float(stage), loss=loss, **parts, lr=lr)
        if run.every(args.save_every) or run.every(args.eval_every):
            run.save()
            sample(args, [network.eval() for network in networks])
        if run.every(args.eval_every):
            run.log(test_loss=(value := measure(args, networks, stage)))
            if value < run.best:  # priors soon know a small set by heart
                run.best = value
                run.save("best.pt")
        run.leave_if_told()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    sample(args)
    evaluate(args)


# ------------------------------------------------------------ pictures and numbers
# same as in bigbigan.py
def picture(args, name, x, columns=8):
    if args.rank == 0:
        save_image(x, args.out / name, nrow=columns, normalize=True, value_range=(-1, 1))


def restore(args):
    name = "best.pt" if args.best else "checkpoint.pt"
    if (state := read_checkpoint(args, name)) is None:
        raise UserError(f"there is no {name} in {args.out}: train first, or give the run's --out")
    args.classes = state["config"]["classes"]
    networks = build(args)
    networks[0].load_state_dict(state["autoencoder"])
    nn.ModuleList(networks[1:]).load_state_dict(state["priors"])
    return [network.eval().requires_grad_(False) for network in networks], state


def in_turn(args, n, first=0):  # n labels, all classes equally often
    return torch.arange(first, first + n, device=args.device) % max(1, args.classes)


@torch.no_grad()
def sample(args, networks=None):
    """samples.png: ten each of ten classes, or of all if they are fewer. reconstructions.png, by rows: test images;
    from all levels; from the top alone, the others 0, their mean, or drawn from their priors (the fair picture of what
    the top says); with three levels from the first two."""
    autoencoder, *_ = networks = networks or restore(args)[0]
    y = torch.linspace(0, max(0, args.classes - 1), min(10, args.classes) or 10, device=args.device).long()
    drawn = draw(args, networks[1:], y.repeat_interleave(10), PICTURES, 0)
    picture(args, "samples.png", autoencoder.decode_ids(drawn), columns=10)
    x, y, _ = next(batches(read(args, "test"), 16, args.seed, flip=False, device=args.device, rank=0, world=1))
    (top, *lower), ids, _ = autoencoder.encode(x)
    empty, mean = [0 * e for e in lower], [e.mean((0, 2, 3), keepdim=True).expand_as(e) for e in lower]
    rows = [x, *(autoencoder.decode([top, *rest]) for rest in (lower, empty, mean))]
    for level in range(1, len(ids)):
        drawn = draw(args, networks[1:], in_turn(args, 16) if y is None else y, PICTURES, 1, given=ids[:level])
        rows.append(autoencoder.decode_ids(drawn))
    picture(args, "reconstructions.png", torch.cat(rows), columns=16)


def judge_samples(args, networks, samples, best_of=1, judge=None):
    """FID and its sisters; of each so many samples of a class only the one that the judge finds most like it. Without
    a judge also the distance of real pictures' reconstructions, which no prior can better."""
    data, how = read(args, args.fid_split), (args.fid_features, args.device, args.fid_weights)

    def drawn(chunk, n):
        y = in_turn(args, n, chunk * fid.CHUNK).repeat(best_of)
        x = networks[0].decode_ids(draw(args, networks[1:], y, FAKES, chunk))
        sure = judge(x).softmax(1).gather(1, y[:, None]).view(best_of, n) if judge else x.new_zeros(1, n)  # p(y | x)
        return x.unflatten(0, (best_of, n))[sure.argmax(0), torch.arange(n)]

    def reconstructed(chunk, n):
        x = data.images[chunk * fid.CHUNK :][:n].permute(0, 3, 1, 2).to(args.device) / 127.5 - 1
        return networks[0].decode(networks[0].encode(x)[0])

    found = {f"best_of_{best_of}_" if judge else "": fid.evaluate(drawn, data, samples, *how)}
    if not judge:
        found["reconstruction_"] = fid.evaluate(reconstructed, data, min(samples, len(data)), *how, full=False)
    return {prefix + k: value for prefix, values in found.items() for k, value in values.items()}


def classify(args, networks):
    """CAS: how often a network that was taught on samples tells the classes of test images; beside it those taught on
    reconstructions and on real images. The last one, which the rejection asks."""
    y = in_turn(args, args.cas_samples)
    pieces = (draw(args, networks[1:], part, TAUGHT, i) for i, part in enumerate(y.split(fid.CHUNK)))
    codes = [torch.cat([ids.short().cpu() for ids in level]) for level in zip(*pieces, strict=True)]
    orders = (torch.randint(len(y), (100,), generator=generator(args.seed, ORDER, step)) for step in count())
    drawn = ((networks[0].decode_ids([ids[rows].long().to(args.device) for ids in codes]), y[rows]) for rows in orders)
    real = lambda: batches(read(args, "train"), 100, args.seed, flip=args.flip, device=args.device, rank=0, world=1)
    again = ((networks[0].decode(networks[0].encode(x)[0]), labels) for x, labels, _ in real())
    found, big, widths = {"cas_samples": args.cas_samples}, args.size > 64, (3, 32, 64, 128)
    for name, pairs in (("", drawn), ("reconstructions_", again), ("real_", real())):
        torch.manual_seed(args.seed)
        layers = [m for c, d in pairwise(widths) for m in (nn.Conv2d(c, d, 3, 2, 1), nn.BatchNorm2d(d), nn.ReLU())]
        net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, args.classes))
        net = (resnet50(num_classes=args.classes) if big else net).to(args.device, memory_format=torch.channels_last)
        optimiser = torch.optim.Adam(net.parameters(), 1e-3 if big else 4e-3, fused=True)
        decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, args.classifier_steps)
        for x, labels, *_ in islice(pairs, args.classifier_steps):
            optimiser.zero_grad()
            F.cross_entropy(net(x), labels).backward()
            optimiser.step()
            decay.step()
        logits, truth = linear_probe.extract(net.eval().requires_grad_(False), read(args, "test"), args.device)
        right = logits.topk(min(5, args.classes)).indices == truth[:, None]
        found |= {f"cas_{name}top{k}": float(right[:, :k].any(1).double().mean()) for k in {1, right.shape[1]}}
    return found, net


def probe(args, networks):
    """How well linear classifiers tell classes by the codes, pooled to 4x4 (probe_) and to 1x1 (mean_probe_). No label
    has shaped them: those only condition the priors."""
    train, test = read(args, "train", args.probe_samples), read(args, "test", args.probe_samples // 2)
    untrained = build(args)[0]  # whose z would all choose one code: codes start as z here too
    x, *_ = next(batches(train, min(100, len(train)), 0, flip=False, device=args.device, rank=0, world=1))
    with torch.no_grad():
        untrained.encode(x, quantise=False)
    for quantiser in untrained.quantisers:
        quantiser.update(args, 0, fresh=True)
    found = linear_probe.evaluate(networks[0], train, test, untrained, args.device)
    pairs = (linear_probe.extract(lambda x: networks[0](x, side=1), data, args.device) for data in (train, test))
    return found | {f"mean_probe_{k}": value for k, value in linear_probe.probe(*pairs).items()}


def evaluate(args):
    """metrics.json: all stages' losses, the linear probe of the codes, FID and its sisters, CAS and rejection."""
    networks, state = restore(args)
    device = torch.cuda.get_device_name() if "cuda" in args.device else f"cpu, {torch.get_num_threads()} threads"
    metrics = {"command": " ".join(sys.argv), "device": device, "torch": torch.__version__, "steps": state["step"]}
    names, metrics["seconds"] = ("autoencoder", *args.levels), round(state["seconds"], 1)
    metrics["parameters"] = {k: sum(p.numel() for p in n.parameters()) for k, n in zip(names, networks, strict=True)}
    for (stage, name), split in product(enumerate(names), ("train", "test")):
        metrics[f"nll_{name}_{split}" if stage else f"mse_{split}"] = measure(args, networks, stage, split)
    metrics["nll_bottom_test_wrong_above"] = measure(args, networks, len(args.levels), shift=1)  # worse, if it is used
    nats = sum(metrics[f"nll_{k}_test"] * math.prod(p.shape) for k, p in zip(args.levels, networks[1:], strict=True))
    metrics["bits_per_dim_of_codes"] = nats / (3 * args.size**2 * math.log(2))  # without what the decoder loses
    measures = [partial(probe, args, networks), partial(judge_samples, args, networks, args.fid_samples)]
    if args.classes and args.classifier_steps:
        found, judge = classify(args, networks)
        metrics |= found
        measures += [partial(judge_samples, args, networks, args.sweep_samples, k, judge) for k in (1, 2, 4)]
    for take in measures:
        try:
            metrics |= take()
        except UserError as error:  # no labels, no Inception weights, no room for a cache: the run keeps the rest
            flags = " ".join(word for word in sys.argv[1:] if word not in ("train", "eval"))
            print(f"{SCRIPT}.py: not measured: {error}; then: python {sys.argv[0]} eval {flags}", file=sys.stderr)
    if args.rank == 0:
        (args.out / "metrics.json.tmp").write_text(json.dumps(metrics, indent=1) + "\n")
        os.replace(args.out / "metrics.json.tmp", args.out / "metrics.json")
        shown = ("mse", "nll", "bits", "fid", "fd_", "reconstruction", "best_of")
        best = ((k, v) for k, v in metrics.items() if k.endswith("top1") or k.startswith(shown))
        lines = (f"\n  {k} {v:.4g}" for k, v in best if isinstance(v, float))
        print(f"{args.out} has the pictures, and metrics.json:", *lines)


# ------------------------------------------------------------ the command line
FLAGS = {  # those whose defaults are in PRESETS
    "size": "side of the images, pixels", "beta": "weight of the commitment loss",
    "warmup": "steps without codes, which then start as z of a batch; 0: codes from the start, drawn uniformly",
    "steps": "training steps of all stages; more of them extend the last one, and a finished run",
    "batch": "images a step, over all ranks and pieces; the paper's priors have 8 and 4 times as many",
    "lr": "learning rate of the autoencoder", "lr_priors": "learning rate of the priors at first",
    "log_every": "steps between two lines of log.jsonl",
    "save_every": "steps between checkpoints, each with a samples.png", "fid_samples": "samples that FID is taken of",
    "fid_features": "random needs no weights, gives fd_random", "fid_split": "FID's real images",
    "probe_samples": "training images of the linear probe, with half as many test images; 0: all",
    "cas_samples": "samples that CAS's classifier is taught on", "sweep_samples": "samples left by each rejection",
    "classifier_steps": "of the classifiers of CAS and rejection; 0: neither",
}  # fmt: skip
CHOICES = {"fid_features": ("inception", "random"), "fid_split": ("train", "test")}
FREE = (  # what may differ between two runs of one checkpoint: beginnings of names
    "command", "root", "out", "steps", "accumulate", "device", "precision", "compile", "skip_broken", "best", "log_",
    "save_", "eval_", "fid_", "probe_", "cas_", "sweep_", "classifier_", "temperature")  # fmt: skip


def parse():
    formats = (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=type("Format", formats, {}))
    parser.error = lambda message: parser.exit(2, f"{SCRIPT}.py: error: {message}\n")
    add, cuda = parser.add_argument, torch.cuda.is_available()
    devices = ("cuda", "cpu") if cuda else ("cpu",)
    add("command", nargs="?", default="train", choices=("train", "sample", "eval"), help="train does all three")
    add("--data", default="shapes", help=f"{', '.join(NAMES)}, or a folder of images")
    add("--root", default="data", help="folder of the data sets' files, and of a cache")
    add("--preset", choices=PRESETS, help="where other defaults come from")
    add("--accumulate", type=int, default=1, help="pieces of a rank's share of the batch, to save memory")
    add("--seed", type=int, default=0, help="of everything random, from 0")
    add("--out", type=Path, help="folder of the run")
    add("--device", default=devices[0], choices=devices, help="where to compute")
    add("--precision", default="bf16" if cuda else "fp32", choices=("fp32", "bf16"), help="of training")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--eval-every", type=int, default=0, help="steps between test losses; a stage ends in its best; 0: none")
    add("--best", action="store_true", help="sample and evaluate best.pt, not checkpoint.pt")
    add("--fid-weights", help="file of the Inception weights; else they are fetched")
    add("--skip-broken", action="store_true", help="do without images that cannot be read")
    add("--conditional", action=argparse.BooleanOptionalAction, default=True, help="the priors know classes")
    add("--restart", action=argparse.BooleanOptionalAction, help="codes that are hardly used become z of the batch")
    add("--temperature", type=float, default=1.0, help="of the priors when codes are drawn, from 0.01")
    add("--strides", nargs="+", type=int, help="from the top's over the level below to the bottom's over the image")
    add("--stages", nargs="+", type=int, help="steps of the autoencoder, and of each prior, the top's first")
    for name, text in FLAGS.items():
        add(f"--{name.replace('_', '-')}", type=type(PAPER[name]), choices=CHOICES.get(name), help=text)
    asked, _ = parser.parse_known_args([word for word in sys.argv[1:] if word not in ("-h", "--help")])
    usual = {"imagenet": "paper", "shapes": "demo", "dsprites": "demo", "mnist": "demo", "fashion_mnist": "demo"}
    preset = asked.preset or usual.get(asked.data, "small")
    parser.set_defaults(preset=preset, out=Path("runs", f"{SCRIPT}-{Path(asked.data).name}"), **PRESETS[preset])
    parser.set_defaults(**FFHQ if preset == "paper" and asked.size == 1024 else {})
    args = parser.parse_args()
    least = dict.fromkeys(("steps", "batch", "accumulate", "log_every", "save_every", "fid_samples"), 1)
    least |= {"temperature": 0.01, "cas_samples": 10, "sweep_samples": 10}
    for name, value in vars(args).items():
        low, high = least.get(name, 0), 2**63 - 1 if name == "seed" else math.inf
        if isinstance(value, int | float) and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be from {low} to {high}")
    levels = len(args.strides)
    fits = levels in (2, 3) and {*args.strides[:-1]} == {2} and args.strides[-1] in (2, 4, 8) and min(args.stages) > 0
    if not fits or args.size < 1 or args.size % math.prod(args.strides):
        raise UserError("--strides: two or three, 2 each, the last 2, 4 or 8; --size a multiple of them; --stages > 0")
    if args.warmup >= args.stages[0]:
        raise UserError(f"--warmup {args.warmup}: must be less than the {args.stages[0]} steps of the first stage")
    for name, n in (("priors", levels), ("stages", levels + 1), ("multiples", levels + 1)):
        values = [*getattr(args, name)]
        setattr(args, name, tuple(values + values[-1:] * n)[:n])  # the last holds for all below
    args.steps = asked.steps or sum(args.stages)
    args.levels, args.strides = ("top", *["middle"] * (levels - 2), "bottom"), tuple(args.strides)
    args.config = {k: v for k, v in vars(args).items() if not k.startswith(FREE)}
    return args


# same as in bigbigan.py
def main():
    try:
        args = parse()
        start(args)
        {"train": train, "sample": sample, "eval": evaluate}[args.command](args)
    except (UserError, OSError) as error:
        print(f"{SCRIPT}.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
