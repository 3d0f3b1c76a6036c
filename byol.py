"""BYOL: "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning", Jean-Bastien Grill, Florian Strub,
Florent Altché, Corentin Tallec, Pierre H. Richemond et al., NeurIPS 2020, 2006.07733.

An encoder learns to see, without labels and without setting images against each other. Two views of an image, cut and
coloured at random, go through two networks: the online network predicts from one view what the target network makes of
the other. The target is a slow average of the online network and hears no gradient. That, and a predictor which only
the online network has, keep the two from agreeing on one answer for all images.

    python byol.py                                        # rendered shapes, five CPU minutes: pictures and numbers
    python byol.py --data cifar10                         # a ResNet-18 for 32x32 images on one GPU
    torchrun --nproc_per_node 8 byol.py --data imagenet   # the paper's ResNet-50
"""

import argparse
import copy
import json
import math
import os
import signal
import sys
import time
from collections import OrderedDict
from itertools import islice, repeat
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.utils import save_image

from common import linear_probe
from common.data import NAMES, UserError, ahead, batches, load, uniforms

SCRIPT = Path(__file__).stem

# fmt: off
PAPER = dict(  # ResNet-50 (1x), 1000 epochs (section 3.2). Table 6: what is done to a view of T, one of T', how likely
    size=224, whole=True, crop_area=0.08, views=({"jitter": 0.8, "grey": 0.2, "blur": 1.0, "solarise": 0.0},
                                                 {"jitter": 0.8, "grey": 0.2, "blur": 0.1, "solarise": 0.2}),
    encoder="resnet50", width=64, stride=1, hidden=4096, projection=256, optimiser="lars", trust=1e-3, clip=False,
    lr=0.2, warmup=3127, weight_decay=1.5e-6, tau=0.996, steps=312_784, batch=4096, log_every=100, save_every=1000,
    probe_samples=50_000, sgd_probe=99_310)  # 80 epochs of 1024 images (appendix C.1)
SMALL = PAPER | dict(  # solo-learn's CIFAR-10 recipe, 1000 epochs: the paper does not train on small images
    size=32, whole=False, views=({"jitter": 0.8, "grey": 0.2}, {"jitter": 0.8, "grey": 0.2, "solarise": 0.2}),
    encoder="resnet18", trust=0.02, clip=True, lr=1.0, warmup=1953, weight_decay=1e-5, tau=0.99, steps=195_312,
    batch=256, save_every=2000, probe_samples=0, sgd_probe=0)
DEMO = SMALL | dict(  # five minutes on two CPU cores, found by experiment
    crop_area=0.35, encoder="resnet10", width=16, stride=2, hidden=256, projection=128, optimiser="adamw", lr=8e-3,
    warmup=30, weight_decay=1e-4, tau=0.95, steps=1500, batch=64, log_every=50, save_every=500, probe_samples=10_000)
PRESETS = {"demo": DEMO, "small": SMALL, "paper": PAPER}
GREY = ("shapes", "dsprites", "mnist", "fashion_mnist")  # sets whose colours tell nothing, or that have none
GREY_VIEWS = ({"invert": 0.5},) * 2  # their views, which f sees in grey
ENCODERS = {  # whether the units are bottlenecks, and how many a stage has
    "resnet10": (False, (1, 1, 1, 1)), "resnet18": (False, (2, 2, 2, 2)), "resnet50": (True, (3, 4, 6, 3)),
    "resnet101": (True, (3, 4, 23, 3)), "resnet152": (True, (3, 8, 36, 3)), "resnet200": (True, (3, 24, 36, 3)),
}
# fmt: on


