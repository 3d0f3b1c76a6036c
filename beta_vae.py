"""beta-VAE: "Learning Basic Visual Concepts with a Constrained Variational Framework", Higgins et al., ICLR 2017.

A VAE whose KL term weighs beta > 1: latents under pressure are cheapest where each stands for one independent factor
of the images. Burgess et al. ("Understanding disentangling in beta-VAE", 2018, 1804.03599) hold the KL near a capacity
that grows instead, so that factors enter one by one. Fil et al. ("Beta-VAE Reproducibility: Challenges and Extensions",
2021, 2112.14278) asked how well the scores hold, over seeds and on harder images: --seeds and --betas ask it again.

    python beta_vae.py                                      # rendered shapes, five CPU minutes: pictures and numbers
    python beta_vae.py --seeds 5 --betas 1 4 16             # the spread of the metrics over seeds, a table
    python beta_vae.py --data dsprites                      # the paper's first experiment
    python beta_vae.py --data dsprites --objective capacity --net burgess --optimiser adam --lr 5e-4  # Burgess et al.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from functools import partial
from itertools import islice, pairwise, product
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.utils import save_image

from common import fid, linear_probe
from common.data import DSPRITES, NAMES, UserError, batches, generator, load, render_shapes

SCRIPT = Path(__file__).stem
POSTERIOR, PICTURES, FAKES, METRICS = range(4)  # streams of random numbers
GREY = ("dsprites", "mnist", "fashion_mnist")  # three equal channels would divide beta by three
SIZES = (16, 32, 64, 128, 256)

# fmt: off
PAPER = dict(  # CelebA in Higgins et al. Their beta of 250 goes with a scale of the Gaussian that they do not tell: 10,
    # the learning rate and the length are those of 1Konny/Beta-VAE, whose scale is ours. gamma and C: Burgess et al.
    size=64, net="higgins", z_dim=32, recon="gaussian", objective="beta", beta=10.0, gamma=10_000.0, capacity=50.0,
    anneal=100_000, optimiser="adam", lr=1e-4, steps=1_500_000, batch=64, log_every=100, save_every=5000,
    fid_features="inception", fid_samples=50_000, fid_split="train", probe_samples=50_000,
    metric_pairs=200, metric_points=10_000)
PAPER_DSPRITES = PAPER | dict(  # beta: figure 6; Adagrad: Higgins et al.; 30 epochs: Fil et al.
    net="mlp", z_dim=10, recon="bernoulli", beta=4.0, gamma=1000.0, capacity=25.0, optimiser="adagrad", lr=1e-2,
    steps=345_600)
SMALL = PAPER | dict(  # Fil et al.'s CIFAR-10: 100 epochs; z_dim 128 draws more
    size=32, net="burgess", recon="bernoulli", beta=4.0, gamma=100.0, anneal=19_500, lr=5e-4, steps=39_000, batch=128,
    save_every=2000, probe_samples=0)
DEMO = SMALL | dict(  # five minutes on two CPU cores
    z_dim=10, capacity=25.0, anneal=1600, lr=1e-3, steps=2400, batch=64, log_every=50, save_every=800,
    fid_features="random", fid_samples=5000, fid_split="test", probe_samples=10_000, metric_pairs=32, metric_points=500)
PRESETS = {"demo": DEMO, "small": SMALL, "paper": PAPER}
FACTORS = {  # of the data whose making is known, columns of its factors. Left out, since pictures do not tell them:
    # rotations of shapes, its gradient, which is faint and cyclic, and colours of its figures, which follow the ground
    "dsprites": {"shape": 1, "scale": 2, "orientation": 3, "x": 4, "y": 5},
    "shapes": {"ground": 1, "scale": 3, "x": 5, "y": 6},
}
# fmt: on


# ------------------------------------------------------------ the networks
def layout(net, size):
    """Channels of the convolutions, which halve the map until it is 4 x 4, and the widths of the linear layers behind
    them, and before the decoder's. higgins: Table 1 of Higgins et al., burgess: the appendix of Burgess et al., both at
    64 pixels; at 32 one layer less on either side (Fil et al.). mlp: Higgins et al.'s for dSprites."""
    n = int(math.log2(size // 4))
    return {
        "mlp": ((), (1200, 1200), (1200, 1200, 1200)),
        "higgins": ((32, 32, *[64] * (n - 2)), (256,), (256,)),
        "burgess": ((32,) * n, (256, 256), (256, 256)),
    }[net]


def chain(layer, act, channels):
    return [module for shape in pairwise(channels) for module in (layer(*shape), act())]


class Encoder(nn.Module):
    """q(z|x) = N(mu, exp(logvar)): x [B, channels, size, size] in [0, 1] -> mu, logvar [B, z_dim]."""

    def __init__(self, net, channels, size, z_dim):
        super().__init__()
        convs, widths, _ = layout(net, size)
        flat = 16 * convs[-1] if convs else channels * size**2
        layers = chain(partial(nn.Conv2d, kernel_size=4, stride=2, padding=1), nn.ReLU, (channels, *convs))
        layers += [nn.Flatten(), *chain(nn.Linear, nn.ReLU, (flat, *widths))]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], 2 * z_dim))

    def forward(self, x):
        return self.layers(x).float().chunk(2, dim=1)  # in halves; YannDubs/disentangling-vae takes them by turns


