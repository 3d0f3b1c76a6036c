"""Projected GAN: "Projected GANs Converge Faster", Axel Sauer, Kashyap Chitta, Jens Müller, Andreas Geiger, NeurIPS
2021, 2111.01007.

The discriminator does not see pixels. Real and drawn pictures go through a frozen feature network; its maps at four
scales are mixed by fixed random projections, across channels (CCM) and scales (CSM), and four small networks judge the
mixtures. Unmixed, a few features would decide, and D win too soon; mixed, FastGAN's generator converges up to 40 times
faster, by a hinge loss, spectral norm and differentiable augmentation: no penalty, no labels.

    python projected_gan.py                  # rendered shapes; first trains a small feature network, without labels
    python projected_gan.py --baseline       # the claim: the same G against a D of pixels too, over seconds of training
    torchrun --nproc_per_node 8 projected_gan.py --data imagenet   # FastGAN at 256x256 on EfficientNet-B0's features
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel, update_bn
from torchvision.models import efficientnet_b0
from torchvision.transforms.functional import rgb_to_grayscale
from torchvision.utils import save_image

from common import fid, linear_probe
from common.data import NAMES, UserError, batches, generator, load

SCRIPT = Path(__file__).stem
LATENTS, AUGMENTATION, COLOURS, PICTURES, FAKES = range(5)  # streams of random numbers

PAPER = dict(  # the authors' code's "fastgan". Their features: EfficientNet-Lite1's, in the code Lite0's; here B0's
    size=256, ngf=128, z_dim=256, lite=False, features="pretrained", feature_steps=5000, cout=64, refine=False,
    separable=False, log_every=100, save_every=1000, fid_features="inception", fid_samples=50_000, fid_split="train",
    probe_samples=50_000, steps=156_250, batch=64,  # 10 million images
    lr_g=2e-4, lr_d=2e-4, betas=(0.0, 0.99))  # the code's 1.88e-4 and 0.9906 for D: left from StyleGAN2  # fmt: skip
SMALL = PAPER | dict(size=32, ngf=64, save_every=2000, probe_samples=0)  # half Diffusion-GAN's width, 1/5 of its steps
DEMO = SMALL | dict(  # five minutes on two CPU cores
    ngf=8, z_dim=64, lite=True, features="trained", feature_steps=120, cout=32, steps=500, batch=32, lr_g=5e-4,
    lr_d=5e-4, log_every=50, save_every=500, fid_features="random", fid_samples=5000, fid_split="test",
    probe_samples=10_000)  # fmt: skip
PRESETS = {"demo": DEMO, "small": SMALL, "paper": PAPER}
WIDTHS = {4: 16, 8: 8, 16: 4, 32: 2, 64: 2, 128: 1, 256: 1 / 2, 512: 1 / 4, 1024: 1 / 8}  # of G's maps, in units of ngf
RESNETS = [((1, 1, 1, 1), False), ((2, 2, 2, 2), False), ((3, 4, 6, 3), False), ((3, 4, 6, 3), True),
           ((3, 4, 23, 3), True), ((3, 8, 36, 3), True)]  # units a stage, are they bottlenecks  # fmt: skip
convolution = lambda cin, cout, kernel=1, stride=1: nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False)
published = lambda weights=None: efficientnet_b0(weights=weights).features[:-1]  # the last layer only widens the map


# ------------------------------------------------------------ G: FastGAN's generator
# same as in biggan.py
def power_iteration(*networks):
    """One power iteration a step, after network.train(). Torch alone would have one a forward pass; so all ranks and
    all accumulated pieces of a step see the same weights."""
    for module in (m for network in networks for m in network.modules() if parametrize.is_parametrized(m)):
        module.parametrizations.train()
        _ = module.weight  # to read it is to iterate
        module.parametrizations.eval()


class UpBlock(nn.Module):
    """Doubles the map, [B, cin, h, w] -> [B, cout, 2h, 2w], by two convolutions with noise behind them; if lite by one,
    without noise. Skip-layer excitation: a map of `small` channels, a sixteenth as wide, weighs the channels."""

    def __init__(self, cin, cout, lite, small=None):
        super().__init__()
        inputs = [cin] if lite else [cin, cout]
        self.convs = nn.ModuleList(spectral_norm(nn.Conv2d(c, 2 * cout, 3, padding=1, bias=False)) for c in inputs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(2 * cout) for _ in inputs)
        self.strengths = nn.ParameterList([] if lite else [torch.zeros(()) for _ in inputs])
        self.excitation = None
        if small:
            squeeze = spectral_norm(nn.Conv2d(small, cout, 4, bias=False))
            layers = nn.AdaptiveAvgPool2d(4), squeeze, nn.SiLU(), spectral_norm(convolution(cout, cout)), nn.Sigmoid()
            self.excitation = nn.Sequential(*layers)

    def forward(self, x, small, noise):
        x = F.interpolate(x, scale_factor=2)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = conv(x)
            if noise:
                x = x + self.strengths[i] * noise.pop(0)
            x = F.glu(norm(x), dim=1)  # the first half of the channels times the sigmoid of the second
        return x * self.excitation(small) if self.excitation else x


class Generator(nn.Module):
    """z [B, z_dim] and noise, a map [B, 1, h, h] for each h in `noisy`, -> images [B, 3, size, size], about [-1, 1]:
    there is no tanh. Without noise it is a function of z alone."""

    def __init__(self, size, ngf=128, z_dim=256, lite=False):
        super().__init__()
        width = {side: int(factor * ngf) for side, factor in WIDTHS.items()}
        first = spectral_norm(nn.ConvTranspose2d(z_dim, 2 * width[4], 4, bias=False))
        self.first = nn.Sequential(first, nn.BatchNorm2d(2 * width[4]), nn.GLU(dim=1))
        self.sides = [side for side in WIDTHS if 4 < side <= size]
        small = {side: width[side // 16] for side in (64, 128, 256, 512)}
        self.blocks = nn.ModuleList(UpBlock(width[s // 2], width[s], lite, small.get(s)) for s in self.sides)
        self.last = spectral_norm(nn.Conv2d(width[size], 3, 3, padding=1))
        self.noisy = [] if lite else [side for side in self.sides for _ in range(2)]  # a map for each convolution

    def forward(self, z, *noise):
        z = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()  # on the hypersphere
        maps, noise = {4: self.first(z[..., None, None])}, list(noise)
        for side, block in zip(self.sides, self.blocks, strict=True):
            maps[side] = block(maps[side // 2], maps.get(side // 16), noise)
        return self.last(maps[side]).float()


# ------------------------------------------------------------ DiffAugment (Zhao et al. 2020, 2006.10738)
def recolour(x, u):
    """Other brightness, saturation and contrast for each of x [B, 3, H, W] in [-1, 1], by u [B, 3] in [0, 1)."""
    brightness, saturation, contrast = u.T[:, :, None, None, None]
    x = x + brightness - 0.5
    x = torch.lerp(x.mean(1, keepdim=True), x, 2 * saturation)
    return torch.lerp(x.mean((1, 2, 3), keepdim=True), x, contrast + 0.5)


def augment(x, u):
    """Colour; translation by up to an eighth of the side; cutout of a square a fifth as wide (once a half), less at the
    borders. For real and drawn pictures alike: x [B, 3, S, S], u [B, 7] in [0, 1). What is missing is 0, mid-grey."""
    x, size = recolour(x, u[:, :3]), x.shape[2]
    reach, hole = int(size / 8 + 0.5), int(size / 5 + 0.5)
    at = torch.arange(size, device=x.device)
    source = at + (u[:, 3:5] * (2 * reach + 1)).long()[..., None] - reach  # [B, 2, S]: rows and columns
    start = (u[:, 5:] * (size + 1 - hole % 2)).long()[..., None] - hole // 2
    inside, hit = (source >= 0) & (source < size), (at >= start) & (at < start + hole)
    kept = inside[:, 0, :, None] & inside[:, 1, None] & ~(hit[:, 0, :, None] & hit[:, 1, None])  # [B, S, S]
    rows, columns = source.clamp(0, size - 1).unbind(1)
    picture = torch.arange(len(x), device=x.device)[:, None, None]
    return x.movedim(1, -1)[picture, rows[:, :, None], columns[:, None]].movedim(-1, 1) * kept[:, None]


# ------------------------------------------------------------ F: the feature network
class Features(nn.Module):
    """F: x [B, 3, S, S] in [-1, 1] -> a trunk's maps at its last four resolutions, [B, C, h, h] each; `shapes`: their
    (C, h). Smaller pictures are enlarged to `side`. `view`: "imagenet" normalises as published networks want it, "grey"
    as byol.py --grey does. Frozen: always in evaluation mode, without gradients but those that pass to the picture."""

    def __init__(self, trunk, side, view="plain"):
        super().__init__()
        self.trunk, self.side, self.view, self.ends = trunk, side, view, range(len(trunk))
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        self.register_buffer("imagenet", torch.tensor([mean, std])[..., None, None], persistent=False)
        self.eval().requires_grad_(False)
        shapes = [tuple(f.shape[1:3]) for f in self(torch.zeros(1, 3, side, side))]
        self.ends = [i for i, (a, b) in enumerate(pairwise([*shapes, (0, 0)])) if b[1] < a[1]][-4:]  # before it shrinks
        self.shapes, sides = [shapes[i] for i in self.ends], [shapes[i][1] for i in self.ends]
        if sides != [sides[-1] << i for i in (3, 2, 1, 0)] or sides[-1] < 2:
            raise UserError(f"the feature network's maps are {sides} pixels wide: four are needed, halved down to >= 2")

    def train(self, mode=True):
        return super().train(False)

    def forward(self, x):
        if x.shape[2] < self.side:
            x = F.interpolate(x, size=(self.side, self.side), mode="bilinear", align_corners=False)
        if self.view == "imagenet":
            x = ((x + 1) / 2 - self.imagenet[0]) / self.imagenet[1]
        elif self.view == "grey":
            x = rgb_to_grayscale((x + 1) / 2)
            x = (x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True) + 1e-3)
        maps = [x := layer(x) for layer in self.trunk]
        return [maps[i] for i in self.ends]


def small_trunk(widths=(3, 24, 40, 80, 160)):
    """What the demo trains on the spot: [B, 3, S, S] -> [B, 160, S/16, S/16]; each stage halves the map."""
    stages = [(convolution(cin, cout, 3, 2), convolution(cout, cout, 3)) for cin, cout in pairwise(widths)]
    layers = [m for stage in stages for conv in stage for m in (conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU())]
    return nn.Sequential(*layers)


# same as in biggan.py
class Residual(nn.Module):  # x -> skip(x) + branch(x)
    def __init__(self, branch, skip=()):
        super().__init__()
        self.branch, self.skip = nn.Sequential(*branch), nn.Sequential(*skip)

    def forward(self, x):
        return self.skip(x) + self.branch(x)


def resnet_trunk(units, bottleneck, width, colours, kernel, stride, before):
    """The layers, in their order, of torchvision's and byol.py's ResNets, which have batch norm and ReLU behind each
    convolution, or of bigbigan.py's, which have them before it."""
    norm, cin = nn.BatchNorm2d, width
    layers = [convolution(colours, width, kernel, stride), *([] if before else [norm(width), nn.ReLU()])]
    layers += [nn.MaxPool2d(3, 2, 1)] if kernel == 7 else []
    for stage, count in enumerate(units):
        mid = width << stage
        for stride in [2 if stage else 1] + [1] * (count - 1):
            convs = [convolution(cin, mid, 3, stride), convolution(mid, mid, 3)]
            if bottleneck:
                convs = [convolution(cin, mid), convolution(mid, mid, 3, stride), convolution(mid, 4 * mid)]
            cout = convs[-1].out_channels
            skip = [convolution(cin, cout, 1, stride)] if stride > 1 or cin != cout else []
            if before:
                first, *branch = [m for c in convs for m in (nn.Sequential(norm(c.in_channels), nn.ReLU()), c)]
                layers += [first, Residual(branch, skip)] if skip else [Residual([first, *branch])]
            else:
                branch = [m for c in convs for m in (c, norm(c.out_channels), nn.ReLU())][:-1]
                layers += [Residual(branch, [*skip, norm(cout)] if skip else []), nn.ReLU()]
            cin = cout
    return nn.Sequential(*layers, *([norm(cin), nn.ReLU()] if before else []))