# ------------------------------------------------------------ views: operators on x [B, 3, S, S] in [0, 1]
# The official code, on TensorFlow, adds brightness, and centres contrast on each channel's own mean. These are
# torchvision's, which everybody reproduces BYOL with. An amount is [B, 1, 1, 1], each image's own.
# With `out`, which may be x itself, they touch no new memory, which is most of what they cost on a CPU; comparisons and
# torch.where are slow there too.
luma = lambda x: (0.2989 * x[:, :1]).add_(x[:, 1:2], alpha=0.5870).add_(x[:, 2:], alpha=0.1140)  # [B, 1, S, S]
blend = lambda x, y, factor, out: torch.sub(x, y, out=out).mul_(factor).add_(y).clamp_(0, 1)
brightness = lambda x, factor, out=None: torch.mul(x, factor, out=out).clamp_(0, 1)
contrast = lambda x, factor, out=None: blend(x, luma(x.mean((2, 3), keepdim=True)), factor, out)
saturation = lambda x, factor, out=None: blend(x, luma(x), factor, out)
solarise = lambda x: torch.minimum(x, 1 - x)  # 1 - x from 0.5 on


def hue(x, turn, out=None):
    """Turns the hue by a share of the circle. A channel is V - C + C w(H) in terms of HSV, w a trapezoid."""
    red, green, blue = x.split(1, 1)
    value, least = torch.maximum(red, green).maximum(blue), torch.minimum(red, green).minimum(blue)
    chroma, not_red, not_green = value - least, (value - red).sign_(), (value - green).sign_()
    h = torch.lerp(green - blue, torch.lerp(blue - red, red - green, not_green), not_red).div_(chroma.clamp(min=1e-9))
    h = h.add_(6 * turn).addcmul_(not_red, not_green.add_(1), value=2)
    h = h.sub_(6 * (h / 6).floor_())  # in [0, 6): 0 is red, 2 green, 4 blue
    w = torch.cat([(h - 3).abs_().sub_(1), 2 - (h - 2).abs_(), 2 - (h - 4).abs_()], 1).clamp_(0, 1)
    return torch.addcmul(least, chroma, w, out=out)


def blur(x, sigma):
    """Gaussian blur, mirrored at the edges, of 23 x 23 pixels at 224: two products with a small matrix an image."""
    size = x.shape[2]
    radius = size // 20
    t = torch.arange(-radius, radius + 1, device=x.device)
    weight = torch.exp(-(t**2) / (2 * sigma[:, 0, 0] ** 2))  # [B, 2 radius + 1]
    eye = F.pad(torch.eye(size, device=x.device)[None], (radius, radius), mode="reflect")[0]
    shifted = eye.unfold(1, len(t), 1)  # [in, out, t]: 1 where pixel out + t is pixel in
    matrix = torch.einsum("bt,iot->boi", weight / weight.sum(1, keepdim=True), shifted)[:, None]
    return matrix @ x @ matrix.mT


JITTER = ((brightness, 1, 0.4), (contrast, 1, 0.4), (saturation, 1, 0.2), (hue, 0, 0.1))  # amount: 1 +- 0.4, ...
OPERATORS = ("jitter", "grey", "blur", "solarise", "invert")
DRAWS = 14  # random numbers of a view


def augment(x, u, p):
    """A view of each crop x [B, 3, S, S] in [0, 1], from its own random numbers u [B, DRAWS] in [0, 1): Table 6, each
    operator on the images that draw it, with probability p[name]. u is on the CPU, which so knows their number: the
    device need not be asked."""
    x = x.contiguous()  # plane by plane
    move = lambda part: part.to(x.device, non_blocking=True)
    drawn = {name: u[:, i] < p.get(name, 0) for i, name in enumerate(OPERATORS)}
    if p.get("jitter"):  # each image has its own order of the four: at each turn those of one operator stand together
        turns = torch.where(drawn["jitter"][:, None], u[:, 5:9].argsort(1), 4).T  # [4, B]; 4: none
        amounts = torch.stack([centre + most * (2 * u[:, 9 + i] - 1) for i, (_, centre, most) in enumerate(JITTER)])
        place = torch.arange(len(x))  # of the image that stands here
        for turn in turns:
            order = turn[place].argsort(stable=True)
            place, x = place[order], x.index_select(0, move(order))
            parts = turn.bincount(minlength=5).tolist()
            jitters = zip(JITTER, amounts, x.split(parts)[:4], place.split(parts)[:4], strict=True)
            for (operator, *_), amount, part, who in jitters:
                operator(part, move(amount[who, None, None, None]), out=part)
        x = x.index_select(0, move(place.argsort()))
    else:
        x = x.clone()

    def apply(operator, rows, *amounts):
        if len(rows := rows.nonzero()[:, 0]):
            amounts, rows = [move(a[rows, None, None, None]) for a in amounts], move(rows)
            x.index_copy_(0, rows, operator(x.index_select(0, rows), *amounts).expand(-1, 3, -1, -1))

    apply(luma, drawn["grey"])
    apply(blur, drawn["blur"], 0.1 + 1.9 * u[:, 13])
    apply(solarise, drawn["solarise"])
    apply(lambda x: 1 - x, drawn["invert"])
    return x


