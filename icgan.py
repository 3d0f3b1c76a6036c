"""IC-GAN: "Instance-Conditioned GAN", Arantxa Casanova, Marlène Careil, Jakob Verbeek, Michał Drożdżal, Adriana
Romero-Soriano, NeurIPS 2021, 2109.05070.

The data as a mixture of small, overlapping densities, one around each training image: p(x) = mean_i p(x | h_i), h_i =
f(x_i) with a frozen feature network f. G draws from h_i where BigGAN draws from a class; what D sees as real beside h_i
are the nearest neighbours of x_i among the features. No labels, no clusters; and as h is only a vector, a trained G
also draws around images that it has never seen, even those of another data set.

    python icgan.py                                        # rendered shapes, five CPU minutes: pictures and numbers
    python icgan.py sample --condition DIR                 # draws around your own pictures
    torchrun --nproc_per_node 8 icgan.py --data imagenet   # the paper's model at 128x128
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import signal
import sys
import time
from collections import namedtuple
from contextlib import suppress
from itertools import chain, islice, pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torchvision.models import resnet50
from torchvision.transforms.functional import rgb_to_grayscale
from torchvision.utils import save_image

from common import fid, linear_probe
from common.data import NAMES, UserError, ahead, batches, generator, indices, load, uniforms

SCRIPT = Path(__file__).stem
LATENTS, INSTANCES, PAIRS, PICTURES, FAKES, STORED, CENTRES, COLOURS = range(8)  # streams of random numbers

LAYOUTS = {  # BigGAN's, by image size: G's channels on the 4x4 map and after each block, in units of ch; D's after each
    # block, and how many blocks halve the map; width of z; size of the map with attention
    32: ((4, 4, 4, 4), (4, 4, 4, 4), 2, 128, 0), 64: ((16, 16, 8, 4, 2), (1, 2, 4, 8, 16), 4, 120, 32),
    128: ((16, 16, 8, 4, 2, 1), (1, 2, 4, 8, 16, 16), 5, 120, 64),
    256: ((16, 16, 8, 8, 4, 2, 1), (1, 2, 4, 8, 8, 16, 16), 6, 119, 64)}  # fmt: skip
PAPER = dict(  # ImageNet at 128x128 (Table 1); what the paper does not state is from the authors' configuration files.
    # It takes f from SwAV, without labels (--features FILE); with --class-conditional from the supervised ResNet-50
    size=128, ch=96, layouts=LAYOUTS, hierarchical=True, init_std=0.0,  # 0: orthogonal weights
    features="pretrained", feature_steps=5000, embed_dim=512, class_dim=128, h_gain=1.0, k=50, flip_instances=True,
    steps=1_876_000, batch=2048, d_steps=1, lr_d=1e-4, lr_g=4e-5, betas=(0.0, 0.999), adam_eps=1e-6, sn_eps=1e-6,
    ema=0.9999, ema_start=20_000, stored=1000, log_every=100, save_every=1000,  # 3000 epochs, or till FID stands still
    fid_features="inception", fid_samples=50_000, fid_split="test", probe_samples=50_000)  # fmt: skip
SIZES = {64: dict(ch=64, batch=256, lr_g=1e-4), 256: dict(flip_instances=False)}  # what these sizes change in PAPER
SMALL = PAPER | dict(  # the CIFAR-10 recipe of BigGAN's code with h for the class: the paper has no 32x32 model
    size=32, ch=64, hierarchical=False, init_std=0.02, steps=125_000, batch=50, d_steps=4, lr_d=2e-4, lr_g=2e-4,
    adam_eps=1e-8, sn_eps=1e-8, ema_start=1000, stored=0, save_every=2000, fid_split="train",
    probe_samples=0)  # fmt: skip
DEMO = SMALL | dict(  # for two CPU cores, where torchvision's networks would take an hour; not tuned
    layouts=LAYOUTS | {32: ((4, 4, 2, 1), (1, 2, 4, 4), 3, 32, 0), 64: ((4, 4, 4, 2, 1), (1, 2, 4, 4, 4), 4, 40, 0)},
    ch=16, hierarchical=True, init_std=0.0, features="trained", feature_steps=120, embed_dim=64, class_dim=32,
    h_gain=11.0, steps=650, batch=32, d_steps=1, lr_d=1e-3, lr_g=4e-4, betas=(0.0, 0.99), sn_eps=1e-6, ema=0.995,
    ema_start=200, stored=200, log_every=50, save_every=400, fid_features="random", fid_samples=5000, fid_split="test",
    probe_samples=10_000)  # fmt: skip
PRESETS = {"demo": DEMO, "small": SMALL, "paper": PAPER}
RESNETS = [((1, 1, 1, 1), False), ((2, 2, 2, 2), False), ((3, 4, 6, 3), False), ((3, 4, 6, 3), True),
           ((3, 4, 23, 3), True), ((3, 8, 36, 3), True)]  # units a stage, are they bottlenecks  # fmt: skip
convolution = lambda cin, cout, kernel=1, stride=1: nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False)
published = lambda weights=None: nn.Sequential(*list(resnet50(weights=weights).children())[:-2])
read = lambda args, name, split, n=None: load(name, split, args.size, args.root, args.skip_broken, slice(n))


# ------------------------------------------------------------ f: the feature network
class Features(nn.Module):
    """f: x [B, 3, S, S] in [-1, 1], resized to `side` -> h [B, dim], |h| = 1: the mean of a trunk's last map. `view`:
    "imagenet" or "grey", normalised as published networks or byol.py --grey want it. Frozen, in evaluation mode."""

    def __init__(self, trunk, side, view="plain"):
        super().__init__()
        self.trunk, self.side, self.view = trunk, side, view
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        self.register_buffer("imagenet", torch.tensor([mean, std])[..., None, None], persistent=False)
        self.eval().requires_grad_(False)
        self.dim = self(torch.zeros(1, 3, side, side)).shape[1]

    def train(self, mode=True):
        return super().train(False)

    def forward(self, x):
        x = F.interpolate(x, self.side, mode="bicubic") if x.shape[2] != self.side else x  # the authors' recipe
        if self.view == "imagenet":
            x = ((x + 1) / 2 - self.imagenet[0]) / self.imagenet[1]
        elif self.view == "grey":
            x = rgb_to_grayscale((x + 1) / 2)
            x = (x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True) + 1e-3)
        maps = self.trunk(x.contiguous(memory_format=torch.channels_last))
        return F.normalize(maps.mean((2, 3), dtype=torch.float32))


# same as in projected_gan.py
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


# same as in projected_gan.py
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


# same as in projected_gan.py
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


# same as in projected_gan.py
def recolour(x, u):
    """Other brightness, saturation and contrast for each of x [B, 3, H, W] in [-1, 1], by u [B, 3] in [0, 1)."""
    brightness, saturation, contrast = u.T[:, :, None, None, None]
    x = x + brightness - 0.5
    x = torch.lerp(x.mean(1, keepdim=True), x, 2 * saturation)
    return torch.lerp(x.mean((1, 2, 3), keepdim=True), x, contrast + 0.5)


# same as in projected_gan.py
def contrast(a, b, temperature=0.2):
    """NT-Xent (SimCLR, Chen et al. 2020, 2002.05709) of codes [B, D] of two views: each must find the other."""
    codes = F.normalize(torch.cat([a, b]), dim=1)
    likeness = (codes @ codes.T / temperature).fill_diagonal_(-math.inf)
    return F.cross_entropy(likeness, torch.arange(len(codes), device=a.device).roll(len(a)))


# same as in projected_gan.py
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


# ------------------------------------------------------------ instances and their neighbours
# h [N, D] of the training pictures, or [2N, D], the second half of mirror images; neighbours [N, k], nearest first;
# pool [M], the numbers of those that are sampled around; labels [N], where they are a condition too
Instances = namedtuple("Instances", "h neighbours pool labels")


@fid.full_precision()
def nearest(h, k, rows=1000):
    """The k nearest of each row of h [N, D] among all others by cosine, nearest first: int32 [N, k], exact."""
    h, found = F.normalize(h), []
    for start in range(0, len(h), rows):
        cosine = h[start : start + rows] @ h.T
        cosine.diagonal(start).fill_(-math.inf)  # not itself, by its number: a copy of it may well come first
        found.append(cosine.topk(k).indices.int())
    return torch.cat(found)


@fid.full_precision()
def central(x, n, seed, iterations=100):
    """k-means with n centres: the numbers of the rows of x [N, D] that are nearest to them, int64 [n at most]."""
    centres = x[torch.randperm(len(x), generator=generator(seed, CENTRES, 0))[:n].to(x.device)]
    for _ in range(iterations):
        owner = torch.cdist(x, centres).argmin(1)
        size = owner.bincount(minlength=n)[:, None]
        means = torch.zeros_like(centres).index_add_(0, owner, x) / size
        centres = torch.where(size > 0, means, centres)  # one that owns nothing stays
    return torch.cdist(x, centres).argmin(0).unique()


def prepare(args, f, data, stored=0):
    """The Instances of the training set (section 3), computed once; the pool has so many of them, or all."""
    weights = hashlib.sha256(b"".join(value.cpu().numpy().tobytes() for value in f.state_dict().values())).hexdigest()
    n, k = len(data), min(args.k, len(data) - 1)
    if n < 2:
        raise UserError(f"{data.name} has a single picture, which has no neighbours: give a folder with more of them")

    def keep(name, make):  # a tensor from a file, mapped into memory; where a rank lacks the file all of them make it
        path = data.cache / f"{name}-{data.key}-{weights[:16]}.pt"
        there = torch.tensor(float(path.exists()), device=args.device)
        if args.world > 1:
            dist.all_reduce(there, dist.ReduceOp.MIN)
        made = None if there else make().cpu()
        if made is not None and os.environ.get("LOCAL_RANK", "0") == "0":
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(made, temporary := f"{path}.tmp-{os.getpid()}")
            os.replace(temporary, path)
        if args.world > 1:
            dist.barrier()
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    sides = [f, lambda x: f(x.flip(-1))][: 1 + (args.flip_instances and data.flip)]
    embed = lambda: torch.cat([linear_probe.extract(side, data, args.device)[0] for side in sides])  # all ranks share
    h = keep(f"features-{len(sides)}", embed)
    near, pool = keep(f"neighbours-{k}", lambda: nearest(h[:n].to(args.device), k)), torch.arange(n)
    if 0 < stored < n:
        pool = keep(f"stored-{stored}-{args.seed}", lambda: central(h[:n].to(args.device), stored, args.seed))
    return Instances(h, near, pool, data.labels if args.classes else None)


# ------------------------------------------------------------ G: BigGAN's generator, with h for the class
# same as in biggan.py
def spectral(layer, eps):
    """Orthogonal start; then W / sigma(W), sigma the largest singular value (Miyato et al. 2018); eps None: no norm."""
    nn.init.orthogonal_(layer.weight)
    return layer if eps is None else parametrizations.spectral_norm(layer, eps=eps)


# same as in biggan.py
def power_iteration(*networks):
    """One power iteration a step, after network.train(). Torch alone would have one a forward pass; so all ranks and
    all accumulated pieces of a step see the same weights."""
    for module in (m for network in networks for m in network.modules() if parametrize.is_parametrized(m)):
        module.parametrizations.train()
        _ = module.weight  # to read it is to iterate
        module.parametrizations.eval()


# same as in biggan.py
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


# same as in biggan.py
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
    """z [B, z_dim], h [B, h_dim] with |h| = 1, and with classes y [B] -> images [B, 3, S, S] in [-1, 1]. h acts through
    the blocks' batch norms alone, their condition being [embedding of y, map of h, chunk of z]. The first chunk of z or
    without hierarchy all of z makes the 4x4 map. h_gain above 1, unlike the paper's, lets h be heard from the start."""

    def __init__(self, widths, z_dim, h_dim, embed_dim=512, classes=0, class_dim=128, hierarchical=True, attention=0,
                 h_gain=1.0, eps=1e-6):  # fmt: skip
        super().__init__()
        self.chunks, self.h_gain = len(widths) if hierarchical else 1, h_gain
        chunk = z_dim // self.chunks
        width = class_dim * (classes > 0) + embed_dim + chunk * hierarchical
        affine = lambda channels: spectral(nn.Linear(width, channels, bias=False), eps)
        self.map = spectral(nn.Linear(h_dim, embed_dim), eps)
        self.embed = spectral(nn.Embedding(classes, class_dim), None) if classes else None
        self.first = nn.Sequential(spectral(nn.Linear(chunk, 16 * widths[0]), eps), nn.Unflatten(1, (widths[0], 4, 4)))
        shapes = enumerate(pairwise(widths))
        self.blocks = nn.ModuleList(GBlock(*shape, affine, 8 << i == attention, eps) for i, shape in shapes)
        last = spectral(nn.Conv2d(widths[-1], 3, 3, padding=1), eps)
        self.last = nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU(), last)

    def forward(self, z, h, y=None):
        c = self.map(self.h_gain * h)
        c = c if y is None else torch.cat([self.embed(y), c], 1)
        z = z.chunk(self.chunks, dim=1)
        x = self.first(z[0])
        for i, block in enumerate(self.blocks, start=1):
            x = block(x, torch.cat([c, z[i]], 1) if self.chunks > 1 else c)
        return torch.tanh(self.last(x).float())