def feature_network(args, fresh=False):
    """What --features says. A FILE: checkpoint.pt of byol.py (f) or bigbigan.py (E; the average lacks statistics), or
    torchvision's or SwAV's weights. The tensors' shapes tell which. `fresh`: published weights are fetched."""
    heads = ("fc.", "classifier.", "features.8.", "projection_head.", "prototypes.")
    used = lambda name: not name.endswith("_tracked") and not name.removeprefix("module.").startswith(heads)
    if args.features in ("trained", "random"):
        return Features(small_trunk(), args.size)
    try:
        if args.features == "pretrained":
            return Features(published("IMAGENET1K_V1" if fresh else None), max(args.size, 224), "imagenet")
        state = torch.load(args.features, map_location="cpu", weights_only=True)
        script, config = state.get("script"), state.get("config", {})
        part, prefix = {"bigbigan": ("E", "trunk."), "byol": ("online", "f.layers.")}.get(script, ("state_dict", ""))
        weights = [v for k, v in state.get(part, state).items() if k.startswith(prefix) and used(k)]
        width, colours, kernel, _ = weights[0].shape
        stride = 2 if kernel == 7 else config.get("stride", 2 if config.get("encoder") == "resnet10" else 1)
        stem = width, colours, kernel, stride, script == "bigbigan"
        side = max(args.size, config.get("encoder_size", config.get("size", 224)))
        view = "plain" if script == "bigbigan" else "grey" if colours == 1 else "imagenet"
        for trunk in chain([published()], (resnet_trunk(*kind, *stem) for kind in RESNETS)):
            mine = {k: v for k, v in trunk.state_dict().items() if used(k)}
            if [v.shape for v in mine.values()] == [v.shape for v in weights]:
                trunk.load_state_dict(dict(zip(mine, weights, strict=True)), strict=False)
                return Features(trunk, side, view)
        raise UserError("the file holds no such network")
    except Exception as error:  # no connection, or a foreign file, which raises half a dozen kinds
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"--features {args.features}: {why}; or trained, random, a FILE that --help names") from error


