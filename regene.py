"""ReGene: "Classify and Generate: Using Classification Latent Space Representations for Image Generations",
Gopalakrishnan, Singh, Yazici, Foo, Chandrasekhar, Ambikapathi, Neurocomputing 2022, 2004.07543.

An ordinary classifier, whose penultimate representation z is the code of an image, and a decoder D: z -> x. As the
logits are affine in z, the codes of a class form a convex set: convex combinations of them keep the class, and D draws
new images of it. The full text was not at hand: this design is reconstructed from the abstract.

    python regene.py                                       # rendered shapes, five CPU minutes: pictures and numbers
    python regene.py --data cifar10                        # a ResNet-18 and its decoder on one GPU
    torchrun --nproc_per_node 8 regene.py --data imagenet  # at 64 x 64 pixels
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
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models import resnet18
from torchvision.utils import save_image

from common import fid, linear_probe
from common.data import NAMES, UserError, batches, generator, load, resized_crop

SCRIPT = Path(__file__).stem
PARENTS, WEIGHTS, POSTERIOR, PICTURES, FAKES = range(5)  # streams of random numbers
GREY = ("mnist", "fashion_mnist")

PAPER = dict(  # its own settings are not known. D's widths: of the 4 x 4 map, and behind each block that doubles it
    size=64, trunk="resnet18", latent="vec", judge="pooled", student="resnet18",
    widths={32: (256, 256, 128, 64), 64: (512, 256, 128, 64, 32)}, classifier_steps=23_400, steps=62_500,
    horizon=62_500, batch=128, optimiser="sgd", lr_c=0.1, lr_d=2e-4, betas=(0.5, 0.999), pad=4, joint=0.0, ema=0.999,
    ema_start=1000, weights=dict(pix=1.0, feat=1.0, perc=0.1, cls=0.1, cyc=0.5), most=5, alpha=1.0, parents=2, near=0,
    bank_samples=0, judge_steps=20_000, log_every=100, save_every=2000, fid_features="inception", fid_samples=50_000,
    fid_split="train", probe_samples=50_000)  # fmt: skip
SMALL = PAPER | dict(size=32, probe_samples=0)  # CIFAR-10: 60 epochs of the classifier, then 100 of D
SMALL_GREY = SMALL | dict(  # MNIST: 10 epochs, then 30
    trunk="plain", student="plain", classifier_steps=4680, steps=18_720, horizon=0, optimiser="adam", lr_c=1e-3,
    pad=0)  # fmt: skip
DEMO = SMALL | dict(  # for a CPU. Class tells nothing of colour: joint. Low feat, cyc, cls: else D draws to fool f
    trunk="pooled", judge="plain", student="plain", widths={32: (128, 64, 32, 32), 64: (128, 64, 32, 32, 16)},
    classifier_steps=300, steps=600, horizon=0, batch=32, optimiser="adam", lr_c=1e-3, lr_d=1e-3, pad=0, joint=2.0,
    ema=0.98, ema_start=50, weights=dict(pix=1.0, feat=0.05, perc=0.0, cls=0.01, cyc=0.02), near=5, bank_samples=12_000,
    judge_steps=400, log_every=25, save_every=250, fid_features="random", fid_samples=5000, fid_split="test",
    probe_samples=10_000)  # fmt: skip
PRESETS = {"demo": DEMO, "small": SMALL, "paper": PAPER}


# ------------------------------------------------------------ the classifier: f, and a head that is affine in z
class Classifier(nn.Module):
    """x [B, 3, S, S] in [-1, 1], of which `channels` are read -> z = f(x) [B, z_dim], or a map; head(z) are logits."""

    def __init__(self, channels, stages, code, head):
        super().__init__()
        self.channels, self.stages, self.code, self.head = channels, nn.ModuleList(stages), code, head

    def maps(self, x):
        """f_s(x), the map behind each stage."""
        x = x[:, : self.channels]
        return [x := stage(x) for stage in self.stages]

    def forward(self, x):
        return self.code(self.maps(x)[-1]).float()

    @fid.full_precision()
    def logits(self, z):  # exact: rounding could move a combination that is near the border out of its class
        return self.head(z)


def classifier(kind, channels, size, classes, latent="vec"):
    """resnet18: z are 512 averages over the last map, or with latent "map" that map itself, since averaging is affine
    too; small images get no stem. plain: for MNIST, pooled: for the demo; z are 128 numbers after a ReLU."""
    if kind == "resnet18":
        net = resnet18(num_classes=classes)
        stem = [net.conv1, net.bn1, net.relu, net.maxpool]
        if size < 64:
            stem[::3] = nn.Conv2d(channels, 64, 3, 1, 1, bias=False), nn.Identity()
            nn.init.kaiming_normal_(stem[0].weight, mode="fan_out")
        stages = [nn.Sequential(*stem, net.layer1), net.layer2, net.layer3, net.layer4]
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        code, head = (pool, net.fc) if latent == "vec" else (nn.Identity(), nn.Sequential(pool, net.fc))
        return Classifier(channels if size < 64 else 3, stages, code, head)  # torchvision's stem reads three
    widths, stages = ((32, 64), []) if kind == "plain" else ((32, 64, 128, 128), [])
    for i, (cin, cout) in enumerate(pairwise((channels, *widths))):
        layers = [nn.Conv2d(cin, cout, 3, 2, 1), nn.ReLU()]
        if kind == "pooled":
            layers = [nn.Conv2d(cin, cout, 3, 1, 1), nn.BatchNorm2d(cout), nn.ReLU(), *[nn.MaxPool2d(2)] * (i < 3)]
        stages.append(nn.Sequential(*layers))
    flat = widths[-1] * (size // (4 if kind == "plain" else 8)) ** 2  # not averaged: place and pose survive
    code = nn.Sequential(nn.Flatten(), nn.Linear(flat, 128), nn.ReLU())
    for layer in (m for part in (*stages, code) for m in part if isinstance(m, nn.Conv2d | nn.Linear)):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return Classifier(channels, stages, code, nn.Linear(128, classes))


# ------------------------------------------------------------ D, and a VAE of equal size beside it
class Decoder(nn.Module):
    """z [B, z_dim], or a map [B, z_dim, 4, 4] with latent "map" -> images [B, 3, S, S] in [-1, 1]."""

    def __init__(self, z_dim, widths, channels=3, latent="vec"):
        super().__init__()
        n, relu = 16 * widths[0], nn.ReLU()
        layers = [nn.Linear(z_dim, n), nn.BatchNorm1d(n), relu, nn.Unflatten(1, (widths[0], 4, 4))]
        if latent == "map":
            layers = [nn.Conv2d(z_dim, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), relu]
        for cin, cout in pairwise(widths):
            layers += [nn.ConvTranspose2d(cin, cout, 4, 2, 1, bias=False), nn.BatchNorm2d(cout), relu]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], channels, 3, 1, 1))
        for layer in self.layers:
            if isinstance(layer, nn.ConvTranspose2d):
                nn.init.normal_(layer.weight, std=0.02)
            elif isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, z):
        return torch.tanh(self.layers(z).float()).expand(-1, 3, -1, -1)


class VAE(nn.Module):
    """What ReGene is compared with: of its trunk and decoder, told the class. x, y, noise -> x_hat, mu, logvar."""

    def __init__(self, trunk, z_dim, classes, widths, channels):
        super().__init__()
        self.trunk, self.classes, self.z_dim = trunk, classes, z_dim
        self.trunk.head = nn.Linear(z_dim + classes, 2 * z_dim)
        self.D = Decoder(z_dim + classes, widths, channels)

    def draw(self, z, y):
        return self.D(torch.cat([z, F.one_hot(y, self.classes)], 1))

    def forward(self, x, y, noise):
        h = self.trunk.head(torch.cat([self.trunk(x), F.one_hot(y, self.classes)], 1))
        mu, logvar = h.float().chunk(2, dim=1)
        return self.draw(mu + (logvar / 2).exp() * noise, y), mu, logvar


# ------------------------------------------------------------ convex combinations
@fid.full_precision()
def mix(codes, a):
    """z_c = sum_i a_i z_i: codes [B, n, ...], weights a [B, n] -> [B, ...]. If all z_i lie in R_c, where l_c > l_k for
    all k != c, so does z_c: l_c(z_c) - l_k(z_c) = sum_i a_i (l_c(z_i) - l_k(z_i)) > 0, as l is affine, a_i >= 0 and
    sum_i a_i = 1. Not proved is that f(D(z_c)) = z_c, without which the image need not be of the class."""
    return torch.einsum("bn...,bn->b...", codes, a)


def distinct(u, count):
    """n of `count` numbers, without replacement, from uniforms u [B, n]: int64 [B, n]; count is [B]. They repeat only
    where there are fewer than n."""
    taken = u[:, :0].long()
    for k in range(u.shape[1]):
        left = (count - k).clamp(min=1)
        pick = torch.minimum((u[:, k] * left).long(), left - 1)
        for other in taken.sort(1).values.unbind(1):
            pick = pick + (pick >= other).long()
        taken = torch.cat([taken, (pick % count)[:, None]], 1)
    return taken


class Bank:
    """Codes [M, ...] of the training images that f's head names rightly, their numbers and labels, sorted by class."""

    def __init__(self, codes, rows, labels, classes):
        self.codes, self.rows, self.labels, self.count = codes, rows, labels, labels.bincount(minlength=classes)
        self.first, self.known = self.count.cumsum(0) - self.count, self.count.nonzero()[:, 0]

    def parents(self, y, u, near=0):
        """Numbers of codes [B, n] of the classes y [B], by uniforms u [B, n]: any, or an anchor and n - 1 of the `near`
        codes of its class that are nearest to it."""
        first, count = self.first[y, None], self.count[y]
        if not near or u.shape[1] == 1:
            return first + distinct(u, count)
        anchor, k = first + distinct(u[:, :1], count), min(max(near, u.shape[1] - 1), len(self.codes) - 1)
        away = torch.cdist(self.codes[anchor[:, 0]].flatten(1), self.codes.flatten(1))
        away = away.masked_fill(self.labels != y[:, None], math.inf).scatter(1, anchor, math.inf)
        away, nearest = away.topk(max(k, 1), largest=False)
        nearest = torch.where(away.isinf(), anchor, nearest)  # in a class of few
        return torch.cat([anchor, nearest.gather(1, distinct(u[:, 1:], (count - 1).clamp(1, max(k, 1))))], 1)


