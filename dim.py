"""DIM: "Learning deep representations by mutual information estimation and maximization", R Devon Hjelm, Alex Fedorov,
Samuel Lavoie-Marchildon, Karan Grewal, Phil Bachman, Adam Trischler, Yoshua Bengio, ICLR 2019, 1808.06670.

Deep InfoMax. An encoder makes a map of local features of an image x, and out of it one vector Y. A critic scores pairs
of a vector and a place in a map: high where both are of one image, low where they are of two. Encoder and critic learn
together to tell the two kinds apart. That raises a lower bound on the mutual information of Y and the patches of its
image, so Y comes to hold what the patches have in common. No decoder, no augmentation, no labels.

    python dim.py                                    # rendered shapes, five CPU minutes: pictures and numbers
    python dim.py --data cifar10 --measure infonce   # the paper's CIFAR-10 model on one GPU
    python dim.py --data stl10                       # the paper's 64x64 model
"""

import argparse
import copy
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
from torch.utils.checkpoint import checkpoint
from torchvision.utils import save_image

from common import linear_probe
from common.data import NAMES, UserError, batches, generator, load

SCRIPT = Path(__file__).stem
PRIOR = 0  # a stream of random numbers

# fmt: off
# An encoder: its convolutions (channels, kernel, stride, padding, whether a max-pool follows), the number of the one
# whose output is the local map, and the widths of the hidden layers behind them. Tables 1 and 2 have CIFAR and ALEX.
CIFAR = ((64, 4, 2, 1, 0), (128, 4, 2, 1, 0), (256, 4, 2, 1, 0)), 1, (1024,)
ALEX = ((96, 3, 1, 1, 1), (192, 3, 1, 1, 1), (384, 3, 1, 1, 0), (384, 3, 1, 1, 0), (192, 3, 1, 1, 1)), 2, (4096, 4096)
DCGAN = ((64, 4, 2, 1, 0), (128, 4, 2, 1, 0), (256, 4, 2, 1, 0), (512, 4, 2, 1, 0)), 2, (1024,)
NARROW = ((32, 4, 2, 1, 0), (64, 4, 2, 1, 0), (128, 4, 2, 1, 0)), 1, (256,)
PAPER = dict(  # DIM(L) on STL-10 and Tiny ImageNet (Table 2)
    size=64, encoders={32: CIFAR, 64: ALEX}, y_dim=64, alpha=0.0, beta=1.0, gamma=0.1,  # section 4; DIM(G) is 1, 0, 1
    measure="jsd", critic="dot", units=2048, hidden=512,  # the critics' tables in the appendix
    crop=1.0, steps=328_000, batch=64, lr=1e-4, penalty=1.0,  # 200 epochs of STL-10's 105,000 images
    betas=(0.5, 0.999),  # the authors' code; the paper says no more than Adam
    log_every=100, save_every=2000, probe_samples=50_000,
    # what evaluation fits: images a step, epochs. The paper does not tell those of MINE, decoder and fine-tuning
    fits={"mlp": (64, 150), "ndm": (10_000, 1000), "mine": (64, 50), "decoder": (64, 50), "finetune": (64, 150)},
    fit_lr=1e-4, decoder_width=512)
SMALL = PAPER | dict(  # DIM(L) on CIFAR-10 and CIFAR-100 (Table 1), 1000 epochs; the authors' DCGAN for 64x64
    size=32, encoders={32: CIFAR, 64: DCGAN}, steps=781_000, probe_samples=0)
DEMO = SMALL | dict(  # for two CPU cores, found by experiment
    encoders={32: NARROW}, measure="infonce", units=256, hidden=128, steps=1500, lr=5e-4, save_every=500,
    fits={"mlp": (64, 10), "ndm": (2000, 20), "mine": (64, 2), "decoder": (64, 4), "finetune": (64, 4)},
    fit_lr=1e-3, decoder_width=64, probe_samples=10_000)