def read(args, split, rows=slice(None), whole=False):
    """Pictures, of a view's size or whole, as they are published."""
    return load(args.data, split, None if whole else args.size, args.root, args.skip_broken, rows)


def views(args, first):
    """Endless pieces of batches from step `first` on: v1 ~ T and v2 ~ T', [m, 3, S, S] in [-1, 1], of the same images.
    Each is a crop of its own, of 8 % to 100 % of the area, bicubic, flipped at random (cut from files as large as they
    are, in the workers), then augmented."""
    data, share = read(args, "train", whole=args.whole), (args.rank, args.world)
    crop, flip = (2, args.size, (args.crop_area, 1.0), (3 / 4, 4 / 3), "bicubic"), "flip" not in args.without
    crops = batches(data, args.batch, args.seed, first, args.accumulate, flip, crop, args.device, *share)

    def augmented(item):
        (step, piece), pair = divmod(item[0], args.accumulate), []
        for view, p in enumerate(args.views):
            u = torch.from_numpy(uniforms(args.batch, DRAWS, step, args.seed, view, *share, piece, args.accumulate))
            v = augment(item[1][0][:, view].contiguous().add_(1).div_(2), u, p)
            pair.append(v.mul_(2).sub_(1).contiguous(memory_format=torch.channels_last))
        return pair

    if args.device != "cpu":
        return map(augmented, enumerate(crops, first * args.accumulate))
    crops = ahead(next, repeat(crops), 1)  # small tensors: whole batches in threads make more of the cores than parts
    return ahead(augmented, enumerate(crops, first * args.accumulate), 2)


# ------------------------------------------------------------ networks: the encoder f, the projector g, the predictor q
def convolution(cin, cout, kernel, stride):
    return nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(cout)


