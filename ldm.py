"""LDM: "High-Resolution Image Synthesis with Latent Diffusion Models", Robin Rombach, Andreas Blattmann, Dominik
Lorenz, Patrick Esser, Björn Ommer, CVPR 2022, 2112.10752.

Stage 1: an autoencoder makes images f times smaller and throws away only what nobody would see. Stage 2: a diffusion
model of its latents, f^2 cheaper than one of pixels. What is laid out like the image (what is around a hole, a small
copy) is concatenated to the noisy latent; all other conditions (a class) enter by cross-attention.

    python ldm.py                                                       # rendered shapes, five CPU minutes
    python ldm.py --data cifar10                                        # a 32x32 model on one GPU
    torchrun --nproc_per_node 8 ldm.py --data imagenet --lin vgg.pth    # the paper's LDM-4 of classes
    python ldm.py --data cifar10 --condition inpaint --stage1 runs/ldm-cifar10 --out runs/holes   # a U-Net for holes
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models import VGG16_Weights, vgg16
from torchvision.utils import save_image

from common import fid, linear_probe
from common.data import NAMES, UserError, batches, generator, load

SCRIPT = Path(__file__).stem
POSTERIOR, NOISE, HOLES, PICTURES, FAKES, PROBE = range(6)  # streams of random numbers

# fmt: off
PAPER = dict(  # LDM-4 of ImageNet's classes (tables 10, 13, 15), on the autoencoder "VQ f = 4" (table 8)
    size=256, condition="class", autoencoder="vq-f4", ch=128, blocks=2, groups=32,
    # multipliers of ch, channels of z, codes (0: KL), sides of the maps that have attention beside the middle (None:
    # nor has the middle), D's layers and weight
    autoencoders={
        "kl-f4": ((1, 2, 4), 3, 0, (), 3, 0.5), "kl-f8": ((1, 2, 4, 4), 4, 0, (), 3, 0.5),
        "kl-f16": ((1, 1, 2, 2, 4), 16, 0, (16,), 3, 0.5), "vq-f4": ((1, 2, 4), 3, 8192, (), 3, 0.75),
        "vq-f4-plain": ((1, 2, 4), 3, 8192, None, 3, 0.75),  # that of the inpainting model
        "vq-f8": ((1, 2, 2, 4), 4, 16_384, (32,), 2, 0.6), "vq-f16": ((1, 1, 2, 2, 4), 8, 16_384, (16,), 2, 0.75)},
    unets={  # factors: where the map is so many times smaller than the latent there is attention
        "class": dict(base=192, multipliers=(1, 2, 3, 5), factors=(2, 4, 8)),
        "none": dict(base=224, multipliers=(1, 2, 3, 4), factors=(2, 4, 8), head=32),  # FFHQ, CelebA-HQ, Bedrooms
        "inpaint": dict(base=256, multipliers=(1, 2, 3, 4), factors=(2, 4, 8), heads=8, updown=True),  # "big"
        "super": dict(base=160, multipliers=(1, 2, 2, 4), factors=(8, 16), head=32)},
    context=512, target="eps", class_dropout=0.1,  # its probability is neither in the paper nor in the code
    # "VQ f = 4": 533,000 steps, of OpenImages, 8 a GPU, whose number is not known; 4.5e-6 an image. Its configuration
    # says disc_start 0, which looks like a resumed run: the KL ones' instead
    first_batch=8, lr_first=3.6e-5, first_steps=533_000, disc_start=50_001, disc_width=64, perceptual="lpips",
    batch=1200, lr=1e-4, steps=711_000,  # 178,000 of stage 2
    crop=(0.5, 1.0), flip=False,  # a random square of half to all of the area; the paper's has always the shorter side
    sampler="ddim", sample_steps=250, eta=1.0, guidance=1.5,  # eta is not stated: measured by others (issue 262)
    log_every=100, save_every=5000, fid_features="inception", fid_samples=50_000, fid_split="train",
    probe_samples=50_000)
SMALL = PAPER | dict(  # ours: the paper has no 32x32 model
    size=32, autoencoder="kl-f2", ch=64,
    autoencoders={"kl-f2": ((1, 2), 4, 0, (), 2, 0.5), "kl-f4": ((1, 2, 4), 4, 0, (), 2, 0.5),
                  "vq-f2": ((1, 2), 4, 512, (), 2, 0.75), "vq-f4": ((1, 2, 4), 4, 512, (), 2, 0.75)},
    unets={k: dict(base=128, multipliers=(1, 2, 2), factors=(1, 2, 4), head=32) for k in PAPER["unets"]},
    first_batch=128, lr_first=1e-4, first_steps=20_000, disc_start=5000, perceptual="vgg", batch=256, lr=2e-4,
    steps=120_000, crop=(), flip=True, sample_steps=200, save_every=2000, probe_samples=0)
DEMO = SMALL | dict(  # five minutes on two CPU cores: L1 alone; and not the paper's eps but v: where there is little
    # but noise, eps is z_t, and a short run does not learn to hand that through all layers
    target="v", autoencoder="kl-f4", ch=32, blocks=1, groups=8,
    autoencoders={"kl-f4": ((1, 1, 2), 4, 0, (), 1, 0.3), "kl-f2": ((1, 2), 4, 0, (), 1, 0.3),
                  "vq-f4": ((1, 1, 2), 4, 128, (), 1, 0.3)},
    unets={k: dict(base=32, multipliers=(1, 2), factors=(1, 2), head=32) for k in PAPER["unets"]}, context=64,
    first_batch=32, lr_first=1e-3, first_steps=300, disc_start=1_000_000, disc_width=32, perceptual="none", batch=32,
    lr=1e-3, steps=1500, sample_steps=20, eta=0.0, guidance=2.0, log_every=50, save_every=300, fid_features="random",
    fid_samples=1000, fid_split="test", probe_samples=2000)
PRESETS = {"demo": DEMO, "small": SMALL, "paper": PAPER}
PERCEPTUAL = {"lpips": 1.0, "vgg": 0.1, "none": 0.0}  # its weight; VGG16 with all weights 1 is several times larger
B1 = {"class": 0.0195, "none": 0.0195, "inpaint": 0.0205, "super": 0.0155}  # the last beta
TIMES = (0, 10, 50, 100, 200, 300, 400, 600, 800, 999)  # t at which the U-Net is probed
# fmt: on


# ------------------------------------------------------------ blocks of the autoencoder and of the U-Net
conv = partial(nn.Conv2d, kernel_size=3, padding=1)


def zero(layer):  # a block that ends in it starts as the identity
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class ResBlock(nn.Module):
    """[B, cin, h, w] -> [B, cout, h, w]. In the U-Net an embedding of t, `time` wide, is added between the
    convolutions, and the block starts as its skip. `resample`: the map becomes larger or smaller on the way."""

    def __init__(self, cin, cout, norm, time=0, resample=None):
        super().__init__()
        self.norm1, self.norm2, self.resample = norm(cin), norm(cout), resample or nn.Identity()
        self.conv1, conv2 = conv(cin, cout), conv(cout, cout)
        self.time, self.conv2 = (nn.Linear(time, cout), zero(conv2)) if time else (None, conv2)
        self.skip = nn.Identity() if cin == cout else nn.Conv2d(cin, cout, 1)

    def forward(self, x, time=None):
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        h = h if time is None else h + self.time(F.silu(time))[..., None, None]
        return self.skip(self.resample(x)) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):  # x + attention of all positions to all
    def __init__(self, channels, norm, heads=1):
        super().__init__()
        self.norm, self.heads = norm(channels), heads
        self.q, self.k, self.v, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (m(h).flatten(2).unflatten(1, (self.heads, -1)).mT for m in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v).mT.flatten(1, 2)  # [B, C, h w]
        return x + self.out(attended.unflatten(2, x.shape[2:]))


# ------------------------------------------------------------ stage 1: the autoencoder
class Autoencoder(nn.Module):
    """E and D, images [B, 3, S, S] <-> latents [B, z, S / f, S / f], f = 2^(levels - 1). KL: E tells mean and
    log-variance of a normal posterior. VQ (codes > 0): E tells z, and D begins by taking the nearest codes for it."""

    def __init__(self, ch, multipliers, blocks, z, size, codes=0, attention=(), groups=32):
        super().__init__()
        norm = lambda c: nn.GroupNorm(groups, c, eps=1e-6)
        widths, out, self.f = [ch * m for m in multipliers], z if codes else 2 * z, 2 ** (len(multipliers) - 1)
        attend = lambda c, side: [Attention(c, norm)] if side in (attention or ()) else []
        middle = lambda c: [ResBlock(c, c, norm), *[Attention(c, norm)][attention is None :], ResBlock(c, c, norm)]
        end = lambda c, cout: [norm(c), nn.SiLU(), conv(c, cout)]
        layers, cin = [conv(3, ch)], ch
        for level, c in enumerate(widths):
            for _ in range(blocks):
                layers += [ResBlock(cin, c, norm), *attend(c, size >> level)]
                cin = c
            if level < len(widths) - 1:  # zeros to the right and below only
                layers += [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(c, c, 3, stride=2)]
        self.encoder = nn.Sequential(*layers, *middle(cin), *end(cin, out), nn.Conv2d(out, out, 1))
        layers = [nn.Conv2d(z, z, 1), conv(z, cin), *middle(cin)]
        for level, c in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                layers += [ResBlock(cin, c, norm), *attend(c, size >> level)]
                cin = c
            layers += [nn.Upsample(scale_factor=2), conv(c, c)] if level else []
        self.decoder = nn.Sequential(*layers, *end(cin, 3))
        self.codes = nn.Parameter(torch.empty(codes, z).uniform_(-1 / codes, 1 / codes)) if codes else None
        self.register_buffer("scale", torch.ones(()))  # s, which stage 2 sets

    def moments(self, x):
        """Mean and log-variance of the posterior, [B, z, h, w] each; VQ: z itself, and None."""
        if self.codes is not None:
            return self.encoder(x).float(), None
        mean, log_variance = self.encoder(x).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def nearest(self, z):
        rows = z.detach().movedim(1, 3).reshape(-1, z.shape[1])
        with torch.autocast("cuda" if z.is_cuda else "cpu", enabled=False):  # in bf16 neighbouring codes are one
            distance = rows.square().sum(1, keepdim=True) + self.codes.square().sum(1) - 2 * rows @ self.codes.T
        return F.embedding(distance.argmin(1).view(len(z), *z.shape[2:]), self.codes).movedim(3, 1)

    def forward(self, x, noise):
        """The reconstruction, and what is regularised: mean and log-variance, or z and its codes e."""
        mean, log_variance = self.moments(x)
        if self.codes is None:
            return self.decoder(mean + (log_variance / 2).exp() * noise).float(), (mean, log_variance)
        e = self.nearest(mean)
        return self.decoder(mean + (e - mean).detach()).float(), (mean, e)  # gradients pass straight through to z

    def encode(self, x, noise=0.0):
        """z_0 = s E(x): the posterior's mean, or with noise a draw from it; VQ: z, not yet its codes."""
        mean, log_variance = self.moments(x)
        return self.scale * (mean if log_variance is None else mean + (log_variance / 2).exp() * noise)

    def decode(self, z):
        z = z / self.scale
        return self.decoder(z if self.codes is None else self.nearest(z)).float()


