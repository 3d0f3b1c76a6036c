"""VQGAN and transformer: "Taming Transformers for High-Resolution Image Synthesis", Patrick Esser, Robin Rombach, Björn
Ommer, CVPR 2021, 2012.09841.

Stage 1 learns an alphabet: an autoencoder whose bottleneck is a grid of codes out of a codebook, kept sharp by a
perceptual loss and a patch discriminator. Stage 2 learns to write: a GPT tells each code of the grid, row by row, from
those before it and from a condition in front: a class, or the codes of a map (segmentation, depth).

    python vqgan_transformer.py                                             # rendered shapes, five CPU minutes
    python vqgan_transformer.py --data cifar10                              # a 32x32 model on one GPU
    torchrun --nproc_per_node 8 vqgan_transformer.py --data imagenet --lin vgg.pth      # the paper's models
    python vqgan_transformer.py --data maps --labels 182 --steps 100000     # stage 1 for maps; their pixels are labels
    python vqgan_transformer.py --data photos --condition runs/vqgan_transformer-maps --maps maps    # drawn from maps
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
from torchvision.models import VGG16_Weights, vgg16
from torchvision.utils import save_image

from common import fid, linear_probe
from common.data import NAMES, UserError, batches, generator, load

SCRIPT = Path(__file__).stem
CODES, DROPOUT, NOISE, FRONTS, PICTURES, FAKES = range(6)  # streams of random numbers

# fmt: off
PAPER = dict(  # ImageNet, f = 16 (the official configurations); GPT: the released class-conditional one of 1.4B
    size=256, ch=128, multipliers=(1, 1, 2, 2, 4), blocks=2, attention=(16,), z_channels=256, groups=32, codes=16_384,
    code_dim=256, disc_width=64, disc_layers=3, disc_weight=0.8,  # the released run of 16,384 codes: 2 layers, 0.75
    disc_start=250_001, perceptual="lpips", warm_start=0, revive=0, condition="class",
    layers=48, heads=24, width=1536, dropout=0.0, class_dropout=0.0, vqgan_steps=500_000, steps=1_000_000,  # not stated
    batch=96, lr=4.32e-4, lr_d=4.32e-4, lr_gpt=2e-4, warmup=0,  # 12 a GPU; 4.5e-6 an image, but 2e-4 for so large a GPT
    crop=(0.5, 1.0), flip=False,  # a random square of half to all of the area; the paper's has always the shorter side
    log_every=100, save_every=5000, fid_features="inception", fid_samples=50_000, fid_split="train",
    probe_samples=50_000)
SMALL = PAPER | dict(  # ours: the paper has no 32x32 model. f = 4, 64 codes an image
    size=32, ch=64, multipliers=(1, 2, 2), attention=(8,), z_channels=64, codes=512, code_dim=64, disc_layers=2,
    disc_start=10_000, perceptual="vgg", layers=12, heads=8, width=512, dropout=0.3,
    class_dropout=0.1, vqgan_steps=30_000, steps=90_000, batch=128, lr=2e-4, lr_d=2e-4, lr_gpt=3e-4, warmup=1000,
    crop=(), flip=True, save_every=2000, probe_samples=0)
DEMO = SMALL | dict(  # five minutes on two CPU cores: L1 alone, and codes that start from what the encoder says
    ch=16, multipliers=(1, 2, 4), blocks=1, attention=(), z_channels=32, groups=4, codes=128, code_dim=32,
    disc_width=32, disc_layers=1, disc_weight=0.3, disc_start=300, perceptual="none", warm_start=120, revive=50,
    layers=3, heads=4, width=96, dropout=0.0, vqgan_steps=400, steps=900, batch=32, lr=1e-3, lr_gpt=2e-3, warmup=40,
    log_every=50, save_every=450, fid_features="random", fid_samples=1000, fid_split="test", probe_samples=3000)
PRESETS = {"demo": DEMO, "small": SMALL, "paper": PAPER}
PERCEPTUAL = {"lpips": 1.0, "vgg": 0.1, "none": 0.0}  # w_p; VGG16 with all weights 1 is several times larger
# fmt: on


# ------------------------------------------------------------ stage 1: the autoencoder
def conv(cin, cout, kernel=3):
    return nn.Conv2d(cin, cout, kernel, padding=kernel // 2)


class Res(nn.Module):  # [B, cin, h, w] -> [B, cout, h, w]
    def __init__(self, cin, cout, groups):
        super().__init__()
        norm = lambda channels: nn.GroupNorm(groups, channels, eps=1e-6)
        self.branch = nn.Sequential(norm(cin), nn.SiLU(), conv(cin, cout), norm(cout), nn.SiLU(), conv(cout, cout))
        self.skip = nn.Identity() if cin == cout else conv(cin, cout, 1)

    def forward(self, x):
        return self.skip(x) + self.branch(x)


class Attention(nn.Module):  # one head over all positions
    def __init__(self, channels, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q, self.k, self.v, self.out = (conv(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (m(h).flatten(2).mT[:, None] for m in (self.q, self.k, self.v))  # [B, 1, h w, C]
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0].mT
        return x + self.out(attended.unflatten(2, x.shape[2:]))


# parts of E and G: a level's blocks, the middle, the last layers
level = lambda cin, cout, n, attend, groups: [
    part for i in range(n) for part in [Res(cout if i else cin, cout, groups)] + [Attention(cout, groups)] * attend
]
middle = lambda c, groups: [Res(c, c, groups), Attention(c, groups), Res(c, c, groups)]
last = lambda c, cout, groups: [nn.GroupNorm(groups, c, eps=1e-6), nn.SiLU(), conv(c, cout)]


def encoder(channels, ch, multipliers, blocks, attention, size, z_channels, groups=32):
    """[B, channels, size, size] -> [B, z_channels, h, w]; each level but the last halves the map."""
    layers, cin = [conv(channels, ch)], ch
    for i, cout in enumerate(ch * m for m in multipliers):
        layers += level(cin, cout, blocks, size >> i in attention, groups)
        if i < len(multipliers) - 1:  # zeros to the right and below only
            layers += [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(cout, cout, 3, stride=2)]
        cin = cout
    return nn.Sequential(*layers, *middle(cin, groups), *last(cin, z_channels, groups))


def decoder(channels, ch, multipliers, blocks, attention, size, z_channels, groups=32):
    """[B, z_channels, h, w] -> [B, channels, size, size], not bounded; each level but the last doubles the map."""
    cin = ch * multipliers[-1]
    layers = [conv(z_channels, cin), *middle(cin, groups)]
    for i, cout in reversed(list(enumerate(ch * m for m in multipliers))):
        layers += level(cin, cout, blocks + 1, size >> i in attention, groups)
        layers += [nn.Upsample(scale_factor=2), conv(cout, cout)] if i else []
        cin = cout
    return nn.Sequential(*layers, *last(cin, channels, groups))


class VQGAN(nn.Module):
    """E, the codebook Z and G: images [B, channels, S, S] <-> indices [B, h, w] of codes."""

    def __init__(self, codes, code_dim, z_channels, channels=3, **shape):
        super().__init__()
        self.E = nn.Sequential(encoder(channels, z_channels=z_channels, **shape), conv(z_channels, code_dim, 1))
        self.Z = nn.Parameter(torch.empty(codes, code_dim).uniform_(-1 / codes, 1 / codes))
        self.G = nn.Sequential(conv(code_dim, z_channels, 1), decoder(channels, z_channels=z_channels, **shape))
        self.register_buffer("idle", torch.zeros(codes, dtype=torch.long))  # steps since a code was in use

    def look_up(self, indices):
        return F.embedding(indices, self.Z).movedim(3, 1)  # [B, code_dim, h, w]

    def encode(self, x):
        """z [B, code_dim, h, w], and the indices [B, h, w] of the codes that are nearest."""
        z = self.E(x).float()
        rows = z.detach().movedim(1, 3).reshape(-1, z.shape[1])
        with torch.autocast("cuda" if z.is_cuda else "cpu", enabled=False):  # in bf16 neighbouring codes are one
            distance = rows.square().sum(1, keepdim=True) + self.Z.square().sum(1) - 2 * rows @ self.Z.T
        return z, distance.argmin(1).view(len(z), *z.shape[2:])

    def forward(self, x, quantised=True):
        """The reconstruction, z, its codes and their indices; not quantised: the autoencoder alone, as a start."""
        z, indices = self.encode(x)
        e = self.look_up(indices)
        z_q = z + (e - z).detach() if quantised else z  # gradients pass straight through to z
        return self.G(z_q).float(), z, e, indices


class ActNorm(nn.Module):
    """A gain and a shift for each channel, which make the first batch's mean 0 and its standard deviation 1."""

    def __init__(self, channels):
        super().__init__()
        self.loc, self.scale = nn.Parameter(torch.zeros(1, channels, 1, 1)), nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, x):
        if self.training and not self.ready:
            with torch.no_grad():
                std, mean = torch.std_mean(x.float(), (0, 2, 3), keepdim=True)
                self.loc.copy_(-mean), self.scale.copy_(1 / (std + 1e-6)), self.ready.fill_(True)
                for p in (self.loc, self.scale) if dist.is_initialized() else ():
                    dist.broadcast(p, 0)
        return self.scale * (x + self.loc)