# ------------------------------------------------------------ D: BigGAN's, projecting on h
# same as in biggan.py
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


class Discriminator(nn.Module):
    """x [B, 3, S, S], h [B, h_dim], and with classes y [B] -> scores [B] of x as a picture from the neighbourhood of h:
    w . phi + b + v . phi, where v is a map of h; with classes half an embedding of y, half a map of h."""

    def __init__(self, trunk, width, h_dim, classes=0, eps=1e-6):
        super().__init__()
        self.trunk, self.linear = trunk, spectral(nn.Linear(width, 1), eps)
        self.map = spectral(nn.Linear(h_dim, width // 2 if classes else width), eps)
        self.embed = spectral(nn.Embedding(classes, width // 2), eps) if classes else None

    def features(self, x):
        """phi, [B, width]: a SUM over positions, not their mean; scores scale with it."""
        return F.relu(self.trunk(x)).sum((2, 3), dtype=torch.float32)

    def forward(self, x, h, y=None):
        phi, v = self.features(x), self.map(h)
        v = v if y is None else torch.cat([self.embed(y), v], 1)
        return self.linear(phi)[:, 0].float() + (v * phi).sum(1)


# ------------------------------------------------------------ the objective
# same as in biggan.py
def discriminator_loss(real, fake):
    """L_D: the hinge, of the scores [B] of real and drawn images (Lim and Ye 2017)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


# same as in biggan.py
def generator_loss(fake):
    """L_G = -E D(G(z, c), c)."""
    return -fake.mean()


def prior(args, n, *key, truncation=math.inf):
    """z ~ N(0, I) [n, z_dim], or truncated to |z| <= truncation; a function of the seed and the key."""
    z, draw = torch.empty(n, args.z_dim, device=args.device), generator(args.seed, *key, args.device)
    bounded = truncation < math.inf
    return nn.init.trunc_normal_(z, 0, 1, -truncation, truncation, draw) if bounded else z.normal_(generator=draw)


# the conditioning gap [n]: cosine of f(G(z, h)) with h, less that with another h; 0 while G is deaf to h
gap = lambda f, x, h: (f(x) * (h - h.roll(1, 0))).sum(1)
# rows of a table, in memory or mapped into it, to the device, which is not waited for
onto = lambda args, x: x.pin_memory().to(args.device, non_blocking=True) if "cuda" in args.device else x


def condition(args, instances, i, j):
    """[h_i], or with classes [h_i, y_j]."""
    tables = ((instances.h, i), (instances.labels, j))[: 1 + (instances.labels is not None)]
    return [onto(args, table.index_select(0, rows)) for table, rows in tables]


def choose(args, instances, n, *key):
    """Conditions of n samples, a function of the seed and the key: instances from the pool, half of them mirrored where
    it has all; with classes each has the label of one of its neighbours."""
    random, (total, k), pool = generator(args.seed, *key), instances.neighbours.shape, instances.pool
    draw = lambda limit: torch.randint(limit, (n,), generator=random)
    i, neighbour, mirrored = pool[draw(len(pool))], draw(k), draw(len(instances.h) // total) * (len(pool) == total)
    return condition(args, instances, i + total * mirrored, instances.neighbours[i, neighbour].long())


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
def training_set(args):
    """The training pictures; args learn how many classes are a condition: none, but with --class-conditional."""
    data = read(args, args.data, "train")
    args.classes = int(data.require_labels().max()) + 1 if args.class_conditional else 0
    return data


def build(args, fresh=False):
    """G and D with their first weights, a function of the seed: every rank starts from the same. Its batch norm sees
    its own pieces only, as in the authors' code. args.f is the one copy of f."""
    torch.manual_seed(args.seed)
    args.f = vars(args).get("f") or feature_network(args, fresh).to(args.device, memory_format=torch.channels_last)
    widths, d_widths, halvings, _, attention = args.layouts[args.size]
    widths, d_widths = ([args.ch * n for n in units] for units in (widths, d_widths))
    shape = args.z_dim, args.f.dim, args.embed_dim, args.classes, args.class_dim, args.hierarchical
    trunk = image_trunk(d_widths, halvings, args.size, attention, args.sn_eps)
    D = Discriminator(trunk, d_widths[-1], args.f.dim, args.classes, args.sn_eps)
    networks = [Generator(widths, *shape, attention, args.h_gain, args.sn_eps), D]
    for weight in (p for network in networks for p in network.parameters() if p.ndim > 1 and args.init_std):
        nn.init.normal_(weight, std=args.init_std)  # of convolutions, linear maps, embeddings
    return [network.to(args.device, memory_format=torch.channels_last) for network in networks]


@torch.no_grad()
def settle(average):
    """A frozen copy of the averaged G, with averaged statistics of batch norm. The averages of u and v of its spectral
    norms are no unit vectors: a few power iterations mend that."""
    G = AveragedModel(average.module).module.requires_grad_(False).eval()
    for _ in range(5):
        power_iteration(G)
    return G


def pixels(args, data, rows):
    """Pictures [n, 3, S, S] in [-1, 1], channels_last."""
    return onto(args, data.images.index_select(0, rows)).movedim(-1, -3).float().div_(127.5).sub_(1)


def pairs(args, data, instances, first):
    """Endless real pairs from batch number `first` on, in this rank's pieces: pictures x_j [m, 3, S, S] and conditions.
    i runs through the data set, j is drawn from its neighbours; one coin mirrors x_j, another one the instance."""
    n, k = instances.neighbours.shape

    def fetch(number):
        step, share = number // args.accumulate, (args.rank, args.world, number % args.accumulate, args.accumulate)
        i = torch.from_numpy(indices(n, args.batch, step, args.seed, *share))
        u = torch.from_numpy(uniforms(args.batch, 3, step, args.seed, PAIRS, *share))
        j = instances.neighbours[i, (u[:, 0] * k).long()].long()
        turn = ((u[:, 1] < 0.5) & data.flip)[:, None, None, None].to(args.device, non_blocking=True)
        x, mirrored = pixels(args, data, j), (u[:, 2] < 0.5) & (len(instances.h) > n)
        return torch.where(turn, x.flip(-1), x), *condition(args, instances, i + n * mirrored, j)

    return ahead(fetch, itertools.count(first * args.accumulate), 1)


def train(args):
    data = training_set(args)
    batches(data, args.batch, args.seed, 0, args.accumulate, rank=args.rank, world=args.world)  # refuses what it must
    (G, D), f = build(args, fresh=not (args.out / "checkpoint.pt").exists()), args.f
    G_ema = AveragedModel(G, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True)
    rates = ((G, args.lr_g), (D, args.lr_d))
    opt_G, opt_D = (torch.optim.Adam(n.parameters(), lr, args.betas, args.adam_eps, fused=True) for n, lr in rates)
    run = Run(args, G=G, D=D, f=f, G_ema=G_ema, opt_G=opt_G, opt_D=opt_D)
    if run.step == 0 and args.features in ("trained", "random"):
        pretrain(args, data, f.trunk, args.feature_steps if args.features == "trained" else 0)
    instances = prepare(args, f, data)
    for network in (G, D) if args.compile else ():
        network.compile()
    autocast = torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.precision == "bf16")
    stream = pairs(args, data, instances, run.step * args.d_steps)

    def draw(k):  # this rank's pieces of z and conditions for the step's k-th batch of samples, cut from the whole's
        number = run.step * (args.d_steps + 1) + k
        whole = prior(args, args.batch, LATENTS, number), *choose(args, instances, args.batch, INSTANCES, number)
        return zip(*(part.chunk(args.world * args.accumulate)[args.rank :: args.world] for part in whole), strict=True)

    while run.step < args.steps:
        D.requires_grad_(True)
        for k in range(args.d_steps):  # D learns to tell h's neighbours from what G draws around other h
            power_iteration(G, D)
            opt_D.zero_grad()
            for z, *c_hat in draw(k):
                x, *c = next(stream)
                with autocast:
                    with torch.no_grad():
                        x_hat = G(z, *c_hat)
                    both = (torch.cat(pair) for pair in zip((x, *c), (x_hat, *c_hat), strict=True))  # in one batch
                    real, fake = D(*both).chunk(2)
                    loss_d = discriminator_loss(real, fake)
                (loss_d / args.accumulate).backward()
            average_gradients(args, D)
            opt_D.step()

        D.requires_grad_(False)
        power_iteration(G, D)
        opt_G.zero_grad()
        for z, *c_hat in draw(args.d_steps):  # G learns to raise D's scores
            with autocast:
                loss_g = generator_loss(D(G(z, *c_hat), *c_hat))
            (loss_g / args.accumulate).backward()
        average_gradients(args, G)
        opt_G.step()
        if run.step < args.ema_start:
            G_ema.n_averaged.zero_()  # the first update of an average is a copy
        G_ema.update_parameters(G)
        run.step += 1

        if run.every(args.log_every):
            G.eval()  # in train mode batch norm would move
            with torch.no_grad():  # pairing: what another instance costs a real picture; at 0 D is deaf to h
                pairing = D(x, *c) - D(x, c[0].roll(1, 0), *c[1:])
                heard = gap(f, G(z, *c_hat), c_hat[0])
            G.train()
            run.log(loss_d=loss_d, loss_g=loss_g, real=real, fake=fake, gap=heard, pairing=pairing, lr=args.lr_g)
        if run.every(args.save_every) or run.every(args.eval_every):
            run.save()
            picture(args, "samples.png", around(args, settle(G_ema), data, instances)[1], columns=10)
        if run.every(args.eval_every):
            name, value = next(iter(judge_samples(args, settle(G_ema), instances, full=False).items()))
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
    """The averaged G, D, f, the training pictures, their Instances, the stored ones as pool, and the checkpoint."""
    name = "best.pt" if args.best else "checkpoint.pt"
    if (state := read_checkpoint(args, name)) is None:
        raise UserError(f"there is no {name} in {args.out}: train first, or give the run's --out")
    data = training_set(args)
    (G, D), f = build(args), args.f
    G_ema = AveragedModel(G)
    for network, part in ((G_ema, "G_ema"), (D, "D"), (f, "f")):
        network.load_state_dict(state[part])
    return settle(G_ema), D.requires_grad_(False).eval(), f, data, prepare(args, f, data, args.stored), state


def beside(args, G, x, h, y=None, columns=9):
    """Pictures x [n, 3, S, S], behind each one samples around its h; with classes of y [n] or each class in turn."""
    z, c = prior(args, len(x) * columns, PICTURES, 0, truncation=args.truncation), [h.repeat_interleave(columns, 0)]
    if args.classes:
        every = (torch.arange(columns, device=h.device) % args.classes).repeat(len(x))
        c.append(every if y is None else y.repeat_interleave(columns))
    return torch.cat([x[:, None], G(z, *c).unflatten(0, (len(x), columns))], 1).flatten(0, 1)


def around(args, G, data, instances):
    """Eight instances of the pool, [8], and a sheet of samples around them."""
    rows = instances.pool[torch.linspace(0, len(instances.pool) - 1, 8).long()]
    return rows, beside(args, G, pixels(args, data, rows), *condition(args, instances, rows, rows))


def sample(args):
    """samples.png: instances, and samples behind each; neighbours.png: the same instances, and their neighbours;
    unseen.png: test pictures, and samples; transfer.png: pictures of --condition, or else negatives of test pictures,
    and samples: a data set that was not trained on; interpolations.png: from each instance to the next, z the same."""
    G, _, f, data, instances, _ = restore(args)
    rows, sheet = around(args, G, data, instances)
    picture(args, "samples.png", sheet, columns=10)
    near = torch.cat([rows[:, None], instances.neighbours[rows, :9]], 1)
    picture(args, "neighbours.png", pixels(args, data, near.flatten()), columns=near.shape[1])

    first = lambda source, split: pixels(args, some := read(args, source, split, 8), torch.arange(len(some)))
    unseen = first(args.data, "test")
    transfer = first(args.condition, "test") if args.condition else -unseen
    with suppress(UserError):  # a folder may have a single picture, for test
        transfer = torch.cat([transfer, first(args.condition, "train")])[:8] if args.condition else transfer
    for name, x in (("unseen", unseen), ("transfer", transfer)):
        picture(args, f"{name}.png", beside(args, G, x, f(x)), columns=10)
    h, *y = condition(args, instances, rows, rows)
    between = torch.lerp(h[:, None], h.roll(-1, 0)[:, None], torch.linspace(0, 1, 10, device=h.device)[:, None])
    z, *y = (part.repeat_interleave(10, 0) for part in (prior(args, 8, PICTURES, 1, truncation=args.truncation), *y))
    picture(args, "interpolations.png", G(z, F.normalize(between.flatten(0, 1)), *y), columns=10)


def generate(args, G, instances, chunk, n):
    """Samples [n, 3, S, S], and the h [n, D] around which they are."""
    c = choose(args, instances, n, STORED, chunk)
    return G(prior(args, n, FAKES, chunk, truncation=args.truncation), *c), c[0]


def judge_samples(args, G, instances, full=True):
    data, draw = read(args, args.data, args.fid_split), lambda chunk, n: generate(args, G, instances, chunk, n)[0]
    return fid.evaluate(draw, data, args.fid_samples, args.fid_features, args.device, args.fid_weights, full)


def evaluate(args):
    """metrics.json: the linear probe of D's features beside that of h; what G makes of h; FID and its sisters."""
    G, D, f, data, instances, state = restore(args)
    untrained = build(args)
    device = torch.cuda.get_device_name() if "cuda" in args.device else f"cpu, {torch.get_num_threads()} threads"
    metrics = {"command": " ".join(sys.argv), "device": device, "torch": torch.__version__, "steps": state["step"]}
    metrics |= {"images": state["step"] * args.d_steps * args.batch, "seconds": round(state["seconds"], 1)}
    metrics["parameters"] = {k: sum(p.numel() for p in n.parameters()) for k, n in zip("GD", untrained, strict=True)}
    metrics |= {"instances": len(instances.pool), "neighbours": instances.neighbours.shape[1]}
    gaps = [gap(f, *generate(args, G, instances, chunk, 100)) for chunk in range(5)]  # at once: 60 GB at 256x256
    metrics["conditioning_gap"] = float(torch.cat(gaps).mean())
    if data.labels is not None:
        agree = data.labels[instances.neighbours.long()] == data.labels[:, None]
        metrics["neighbour_agreement"] = float(agree.double().mean())

    def probe():  # the pooled features that D's scores are read from, and h as a yardstick
        n = args.probe_samples or None
        parts = read(args, args.data, "train", n), read(args, args.data, "test", n and n // 2)
        encoders = [nn.Sequential(network.trunk, nn.ReLU()) for network in (D, untrained[1])]
        found = linear_probe.evaluate(encoders[0], *parts, encoders[1], args.device)
        yardstick = linear_probe.probe(*(linear_probe.extract(f, part, args.device) for part in parts))
        return found | {f"condition_probe_{k}": value for k, value in yardstick.items()}

    for measure in (probe, lambda: judge_samples(args, G, instances)):
        try:
            metrics |= measure()
        except UserError as error:  # no labels, no Inception weights, no room for a cache: the run keeps the rest
            flags = " ".join(word for word in sys.argv[1:] if word not in ("train", "eval"))
            print(f"{SCRIPT}.py: not measured: {error}; then: python {sys.argv[0]} eval {flags}", file=sys.stderr)
    if args.rank == 0:
        (args.out / "metrics.json.tmp").write_text(json.dumps(metrics, indent=1) + "\n")
        os.replace(args.out / "metrics.json.tmp", args.out / "metrics.json")
        print(f"{args.out} has the pictures, and metrics.json, where among others:")
        for k in (k for k in metrics if k.endswith(("top1", "gap", "agreement")) or k.startswith(("fid", "fd_"))):
            print(f"  {k} {metrics[k]:.4g}")
        print("top1: accuracy with D's features, beside yardsticks, with h: condition_; gap: 0 if G is deaf to h;")
        print("agreement: of an instance's class with its neighbours'; fid, fd_random (NOT FID): 0 is best.")


# ------------------------------------------------------------ the command line
FLAGS = {  # those whose defaults are in PRESETS
    "size": "side of G's images, pixels", "ch": "channels of the narrowest layers, of which all others' are multiples",
    "features": "pretrained (torchvision's ResNet-50, fetched once), trained (a small network, here, without labels), "
                "random, or a FILE: checkpoint.pt of byol.py or bigbigan.py, or a ResNet of torchvision or SwAV",
    "feature_steps": "steps of --features trained", "embed_dim": "width of the map of h that G's blocks share",
    "k": "neighbours of an instance, the instance itself not among them",
    "stored": "instances that are sampled around, chosen by k-means; 0: all training images",
    "steps": "training steps; more of them extend a finished run", "d_steps": "steps of D for one of G",
    "batch": "images a step, over all ranks and pieces", "ema": "decay of the average of G, 0 to 1",
    "lr_d": "learning rate of D", "lr_g": "learning rate of G", "log_every": "steps between two lines of log.jsonl",
    "save_every": "steps between checkpoints, each with a samples.png", "fid_samples": "samples that FID is taken of",
    "fid_features": "random needs no weights, gives fd_random", "fid_split": "FID's real images",
    "probe_samples": "training images of the linear probe, with half as many test images; 0: all"}  # fmt: skip
CHOICES = {"fid_features": ("inception", "random"), "fid_split": ("train", "test")}
FREE = (  # what may differ between two runs of one checkpoint: beginnings of names
    "command", "root", "out", "steps", "accumulate", "device", "precision", "compile", "skip_broken", "best", "log_",
    "save_", "eval_", "fid_", "probe_", "stored", "condition", "truncation")  # fmt: skip


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
    add("--class-conditional", action="store_true", help="G and D are also given the class of the neighbour")
    add("--flip-instances", action=argparse.BooleanOptionalAction, help="half of the instances are mirrored")
    add("--condition", help="of sample: data set or folder of images to draw around in transfer.png; else negatives")
    add("--truncation", type=float, default=math.inf, help="of samples: numbers of z above it in magnitude are redrawn")
    for name, text in FLAGS.items():
        add(f"--{name.replace('_', '-')}", type=type(PAPER[name]), choices=CHOICES.get(name), help=text)
    asked, _ = parser.parse_known_args([word for word in sys.argv[1:] if word not in ("-h", "--help")])
    usual = {"imagenet": "paper", "shapes": "demo", "dsprites": "demo", "mnist": "demo", "fashion_mnist": "demo"}
    preset = asked.preset or usual.get(asked.data, "small")
    parser.set_defaults(preset=preset, out=Path("runs", f"{SCRIPT}-{Path(asked.data).name}"), **PRESETS[preset])
    parser.set_defaults(**SIZES.get(asked.size, {}) if preset == "paper" else {})
    args = parser.parse_args()
    least = dict.fromkeys(("steps", "batch", "accumulate", "d_steps", "log_every", "save_every", "fid_samples"), 1)
    least |= {"ch": 8, "embed_dim": 1, "k": 1, "feature_steps": 1, "truncation": 0.01}
    most = {"ema": 1, "seed": 2**63 - 1}
    for name, value in vars(args).items():
        low, high = least.get(name, 0), most.get(name, math.inf)
        if isinstance(value, int | float) and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be from {low} to {high}")
    if args.size not in args.layouts:
        raise UserError(f"--size {args.size}: is one of {[*args.layouts]}")
    if args.condition and args.condition not in NAMES and not Path(args.condition).is_dir():
        raise UserError(f"--condition {args.condition}: no such folder, nor one of {', '.join(NAMES)}")
    args.z_dim = args.layouts[args.size][3]
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