class Decoder(nn.Module):
    """z [B, z_dim] -> logits [B, channels, size, size] of Bernoulli's, or of the Gaussians' means."""

    def __init__(self, net, channels, size, z_dim):
        super().__init__()
        convs, _, widths = layout(net, size)
        if convs:
            layers = chain(nn.Linear, nn.ReLU, (z_dim, *widths, 16 * convs[-1]))
            layers += [nn.Unflatten(1, (convs[-1], 4, 4))]
            grow = partial(nn.ConvTranspose2d, kernel_size=4, stride=2, padding=1)
            layers += chain(grow, nn.ReLU, (*convs[::-1], channels))[:-1]
        else:
            layers = chain(nn.Linear, nn.Tanh, (z_dim, *widths))
            layers += [nn.Linear(widths[-1], channels * size**2), nn.Unflatten(1, (channels, size, size))]
        self.layers = nn.Sequential(*layers)

    def forward(self, z):
        return self.layers(z).float()


class Mean(nn.Module):
    """What probe and metrics read: an encoder's mu [B, z_dim] of pictures [B, 3, size, size] in [-1, 1]."""

    def __init__(self, E, channels):
        super().__init__()
        self.E, self.channels = E, channels

    def forward(self, x):
        return self.E((x[:, : self.channels] + 1) / 2)[0]


# ------------------------------------------------------------ the objective, in nats an image
def reconstruction_loss(logits, x, recon):
    """-log p(x|z), x in [0, 1]: a SUM over pixels, as the KL is one over latents; by means beta were thousands of times
    larger. The Gaussians' is the squared error: 1/2 and a variance would only change beta's scale."""
    if recon == "bernoulli":
        return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)
    return (logits.sigmoid() - x).square().sum() / len(x)


def reconstruction_floor(x, recon):
    """The least possible reconstruction loss: the pixels' entropy, 0 only if all are black or white; of Gaussians 0."""
    entropy = (torch.special.entr(x) + torch.special.entr(1 - x)).sum() / len(x)
    return entropy if recon == "bernoulli" else 0 * entropy


def kl_divergence(mu, logvar):
    """KL(q(z|x) || N(0, I)) of each latent by itself, means over images: [z_dim]."""
    return 0.5 * (mu.square() + logvar.exp() - logvar - 1).mean(0)


def capacity(t, C_max, T):
    """C(t), nats: grows linearly from 0 to C_max at step T."""
    return C_max * min(1.0, t / max(T, 1))