def discriminator(width=64, layers=3, actnorm=False, channels=3):
    """PatchGAN: images -> scores [B, 1, h, w], each of a patch; with 3 layers of 70 pixels."""
    shapes = list(pairwise([channels] + [width * min(2**i, 8) for i in range(layers + 1)]))
    parts = []
    for i, (cin, cout) in enumerate(shapes):
        norm = [ActNorm(cout) if actnorm else nn.BatchNorm2d(cout)] if i else []
        parts += [nn.Conv2d(cin, cout, 4, 2 if i < layers else 1, 1, bias=actnorm or not i), *norm, nn.LeakyReLU(0.2)]
    net = nn.Sequential(*parts, nn.Conv2d(shapes[-1][1], 1, 4, 1, 1))
    for layer in net:
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
            nn.init.normal_(layer.weight, float(isinstance(layer, nn.BatchNorm2d)), 0.02)
    return net


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


# ------------------------------------------------------------ stage 2: the transformer
# same as in igpt.py
class Cache:
    """Keys and values of all tokens that a network has been fed, [2, B, heads, n, d / heads] a layer: at first of any
    number of tokens, then of one at a time."""

    def __init__(self, n):
        self.n, self.fed, self.layers = n, 0, {}

    def extend(self, layer, *new):
        """Takes a layer's keys and values of the tokens that are fed now; returns those of all."""
        new = torch.stack(new)
        if layer not in self.layers:
            self.layers[layer] = new.new_empty(*new.shape[:3], self.n, new.shape[4])
        end = self.fed + new.shape[3]
        self.layers[layer][..., self.fed : end, :] = new
        return self.layers[layer][..., :end, :]