# ------------------------------------------------------------ the projections and D
class Projection(nn.Module):
    """Maps f0..f3 -> p0..p3, each twice as wide, with cout * (1, 1, 2, 4) channels. Convolutions that are never trained
    and nothing else: cross-channel mixing (CCM), one a map; cross-scale mixing (CSM), from the coarsest map up. refine:
    with 3x3 convolutions in CSM. The paper's text has them, and He's start; its code, followed here, has neither."""

    def __init__(self, channels, cout=64, refine=False):
        super().__init__()
        wide = [cout << i for i in range(4)]
        mix = lambda width: Residual([nn.Conv2d(width, width, 3, padding=1)]) if refine else nn.Identity()
        ccm = [nn.Sequential(nn.Conv2d(c, width, 1), mix(width)) for c, width in zip(channels, wide, strict=True)]
        ccm[3] = ccm[3][:1]  # there is nothing yet to be added to the coarsest map
        csm = [nn.Sequential(mix(width), nn.Conv2d(width, max(cout, width // 2), 1)) for width in wide]
        self.ccm, self.csm = nn.ModuleList(ccm), nn.ModuleList(csm)
        self.requires_grad_(False)

    def forward(self, maps):
        p = []
        for f, ccm, csm in reversed(list(zip(maps, self.ccm, self.csm, strict=True))):
            x = csm(ccm(f) + p[0] if p else ccm(f))  # before it grows, not after: the same, at a quarter of the cost
            p.insert(0, F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True))
        return p


def head(widths, separable=False, stem=()):
    """A small discriminator, [B, widths[0], h, h] -> logits [B, 1, h', h']: each further width halves the map. Its
    second half is the last convolution."""
    layers = list(stem)
    for cin, cout in pairwise(widths):
        convs, pool = [nn.Conv2d(cin, cout, 4, 2, 1)], []
        if separable:
            convs = [nn.Conv2d(cin, cin, 3, padding=1, groups=cin, bias=False), convolution(cin, cout)]
            pool = [nn.AvgPool2d(2)]
        layers += [*map(spectral_norm, convs), nn.BatchNorm2d(cout), nn.LeakyReLU(0.2), *pool]
    return nn.Sequential(nn.Sequential(*layers), spectral_norm(nn.Conv2d(widths[-1], 1, 4, bias=False)))


class Discriminator(nn.Module):
    """x [B, 3, S, S] -> the logits of all heads side by side, [B, N]. Only the heads are trained: D0..D3 on p0..p3, as
    deep whatever the resolution, but for the smallest maps. Without features one head sees x, halved down to 4x4."""

    def __init__(self, features, cout=64, refine=False, separable=False, size=0):
        super().__init__()
        self.features = self.projection = None
        if features:
            self.features, self.projection = features, Projection([c for c, _ in features.shapes], cout, refine)
            widths = [cout * w for w in (1, 1, 2, 4, 8)[: 5 if features.shapes[3][1] >= 4 else 4]]
            self.heads = nn.ModuleList(head(widths[k:], separable) for k in range(4))
        else:
            widths = [cout * min(8, 1 << i) for i in range(size.bit_length() - 2)]
            stem = spectral_norm(nn.Conv2d(3, cout, 3, padding=1)), nn.LeakyReLU(0.2)
            self.heads = nn.ModuleList([head(widths, separable, stem)])

    def maps(self, x):
        return self.projection(self.features(x)) if self.features else [x]

    def forward(self, x):
        return torch.cat([head(p).flatten(1) for head, p in zip(self.heads, self.maps(x), strict=True)], 1).float()


# ------------------------------------------------------------ the objective
def discriminator_loss(real, fake):
    """L_D: the hinge, of logits [B, N] of real and drawn pictures; the mean over the heads, for the paper's sum."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


generator_loss = lambda fake: -fake.mean()  # L_G
# beta of the average, when so many images were seen: a half-life of 5 % of them, at most 10,000 / 32 batches
ema_decay = lambda images, batch: 0.5 ** (batch / max(min(batch * 10_000 / 32, 0.05 * images), 1e-8))


def contrast(a, b, temperature=0.2):
    """NT-Xent (SimCLR, Chen et al. 2020, 2002.05709) of codes [B, D] of two views: each must find the other."""
    codes = F.normalize(torch.cat([a, b]), dim=1)
    likeness = (codes @ codes.T / temperature).fill_diagonal_(-math.inf)
    return F.cross_entropy(likeness, torch.arange(len(codes), device=a.device).roll(len(a)))


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
def pretrain(args, data, trunk, steps):
    """A feature network's weights where no file has any: SimCLR, without labels, on crops, flips, colours; a function
    of the seed, on all ranks the same. In no steps: batch norm's statistics alone."""
    torch.manual_seed(args.seed)
    project = nn.Sequential(nn.Linear(160, 160), nn.ReLU(), nn.Linear(160, 64)).to(args.device)
    optimizer = torch.optim.AdamW([*trunk.train().requires_grad_(True).parameters(), *project.parameters()], 2e-3)
    stream = lambda crop: batches(data, 256, args.seed, crop=crop, device=args.device, rank=0, world=1)
    if steps and args.rank == 0:
        print(f"no features are given: a small network is trained first, without labels, {steps} steps", flush=True)
    for step, (x, _, _) in enumerate(islice(stream((2, args.size, (0.3, 1.0), (3 / 4, 4 / 3), "bilinear")), steps)):
        u = torch.rand(512, 3, generator=generator(args.seed, COLOURS, step, args.device), device=args.device)
        x = recolour(x.flatten(0, 1), u).contiguous(memory_format=torch.channels_last)
        codes = project(trunk(x).mean((2, 3)))
        optimizer.zero_grad()
        contrast(codes[::2], codes[1::2]).backward()
        optimizer.step()
    update_bn(islice(stream(None), 10), trunk)
    trunk.eval().requires_grad_(False).zero_grad()
    for tensor in trunk.state_dict().values() if args.world > 1 else ():
        dist.broadcast(tensor, 0)  # on CUDA they may differ by a bit


def build(args, fresh=False):
    """G and D with their first weights, a function of the seed: every rank starts from the same."""
    torch.manual_seed(args.seed)
    G = Generator(args.size, args.ngf, args.z_dim, args.lite)
    args.F = None if args.plain else vars(args).get("F") or feature_network(args, fresh)  # never a second copy
    D = Discriminator(args.F, args.cout, args.refine, args.separable, args.size)
    return [network.to(args.device, memory_format=torch.channels_last) for network in (G, D)]


def latents(args, G, n, *key):
    """z ~ N(0, I) [n, z_dim] and G's noise maps, functions of the seed and the key."""
    draw, shapes = generator(args.seed, *key, args.device), [(n, args.z_dim)] + [(n, 1, side, side) for side in G.noisy]
    return [torch.randn(shape, generator=draw, device=args.device) for shape in shapes]


def train(args):
    if args.baseline:  # first the same with a D that sees pixels, in a folder of its own
        changes = {"plain": True, "baseline": False, "out": args.out / "plain", "config": args.config | {"plain": True}}
        train(argparse.Namespace(**vars(args) | changes))
    data = load(args.data, "train", args.size, args.root, args.skip_broken)
    G, D = build(args, fresh=not (args.out / "checkpoint.pt").exists())
    average = lambda old, new, _: torch._foreach_lerp_(old, new, 1 - ema_decay(run.step * args.batch, args.batch))
    G_ema = AveragedModel(G, multi_avg_fn=average).eval().requires_grad_(False)
    rates = ((G, args.lr_g), (D.heads, args.lr_d))
    opt_G, opt_D = (torch.optim.Adam(network.parameters(), lr, args.betas, fused=True) for network, lr in rates)
    run = Run(args, G=G, D=D, G_ema=G_ema, opt_G=opt_G, opt_D=opt_D)
    reals = batches(data, args.batch, args.seed, run.step, args.accumulate, device=args.device)
    if run.step == 0 and D.features and args.features in ("trained", "random"):
        pretrain(args, data, D.features.trunk, args.feature_steps if args.features == "trained" else 0)
    for network in (G, D) if args.compile else ():
        network.compile()
    autocast = torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.precision == "bf16")

    def draw(phase):  # for each piece of this rank, cut from the whole's: z, noise, numbers for two augmentations
        n = 2 * run.step + phase
        u = torch.rand(args.batch, 14, generator=generator(args.seed, AUGMENTATION, n, args.device), device=args.device)
        whole = *latents(args, G, args.batch, LATENTS, n), *u.chunk(2, dim=1)
        return zip(*(part.chunk(args.world * args.accumulate)[args.rank :: args.world] for part in whole), strict=True)

    def descend(optimizer, network):
        average_gradients(args, network)
        for p in network.parameters():
            p.grad.nan_to_num_(0.0, 1e5, -1e5)
        optimizer.step()

    while run.step < args.steps:
        D.heads.requires_grad_(False)
        power_iteration(G, D.heads)
        opt_G.zero_grad()
        for *codes, u, _ in draw(0):  # G first
            with autocast:
                loss_g = generator_loss(D(augment(G(*codes), u)))
            (loss_g / args.accumulate).backward()
        descend(opt_G, G)
        D.heads.requires_grad_(True)
        power_iteration(G, D.heads)
        opt_D.zero_grad()
        for *codes, u, v in draw(1):
            x, _, _ = next(reals)
            with autocast:
                with torch.no_grad():
                    x_hat = G(*codes)
                fake, real = D(augment(x_hat, u)), D(augment(x, v))  # apart: batch norm must not see both at once
                loss_d = discriminator_loss(real, fake)
            (loss_d / args.accumulate).backward()
        descend(opt_D, D.heads)
        G_ema.update_parameters(G)  # its buffers, those of batch norm and spectral norm, are copies
        run.step += 1

        if run.every(args.log_every):  # gap: each head's, the finest map first; a head at 0 is blind
            gaps = (real - fake).unflatten(1, (len(D.heads), -1)).mean((0, 2))
            run.log(loss_d=loss_d, loss_g=loss_g, lr=args.lr_g, **{f"gap_{k}": gap for k, gap in enumerate(gaps)})
        if run.every(args.save_every) or run.every(args.eval_every):
            run.save()
            picture(args, "samples.png", G_ema(*latents(args, G, 64, PICTURES, 0)))
        if run.every(args.eval_every):
            seconds, paused = time.time() - run.began, time.time()
            name, value = next(iter(judge_samples(args, G_ema.module, full=False).items()))
            run.began += time.time() - paused  # seconds are training's alone, that of the features included
            run.log(seconds=seconds, **{name: value})
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
    """Averaged G, D, D's heads before training, and the checkpoint's step and seconds: the rest of it is not kept."""
    name = "best.pt" if args.best else "checkpoint.pt"
    if (state := read_checkpoint(args, name)) is None:
        raise UserError(f"there is no {name} in {args.out}: train first, or give the run's --out")
    G, D = build(args)
    untrained, average = AveragedModel(D.heads).module, AveragedModel(G)
    average.load_state_dict(state["G_ema"])
    D.load_state_dict(state["D"])
    return average.module.eval().requires_grad_(False), D.eval(), untrained, state["step"], state["seconds"]


def sample(args):
    """samples.png; interpolations.png: eight rows, each between two latents."""
    G, *_ = restore(args)
    z, *noise = latents(args, G, 64, PICTURES, 0)
    rows = torch.lerp(z[:16:2, None], z[1:16:2, None], torch.linspace(0, 1, 10, device=z.device)[:, None])
    picture(args, "samples.png", G(z, *noise))
    picture(args, "interpolations.png", G(rows.flatten(0, 1), *(part[:1].expand(80, -1, -1, -1) for part in noise)), 10)


def judge_samples(args, G, full=True):
    data = load(args.data, args.fid_split, args.size, args.root, args.skip_broken)
    draw = lambda chunk, n: G(*latents(args, G, n, FAKES, chunk))
    return fid.evaluate(draw, data, args.fid_samples, args.fid_features, args.device, args.fid_weights, full)


def evaluate(args):
    """metrics.json: the linear probe of D's heads and of bare features, FID and its sisters, --baseline's over time."""
    G, D, untrained, step, seconds = restore(args)
    device = torch.cuda.get_device_name() if "cuda" in args.device else f"cpu, {torch.get_num_threads()} threads"
    metrics = {"command": " ".join(sys.argv), "device": device, "torch": torch.__version__, "steps": step}
    metrics |= {"images": step * args.batch, "seconds": round(seconds, 1)}
    metrics["parameters"] = {k: sum(p.numel() for p in m.parameters()) for k, m in (("G", G), ("D", D.heads))}
    for name, folder in {"projected": args.out, "plain": args.out / "plain"}.items() if args.baseline else ():
        log = (folder / "log.jsonl").read_text().splitlines()
        metrics[name] = [json.loads(row) for row in log if '"seconds"' in row]

    def probe():
        n = args.probe_samples or None
        read = lambda split, n: load(args.data, split, args.size, args.root, args.skip_broken, slice(n))
        data = read("train", n), read("test", n and n // 2)
        pool = lambda maps: torch.cat([f.mean((2, 3)) for f in maps], 1)
        read_heads = lambda heads, x: pool(head[0](p) for head, p in zip(heads, D.maps(x), strict=True))
        untrained.forward = partial(read_heads, untrained)  # without F, whose batch norms are not to be calibrated
        found = linear_probe.evaluate(partial(read_heads, D.heads), *data, untrained, args.device)
        if D.features:  # the heads' own is only what they add: published features have seen ImageNet's labels
            bare = [linear_probe.extract(lambda x: pool(D.features(x)), part, args.device) for part in data]
            found |= {f"bare_features_probe_{key}": value for key, value in linear_probe.probe(*bare).items()}
        return found

    for measure in (probe, lambda: judge_samples(args, G)):
        try:
            metrics |= measure()
        except UserError as error:  # no labels, no Inception weights, no room for a cache: the run keeps the rest
            flags = " ".join(word for word in sys.argv[1:] if word not in ("train", "eval"))
            print(f"{SCRIPT}.py: not measured: {error}; then: python {sys.argv[0]} eval {flags}", file=sys.stderr)
    if args.rank == 0:
        (args.out / "metrics.json.tmp").write_text(json.dumps(metrics, indent=1) + "\n")
        os.replace(args.out / "metrics.json.tmp", args.out / "metrics.json")
        print(f"{args.out} has the pictures, and metrics.json, where among others:")
        for k in (k for k in metrics if k.endswith("top1") or k.startswith(("fid", "fd_"))):
            print(f"  {k} {metrics[k]:.4g}")
        for k in ("plain", "projected") if args.baseline else ():  # rows: step, seconds, distance, speed
            print(f"  {k}:", ", ".join("{1:.0f} s {2:.4g}".format(*row.values()) for row in metrics[k]))
        print("top1: accuracy with D's pooled heads, beside yardsticks; fid, fd_random (NOT FID): 0 is best.")


# ------------------------------------------------------------ the command line
FLAGS = {  # those whose defaults are in PRESETS
    "size": "side of the images, pixels", "ngf": "width of G", "z_dim": "width of z", "cout": "width of projections",
    "features": "pretrained (torchvision's, fetched once), trained (a small network, here, without labels), random, or "
                "a FILE: checkpoint.pt of byol.py or bigbigan.py, or torchvision's EfficientNet-B0 or a ResNet",
    "feature_steps": "steps of --features trained", "batch": "images a step, over all ranks and pieces",
    "steps": "training steps; more of them extend a finished run", "fid_samples": "samples that FID is taken of",
    "lr_d": "learning rate of D", "lr_g": "learning rate of G", "log_every": "steps between two lines of log.jsonl",
    "save_every": "steps between checkpoints, each with a samples.png", "fid_split": "FID's real images",
    "probe_samples": "training images of the linear probe, with half as many test images; 0: all",
    "fid_features": "random needs no weights, gives fd_random"}  # fmt: skip
CHOICES = {"fid_features": ("inception", "random"), "fid_split": ("train", "test")}
FREE = (  # what may differ between two runs of one checkpoint: beginnings of names
    "command", "root", "out", "steps", "accumulate", "device", "precision", "compile", "skip_broken", "best", "log_",
    "save_", "eval_", "fid_", "probe_", "baseline")  # fmt: skip


def parse():
    """The flags; their defaults are those of the preset that --data or --preset choose."""
    formats = (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=type("Format", formats, {}))
    parser.error = lambda message: parser.exit(2, f"{SCRIPT}.py: error: {message}\n")
    add, cuda, switch = parser.add_argument, torch.cuda.is_available(), argparse.BooleanOptionalAction
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
    add("--lite", action=switch, help="G has one convolution a block, not two")
    add("--separable", action=switch, help="D's heads have separable convolutions")
    add("--refine", action=switch, help="cross-scale mixing has the 3x3 convolutions of the paper's text")
    add("--plain", action="store_true", help="ablation: D sees pixels, not projected features")
    add("--baseline", action="store_true", help="first the same with --plain, in OUT/plain; FID of both over seconds")
    for name, text in FLAGS.items():
        add(f"--{name.replace('_', '-')}", type=type(PAPER[name]), choices=CHOICES.get(name), help=text)
    asked, _ = parser.parse_known_args([word for word in sys.argv[1:] if word not in ("-h", "--help")])
    usual = {"imagenet": "paper", "shapes": "demo", "dsprites": "demo", "mnist": "demo", "fashion_mnist": "demo"}
    preset = asked.preset or usual.get(asked.data, "small")
    parser.set_defaults(preset=preset, out=Path("runs", f"{SCRIPT}-{Path(asked.data).name}"), **PRESETS[preset])
    args = parser.parse_args()
    least = dict.fromkeys(("steps", "batch", "accumulate", "log_every", "save_every", "fid_samples", "z_dim"), 1)
    least |= {"cout": 1, "feature_steps": 1, "ngf": max(1, 1 / WIDTHS.get(args.size, 1))}
    most = {"seed": 2**63 - 1}
    for name, value in vars(args).items():
        low, high = least.get(name, 0), most.get(name, math.inf)
        if isinstance(value, int | float) and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be from {low} to {high}")
    if args.size not in WIDTHS or args.size < 32:
        raise UserError(f"--size {args.size}: must be one of {[side for side in WIDTHS if side >= 32]}")
    args.eval_every = args.eval_every or args.baseline * max(1, args.steps // 8)
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