def discriminator(layers=3, width=64):
    """PatchGAN: images -> scores [B, 1, h, w], each of a patch; with 3 layers of 70 pixels."""
    widths = [3] + [width * min(2**i, 8) for i in range(layers + 1)]
    parts = []
    for i, (cin, cout) in enumerate(pairwise(widths)):
        norm = [nn.BatchNorm2d(cout)] if i else []
        parts += [nn.Conv2d(cin, cout, 4, 2 if i < layers else 1, 1, bias=not i), *norm, nn.LeakyReLU(0.2)]
    net = nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, 4, 1, 1))
    for layer in net:
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
            nn.init.normal_(layer.weight, float(isinstance(layer, nn.BatchNorm2d)), 0.02)
    return net


# same as in vqgan_transformer.py
class LPIPS(nn.Module):
    """Zhang et al. 2018: distance [B] of images in [-1, 1] in the features of VGG16, which no training changes. `lin`:
    the learnt weights of its channels, five tensors [C]; without them all are 1."""

    def __init__(self, features, lin=None):
        super().__init__()
        self.features, self.taps = features[:30], (3, 8, 15, 22, 29)  # relu1_2 ... relu5_3
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        for i, channels in enumerate((64, 128, 256, 512, 512)):
            self.register_buffer(f"lin{i}", torch.ones(channels) if lin is None else lin[i])
        self.requires_grad_(False)

    def forward(self, x, y):
        pair, distance = (torch.cat([x, y]) - self.shift) / self.scale, 0
        for i, layer in enumerate(self.features):
            pair = layer(pair)
            if i in self.taps:
                a, b = (pair / (pair.square().sum(1, keepdim=True).sqrt() + 1e-10)).chunk(2)
                lin = getattr(self, f"lin{self.taps.index(i)}")
                distance = distance + ((a - b).square() * lin[:, None, None]).sum(1).mean((1, 2))
        return distance