class Block(nn.Module):  # h [B, T, d] <- h + attention(LN(h)) <- h + mlp(LN(h)), as in GPT-2
    def __init__(self, d, heads, dropout, unmasked):
        super().__init__()
        self.heads, self.dropout, self.unmasked = heads, dropout, unmasked
        self.norm1, self.qkv, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        mlp = nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d), nn.Dropout(dropout)
        self.mlp = nn.Sequential(*mlp)

    def forward(self, h, cache=None):
        q, k, v = self.qkv(self.norm1(h)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, T, _]
        if cache is not None:
            k, v = cache.extend(self, k, v)
        length, mask = h.shape[1], None
        if length > 1 and self.unmasked:  # the condition sees all of itself
            mask = torch.ones(length, length, dtype=torch.bool, device=h.device).tril()
            mask[: self.unmasked, : self.unmasked] = True
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=length > 1 and mask is None)
        h = h + F.dropout(self.out(attended.transpose(1, 2).flatten(2)), dropout)
        return h + self.mlp(h)


class GPT(nn.Module):
    """Tokens [B, T] -> logits [B, T, V] of those that follow; with `layers` what stands after so many, [B, T, d]."""

    def __init__(self, tokens, n, layers, heads, d, dropout=0.0, unmasked=0):
        super().__init__()
        self.n, self.tok_emb, self.pos_emb = n, nn.Embedding(tokens, d), nn.Parameter(torch.zeros(1, n, d))
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(d, heads, dropout, unmasked) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, tokens, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens, cache=None, layers=None):
        fed = cache.fed if cache else 0
        h = self.drop(self.tok_emb(tokens) + self.pos_emb[:, fed : fed + tokens.shape[1]])
        for block in self.blocks[:layers]:
            h = block(h, cache)
        if cache:
            cache.fed += tokens.shape[1]
        return h if layers else self.head(self.norm(h)).float()


# ------------------------------------------------------------ the objective
def vq_loss(z, e, beta=0.25, legacy=True):
    """Equation 4's last two terms. The official code has beta at the codebook's term, and all released models were
    trained so: legacy. The paper has it at the commitment."""
    codebook, commitment = F.mse_loss(e, z.detach()), F.mse_loss(z, e.detach())
    return beta * codebook + commitment if legacy else codebook + beta * commitment


def discriminator_loss(real, fake):
    """Hinge loss, half of it (official code)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(rec, gan, weight):
    """lambda (equation 7) from the gradients of L_rec and of the generator's loss by G's last layer."""
    return (rec.norm() / (gan.norm() + 1e-4)).clamp(0, 1e4) * weight


def transformer_loss(gpt, c, z, dropped=None):
    """-log p(z | c) (equation 11), nats a code; c [B, m], z [B, n]. `dropped`: what the GPT sees in place of z."""
    logits = gpt(torch.cat([c, z if dropped is None else dropped], 1)[:, :-1])[:, c.shape[1] - 1 :]
    return F.cross_entropy(logits.flatten(0, 1), z.flatten())


def learning_rate(args, step):
    """Of the GPT: constant; with a warm-up it rises, then falls to 0 as a cosine."""
    if step < args.warmup:
        return args.lr_gpt * (step + 1) / args.warmup
    part = (step - args.warmup) / max(1, (args.horizon or args.steps) - args.vqgan_steps - args.warmup)
    return args.lr_gpt * (1 + math.cos(math.pi * part)) / 2 if args.warmup else args.lr_gpt


# same as in igpt.py
def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Of the next token [B, V]. Only the k likeliest count (0: all), and of these the fewest whose mass reaches p."""
    logits = logits / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        p, order = logits.softmax(1).sort(1, descending=True)
        beyond = p.cumsum(1) - p > top_p  # the mass before it, so that the token that crosses p stays
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
    return logits.softmax(1)


