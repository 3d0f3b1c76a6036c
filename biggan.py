"""BigGAN: "Large Scale GAN Training for High Fidelity Natural Image Synthesis", Andrew Brock, Jeff Donahue, Karen
Simonyan, ICLR 2019, 1809.11096.

A class-conditional ResNet GAN, scaled up: the hinge loss, spectral norm in G and D, self-attention, a discriminator
that projects on the class. One embedding of the class serves all of G's batch norms, and z is cut into chunks, one a
block. An orthogonal penalty on G's weights lets z be drawn from a truncated normal at sampling time: one knob that
trades variety for fidelity. Such GANs collapse late in training, so signs of it are logged and the best kept.

    python biggan.py                                        # rendered shapes on a CPU: pictures and numbers
    python biggan.py --data cifar10                         # the CIFAR-10 model on one GPU
    torchrun --nproc_per_node 8 biggan.py --data imagenet   # the paper's model; with --deep BigGAN-deep
"""

import argparse
import copy
import json
import math
import os
import signal
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.utils import save_image

from common import fid, linear_probe
from common.data import NAMES, UserError, batches, generator, load

SCRIPT = Path(__file__).stem
LATENTS, STANDING, PICTURES, FAKES = range(4)  # streams of random numbers
TRUNCATIONS = (2.0, 1.0, 0.5, 0.25)  # thresholds of the sweep, beside no truncation
SWEPT = ("fid", "fd_", "inception_score", "precision", "recall")  # what it reports

LAYOUTS = {  # by image size: channels of G's 4x4 map and after each block, in units of ch; of D after each block; how
    # many of its blocks halve the map; width of z; size of the map with attention. Appendix B; 32, 64: authors' code
    32: ((4, 4, 4, 4), (4, 4, 4, 4), 2, 128, 0),
    64: ((16, 16, 8, 4, 2), (1, 2, 4, 8, 16), 4, 120, 32),
    128: ((16, 16, 8, 4, 2, 1), (1, 2, 4, 8, 16, 16), 5, 120, 64),
    256: ((16, 16, 8, 8, 4, 2, 1), (1, 2, 4, 8, 8, 16, 16), 6, 140, 64),
}  # fmt: skip
PAPER = dict(  # Table 1's last row at 128x128; what it does not state (the average's start) is the authors' code's
    size=128, ch=96, embed_dim=128, layouts=LAYOUTS, init_std=0.0, ortho=1e-4,  # std 0: orthogonal weights
    steps=165_000, batch=2048, d_steps=2, lr_d=2e-4, lr_g=5e-5, betas=(0.0, 0.999), sn_eps=1e-4, bn_eps=1e-4,
    ema=0.9999, ema_start=20_000, standing=100, log_every=100, save_every=1000, sweep_samples=10_000, fid_split="train",
    fid_features="inception", fid_samples=50_000, probe_samples=50_000, classifier_steps=0)  # fmt: skip
SMALL = PAPER | dict(  # the authors' CIFAR-10 recipe (launch_cifar_ema.sh): no shared embedding, z whole
    size=32, ch=64, embed_dim=0, init_std=0.02, steps=125_000, batch=50, d_steps=4, lr_g=2e-4, sn_eps=1e-8, bn_eps=1e-5,
    ortho=0.0, ema_start=1000, save_every=2000, probe_samples=0, classifier_steps=5000)  # fmt: skip
DEMO = SMALL | dict(  # for a CPU; 1000 steps draw colours and blobs, but not yet the classes that were asked for
    layouts=LAYOUTS | {32: ((4, 4, 2, 1), (1, 2, 4, 4), 3, 32, 0), 64: ((4, 4, 4, 2, 1), (1, 2, 4, 4, 4), 4, 40, 0)},
    ch=16, embed_dim=32, init_std=0.0, steps=1000, batch=32, d_steps=1, lr_d=5e-4, lr_g=5e-4, betas=(0.0, 0.99),
    sn_eps=1e-6, ema=0.995, ema_start=300, standing=20, log_every=50, save_every=500, sweep_samples=2000,
    classifier_steps=300, fid_features="random", fid_samples=5000, fid_split="test", probe_samples=10_000)  # fmt: skip
