"""Diff-AE: "Diffusion Autoencoders: Toward a Meaningful and Decodable Representation", Konpat Preechakul, Nattanat
Chatthee, Suttisak Wizadwongsa, Supasorn Suwajanakorn, CVPR 2022, 2111.15640.

An encoder E tells in one vector z_sem what an image is about; a diffusion model D, told z_sem, takes noise off images.
Both learn from D's error alone: it is easier to denoise what one knows. D's sampler is deterministic, and backwards it
turns an image into the noise x_T that it would be drawn from: (z_sem, x_T) gives the image back, z_sem with other noise
the same content with other details. A second, small diffusion model L then learns to draw z_sem: samples.

    python diffae.py                                        # rendered shapes, five CPU minutes: pictures and numbers
    python diffae.py --data cifar10 --z-dim 128             # a 32x32 model on one GPU, its code narrower than usual
    torchrun --nproc_per_node 8 diffae.py --data ffhq --preset paper        # a folder ffhq of faces, the paper's model
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.utils import save_image

from common import fid, linear_probe
from common.data import NAMES, UserError, batches, generator, indices, load

SCRIPT = Path(__file__).stem
T = 1000  # steps of both diffusions
NOISE, DROPOUT, PICTURES, FAKES = range(4)  # streams of random numbers

# fmt: off
PAPER = dict(  # FFHQ128 (appendix A); by image size: base width, and its multiples at each level of D and of E.
    # 64: CelebA64, --autoencoder-steps 562500 --latent-batch 512; 256: FFHQ256, 1.4M steps with --batch 64
    size=128, shapes={64: (64, (1, 2, 4, 8), (1, 2, 4, 8, 8)), 128: (128, (1, 1, 2, 3, 4), (1, 1, 2, 3, 4, 4)),
                      256: (128, (1, 1, 2, 2, 4, 4), (1, 1, 2, 2, 4, 4, 4))},
    blocks=2, attention=(16,), patch=1, predict="eps", groups=32, embed=512, z_dim=512, dropout=0.1,
    layers=10, hidden=2048, autoencoder_steps=1_015_625, steps=1_410_156,  # 130M images, then 101M codes
    batch=128, latent_batch=256, lr=1e-4, lr_latent=1e-4, clip=1.0, ema=0.9999, flip=True, code_samples=0,
    classifier_steps=9375, decode_steps=100, encode_steps=250, latent_steps=100,  # 300k codes; as in the tables
    log_every=100, save_every=5000, fid_features="inception", fid_samples=50_000, fid_split="train",
    probe_samples=50_000, reconstruct_samples=1000)
SMALL = PAPER | dict(  # ours: the paper has no 32x32 model. With --size 64 it is the paper's CelebA64
    size=32, shapes={32: (128, (1, 2, 2, 2), (1, 2, 2, 2, 2)), 64: PAPER["shapes"][64]}, hidden=1024,
    autoencoder_steps=150_000, steps=200_000, latent_batch=512, save_every=2000, probe_samples=0)
DEMO = SMALL | dict(  # five minutes on two CPU cores. 2x2 pixels are one: a departure, twice as many steps in the time
    shapes={32: (32, (1, 2, 2), (1, 2, 2)), 64: (32, (1, 1, 2, 2), (1, 1, 2, 2))}, blocks=1, attention=(8,), patch=2,
    predict="v", groups=8, embed=64, z_dim=64, dropout=0.0, layers=4, hidden=256,  # 32 groups are blind to flat colour
    autoencoder_steps=1500, steps=3000, batch=16, latent_batch=256, lr=1e-3, lr_latent=1e-3, ema=0.99, flip=False,
    code_samples=5000, decode_steps=10, encode_steps=20, latent_steps=50, log_every=50, save_every=500,
    fid_features="random", fid_samples=500, fid_split="test", probe_samples=5000, reconstruct_samples=100)
PRESETS = {"demo": DEMO, "small": SMALL, "paper": PAPER}
# fmt: on


# ------------------------------------------------------------ parts, and E, the semantic encoder
# same as in vqgan_transformer.py
def conv(cin, cout, kernel=3):
    return nn.Conv2d(cin, cout, kernel, padding=kernel // 2)


norm = lambda channels, groups: nn.GroupNorm(min(groups, channels), channels)


def zero(layer):  # a branch that ends in it starts as nothing
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    return layer


def adagn(h, t_s, t_b, z_s):
    """AdaGN(h, t, z_sem) = z_s (t_s GroupNorm(h) + t_b), section 3.1, of h [B, C, h, w] already normalised. Factors
    [B, C] are told as what they differ from 1 by (official code; the paper leaves the 1 out)."""
    t_s, t_b, z_s = (part[..., None, None] for part in (t_s, t_b, z_s))
    return (h * (1 + t_s) + t_b) * (1 + z_s)


class Res(nn.Module):
    """Residual block, [B, cin, h, w] -> [B, cout, h', w'], the map as large as before, "half" or "twice". With `embed`
    it is D's: AdaGN between two convolutions, by SiLU(t) [B, embed] and SiLU(z) [B, z_dim]. Without it is E's, which
    has the first convolution only (official code; "the first half of the U-Net" leaves that open)."""

    def __init__(self, cin, cout, resample="", embed=0, z_dim=0, dropout=0.0, groups=32):
        super().__init__()
        scale = {"": nn.Identity(), "half": nn.AvgPool2d(2), "twice": nn.Upsample(scale_factor=2)}[resample]
        self.first = nn.Sequential(norm(cin, groups), nn.SiLU(), scale, conv(cin, cout))
        self.skip = nn.Sequential(scale, nn.Identity() if cin == cout else conv(cin, cout, 1))
        if embed:
            self.time, self.code = nn.Linear(embed, 2 * cout), nn.Linear(z_dim, cout) if z_dim else None
            self.norm = norm(cout, groups)
            self.last = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), zero(conv(cout, cout)))

    def forward(self, x, t=None, z=None):
        h = self.first(x)
        if t is not None:
            t_s, t_b = self.time(t).chunk(2, 1)
            z_s = torch.zeros_like(t_b) if z is None else self.code(z)
            h = self.last(adagn(self.norm(h), t_s, t_b, z_s))
        return self.skip(x) + h


class Attention(nn.Module):  # one head over all positions; the identity at the start
    def __init__(self, channels, groups=32):
        super().__init__()
        self.norm, self.out = norm(channels, groups), zero(conv(channels, channels, 1))
        self.qkv = conv(channels, 3 * channels, 1)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).flatten(2).mT[:, None].chunk(3, 3)  # [B, 1, h w, C]
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0].mT
        return x + self.out(attended.unflatten(2, x.shape[2:]))


def encoder(ch, multipliers, blocks, attention, size, z_dim, patch=1, groups=32):
    """x [B, 3, size, size] -> z_sem [B, z_dim], not bounded; `attention`: sizes of maps that have it; `patch`: side of
    the squares of pixels that are one pixel of more channels to the network (1 in the paper)."""
    res, attend = partial(Res, groups=groups), partial(Attention, groups=groups)
    layers, cin, size = [nn.PixelUnshuffle(patch), conv(3 * patch**2, ch)], ch, size // patch
    for i, cout in enumerate(ch * m for m in multipliers):
        for _ in range(blocks):
            layers += [res(cin, cout)] + [attend(cout)] * (size >> i in attention)
            cin = cout
        layers += [res(cin, cin, "half")] if i < len(multipliers) - 1 else []
    layers += [res(cin, cin), attend(cin), res(cin, cin), norm(cin, groups), nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), conv(cin, z_dim, 1), nn.Flatten())


# ------------------------------------------------------------ D, the decoder: a U-Net that predicts noise
def sinusoids(t, width):
    """cos(t f_k), then sin(t f_k), f_k = 10000^(-k / half): [B] -> [B, width]."""
    half = width // 2
    angles = t[:, None].float() * torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    return torch.cat([angles.cos(), angles.sin()], 1)


class Layers(nn.Sequential):  # in a row; residual blocks are told the conditions
    def forward(self, h, *conditions):
        for layer in self:
            h = layer(h, *conditions) if isinstance(layer, Res) else layer(h)
        return h


class Decoder(nn.Module):
    """eps_theta(x_t, t, z_sem): [B, 3, size, size], [B], [B, z_dim] -> [B, 3, size, size]. With z_dim 0, and no z, it
    is the DDIM that the paper compares with. With `v` the layers give v = sqrt(alpha_t) eps - sqrt(1 - alpha_t) x_0
    (Salimans & Ho 2022, 2202.00512). A departure, for short runs: at high noise eps is nearly x_t, which normalised
    layers are slow to return, and what they miss of it drowns x_0. v is nearly -x_0 there, which only z_sem tells."""

    def __init__(self, ch, widths, blocks, attention, size, embed, z_dim, dropout=0.0, patch=1, groups=32, v=False):
        super().__init__()
        self.register_buffer("alpha", schedule() if v else None, persistent=False)
        res = partial(Res, embed=embed, z_dim=z_dim, dropout=dropout, groups=groups)
        widths = [ch * m for m in widths]
        attend = lambda i: [Attention(widths[i], groups)] * (size // patch >> i in attention)
        self.ch, self.time = ch, nn.Sequential(nn.Linear(ch, embed), nn.SiLU(), nn.Linear(embed, embed))
        self.down, self.up = nn.ModuleList([Layers(nn.PixelUnshuffle(patch), conv(3 * patch**2, ch))]), nn.ModuleList()
        cin, skips = ch, [ch]  # channels now, and of each output of `down`
        for i, cout in enumerate(widths):
            for _ in range(blocks):
                self.down.append(Layers(res(cin, cout), *attend(i)))
                cin = cout
            self.down.extend([Layers(res(cout, cout, "half"))] if i < len(widths) - 1 else [])
            skips += [cout] * (len(self.down) - len(skips))
        self.middle = Layers(res(cin, cin), Attention(cin, groups), res(cin, cin))
        for i, cout in reversed(list(enumerate(widths))):
            for j in range(blocks + 1):
                grow = [res(cout, cout, "twice")] if i and j == blocks else []
                self.up.append(Layers(res(cin + skips.pop(), cout), *attend(i), *grow))
                cin = cout
        self.last = nn.Sequential(norm(ch, groups), nn.SiLU(), zero(conv(ch, 3 * patch**2)), nn.PixelShuffle(patch))

    def forward(self, x, t, z=None):
        conditions = [F.silu(self.time(sinusoids(t, self.ch)))] + ([] if z is None else [F.silu(z)])
        h, skips = x, []
        for layers in self.down:
            h = layers(h, *conditions)
            skips.append(h)
        h = self.middle(h, *conditions)
        for layers in self.up:
            h = layers(torch.cat([h, skips.pop()], 1), *conditions)
        h = self.last(h).float()
        return h if self.alpha is None else diffuse(h, t, x, self.alpha)  # sqrt(alpha_t) v + sqrt(1 - alpha_t) x_t


# ------------------------------------------------------------ L, the latent DDIM
class Latent(nn.Module):
    """eps_omega(z_t, t) of normalised codes, [B, z_dim], [B] -> [B, z_dim]: a perceptron whose every layer sees the
    input again (appendix A). It keeps the mean and the standard deviation of the training set's codes."""

    def __init__(self, z_dim, layers, hidden, time=64):
        super().__init__()
        self.width, self.time = time, nn.Sequential(nn.Linear(time, z_dim), nn.SiLU(), nn.Linear(z_dim, z_dim))
        self.layers, self.scales, self.norms = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i in range(layers - 1):
            self.layers.append(nn.Linear(hidden + z_dim if i else z_dim, hidden))
            self.scales.append(nn.Linear(z_dim, hidden))
            self.norms.append(nn.LayerNorm(hidden))
        for layer in (*self.layers, *self.scales):
            nn.init.kaiming_normal_(layer.weight)
        self.last = nn.Linear(hidden + z_dim, z_dim)
        self.register_buffer("mean", torch.zeros(z_dim))
        self.register_buffer("std", torch.ones(z_dim))

    def normalise(self, z):
        return (z - self.mean) / self.std

    def denormalise(self, z):
        return z * self.std + self.mean

    def forward(self, z, t):
        c, h = F.silu(self.time(sinusoids(t, self.width))), z
        for i, (layer, scale, norm) in enumerate(zip(self.layers, self.scales, self.norms, strict=True)):
            h = layer(torch.cat([h, z], 1) if i else h) * (1 + scale(c))
            h = F.silu(norm(h))  # after the scale, other than in D
        return self.last(torch.cat([h, z], 1)).float()


