"""BigBiGAN: "Large Scale Adversarial Representation Learning", Jeff Donahue, Karen Simonyan, NeurIPS 2019, 1907.02544.

A GAN that learns to see while it learns to draw. Beside BigGAN's generator G: z -> x stands an encoder E: x -> z, and
the discriminator D judges pairs: (x, E(x)) of real images against (G(z), z) of drawn ones. Only an E and a G that
invert each other fool it for good, so E finds out what an image is about. No labels, no reconstruction loss, no KL.

    python bigbigan.py                                        # rendered shapes, five CPU minutes: pictures and numbers
    python bigbigan.py --data cifar10                         # a 32x32 model on one GPU
    torchrun --nproc_per_node 8 bigbigan.py --data imagenet   # the paper's model
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from itertools import islice, pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torchvision.utils import save_image

from common import fid, linear_probe
from common.data import NAMES, UserError, batches, generator, load

SCRIPT = Path(__file__).stem
LATENTS, POSTERIOR, STANDING, PICTURES, FAKES = range(5)  # streams of random numbers

# G by image size: channels of the 4x4 map and after each block, each with z_chunk latents. F by image size: channels
# after each block, how many blocks halve the map, and a factor on the copy of f that enters J.
PAPER = dict(  # "High-res E, E learning rate x 10" (Tables 1 and 2); G, F and Adam: BigGAN's Table 4, appendix B
    size=128, encoder_size=256, z_chunk=20, embed_dim=128, attention=64,
    G={64: (1536, 1536, 768, 384, 192), 128: (1536, 1536, 768, 384, 192, 96),
       256: (1536, 1536, 768, 768, 384, 192, 96)},
    F={64: ((96, 192, 384, 768, 1536), 4, 1.0), 128: ((96, 192, 384, 768, 1536, 1536), 5, 1.0),
       256: ((96, 192, 384, 768, 768, 1536, 1536), 6, 1.0)},
    latent_width=2048, latent_blocks=4, latent_sn=True, encoder="resnet50", mlp_width=4096, sigma_bias=0.0,
    crop_area=0.08, crop_ratio=4 / 3,  # those of Table 3's generation runs: 0.5 and 1
    steps=500_000, batch=2048, d_steps=2, reuse=False, lr_d=2e-4, lr_g=5e-5, eta=10.0, betas=(0.0, 0.999), sn_eps=1e-4,
    ema=0.9999, ema_start=1000, standing=100, log_every=100, save_every=1000, fid_split="test",  # ema_start: not stated
    fid_features="inception", fid_samples=50_000, probe_samples=50_000, sgd_probe=100_000)  # fmt: skip
SMALL = PAPER | dict(  # BigGAN's CIFAR-10 recipe with shared embedding and hierarchical z: the paper has no 32x32 model
    size=32, encoder_size=0, z_chunk=32, attention=0, G={32: (256,) * 4, 64: (1024, 1024, 512, 256, 128)},
    # f sums 64 positions, not 16 as in the paper: 1/8 keeps it from drowning z in J (|f| = 334, |h| = 14 at first)
    F={32: ((256,) * 4, 2, 1 / 8), 64: ((64, 128, 256, 512, 1024), 4, 1.0)}, latent_width=512, encoder="resnet18",
    mlp_width=1024, crop_area=1.0, crop_ratio=1.0, steps=100_000, batch=64, lr_g=2e-4, eta=1.0, sn_eps=1e-6,
    save_every=2000, fid_split="train", probe_samples=0, sgd_probe=0)  # fmt: skip
DEMO = SMALL | dict(  # five minutes on two CPU cores, found by experiment
    z_chunk=8, embed_dim=32, G={32: (64, 64, 32, 16), 64: (64, 64, 64, 32, 16)},
    F={32: ((16, 32, 64, 64), 3, 1.0), 64: ((16, 32, 64, 64, 64), 4, 1.0)}, latent_width=128, latent_blocks=2,
    latent_sn=False, encoder="resnet10", mlp_width=256, sigma_bias=-1.0, steps=800, batch=32, d_steps=1, reuse=True,
    lr_d=5e-4, lr_g=5e-4, eta=2.5, betas=(0.0, 0.99), ema=0.998, ema_start=200, standing=20, log_every=50,
    save_every=500, fid_features="random", fid_samples=5000, fid_split="test", probe_samples=10_000)  # fmt: skip
PRESETS = {"demo": DEMO, "small": SMALL, "paper": PAPER}
BACKBONES = {  # of E: kind of unit, units a stage, channels of the first stage, the stem's stride on small images
    "resnet10": ("basic", (1, 1, 1, 1), 32, 2), "resnet18": ("basic", (2, 2, 2, 2), 64, 1),
    "resnet50": ("bottleneck", (3, 4, 6, 3), 256, 1), "resnet50x2": ("bottleneck", (3, 4, 6, 3), 512, 1),
    "resnet101": ("bottleneck", (3, 4, 23, 3), 256, 1), "revnet50": ("reversible", (3, 4, 6, 3), 256, 1),
    "revnet50x2": ("reversible", (3, 4, 6, 3), 512, 1), "revnet50x4": ("reversible", (3, 4, 6, 3), 1024, 1),
}  # fmt: skip


# ------------------------------------------------------------ G: BigGAN's generator, with a single "class"
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


# same as in biggan.py
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


# ------------------------------------------------------------ D = {F, H, J}
# same as in biggan.py
class Residual(nn.Module):  # x -> skip(x) + branch(x)
    def __init__(self, branch, skip=()):
        super().__init__()
        self.branch, self.skip = nn.Sequential(*branch), nn.Sequential(*skip)

    def forward(self, x):
        return self.skip(x) + self.branch(x)


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


def mlp(cin, width, blocks, linear=nn.Linear):
    """Blocks x -> skip(x) + L2 relu(L1 relu(x)), the first without its first ReLU; skip is linear if widths differ."""
    layers = []
    for i in range(blocks):
        branch = [nn.ReLU()] * (i > 0) + [linear(cin, width), nn.ReLU(), linear(width, width)]
        layers.append(Residual(branch, [linear(cin, width)] if cin != width else []))
        cin = width
    return nn.Sequential(*layers)


class Discriminator(nn.Module):
    """x [B, 3, S, S], z [B, z_dim] -> scores s_x of images, s_z of latents, s_xz of pairs, [B] each (section 2)."""

    def __init__(self, trunk, f_dim, z_dim, width, blocks, latent_sn=True, f_scale=1.0, eps=1e-4):
        super().__init__()
        linear = lambda cin, cout: spectral(nn.Linear(cin, cout), eps if latent_sn else None)
        self.F, self.H, self.J = trunk, mlp(z_dim, width, blocks, linear), mlp(f_dim + width, width, blocks, linear)
        self.s_x, self.s_z, self.s_xz = spectral(nn.Linear(f_dim, 1), eps), linear(width, 1), linear(width, 1)
        self.f_scale = f_scale

    def forward(self, x, z):
        f = F.relu(self.F(x)).sum((2, 3), dtype=torch.float32)  # [B, f_dim]: a SUM over positions, as in BigGAN
        h = self.H(z)  # [B, width]
        j = self.J(torch.cat([self.f_scale * f, h], 1))
        return [s[:, 0].float() for s in (self.s_x(f), self.s_z(F.relu(h)), self.s_xz(F.relu(j)))]


# ------------------------------------------------------------ E
class Reversible(nn.Sequential):  # RevNet's unit of layers R: (x1, x2) -> (x2, x1 + R(x2)), halves of the channels
    def forward(self, x):
        x1, x2 = x.chunk(2, dim=1)
        return torch.cat([x2, x1 + super().forward(x2)], 1)  # in this order, or x2 would never change


def unit(kind, cin, cout, stride=1):
    """ResNet-v2's. Where the shape changes, the skip is a convolution, and like the branch it takes relu(bn(x))."""
    mid = cout // 4
    convs = [(cin, mid, 1), (mid, mid, 3, stride, 1), (mid, cout, 1)]  # channels in, out, kernel, stride, padding
    if kind == "basic":
        convs = [(cin, cout, 3, stride, 1), (cout, cout, 3, 1, 1)]
    norm, relu, *branch = [m for c in convs for m in (nn.BatchNorm2d(c[0]), nn.ReLU(), nn.Conv2d(*c, bias=False))]
    if stride == 1 and cin == cout:
        return Residual([norm, relu, *branch])
    return nn.Sequential(norm, relu, Residual(branch, [nn.Conv2d(cin, cout, 1, stride, bias=False)]))