PRESETS = {"demo": DEMO, "small": SMALL, "paper": PAPER}
DEEP = {  # what --deep changes. The paper's rates at 256x256 are 2.5e-5 for both
    "demo": dict(ch=32), "small": dict(embed_dim=128), "paper": dict(ch=128)}  # fmt: skip


# ------------------------------------------------------------ G
def spectral(layer, eps):
    """Orthogonal start; then W / sigma(W), sigma the largest singular value (Miyato et al. 2018); eps None: no norm."""
    nn.init.orthogonal_(layer.weight)
    return layer if eps is None else parametrizations.spectral_norm(layer, eps=eps)


def power_iteration(*networks):
    """One power iteration a step, after network.train(). Torch alone would have one a forward pass; so all ranks and
    all accumulated pieces of a step see the same weights."""
    for module in (m for network in networks for m in network.modules() if parametrize.is_parametrized(m)):
        module.parametrizations.train()
        _ = module.weight  # to read it is to iterate
        module.parametrizations.eval()


class Attention(nn.Module):
    """SAGAN's self-attention; keys and values on a map of half the size. The identity at the start (gamma = 0)."""

    def __init__(self, channels, eps):
        super().__init__()
        shapes = [(channels, channels // 8)] * 2 + [(channels, channels // 2), (channels // 2, channels)]
        self.query, self.key, self.value, self.out = (spectral(nn.Conv2d(*s, 1, bias=False), eps) for s in shapes)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        q = self.query(x).flatten(2).mT  # [B, HW, C/8]
        k, v = (F.max_pool2d(m(x), 2).flatten(2).mT for m in (self.key, self.value))  # [B, HW/4, C/8 and C/2]
        attended = F.scaled_dot_product_attention(q, k, v, scale=1.0).mT.unflatten(2, x.shape[2:])
        return x + self.gamma * self.out(attended)


class GBlock(nn.Module):
    """Residual block that doubles the map, [B, cin, h, w] -> [B, cout, 2h, 2w]: two convolutions, before each a batch
    norm with gain 1 + g(c) and bias b(c). `affine(channels)` makes g and b; attention stands behind if asked for."""

    def __init__(self, cin, cout, affine, attend, eps):
        super().__init__()
        self.layers = nn.ModuleList()
        for channels, grow in ((cin, nn.Upsample(scale_factor=2)), (cout, nn.Identity())):
            norm, conv = nn.BatchNorm2d(channels, affine=False), spectral(nn.Conv2d(channels, cout, 3, padding=1), eps)
            self.layers.append(nn.ModuleList([norm, affine(channels), affine(channels), grow, conv]))
        self.skip = nn.Sequential(spectral(nn.Conv2d(cin, cout, 1), eps), nn.Upsample(scale_factor=2))
        self.attention = Attention(cout, eps) if attend else nn.Identity()

    def forward(self, x, c):
        h = x
        for norm, gain, bias, grow, conv in self.layers:
            h = norm(h) * (1 + gain(c))[..., None, None] + bias(c)[..., None, None]
            h = conv(grow(F.relu(h)))
        return self.attention(h + self.skip(x))


class Generator(nn.Module):
    """z [B, z_dim], c [B, embed_dim] -> images [B, 3, S, S] in [-1, 1]; c defaults to the one row of unconditional G's.
    The first chunk of z makes the 4x4 map, each other one joins c to condition a block. With embed_dim 0 (BigGAN on
    CIFAR-10) all of z enters the first layer, and c are labels [B]."""

    def __init__(self, widths, z_dim, embed_dim, classes=1, attention=0, eps=1e-4):
        super().__init__()
        self.chunks = len(widths) if embed_dim else 1
        chunk = z_dim // self.chunks
        affine = lambda channels: spectral(nn.Linear(embed_dim + chunk, channels, bias=False), eps)
        if not embed_dim:
            affine = lambda channels: spectral(nn.Embedding(classes, channels), None)
        self.embed = spectral(nn.Embedding(classes, embed_dim), None)  # no spectral norm: it would cripple G here
        self.first = nn.Sequential(spectral(nn.Linear(chunk, 16 * widths[0]), eps), nn.Unflatten(1, (widths[0], 4, 4)))
        shapes = enumerate(pairwise(widths))
        self.blocks = nn.ModuleList(GBlock(*shape, affine, 8 << i == attention, eps) for i, shape in shapes)
        last = spectral(nn.Conv2d(widths[-1], 3, 3, padding=1), eps)
        self.last = nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU(), last)

    def forward(self, z, c=None):
        c = self.embed.weight.expand(len(z), -1) if c is None else c
        z = z.chunk(self.chunks, dim=1)
        x = self.first(z[0])
        for i, block in enumerate(self.blocks, start=1):
            x = block(x, torch.cat([c, z[i]], 1) if self.chunks > 1 else c)
        return torch.tanh(self.last(x).float())


class DeepGBlock(GBlock):
    """BigGAN-deep's, [B, cin, h, w] -> [B, cout, h * grow, w * grow], cout <= cin: four convolutions, of which the two
    3x3 see a quarter of the channels; the skip has no weights, it drops the last cin - cout channels."""

    def __init__(self, cin, cout, affine, attend, eps, grow):
        nn.Module.__init__(self)  # of GBlock only forward is left
        mid, self.layers = cin // 4, nn.ModuleList()
        for i, (a, b, kernel) in enumerate(((cin, mid, 1), (mid, mid, 3), (mid, mid, 3), (mid, cout, 1))):
            conv = spectral(nn.Conv2d(a, b, kernel, padding=kernel // 2), eps)
            up = nn.Upsample(scale_factor=grow if i == 1 else 1)
            self.layers.append(nn.ModuleList([nn.BatchNorm2d(a, affine=False), affine(a), affine(a), up, conv]))
        self.skip = nn.Sequential(nn.ZeroPad3d((0, 0, 0, 0, 0, cout - cin)), nn.Upsample(scale_factor=grow))
        self.attention = Attention(cout, eps) if attend else nn.Identity()


class DeepGenerator(nn.Module):
    """BigGAN-deep's, z [B, z_dim], c [B, embed_dim] -> images [B, 3, S, S] in [-1, 1]. z stays whole, and with c makes
    the 4x4 map and conditions each block; two blocks a size, the second one doubles the map."""

    def __init__(self, widths, z_dim, embed_dim, classes=1, attention=0, eps=1e-4):
        super().__init__()
        width = embed_dim + z_dim
        affine = lambda channels: spectral(nn.Linear(width, channels, bias=False), eps)
        self.embed = spectral(nn.Embedding(classes, embed_dim), None)
        self.first = nn.Sequential(spectral(nn.Linear(width, 16 * widths[0]), eps), nn.Unflatten(1, (widths[0], 4, 4)))
        self.blocks = nn.ModuleList()
        for i, (cin, cout) in enumerate(pairwise(widths)):
            self.blocks.append(DeepGBlock(cin, cin, affine, False, eps, grow=1))
            self.blocks.append(DeepGBlock(cin, cout, affine, 8 << i == attention, eps, grow=2))
        last = spectral(nn.Conv2d(widths[-1], 3, 3, padding=1), eps)
        self.last = nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU(), last)

    def forward(self, z, c):
        c = torch.cat([c, z], 1)
        x = self.first(c)
        for block in self.blocks:
            x = block(x, c)
        return torch.tanh(self.last(x).float())


# ------------------------------------------------------------ D
class Residual(nn.Module):  # x -> skip(x) + branch(x)
    def __init__(self, branch, skip=()):
        super().__init__()
        self.branch, self.skip = nn.Sequential(*branch), nn.Sequential(*skip)

    def forward(self, x):
        return self.skip(x) + self.branch(x)


def image_trunk(widths, halvings, size, attention=0, eps=1e-4):
    """BigGAN's image discriminator up to its last map: [B, 3, size, size] -> [B, widths[-1], h, w]."""
    layers = []
    for i, (cin, cout) in enumerate(pairwise((3, *widths))):
        relu, pool = [nn.ReLU()] * (i > 0), [nn.AvgPool2d(2)] * (i < halvings)  # no ReLU on the image itself
        conv1, conv2 = (spectral(nn.Conv2d(channels, cout, 3, padding=1), eps) for channels in (cin, cout))
        skip = [spectral(nn.Conv2d(cin, cout, 1), eps)] if pool or cin != cout else []
        layers.append(Residual([*relu, conv1, nn.ReLU(), conv2, *pool], skip + pool if i else pool + skip))
        layers += [Attention(cout, eps)] if size >> (i + 1) == attention else []
    return nn.Sequential(*layers)


class Widen(nn.Module):  # [B, cin, h, w] -> [B, cout, h, w]: x itself, then cout - cin channels of a 1x1 convolution
    def __init__(self, cin, cout, eps):
        super().__init__()
        self.conv = spectral(nn.Conv2d(cin, cout - cin, 1), eps)

    def forward(self, x):
        return torch.cat([x, self.conv(x)], 1)


def deep_trunk(widths, halvings, size, attention=0, eps=1e-4):
    """BigGAN-deep's: [B, 3, size, size] -> [B, widths[-1], h, w]. A convolution to widths[0], then two blocks for each
    further width, of which the first changes the width and halves the map."""
    layers = [spectral(nn.Conv2d(3, widths[0], 3, padding=1), eps)]
    for i, (before, cout) in enumerate(pairwise(widths)):
        for cin, pool in ((before, [nn.AvgPool2d(2)] * (i < halvings)), (cout, [])):
            mid, branch = cout // 4, []
            for a, b, kernel in ((cin, mid, 1), (mid, mid, 3), (mid, mid, 3)):
                branch += [nn.ReLU(), spectral(nn.Conv2d(a, b, kernel, padding=kernel // 2), eps)]
            branch += [nn.ReLU(), *pool, spectral(nn.Conv2d(mid, cout, 1), eps)]
            layers.append(Residual(branch, [*pool, Widen(cin, cout, eps)] if cin != cout else pool))
        layers += [Attention(cout, eps)] if size >> (i + 1) == attention else []
    return nn.Sequential(*layers)


class Discriminator(nn.Module):
    """x [B, 3, S, S], y [B] -> scores [B] of images as of their class, by projection (Miyato and Koyama 2018)."""

    def __init__(self, trunk, width, classes, eps=1e-4):
        super().__init__()
        self.trunk, self.linear = trunk, spectral(nn.Linear(width, 1), eps)
        self.embed = spectral(nn.Embedding(classes, width), eps)

    def features(self, x):  # h, [B, width]: a SUM over positions, not their mean; scores scale with it
        return F.relu(self.trunk(x)).sum((2, 3), dtype=torch.float32)

    def forward(self, x, y):
        h = self.features(x)
        return self.linear(h)[:, 0].float() + (self.embed(y) * h).sum(1)


# ------------------------------------------------------------ the objective
def discriminator_loss(real, fake):
    """L_D: the hinge, of the scores [B] of real and drawn images (Lim and Ye 2017)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def generator_loss(fake):
    """L_G = -E D(G(z, c), c)."""
    return -fake.mean()


def orthogonality(G):
    """R(W) / beta = ||W W^T * (1 - I)||_F^2 (equation 3), summed over G's weights [out, in] but for the embedding."""
    # ||W W^T|| = ||W^T W||, and its diagonal holds squared norms: so the smaller of the two products will do
    weights = [p.flatten(1) for p in G.parameters() if p.ndim > 1 and p is not G.embed.weight]
    grams = [w @ w.T if len(w) < w.shape[1] else w.T @ w for w in weights]
    return sum(gram.square().sum() - w.square().sum(1).square().sum() for gram, w in zip(grams, weights, strict=True))


def prior(args, n, *key, truncation=math.inf):
    """z ~ N(0, I) [n, z_dim] and classes c ~ U{0, ..., K - 1} [n], functions of the seed and the key. The truncation
    trick: coordinates with |z| > truncation are drawn again until none is left."""
    random = generator(args.seed, *key, args.device)
    c = torch.randint(args.classes, (n,), generator=random, device=args.device)
    draw = lambda: torch.randn(n, args.z_dim, generator=random, device=args.device)
    z = draw()
    while truncation < math.inf and (outside := z.abs() > truncation).any():
        z = torch.where(outside, draw(), z)
    return z, c


def generate(args, G, z, c):
    return G(z, G.embed(c) if args.embed_dim else c)


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
    """G and D with their first weights, a function of the seed: every rank starts from the same."""
    torch.manual_seed(args.seed)
    widths, d_widths, halvings, _, attention = args.layouts[args.size]
    widths, d_widths = ([args.ch * n for n in units] for units in (widths, d_widths))
    make, trunk = (DeepGenerator, deep_trunk) if args.deep else (Generator, image_trunk)
    G = make(widths, args.z_dim, args.embed_dim, args.classes, attention, args.sn_eps)
    D = trunk(d_widths, halvings, args.size, attention, args.sn_eps)
    networks = [G, Discriminator(D, d_widths[-1], args.classes, args.sn_eps)]
    for layer in (m for network in networks for m in network.modules()):
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = args.bn_eps
        elif isinstance(layer, nn.Conv2d | nn.Linear | nn.Embedding) and args.init_std:
            spectrally = parametrize.is_parametrized(layer)
            nn.init.normal_(layer.parametrizations.weight.original if spectrally else layer.weight, std=args.init_std)
    if args.world > 1 and args.device != "cpu":  # statistics of the whole batch, as across the paper's TPU cores
        networks = [nn.SyncBatchNorm.convert_sync_batchnorm(network) for network in networks]
    return [network.to(args.device, memory_format=torch.channels_last) for network in networks]


def settle(args, average, truncation=math.inf):
    """A frozen copy of averaged weights with standing statistics: batch norm's means over many batches, drawn as the
    samples will be. Samples then do not depend on their batch; and u of the spectral norms follows the average."""
    G = copy.deepcopy(average.module).requires_grad_(False).train()
    for norm in (m for m in G.modules() if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm)):
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
    for i in range(args.standing):
        generate(args, G, *prior(args, 64, STANDING, i, truncation=truncation))
    return G.eval()


def watch(args, G, D, x, z, c):
    """Signs of collapse. spread: how far two drawn images of one class lie apart, beside two real ones; label: one z
    in two classes; sigma: weights' largest singular values, of which that of G's first layer explodes (section 4)."""
    G.eval()  # in train mode batch norm would move
    with torch.no_grad():
        here, there, other = (generate(args, G, *pair) for pair in ((z, c), (z.roll(1, 0), c), (z, c.roll(1))))
    differences = {"spread": here - there, "spread_real": x - x.roll(1, 0), "label": here - other}
    found = {k: difference.abs() for k, difference in differences.items()}
    for name, network in (("G", G), ("D", D)):
        layers = [m for m in network.modules() if parametrize.is_parametrized(m)]
        for place, layer in (("first", layers[0]), ("middle", layers[len(layers) // 2]), ("last", layers[-1])):
            found[f"sigma_{name}_{place}"] = layer.parametrizations.weight.original.norm() / layer.weight.norm()
    return found


def train(args):
    data = load(args.data, "train", args.size, args.root, args.skip_broken)
    data.require_labels()
    args.classes = args.config["classes"] = len(data.classes)
    G, D = build(args)
    G_ema = AveragedModel(G, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
    rates = ((G, args.lr_g), (D, args.lr_d))
    opt_G, opt_D = (torch.optim.Adam(network.parameters(), lr, args.betas, fused=True) for network, lr in rates)
    run = Run(args, G=G, D=D, G_ema=G_ema, opt_G=opt_G, opt_D=opt_D)
    for network in (G, D) if args.compile else ():
        network.compile()
    autocast = torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.precision == "bf16")
    share = args.batch // (args.world * args.accumulate)  # images a piece
    first, cut = run.step * args.d_steps, (args.device, args.rank, args.world)
    stream = batches(data, args.batch, args.seed, first, args.accumulate, False, None, *cut)  # no mirror images

    def draw(k):  # this rank's pieces of the step's k-th z and c, which are drawn for the whole batch and cut
        z, c = prior(args, args.batch, LATENTS, run.step * (args.d_steps + 1) + k)
        cuts = [slice(share * n, share * (n + 1)) for n in range(args.rank, args.world * args.accumulate, args.world)]
        return [(z[cut], c[cut]) for cut in cuts]

    while run.step < args.steps:
        G.train(), D.train().requires_grad_(True)
        for k in range(args.d_steps):  # D learns to tell real images from drawn ones, of whatever class
            power_iteration(G, D)
            opt_D.zero_grad()
            for (z, c), (x, y, _) in zip(draw(k), stream, strict=False):
                with autocast:
                    with torch.no_grad():
                        x_hat = generate(args, G, z, c)
                    real, fake = D(torch.cat([x, x_hat]), torch.cat([y, c])).chunk(2)  # one forward pass for both
                    loss_d = discriminator_loss(real, fake)
                (loss_d / args.accumulate).backward()
            average_gradients(args, D)
            opt_D.step()

        D.requires_grad_(False)
        power_iteration(G, D)
        opt_G.zero_grad()
        for z, c in draw(args.d_steps):  # G learns to raise D's scores
            with autocast:
                loss_g = generator_loss(D(generate(args, G, z, c), c))
            (loss_g / args.accumulate).backward()
        if args.ortho:
            (args.ortho * orthogonality(G)).backward()
        average_gradients(args, G)
        opt_G.step()
        if run.step < args.ema_start:
            G_ema.n_averaged.zero_()  # the first update of an average is a copy
        G_ema.update_parameters(G)
        run.step += 1

        if run.every(args.log_every):
            run.log(loss_d=loss_d, loss_g=loss_g, real=real, fake=fake, **watch(args, G, D, x, z, c), lr=args.lr_g)
        if run.every(args.save_every) or run.every(args.eval_every):
            run.save()
            picture(args, "samples.png", class_rows(args, settle(args, G_ema)), columns=10)
        if run.every(args.eval_every):
            name, value = next(iter(judge_samples(args, G_ema, args.fid_samples, args.truncation, full=False).items()))
            run.log(**{name: value})
            if value < run.best:  # GANs collapse late
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
    """The averaged G, D, and the checkpoint that they come from."""
    name = "best.pt" if args.best else "checkpoint.pt"
    if (state := read_checkpoint(args, name)) is None:
        raise UserError(f"there is no {name} in {args.out}: train first, or give the run's --out")
    args.classes = state["config"]["classes"]
    G, D = build(args)
    G_ema = AveragedModel(G)
    G_ema.load_state_dict(state["G_ema"])
    D.load_state_dict(state["D"])
    return G_ema, D.requires_grad_(False).eval(), state


def class_rows(args, G, truncation=math.inf):
    """Ten samples each of ten classes, or of all if they are fewer: [100, 3, S, S]."""
    c = torch.linspace(0, args.classes - 1, min(10, args.classes)).long().repeat_interleave(10).to(args.device)
    return generate(args, G, prior(args, len(c), PICTURES, 0, truncation=truncation)[0], c)


def sample(args):
    """samples.png: a row a class; truncation.png: two classes, for each a row without truncation and one a threshold;
    interpolations.png: four rows each between two z, two classes, and both; without a shared embedding z alone."""
    average, _, _ = restore(args)
    G = settle(args, average, args.truncation)
    rows = [class_rows(args, settle(args, average, t), t).split(10) for t in (math.inf, *TRUNCATIONS)]
    z, t = prior(args, 24, PICTURES, 1, truncation=args.truncation)[0].view(12, 2, -1), torch.linspace(0, 1, 10)
    c = torch.arange(24, device=args.device).view(12, 2) % args.classes
    z[4:8, 1], c[:4, 1] = z[4:8, 0], c[:4, 0]
    between = lambda ends: torch.lerp(ends[:, :1], ends[:, 1:], t.to(args.device)[:, None]).flatten(0, 1)
    mixed = G(between(z), between(G.embed(c)) if args.embed_dim else c[:, 0].repeat_interleave(10))
    picture(args, "samples.png", class_rows(args, G, args.truncation), columns=10)
    picture(args, "truncation.png", torch.cat([row[i] for i in (0, -1) for row in rows]), columns=10)
    picture(args, "interpolations.png", mixed if args.embed_dim else mixed[:40], columns=10)


def judge_samples(args, average, n, truncation, full=True):
    G, data = settle(args, average, truncation), load(args.data, args.fid_split, args.size, args.root, args.skip_broken)
    draw = lambda chunk, m: generate(args, G, *prior(args, m, FAKES, chunk, truncation=truncation))
    return fid.evaluate(draw, data, n, args.fid_features, args.device, args.fid_weights, full)


def name_samples(args, G):
    """The share of samples whose class a small network, trained on real images, names rightly; and of test images."""
    torch.manual_seed(args.seed)
    shapes = ((3, 32), (32, 64), (64, 128))
    layers = [m for cin, cout in shapes for m in (nn.Conv2d(cin, cout, 3, 2, 1), nn.BatchNorm2d(cout), nn.ReLU())]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, args.classes)]
    net = nn.Sequential(*layers).to(args.device, memory_format=torch.channels_last)
    optimiser = torch.optim.Adam(net.parameters(), 4e-3, fused=True)
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, args.classifier_steps)
    read = lambda split: load(args.data, split, args.size, args.root, args.skip_broken)
    real = lambda split: batches(read(split), 100, args.seed, flip=False, device=args.device, rank=0, world=1)
    for _, (x, y, _) in zip(range(args.classifier_steps), real("train"), strict=False):
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
        decay.step()
    net.eval().requires_grad_(False)
    right = lambda pairs: sum(float((net(x).argmax(1) == y).float().mean()) for x, y in pairs) / 20
    pairs = [prior(args, 100, FAKES, i, truncation=args.truncation) for i in range(20)]
    tests = ((x, y) for _, (x, y, _) in zip(range(20), real("test"), strict=False))
    return {"class_agreement": right((generate(args, G, z, c), c) for z, c in pairs), "classifier_top1": right(tests)}


def evaluate(args):
    """metrics.json: the probe of D's features, FID and its sisters, truncation, whether samples are of their class."""
    (average, D, state), untrained = restore(args), build(args)
    device = torch.cuda.get_device_name() if "cuda" in args.device else f"cpu, {torch.get_num_threads()} threads"
    metrics = {"command": " ".join(sys.argv), "device": device, "torch": torch.__version__, "steps": state["step"]}
    metrics |= {"images": state["step"] * args.d_steps * args.batch, "seconds": round(state["seconds"], 1)}
    metrics["parameters"] = {k: sum(p.numel() for p in n.parameters()) for k, n in zip("GD", untrained, strict=True)}
    metrics |= {"truncation": f"{args.truncation:g}", "probe_saw_labels": True}  # D did

    def probe():  # the features that D's scores are made of, pooled
        n = args.probe_samples or None
        read = lambda split, n: load(args.data, split, args.size, args.root, args.skip_broken, slice(n))
        known, fresh = (nn.Sequential(network.trunk, nn.ReLU()) for network in (D, untrained[1]))
        return linear_probe.evaluate(known, read("train", n), read("test", n and n // 2), fresh, args.device)

    def sweep():  # the lower the threshold, the better and the less varied the samples
        found = {}
        for t in (math.inf, *TRUNCATIONS):
            scores = judge_samples(args, average, args.sweep_samples, t)
            found |= {f"truncation_{t:g}_{k}": v for k, v in scores.items() if k.startswith(SWEPT)}
        return found

    measures = [probe, lambda: judge_samples(args, average, args.fid_samples, args.truncation), sweep]
    measures += [lambda: name_samples(args, settle(args, average, args.truncation))] * (args.classifier_steps > 0)
    for measure in measures:
        try:
            metrics |= measure()
        except UserError as error:  # no labels, no Inception weights, no room for a cache: the run keeps the rest
            flags = " ".join(word for word in sys.argv[1:] if word not in ("train", "eval"))
            print(f"{SCRIPT}.py: not measured: {error}; then: python {sys.argv[0]} eval {flags}", file=sys.stderr)
    if args.rank == 0:
        (args.out / "metrics.json.tmp").write_text(json.dumps(metrics, indent=1) + "\n")
        os.replace(args.out / "metrics.json.tmp", args.out / "metrics.json")
        print(f"{args.out} has the pictures, and metrics.json, where among others:")
        for k in (k for k in metrics if k.endswith(("top1", "agreement")) or k.startswith((*SWEPT, "truncation_"))):
            print(f"  {k} {metrics[k]:.4g}")
        print("top1: accuracy with D's features (D saw labels), beside untrained_, raw_pixels_, random_features_; fid,")
        print("fd_random (NOT FID): distance from real images, 0 is best; agreement: samples that are of their class.")


# ------------------------------------------------------------ the command line
FLAGS = {  # those whose defaults are in PRESETS
    "size": "side of G's images, pixels", "ch": "channels of the narrowest layers, of which all others' are multiples",
    "embed_dim": "width of the class embedding that G's blocks share, each with a chunk of z; 0: tables in each block",
    "steps": "training steps; more of them extend a finished run", "d_steps": "steps of D for one of G",
    "batch": "images a step, over all ranks and pieces", "lr_d": "learning rate of D", "lr_g": "learning rate of G",
    "ortho": "beta, weight of the orthogonal penalty on G", "ema": "decay of the average of G, 0 to 1",
    "log_every": "steps between two lines of log.jsonl", "fid_samples": "samples that FID is taken of",
    "save_every": "steps between checkpoints, each with a samples.png", "fid_split": "FID's real images",
    "fid_features": "random needs no weights, gives fd_random",
    "probe_samples": "training images of the linear probe, with half as many test images; 0: all",
    "sweep_samples": "samples for each threshold of the truncation sweep",
    "classifier_steps": "training steps of the network that names the samples' classes; 0: none",
}  # fmt: skip
CHOICES = {"fid_features": ("inception", "random"), "fid_split": ("train", "test")}
FREE = (  # what may differ between two runs of one checkpoint: beginnings of names
    "command", "root", "out", "steps", "accumulate", "device", "precision", "compile", "skip_broken", "best", "log_",
    "save_", "eval_", "fid_", "probe_", "sweep_", "classifier_", "truncation")  # fmt: skip


def parse():
    """The flags; their defaults are those of the preset that --data or --preset choose."""
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
    add("--eval-every", type=int, default=0, help="steps between FIDs, the best of which keeps best.pt; 0: none")
    add("--best", action="store_true", help="sample and evaluate best.pt, not checkpoint.pt")
    add("--fid-weights", help="file of the Inception weights; else they are fetched")
    add("--skip-broken", action="store_true", help="do without images that cannot be read")
    add("--deep", action="store_true", help="BigGAN-deep")
    add("--truncation", type=float, default=math.inf, help="of samples: numbers of z above it in magnitude are redrawn")
    for name, text in FLAGS.items():
        add(f"--{name.replace('_', '-')}", type=type(PAPER[name]), choices=CHOICES.get(name), help=text)
    asked, _ = parser.parse_known_args([word for word in sys.argv[1:] if word not in ("-h", "--help")])
    usual = {"imagenet": "paper", "shapes": "demo", "dsprites": "demo", "mnist": "demo", "fashion_mnist": "demo"}
    preset = asked.preset or usual.get(asked.data, "small")
    parser.set_defaults(preset=preset, out=Path("runs", f"{SCRIPT}-{Path(asked.data).name}"), **PRESETS[preset])
    parser.set_defaults(**DEEP[preset] if asked.deep else {})
    args = parser.parse_args()
    least = dict.fromkeys(("steps", "batch", "accumulate", "d_steps", "log_every", "save_every", "fid_samples"), 1)
    least |= {"ch": 8, "embed_dim": int(args.deep), "sweep_samples": 10, "truncation": 0.01}
    most = {"ema": 1, "seed": 2**63 - 1}
    for name, value in vars(args).items():
        low, high = least.get(name, 0), most.get(name, math.inf)
        if isinstance(value, int | float) and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be from {low} to {high}")
    if args.size not in args.layouts:
        raise UserError(f"--size {args.size}: is one of {[*args.layouts]}")
    args.z_dim = args.embed_dim if args.deep else args.layouts[args.size][3]  # BigGAN-deep: 128 both
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