# ------------------------------------------------------------ diffusion and the objectives
def schedule(latent=False, device="cpu"):
    """alpha_t of the paper, the abar_t of DDPM, for t = 0 ... T - 1: of images with linear betas, of codes constant."""
    first, last = (0.008, 0.008) if latent else (1e-4, 0.02)
    return (1 - torch.linspace(first, last, T, dtype=torch.float64, device=device)).cumprod(0).float()


def diffuse(x_0, t, eps, alpha):
    """q(x_t | x_0) = N(sqrt(alpha_t) x_0, (1 - alpha_t) I), section 2; eps ~ N(0, I)."""
    a = alpha[t].view(-1, *[1] * (x_0.ndim - 1))
    return a.sqrt() * x_0 + (1 - a).sqrt() * eps


def autoencoder_loss(E, D, x_0, t, eps, alpha, v=False):
    """L_simple (section 3.1), the mean over pixels, of eps or of v. E learns through D's scales and nothing else."""
    error = (D(diffuse(x_0, t, eps, alpha), t, E(x_0)) - eps).square().mean((1, 2, 3))
    return (error / alpha[t] if v else error).mean()  # v is off by (eps_theta - eps) / sqrt(alpha_t)


def latent_loss(L, z_0, t, eps, alpha):
    """L_latent (section 4): L1, of normalised codes."""
    return F.l1_loss(L(diffuse(z_0, t, eps, alpha), t), eps)