PRESETS = {"demo": DEMO, "small": SMALL, "paper": PAPER}
# fmt: on


# ------------------------------------------------------------ the encoder
class Encoder(nn.Sequential):
    """Images [B, 3, size, size] in [-1, 1] -> the local map C(x) [B, channels, M, M]; "conv", the last map [B, c,
    h, w]; "fc", the last hidden layer [B, D]; Y [B, y_dim], linear."""

    def __init__(self, size, convs, local, hidden, y_dim):
        super().__init__()
        cin, stages = 3, ([], [], [nn.Flatten()])
        for i, (width, kernel, stride, padding, pool) in enumerate(convs):
            conv = nn.Conv2d(cin, width, kernel, stride, padding, bias=False)
            stages[i > local].extend([conv, nn.BatchNorm2d(width), nn.ReLU(), *[nn.MaxPool2d(3, 2)] * pool])
            cin, size = width, (size + 2 * padding - kernel) // stride + 1
            size = (size - 3) // 2 + 1 if pool else size
        self.channels, self.conv_dim = convs[local][0], cin * size**2
        widths = self.conv_dim, *hidden
        for shape in pairwise(widths):
            stages[2].extend([nn.Linear(*shape, bias=False), nn.BatchNorm1d(shape[1]), nn.ReLU()])
        self.extend([*(nn.Sequential(*stage) for stage in stages), nn.Linear(widths[-1], y_dim)])

    def forward(self, x):
        places = self[0](x)
        conv = self[1](places)
        fc = self[2](conv)
        return places, conv, fc, self[3](fc).float()

    def features(self):
        """What the paper classifies, as networks: images -> "fc", "conv" flattened, Y."""
        conv = nn.Sequential(self[0], self[1], nn.Flatten())  # fc's own Flatten has nothing left to do
        return {"fc": nn.Sequential(conv, self[2]), "conv": conv, "Y": nn.Sequential(*self)}


# ------------------------------------------------------------ critics: scores of all pairs in a batch
class Embedder(nn.Module):
    """One hidden layer and a shortcut at every place, [N, cin, h, w] -> [N, units, h, w], normed over the units."""

    def __init__(self, cin, units):
        super().__init__()
        first, second = nn.Conv2d(cin, units, 1, bias=False), nn.Conv2d(units, units, 1)
        self.nonlinear = nn.Sequential(first, nn.BatchNorm2d(units), nn.ReLU(), second)
        self.shortcut, self.norm = nn.Conv2d(cin, units, 1, bias=False), nn.LayerNorm(units)
        if units >= cin:  # nearly the identity at first
            with torch.no_grad():
                self.shortcut.weight.uniform_(-0.01, 0.01)[range(cin), range(cin)] = 1

    def forward(self, x):
        h = self.nonlinear(x) + self.shortcut(x)
        return self.norm(h.movedim(1, -1)).movedim(-1, 1)


class EncodeAndDot(nn.Module):
    """Maps [N, channels, h, w], Y [N, y_dim] -> s [N, N, hw]: s[i, j, l] = <embedded Y_i, embedded place l of image j>,
    neither divided by a temperature nor by the root of the units."""

    def __init__(self, channels, y_dim, units):
        super().__init__()
        self.places, self.vectors = Embedder(channels, units), Embedder(y_dim, units)

    def forward(self, maps, Y):
        places, vectors = self.places(maps).flatten(2), self.vectors(Y[..., None, None])[..., 0, 0]
        with torch.autocast(Y.device.type, enabled=False):  # bf16 would round scores of 2048 units to integers
            return torch.einsum("iu,jul->ijl", vectors.float(), places.float())