class Encoder(nn.Module):
    """E: x [B, 3, size, size] -> mean and standard deviation of z given x, [B, z_dim] each."""

    def __init__(self, backbone, size, mlp_width, z_dim, sigma_bias=0.0):
        super().__init__()
        kind, units, width, stride = BACKBONES[backbone]
        cin = width // 4 if kind == "bottleneck" else width
        layers = [nn.Conv2d(3, cin, 3, stride, 1, bias=False)]
        if size >= 96:  # ImageNet's stem
            layers = [nn.Conv2d(3, cin, 7, 2, 3, bias=False), nn.MaxPool2d(3, 2, 1)]
        for stage, n in enumerate(units):
            cout = width << stage
            if kind == "reversible":  # a new stage: half the size by averaging, twice the channels by zeros around them
                layers += [nn.AvgPool2d(2), nn.ZeroPad3d((0, 0, 0, 0, cout // 4, cout // 4))] if stage else []
                layers += [Reversible(*unit("bottleneck", cout // 2, cout // 2).branch) for _ in range(n)]
            else:
                layers += [unit(kind, cin, cout, 2 if stage else 1), *(unit(kind, cout, cout) for _ in range(n - 1))]
            cin = cout
        self.trunk = nn.Sequential(*layers, nn.BatchNorm2d(cin), nn.ReLU())
        self.mlp, self.head = mlp(cin, mlp_width, 2), nn.Linear(mlp_width, 2 * z_dim)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
            elif isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.constant_(self.head.bias[z_dim:], sigma_bias)

    def forward(self, x):
        features = self.trunk(x).mean((2, 3))  # "AvePool", [B, D]: what the linear probe reads
        mu, sigma_hat = self.head(F.relu(self.mlp(features))).float().chunk(2, dim=1)
        return mu, F.softplus(sigma_hat)


# ------------------------------------------------------------ the objective
def discriminator_loss(real, fake):
    """L_D (equation 2): h(t) = max(0, 1 - t) per score: of s for real (x, E(x)), of -s for fake (G(z), z)."""
    return sum(F.relu(1 - s).mean() for s in real) + sum(F.relu(1 + s).mean() for s in fake)


def encoder_generator_loss(real, fake):
    """L_EG (equation 1): E lowers the scores of (x, E(x)), G raises those of (G(z), z). Linear: the hinge is D's."""
    return sum(s.mean() for s in real) - sum(s.mean() for s in fake)


def prior(args, n, *key):
    """z ~ N(0, I), or U(-1, 1) in the ablation "uniform P_z": [n, z_dim], a function of the seed and the key."""
    z = torch.randn(n, args.z_dim, generator=generator(args.seed, *key, args.device), device=args.device)
    return torch.erf(z / 2**0.5) if args.prior == "uniform" else z


def posterior(args, E, x, noise=0.0):
    """z ~ E(x) = N(mu, sigma^2), or mu without noise; with the uniform prior E is deterministic and ends in tanh."""
    mu, sigma = E(x)
    z = mu + sigma * (0.0 if args.deterministic else noise)
    return mu.tanh() if args.prior == "uniform" else z


def judge(args, D, x, z_hat, x_hat, z):
    """The scores in use of the pairs (x, z_hat) and of (x_hat, z), which D sees as one batch."""
    scores = dict(zip(("x", "z", "xz"), D(torch.cat([x, x_hat]), torch.cat([z_hat, z])), strict=True))
    return zip(*(scores[name].chunk(2) for name in args.scores), strict=True)


# ------------------------------------------------------------ the frame, the same in every script
def start(args):
    """Completes args by torchrun's rank, world and device, and joins the process group."""
    args.rank, args.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if cuda := args.device == "cuda":
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(args.device)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True
    if args.world > 1:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=torch.device(args.device) if cuda else None)


def average_gradients(args, *networks):
    """Mean over ranks, in one all_reduce, after the last backward pass of a step."""
    if args.world > 1:
        grads = [p.grad for network in networks for p in network.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for g, mean in zip(grads, (flat / args.world).split([g.numel() for g in grads]), strict=True):
            g.copy_(mean.view_as(g))


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
    """G, E and D with their first weights, a function of the seed: every rank starts from the same."""
    torch.manual_seed(args.seed)
    widths, halvings, f_scale = args.F[args.size]
    latent = (args.z_dim, args.latent_width, args.latent_blocks, args.latent_sn)
    trunk = image_trunk(widths, halvings, args.size, args.attention, args.sn_eps)
    G = Generator(args.G[args.size], args.z_dim, args.embed_dim, 1, args.attention, args.sn_eps)
    E = Encoder(args.encoder, args.encoder_size, args.mlp_width, args.z_dim, args.sigma_bias)
    networks = [G, E, Discriminator(trunk, widths[-1], *latent, f_scale, args.sn_eps)]
    if args.world > 1 and args.device != "cpu":  # statistics of the whole batch, as across the paper's TPU cores
        networks = [nn.SyncBatchNorm.convert_sync_batchnorm(network) for network in networks]
    return [network.to(args.device, memory_format=torch.channels_last) for network in networks]


def settle(args, average, inputs=None):
    """A frozen copy of averaged weights, its batch statistics means over `inputs`, of G over latents (BigGAN)."""
    network = AveragedModel(average.module).module.requires_grad_(False)
    update_bn(inputs or (prior(args, 64, STANDING, i) for i in range(args.standing)), network)
    return network.eval()


def images(args, split, batch, first=0, pieces=1, rank=0, world=1, rows=slice(None)):
    """Endless batches from number `first` on: x [m, 3, S, S] for E, its local means for D, labels for the probe."""
    crop, size = None, args.encoder_size
    if split == "train" and args.crop_area < 1:  # cut from whole pictures
        crop, size = (1, size, (args.crop_area, 1.0), (1 / args.crop_ratio, args.crop_ratio), "bicubic"), None
    data = load(args.data, split, size, args.root, args.skip_broken, rows)
    for x, y, _ in batches(data, batch, args.seed, first, pieces, split == "train", crop, args.device, rank, world):
        x = x[:, 0].contiguous(memory_format=torch.channels_last) if crop else x
        yield x, F.avg_pool2d(x, args.encoder_size // args.size), y


def train(args):
    G, E, D = build(args)
    G_ema, E_ema = (AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(args.ema)) for network in (G, E))
    rates = ((G, args.lr_g), (E, args.lr_g * args.eta), (D, args.lr_d))
    opt_G, opt_E, opt_D = (torch.optim.Adam(n.parameters(), lr, args.betas, fused=True) for n, lr in rates)
    run = Run(args, G=G, E=E, D=D, G_ema=G_ema, E_ema=E_ema, opt_G=opt_G, opt_E=opt_E, opt_D=opt_D)
    for network in (G, E, D) if args.compile else ():
        network.compile()
    autocast = torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.precision == "bf16")
    draws = args.d_steps + (not args.reuse)  # batches a step
    stream = images(args, "train", args.batch, run.step * draws, args.accumulate, args.rank, args.world)

    def draw(k):  # this rank's pieces of the step's k-th batch: images for E, for D, and, cut from the whole's, noise
        whole = (prior(args, args.batch, kind, run.step * draws + k) for kind in (LATENTS, POSTERIOR))
        pieces = (noise.chunk(args.world * args.accumulate)[args.rank :: args.world] for noise in whole)
        return [(*next(stream)[:2], z, noise) for z, noise in zip(*pieces, strict=True)]

    while run.step < args.steps:
        D.requires_grad_(True)
        for k in range(args.d_steps):  # D learns to tell (x, E(x)) from (G(z), z)
            power_iteration(G, D)
            opt_D.zero_grad()
            pieces = draw(k)
            for x, seen, z, noise in pieces:
                with autocast:
                    with torch.no_grad():
                        x_hat, z_hat = G(z), posterior(args, E, x, noise)
                    loss_d = discriminator_loss(*judge(args, D, seen, z_hat, x_hat, z))
                (loss_d / args.accumulate).backward()
            average_gradients(args, D)
            opt_D.step()

        D.requires_grad_(False)
        power_iteration(G, D)
        opt_G.zero_grad()
        opt_E.zero_grad()
        for x, seen, z, noise in pieces if args.reuse else draw(args.d_steps):  # E and G learn to make the two alike
            with autocast:
                x_hat, z_hat = G(z), posterior(args, E, x, noise)
                real, fake = judge(args, D, seen, z_hat, x_hat, z)
                loss_eg = encoder_generator_loss(real, fake)
            (loss_eg / args.accumulate).backward()
        average_gradients(args, G, E)
        opt_G.step()
        opt_E.step()
        for average, network in ((G_ema, G), (E_ema, E)):
            if run.step < args.ema_start:
                average.n_averaged.zero_()  # the first update of an average is a copy
            average.update_parameters(network)
        run.step += 1

        if run.every(args.log_every):
            with torch.no_grad(), autocast:  # pairing: what another image's z changes in s_xz; at 0 E learns nothing
                matched, shuffled = (D(seen, latents)[2] for latents in (z_hat, z_hat.roll(1, 0)))
                mu, sigma = E.eval()(x)  # mu_std at 0: all images share one z. In train mode batch norm would move
            E.train()
            names = [f"{side}_{k}" for side in ("real", "fake") for k in args.scores]
            watch = {"pairing": (matched - shuffled).abs(), "mu_std": mu.std(0), "sigma": sigma, "lr": args.lr_g}
            run.log(loss_d=loss_d, loss_eg=loss_eg, **dict(zip(names, real + fake, strict=True)), **watch)
        if run.every(args.save_every) or run.every(args.eval_every):
            run.save()
            picture(args, "samples.png", settle(args, G_ema)(prior(args, 64, PICTURES, 0)))
        if run.every(args.eval_every):
            name, value = next(iter(judge_samples(args, settle(args, G_ema), full=False).items()))
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
def picture(args, name, x, columns=8):
    if args.rank == 0:
        save_image(x, args.out / name, nrow=columns, normalize=True, value_range=(-1, 1))


def restore(args):
    """Averaged G and E with standing statistics, and the checkpoint that they come from."""
    name = "best.pt" if args.best else "checkpoint.pt"
    if (state := read_checkpoint(args, name)) is None:
        raise UserError(f"there is no {name} in {args.out}: train first, or give the run's --out")
    G_ema, E_ema, _ = (AveragedModel(network) for network in build(args))
    G_ema.load_state_dict(state["G_ema"])
    E_ema.load_state_dict(state["E_ema"])
    return settle(args, G_ema), settle(args, E_ema, islice(images(args, "train", 64), args.standing)), state


def sample(args):
    """samples.png; reconstructions.png: pairs x, G(E(x)); interpolations.png: between drawn latents, then images'."""
    G, E, _ = restore(args)
    (x, seen, _), z = next(images(args, "test", 40)), prior(args, 64, PICTURES, 0)
    z_hat = posterior(args, E, x)
    ends = torch.cat([z[:8], z_hat[:8]]).unflatten(0, (8, 2, 1))
    rows = torch.lerp(ends[:, 0], ends[:, 1], torch.linspace(0, 1, 10, device=z.device)[:, None])
    picture(args, "samples.png", G(z))
    picture(args, "reconstructions.png", torch.stack([seen, G(z_hat)], 1).flatten(0, 1), columns=10)
    picture(args, "interpolations.png", G(rows.flatten(0, 1)), columns=10)


def judge_samples(args, G, full=True):
    data = load(args.data, args.fid_split, args.size, args.root, args.skip_broken)
    draw = lambda chunk, n: G(prior(args, n, FAKES, chunk))
    return fid.evaluate(draw, data, args.fid_samples, args.fid_features, args.device, args.fid_weights, full)


def probe(args, trunk, untrained):
    """How well linear classifiers tell classes by E's features: AvePool, and BN + CReLU of it."""
    read = lambda split, n=None: load(args.data, split, args.encoder_size, args.root, args.skip_broken, slice(n))
    n = args.probe_samples or None
    train, test = read("train", n), read("test", n and n // 2)
    found = linear_probe.evaluate(trunk, train, test, untrained, args.device, crelu=True)
    if args.sgd_probe:  # the paper's protocol on ImageNet, which holds out 10,000 training images ("train_val")
        augmented = ((x, y) for x, _, y in images(args, "train", 1024, rows=slice(10_000, None)))
        data = augmented, read("train", 10_000), read("test")
        scores = linear_probe.sgd_probe(trunk, *data, args.sgd_probe, args.device)
        found |= {f"sgd_probe_{k}": value for k, value in scores.items()}
    return found


def evaluate(args):
    """metrics.json: the linear probe of E's features, how well G and E invert each other, FID and its sisters."""
    G, E, state = restore(args)
    untrained, (x, seen, _) = build(args), next(images(args, "test", 500))
    miss, other = ((seen - G(posterior(args, E, y))).flatten(1).norm(dim=1).mean() for y in (x, x.roll(1, 0)))
    device = torch.cuda.get_device_name() if "cuda" in args.device else f"cpu, {torch.get_num_threads()} threads"
    metrics = {"command": " ".join(sys.argv), "device": device, "torch": torch.__version__, "steps": state["step"]}
    draws = args.d_steps + (not args.reuse)
    metrics |= {"images": state["step"] * draws * args.batch, "seconds": round(state["seconds"], 1)}
    metrics["parameters"] = {k: sum(p.numel() for p in n.parameters()) for k, n in zip("GED", untrained, strict=True)}
    metrics["reconstruction_error_ratio"] = float(miss / other)  # of x from G(E(x)), over that from G(E(another x))
    for measure in (lambda: probe(args, E.trunk, untrained[1].trunk), lambda: judge_samples(args, G)):
        try:
            metrics |= measure()
        except UserError as error:  # no labels, no Inception weights, no room for a cache: the run keeps the rest
            flags = " ".join(word for word in sys.argv[1:] if word not in ("train", "eval"))
            print(f"{SCRIPT}.py: not measured: {error}; then: python {sys.argv[0]} eval {flags}", file=sys.stderr)
    if args.rank == 0:
        (args.out / "metrics.json.tmp").write_text(json.dumps(metrics, indent=1) + "\n")
        os.replace(args.out / "metrics.json.tmp", args.out / "metrics.json")
        print(f"{args.out} has the pictures, and metrics.json, with among others:")
        for k in (k for k in metrics if k.endswith("top1") or k.startswith(("fid", "fd_", "reconstruction"))):
            print(f"  {k} {metrics[k]:.4g}")
        print("top1: accuracy with E's features, beside untrained_, raw_pixels_, random_features_; fid, fd_random (NOT")
        print("FID): distance from real images, 0 is best; reconstruction: 0 is exact, 1 as bad as for a stranger.")


# ------------------------------------------------------------ the command line
FLAGS = {  # those whose defaults are in PRESETS
    "size": "side of G's images, pixels", "encoder_size": "side of E's images, a multiple of --size; 0: the same",
    "encoder": "backbone of E", "steps": "training steps; more of them extend a finished run",
    "batch": "images a step, over all ranks and pieces", "d_steps": "steps of D for one of E and G",
    "lr_d": "learning rate of D", "lr_g": "learning rate of G", "eta": "learning rate of E, in units of G's",
    "ema": "decay of the averages of G and E, 0 to 1", "crop_area": "least share of an image in a crop; 1: no crops",
    "crop_ratio": "largest aspect ratio of a crop", "log_every": "steps between two lines of log.jsonl",
    "save_every": "steps between checkpoints, each with a samples.png", "fid_samples": "samples that FID is taken of",
    "fid_features": "random needs no weights, gives fd_random", "fid_split": "FID's real images",
    "probe_samples": "training images of the linear probe, with half as many test images; 0: all",
    "sgd_probe": "steps of the papers' linear probe, SGD on augmented images; 0: none",
}  # fmt: skip
CHOICES = {"encoder": BACKBONES, "fid_features": ("inception", "random"), "fid_split": ("train", "test")}
FREE = (  # what may differ between two runs of one checkpoint: beginnings of names
    "command", "root", "out", "steps", "accumulate", "device", "precision", "compile", "skip_broken", "best", "log_",
    "save_", "eval_", "fid_", "probe_", "sgd_")  # fmt: skip


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
    add("--reuse", action=argparse.BooleanOptionalAction, help="E and G see D's last batch again, not a new one")
    add("--scores", nargs="+", default=["x", "z", "xz"], choices=("x", "z", "xz"), help="ablation: scores in use")
    add("--prior", default="normal", choices=("normal", "uniform"), help="ablation: P(z); uniform has E = tanh(mu)")
    add("--deterministic", action="store_true", help="ablation: E without noise")
    for name, text in FLAGS.items():
        add(f"--{name.replace('_', '-')}", type=type(PAPER[name]), choices=CHOICES.get(name), help=text)
    asked, _ = parser.parse_known_args([word for word in sys.argv[1:] if word not in ("-h", "--help")])
    usual = {"imagenet": "paper", "shapes": "demo", "dsprites": "demo", "mnist": "demo", "fashion_mnist": "demo"}
    preset = asked.preset or usual.get(asked.data, "small")
    parser.set_defaults(preset=preset, out=Path("runs", f"{SCRIPT}-{Path(asked.data).name}"), **PRESETS[preset])
    args = parser.parse_args()
    args.encoder_size = args.encoder_size or args.size
    least = dict.fromkeys(("steps", "batch", "accumulate", "d_steps", "log_every", "save_every", "fid_samples"), 1)
    least |= {"crop_area": 0.01, "sigma_bias": -math.inf}
    most = {"ema": 1, "crop_area": 1, "seed": 2**63 - 1}
    for name, value in vars(args).items():
        low, high = least.get(name, 0), most.get(name, math.inf)
        if isinstance(value, int | float) and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be from {low} to {high}")
    if args.size not in args.G or args.encoder_size < 1 or args.encoder_size % args.size:
        raise UserError(f"--size is one of {[*args.G]} with --preset {preset}, and --encoder-size a multiple of it")
    args.z_dim = args.z_chunk * len(args.G[args.size])
    args.config = {k: v for k, v in vars(args).items() if not k.startswith(FREE)}
    return args


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