@torch.no_grad()
def ddim(eps, x, alpha, steps, encode=False, clamp=True):
    """The deterministic sampler (eta = 0), from noise to data with t = 0, T / steps, 2 T / steps, ... in falling order.
    `encode`: the stochastic encoder (section 3.3), the same backwards, from data to x_T. eps(x, t) is the network."""
    times = range(0, T, T // steps)
    stops = [1.0, *alpha[times].tolist(), 0.0]  # what is left of the data before and after each step
    for i in range(steps) if encode else reversed(range(steps)):
        a, a_to = stops[i + 1], stops[i + 2 if encode else i]
        e = eps(x, torch.full((len(x),), times[i], device=x.device))
        x_0 = (x - (1 - a) ** 0.5 * e) / a**0.5
        if clamp:  # images are in [-1, 1]
            x_0 = x_0.clamp(-1, 1)
            e = (x - a**0.5 * x_0) / (1 - a) ** 0.5
        x = a_to**0.5 * x_0 + (1 - a_to) ** 0.5 * e
    return x


def slerp(a, b, along):
    """From a to b [B, ...] on the sphere, at `along` [n] from 0 to 1: [B, n, ...]. Half-way, lerp is hardly noise."""
    theta = F.cosine_similarity(a.flatten(1), b.flatten(1)).acos()[:, None]  # [B, 1]
    wa, wb = ((part * theta).sin() / theta.sin() for part in (1 - along, along))  # [B, n]
    return torch.einsum("bn,b...->bn...", wa, a) + torch.einsum("bn,b...->bn...", wb, b)


def edit(z, w, s):
    """z [B, d], normalised, s * sqrt(d) along the classifier's weight w; sqrt(d) is such a code's usual length."""
    return z + s * z.shape[-1] ** 0.5 * F.normalize(w, dim=-1)


def ssim(x, y):
    """Structural similarity [B] (Wang et al. 2004) of images in [0, 1]; the edge is padded by zeros (official code)."""
    g = torch.exp(-((torch.arange(11, device=x.device) - 5.0) ** 2) / (2 * 1.5**2))
    window = (g[:, None] * g / g.sum() ** 2).expand(x.shape[1], 1, 11, 11)
    blur = lambda image: F.conv2d(image, window, padding=5, groups=x.shape[1])
    mu_x, mu_y = blur(x), blur(y)
    var_x, var_y, cov = blur(x * x) - mu_x**2, blur(y * y) - mu_y**2, blur(x * y) - mu_x * mu_y
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * mu_x * mu_y + c1) * (2 * cov + c2) / ((mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2))).mean((1, 2, 3))


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
    """E, D and L with their first weights, the same on every rank."""
    torch.manual_seed(args.seed)
    (ch, of_D, of_E), maps = args.shapes[args.size], (args.blocks, args.attention, args.size)
    E = encoder(ch, of_E, *maps, args.z_dim, args.patch, args.groups)
    D = Decoder(ch, of_D, *maps, args.embed, args.z_dim, args.dropout, args.patch, args.groups, args.predict == "v")
    networks = E, D, Latent(args.z_dim, args.layers, args.hidden)
    return [network.to(args.device, memory_format=torch.channels_last) for network in networks]