class ConcatAndConvolve(nn.Module):
    """The same scores by 1x1 convolutions of Y_i beside every place of image j; on a map of one place, the global
    critic. The first layer is a sum of what the map gives and what Y gives: N + N products, not N²."""

    def __init__(self, channels, y_dim, units):
        super().__init__()
        self.first = nn.Conv2d(channels + y_dim, units, 1)
        self.rest = nn.Sequential(nn.ReLU(), nn.Conv2d(units, units, 1), nn.ReLU(), nn.Conv2d(units, 1, 1))

    def forward(self, maps, Y):
        of_maps, of_Y = self.first.weight.split([maps.shape[1], Y.shape[1]], dim=1)
        places, vectors = F.conv2d(maps, of_maps, self.first.bias), F.conv2d(Y[..., None, None], of_Y)
        score = lambda some: self.rest((places + some[:, None]).flatten(0, 1)).view(len(some), len(maps), -1)
        # the hidden layers of all pairs would fill the memory: they are computed again when their gradients are due
        parts = vectors.split(max(1, 64 // maps[0, 0].numel()))
        return torch.cat([checkpoint(score, part, use_reentrant=False) for part in parts]).float()


def discriminator(y_dim):
    """Of the prior, and of NDM: [N, y_dim] -> logits [N, 1]."""
    return nn.Sequential(nn.Linear(y_dim, 1000), nn.ReLU(), nn.Linear(1000, 200), nn.ReLU(), nn.Linear(200, 1))


# ------------------------------------------------------------ networks of the evaluation
def classifier(cin, classes):
    """Features [N, cin] -> logits [N, classes]."""
    hidden = nn.Linear(cin, 200), nn.Dropout(0.1), nn.BatchNorm1d(200), nn.ReLU()
    return nn.Sequential(*hidden, nn.Linear(200, classes))


def decoder(y_dim, width, size):
    """Y [N, y_dim] -> images [N, 3, size, size] in [-1, 1]; `width` channels at 4x4, half as many at each next size."""
    norm = nn.BatchNorm1d(16 * width)
    layers = [nn.Linear(y_dim, 16 * width, bias=False), norm, nn.ReLU(), nn.Unflatten(1, (width, 4, 4))]
    for n in (width >> i for i in range(int(math.log2(size / 4)))):
        layers += [nn.ConvTranspose2d(n, n // 2, 4, 2, 1), nn.BatchNorm2d(n // 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(n // 2, 3, 3, padding=1, bias=False), nn.Tanh())


# ------------------------------------------------------------ the objective
F_DIVERGENCES = {  # what is expected of the joint distribution's scores, and of the marginals' (Nowozin et al. 2016)
    "jsd": (lambda s: math.log(2) - F.softplus(-s), lambda s: F.softplus(s) - math.log(2)),
    "gan": (lambda s: -F.softplus(-s), F.softplus),  # equation 4 as it is printed; the log 2 make JSD 0 where s = 0
    "kl": (lambda s: s, lambda s: torch.exp(s - 1)),
    "rkl": (lambda s: -torch.exp(-s), lambda s: s - 1),
    "h2": (lambda s: 1 - torch.exp(-s), lambda s: torch.exp(s) - 1),
    "x2": (torch.square, lambda s: -((s.abs() + 1) ** 2) / 2),  # as in the authors' code: it bounds nothing
}


def divergence_loss(joint, marginal, measure):
    """Minus a lower bound of a divergence between two distributions, from scores of samples of both, of any shape:
    equation 2 (DV), equation 4 (JSD) and its relatives."""
    if measure == "dv":
        return marginal.flatten().logsumexp(0) - math.log(marginal.numel()) - joint.mean()
    of_joint, of_marginal = F_DIVERGENCES[measure]
    return of_marginal(marginal).mean() - of_joint(joint).mean()


def pairs(s):
    """s [N, N, L] -> the scores of i = j [N, L], from the joint distribution, and of ALL others [N, N - 1, L]."""
    n = len(s)
    return s.diagonal().T, s.flatten(0, 1)[1:].unflatten(0, (n - 1, n + 1))[:, :-1].reshape(n, n - 1, -1)


def information_loss(s, measure):
    """Minus the estimated mutual information of Y and a place, from s [N, N, L] of Y_i and place l of image j. The mean
    over places is equation 6's 1 / M²."""
    joint, marginal = pairs(s)
    if measure == "infonce":  # equation 5: which of these places is Y_i's? The others of its own image do not compete
        return F.softplus(marginal.flatten(1).logsumexp(1, keepdim=True) - joint).mean()
    return divergence_loss(joint, marginal, measure)


def discriminator_loss(real, fake):
    """Equation 7 for D: logits of samples of the prior, and of sigmoid(Y)."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def prior_loss(fake):
    """Equation 7 for E, as in the authors' code: not log(1 - D), which has no gradient where D is sure."""
    return F.softplus(-fake).mean()


def gradient_penalty(logits, inputs):
    """Half the mean squared norm of D's gradient at its inputs [N, y_dim] (Mescheder et al. 2018)."""
    (gradient,) = torch.autograd.grad(logits.sum(), inputs, create_graph=True)
    return gradient.square().sum(1).mean() / 2


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
    """E, critics T by the term that they serve, and the prior's D with their first weights, a function of the seed."""
    torch.manual_seed(args.seed)
    E, T = Encoder(args.size, *args.encoders[args.size], args.y_dim), nn.ModuleDict()
    if args.alpha:
        T["global"] = ConcatAndConvolve(E.conv_dim, args.y_dim, args.hidden)
    if args.beta:
        critic, width = (EncodeAndDot, args.units) if args.critic == "dot" else (ConcatAndConvolve, args.hidden)
        T["local"] = critic(E.channels, args.y_dim, width)
    networks = E, T, discriminator(args.y_dim)
    return [network.to(args.device, memory_format=torch.channels_last) for network in networks]


def images(args, split, batch, first=0, pieces=1, rank=0, world=1):
    """Endless batches x [m, 3, size, size] from number `first` on, mirrored only where they are cropped."""
    crop, size = None, args.size
    if split == "train" and args.crop < 1:
        crop, size = (1, size, (args.crop, args.crop), (1, 1), "bicubic"), None
    data = load(args.data, split, size, args.root, args.skip_broken)
    for x, _, _ in batches(data, batch, args.seed, first, pieces, bool(crop), crop, args.device, rank, world):
        yield x[:, 0].contiguous(memory_format=torch.channels_last) if crop else x


def scores(T, places, conv, Y):
    """s [N, N, L] of all pairs in a batch, by term."""
    maps = {"global": conv.flatten(1)[..., None, None], "local": places}
    return {term: critic(maps[term], Y) for term, critic in T.items() if term in maps}


def train(args):
    share = args.batch // (args.world * args.accumulate)  # images a piece; its negatives are its own
    if args.batch == args.world * args.accumulate:
        raise UserError(f"--batch {args.batch} leaves every piece one image, and none to tell it from: raise --batch")
    E, T, D = build(args)
    opt = torch.optim.Adam([*E.parameters(), *T.parameters()], args.lr, args.betas, fused=True)
    opt_D = torch.optim.Adam(D.parameters(), args.lr, args.betas, fused=True)
    run = Run(args, E=E, T=T, D=D, opt=opt, opt_D=opt_D)
    for network in (E, *T.values(), D) if args.compile else ():
        network.compile()
    autocast = torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.precision == "bf16")
    stream = images(args, "train", args.batch, run.step, args.accumulate, args.rank, args.world)

    while run.step < args.steps:
        for network in (E, T, D):
            network.train()
        with autocast:  # all pieces before D's step, which needs their Y: it is the critics that take the memory
            pieces = [E(next(stream)) for _ in range(args.accumulate)]
        if args.gamma:  # D learns to tell sigmoid(Y) from the prior
            noise = generator(args.seed, PRIOR, run.step, args.device)
            prior = torch.rand(args.batch, args.y_dim, generator=noise, device=args.device).split(share)
            D.requires_grad_(True)
            opt_D.zero_grad()
            for v, (*_, Y) in zip(prior[args.rank :: args.world], pieces, strict=True):
                v, z = v.requires_grad_(), Y.detach().sigmoid().requires_grad_()
                real, fake = D(v), D(z)
                penalty = gradient_penalty(real, v) + gradient_penalty(fake, z)
                loss_d = discriminator_loss(real, fake) + args.penalty * penalty
                (loss_d / args.accumulate).backward()
            average_gradients(args, D)
            opt_D.step()
            D.requires_grad_(False)

        opt.zero_grad()
        for places, conv, _, Y in pieces:  # E and the critics learn
            with autocast:
                s = scores(T, places, conv, Y)
            losses = {term: information_loss(value, args.measure) for term, value in s.items()}
            if args.gamma:
                losses["prior"] = prior_loss(D(Y.sigmoid()))
            loss = sum(args.weights[term] * value for term, value in losses.items())  # equation 8
            (loss / args.accumulate).backward()
        average_gradients(args, E, T)
        opt.step()
        run.step += 1

        if run.every(args.log_every):
            watch = {f"loss_{term}": value for term, value in losses.items()}
            for term, value in s.items():
                watch |= dict(zip((f"joint_{term}", f"marginal_{term}"), pairs(value), strict=True))
            if args.gamma:
                watch |= {"loss_d": loss_d, "z_std": Y.sigmoid().std(0)}  # of the prior: 0.289
            run.log(loss=loss, **watch, lr=args.lr)
        if run.every(args.save_every):
            run.save()
            picture(args, "samples.png", neighbours(args, E.eval()), columns=10)
        if run.every(args.eval_every):
            run.save()
            run.log(loss_test=(value := held_out(args, E.eval(), T.eval())))
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
    """E and its critics in eval mode, and the checkpoint that they come from."""
    name = "best.pt" if args.best else "checkpoint.pt"
    if (state := read_checkpoint(args, name)) is None:
        raise UserError(f"there is no {name} in {args.out}: train first, or give the run's --out")
    E, T, _ = build(args)
    E.load_state_dict(state["E"])
    T.load_state_dict(state["T"])
    return E.eval().requires_grad_(False), T.eval().requires_grad_(False), state


def pixels(args, data, rows):
    """Images [n, 3, size, size] in [-1, 1] of those rows of a data set."""
    return data.images[rows.cpu()].to(args.device).movedim(-1, 1).float() / 127.5 - 1


@torch.no_grad()
def neighbours(args, E):
    """Eight test images, each before nine of 5,000 training images whose Y is nearest by L1, the paper's distance."""
    data = load(args.data, "train", args.size, args.root, args.skip_broken, slice(5000))
    x, (Y, _) = next(images(args, "test", 8)), linear_probe.extract(E.features()["Y"], data, args.device)
    nearest = torch.cdist(E(x)[3], Y, p=1).topk(min(9, len(Y)), largest=False).indices
    return torch.cat([x[:, None], pixels(args, data, nearest.flatten()).unflatten(0, nearest.shape)], 1).flatten(0, 1)


@torch.no_grad()
def sample(args):
    """samples.png: neighbours. maps.png: what the local critic is trained on, the scores of Y_i with every place of
    image j; a row has one i, a column one j, the lightest places score highest in their row."""
    E, T, _ = restore(args)
    picture(args, "samples.png", neighbours(args, E), columns=10)
    if "local" in T:
        x = next(images(args, "test", 8))
        places, _, _, Y = E(x)
        s = T["local"](places, Y)
        low, high = s.amin((1, 2), keepdim=True), s.amax((1, 2), keepdim=True)
        maps = (2 * (s - low) / (high - low) - 1).unflatten(2, places.shape[2:])
        maps = F.interpolate(maps, args.size)[:, :, None].expand(-1, -1, 3, -1, -1)
        rows = torch.cat([x[:, None], maps], 1).flatten(0, 1)
        picture(args, "maps.png", torch.cat([torch.ones_like(x[:1]), x, rows]), columns=9)


@torch.no_grad()
def held_out(args, E, T):
    """The weighted information losses, of 16 batches of test images: lower is better."""
    total = torch.zeros((), device=args.device)
    for x in islice(images(args, "test", args.batch), 16):
        places, conv, _, Y = E(x)
        for term, s in scores(T, places, conv, Y).items():
            total += args.weights[term] * information_loss(s, args.measure)
    if args.world > 1:  # the norms' statistics differ, but all ranks must agree which is the best
        dist.all_reduce(total)
    return float(total) / (16 * args.world)


def fit(args, name, network, loss, count, cuts=()):
    """Adam on loss(rows), rows being minibatches of `count`; its rate falls tenfold at those shares of the epochs. What
    is random here comes from torch's own generator, which build() has seeded."""
    batch, epochs = args.fits[name]
    network.to(args.device).train()
    opt = torch.optim.Adam(network.parameters(), args.fit_lr, args.betas, fused=True)
    schedule = torch.optim.lr_scheduler.MultiStepLR(opt, [round(cut * epochs) for cut in cuts])
    for _ in range(epochs):
        for rows in torch.randperm(count).split(batch)[: max(1, count // batch)]:
            opt.zero_grad()
            loss(rows).backward()
            opt.step()
        schedule.step()
    network.eval().requires_grad_(False)


def mlp_probe(args, train, test, classes):
    """Test accuracy of the paper's classifier; train, test = (features [N, D], labels [N])."""
    (x, y), network = train, classifier(train[0].shape[1], classes)
    fit(args, "mlp", network, lambda rows: F.cross_entropy(network(x[rows]), y[rows]), len(x), (1 / 3, 2 / 3))
    return float((network(test[0]).argmax(1) == test[1]).double().mean())


def ndm(args, Y, test_Y):
    """Neural dependency measure, in nats: how far Y's distribution is from the product of its columns'. Y [N, y_dim] is
    fitted, test_Y measured."""
    T = discriminator(Y.shape[1])
    shuffled = lambda y: y.gather(0, torch.rand_like(y).argsort(0))  # every column by itself
    estimate = lambda y, measure: divergence_loss(T(y), T(shuffled(y)), measure)
    fit(args, "ndm", T, lambda rows: estimate(Y[rows], "kl"), len(Y), (1 / 2, 3 / 4))
    return -float(estimate(test_Y, "dv"))


def mine(args, train, test, Y, test_Y):
    """I(X; Y) in nats: MINE's DV bound on 500 test images. Its critic was not published: the global one, of pixels."""
    T = ConcatAndConvolve(3 * args.size**2, args.y_dim, args.hidden)
    score = lambda data, Y, rows: T(pixels(args, data, rows).flatten(1)[..., None, None], Y[rows])
    fit(args, "mine", T, lambda rows: information_loss(score(train, Y, rows), "dv"), len(Y))
    return -float(information_loss(score(test, test_Y, torch.arange(min(500, len(test)))), "dv"))


def ms_ssim(x, y):
    """Multi-scale structural similarity (Wang et al. 2003) of images [B, C, S, S] in [-1, 1], over as many of the five
    scales as its window fits into. The authors' has a single scale, and constants for images in [0, 1]."""
    weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)[: int(math.log2(x.shape[-1] / 11)) + 1]
    c1, c2, result = (0.01 * 2) ** 2, (0.03 * 2) ** 2, 1
    bell = torch.exp(-((torch.arange(11, device=x.device) - 5) ** 2) / (2 * 1.5**2))
    window = (bell[:, None] * bell / bell.sum() ** 2).expand(x.shape[1], 1, 11, 11)
    blur = lambda images: F.conv2d(images, window, groups=x.shape[1])
    for i, weight in enumerate(weights, start=1):
        mx, my = blur(x), blur(y)
        similarity = (2 * (blur(x * y) - mx * my) + c2) / (blur(x * x) - mx**2 + blur(y * y) - my**2 + c2)
        if i == len(weights):
            similarity = similarity * (2 * mx * my + c1) / (mx**2 + my**2 + c1)
        result = result * similarity.mean((1, 2, 3)).clamp(min=0) ** (weight / sum(weights))
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return result.mean()


def probes(args, E, untrained, train, test):
    """The linear probe, which is logistic regression where the paper has an SVM, and the paper's classifier, of fc,
    conv and Y; fc's linear probe has no name of its own, but k-NN and yardsticks beside it. Needs labels."""
    found = linear_probe.evaluate(E.features()["fc"], train, test, untrained.features()["fc"], args.device)
    for prefix, network in (("", E), ("untrained_", untrained)):
        for name, layers in network.features().items():
            parts = [linear_probe.extract(layers, data, args.device) for data in (train, test)]
            if name != "fc":
                found[f"{prefix}{name}_probe_top1"] = linear_probe.probe(*parts)["top1"]
            if network is E:
                found[f"{name}_mlp_top1"] = mlp_probe(args, *parts, len(train.classes))
    if args.finetune:  # Table 2's semi-supervised column: E learns on, from labels
        layers = copy.deepcopy(E.features()["conv"]), classifier(E.conv_dim, len(train.classes))
        tuned, labels = nn.Sequential(*layers).requires_grad_(True), train.labels.to(args.device)
        loss = lambda rows: F.cross_entropy(tuned(pixels(args, train, rows)), labels[rows])
        fit(args, "finetune", tuned, loss, len(train))
        logits, labels = linear_probe.extract(tuned, test, args.device)
        found["finetuned_top1"] = float((logits.argmax(1) == labels).double().mean())
    return found


def evaluate(args):
    """metrics.json: probes; how much Y tells of its image, by MINE and by MS-SSIM of a decoder's answers to it
    (reconstructions.png); NDM."""
    E, T, state = restore(args)
    (untrained, _, D), n = build(args), args.probe_samples or None
    read = lambda split, n: load(args.data, split, args.size, args.root, args.skip_broken, slice(n))
    train, test = read("train", n), read("test", n and n // 2)
    device = torch.cuda.get_device_name() if "cuda" in args.device else f"cpu, {torch.get_num_threads()} threads"
    metrics = {"command": " ".join(sys.argv), "device": device, "torch": torch.__version__, "steps": state["step"]}
    metrics |= {"images": state["step"] * args.batch, "seconds": round(state["seconds"], 1)}
    metrics["parameters"] = {k: sum(p.numel() for p in n.parameters()) for k, n in (("E", E), ("T", T), ("D", D))}
    Y, test_Y = (linear_probe.extract(E.features()["Y"], data, args.device)[0] for data in (train, test))
    G, rows = decoder(args.y_dim, args.decoder_width, args.size), torch.arange(min(500, len(test)))
    fit(args, "decoder", G, lambda rows: F.mse_loss(G(Y[rows]), pixels(args, train, rows)), len(Y))
    x, answer = pixels(args, test, rows), G(test_Y[rows])
    picture(args, "reconstructions.png", torch.stack([x, answer], 1)[:40].flatten(0, 1), columns=10)
    metrics |= {"loss_test": held_out(args, E, T), "ms_ssim": float(ms_ssim(x, answer))}
    metrics |= {"mine": mine(args, train, test, Y, test_Y), "ndm": ndm(args, Y, test_Y)}
    try:
        metrics |= probes(args, E, untrained, train, test)
    except UserError as error:  # no labels: the run keeps the rest
        print(f"{SCRIPT}.py: not probed: {error}", file=sys.stderr)
    if args.rank == 0:
        (args.out / "metrics.json.tmp").write_text(json.dumps(metrics, indent=1) + "\n")
        os.replace(args.out / "metrics.json.tmp", args.out / "metrics.json")
        print(f"{args.out} has the pictures, and metrics.json, where among others:")
        for k in (k for k in metrics if k.endswith("top1") or k in ("ndm", "mine", "ms_ssim")):
            print(f"  {k} {metrics[k]:.4g}")
        print(
            "top1: accuracy with fc's features, or those named, beside untrained_, raw_pixels_, random_features_; mine:"
        )
        print("nats that Y tells of its image; ndm: nats that Y's numbers tell of each other; ms_ssim: 1 is exact.")


# ------------------------------------------------------------ the command line
# fmt: off
FLAGS = {  # those whose defaults are in PRESETS
    "size": "side of the images, pixels", "alpha": "weight of the global term", "beta": "weight of the local term",
    "gamma": "weight of the prior",
    "measure": "estimator of mutual information", "critic": "encode-and-dot, or concat-and-convolve: the local critic",
    "units": "width of encode-and-dot", "hidden": "width of concat-and-convolve, and of the global critic",
    "steps": "training steps; more of them extend a finished run",
    "batch": "images a step, over all ranks and pieces", "lr": "learning rate",
    "crop": "share of an image in a crop, mirrored at random; 1: no crops",
    "log_every": "steps between two lines of log.jsonl",
    "save_every": "steps between checkpoints, each with a samples.png",
    "probe_samples": "training images of the evaluation, with half as many test images; 0: all",
}
CHOICES = {"measure": ("jsd", "infonce", "dv"), "critic": ("dot", "concat")}
FREE = (  # what may differ between two runs of one checkpoint: beginnings of names
    "command", "root", "out", "steps", "accumulate", "device", "precision", "compile", "skip_broken", "best", "log_",
    "save_", "eval_", "probe_", "fit", "decoder_", "finetune")
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
    add("--eval-every", type=int, default=0, help="steps between losses of test images; the best keeps best.pt")
    add("--best", action="store_true", help="sample and evaluate best.pt, not checkpoint.pt")
    add("--skip-broken", action="store_true", help="do without images that cannot be read")
    add("--finetune", action="store_true", help="evaluate a copy of E that goes on learning from labels, too")
    for name, text in FLAGS.items():
        add(f"--{name.replace('_', '-')}", type=type(PAPER[name]), choices=CHOICES.get(name), help=text)
    asked, _ = parser.parse_known_args([word for word in sys.argv[1:] if word not in ("-h", "--help")])
    usual = {"imagenet": "paper", "stl10": "paper"}
    usual |= dict.fromkeys(("shapes", "dsprites", "mnist", "fashion_mnist"), "demo")
    preset = asked.preset or usual.get(asked.data, "small")
    parser.set_defaults(preset=preset, out=Path("runs", f"{SCRIPT}-{Path(asked.data).name}"), **PRESETS[preset])
    if asked.data == "stl10":  # common.data has its labelled training images only, not the paper's 100,000 others
        parser.set_defaults(crop=4 / 9)  # 64x64 of 96x96 pixels
    args = parser.parse_args()
    least = dict.fromkeys(("steps", "batch", "accumulate", "units", "hidden", "log_every", "save_every"), 1)
    most = {"seed": 2**63 - 1}
    for name, value in vars(args).items():
        low, high = least.get(name, 0), most.get(name, math.inf)
        if isinstance(value, int | float) and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be from {low} to {high}")
    if args.size not in args.encoders:
        raise UserError(f"--size is one of {[*args.encoders]} with --preset {preset}")
    if not (args.alpha or args.beta):
        raise UserError("--alpha 0 --beta 0 leaves nothing to learn: one of them must be larger")
    args.weights = {"global": args.alpha, "local": args.beta, "prior": args.gamma}
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