@torch.no_grad()
def complete(args, gpt, c, cols, known, *key):
    """Codes [B, rows, cols], drawn row by row; the first [B, m] are known. c: a token in front [B, 1], or a map's codes
    [B, rows, cols]. On a grid larger than trained, w x w, each code is told from a window around it (section 3.3); when
    that moves, all positions change, and with them whatever a cache holds."""
    w, random = args.grid, generator(args.seed, *key, args.device)
    rows, start = c.shape[1] if c.ndim == 3 else w, known.shape[1]
    grid = F.pad(known, (0, rows * cols - start)).view(-1, rows, cols)
    fed = cache = token = None
    for i, j in (divmod(n, cols) for n in range(start, rows * cols)):
        top, left = min(max(i - w // 2, 0), rows - w), min(max(j - w // 2, 0), cols - w)
        seen = (i - top) * w + j - left  # codes of the window that are known
        if fed != (top, left, seen - 1):
            part = (slice(None), slice(top, top + w), slice(left, left + w))
            front, cache = c[part].flatten(1) if c.ndim == 3 else c, Cache(gpt.n)
            token = torch.cat([front, grid[part].flatten(1)[:, :seen]], 1)
        logits = gpt(token, cache)[:, -1, : args.codes]  # other tokens name classes
        p = probabilities(logits, args.temperature, args.top_k, args.top_p)
        token, fed = p.multinomial(1, generator=random), (top, left, seen)
        grid[:, i, j] = token[:, 0]
    return grid


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
    """The VQGAN, D and the GPT with their first weights, the same on every rank."""
    torch.manual_seed(args.seed)
    shape = {k: getattr(args, k) for k in ("ch", "multipliers", "blocks", "attention", "size", "groups")}
    channels = args.labels or 3
    vqgan = VQGAN(args.codes, args.code_dim, args.z_channels, channels, **shape)
    D = discriminator(args.disc_width, args.disc_layers, args.actnorm, channels)
    n = args.grid**2 * (2 if args.maps else 1)  # the last code is never fed: with one token in front, no more
    gpt = GPT(args.tokens, n, args.layers, args.heads, args.width, args.dropout, args.unmasked)
    return [network.to(args.device, memory_format=torch.channels_last) for network in (vqgan, D, gpt)]


def prepared(args, x):
    """Images as they are; maps, whose grey levels in [-1, 1] stand for 0 ... 255, one-hot [B, labels, S, S]."""
    if not args.labels:
        return x
    labels = ((x[:, 0] + 1) * 127.5).round().long().clamp(max=args.labels - 1)
    return F.one_hot(labels, args.labels).movedim(3, 1).float().contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def fronts(args, split):
    """c, what stands in front of the codes of each image of a split: its class [N, 1]; token 0; or the codes [N, w, w]
    of its map, by the VQGAN of another run."""
    data = load(args.data, split, None, args.root, args.skip_broken)
    table = data.require_labels()[:, None] if args.condition == "class" else torch.zeros(len(data), 1).long()
    args.classes = len(data.classes) if args.condition == "class" else 0
    args.tokens = max(args.codes, args.classes + (args.class_dropout > 0))  # one table: codes, or classes and no class
    if not args.maps:
        return table
    maps = load(args.maps, split, args.size, args.root, args.skip_broken)
    names, of_maps = (part.files is not None and [Path(file).stem for file in part.files] for part in (data, maps))
    if names != of_maps:  # without folders of their own a hash of the whole name holds out the test images
        raise UserError(f"--maps {args.maps}: must have the {split} images' names, or train/ and val/ as --data has")
    if (state := read_checkpoint(argparse.Namespace(out=Path(args.condition), config={}))) is None:
        raise UserError(f"--condition {args.condition}: no folder of a run on --maps, there is no checkpoint.pt in it")
    theirs = argparse.Namespace(**vars(args) | state["config"] | {"tokens": 1, "layers": 1})
    net = build(theirs)[0].eval()
    net.load_state_dict(state["vqgan"])
    parts = (part.permute(0, 3, 1, 2).to(args.device) / 127.5 - 1 for part in maps.images.split(100))
    codes = torch.cat([net.encode(prepared(theirs, part))[1].cpu() for part in parts])
    if codes.shape[1] != args.grid or codes.max() >= args.codes:
        raise UserError(f"--condition {args.condition}: needs grids of {args.grid}, and up to {args.codes} codes")
    return codes


def images(args, split, batch, first=0, pieces=1, rank=0, world=1):
    """Endless pieces of batches: x [m, 3, S, S] or maps, and the images' numbers in the set."""
    random = split == "train" and not args.maps and not args.labels  # else image and map would part
    crop = (1, args.size, args.crop, (1.0, 1.0), "bicubic") if random and args.crop else None
    data = load(args.data, split, None if crop else args.size, args.root, args.skip_broken)
    for x, _, i in batches(data, batch, args.seed, first, pieces, random and args.flip, crop, args.device, rank, world):
        yield prepared(args, x[:, 0] if crop else x), i.cpu()


def perceptual_loss(args):
    """The distance of images beside L1, or None."""
    if args.perceptual == "none" or args.labels:
        return None
    try:
        file = torch.load(args.lin, weights_only=True) if args.perceptual == "lpips" else None
        lin = file and [file[f"lin{i}.model.1.weight"].flatten() for i in range(5)]
        if lin and ([len(part) for part in lin] != [64, 128, 256, 512, 512] or min(map(torch.min, lin)) < 0):
            raise ValueError(f"{args.lin} is not VGG16's")
        return LPIPS(vgg16(weights=VGG16_Weights.IMAGENET1K_V1).features, lin).to(args.device)
    except Exception as error:  # no network, no file, another file
        raise UserError(f"--perceptual {args.perceptual} needs VGG16, lpips --lin vgg.pth as well ({error})") from error


def revive(args, step, vqgan, z, indices):
    """Ours, only in the demo: codes start from what E says, and those that nothing has chosen for long start anew."""
    used = indices.flatten().bincount(minlength=args.codes)
    pick = torch.randint(z.numel() // args.code_dim, (args.codes,), generator=generator(args.seed, CODES, step))
    fresh = z.movedim(1, 3).reshape(-1, args.code_dim)[pick.to(z.device)]
    if args.world > 1:
        dist.all_reduce(used)
        dist.broadcast(fresh, 0)
    vqgan.idle.add_(1).masked_fill_(used > 0, 0)
    idle = vqgan.idle >= (0 if step == args.warm_start else args.revive)
    vqgan.Z.data.copy_(torch.where(idle[:, None], fresh, vqgan.Z))
    vqgan.idle.masked_fill_(idle, 0)


def vqgan_step(args, run, pieces, distance):
    """A step of E, Z and G and one of D on the pieces of a batch; what there is to log."""
    vqgan, D, opt, opt_D = (run.parts[name] for name in ("vqgan", "D", "opt", "opt_D"))
    adversarial, quantised = run.step >= args.disc_start and not args.labels, run.step >= args.warm_start
    D.requires_grad_(False)
    opt.zero_grad()
    found, seen = {}, []
    for x, _ in pieces:
        with run.autocast:
            x_hat, z, e, indices = vqgan(x, quantised)
            fake = D(x_hat).float() if adversarial else None
        rec = F.binary_cross_entropy_with_logits(x_hat, x) if args.labels else (x - x_hat).abs().mean()
        if distance:
            rec = rec + PERCEPTUAL[args.perceptual] * distance(x, x_hat).mean()
        loss_vq = vq_loss(z, e, legacy=args.legacy)
        loss = rec + loss_vq * quantised
        if adversarial:  # each rank, and so each piece, has its own lambda, as in the official run
            loss_g = -fake.mean()
            by = (torch.autograd.grad(part, vqgan.G[1][-1].weight, retain_graph=True)[0] for part in (rec, loss_g))
            weight = adaptive_weight(*by, args.disc_weight)
            loss, found = loss + weight * loss_g, {"loss_g": loss_g, "lambda": weight}
        (loss / args.accumulate).backward()
        seen.append((x, x_hat.detach(), z.detach(), indices))
    average_gradients(args, vqgan)
    opt.step()
    indices = torch.cat([piece[3] for piece in seen])
    if args.revive and quantised:
        revive(args, run.step, vqgan, seen[0][2], indices)
    if adversarial:  # D, on the same reconstructions: the official code makes them anew
        D.requires_grad_(True)
        opt_D.zero_grad()
        for x, x_hat, *_ in seen:
            with run.autocast:
                loss_d = discriminator_loss(D(x).float(), D(x_hat).float())
            (loss_d / args.accumulate).backward()
        average_gradients(args, D)
        opt_D.step()
        found["loss_d"] = loss_d
    p = indices.flatten().bincount(minlength=args.codes) / indices.numel()
    return {"loss": rec, "loss_vq": loss_vq, **found, "perplexity": torch.special.entr(p).sum().exp(), "lr": args.lr}


def gpt_step(args, run, pieces, table):
    """A step of the GPT. What is random is drawn for the whole batch, then cut."""
    vqgan, gpt, opt = (run.parts[name] for name in ("vqgan", "gpt", "opt_gpt"))
    vqgan.eval(), gpt.train()
    opt.zero_grad()
    random, n = generator(args.seed, NOISE, run.step), args.grid**2
    draws = [torch.rand(args.batch, k, generator=random) for k in (1, n)]
    draws.append(torch.randint(args.codes, (args.batch, n), generator=random))
    cuts = [draw.chunk(args.world * args.accumulate)[args.rank :: args.world] for draw in draws]
    for number, ((x, i), *cut) in enumerate(zip(pieces, *cuts, strict=True)):
        no_class, keep, noise = (part.to(args.device) for part in cut)
        with torch.no_grad(), run.autocast:
            z, c = vqgan.encode(x)[1].flatten(1), table[i].flatten(1).to(args.device)
        if args.condition == "class":
            c = torch.where(no_class < args.class_dropout, args.classes, c)
        if args.dropout:  # it knows no other generator than torch's own
            number = (run.step * args.accumulate + number) * args.world + args.rank
            torch.manual_seed(generator(args.seed, DROPOUT, number).initial_seed())
        with run.autocast:
            loss = transformer_loss(gpt, c, z, torch.where(keep < args.pkeep, z, noise))
        (loss / args.accumulate).backward()
    average_gradients(args, gpt)
    for group in opt.param_groups:
        group["lr"] = lr = learning_rate(args, run.step - args.vqgan_steps)
    opt.step()
    return {"loss": loss, "lr": lr}


def train(args):
    table = fronts(args, "train")
    vqgan, D, gpt = build(args)
    rates = ((vqgan, args.lr), (D, args.lr_d))
    opt, opt_D = (torch.optim.Adam(network.parameters(), lr, (0.5, 0.9), fused=True) for network, lr in rates)
    decayed = {m.weight for m in gpt.modules() if isinstance(m, nn.Linear)}
    part = lambda on, decay: {"params": [p for p in gpt.parameters() if (p in decayed) == on], "weight_decay": decay}
    opt_gpt = torch.optim.AdamW([part(True, 0.01), part(False, 0.0)], args.lr_gpt, (0.9, 0.95), fused=True)
    distance = perceptual_loss(args)
    run = Run(args, vqgan=vqgan, D=D, gpt=gpt, opt=opt, opt_D=opt_D, opt_gpt=opt_gpt)
    torch._functorch.config.donated_buffer = False  # lambda goes backward through graphs that are used again
    for network in (vqgan, D, gpt) if args.compile else ():
        network.compile()
    rows = class_rows(args, fronts(args, "test"))
    run.autocast = torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.precision == "bf16")
    stream = images(args, "train", args.batch, run.step, args.accumulate, args.rank, args.world)

    while run.step < args.steps:
        pieces = list(islice(stream, args.accumulate))
        first = run.step < args.vqgan_steps
        found = vqgan_step(args, run, pieces, distance) if first else gpt_step(args, run, pieces, table)
        run.step += 1

        if run.every(args.log_every):
            run.log(**found)
        if run.every(args.save_every) or run.every(args.eval_every):
            run.save()
            if run.step > args.vqgan_steps:  # before, the GPT has learnt nothing
                picture(args, "samples.png", samples(args, vqgan, gpt.eval(), rows, PICTURES, 0))
        if run.every(args.eval_every) and run.step > args.vqgan_steps:
            name, value = next(iter(judge_samples(args, vqgan, gpt.eval(), full=False).items()))
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
def picture(args, name, x, columns=8):
    if args.rank == 0:
        x = x.argmax(1, keepdim=True) * 2 / (args.labels - 1) - 1 if args.labels else x
        save_image(x, args.out / name, nrow=columns, normalize=True, value_range=(-1, 1))


def restore(args):
    """The VQGAN and the GPT, c of all test images, and the checkpoint that the two come from."""
    name = "best.pt" if args.best else "checkpoint.pt"
    if (state := read_checkpoint(args, name)) is None:
        raise UserError(f"there is no {name} in {args.out}: train first, or give the run's --out")
    table = fronts(args, "test")
    vqgan, _, gpt = build(args)
    vqgan.load_state_dict(state["vqgan"])
    gpt.load_state_dict(state["gpt"])
    return *(network.eval().requires_grad_(False) for network in (vqgan, gpt)), table, state


def class_rows(args, table):  # c for a picture of samples
    if args.condition == "class":
        return torch.arange(min(args.classes, 10), device=args.device).repeat_interleave(8)[:, None]
    return table[:40].to(args.device)


@torch.no_grad()
def samples(args, vqgan, gpt, c, *key, cols=None, known=None):
    """Images that the GPT has drawn after c, and after the codes that are known."""
    indices = complete(args, gpt, c, cols or args.grid, c.new_zeros(len(c), 0) if known is None else known, *key)
    return vqgan.G(vqgan.look_up(indices)).float().clamp(-1, 1)


@torch.no_grad()
def sample(args):
    """samples.png: a row a class; reconstructions.png: pairs; completions.png: image, reconstruction, upper half, five
    completions; large.png: twice as wide as trained. The upper codes have seen some of the lower half (official)."""
    vqgan, gpt, table, _ = restore(args)
    x, i = next(images(args, "test", 40))
    x_hat, _, _, indices = vqgan(x)
    picture(args, "reconstructions.png", torch.stack([x, x_hat], 1).flatten(0, 1), columns=10)
    if args.labels:  # maps have no second stage
        return
    picture(args, "samples.png", samples(args, vqgan, gpt, class_rows(args, table), PICTURES, 0))
    x, c = x[:8], table[i[:8]].to(args.device)
    known = indices[:8, : args.grid // 2].flatten(1).repeat_interleave(5, 0)
    ends = samples(args, vqgan, gpt, c.repeat_interleave(5, 0), PICTURES, 1, known=known).unflatten(0, (8, 5))
    half = x.clone()
    half[:, :, args.size // 2 :] = 1
    picture(args, "completions.png", torch.cat([torch.stack([x, x_hat[:8], half], 1), ends], 1).flatten(0, 1))
    wide = torch.cat([c, c.flip(0)], 2) if args.maps else c
    picture(args, "large.png", samples(args, vqgan, gpt, wide, PICTURES, 2, cols=2 * args.grid), columns=4)


def judge_samples(args, vqgan, gpt, full=True):
    data, table = load(args.data, args.fid_split, args.size, args.root, args.skip_broken), fronts(args, args.fid_split)

    def draw(chunk, n):  # conditions as they come in the set
        i = torch.randint(len(table), (n,), generator=generator(args.seed, FRONTS, chunk))
        return samples(args, vqgan, gpt, table[i].to(args.device), FAKES, chunk)

    return fid.evaluate(draw, data, args.fid_samples, args.fid_features, args.device, args.fid_weights, full)


@torch.no_grad()
def evaluate(args):
    """metrics.json: reconstructions, codes in use, the GPT's loss, the linear probe, FID and its sisters."""
    vqgan, gpt, table, state = restore(args)
    _, D, untrained = (network.eval() for network in build(args))
    device = torch.cuda.get_device_name() if "cuda" in args.device else f"cpu, {torch.get_num_threads()} threads"
    metrics = {"command": " ".join(sys.argv), "device": device, "torch": torch.__version__, "steps": state["step"]}
    metrics |= {"images": state["step"] * args.batch, "seconds": round(state["seconds"], 1)}
    count = lambda network: sum(p.numel() for p in network.parameters())
    metrics["parameters"] = {"vqgan": count(vqgan), "D": count(D), "gpt": count(gpt)}
    metrics["perceptual"] = {"none": "none: L1 alone", "vgg": "VGG16, all weights 1"}.get(args.perceptual, "LPIPS")
    read = lambda split, n=None: load(args.data, split, args.size, args.root, args.skip_broken, slice(n))

    def codes():
        found, used = [], 0
        for x, i in islice(images(args, "test", 100), 10):
            x_hat, _, _, indices = vqgan(x)
            used += indices.flatten().bincount(minlength=args.codes)
            right = (x_hat.argmax(1) == x.argmax(1)).float().mean()  # of maps, which have no second stage
            psnr = -10 * ((x - x_hat.clamp(-1, 1)).square().mean((1, 2, 3)) / 4).log10()
            nats = 0 if args.labels else transformer_loss(gpt, table[i].flatten(1).to(args.device), indices.flatten(1))
            found.append([right] if args.labels else [psnr.mean(), nats])
        names, p = ["test_pixels_right"] if args.labels else ["test_psnr", "test_nats_per_code"], used / used.sum()
        values = [*torch.tensor(found).mean(0), (p > 0).float().mean(), torch.special.entr(p).sum().exp()]
        return dict(zip([*names, "codes_used", "perplexity"], map(float, values), strict=True))

    def probe():
        """The stream after half of the GPT, averaged over what tells codes; and the mean of the codes. In front
        stands the token of no class (paper, maps: token 0): the image's own class would be a leak."""

        def pooled(gpt, x):
            indices = vqgan.encode(x)[1].flatten(1)
            front = indices.new_full((len(x), table[0].numel()), args.classes if args.class_dropout else 0)
            stream = gpt(torch.cat([front, indices[:, :-1]], 1), layers=max(1, args.layers // 2))
            return stream[:, front.shape[1] - 1 :].mean(1)

        n = args.probe_samples or None
        train, test = read("train", n), read("test", n and n // 2)
        found = linear_probe.evaluate(partial(pooled, gpt), train, test, device=args.device)
        others = {"untrained": partial(pooled, untrained), "codes": lambda x: vqgan.look_up(vqgan.encode(x)[1])}
        for name, encoder in others.items():
            pair = (linear_probe.extract(encoder, data, args.device) for data in (train, test))
            found |= {f"{name}_probe_{k}": value for k, value in linear_probe.probe(*pair).items()}
        return found | {"probe_saw_labels": args.condition == "class"}  # stage 2 did

    def reconstructions():
        data, how = read("test"), (args.fid_features, args.device, args.fid_weights, False)
        x = lambda chunk, n: data.images[chunk * fid.CHUNK :][:n].permute(0, 3, 1, 2).to(args.device) / 127.5 - 1
        found = fid.evaluate(lambda *part: vqgan(x(*part))[0], data, min(args.fid_samples, len(data)), *how)
        return {f"reconstruction_{k}": v for k, v in found.items()}

    measures = [codes] if args.labels else [codes, probe, reconstructions, lambda: judge_samples(args, vqgan, gpt)]
    for measure in measures:
        try:
            metrics |= measure()
        except UserError as error:  # no labels, no Inception weights, no room for a cache: the run keeps the rest
            flags = " ".join(word for word in sys.argv[1:] if word not in ("train", "eval"))
            print(f"{SCRIPT}.py: not measured: {error}; then: python {sys.argv[0]} eval {flags}", file=sys.stderr)
    if args.rank == 0:
        (args.out / "metrics.json.tmp").write_text(json.dumps(metrics, indent=1) + "\n")
        os.replace(args.out / "metrics.json.tmp", args.out / "metrics.json")
        shown = ("top1", "_code", "psnr", "right", "used", "perplexity")
        kept = {k: v for k, v in metrics.items() if k.endswith(shown) or k.startswith(("fid", "fd_"))}
        print(f"{args.out} has the pictures, and metrics.json:", *(f"\n  {k} {v:.4g}" for k, v in kept.items()))


# ------------------------------------------------------------ the command line
# fmt: off
FLAGS = {  # those whose defaults are in PRESETS
    "size": "side of the images, pixels", "codes": "of the codebook",
    "condition": "class, none, or the folder of a run on --maps, whose codes stand in front",
    "steps": "training steps of both stages; more of them extend a finished run", "vqgan_steps": "those of stage 1",
    "batch": "images a step, over all ranks and pieces", "lr": "learning rate of the autoencoder",
    "lr_d": "learning rate of D", "lr_gpt": "highest learning rate of the GPT",
    "warmup": "steps in which that rises, to fall as a cosine; 0: it is constant",
    "disc_start": "step of stage 1 from which D takes part", "dropout": "in the GPT, 0 to 1",
    "perceptual": "beside L1: LPIPS, VGG16's features all alike, or nothing",
    "log_every": "steps between two lines of log.jsonl",
    "save_every": "steps between checkpoints, each with a samples.png", "fid_samples": "samples that FID is taken of",
    "fid_features": "random needs no weights, gives fd_random", "fid_split": "FID's real images",
    "probe_samples": "training images of the linear probe, with half as many test images; 0: all",
}
CHOICES = {"fid_features": ("inception", "random"), "fid_split": ("train", "test"), "perceptual": PERCEPTUAL}
FREE = (  # what may differ between two runs of one checkpoint: beginnings of names
    "command", "root", "out", "steps", "accumulate", "device", "precision", "compile", "skip_broken", "best", "log_",
    "save_", "eval_", "fid_", "probe_", "temperature", "top_", "lin")
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
    add("--horizon", type=int, default=0, help="steps until the learning rate is 0; 0: as --steps")
    add("--lin", help="file of LPIPS's weights, lpips/weights/v0.1/vgg.pth")
    add("--maps", default="", help="folder of maps, by name one to each image of --data, that --condition stands for")
    add("--labels", type=int, default=0, help="the images are maps, their grey levels one of so many labels; 0: images")
    add("--legacy", action=argparse.BooleanOptionalAction, default=True, help="beta as in the official code")
    add("--actnorm", action="store_true", help="D has ActNorm, not batch norm")
    add("--pkeep", type=float, default=1.0, help="share of codes that the GPT sees as they are, the others are noise")
    add("--unmasked", type=int, default=0, help="tokens of the condition that see each other")
    add("--temperature", type=float, default=1.0, help="of sampling: below 1 safer, above 1 wilder")
    add("--top-k", type=int, default=0, help="codes that a sample chooses from, the likeliest; 0: all")
    add("--top-p", type=float, default=1.0, help="sampling leaves out the unlikeliest codes beyond this mass")
    for name, text in FLAGS.items():
        add(f"--{name.replace('_', '-')}", type=type(PAPER[name]), choices=CHOICES.get(name), help=text)
    asked, _ = parser.parse_known_args([word for word in sys.argv[1:] if word not in ("-h", "--help")])
    usual = {"imagenet": "paper", "shapes": "demo", "dsprites": "demo", "mnist": "demo", "fashion_mnist": "demo"}
    preset = asked.preset or usual.get(asked.data, "small")
    parser.set_defaults(preset=preset, out=Path("runs", f"{SCRIPT}-{Path(asked.data).name}"), **PRESETS[preset])
    args = parser.parse_args()
    least = dict.fromkeys(("steps", "batch", "accumulate", "log_every", "save_every", "fid_samples"), 1)
    least |= {"size": 8, "codes": 2, "temperature": 0.01, "top_p": 0.01}
    most = {"top_p": 1, "pkeep": 1, "dropout": 1, "seed": 2**63 - 1}
    for name, value in vars(args).items():
        low, high = least.get(name, 0), most.get(name, math.inf)
        if isinstance(value, int | float) and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be from {low} to {high}")
    shrink = 2 ** (len(args.multipliers) - 1)
    if args.size % (2 * shrink):
        raise UserError(f"--size {args.size}: must be a multiple of {2 * shrink}")
    if 0 < args.horizon < args.steps:
        raise UserError(f"--steps {args.steps}: nothing is learnt after --horizon {args.horizon}")
    if args.condition not in ("class", "none") and not args.maps:
        raise UserError(f"--condition {args.condition}: class, none, or a run's folder together with --maps")
    if args.labels:  # maps have no second stage
        args.vqgan_steps, args.condition, args.layers = sys.maxsize, "none", 1
    args.grid = args.size // shrink
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