normal = lambda args, random, *shape: torch.randn(shape, generator=random, device=args.device)
read = lambda args, split, n=0: load(args.data, split, args.size, args.root, args.skip_broken, slice(n or None))
images = lambda args, pictures: pictures.to(args.device).permute(0, 3, 1, 2).float() / 127.5 - 1  # of uint8


def noise(args, step, *shape):  # t [n] and eps [n, ...], drawn for the whole batch, then cut into this rank's pieces
    random = generator(args.seed, NOISE, step, args.device)
    t, eps = torch.randint(T, shape[:1], generator=random, device=args.device), normal(args, random, *shape)
    cut = lambda part: part.chunk(args.world * args.accumulate)[args.rank :: args.world]
    return list(zip(cut(t), cut(eps), strict=True))


def train(args):
    E, D, L = networks = build(args)
    averages = {n: AveragedModel(n, multi_avg_fn=get_ema_multi_avg_fn(args.ema)) for n in networks}
    E_ema, D_ema, L_ema = (average.eval().requires_grad_(False) for average in averages.values())
    for network, average in averages.items():
        average.update_parameters(network)  # the first update is a copy; from here on the decay is what it is
    opt = torch.optim.Adam([*E.parameters(), *D.parameters()], args.lr, fused=True)
    opt_L = torch.optim.AdamW(L.parameters(), args.lr_latent, weight_decay=0.01, fused=True)
    run = Run(args, E=E, D=D, L=L, E_ema=E_ema, D_ema=D_ema, L_ema=L_ema, opt=opt, opt_L=opt_L)
    for network in networks if args.compile else ():
        network.compile()
    autocast = torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.precision == "bf16")
    cut = args.accumulate, args.flip, None, args.device, args.rank, args.world
    stream, codes, v = batches(read(args, "train"), args.batch, args.seed, run.step, *cut), None, args.predict == "v"
    if args.latent_batch % (args.world * args.accumulate):
        raise UserError(f"--latent-batch {args.latent_batch} does not divide by {args.world} x {args.accumulate}")

    while run.step < args.steps:
        first = run.step < args.autoencoder_steps
        shape = (args.batch, 3, args.size, args.size) if first else (args.latent_batch, args.z_dim)
        learning, optimiser = ((E, D), opt) if first else ((L,), opt_L)
        if not first and codes is None:  # E is what it will be; when training resumes its codes are the same again
            codes, _ = linear_probe.extract(E_ema, read(args, "train", args.code_samples), args.device)
            if run.step == args.autoencoder_steps:  # later they come from the checkpoint
                L.mean.copy_(codes.mean(0)), L.std.copy_(codes.std(0))
        alpha = schedule(not first, args.device)
        optimiser.zero_grad()
        for piece, (t, eps) in enumerate(noise(args, run.step, *shape)):
            if first:
                x, number = next(stream)[0], (run.step * args.accumulate + piece) * args.world + args.rank
                torch.manual_seed(generator(args.seed, DROPOUT, number).initial_seed())  # dropout knows no other
            else:
                part = args.rank, args.world, piece, args.accumulate
                i = indices(len(codes), args.latent_batch, run.step - args.autoencoder_steps, args.seed, *part)
                z = L.normalise(codes[torch.from_numpy(i).to(args.device)])
            with autocast:
                loss = autoencoder_loss(E, D, x, t, eps, alpha, v) if first else latent_loss(L, z, t, eps, alpha)
            (loss / args.accumulate).backward()
        average_gradients(args, *learning)
        found = {"loss_latent": loss, "lr": args.lr_latent}
        if first:  # E's is exactly 0 in the first two steps: all that it acts through starts at 0
            of_E = nn.utils.get_total_norm([p.grad for p in E.parameters()])
            found = {"loss": loss, "E_gradient": of_E, "lr": args.lr}
        nn.utils.clip_grad_norm_([p for network in learning for p in network.parameters()], args.clip)
        optimiser.step()
        for network in learning:
            averages[network].update_parameters(network)
        run.step += 1

        if run.every(args.log_every):
            run.log(**found)
        if run.every(args.save_every) or run.every(args.eval_every):
            run.save()
            if first:  # L has learnt nothing yet
                picture(args, "reconstructions.png", reconstructions(args, E_ema, D_ema))
            else:
                picture(args, "samples.png", samples(args, D_ema, L_ema.module, PICTURES, 0, 64))
        if run.every(args.eval_every) and not first:
            name, value = next(iter(judge(args, partial(samples, args, D_ema, L_ema.module, FAKES), False).items()))
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