def objective(args, rec, KL, t):
    """Equation 4 of Higgins et al., rec + beta KL; or equation 8 of Burgess et al., rec + gamma |KL - C|, where KL is
    the mean over the batch: single images may differ from C."""
    if args.objective == "beta":
        return rec + args.beta * KL
    return rec + args.gamma * (KL - capacity(t, args.capacity, args.anneal)).abs()


# ------------------------------------------------------------ the metrics of disentanglement, which need known factors
def higgins_feature(z1, z2):
    """The mean distance in each latent over L pairs, [..., L, z_dim] -> [..., z_dim], which tells the shared factor."""
    return (z1 - z2).abs().mean(-2)


def mutual_information_gaps(codes, factors, bins=20):
    """MIG (Chen et al. 2018, 1802.04942) of each factor: how far the latent that knows most of it is ahead of the next,
    as a share of the factor's entropy. codes [N, z_dim] are cut into equally wide bins, factors [N, K] are integers."""
    low, high = codes.amin(0), codes.amax(0)
    cells = ((codes - low) / (high - low).clamp(min=1e-12) * bins).long().clamp(max=bins - 1)
    H = lambda numbers: float(torch.special.entr(numbers.bincount() / len(codes)).sum())
    gaps = []
    for v in factors.T:
        first, second, *_ = sorted([0.0, *(H(cell) + H(v) - H(cell + bins * v) for cell in cells.T)], reverse=True)
        gaps.append((first - second) / H(v))
    return gaps


def factor_vae_score(codes, factors, points, random, batch=64):
    """Kim and Mnih 2018 (1802.05983): among images that share one factor, which latent varies least? The share of the
    last third of the votes that name the factor as most of `points` votes before with the same answer did."""
    scale = codes.std(0)
    alive = scale >= 0.05  # a latent that says nothing would win every vote
    if not alive.any():
        return 0.0
    z, (n, K), votes = (codes / scale)[:, alive], factors.shape, []
    groups = [[(v == value).nonzero()[:, 0] for value in range(int(v.max()) + 1)] for v in factors.T]
    for k, row in random.integers((K, n), size=(points * 3 // 2, 2)):
        rows = groups[k][factors[row, k]]
        votes.append((int(z[rows[random.integers(len(rows), size=batch)]].var(0).argmin()), k))
    counts = np.zeros((z.shape[1], K))
    np.add.at(counts, tuple(np.array(votes[:points]).T), 1)
    return float(np.mean([counts[d].argmax() == k for d, k in votes[points:]]))


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
    """E and D with their first weights, a function of the seed: every rank starts from the same."""
    torch.manual_seed(args.seed)
    networks = [network(args.net, args.channels, args.size, args.z_dim) for network in (Encoder, Decoder)]
    for layer in (m for network in networks for m in network.modules()):
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):  # not stated; as in YannDubs' code
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
    return [network.to(args.device, memory_format=torch.channels_last) for network in networks]


def images(args, split, batch, first=0, pieces=1, rank=0, world=1):
    """Endless batches x [m, channels, size, size] in [0, 1], never mirrored: where things are is to be learnt."""
    data = load(args.data, split, args.size, args.root, args.skip_broken)
    for x, *_ in batches(data, batch, args.seed, first, pieces, False, None, args.device, rank, world):
        yield (x[:, : args.channels] + 1) / 2


def normal(args, n, *key):
    """N(0, I), [n, z_dim], a function of the seed and the key."""
    return torch.randn(n, args.z_dim, generator=generator(args.seed, *key, args.device), device=args.device)


def train(args):
    if args.seeds > 1 or args.betas:
        return study(args)
    E, D = build(args)
    # TensorFlow's first accumulator: from torch's, 0, Adagrad's first step is so long that exp(logvar) may overflow
    adagrad = partial(torch.optim.Adagrad, initial_accumulator_value=0.1)
    make = {"adam": partial(torch.optim.Adam, fused=True), "adagrad": adagrad}[args.optimiser]
    opt = make([*E.parameters(), *D.parameters()], args.lr)
    run = Run(args, E=E, D=D, opt=opt)
    for network in (E, D) if args.compile else ():
        network.compile()
    autocast = torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.precision == "bf16")
    share = args.batch // (args.world * args.accumulate)  # images a piece
    stream = images(args, "train", args.batch, run.step, args.accumulate, args.rank, args.world)

    while run.step < args.steps:
        opt.zero_grad()
        with autocast:
            pieces = [(x, *E(x)) for x in islice(stream, args.accumulate)]
        kls = [kl_divergence(mu, logvar) for _, mu, logvar in pieces]
        kl = torch.stack(kls).mean(0).detach()  # of the whole batch, which |KL - C| is about
        if args.world > 1:
            dist.all_reduce(kl)
            kl /= args.world
        noise = normal(args, args.batch, POSTERIOR, run.step).split(share)[args.rank :: args.world]
        for (x, mu, logvar), own, eps in zip(pieces, kls, noise, strict=True):
            with autocast:
                logits = D(mu + (logvar / 2).exp() * eps)
            rec = reconstruction_loss(logits, x, args.recon)
            KL = kl.sum() + (own - own.detach()).sum()  # the value of the whole batch, the gradient of this piece
            loss = objective(args, rec, KL, run.step + 1)
            (loss / args.accumulate).backward()
        average_gradients(args, E, D)
        opt.step()
        run.step += 1

        if run.every(args.log_every):
            watch = {"above_floor": rec - reconstruction_floor(x, args.recon), "kl": KL}
            if args.objective == "capacity":
                watch["C"] = capacity(run.step, args.capacity, args.anneal)
            watch["active"] = (kl > 0.01).float().sum()  # latents that tell more than a hundredth of a nat
            watch |= {f"kl_{j}": value for j, value in enumerate(kl.sort(descending=True).values[:10], start=1)}
            run.log(loss=loss, rec=rec, **watch, lr=args.lr)
        if run.every(args.save_every) or run.every(args.eval_every):
            run.save()
            picture(args, "samples.png", drawn(D, normal(args, 64, PICTURES, 0)))
        if run.every(args.eval_every):
            name, value = next(iter(judge(args, D, full=False).items()))
            run.log(**{name: value})
            if value < run.best:
                run.best = value
                run.save("best.pt")
        run.leave_if_told()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    sample(args)
    return evaluate(args)