class Residual(nn.Module):
    """ResNet's unit, [B, cin, h, w] -> [B, cout, h / stride, w / stride], ReLU last."""

    def __init__(self, cin, cout, stride, bottleneck):
        super().__init__()
        shapes = [(cin, cout, 3, stride), (cout, cout, 3, 1)]
        if bottleneck:
            shapes = [(cin, cout // 4, 1, 1), (cout // 4, cout // 4, 3, stride), (cout // 4, cout, 1, 1)]
        layers = [layer for shape in shapes for layer in (*convolution(*shape), nn.ReLU())]
        self.branch = nn.Sequential(*layers[:-1])
        self.skip = nn.Sequential(*convolution(cin, cout, 1, stride) if stride > 1 or cin != cout else ())

    def forward(self, x):
        return F.relu(self.skip(x) + self.branch(x))


class Encoder(nn.Module):
    """f: x [B, 3, S, S] in [-1, 1] -> y [B, dim], the average of a ResNet's last map. Below 96 pixels its stem is one
    3x3 convolution. grey: it sees only each image's luma, at mean 0 and deviation 1."""

    def __init__(self, bottleneck, units, width=64, size=224, stride=1, grey=False):
        super().__init__()
        self.grey = grey
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # of [0, 1]
        self.register_buffer("scale", (0.5 / std)[:, None, None], persistent=False)
        self.register_buffer("shift", ((0.5 - mean) / std)[:, None, None], persistent=False)
        layers = [*convolution(1 if grey else 3, width, 3, stride), nn.ReLU()]
        if size >= 96:
            layers = [*convolution(1 if grey else 3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        cin = width
        for stage, count in enumerate(units):
            cout = (4 * width if bottleneck else width) << stage
            for unit in range(count):
                layers.append(Residual(cin, cout, 2 if stage and not unit else 1, bottleneck))
                cin = cout
        self.layers, self.dim = nn.Sequential(*layers), cin

    def forward(self, x):
        if self.grey:
            std, mean = torch.std_mean(x := luma((x + 1) / 2), (2, 3), keepdim=True)
            x = (x - mean) / (std + 1e-3)
        else:
            x = torch.addcmul(self.shift, x, self.scale)
        return self.layers(x).mean((2, 3))


def mlp(cin, hidden, cout):
    """g and q: [B, cin] -> [B, cout]. No batch norm at the end, unlike SimCLR's."""
    return nn.Sequential(nn.Linear(cin, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, cout, bias=False))


# ------------------------------------------------------------ the objective
def regression_loss(p, z):
    """Equation 2: |n(p) - n(z)|^2 = 2 - 2 cos(p, z) with n(v) = v / |v|; [B, D], [B, D] -> [B]."""
    return (F.normalize(p, dim=1, eps=1e-6) - F.normalize(z, dim=1, eps=1e-6)).square().sum(1)


def byol_loss(p1, p2, z1, z2):
    """L and its twin with the views exchanged (section 3.1): their sum, in [0, 8], about 4 at first, not their mean."""
    return (regression_loss(p1, z2) + regression_loss(p2, z1)).mean()


def target_decay(step, steps, base):
    """tau of a step: from base to 1 along a cosine (section 3.2)."""
    return 1 - (1 - base) * (math.cos(math.pi * step / steps) + 1) / 2


def learning_rate(step, steps, warmup, peak):
    """From 0 to the peak along a line, then to 0 along a cosine (section 3.2)."""
    if step < warmup:
        return peak * step / warmup
    return peak * (math.cos(math.pi * (step - warmup) / (steps - warmup)) + 1) / 2


class LARS(torch.optim.Optimizer):
    """u = g + wd p, times trust |p| / |u|; m = 0.9 m + u; p = p - lr m (You et al. 2017, as in the official code).

    Biases and batch norm are left out of decay and scaling: u = g. clip: the scale is at most lr (solo-learn's).
    """

    def __init__(self, params, lr, weight_decay, trust=1e-3, clip=False, momentum=0.9):
        params = list(params)
        groups = [[p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]]
        defaults = {"lr": lr, "weight_decay": weight_decay, "trust": trust, "clip": clip, "momentum": momentum}
        super().__init__([{"params": group} for group in groups if group], defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, lr = group["params"], group["lr"]
            u = [p.grad for p in params]
            if params[0].ndim > 1:
                u = torch._foreach_add(u, params, alpha=group["weight_decay"])
                size, length = (torch.stack(torch._foreach_norm(tensors)) for tensors in (params, u))
                scale = torch.where((size > 0) & (length > 0), group["trust"] * size / length, 1.0)
                scale = (scale / lr).clamp(max=1) if group["clip"] else scale
                u = torch._foreach_mul(u, list(scale))
            for p in params:
                if not self.state[p]:
                    self.state[p]["m"] = torch.zeros_like(p)
            m = [self.state[p]["m"] for p in params]
            torch._foreach_mul_(m, group["momentum"])
            torch._foreach_add_(m, u)
            torch._foreach_add_(params, m, alpha=-lr)


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
    """The online network, f, g and q in a row, with its first weights, a function of the seed: every rank starts from
    the same. And the target network, for a start a copy of f and g (the official code's has weights of its own)."""
    torch.manual_seed(args.seed)
    f = Encoder(*ENCODERS[args.encoder], args.width, args.size, args.stride, args.grey)
    q = nn.Identity() if args.no_predictor else mlp(args.projection, args.hidden, args.projection)
    online = nn.Sequential(OrderedDict(f=f, g=mlp(f.dim, args.hidden, args.projection), q=q))
    for layer in online.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):  # Haiku's default
            std = layer.weight[0].numel() ** -0.5
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    if args.world > 1 and args.device != "cpu":  # statistics of the whole batch, as across the paper's TPU cores
        online = nn.SyncBatchNorm.convert_sync_batchnorm(online)
    online.to(args.device, memory_format=torch.channels_last)
    return online, copy.deepcopy(online[:2]).requires_grad_(False)


def train(args):
    online, target = build(args)
    xi, theta = list(target.parameters()), list(online[:2].parameters())
    taught = online[:2] if args.no_target else target
    peak, steps = args.lr * args.batch / 256, args.horizon or args.steps
    if args.optimiser == "lars":
        optimiser = LARS(online.parameters(), peak, args.weight_decay, args.trust, args.clip)
    else:
        optimiser = torch.optim.AdamW(online.parameters(), peak, (0.9, 0.99), 1e-8, args.weight_decay, fused=True)
    run = Run(args, online=online, target=target, optimiser=optimiser)
    for network in (online, target) if args.compile else ():
        network.compile()
    autocast = torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.precision == "bf16")
    pieces = views(args, run.step)

    while run.step < args.steps:
        online.train()
        target.train()  # its batch norm, too, sees the batch
        optimiser.zero_grad()
        for v1, v2 in islice(pieces, args.accumulate):
            with autocast:
                p1, p2 = (online(v).float() for v in (v1, v2))  # one after the other: batch norm sees a single view
                with torch.set_grad_enabled(args.no_target):  # without that ablation the target hears nothing
                    z1, z2 = (taught(v).float() for v in (v1, v2))
            loss = byol_loss(p1, p2, z1, z2)
            (loss / args.accumulate).backward()
        average_gradients(args, online)
        for group in optimiser.param_groups:
            group["lr"] = lr = learning_rate(run.step, steps, args.warmup, peak)
        optimiser.step()
        tau = target_decay(run.step, steps, args.tau)
        with torch.no_grad():
            torch._foreach_lerp_(xi, theta, 1 - tau)  # xi <- tau xi + (1 - tau) theta
        run.step += 1

        if run.every(args.log_every):  # spread of n(z): about 1 all over the sphere, 0 in one point: a collapse
            spread = F.normalize(z1, dim=1).std(0).mean() * z1.shape[1] ** 0.5
            run.log(loss=loss, spread=spread, tau=tau, lr=lr)
        if run.every(args.save_every):
            run.save()
            picture(args, "samples.png", *neighbours(args, online.f))
        if run.every(args.eval_every):
            run.save()
            run.log(**(found := judge_features(args, online.f)))
            if (value := -float(next(iter(found.values())))) < run.best:
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
    """f of the online network, which alone is kept, and the checkpoint that it comes from."""
    name = "best.pt" if args.best else "checkpoint.pt"
    if (state := read_checkpoint(args, name)) is None:
        raise UserError(f"there is no {name} in {args.out}: train first, or give the run's --out")
    online, _ = build(args)
    online.load_state_dict(state["online"])
    return online.f.eval().requires_grad_(False), state


def probed(args):
    """The pictures of the probe, to learn from and to be tested on."""
    n = args.probe_samples or None
    return read(args, "train", slice(n)), read(args, "test", slice(n and n // 2))


def neighbours(args, *encoders):
    """Ten test images, a row each: for each encoder the image and its 8 nearest, by the cosine of y, of 2,000 test
    images, and a gap between encoders. Pictures, and how many a row has."""
    data, rows = read(args, "test", slice(2000)), []
    x = data.images.permute(0, 3, 1, 2) / 127.5 - 1
    for f in encoders:
        y = F.normalize(linear_probe.extract(f, data, args.device)[0].cpu(), dim=1)
        nearest = (y[:10] @ y.T).fill_diagonal_(-2).topk(min(8, len(y) - 1)).indices  # [10, 8]
        rows += [torch.ones_like(x[:10])] * bool(rows) + [x[:10], *x[nearest.T]]
    return torch.stack(rows, 1).flatten(0, 1), len(rows)


def sample(args):
    """samples.png: neighbours as the trained f finds them, and beside them as it did with its first weights;
    views.png: what it is trained on, v1 and v2 of an image side by side."""
    (f, _), untrained = restore(args), build(args)[0].f
    linear_probe.calibrate(untrained, probed(args)[0], args.device)
    picture(args, "samples.png", *neighbours(args, f, untrained))
    picture(args, "views.png", torch.stack(next(views(args, 0)), 1)[:40].flatten(0, 1), columns=10)


def judge_features(args, f):
    """k-NN accuracy; without labels the effective rank of y (RankMe, 2210.02885), which a collapse brings down to 1."""
    train, test = (linear_probe.extract(f, data, args.device) for data in probed(args))
    if train[1] is None or test[1] is None:
        share = F.normalize(torch.linalg.svdvals(test[0]), p=1, dim=0)
        return {"effective_rank": torch.special.entr(share).sum().exp()}
    return {"knn_top1": (linear_probe.knn(train, test[0]) == test[1]).double().mean()}


def evaluate(args):
    """metrics.json: linear probe and k-NN of y, and the probe of few labels: 1 % and 10 % of the training set's. The
    paper fine-tunes f on these (section 4.2); here it stays frozen."""
    f, state = restore(args)
    online, _ = build(args)
    device = torch.cuda.get_device_name() if "cuda" in args.device else f"cpu, {torch.get_num_threads()} threads"
    metrics = {"command": " ".join(sys.argv), "device": device, "torch": torch.__version__, "steps": state["step"]}
    metrics |= {"images": state["step"] * args.batch, "seconds": round(state["seconds"], 1)}
    metrics["parameters"] = {k: sum(p.numel() for p in n.parameters()) for k, n in online.named_children()}

    def probe():
        train, test = probed(args)
        found = linear_probe.evaluate(f, train, test, online.f, args.device)
        tenth = max(10, len(read(args, "train", whole=args.whole)) // 10)
        few = read(args, "train", slice(tenth))  # shuffled: its first tenth is 1 %
        (x, y), test = (linear_probe.extract(f, data, args.device) for data in (few, test))
        for percent, n in ((1, tenth // 10), (10, tenth)):
            found[f"low_shot_{percent}_percent_top1"] = linear_probe.probe((x[:n], y[:n]), test)["top1"]
        if args.sgd_probe:  # the paper's protocol on ImageNet: crops and flips only, 10,009 training images held out
            crop = (1, args.size, (args.crop_area, 1.0), (3 / 4, 4 / 3), "bicubic")
            fitted = read(args, "train", slice(10_009, None), args.whole)
            augmented = batches(fitted, 1024, args.seed, crop=crop, device=args.device)
            data = augmented, read(args, "train", slice(10_009)), read(args, "test")
            scores = linear_probe.sgd_probe(f, *data, args.sgd_probe, args.device)
            found |= {f"sgd_probe_{k}": value for k, value in scores.items()}
        return found

    try:
        metrics |= probe()
    except UserError as error:  # no labels, no room for a cache: the run keeps the rest
        flags = " ".join(word for word in sys.argv[1:] if word not in ("train", "eval"))
        print(f"{SCRIPT}.py: not measured: {error}; then: python {sys.argv[0]} eval {flags}", file=sys.stderr)
    if args.rank == 0:
        (args.out / "metrics.json.tmp").write_text(json.dumps(metrics, indent=1) + "\n")
        os.replace(args.out / "metrics.json.tmp", args.out / "metrics.json")
        print(f"{args.out} has the pictures, and metrics.json, where among others:")
        for k in (k for k in metrics if k.endswith("top1")):
            print(f"  {k} {metrics[k]:.4g}")
        print("top1: accuracy with f's features, beside untrained_, raw_pixels_, random_features_.")


# ------------------------------------------------------------ the command line
# fmt: off
FLAGS = {  # those whose defaults are in PRESETS
    "size": "side of the views, pixels, a multiple of 16", "crop_area": "least share of an image in a crop",
    "encoder": "backbone f", "width": "channels of f's stem; 64 is the paper's 1x, 128 its 2x",
    "optimiser": "LARS, or AdamW with betas of 0.9 and 0.99", "lr": "highest learning rate, for 256 images a step",
    "warmup": "steps in which the learning rate rises", "weight_decay": "of weights; with adamw of all parameters",
    "tau": "decay of the target network at the start, 0 to 1",
    "steps": "training steps; more of them extend a finished run",
    "batch": "images a step, over all ranks and pieces", "log_every": "steps between two lines of log.jsonl",
    "save_every": "steps between checkpoints, each with a samples.png",
    "probe_samples": "training images of the linear probe, with half as many test images; 0: all",
    "sgd_probe": "steps of the papers' linear probe, SGD on augmented images; 0: none",
}
CHOICES = {"encoder": ENCODERS, "optimiser": ("lars", "adamw")}
FREE = (  # what may differ between two runs of one checkpoint: beginnings of names
    "command", "root", "out", "steps", "accumulate", "device", "precision", "compile", "skip_broken", "best", "log_",
    "save_", "eval_", "probe_", "sgd_")
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
    add("--eval-every", type=int, default=0, help="steps between k-NN tests, the best of which keeps best.pt; 0: none")
    add("--best", action="store_true", help="sample and evaluate best.pt, not checkpoint.pt")
    add("--skip-broken", action="store_true", help="do without images that cannot be read")
    add("--horizon", type=int, default=0, help="steps until the learning rate is 0 and tau 1; 0: as --steps")
    add("--grey", action=argparse.BooleanOptionalAction, help="f sees grey images, their views are negatives or not")
    add("--no-predictor", action="store_true", help="ablation (Table 5b), collapses: q is the identity")
    add("--no-target", action="store_true", help="ablation (Table 5b), collapses: the online network is its own target")
    add("--without", nargs="+", default=[], choices=("flip", *OPERATORS), help="ablation (Table 17): what views lack")
    for name, text in FLAGS.items():
        add(f"--{name.replace('_', '-')}", type=type(PAPER[name]), choices=CHOICES.get(name), help=text)
    asked, _ = parser.parse_known_args([word for word in sys.argv[1:] if word not in ("-h", "--help")])
    usual = {"imagenet": "paper", "shapes": "demo", "dsprites": "demo", "mnist": "demo", "fashion_mnist": "demo"}
    preset = asked.preset or usual.get(asked.data, "small")
    parser.set_defaults(preset=preset, out=Path("runs", f"{SCRIPT}-{Path(asked.data).name}"), **PRESETS[preset])
    parser.set_defaults(grey=asked.data in GREY)
    args = parser.parse_args()
    least = dict.fromkeys(("steps", "batch", "accumulate", "log_every", "save_every", "width"), 1)
    least["crop_area"] = 0.01
    most = {"tau": 1, "crop_area": 1, "seed": 2**63 - 1}
    for name, value in vars(args).items():
        low, high = least.get(name, 0), most.get(name, math.inf)
        if isinstance(value, int | float) and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be from {low} to {high}")
    if args.size < 16 or args.size % 16:
        raise UserError(f"--size {args.size}: must be a multiple of 16")
    if args.batch < 2 * args.accumulate:
        raise UserError(f"--batch {args.batch}: batch norm needs at least 2 images a piece")
    if 0 < args.horizon < args.steps:
        raise UserError(f"--steps {args.steps}: nothing is learnt after --horizon {args.horizon}")
    views = GREY_VIEWS if args.grey else args.views
    args.views = [{name: p for name, p in view.items() if name not in args.without} for view in views]
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