def restore(args):
    """E, D and L averaged, in eval mode, and the checkpoint that they come from."""
    name = "best.pt" if args.best else "checkpoint.pt"
    if (state := read_checkpoint(args, name)) is None:
        raise UserError(f"there is no {name} in {args.out}: train first, or give the run's --out")
    networks = [AveragedModel(network).eval().requires_grad_(False) for network in build(args)]
    for k, network in zip("EDL", networks, strict=True):
        network.load_state_dict(state[f"{k}_ema"])
    return *(network.module for network in networks), state


def decode(args, D, z, x, encode=False):
    """Images from x_T and z_sem; or, to encode, x_T of images whose semantic code is z."""
    return ddim(partial(D, z=z), x, schedule(), args.encode_steps if encode else args.decode_steps, encode)


@torch.no_grad()
def samples(args, D, L, stream, chunk, n):
    """Images of codes that L has drawn, and new noise."""
    random = generator(args.seed, stream, chunk, args.device)
    z = ddim(L, normal(args, random, n, args.z_dim), schedule(latent=True), args.latent_steps, clamp=False)
    return decode(args, D, L.denormalise(z), normal(args, random, n, 3, args.size, args.size))


@torch.no_grad()
def reconstructions(args, E, D):
    """A row an image x, eight of the test set: x, its x_T, z_sem with this x_T, then z_sem with five others."""
    x = images(args, read(args, "test", 8).images)
    z, random = E(x), generator(args.seed, PICTURES, 1, args.device)
    x_T = torch.cat([decode(args, D, z, x, encode=True)[:, None], normal(args, random, len(x), 5, *x.shape[1:])], 1)
    x_hat = decode(args, D, z.repeat_interleave(6, 0), x_T.flatten(0, 1)).unflatten(0, (len(x), 6))
    return torch.cat([x[:, None], x_T[:, :1], x_hat], 1).flatten(0, 1)