def dirichlet(n, most, alpha, numbers):
    """Weights [B, most] ~ Dirichlet(alpha, ..., alpha) over the first n[b] columns, 0 in the others."""
    gamma = torch._standard_gamma(torch.full((len(n), most), alpha, device=n.device), generator=numbers)
    gamma = gamma.clamp(min=1e-30) * (torch.arange(most, device=n.device) < n[:, None])
    return gamma / gamma.sum(1, keepdim=True)


# ------------------------------------------------------------ the objective
def code_loss(found, z):
    """L_feat and L_cyc: mean ||found - z||^2 / ||z||^2 over images."""
    return ((found - z).flatten(1).square().sum(1) / (z.flatten(1).square().sum(1) + 1e-8)).mean()


def perceptual_loss(found, maps):
    """L_perc: the sum over stages s of mean |f_s(x_r) - f_s(x)|."""
    return sum(F.l1_loss(a, b) for a, b in zip(found, maps, strict=True))


def classifier_losses(C, D, x, y, joint):
    """Stage 1: C learns to name images; and, with joint, z to tell D what they look like."""
    z = C(x)
    logits = C.head(z).float()
    losses = {"ce": F.cross_entropy(logits, y)} | ({"pix": F.l1_loss(D(z), x)} if joint else {})
    return losses, {"accuracy": (logits.argmax(1) == y).float(), "within_between": within_between(z.detach(), y)}