def study(args):
    """Fil et al.'s question: --seeds runs with each of --betas, in folders of their own. study.json and a table: means
    and standard deviations over the seeds, above Higgins et al.'s yardsticks, of all runs."""
    found, table = {}, {}  # metrics of each run, by beta; values by metric and beta or yardstick
    for beta, seed in product(args.betas or [args.beta], range(args.seed, args.seed + args.seeds)):
        own, out = {"beta": beta, "seed": seed}, args.out / f"beta-{beta:g}-seed-{seed}"
        own |= {"out": out, "seeds": 1, "betas": None, "config": args.config | own}
        found.setdefault(f"beta {beta:g}", []).append(train(argparse.Namespace(**vars(args) | own)))
    shown = ("higgins", "mig", "factor_vae", "probe_top1", "rec", "kl", "fid", "fd_random")
    for prefix in ("", "raw_pixels_", "pca_", "untrained_"):
        for name, runs in found.items():
            for k, v in (item for metrics in runs for item in metrics.items()):
                if k.startswith(tuple(prefix + word for word in shown)) and isinstance(v, float):
                    row = table.setdefault(k.removeprefix(prefix), {})
                    row.setdefault(prefix.strip("_") or name, []).append(v)
    if args.rank == 0:
        (args.out / "study.json").write_text(json.dumps(table, indent=1) + "\n")
        for k, rows in table.items():
            print(f"{k}, mean +- standard deviation over the runs")
            for name, v in rows.items():
                print(f"  {name:12} {np.mean(v):.4g} +- {np.std(v, ddof=len(v) > 1):.2g}  ({len(v)})")