@torch.enable_grad()
def attributes(args, E, L):
    """Weights [K, z_dim] of linear classifiers on normalised codes, each class against all others. This and the probe
    are all that reads labels."""
    data = read(args, "train", args.code_samples)
    z, y = linear_probe.extract(E, data, args.device)
    z, y = L.normalise(z), F.one_hot(y, len(data.classes)).float()
    torch.manual_seed(args.seed)
    classifier = nn.Linear(args.z_dim, len(data.classes)).to(args.device)
    optimiser = torch.optim.Adam(classifier.parameters(), 1e-3, fused=True)
    for step in range(args.classifier_steps):
        i = torch.from_numpy(indices(len(z), 32, step, args.seed)).to(z.device)
        optimiser.zero_grad()
        F.binary_cross_entropy_with_logits(classifier(z[i]), y[i]).backward()
        optimiser.step()
    return classifier.weight.detach()


@torch.no_grad()
def sample(args):
    """samples.png; reconstructions.png; interpolations.png: from one test image to another; edits.png, where there are
    labels: a row a class, a test image and its code moved against the class and towards it, s = -0.3 ... 0.3."""
    E, D, L, _ = restore(args)
    picture(args, "samples.png", samples(args, D, L, PICTURES, 0, 64))
    picture(args, "reconstructions.png", reconstructions(args, E, D))
    data = read(args, "test", 16)
    x = images(args, data.images)
    z, n = E(x), len(x) // 2
    x_T, along = decode(args, D, z, x, encode=True), torch.linspace(0, 1, 10, device=args.device)
    ends = torch.lerp(z[:n, None], z[n : 2 * n, None], along[:, None])
    between = decode(args, D, ends.flatten(0, 1), slerp(x_T[:n], x_T[n : 2 * n], along).flatten(0, 1))
    picture(args, "interpolations.png", between, columns=10)
    if data.labels is not None:
        w, s = attributes(args, E, L)[: len(x)], torch.tensor([-0.3, -0.15, 0, 0.15, 0.3], device=args.device)
        moved = edit(L.normalise(z[: len(w), None]), w[:, None], s[:, None]).flatten(0, 1)
        edited = decode(args, D, L.denormalise(moved), x_T[: len(w)].repeat_interleave(5, 0)).unflatten(0, (-1, 5))
        picture(args, "edits.png", torch.cat([x[: len(w), None], edited], 1).flatten(0, 1), columns=6)