def decoder_losses(C, D, x, zc, c):
    """Stage 2: D learns to invert f at codes of x and at z_c of classes c; gradients run through the frozen C."""
    with torch.no_grad():
        maps = C.maps(x)
        z = C.code(maps[-1]).float()
    x_r, x_g = D(torch.cat([z, zc])).chunk(2)  # at once: they share batch statistics
    again = C.maps(torch.cat([x_r, x_g]))
    z_r, z_g = C.code(again[-1]).float().chunk(2)
    losses = {"pix": F.l1_loss(x_r, x), "feat": code_loss(z_r, z), "cyc": code_loss(z_g, zc)}
    losses["perc"] = perceptual_loss([m.chunk(2)[0] for m in again], maps)
    losses["cls"] = F.cross_entropy(named := C.head(z_g).float(), c)
    right = {"code_accuracy": C.logits(zc), "accuracy": named}
    return losses, {k: (logits.argmax(1) == c).float() for k, logits in right.items()}


def vae_loss(x_hat, mu, logvar, x):
    """-ELBO of the VAE, nats an image: Gaussian of the variance that suits the batch best (Rybkin et al. 2021)."""
    rec = x[0].numel() / 2 * (x_hat.float() - x).square().mean().log()
    return rec + 0.5 * (mu.square() + logvar.exp() - logvar - 1).sum(1).mean()