# ------------------------------------------------------------ pictures and numbers
# same as in bigbigan.py
def picture(args, name, x, columns=8):
    if args.rank == 0:
        save_image(x, args.out / name, nrow=columns, normalize=True, value_range=(-1, 1))


@torch.no_grad()
def drawn(D, z):
    """Pictures [n, 3, S, S] in [-1, 1]: the means of p(x|z), as the papers show; 2 sigmoid(x) - 1 = tanh(x / 2)."""
    return torch.tanh(D(z) / 2).expand(-1, 3, -1, -1)


def restore(args):
    """E, D, and the checkpoint that they come from."""
    name = "best.pt" if args.best else "checkpoint.pt"
    if (state := read_checkpoint(args, name)) is None:
        raise UserError(f"there is no {name} in {args.out}: train first, or give the run's --out")
    E, D = build(args)
    E.load_state_dict(state["E"])
    D.load_state_dict(state["D"])
    return E.requires_grad_(False), D.requires_grad_(False), state


def sample(args):
    """samples.png; reconstructions.png: pairs x, D(mu); interpolations.png: between the mu of test images;
    traversals.png: a row a latent, that of the largest KL first, from -3 to 3, the others staying as two test images
    have them; of dSprites a square, an ellipse and a heart. responses.png, where x and y are known: a row a latent, its
    mean over images at each place; of dSprites also at each scale (down) and orientation (across) of each shape."""
    E, D, _ = restore(args)
    x = next(images(args, "test", 40))
    mu, logvar = E(x)
    picture(args, "samples.png", drawn(D, normal(args, 64, PICTURES, 0)))
    pairs = torch.stack([2 * x.expand(-1, 3, -1, -1) - 1, drawn(D, mu)], 1)
    picture(args, "reconstructions.png", pairs.flatten(0, 1), columns=10)
    t = torch.linspace(0, 1, 10, device=args.device)[:, None]
    rows = torch.lerp(mu[:8, None], mu[8:16, None], t).flatten(0, 1)
    picture(args, "interpolations.png", drawn(D, rows), columns=10)

    seeds, order = mu[:2], kl_divergence(mu, logvar).argsort(descending=True)
    if args.data == "dsprites":
        data = load(args.data, "test", args.size, args.root)
        rows = [np.ravel_multi_index((0, shape, 5, 0, 16, 16), DSPRITES) for shape in range(3)]
        seeds = Mean(E, args.channels)(floats(args, data.images[rows]))
    rows = seeds[:, None].repeat(len(order), 1, 10, 1)  # [latent, seed, value, z_dim]
    rows[range(len(order)), :, :, order] = torch.linspace(-3, 3, 10, device=args.device)
    picture(args, "traversals.png", drawn(D, rows.flatten(0, 2)), columns=10 * len(seeds))

    if args.data in FACTORS:
        data, v = known(args)
        codes, panels = linear_probe.extract(Mean(E, args.channels), data, args.device)[0].cpu()[:, order.cpu()], []
        for down, across, shape in (("y", "x", None), *[("scale", "orientation", k) for k in range(3) if "shape" in v]):
            rows = slice(None) if shape is None else v["shape"] == shape
            height, width = (int(v[k].max()) + 1 for k in (down, across))
            cells = v[down][rows] * width + v[across][rows]
            sums = torch.zeros(args.z_dim, height * width).index_add_(1, cells, codes[rows].T)
            maps = sums / cells.bincount(minlength=height * width).clamp(min=1)
            panels.append(F.interpolate(maps.view(-1, 1, height, width) / 2, args.size))
        picture(args, "responses.png", torch.stack(panels, 1).flatten(0, 1), columns=len(panels))


def floats(args, pictures):  # uint8 [n, S, S, 3] -> [n, 3, S, S] in [-1, 1]
    return pictures.to(args.device).permute(0, 3, 1, 2).float() / 127.5 - 1