# ------------------------------------------------------------ stage 2: the U-Net
class TokenAttention(nn.Module):  # tokens [B, n, C] attend to a context [B, m, width], or to themselves
    def __init__(self, channels, heads, width=None):
        super().__init__()
        self.heads, width = heads, width or channels
        self.q, self.out = nn.Linear(channels, channels, bias=False), nn.Linear(channels, channels)
        self.k, self.v = (nn.Linear(width, channels, bias=False) for _ in range(2))

    def forward(self, x, context=None):
        context = x if context is None else context
        maps = self.q(x), self.k(context), self.v(context)
        q, k, v = (m.unflatten(2, (self.heads, -1)).transpose(1, 2) for m in maps)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SpatialTransformer(nn.Module):
    """Positions as tokens: self-attention, cross-attention to the context, a gated layer: the code's order, not
    table 16's."""

    def __init__(self, channels, groups, heads, context):
        super().__init__()
        self.norm, self.first = nn.GroupNorm(groups, channels, eps=1e-6), nn.Conv2d(channels, channels, 1)
        self.last = zero(nn.Conv2d(channels, channels, 1))
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))
        self.own, self.cross = TokenAttention(channels, heads), TokenAttention(channels, heads, context)
        self.gated, self.back = nn.Linear(channels, 8 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x, context):
        h = self.first(self.norm(x)).flatten(2).mT  # [B, h w, C]
        h = h + self.own(self.norms[0](h))
        h = h + self.cross(self.norms[1](h), context)
        value, gate = self.gated(self.norms[2](h)).chunk(2, dim=2)
        h = h + self.back(value * F.gelu(gate))
        return x + self.last(h.mT.unflatten(2, x.shape[2:]))