def within_between(z, y):
    """tr(S_W) / tr(S_B) of codes [N, ...]: at 0 all codes of a class are one, and D can only draw class averages."""
    z, hot = z.flatten(1), F.one_hot(y).to(z.dtype)
    means = (hot.T @ z) / hot.sum(0).clamp(min=1)[:, None]
    return (z - means[y]).square().sum() / (means[y] - z.mean(0)).square().sum().clamp(min=1e-12)


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
    """The classifier C, D and the VAE V with their first weights, a function of the seed."""
    torch.manual_seed(args.seed)
    channels = 1 if args.data in GREY else 3
    widths, z_dim = args.widths[args.size], 512 if args.trunk == "resnet18" else 128
    make = lambda latent: classifier(args.trunk, channels, args.size, args.classes, latent)
    C, D = make(args.latent), Decoder(z_dim, widths, channels, args.latent)
    networks = [C, D, VAE(make("vec"), z_dim, args.classes, widths, channels)]
    if args.world > 1 and args.device != "cpu":  # statistics of the whole batch
        networks = [nn.SyncBatchNorm.convert_sync_batchnorm(network) for network in networks]
    return [network.to(args.device, memory_format=torch.channels_last) for network in networks]


@torch.no_grad()
def fill(args, C):
    """The bank of codes, of images as they are: those whose own prediction is their label, by a margin."""
    data = load(args.data, "train", args.size, args.root, args.skip_broken, slice(args.bank_samples or None))
    z, y = linear_probe.extract(lambda x: C(x).flatten(1), data, args.device)
    shape = C(floats(args, data.images[:1])).shape[1:]
    logits = torch.cat([C.logits(part.unflatten(1, shape)) for part in z.split(1000)])
    rows = ((logits.argmax(1) == y) & (logits.topk(2).values.diff()[:, 0] < -1e-4)).nonzero()[:, 0]
    if not len(rows):
        raise UserError("the classifier names no training image rightly, there is nothing to combine: train it longer")
    rows = rows[y[rows].argsort(stable=True)]
    return Bank(z[rows].unflatten(1, shape), rows, y[rows], args.classes)