def judge(args, D, E=None, full=True):
    """FID and its sisters of samples; or given E Fil et al.'s, of pictures against what D makes of their mu."""
    data, n = load(args.data, args.fid_split, args.size, args.root, args.skip_broken), args.fid_samples
    if E is None:
        draw = lambda chunk, n: drawn(D, normal(args, n, FAKES, chunk))
    else:
        n, mean = min(n, len(data)), Mean(E, args.channels)
        draw = lambda chunk, n: drawn(D, mean(floats(args, data.images[chunk * fid.CHUNK :][:n])))
    found = fid.evaluate(draw, data, n, args.fid_features, args.device, args.fid_weights, full)
    return found if E is None else {f"recon_{k}": v for k, v in found.items()}


def known(args):
    """10,000 test pictures, or as many of all those of dSprites, and their factors by name: integers from 0, [N] each,
    ten equally frequent bins of what is continuous."""
    data = load(args.data, "test", args.size, args.root, args.skip_broken, slice(10_000))
    columns = {name: data.factors[:, column] for name, column in FACTORS[args.data].items()}
    bins = lambda v: v.argsort().argsort() * 10 // len(v)
    return data, {k: v.long() if torch.equal(v, v.round()) else bins(v) for k, v in columns.items()}


def higgins_points(args, encoders, columns, points):
    """Features [points, z_dim] by encoder, and which of the factors, columns of data.factors, the pairs of each share:
    all others are drawn for each picture by itself, and the shared value anew for each pair."""
    data, L = load(args.data, "test", args.size, args.root), args.metric_pairs
    random, found = np.random.default_rng([args.seed, METRICS]), {name: [] for name in encoders}
    y = torch.from_numpy(random.integers(len(columns), size=points))
    for part in y.split(max(1, 4096 // L)):
        rows = torch.from_numpy(random.integers(len(data), size=(2, len(part), L)))
        v, row, column = data.factors[rows], range(len(part)), torch.tensor(columns)[part]  # v [2, m, L, F]
        v[1, row, :, column] = v[0, row, :, column]
        v = v.flatten(0, 2)
        if args.data == "dsprites":
            pictures = data.images[np.ravel_multi_index(v.T.numpy(), DSPRITES)]
        else:
            v[:, 0] = v[:, 0] % 3 + 3 * (v[:, 1] < 3)  # figures are dark on light ground, and light on dark
            pictures = render_shapes(data.labels[rows].flatten(), v, args.size)
        for name, encode in encoders.items():
            z = encode(floats(args, pictures)).unflatten(0, (2, len(part), L))
            found[name].append(higgins_feature(*z))
    return {name: torch.cat(features) for name, features in found.items()}, y.to(args.device)


def disentanglement(args, E, untrained):
    """The three metrics of mu beside yardsticks: an untrained E, pixels (of 16 x 16) and whitened principal components.
    Higgins et al.'s ICA is left out."""
    data, v = known(args)
    flat = lambda x: x[:, : args.channels].flatten(1)
    x, n, k = flat(floats(args, data.images)), args.metric_points, args.z_dim
    torch.manual_seed(args.seed)  # of the decomposition
    mean, (_, S, V) = x.mean(0), torch.svd_lowrank(x - x.mean(0), min(k + 6, *x.shape))
    whiten = V[:, :k] / S[:k] * len(data) ** 0.5
    pca = lambda x: (flat(x) - mean) @ whiten
    encoders = {"": Mean(E, args.channels), "untrained_": Mean(untrained, args.channels)}
    encoders |= {"pca_": pca, "raw_pixels_": lambda x: flat(F.adaptive_avg_pool2d(x, 16))}

    columns = [column for name, column in FACTORS[args.data].items() if name != "shape"]  # not in the paper's either
    features, y = higgins_points(args, encoders, columns, n * 3 // 2)
    found = {"factors": list(v), "metric_pairs": args.metric_pairs, "chance_higgins": 1 / len(columns)}
    for prefix, z in features.items():  # the classifier is linear, and solved where others stop early
        found[f"{prefix}higgins"] = linear_probe.probe((z[:n], y[:n]), (z[n:], y[n:]))["top1"]
    del encoders["raw_pixels_"]
    for prefix, encode in encoders.items():
        codes, factors = linear_probe.extract(encode, data, args.device)[0].cpu(), torch.stack([*v.values()], 1)
        gaps = dict(zip(v, mutual_information_gaps(codes, factors), strict=True))
        found |= {f"{prefix}mig": float(np.mean([*gaps.values()]))} | {f"{prefix}mig_{k}": gaps[k] for k in gaps}
        random = np.random.default_rng([args.seed, METRICS, 1])
        found[f"{prefix}factor_vae"] = factor_vae_score(codes, factors, n, random)
    return found


@torch.no_grad()
def evaluate(args):
    """metrics.json: nats an image of test images, the linear probe of mu, disentanglement where factors are known, FID
    and its sisters of samples and, from recon_ on, of reconstructions."""
    E, D, state = restore(args)
    untrained, n = build(args), args.probe_samples or (500_000 if args.data == "dsprites" else None)
    read = lambda split, rows: load(args.data, split, args.size, args.root, args.skip_broken, rows)
    device = torch.cuda.get_device_name() if "cuda" in args.device else f"cpu, {torch.get_num_threads()} threads"
    metrics = {"command": " ".join(sys.argv), "device": device, "torch": torch.__version__, "steps": state["step"]}
    metrics |= {"images": state["step"] * args.batch, "seconds": round(state["seconds"], 1)}
    metrics["parameters"] = {k: sum(p.numel() for p in m.parameters()) for k, m in (("E", E), ("D", D))}
    # beta a latent and a pixel: what can be compared between networks and sizes of images (Higgins et al.)
    metrics["beta_norm"] = args.beta * args.z_dim / (args.channels * args.size**2)
    x = next(images(args, "test", 2000))
    mu, logvar = E(x)
    logits = D(mu + (logvar / 2).exp() * normal(args, len(x), POSTERIOR, args.steps))
    rec, kl = float(reconstruction_loss(logits, x, args.recon)), kl_divergence(mu, logvar)
    metrics |= {"rec": rec, "rec_floor": float(reconstruction_floor(x, args.recon)), "kl": float(kl.sum())}
    metrics["elbo"] = -rec - metrics["kl"]
    metrics |= {"active": int((kl > 0.01).sum()), "kl_units": kl.sort(descending=True).values.tolist()}

    def probe():  # all of dSprites is one split
        test = slice(n, n + n // 2) if args.data == "dsprites" else slice(n and n // 2)
        networks = [Mean(network, args.channels) for network in (E, untrained[0])]
        return linear_probe.evaluate(networks[0], read("train", slice(n)), read("test", test), networks[1], args.device)

    measures = [probe, lambda: judge(args, D), lambda: judge(args, D, E)]
    measures += [lambda: disentanglement(args, E, untrained[0])] if args.data in FACTORS else []
    for measure in measures:
        try:
            metrics |= measure()
        except UserError as error:  # no labels, no Inception weights, no room for a cache: the run keeps the rest
            flags = " ".join(word for word in sys.argv[1:] if word not in ("train", "eval"))
            print(f"{SCRIPT}.py: not measured: {error}; then: python {sys.argv[0]} eval {flags}", file=sys.stderr)
    if args.rank == 0:
        (args.out / "metrics.json.tmp").write_text(json.dumps(metrics, indent=1) + "\n")
        os.replace(args.out / "metrics.json.tmp", args.out / "metrics.json")
        print(f"{args.out} has the pictures, and metrics.json, with among others:")
        shown = ("top1", "higgins", "mig", "factor_vae", "rec", "kl", "beta_norm")
        for k in (k for k in metrics if k.endswith(shown) or k.removeprefix("recon_").startswith(("fid", "fd_"))):
            print(f"  {k} {metrics[k]:.4g}")
        print("rec, kl: nats an image; higgins, factor_vae: 1 is best, mig too; top1: accuracy with mu, beside")
        print("untrained_, raw_pixels_, random_features_; fid, fd_random (NOT FID): distance from real ones, 0 is best")
    return metrics


# ------------------------------------------------------------ the command line
# fmt: off
FLAGS = {  # those whose defaults are in PRESETS
    "size": f"side of images, pixels: one of {SIZES}", "net": "whose networks; mlp: Higgins et al.'s for dSprites",
    "z_dim": "dimensions of z", "recon": "p(x|z), pixels in [0, 1]",
    "objective": "beta: rec + beta KL; capacity: rec + gamma |KL - C|",
    "beta": "weight of the KL", "gamma": "weight of |KL - C|", "capacity": "C at last, nats",
    "anneal": "step at which C stops growing",
    "optimiser": "the optimiser", "lr": "its learning rate",
    "steps": "training steps; more of them extend a finished run",
    "batch": "images a step, over all ranks and pieces", "log_every": "steps between two lines of log.jsonl",
    "save_every": "steps between checkpoints, each with a samples.png", "fid_samples": "samples that FID is taken of",
    "fid_features": "random needs no weights, gives fd_random", "fid_split": "FID's real images",
    "probe_samples": "training images of the linear probe, with half as many test images; 0: all",
    "metric_pairs": "L, pairs of images a point of the Higgins metric",
    "metric_points": "training points of the Higgins and FactorVAE metrics, with half as many test points",
}
CHOICES = {
    "net": ("mlp", "higgins", "burgess"), "recon": ("bernoulli", "gaussian"), "objective": ("beta", "capacity"),
    "optimiser": ("adam", "adagrad"), "fid_features": ("inception", "random"), "fid_split": ("train", "test")}
FREE = (  # what may differ between two runs of one checkpoint: beginnings of names
    "command", "root", "out", "steps", "accumulate", "device", "precision", "compile", "skip_broken", "best", "log_",
    "save_", "eval_", "fid_", "probe_", "metric_", "seeds", "betas")
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
    add("--grey", action="store_true", help=f"one channel, as always of {', '.join(GREY)}: for 3DChairs")
    add("--seeds", type=int, default=1, help="train as many seeds, from --seed on, and tell the spread of the metrics")
    add("--betas", type=float, nargs="+", help="train all seeds with each of these")
    for name, text in FLAGS.items():
        add(f"--{name.replace('_', '-')}", type=type(PAPER[name]), choices=CHOICES.get(name), help=text)
    asked, _ = parser.parse_known_args([word for word in sys.argv[1:] if word not in ("-h", "--help")])
    usual = {"shapes": "demo", "mnist": "demo", "fashion_mnist": "demo"}
    usual |= dict.fromkeys(("dsprites", "celeba", "imagenet"), "paper")
    preset = asked.preset or usual.get(asked.data, "small")
    defaults = PAPER_DSPRITES if (preset, asked.data) == ("paper", "dsprites") else PRESETS[preset]
    parser.set_defaults(preset=preset, out=Path("runs", f"{SCRIPT}-{Path(asked.data).name}"), **defaults)
    args = parser.parse_args()
    least = dict.fromkeys(("steps", "batch", "accumulate", "z_dim", "log_every", "save_every", "fid_samples"), 1)
    least |= {"seeds": 1, "metric_pairs": 1, "metric_points": 20}
    most = {"seed": 2**63 - 1}
    for name, value in vars(args).items():
        low, high = least.get(name, 0), most.get(name, math.inf)
        if isinstance(value, int | float) and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be from {low} to {high}")
    if args.size not in SIZES or min(args.betas or [0]) < 0:
        raise UserError(f"--size {args.size}, --betas {args.betas}: the size is one of {SIZES}, betas are from 0 on")
    args.channels = 1 if args.grey or args.data in GREY else 3
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