class UNet(nn.Module):
    """eps_theta(z_t, t, context): z_t [B, cin, h, w], t [B], context [B, tokens, width] -> [B, cout, h, w]. With a
    context, attention is a SpatialTransformer's, else plain: of `heads` heads, or of as many as are `head` wide. Once
    it has abar, its last layer is v = sqrt(abar) eps - sqrt(1 - abar) z_0 (Salimans and Ho 2022), and eps follows."""

    def __init__(
        self, cin, cout, base, multipliers, blocks, factors, head=0, heads=1, context=0, updown=False, groups=32
    ):
        super().__init__()
        self.register_buffer("abar", None, persistent=False)  # [T]
        self.base, norm = base, lambda c: nn.GroupNorm(groups, c, eps=1e-5)
        self.time = nn.Sequential(nn.Linear(base, 4 * base), nn.SiLU(), nn.Linear(4 * base, 4 * base))
        block = partial(ResBlock, norm=norm, time=4 * base)

        def attend(c):
            n = c // head if head else heads
            if context:
                return SpatialTransformer(c, groups, n, context)
            plain = Attention(c, norm, n)
            zero(plain.out)
            return plain

        level = lambda cin, c, i: [block(cin, c), *([attend(c)] if 1 << i in factors else [])]
        rows, skips, c = [[conv(cin, base)]], [base], base
        for i, width in enumerate(widths := [base * m for m in multipliers]):
            for _ in range(blocks):
                rows.append(level(c, width, i))
                skips.append(c := width)
            if i < len(widths) - 1:
                rows.append([block(c, c, resample=nn.AvgPool2d(2)) if updown else conv(c, c, stride=2)])
                skips.append(c)
        self.down = nn.ModuleList(map(nn.ModuleList, rows))
        self.middle, rows = nn.ModuleList([block(c, c), attend(c), block(c, c)]), []
        for i, width in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                rows.append(level(c + skips.pop(), width, i))
                c = width
            grow = nn.Upsample(scale_factor=2)
            rows[-1] += ([block(c, c, resample=grow)] if updown else [grow, conv(c, c)]) if i else []
        self.up = nn.ModuleList(map(nn.ModuleList, rows))
        self.last = nn.Sequential(norm(c), nn.SiLU(), zero(conv(c, cout)))

    def forward(self, z, t, context=None, middle=False):
        """`middle`: instead of eps the middle block's output [B, C, h', w'], which the linear probe reads."""
        frequencies = torch.exp(-math.log(10_000) * 2 / self.base * torch.arange(self.base // 2, device=t.device))
        angles, skips, z_t = t[:, None].float() * frequencies, [], z
        time = self.time(torch.cat([angles.cos(), angles.sin()], 1))

        def through(row, h):
            for layer in row:
                h = layer(h, *{ResBlock: (time,), SpatialTransformer: (context,)}.get(type(layer), ()))
            return h

        for row in self.down:
            skips.append(z := through(row, z))
        z = through(self.middle, z)
        if middle:
            return z
        for row in self.up:
            z = through(row, torch.cat([z, skips.pop()], 1))
        out = self.last(z).float()
        if self.abar is None:
            return out
        a = self.abar[t][:, None, None, None]
        return a**0.5 * out + (1 - a) ** 0.5 * z_t[:, : out.shape[1]]


# ------------------------------------------------------------ the objective
def reconstruction_loss(x, x_hat, perceptual=0.0, mean=False):
    """L_rec (appendix G): |x - x_hat| + the perceptual distance [B, 1, 1, 1], which so counts at every number; KL:
    their sum over an image; VQ: their mean. (Officially also of a variance that no optimiser knows: it stays 1.)"""
    rec = (x - x_hat).abs() + perceptual
    return rec.mean() if mean else rec.sum() / len(x)


def kl_loss(mean, log_variance):
    """KL(q(z | x) || N(0, I)), nats of each image [B]; L_reg with a weight of 1e-6."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum((1, 2, 3))


# same as in vqgan_transformer.py
def vq_loss(z, e, beta=0.25, legacy=True):
    """Equation 4's last two terms. The official code has beta at the codebook's term, and all released models were
    trained so: legacy. The paper has it at the commitment."""
    codebook, commitment = F.mse_loss(e, z.detach()), F.mse_loss(z, e.detach())
    return beta * codebook + commitment if legacy else codebook + beta * commitment


# same as in vqgan_transformer.py
def discriminator_loss(real, fake):
    """Hinge loss, half of it (official code)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


# same as in vqgan_transformer.py
def adaptive_weight(rec, gan, weight):
    """lambda (equation 7) from the gradients of L_rec and of the generator's loss by G's last layer."""
    return (rec.norm() / (gan.norm() + 1e-4)).clamp(0, 1e4) * weight


def schedule(b1, b0=0.0015, steps=1000):
    """abar_t, float64 [T]. The betas are linear in their square roots, which the official code calls linear."""
    return (1 - torch.linspace(b0**0.5, b1**0.5, steps, dtype=torch.float64).square()).cumprod(0)


def diffuse(z0, eps, a):
    """z_t ~ q(z_t | z_0), a = abar_t (appendix B)."""
    return a**0.5 * z0 + (1 - a) ** 0.5 * eps


def predict(nets, z, t, c):
    """eps_theta(z_t, t, tau(c)); c: classes [B], a map that is concatenated, or None."""
    unet, embed = nets
    if c is None:
        return unet(z, t)
    return unet(z, t, embed(c)[:, None]) if c.ndim == 1 else unet(torch.cat([z, c], 1), t)


def ldm_loss(nets, z0, eps, t, abar, c=None, l1=False, of_v=False):
    """L_LDM (equations 2 and 3): || eps - eps_theta(z_t, t, tau(c)) ||^2; the inpainting model's is L1 (official).
    of_v: that of v, which differs from eps by a factor."""
    a = abar[t][:, None, None, None]
    error = (predict(nets, diffuse(z0, eps, a), t, c) - eps) / (a**0.5 if of_v else 1)
    return error.abs().mean() if l1 else error.square().mean()


def guided(nets, z, t, c, scale, null):
    """Classifier-free guidance (Ho and Salimans 2021): e_null + scale (e_c - e_null); 1: none, 0: unconditional."""
    if scale == 1 or c is None or c.ndim > 1:
        return predict(nets, z, t, c)
    e_null, e = predict(nets, torch.cat([z, z]), torch.cat([t, t]), torch.cat([torch.full_like(c, null), c])).chunk(2)
    return e_null + scale * (e - e_null)


def grid(abar, sampler, steps):
    """The (t, abar_t, abar of the t that follows) which a sampler goes through, t falling. Any number of steps, evenly
    (the official code takes 500 for 400). DDIM's t are one higher than DDPM's, and it ends at abar_0, not at 1."""
    shift = int(sampler == "ddim")
    times = [min(i * len(abar) // steps + shift, len(abar) - 1) for i in range(steps)]
    a = [float(abar[t]) for t in times]
    return list(zip(times, a, [float(abar[0]) if shift else 1.0, *a], strict=False))[::-1]


def ddim_step(z, e, a, a_prev, eta=0.0, noise=0.0):
    """z at the t before, and z_0, never clamped: latents have no bounds (Song et al. 2021, equations 12 and 16). eta 0
    adds no noise, eta 1 is DDPM's q(z_{t-1} | z_t, z_0) (Ho et al. 2020, equations 6 and 7), of variance beta~_t."""
    z0 = (z - (1 - a) ** 0.5 * e) / a**0.5
    sigma = eta * max(0.0, (1 - a_prev) / (1 - a) * (1 - a / a_prev)) ** 0.5  # 0 backwards, from an image to its noise
    return a_prev**0.5 * z0 + (1 - a_prev - sigma**2) ** 0.5 * e + sigma * noise, z0


@torch.no_grad()
def denoise(args, nets, c, n, *key, scale=None, known=None):
    """n latents z_0 out of noise. known: z_0 of an image and where it is known: there, before every step, z is set to
    what the image would be at this t, so that any model fills holes without having been trained to."""
    random, eta = generator(args.seed, *key, args.device), 1.0 if args.sampler == "ddpm" else args.eta
    draw = lambda: torch.randn(n, args.z, *[args.size // args.f] * 2, generator=random, device=args.device)
    z, scale = draw(), args.guidance if scale is None else scale
    for t, a, a_prev in grid(schedule(args.b1), args.sampler, args.sample_steps):
        z = z if known is None else torch.where(known[1] > 0, diffuse(known[0], draw(), a), z)
        e = guided(nets, z, torch.full((n,), t, device=args.device), c, scale, args.classes)
        z, _ = ddim_step(z, e, a, a_prev, eta, draw() if eta else 0.0)
    return z


# ------------------------------------------------------------ what a U-Net is told
def distances(size, ends):
    """Of each pixel of the unit square from lines [..., 4] (x1, y1, x2, y2): [..., size, size]."""
    x = (torch.arange(size, device=ends.device) + 0.5) / size
    x1, y1, x2, y2 = ends[..., None, None].unbind(-3)
    dx, dy, px, py = x2 - x1, y2 - y1, x - x1, x[:, None] - y1
    along = ((px * dx + py * dy) / (dx * dx + dy * dy).clamp(min=1e-9)).clamp(0, 1)
    return torch.hypot(px - along * dx, py - along * dy)


def holes(u, size):
    """Masks [B, 1, size, size], 1 in the hole: one to four thick strokes, from uniforms u [B, 16, 4, 6], the first of
    16 tries that covers a tenth to half of the image."""

    def mask(u, size):
        drawn = torch.arange(4, device=u.device) <= 4 * u[..., :1, 5]
        return ((distances(size, u[..., :4]) < 0.03 + 0.12 * u[..., 4, None, None]) & drawn[..., None, None]).any(-3)

    share = mask(u, 32).float().mean((2, 3))
    pick = ((share > 0.1) & (share < 0.5)).int().argmax(1)  # of equals the first
    return mask(u[torch.arange(len(u), device=u.device), pick], size)[:, None].float()


@torch.no_grad()
def condition(args, A, x, y, m):
    """c: classes; nothing; the latent of an image that is black in its hole m, and the hole; or a small copy."""
    side = args.size // args.f
    if args.condition == "inpaint":
        return torch.cat([A.encode(torch.where(m > 0, -1.0, x)), 2 * F.interpolate(m, size=side) - 1], 1)
    if args.condition == "super":
        return F.interpolate(x, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
    return y if args.condition == "class" else None


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
    """The autoencoder A, D, the U-Net and tau, an embedding of classes, with their first weights."""
    torch.manual_seed(args.seed)
    multipliers, z, codes, attention, layers, _ = args.autoencoders[args.autoencoder]
    A = Autoencoder(args.ch, multipliers, args.blocks, z, args.size, codes, attention, args.groups)
    D, context = discriminator(layers, args.disc_width), args.context if args.condition == "class" else 0
    more = {"inpaint": z + 1, "super": 3}.get(args.condition, 0)  # channels that are concatenated
    shape = args.unets[args.condition] | {"blocks": args.blocks, "groups": args.groups, "context": context}
    unet = UNet(z + more, z, **shape)
    unet.abar = schedule(args.b1).float() if args.target == "v" else None
    embed = nn.Embedding(args.classes + 1, context) if context else nn.Identity()  # the last row: no class
    return [network.to(args.device, memory_format=torch.channels_last) for network in (A, D, unet, embed)]


def perceptual_loss(args):
    """The distance of images beside L1, or None."""
    if args.perceptual == "none":
        return None
    try:
        file = torch.load(args.lin, weights_only=True) if args.perceptual == "lpips" else None
        lin = file and [file[f"lin{i}.model.1.weight"].flatten() for i in range(5)]
        if lin and ([len(part) for part in lin] != [64, 128, 256, 512, 512] or min(map(torch.min, lin)) < 0):
            raise ValueError(f"{args.lin} is not VGG16's")
        return LPIPS(vgg16(weights=VGG16_Weights.IMAGENET1K_V1).features, lin).to(args.device)
    except Exception as error:  # no network, no file, another file
        raise UserError(f"--perceptual {args.perceptual} needs VGG16, lpips --lin vgg.pth as well ({error})") from error


def cut(args, *wholes):
    """This rank's pieces of what was drawn for the whole batch."""
    pieces = (whole.chunk(args.world * args.accumulate)[args.rank :: args.world] for whole in wholes)
    return zip(*pieces, strict=True)


def autoencoder_step(args, run, pieces, distance):
    """A step of the autoencoder, then one of D; what there is to log."""
    A, D, opt, opt_D = (run.parts[name] for name in ("A", "D", "opt", "opt_D"))
    adversarial, weight = run.step >= args.disc_start, args.autoencoders[args.autoencoder][5]
    random, side = generator(args.seed, POSTERIOR, run.step, args.device), args.size // args.f
    draws = torch.randn(2, args.first_batch, args.z, side, side, generator=random, device=args.device)
    pieces = [(x, *noises) for (x, _), noises in zip(pieces, cut(args, *draws), strict=True)]
    D.requires_grad_(False)
    opt.zero_grad()
    found = {}
    for x, noise, _ in pieces:
        with run.autocast:
            x_hat, regularised = A(x, noise)
            fake = D(x_hat).float() if adversarial else None
        perceptual = PERCEPTUAL[args.perceptual] * distance(x, x_hat)[:, None, None, None] if distance else 0.0
        nll = reconstruction_loss(x, x_hat, perceptual, mean=A.codes is not None)
        regular = kl_loss(*regularised).mean() if A.codes is None else vq_loss(*regularised)
        loss = nll + regular * (1e-6 if A.codes is None else 1.0)
        if adversarial:  # each rank, and so each piece, has its own weight and statistics in D, as officially
            loss_g = -fake.mean()
            by = (torch.autograd.grad(part, A.decoder[-1].weight, retain_graph=True)[0] for part in (nll, loss_g))
            found["weight_g"] = adaptive_weight(*by, weight)
            loss, found["loss_g"] = loss + found["weight_g"] * loss_g, loss_g
        (loss / args.accumulate).backward()
    average_gradients(args, A)
    opt.step()
    if adversarial:  # D, on reconstructions by the new weights
        D.requires_grad_(True)
        opt_D.zero_grad()
        for x, _, noise in pieces:
            with run.autocast:
                with torch.no_grad():
                    fake, _ = A(x, noise)
                loss_d = discriminator_loss(D(x).float(), D(fake).float())
            (loss_d / args.accumulate).backward()
        average_gradients(args, D)
        opt_D.step()
        found["loss_d"] = loss_d
    found |= {"loss": (x - x_hat).abs(), "kl" if A.codes is None else "vq": regular, "latent_std": regularised[0].std()}
    return found | {"lr": args.lr_first}


def unet_step(args, run, pieces):
    """A step of the U-Net and of tau, on latents of the frozen autoencoder."""
    A, unet, embed, ema, opt = (run.parts[name] for name in ("A", "unet", "embed", "ema", "opt_unet"))
    A.requires_grad_(False).zero_grad()
    random, side = generator(args.seed, NOISE, run.step, args.device), args.size // args.f
    draws = dict(generator=random, device=args.device)
    noise, eps = torch.randn(2, args.batch, args.z, side, side, **draws)
    t, drop = torch.randint(1000, (args.batch,), **draws), torch.rand(args.batch, **draws)
    u = torch.rand(args.batch, 16, 4, 6, **draws) if args.condition == "inpaint" else drop
    pieces = [(*piece, *draw) for piece, draw in zip(pieces, cut(args, noise, eps, t, drop, u), strict=True)]
    if run.step == args.first_steps and A.codes is None:  # s = 1 / the standard deviation of the first batch's latents
        z = torch.cat([A.encode(x, noise) for x, _, noise, *_ in pieces]).double()
        sums = torch.stack([torch.ones_like(z).sum(), z.sum(), z.square().sum()])
        if args.world > 1:
            dist.all_reduce(sums)
        A.scale.copy_(((sums[2] - sums[1] ** 2 / sums[0]) / (sums[0] - 1)) ** -0.5)
    opt.zero_grad()
    for x, y, noise, eps, t, drop, u in pieces:
        with run.autocast:
            z0 = A.encode(x, noise)
            c = condition(args, A, x, y, holes(u, args.size) if args.condition == "inpaint" else None)
            if args.condition == "class":
                c = torch.where(drop < args.class_dropout, args.classes, c)
            loss = ldm_loss((unet, embed), z0, eps, t, run.abar, c, args.condition == "inpaint", args.target == "v")
        (loss / args.accumulate).backward()
    average_gradients(args, unet, embed)
    opt.step()
    ema.update_parameters(unet)
    return {"loss": loss, "latent_std": z0.std(), "lr": args.lr}


def moving_average(ema, now, n):
    """w_ema <- d w_ema + (1 - d) w, d = min(0.9999, (1 + n) / (10 + n)) at the n-th update."""
    d = ((1 + n) / (10 + n)).clamp(max=0.9999)
    torch._foreach_mul_(ema, d)
    torch._foreach_add_(ema, torch._foreach_mul(now, 1 - d))


def train(args):
    crop = (1, args.size, args.crop, (1.0, 1.0), "bicubic") if args.crop else None
    data = load(args.data, "train", None if crop else args.size, args.root, args.skip_broken)
    if args.condition == "class":
        data.require_labels()
        args.classes = args.config["classes"] = len(data.classes)
    A, D, unet, embed = build(args)
    if args.stage1:
        if (state := read_checkpoint(argparse.Namespace(out=Path(args.stage1), config={}))) is None:
            raise UserError(f"--stage1 {args.stage1}: no folder of a run, there is no checkpoint.pt in it")
        try:
            A.load_state_dict(state["A"] | {"scale": torch.ones(())})
        except RuntimeError as error:
            raise UserError(f"--stage1 {args.stage1}: it has not the autoencoder {args.autoencoder}") from error
    ema = AveragedModel(unet, multi_avg_fn=moving_average).eval().requires_grad_(False)
    ema.update_parameters(unet)  # the first update is a copy, n counts those after it. Not of tau (official code)
    opt, opt_D = (torch.optim.Adam(n.parameters(), args.lr_first, (0.5, 0.9), fused=True) for n in (A, D))
    opt_unet = torch.optim.AdamW([*unet.parameters(), *embed.parameters()], args.lr, weight_decay=0.01, fused=True)
    distance = perceptual_loss(args) if args.first_steps else None
    run = Run(args, A=A, D=D, unet=unet, embed=embed, ema=ema, opt=opt, opt_D=opt_D, opt_unet=opt_unet)
    torch._functorch.config.donated_buffer = False  # D's weight goes backward through graphs that are used again
    for network in (A, D, unet) if args.compile else ():
        network.compile()
    run.autocast = torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.precision == "bf16")
    run.abar = schedule(args.b1).float().to(args.device)
    test = load(args.data, "test", args.size, args.root, args.skip_broken)
    nets, how = (ema.module, embed), (args.accumulate, args.flip, crop, args.device, args.rank, args.world)
    stream = lambda batch, step: batches(data, batch, args.seed, step, *how)
    batch = {True: args.first_batch, False: args.batch}  # of stage 1, of stage 2
    streams = {True: stream(batch[True], run.step), False: stream(batch[False], max(run.step, args.first_steps))}

    while run.step < args.steps:
        first = run.step < args.first_steps
        args.batch = batch[first]  # by which the log reckons img_per_s
        pieces = [(x[:, 0] if crop else x, y) for x, y, _ in islice(streams[first], args.accumulate)]
        found = autoencoder_step(args, run, pieces, distance) if first else unet_step(args, run, pieces)
        run.step += 1

        if run.every(args.log_every):
            run.log(**found)
        if run.every(args.save_every) or run.every(args.eval_every):
            run.save()
            if not first:  # before, the U-Net has learnt nothing
                first_samples(args, A, nets, test)
        if run.every(args.eval_every) and not first:
            name, value = next(iter(judge_samples(args, A, nets, test, full=False).items()))
            run.log(**{name: value})
            if value < run.best:
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


# same as in regene.py
def floats(args, pictures):  # uint8 [n, S, S, 3] -> [n, 3, S, S] in [-1, 1]
    return pictures.to(args.device).permute(0, 3, 1, 2).float() / 127.5 - 1


def restore(args):
    """A, the averaged U-Net with tau, and the checkpoint that they come from."""
    name = "best.pt" if args.best else "checkpoint.pt"
    if (state := read_checkpoint(args, name)) is None:
        raise UserError(f"there is no {name} in {args.out}: train first, or give the run's --out")
    args.classes = state["config"].get("classes", 0)
    A, _, unet, embed = build(args)
    ema = AveragedModel(unet)
    for network, part in ((A, "A"), (ema, "ema"), (embed, "embed")):
        network.load_state_dict(state[part])
        network.eval().requires_grad_(False)
    return A, (ema.module, embed), state


@torch.no_grad()
def draw(args, A, nets, test, i, *key, fill=False, scale=None):
    """Samples number i [n] in [-1, 1], what they are drawn for, and the holes: classes in turn; nothing; of test images
    a small copy, or what is around a hole, which stays as it is. fill: that too, by a U-Net never trained to."""
    c, x, m, known = i % args.classes if args.condition == "class" else None, None, None, None
    if fill or args.condition in ("inpaint", "super"):
        rows = (i % len(test)).cpu()
        x = floats(args, test.images[rows])
        if args.condition != "super":
            u = torch.rand(200, 16, 4, 6, generator=generator(args.seed, HOLES, 0, args.device), device=args.device)
            m = holes(u[i % 200], args.size)
        c = condition(args, A, x, None if test.labels is None else test.labels[rows].to(args.device), m)
    if fill and args.condition != "inpaint":
        known = A.encode(x), 1 - F.max_pool2d(m, args.f)
    x_hat = A.decode(denoise(args, nets, c, len(i), *key, scale=scale, known=known)).clamp(-1, 1)
    return (x_hat if m is None else torch.where(m > 0, x_hat, x)), x, m


def first_samples(args, A, nets, test):
    k = min(args.classes, 10)  # samples.png: a column a class
    i = torch.arange(8 * (k or 8), device=args.device)
    picture(args, "samples.png", draw(args, A, nets, test, i % k if k else i, PICTURES, 0)[0], columns=k or 8)


@torch.no_grad()
def sample(args):
    """samples.png: a column a class; reconstructions.png: pairs; guidance.png: a row a scale, from the same noise;
    inpainting.png: image, hole, six ways to fill it; superresolution.png: image, small copy, six ways to enlarge it."""
    A, nets, _ = restore(args)
    test = load(args.data, "test", args.size, args.root, args.skip_broken)
    first_samples(args, A, nets, test)
    x = floats(args, test.images[:40])
    picture(args, "reconstructions.png", torch.stack([x, A.decode(A.encode(x))], 1).flatten(0, 1), columns=10)
    if args.condition == "class":
        i = torch.arange(10, device=args.device)
        rows = [draw(args, A, nets, test, i, PICTURES, 1, scale=scale)[0] for scale in (0, 1, 1.5, 2, 3, 5, 8)]
        picture(args, "guidance.png", torch.cat(rows), columns=10)
    i = torch.arange(8, device=args.device).repeat_interleave(6)
    x_hat, x, m = draw(args, A, nets, test, i, PICTURES, 2, fill=args.condition != "super")
    told = F.interpolate(condition(args, A, x, None, None), args.size) if m is None else torch.where(m > 0, 1.0, x)
    rows = torch.cat([torch.stack([x, told], 1)[::6], x_hat.unflatten(0, (8, 6))], 1).flatten(0, 1)
    picture(args, "superresolution.png" if m is None else "inpainting.png", rows)


def judge_samples(args, A, nets, test, full=True):
    data = load(args.data, args.fid_split, args.size, args.root, args.skip_broken)
    number = lambda chunk, n: chunk * fid.CHUNK + torch.arange(n, device=args.device)
    fake = lambda chunk, n: draw(args, A, nets, test, number(chunk, n), FAKES, chunk)[0]
    return fid.evaluate(fake, data, args.fid_samples, args.fid_features, args.device, args.fid_weights, full)


@torch.no_grad()
def evaluate(args):
    """metrics.json: reconstructions, the linear probe over t, FID and its sisters."""
    A, nets, state = restore(args)
    untrained, first = build(args)[2].eval(), min(state["step"], args.first_steps)
    device = torch.cuda.get_device_name() if "cuda" in args.device else f"cpu, {torch.get_num_threads()} threads"
    metrics = {"command": " ".join(sys.argv), "device": device, "torch": torch.__version__, "steps": state["step"]}
    metrics["images"] = first * args.first_batch + (state["step"] - first) * args.batch
    metrics |= {"seconds": round(state["seconds"], 1), "latent_scale": float(A.scale)}
    metrics["parameters"] = {k: sum(p.numel() for p in n.parameters()) for k, n in (("A", A), ("unet", nets[0]))}
    metrics["perceptual"] = {"none": "none: L1 alone", "vgg": "VGG16, all weights 1"}.get(args.perceptual, "LPIPS")
    read = lambda split, n=None: load(args.data, split, args.size, args.root, args.skip_broken, slice(n))
    test, psnr = read("test"), lambda x, y: -10 * ((x - y).square().mean((1, 2, 3)) / 4).log10()

    def reconstructions():
        how = args.fid_features, args.device, args.fid_weights, False
        x = lambda chunk, n: floats(args, test.images[chunk * fid.CHUNK :][:n])
        again = lambda x: A.decode(A.encode(x)).clamp(-1, 1)
        found = {"test_psnr": float(torch.cat([psnr(x(k, 100), again(x(k, 100))) for k in range(5)]).mean())}
        found |= fid.evaluate(lambda *part: again(x(*part)), test, min(args.fid_samples, len(test)), *how)
        return {f"reconstruction_{k}": v for k, v in found.items()}

    def probe():
        """What the middle block says of z_t, averaged over the map; the U-Net is told no class. t is chosen by a tenth
        of the training images. With classes in training it has seen labels; --class-dropout 1 gives a fair number."""
        if args.condition not in ("class", "none"):  # they see the image beside the noise
            return {}
        n, shape, abar = args.probe_samples or None, (-1, args.z, *[args.size // args.f] * 2), schedule(args.b1)
        train, test = read("train", n), read("test", n and n // 2)
        train.require_labels()
        latents = [linear_probe.extract(lambda x: A.encode(x).flatten(1), data, args.device) for data in (train, test)]
        null = torch.tensor([args.classes], device=args.device)

        def features(unet, t, z):  # [B, C]; the i-th image of a batch has the i-th noise
            random = generator(args.seed, PROBE, t, args.device)
            z = diffuse(z, torch.randn(z.shape, generator=random, device=args.device), float(abar[t]))
            context = nets[1](null).expand(len(z), 1, -1) if args.classes else None
            return unet(z, torch.full((len(z),), t, device=args.device), context, middle=True).mean((2, 3))

        def tables(unet, t):
            return [(torch.cat([features(unet, t, part.view(shape)) for part in z.split(256)]), y) for z, y in latents]

        order = torch.randperm(len(train), generator=generator(args.seed, PROBE, 0))
        held_out = (order < len(train) / 10).to(args.device)
        found, chosen = {}, []
        for t in TIMES:
            trained = (x, y), _ = tables(nets[0], t)
            chosen.append(linear_probe.probe((x[~held_out], y[~held_out]), (x[held_out], y[held_out]))["top1"])
            for name, pair in (("", trained), ("untrained_", tables(untrained, t))):
                found[f"{name}probe_t_{t}_top1"] = linear_probe.probe(*pair)["top1"]
        best = TIMES[max(range(len(TIMES)), key=chosen.__getitem__)]
        found |= {"probe_t": best, "probe_saw_labels": args.classes > 0 and args.class_dropout < 1}
        found["untrained_probe_top1"] = found[f"untrained_probe_t_{best}_top1"]
        encoder = lambda x: features(nets[0], best, A.encode(x))
        found |= linear_probe.evaluate(encoder, train, test, device=args.device)

        canvas = torch.ones(3, 240, 240)  # probe.png: accuracy from 0, below, to 1 over TIMES; orange: untrained
        for k in range(11):
            canvas[:, round(228 - k * 21.6), 12:228] = 0.8
        for name, colour in (("untrained_", (0.9, 0.5, 0.1)), ("", (0.1, 0.3, 0.8))):
            line = torch.tensor([found[f"{name}probe_t_{t}_top1"] for t in TIMES])
            points = torch.stack([torch.linspace(0.05, 0.95, len(TIMES)), 0.95 - 0.9 * line], 1)
            ink = distances(240, torch.cat([points[:-1], points[1:]], 1)) < 0.006
            canvas[:, ink.any(0)] = torch.tensor(colour)[:, None]
        picture(args, "probe.png", 2 * canvas[None] - 1)
        return found

    for measure in (reconstructions, probe, lambda: judge_samples(args, A, nets, test)):
        try:
            metrics |= measure()
        except UserError as error:  # no labels, no Inception weights, no room for a cache: the run keeps the rest
            flags = " ".join(word for word in sys.argv[1:] if word not in ("train", "eval"))
            print(f"{SCRIPT}.py: not measured: {error}; then: python {sys.argv[0]} eval {flags}", file=sys.stderr)
    if args.rank == 0:
        (args.out / "metrics.json.tmp").write_text(json.dumps(metrics, indent=1) + "\n")
        os.replace(args.out / "metrics.json.tmp", args.out / "metrics.json")
        shown = ("probe_top1", "psnr", "probe_t")
        kept = {k: v for k, v in metrics.items() if k.endswith(shown) or k.startswith(("fid", "fd_"))}
        print(f"{args.out} has the pictures, and metrics.json:", *(f"\n  {k} {v:.4g}" for k, v in kept.items()))


# ------------------------------------------------------------ the command line
# fmt: off
FLAGS = {  # those whose defaults are in PRESETS
    "size": "side of the images, pixels", "condition": "class, none, inpaint (fills holes), super (enlarges)",
    "autoencoder": "KL or VQ, and f; those of a preset are in PRESETS", "class_dropout": "images without class",
    "target": "what the U-Net learns, eps or v",
    "steps": "training steps of both stages; more of them extend a finished run", "first_steps": "those of stage 1",
    "batch": "images a step of stage 2, over all ranks and pieces", "first_batch": "images a step of stage 1",
    "lr": "learning rate of stage 2", "lr_first": "learning rate of the autoencoder and of D",
    "disc_start": "step of stage 1 from which D takes part",
    "perceptual": "beside L1: LPIPS, VGG16's features all alike, or nothing",
    "sampler": "ddim or ddpm", "sample_steps": "of the sampler, to 1000", "eta": "noise in DDIM, 0 (none) to 1",
    "guidance": "scale of classifier-free guidance, 1: none", "log_every": "steps between two lines of log.jsonl",
    "save_every": "steps between checkpoints, each with a samples.png", "fid_samples": "samples that FID is taken of",
    "fid_features": "random needs no weights, gives fd_random", "fid_split": "FID's real images",
    "probe_samples": "training images of the linear probe, with half as many test images; 0: all",
}
CHOICES = {"fid_features": ("inception", "random"), "fid_split": ("train", "test"), "perceptual": PERCEPTUAL,
           "condition": B1, "target": ("eps", "v"), "sampler": ("ddim", "ddpm")}
FREE = (  # what may differ between two runs of one checkpoint: beginnings of names
    "command", "root", "out", "steps", "accumulate", "device", "precision", "compile", "skip_broken", "best", "log_",
    "save_", "eval_", "fid_", "probe_", "sample", "eta", "guidance", "lin")
# fmt: on


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
    add("--lin", help="file of LPIPS's weights, lpips/weights/v0.1/vgg.pth")
    add("--stage1", default="", help="folder of a run whose autoencoder is taken: there is no stage 1 then")
    for name, text in FLAGS.items():
        add(f"--{name.replace('_', '-')}", type=type(PAPER[name]), choices=CHOICES.get(name), help=text)
    asked, _ = parser.parse_known_args([word for word in sys.argv[1:] if word not in ("-h", "--help")])
    usual = {"imagenet": "paper", "shapes": "demo", "dsprites": "demo", "mnist": "demo", "fashion_mnist": "demo"}
    preset = asked.preset or usual.get(asked.data, "small")
    parser.set_defaults(preset=preset, out=Path("runs", f"{SCRIPT}-{Path(asked.data).name}"), **PRESETS[preset])
    args = parser.parse_args()
    least = dict.fromkeys(("steps", "batch", "first_batch", "accumulate", "log_every", "save_every", "fid_samples"), 1)
    least |= {"size": 16, "sample_steps": 1}
    most = {"eta": 1, "class_dropout": 1, "sample_steps": 1000, "seed": 2**63 - 1}
    for name, value in vars(args).items():
        low, high = least.get(name, 0), most.get(name, math.inf)
        if isinstance(value, int | float) and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be from {low} to {high}")
    if args.autoencoder not in args.autoencoders:
        raise UserError(f"--autoencoder {args.autoencoder}: {preset} has {', '.join(args.autoencoders)}")
    multipliers, args.z, *_ = args.autoencoders[args.autoencoder]
    args.f, args.b1 = 2 ** (len(multipliers) - 1), B1[args.condition]
    smallest = args.f * 2 ** (len(args.unets[args.condition]["multipliers"]) - 1)
    if args.size % smallest:
        raise UserError(f"--size {args.size}: must be a multiple of {smallest}")
    args.first_steps = 0 if args.stage1 else args.first_steps
    args.config = {k: v for k, v in vars(args).items() if not k.startswith(FREE)}
    args.classes = 0  # the data will tell
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