def train(args):
    data = load(args.data, "train", args.size, args.root, args.skip_broken)
    data.require_labels()
    if len(data.classes) < 2:
        raise UserError(f"{args.data} has but one class: a classifier needs two")
    args.classes = args.config["classes"] = len(data.classes)
    C, D, V = build(args)
    ema = get_ema_multi_avg_fn(args.ema)  # of weights; buffers are copied
    D_ema, V_ema = (AveragedModel(network, multi_avg_fn=ema).eval().requires_grad_(False) for network in (D, V))
    opt_C = torch.optim.Adam(C.parameters(), args.lr_c, fused=True)
    if args.optimiser == "sgd":
        opt_C = torch.optim.SGD(C.parameters(), args.lr_c, 0.9, weight_decay=5e-4, nesterov=True, fused=True)
    opt = torch.optim.Adam([*D.parameters(), *V.parameters()], args.lr_d, args.betas, fused=True)
    run = Run(args, C=C, D=D, V=V, D_ema=D_ema, V_ema=V_ema, opt_C=opt_C, opt=opt)
    for network in (C, D, V) if args.compile else ():
        network.compile()
    autocast = torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.precision == "bf16")
    cut = args.accumulate, args.pad > 0, None, args.device, args.rank, args.world
    stream, bank = batches(data, args.batch, args.seed, run.step, *cut), None

    while run.step < args.steps:
        first = run.step < args.classifier_steps
        if run.step == args.classifier_steps:  # from here on C does not change any more, nor do its batch statistics,
            linear_probe.calibrate(C, data, args.device)  # which are made the same on all ranks
        bank = bank or (None if first else fill(args, C.eval().requires_grad_(False)))
        # C's falls along a cosine; D's in the last fifth of stage 2, which --steps does not move
        t, T, horizon = run.step, args.classifier_steps, args.horizon
        lr_c = args.lr_c * (0.5 + 0.5 * math.cos(math.pi * min(1, t / T)) if args.optimiser == "sgd" else 1)
        lr_d = args.lr_d * (min(1, max(0, 5 * (horizon - t) / max(1, horizon - T))) if horizon else 1)
        opt_C.param_groups[0]["lr"], opt.param_groups[0]["lr"] = lr_c, lr_d
        opt_C.zero_grad()
        opt.zero_grad()
        C.train(first)
        numbers = generator(args.seed, PARENTS, run.step, args.device)
        u = torch.rand(args.batch, args.most + 4, generator=numbers, device=args.device)
        n = 2 + (u[:, -1] * (args.most - 1)).long()  # Uniform{2..most} parents
        a = dirichlet(n, args.most, args.alpha, generator(args.seed, WEIGHTS, run.step, args.device))
        whole = u, a, normal(args, V, args.batch, POSTERIOR, run.step)  # of which this rank's pieces are cut
        pieces = (part.chunk(args.world * args.accumulate)[args.rank :: args.world] for part in whole)
        for u, a, noise in zip(*pieces, strict=True):
            x, y, _ = next(stream)
            if first and args.pad:  # cut from a border of zeros
                box = F.pad((u[:, :2] * (2 * args.pad + 1)).long(), (0, 2), value=args.size)
                x = resized_crop(F.pad(x, (args.pad,) * 4), box, args.size)
            with autocast:
                if first:
                    losses, seen = classifier_losses(C, D, x, y, args.joint)
                    total = losses["ce"] + args.joint * losses.get("pix", 0)
                else:
                    # of an image whose class has no codes, another class
                    c = torch.where(bank.count[y] > 0, y, bank.known[(u[:, -2] * len(bank.known)).long()])
                    zc = mix(bank.codes[bank.parents(c, u[:, : args.most])], a)
                    losses, seen = decoder_losses(C, D, x, zc, c)
                    total = sum(args.weights[k] * losses[k] for k in losses)
                losses["vae"] = vae_loss(*V(x, y, noise), x)  # beside it, from the same images
            ((total + losses["vae"]) / args.accumulate).backward()
        average_gradients(args, C, D, V)
        opt_C.step()
        opt.step()
        for average, network in ((D_ema, D), (V_ema, V)):
            if run.step < args.classifier_steps + args.ema_start:
                average.n_averaged.zero_()  # the first update of an average is a copy
            average.update_parameters(network)
        run.step += 1

        if run.every(args.log_every):
            run.log(**{f"loss_{k}": v for k, v in losses.items()}, **seen, lr=lr_c if first else lr_d)
        if run.every(args.save_every) or run.every(args.eval_every):
            run.save()
            now = bank or fill(args, C.eval())
            picture(args, "samples.png", D_ema(codes(args, now, 0, 100, stream=PICTURES)[0]), columns=10)
        if run.every(args.eval_every):
            draw = lambda chunk, m, bank=now: D_ema(codes(args, bank, chunk, m)[0])
            name, value = next(iter(judge(args, draw, full=False).items()))
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


def floats(args, pictures):  # uint8 [n, S, S, 3] -> [n, 3, S, S] in [-1, 1]
    return pictures.to(args.device).permute(0, 3, 1, 2).float() / 127.5 - 1


def restore(args):
    """C, and D and V averaged, in eval mode; the bank of C's codes; and the checkpoint that they come from."""
    name = "best.pt" if args.best else "checkpoint.pt"
    if (state := read_checkpoint(args, name)) is None:
        raise UserError(f"there is no {name} in {args.out}: train first, or give the run's --out")
    args.classes = state["config"]["classes"]
    C, D, V = build(args)
    networks = {"C": C, "D_ema": AveragedModel(D), "V_ema": AveragedModel(V)}
    for k, network in networks.items():
        network.load_state_dict(state[k])
        network.eval().requires_grad_(False)
    return C, networks["D_ema"].module, networks["V_ema"].module, fill(args, C), state