def judge(args, draw, full=True, n=0):
    data, n = read(args, args.fid_split), n or args.fid_samples
    return fid.evaluate(draw, data, n, args.fid_features, args.device, args.fid_weights, full)


@torch.no_grad()
def evaluate(args):
    """metrics.json: squared error and structural similarity of reconstructions in [0, 1], from the encoded x_T and from
    random ones; the linear probe of z_sem; FID and its sisters, of samples, and named apart of real images' codes."""
    E, D, L, state = restore(args)
    untrained, test = build(args), read(args, "test", args.reconstruct_samples)
    device = torch.cuda.get_device_name() if "cuda" in args.device else f"cpu, {torch.get_num_threads()} threads"
    metrics = {"command": " ".join(sys.argv), "device": device, "torch": torch.__version__, "steps": state["step"]}
    metrics |= {"images": args.batch * min(state["step"], args.autoencoder_steps), "seconds": round(state["seconds"])}
    metrics["parameters"] = {k: sum(p.numel() for p in m.parameters()) for k, m in zip("EDL", untrained, strict=True)}
    metrics |= {k: getattr(args, k) for k in ("decode_steps", "encode_steps", "latent_steps")}
    random_x_T = lambda x, chunk: normal(args, generator(args.seed, FAKES, chunk, args.device), *x.shape)

    def reconstruct():
        found, x = [], images(args, test.images)
        for chunk, part in enumerate(x.split(100)):
            z = E(part)
            for x_T in (decode(args, D, z, part, encode=True), random_x_T(part, chunk)):
                x_hat = decode(args, D, z, x_T)
                found += [((part - x_hat) / 2).square().mean((1, 2, 3)), ssim((part + 1) / 2, (x_hat + 1) / 2)]
        names = ("mse_encoded_x_T", "ssim_encoded_x_T", "mse_random_x_T", "ssim_random_x_T")
        scores = {name: float(torch.cat(found[i::4]).mean()) for i, name in enumerate(names)}
        return scores | {"mse_mean_image": float(((x - x.mean(0)) / 2).square().mean()), "reconstructed": len(x)}

    def autoencoding():
        data = read(args, args.fid_split, args.fid_samples)
        x = lambda chunk, n: images(args, data.images[chunk * fid.CHUNK :][:n])
        draw = lambda chunk, n: decode(args, D, E(x(chunk, n)), random_x_T(x(chunk, n), chunk))
        return {f"autoencoding_{k}": v for k, v in judge(args, draw, False, len(data)).items()}

    halves = read(args, "train", args.probe_samples), read(args, "test", args.probe_samples // 2)
    probe = lambda: linear_probe.evaluate(E, *halves, untrained[0], args.device)
    for measure in (reconstruct, probe, autoencoding, lambda: judge(args, partial(samples, args, D, L, FAKES))):
        try:
            metrics |= measure()
        except UserError as error:  # no labels, no Inception weights, no room for a cache: the run keeps the rest
            flags = " ".join(word for word in sys.argv[1:] if word not in ("train", "eval"))
            print(f"{SCRIPT}.py: not measured: {error}; then: python {sys.argv[0]} eval {flags}", file=sys.stderr)
    if args.rank == 0:
        (args.out / "metrics.json.tmp").write_text(json.dumps(metrics, indent=1) + "\n")
        os.replace(args.out / "metrics.json.tmp", args.out / "metrics.json")
        shown = ("fid", "fd_", "mse", "ssim", "autoencoding_fid", "autoencoding_fd")
        kept = [k for k in metrics if k.endswith("top1") or k.startswith(shown)]
        print(f"{args.out} has the pictures, and metrics.json:", *(f"\n  {k} {metrics[k]:.4g}" for k in kept))
        print("fid, fd_random (NOT FID): 0 is best; autoencoding_: of real images' codes decoded, which is no sampling")


# ------------------------------------------------------------ the command line
# fmt: off
FLAGS = {  # those whose defaults are in PRESETS
    "size": "side of the images, pixels", "z_dim": "numbers in z_sem", "layers": "of L",
    "autoencoder_steps": "training steps of E and D, the first stage", "classifier_steps": "of attributes' classifiers",
    "steps": "training steps of both stages; more of them extend a finished run", "predict": "of D, eps in the paper",
    "batch": "images a step, over all ranks and pieces", "latent_batch": "codes a step of L, over all ranks and pieces",
    "lr": "learning rate of E and D", "lr_latent": "learning rate of L", "dropout": "in D, 0 to 1",
    "ema": "decay of the averages of all networks, 0 to 1", "log_every": "steps between two lines of log.jsonl",
    "code_samples": "training images whose codes L and the classifiers of attributes learn from; 0: all",
    "decode_steps": "steps from x_T to an image, a divisor of 1000", "encode_steps": "steps from an image to its x_T",
    "latent_steps": "steps from noise to z_sem", "reconstruct_samples": "test images that are reconstructed; 0: all",
    "save_every": "steps between checkpoints, each with a samples.png", "fid_samples": "samples that FID is taken of",
    "fid_features": "random needs no weights, gives fd_random", "fid_split": "FID's real images",
    "probe_samples": "training images of the linear probe, with half as many test images; 0: all",
}
CHOICES = {"predict": ("eps", "v"), "fid_features": ("inception", "random"), "fid_split": ("train", "test")}
FREE = (  # what may differ between two runs of one checkpoint: beginnings of names
    "command", "root", "out", "steps", "accumulate", "device", "precision", "compile", "skip_broken", "best", "log_",
    "save_", "eval_", "fid_", "probe_", "reconstruct_", "classifier_", "decode_", "encode_", "latent_steps")
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
    for name, text in FLAGS.items():
        add(f"--{name.replace('_', '-')}", type=type(PAPER[name]), choices=CHOICES.get(name), help=text)
    asked, _ = parser.parse_known_args([word for word in sys.argv[1:] if word not in ("-h", "--help")])
    usual = {"imagenet": "paper", "celeba": "paper", "shapes": "demo", "dsprites": "demo", "mnist": "demo"}
    preset = asked.preset or (usual | {"fashion_mnist": "demo"}).get(asked.data, "small")
    parser.set_defaults(preset=preset, out=Path("runs", f"{SCRIPT}-{Path(asked.data).name}"), **PRESETS[preset])
    args = parser.parse_args()
    least = dict.fromkeys(("steps", "batch", "latent_batch", "accumulate", "log_every", "save_every", "fid_samples"), 1)
    least |= {"z_dim": 1, "layers": 2, "autoencoder_steps": 1, "decode_steps": 1, "encode_steps": 1, "latent_steps": 1}
    most = {"ema": 1, "dropout": 1, "seed": 2**63 - 1}
    for name, value in vars(args).items():
        low, high = least.get(name, 0), most.get(name, math.inf)
        if isinstance(value, int | float) and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be from {low} to {high}")
    if args.size not in args.shapes:
        raise UserError(f"--size {args.size}: must be one of {[*args.shapes]} with --preset {preset}")
    if any(T % steps for steps in (args.decode_steps, args.encode_steps, args.latent_steps)):
        raise UserError(f"--decode-steps, --encode-steps and --latent-steps must divide {T}")
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