@torch.no_grad()
def combine(args, bank, y, n, *key):
    """z_c for the classes y [B], each of n parents; their numbers in the bank, and their weights."""
    u = torch.rand(len(y), n, generator=generator(args.seed, *key, args.device), device=args.device)
    rows = bank.parents(y, u, args.near)
    a = dirichlet(torch.full_like(y, n), n, args.alpha, generator(args.seed, WEIGHTS, *key[1:], args.device))
    return mix(bank.codes[rows], a), rows, a


def codes(args, bank, chunk, m, n=0, stream=FAKES):
    """Chunk number `chunk` of samples' codes z_c, and their classes [m]: all that have codes, in turn."""
    y = bank.known[(chunk * fid.CHUNK + torch.arange(m, device=args.device)) % len(bank.known)]
    return combine(args, bank, y, n or args.parents, stream, chunk)[0], y


def normal(args, V, m, *key):
    return torch.randn(m, V.z_dim, generator=generator(args.seed, *key, args.device), device=args.device)


@torch.no_grad()
def sample(args):
    """samples.png: a column a class, if there are ten; vae.png: the same of the VAE; reconstructions.png: pairs of test
    images x, D(f(x)); combinations.png: two parents, their combination, and the training image that is nearest to it by
    pixels, 27 times; sliders.png: from one parent to another, a row a class."""
    C, D, V, bank, _ = restore(args)
    read = lambda split, n: load(args.data, split, args.size, args.root, args.skip_broken, slice(n or None))
    data, x = read("train", args.bank_samples), floats(args, read("test", 40).images)
    zc, y = codes(args, bank, 0, 100, stream=PICTURES)
    picture(args, "samples.png", D(zc), columns=10)
    picture(args, "vae.png", V.draw(normal(args, V, 100, FAKES, 0), y), columns=10)
    picture(args, "reconstructions.png", torch.stack([x, D(C(x))], 1).flatten(0, 1), columns=10)
    zc, rows, _ = combine(args, bank, y[:27], 2, PICTURES, 2)
    x_g, away = D(zc), lambda part: torch.cdist(x_g.flatten(1), floats(args, part).flatten(1))
    nearest = torch.cat([away(part) for part in data.images.split(5000)], 1).argmin(1)
    *parents, nearest = (floats(args, data.images[i.cpu()]) for i in (*bank.rows[rows].T, nearest))
    picture(args, "combinations.png", torch.stack([*parents, x_g, nearest], 1).flatten(0, 1), columns=12)
    t, ends = torch.linspace(0, 1, 10, device=args.device), bank.codes[rows[:10].repeat_interleave(10, 0)]
    picture(args, "sliders.png", D(mix(ends, torch.stack([1 - t, t], 1).repeat(10, 1))), columns=10)


def judge(args, draw, full=True, data=None):
    n = len(data) if data else args.fid_samples
    data = data or load(args.data, args.fid_split, args.size, args.root, args.skip_broken)
    return fid.evaluate(draw, data, n, args.fid_features, args.device, args.fid_weights, full)


@torch.enable_grad()
def fit(args, kind, stream):
    """A classifier of that kind, trained on the stream of images and labels and nothing else."""
    torch.manual_seed(args.seed + 1)
    net = classifier(kind, 1 if args.data in GREY else 3, args.size, args.classes).to(args.device)
    optimiser = torch.optim.Adam(net.parameters(), 1e-3, fused=True)
    for _, (x, y, *_) in zip(range(args.judge_steps), stream, strict=False):
        optimiser.zero_grad()
        F.cross_entropy(net.head(net(x)), y).backward()
        optimiser.step()
    return net.eval().requires_grad_(False)


def name_samples(args, C, D, V, bank, test):
    """Shares of samples that are of their class: self_ by C; independent_ by another classifier, G, right in judge_top1
    of test images; code_ of their codes, 1 by the theorem. cas_top1: of one that was trained on samples alone."""
    data = load(args.data, "train", args.size, args.root, args.skip_broken)
    G = fit(args, args.judge, batches(data, 100, args.seed, flip=args.pad > 0, device=args.device, rank=0, world=1))
    keys = range(max(1, min(10_000, args.fid_samples) // 100))
    right = lambda pairs: float(torch.cat([(logits.argmax(1) == y).float() for logits, y in pairs]).mean())
    name, samples = lambda net, x: net.head(net(x)), lambda: (codes(args, bank, k, 100) for k in keys)
    found = {"code_accuracy": right((C.logits(z), y) for z, y in samples())}
    for prefix, net in (("self", C), ("independent", G)):
        found[f"{prefix}_accuracy"] = right((name(net, D(z)), y) for z, y in samples())
    drawn = ((V.draw(normal(args, V, 100, FAKES, k), y), y) for k, (_, y) in zip(keys, samples(), strict=True))
    found["vae_independent_accuracy"] = right((name(G, x), y) for x, y in drawn)
    stream = (codes(args, bank, k, 100, stream=POSTERIOR) for k in range(args.judge_steps))
    student = fit(args, args.student, ((D(z), y) for z, y in stream))
    for prefix, net in (("classifier", C), ("judge", G), ("cas", student)):
        chunks = torch.arange(len(test)).split(100)
        pairs = ((name(net, floats(args, test.images[i])), test.labels[i].to(args.device)) for i in chunks)
        found[f"{prefix}_top1"] = right(pairs)
    return found


@torch.no_grad()
def evaluate(args):
    """metrics.json: accuracy of samples; FID and its sisters, of the VAE, of other numbers of parents (1: copies, which
    generate nothing) and of reconstructions; the linear probe of z, which has seen labels."""
    C, D, V, bank, state = restore(args)
    untrained, n = build(args), args.probe_samples or None
    read = lambda split, rows=slice(None): load(args.data, split, args.size, args.root, args.skip_broken, rows)
    device = torch.cuda.get_device_name() if "cuda" in args.device else f"cpu, {torch.get_num_threads()} threads"
    metrics = {"command": " ".join(sys.argv), "device": device, "torch": torch.__version__, "steps": state["step"]}
    metrics |= {"images": state["step"] * args.batch, "seconds": round(state["seconds"], 1), "probe_saw_labels": True}
    metrics["parameters"] = {k: sum(p.numel() for p in m.parameters()) for k, m in zip("CDV", untrained, strict=True)}
    effective = 1 / combine(args, bank, codes(args, bank, 0, 1000)[1], args.parents, FAKES, 0)[2].square().sum(1)
    metrics |= {"bank": len(bank.rows), "effective_parents": float(effective.mean())}
    x = floats(args, (test := read("test", slice(10_000))).images[:1000])
    error = (D(C(x)) - x) / 2  # of images in [0, 1]
    psnr = -10 * error.square().mean((1, 2, 3)).log10().mean()
    metrics |= {"reconstruction_l1": float(error.abs().mean()), "reconstruction_psnr": float(psnr)}

    def distances():
        found = judge(args, lambda *key: D(codes(args, bank, *key)[0]))
        vae = lambda chunk, m: V.draw(normal(args, V, m, FAKES, chunk), codes(args, bank, chunk, m)[1])
        found |= {f"vae_{k}": v for k, v in judge(args, vae).items()}
        for parents in (1, 2, 3, 5, 10):
            draw = lambda *key, n=parents: D(codes(args, bank, *key, n)[0])
            found |= {f"parents_{parents}_{k}": v for k, v in islice(judge(args, draw, False).items(), 1)}
        again = lambda chunk, m: D(C(floats(args, test.images[chunk * fid.CHUNK :][:m])))
        return found | {f"recon_{k}": v for k, v in islice(judge(args, again, False, test).items(), 1)}

    parts = read("train", slice(n)), read("test", slice(n and n // 2))
    measures = [lambda: linear_probe.evaluate(C, *parts, untrained[0], args.device)]
    measures += [lambda: name_samples(args, C, D, V, bank, test), distances]
    for measure in measures:
        try:
            metrics |= measure()
        except UserError as error:  # no Inception weights, no room for a cache: the run keeps the rest
            flags = " ".join(word for word in sys.argv[1:] if word not in ("train", "eval"))
            print(f"{SCRIPT}.py: not measured: {error}; then: python {sys.argv[0]} eval {flags}", file=sys.stderr)
    if args.rank == 0:
        (args.out / "metrics.json.tmp").write_text(json.dumps(metrics, indent=1) + "\n")
        os.replace(args.out / "metrics.json.tmp", args.out / "metrics.json")
        print(f"{args.out} has the pictures, and metrics.json, with among others:")
        shown = ("fid", "fd_", "vae_fid", "vae_fd")
        for k in (k for k in metrics if k.endswith(("top1", "accuracy")) or k.startswith(shown)):
            print(f"  {k} {metrics[k]:.4g}")
        print("top1: with z, which saw labels; accuracy: samples of their class; fid, fd_random (NOT FID): 0 is best")


# ------------------------------------------------------------ the command line
FLAGS = {  # those whose defaults are in PRESETS
    "size": "side of images, pixels", "trunk": "network of the classifier",
    "latent": "z: resnet18's averages, or its last map", "classifier_steps": "steps of stage 1, the classifier's",
    "steps": "training steps of both stages; more of them extend a finished run",
    "horizon": "step at which D's rate has fallen to 0, from four fifths of stage 2 on; 0: never",
    "batch": "images a step, over all ranks and pieces", "lr_c": "learning rate of the classifier",
    "lr_d": "learning rate of D and the VAE", "pad": "border of zeros that images are cut from, pixels",
    "joint": "weight of D's reconstruction loss in stage 1, where it also trains z; D keeps what it learns; 0: none",
    "alpha": "of the Dirichlet weights, above 0", "parents": "n, parents of a sample",
    "near": "samples' further parents: of so many nearest to the first, as suits --latent map; 0: of all",
    "bank_samples": "training images whose codes are kept; 0: all", "ema": "decay of the averages of D and the VAE",
    "judge_steps": "steps of the classifiers that judge samples", "log_every": "steps between two lines of log.jsonl",
    "save_every": "steps between checkpoints, each with a samples.png", "fid_samples": "samples that FID is taken of",
    "fid_features": "random needs no weights, gives fd_random", "fid_split": "FID's real images",
    "probe_samples": "training images of the linear probe, with half as many test images; 0: all"}  # fmt: skip
CHOICES = {
    "trunk": ("resnet18", "plain", "pooled"), "latent": ("vec", "map"), "fid_features": ("inception", "random"),
    "fid_split": ("train", "test")}  # fmt: skip
FREE = (  # what may differ between two runs of one checkpoint: beginnings of names
    "command", "root", "out", "steps", "accumulate", "device", "precision", "compile", "skip_broken", "best", "log_",
    "save_", "eval_", "fid_", "probe_", "judge", "student", "parents", "near")  # fmt: skip


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
    add("--plain", action="store_true", help="D learns from L_pix alone")
    for name, text in FLAGS.items():
        add(f"--{name.replace('_', '-')}", type=type(PAPER[name]), choices=CHOICES.get(name), help=text)
    asked, _ = parser.parse_known_args([word for word in sys.argv[1:] if word not in ("-h", "--help")])
    usual = {"imagenet": "paper", "shapes": "demo", "dsprites": "demo", "mnist": "demo", "fashion_mnist": "demo"}
    preset = asked.preset or usual.get(asked.data, "small")
    defaults = SMALL_GREY if preset == "small" and asked.data in GREY else PRESETS[preset]
    parser.set_defaults(preset=preset, out=Path("runs", f"{SCRIPT}-{Path(asked.data).name}"), **defaults)
    args = parser.parse_args()
    least = dict.fromkeys(("steps", "batch", "accumulate", "log_every", "save_every", "fid_samples"), 1)
    least |= {"classifier_steps": 1, "judge_steps": 1, "parents": 1, "most": 2, "alpha": 1e-3}
    most = {"ema": 1, "seed": 2**63 - 1}
    for name, value in vars(args).items():
        low, high = least.get(name, 0), most.get(name, math.inf)
        if isinstance(value, int | float) and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be from {low} to {high}")
    if args.size not in args.widths or (args.latent == "map" and (args.trunk != "resnet18" or args.size > 32)):
        raise UserError(f"--size is one of {[*args.widths]}, with --latent map it is 32, with --trunk resnet18")
    if args.plain:
        args.weights = dict.fromkeys(args.weights, 0.0) | {"pix": 1.0}
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
