"""BiGAN: "Adversarial Feature Learning", Jeff Donahue, Philipp Krähenbühl, Trevor Darrell, ICLR 2017, 1605.09782.

A GAN with a way back. Beside the generator G: z -> x an encoder E: x -> z is trained, and the discriminator D judges
pairs: (x, E(x)) of real images against (G(z), z) of drawn ones. At the optimum E inverts G, although no reconstruction
loss is ever written down and E never sees what G draws. What E and G have not learnt to draw is drawn badly: the
anomaly score of Zenati et al. (2018, 1802.06222). The same model was found at the same time as ALI, "Adversarially
Learned Inference" (Dumoulin et al., ICLR 2017, 1606.00704), whose networks are the ones for 32 x 32 pixels here.

    python bigan.py --data mnist                           # the paper's first experiment, five CPU minutes of it
    python bigan.py --anomaly star                         # rendered shapes without stars: are stars found odd?
    torchrun --nproc_per_node 8 bigan.py --data imagenet   # the paper's model
"""

import argparse
import copy
import json
import math
import os
import signal
import sys
import time
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.utils import save_image

from common import fid, linear_probe
from common.data import NAMES, UserError, batches, generator, load

SCRIPT = Path(__file__).stem
LATENTS, POSTERIOR, DROPOUT, STANDING, PICTURES, FAKES = range(6)  # streams of random numbers

PAPER = dict(  # ImageNet: section 4.3 and the appendix; 100 epochs, the second half of them at a falling rate
    size=64, encoder_size=0, crop_from=72, z_dim=200, prior="uniform", networks={64: ("conv", dict(width=64))},
    steps=1_000_912, anneal=500_456, batch=128, lr=2e-4, betas=(0.5, 0.999), decay=2.5e-5, ema=0.0,
    standing=1000, log_every=100, save_every=5000, fid_features="inception", fid_samples=50_000, fid_split="test",
    probe_samples=50_000)  # fmt: skip
PAPER_MNIST = PAPER | dict(  # Table 1: 400 epochs, half of them at a falling rate. No layer knows which pixels are near
    size=32, crop_from=0, z_dim=50, networks={32: ("mlp", dict(width=1024))}, steps=187_500, anneal=93_750,
    probe_samples=10_000)  # fmt: skip
SMALL = PAPER | dict(  # ALI's networks, its 6475 epochs cut to 400, with BiGAN's falling rate and averaged weights
    size=32, crop_from=0, z_dim=64, prior="normal", steps=200_000, anneal=100_000, batch=100, decay=0.0, ema=0.999,
    networks={32: ("ali", dict(width=32)), 64: ("conv", dict(width=64))}, standing=200, fid_split="train",
    probe_samples=0)  # fmt: skip
DEMO = SMALL | dict(  # for two CPU cores. Of ALI's networks D wins, whatever the rate; these stay in balance
    z_dim=32, networks={32: ("conv", dict(width=32)), 64: ("conv", dict(width=16))},
    steps=1200, anneal=0, batch=64, lr=5e-4, ema=0.998, standing=20, log_every=50,
    save_every=500, fid_features="random", fid_samples=5000, fid_split="test", probe_samples=10_000)  # fmt: skip
DEMO_MNIST = PAPER_MNIST | dict(steps=2000, anneal=0, standing=100, log_every=50, save_every=500,
    fid_features="random", fid_samples=5000)  # fmt: skip
PRESETS = {"demo": DEMO, "small": SMALL, "paper": PAPER}
GREY = {name: PRESETS | {"demo": DEMO_MNIST, "paper": PAPER_MNIST} for name in ("mnist", "fashion_mnist")}


# ------------------------------------------------------------ parts of the networks
def drawn(layer, std=0.02):
    """The layer with its first weights, N(0, std^2)."""
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Layer(nn.Module):
    """h -> act(norm(main(h) + W z)); without z_dim h -> act(norm(main(h))). W z is the same all over the map."""

    def __init__(self, main, norm=None, act=None, z_dim=0, z_std=0.02):
        super().__init__()
        self.main, self.norm, self.act = main, norm or nn.Identity(), act or nn.Identity()
        self.W = drawn(nn.Linear(z_dim, norm.num_features, bias=False), z_std) if z_dim else None

    def forward(self, h, z):
        h = self.main(h)
        h = h if self.W is None else h + self.W(z).unflatten(1, (-1, *[1] * (h.ndim - 2)))
        return self.act(self.norm(h))


class Generator(nn.Module):
    """z [B, z_dim] -> images [B, 3, S, S] in [-1, 1]. ALI has a bias for each pixel; MNIST's border is black."""

    def __init__(self, *layers, bias=None, border=0):
        super().__init__()
        self.layers, self.border = nn.ModuleList(layers), nn.ConstantPad2d(border, -1.0)
        self.bias = nn.Parameter(torch.zeros(bias)) if bias else None

    def forward(self, z):
        h = z
        for layer in self.layers:
            h = layer(h, z)
        h = h if self.bias is None else h + self.bias
        return self.border(torch.tanh(h.float() / 2)).expand(-1, 3, -1, -1)  # tanh(h / 2) = 2 sigmoid(h) - 1


class Encoder(nn.Module):
    """x [B, 3, S, S] -> a [B, outputs], see `posterior`. The features are the trunk's: [B, C] or [B, C, h, w]."""

    def __init__(self, *trunk, head):
        super().__init__()
        self.trunk, self.head = nn.Sequential(*trunk), head

    def forward(self, x):
        return self.head(self.trunk(x).flatten(1)).float()


class Discriminator(nn.Module):
    """x [B, 3, S, S], z [B, z_dim] -> the logit of D(x, z), [B]: high if z seems to be E(x), low if x seems G(z)."""

    def __init__(self, *layers, logit):
        super().__init__()
        self.layers, self.logit = nn.ModuleList(layers), logit

    def features(self, x, z):  # f_D, the layer before the logit
        for layer in self.layers:
            x = layer(x, z)
        return x.flatten(1)

    def forward(self, x, z):
        return self.logit(self.features(x, z))[:, 0].float()


# ------------------------------------------------------------ G, E and D of the three experiments
class Unit(nn.Module):  # images in [-1, 1] -> [0, 1]
    def forward(self, x):
        return (x + 1) / 2


def mlp(z_dim, outputs, size=32, encoder_size=32, width=1024):
    """MNIST, permutation-invariant: 28 x 28 grey pixels, the inside of common.data's 32 x 32. No layer has a bias, and
    batch norm neither gain nor bias. The text has none behind G's first layer, the authors' code has."""
    linear = lambda cin, cout: drawn(nn.Linear(cin, cout, bias=False))
    norm = lambda: nn.BatchNorm1d(width, eps=1e-8, affine=False)
    relu, leaky = nn.ReLU(), nn.LeakyReLU(0.2)
    see = [Unit(), nn.ConstantPad3d((-2, -2, -2, -2, 0, -2), 0.0), nn.Flatten()]  # negative padding cuts
    G = [Layer(linear(z_dim, width), norm(), relu), Layer(linear(width, width), norm(), relu, z_dim)]
    G += [Layer(linear(width, 784), act=nn.Unflatten(1, (1, 28, 28)))]
    E = [*see, linear(784, width), leaky, linear(width, width), norm(), leaky]
    D = [Layer(nn.Sequential(*see, linear(784, width)), act=leaky)]
    D += [Layer(linear(width, width), norm(), leaky, z_dim)]
    E, D = Encoder(*E, head=linear(width, outputs)), Discriminator(*D, logit=linear(width, 1))
    return Generator(*G, border=2), E, D


def conv(z_dim, outputs, size=64, encoder_size=64, width=64):
    """ImageNet: DCGAN's G and D, whose 5 x 5 layers hear z, but for the first of D and the last of G; E is AlexNet to
    conv5, at a resolution of its own, with conv1 and the pools padded as in the authors' code."""
    norm, relu, leaky = lambda channels: nn.BatchNorm2d(channels, eps=1e-8), nn.ReLU(), nn.LeakyReLU(0.2)
    linear = lambda cin, cout: drawn(nn.Linear(cin, cout, bias=False))
    grow = lambda *channels: drawn(nn.ConvTranspose2d(*channels, 5, 2, 2, output_padding=1, bias=False))
    halve = lambda *channels: drawn(nn.Conv2d(*channels, 5, 2, 2, bias=False))
    hear = (z_dim, 0.02 * 5**2)  # a kernel sums 25 positions: so that z, which comes once, is as loud
    widths = [width << i for i in range(int(math.log2(size // 4)))]
    top = widths[-1]
    start = nn.BatchNorm1d(16 * top, eps=1e-8), nn.Sequential(relu, nn.Unflatten(1, (top, 4, 4)))
    G = [Layer(linear(z_dim, 16 * top), *start)]
    G += [Layer(grow(a, b), norm(b), relu, *hear) for a, b in pairwise(widths[::-1])]
    G += [Layer(grow(width, 3))]
    D = [Layer(halve(3, width), act=leaky)]
    D += [Layer(halve(a, b), norm(b), leaky, *hear) for a, b in pairwise(widths)]
    c1, c2, c3 = 3 * width // 2, 4 * width, 6 * width  # 96, 256, 384
    shapes = [(3, c1, 11, 4, 5), (c1, c2, 5, 1, 2, 1, 2), (c2, c3, 3, 1, 1), (c3, c3, 3, 1, 1, 1, 2)]
    shapes += [(c3, c2, 3, 1, 1, 1, 2)]  # channels in and out, kernel, stride, padding, dilation, groups
    E = []
    for i, shape in enumerate(shapes):
        E += [drawn(nn.Conv2d(*shape, bias=False)), norm(shape[1]) if i else nn.Identity(), leaky]
        E += [nn.MaxPool2d(3, 2, 1)] if i < 2 else []
    head = linear(c2 * math.ceil(encoder_size / 16) ** 2, outputs)
    return Generator(*G), Encoder(*E, head=head), Discriminator(*D, logit=linear(16 * top, 1))


class Maxout(nn.Module):  # [B, 2 C, ...] -> [B, C, ...]: of two adjacent channels the larger
    def forward(self, x):
        return torch.maximum(x[:, ::2], x[:, 1::2])


class Joint(nn.Module):  # D_xz(D_x(x), D_z(z))
    def __init__(self, x, z, xz):
        super().__init__()
        self.x, self.z, self.xz = nn.Sequential(*x), nn.Sequential(*z), nn.Sequential(*xz)

    def forward(self, x, z):
        return self.xz(torch.cat([self.x(x).flatten(1), self.z(z)], 1))


def ali(z_dim, outputs, size=32, encoder_size=32, width=32, dropout=(0.2, 0.5)):
    """ALI on CIFAR-10. Nothing is padded: E's maps are 28, 13, 10, 4, 1, 1 wide, G's 4, 10, 13, 28, 32, 32. D drops
    inputs of all layers (the paper's table; the code skips some); its widths are those before maxout, as in the code.
    Convolutions of 1 x 1 maps are written as linear layers."""
    kernels = [(5, 1), (4, 2), (4, 1), (4, 2), (4, 1), (1, 1)]  # of E, and strides
    widths, widths_G = ([width * n for n in ns] for ns in ((1, 2, 4, 8, 16, 16), (8, 4, 2, 1, 1, 1)))
    block = lambda layer: [drawn(layer, 0.01), nn.BatchNorm2d(layer.out_channels), nn.LeakyReLU(0.1)]
    linear = lambda cin, cout, bias=True: drawn(nn.Linear(cin, cout, bias=bias), 0.01)
    G, E = [nn.Unflatten(1, (z_dim, 1, 1))], [Unit()]
    for channels, kernel in zip(pairwise([z_dim, *widths_G]), [*kernels[4::-1], (1, 1)], strict=True):
        G += block(nn.ConvTranspose2d(*channels, *kernel, bias=False))
    for channels, kernel in zip(pairwise([3, *widths]), kernels, strict=True):
        E += block(nn.Conv2d(*channels, *kernel, bias=False))
    G = Layer(nn.Sequential(*G, drawn(nn.Conv2d(width, 3, 1, bias=False), 0.01)))

    drop, n = [nn.Dropout(p) for p in dropout], widths[4]
    D_x, cin = [Unit(), drop[0]], 3
    for cout, kernel in zip(widths, kernels[:5], strict=False):
        D_x, cin = [*D_x, drawn(nn.Conv2d(cin, cout, *kernel), 0.01), Maxout(), drop[1]], cout // 2
    D_z = [drop[0], linear(z_dim, n, False), Maxout(), drop[1], linear(n // 2, n, False), Maxout(), drop[1]]
    D_xz = [linear(n, 2 * n), Maxout(), drop[1], linear(n, 2 * n), Maxout(), drop[1]]
    E, D = Encoder(*E, head=linear(widths[5], outputs)), Discriminator(Joint(D_x, D_z, D_xz), logit=linear(n, 1))
    return Generator(G, bias=(3, size, size)), E, D


# ------------------------------------------------------------ the objective
def discriminator_loss(l_r, l_f):
    """-V(D, E, G) (equation 3) of the logits l_r of D(x, E(x)) and l_f of D(G(z), z), [B] each."""
    return F.softplus(-l_r).mean() + F.softplus(l_f).mean()


def encoder_generator_loss(l_r, l_f):
    """Section 3.4: the labels of BOTH kinds of pairs swapped, since -L_D would have no slope where D is sure. Through
    l_r E wants its pairs taken for G's, through l_f G its own for E's."""
    return F.softplus(l_r).mean() + F.softplus(-l_f).mean()


def regression_loss(args, a, z):
    """The latent regressor's: cross-entropy of sigmoid(a), a = E's output for G(z), and (z + 1) / 2, a mean over images
    and dimensions. Under the normal prior, of which the paper has none, the squared error of mu."""
    if args.prior == "uniform":
        return F.binary_cross_entropy_with_logits(a, (z + 1) / 2)
    return F.mse_loss(a[:, : args.z_dim], z)


def prior(args, n, *key):
    """z ~ U(-1, 1), or N(0, I) with ALI's networks: [n, z_dim], a function of the seed and the key."""
    z, numbers = torch.empty(n, args.z_dim, device=args.device), generator(args.seed, *key, args.device)
    return z.uniform_(-1, 1, generator=numbers) if args.prior == "uniform" else z.normal_(generator=numbers)


def posterior(args, a, noise=0.0):
    """E(x), [B, z_dim], of E's output a: 2 sigmoid(a) - 1, in the prior's range; or ALI's mu + sigma noise. The bounds
    of log sigma are not ALI's: they keep it from running away at a demo's pace."""
    if args.prior == "uniform":
        return torch.tanh(a / 2)
    mu, log_sigma = a.chunk(2, dim=1)
    return mu + log_sigma.clamp(-6, 2).exp() * noise


def anomaly_score(L_G, L_D, alpha=0.9):
    """A(x) of Zenati et al., the higher the odder: L_G = ||x - G(E(x))||_1, and L_D either
    ||f_D(x, E(x)) - f_D(G(E(x)), E(x))||_1 or the cross-entropy -log D(x, E(x))."""
    return alpha * L_G + (1 - alpha) * L_D


def auroc(scores, odd):
    """The chance that an odd one scores above another, ties being half a win; scores [N], odd [N] bool."""
    others, odd = scores[~odd].sort().values, scores[odd]
    wins = sum(torch.searchsorted(others, odd, right=right) for right in (False, True))
    return float(wins.double().mean() / (2 * len(others)))


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
    """G, E and D with their first weights, a function of the seed: every rank starts from the same."""
    torch.manual_seed(args.seed)
    name, options = args.networks[args.size]
    outputs = args.z_dim * (2 if args.prior == "normal" else 1)
    make = {"mlp": mlp, "conv": conv, "ali": ali}[name]
    networks = make(args.z_dim, outputs, args.size, args.encoder_size, **options)
    if args.method != "bigan":  # as in the authors' code; a BiGAN's D would learn that z is 0
        nn.init.zeros_(networks[1].head.weight)
    if args.world > 1 and args.device != "cpu":  # statistics of the whole batch
        networks = [nn.SyncBatchNorm.convert_sync_batchnorm(network) for network in networks]
    return [network.to(args.device, memory_format=torch.channels_last) for network in networks]


def settle(args, average, inputs=None):
    """A frozen copy of averaged weights to be used ("deploy" in the authors' code): batch norm's statistics are the
    means over those of the batches of `inputs`, tuples of arguments; for G over latents."""
    network = copy.deepcopy(average.module).requires_grad_(False).train()
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # that is, the mean of all
    inputs = inputs or ((prior(args, args.batch, STANDING, i),) for i in range(args.standing))
    for batch in inputs if norms else ():
        network(*batch)
    return network.eval()


def odd(args, data):  # which pictures are of the class that --anomaly names, bool [N]
    labels, names, wanted = data.require_labels(), data.classes, args.anomaly
    if wanted not in names and not (wanted.isdecimal() and int(wanted) < len(names)):
        raise UserError(f"--anomaly {wanted}: give one of {', '.join(names)}, or its number from 0")
    return labels == (names.index(wanted) if wanted in names else int(wanted))


def normal(args, data):
    """What --anomaly leaves of the pictures: the one use of labels in training, and only where it is asked for."""
    if args.anomaly is None:
        return data
    rows, key = (~odd(args, data)).nonzero()[:, 0], f"{data.key}-without-{args.anomaly.replace('/', '-')}"
    return replace(data, images=data.images[rows], labels=data.labels[rows], factors=None, files=None, key=key)


def images(args, split, batch, first=0, pieces=1, rank=0, world=1):
    """Endless batches from number `first` on: x [m, 3, encoder_size, encoder_size] for E, and the same for D."""
    size, crop = args.encoder_size, None
    if split == "train" and args.crop_from:  # of the centre square; the authors' crops are of the whole picture
        area = (size / args.crop_from) ** 2
        size, crop = args.crop_from, (1, size, (area, area), (1.0, 1.0), "bilinear")
    data = normal(args, load(args.data, split, size, args.root, args.skip_broken))
    for x, *_ in batches(data, batch, args.seed, first, pieces, split == "train", crop, args.device, rank, world):
        x = x[:, 0].contiguous(memory_format=torch.channels_last) if crop else x
        yield x, F.adaptive_avg_pool2d(x, args.size)  # of the same size it is the same


def train(args):
    G, E, D = build(args)
    if G.bias is not None:  # ALI: it starts at the log-odds of the mean of 500 images
        _, seen = next(images(args, "train", 500))
        G.bias.data.copy_((seen.mean(0) / 2 + 0.5).clamp(1e-7, 1 - 1e-7).logit())
    G_ema, E_ema, D_ema = (AveragedModel(n, multi_avg_fn=get_ema_multi_avg_fn(args.ema)) for n in (G, E, D))
    parameters = [p for network in (G, E, D) for p in network.parameters()]
    kinds = (args.decay, (2, 4)), (0.0, (1, 3))  # L2 in the gradient, of matrices and kernels, not gains and biases
    groups = [{"params": [p for p in parameters if p.ndim in n], "weight_decay": decay} for decay, n in kinds]
    optimiser = torch.optim.Adam(groups, args.lr, args.betas, fused=True)
    run = Run(args, G=G, E=E, D=D, G_ema=G_ema, E_ema=E_ema, D_ema=D_ema, optimiser=optimiser)
    torch._functorch.config.donated_buffer = not args.compile  # the way to go through one graph twice, says its error
    for network in (G, E, D) if args.compile else ():
        network.compile()
    autocast = torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.precision == "bf16")
    pieces = args.world * args.accumulate  # of a batch
    share = args.batch // pieces  # images a piece
    stream = images(args, "train", args.batch, run.step, args.accumulate, args.rank, args.world)

    while run.step < args.steps:
        G.train(), E.train(), D.train()
        # The rate falls geometrically to a hundredth; the authors' by epochs. It does not depend on --steps.
        lr = args.lr * (0.01 ** min(max(run.step / args.anneal - 1, 0), 1) if args.anneal else 1)
        for group in optimiser.param_groups:
            group["lr"] = lr
        optimiser.zero_grad()
        latents, noises = (prior(args, args.batch, kind, run.step) for kind in (LATENTS, POSTERIOR))
        for n in range(args.rank, pieces, args.world):  # noise is drawn for the whole batch and cut
            z, noise = (numbers[share * n : share * (n + 1)] for numbers in (latents, noises))
            torch.manual_seed(generator(args.seed, DROPOUT, run.step * pieces + n).initial_seed())  # for D's dropout
            x, seen = next(stream)
            with autocast:
                x_hat = G(z)
                if args.method == "bigan":  # real and drawn pairs apart, each with batch statistics of its own
                    l_r, l_f = D(seen, posterior(args, E(x), noise)), D(x_hat, z)
                    loss_eg = encoder_generator_loss(l_r, l_f) / 2
                else:  # a GAN, for 0 is silence in D's maps of z, which have no biases; and E learns z from G(z)
                    l_r, l_f = D(seen, 0 * z), D(x_hat, 0 * z)
                    heard = 0.25 if args.method == "jlr" else 0.0  # the share of E's loss that G helps to lower
                    told = torch.lerp(x_hat.detach(), x_hat, heard)
                    loss_eg = F.softplus(-l_f).mean() + regression_loss(args, E(told), z)
                loss_d = discriminator_loss(l_r, l_f) / 2  # halved as in the authors' code: log 2 is D's ignorance
            # Two gradients at the same weights, each for its own player: the three networks step at once.
            (loss_d / args.accumulate).backward(inputs=[*D.parameters()], retain_graph=True)
            (loss_eg / args.accumulate).backward(inputs=[*E.parameters(), *G.parameters()])
        average_gradients(args, G, E, D)
        optimiser.step()
        for average, network in ((G_ema, G), (E_ema, E), (D_ema, D)):
            average.update_parameters(network)
        run.step += 1

        if run.every(args.log_every):
            with torch.no_grad(), autocast:
                z_hat = posterior(args, E.eval()(x))
                pairing = (D.eval()(seen, z_hat) - D(seen, z_hat.roll(1, 0))).abs()
            # pairing: what another image's z does to the logit; at 0 D is deaf. z_std: at 0 all images share one z
            run.log(loss_d=loss_d, loss_eg=loss_eg, real=l_r, fake=l_f, pairing=pairing, z_std=z_hat.std(0), lr=lr)
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
# same as in bigbigan.py
def picture(args, name, x, columns=8):
    if args.rank == 0:
        save_image(x, args.out / name, nrow=columns, normalize=True, value_range=(-1, 1))


def restore(args):
    """Averaged G, E and D with statistics of their own, D's over pairs (x, E(x)), and the checkpoint they come from."""
    name = "best.pt" if args.best else "checkpoint.pt"
    if (state := read_checkpoint(args, name)) is None:
        raise UserError(f"there is no {name} in {args.out}: train first, or give the run's --out")
    averages = [AveragedModel(network) for network in build(args)]
    for average, key in zip(averages, ("G_ema", "E_ema", "D_ema"), strict=True):
        average.load_state_dict(state[key])
    known = lambda: islice(images(args, "train", args.batch), args.standing)
    E = settle(args, averages[1], ((x,) for x, _ in known()))
    D = settle(args, averages[2], ((seen, posterior(args, E(x))) for x, seen in known()))
    return settle(args, averages[0]), E, D, state


def some(args, split):  # at E's size, no more of its pictures than --probe-samples lets through
    n = args.probe_samples or None
    rows = slice(n if split == "train" else n and n // 2)
    return load(args.data, split, args.encoder_size, args.root, args.skip_broken, rows)


def floats(args, pictures):  # uint8 [n, S, S, 3] -> [n, 3, S, S] in [-1, 1]
    return pictures.to(args.device).permute(0, 3, 1, 2).float() / 127.5 - 1


def oddness(args, G, E, D, data):
    """L_G, and L_D by features and by cross-entropy, of each picture by itself: [3, N]."""
    columns = []
    for pictures in data.images.split(250):
        x = floats(args, pictures)
        seen, z_hat = F.adaptive_avg_pool2d(x, args.size), posterior(args, E(x))
        x_hat = G(z_hat)
        L_G, L_D = (seen - x_hat).abs().sum((1, 2, 3)), D.features(seen, z_hat) - D.features(x_hat, z_hat)
        columns.append(torch.stack([L_G, L_D.abs().sum(1), F.softplus(-D(seen, z_hat))]))
    return torch.cat(columns, 1)


def sample(args):
    """samples.png; reconstructions.png: test images, G(E(x)) behind each; regenerations.png: the same of samples;
    interpolations.png: four rows between two latents of the prior, then four between those of two test images;
    anomalies.png: the 20 test images of the highest A(x) and the 20 of the lowest, G(E(x)) behind each."""
    G, E, D, _ = restore(args)
    (x, seen), z = next(images(args, "test", 40)), prior(args, 64, PICTURES, 0)
    x_hat, back = G(z), lambda x: G(posterior(args, E(x)))
    pairs = lambda seen, again: torch.stack([seen, again], 1).flatten(0, 1)
    ends = torch.cat([z[:8], posterior(args, E(x))[:8]]).unflatten(0, (8, 2, 1))
    rows = torch.lerp(ends[:, 0], ends[:, 1], torch.linspace(0, 1, 10, device=z.device)[:, None])
    picture(args, "samples.png", x_hat)
    picture(args, "reconstructions.png", pairs(seen, back(x)), columns=10)
    picture(args, "regenerations.png", pairs(x_hat, back(F.interpolate(x_hat, args.encoder_size)))[:80], columns=10)
    picture(args, "interpolations.png", G(rows.flatten(0, 1)), columns=10)
    new = some(args, "test")
    L_G, L_D, _ = oddness(args, G, E, D, new)
    order = anomaly_score(L_G, L_D, args.alpha).argsort(descending=True).cpu()
    x = floats(args, new.images[torch.cat([order[:20], order[-20:]])])
    picture(args, "anomalies.png", pairs(F.adaptive_avg_pool2d(x, args.size), back(x)), columns=10)


def judge_samples(args, G, full=True):
    data = normal(args, load(args.data, args.fid_split, args.size, args.root, args.skip_broken))
    draw = lambda chunk, n: G(prior(args, n, FAKES, chunk))
    return fid.evaluate(draw, data, args.fid_samples, args.fid_features, args.device, args.fid_weights, full)


def evaluate(args):
    """metrics.json: E's linear probe, how well E inverts G, FID; MNIST's 1-NN; how well --anomaly's class is found."""
    G, E, D, state = restore(args)
    fresh, (x, seen) = build(args), next(images(args, "test", 500))
    again = G(posterior(args, E(x)))  # EGr of the authors' log, in [0, 1], and EGr_b, which is of another image
    miss, other = (float((seen - y).flatten(1).norm(dim=1).mean()) / 2 for y in (again, again.roll(1, 0)))
    device = torch.cuda.get_device_name() if "cuda" in args.device else f"cpu, {torch.get_num_threads()} threads"
    metrics = {"command": " ".join(sys.argv), "device": device, "torch": torch.__version__, "steps": state["step"]}
    metrics |= {"images": state["step"] * args.batch, "seconds": round(state["seconds"], 1)}
    metrics["parameters"] = {k: sum(p.numel() for p in n.parameters()) for k, n in zip("GED", fresh, strict=True)}
    metrics |= {"reconstruction_error": miss, "reconstruction_error_mismatched": other}
    metrics["reconstruction_error_ratio"] = miss / other
    probe = lambda: linear_probe.evaluate(E.trunk, some(args, "train"), some(args, "test"), fresh[1].trunk, args.device)

    def nearest_neighbour():  # Table 1: Euclidean, all of MNIST; `probe` has calibrated the untrained encoder
        encoders = {"": E.trunk, "untrained_": fresh[1].trunk, "raw_pixels_": lambda x: x[:, 0].flatten(1)}
        found, sets = {}, [load(args.data, split, args.size, args.root) for split in ("test", "train")]
        for name, encoder in encoders.items():
            (queries, truth), (gallery, labels) = (linear_probe.extract(encoder, data, args.device) for data in sets)
            with fid.full_precision():
                nearest = torch.cat([torch.cdist(part, gallery).argmin(1) for part in queries.split(250)])
            found[f"{name}1nn_top1"] = float((labels[nearest] == truth).double().mean())
        return found

    def anomalies():  # beside the score: reconstruction alone
        data = some(args, "test")
        marked, (L_G, by_features, by_entropy) = odd(args, data).to(args.device), oddness(args, G, E, D, data)
        scores = {name: anomaly_score(L_G, L_D, args.alpha) for name, L_D in (("", by_features), ("_ce", by_entropy))}
        scores["_reconstruction"] = L_G
        return {f"anomaly_auroc{name}": auroc(score, marked) for name, score in scores.items()}

    measures = [probe, lambda: judge_samples(args, G)]
    measures += [nearest_neighbour] * (args.data in GREY) + [anomalies] * (args.anomaly is not None)
    for measure in measures:
        try:
            metrics |= measure()
        except UserError as error:  # no labels, no Inception weights, no room for a cache: the run keeps the rest
            flags = " ".join(word for word in sys.argv[1:] if word not in ("train", "eval"))
            print(f"{SCRIPT}.py: not measured: {error}; then: python {sys.argv[0]} eval {flags}", file=sys.stderr)
    if args.rank == 0:
        (args.out / "metrics.json.tmp").write_text(json.dumps(metrics, indent=1) + "\n")
        os.replace(args.out / "metrics.json.tmp", args.out / "metrics.json")
        print(f"{args.out} has the pictures, and metrics.json, where among others:")
        for k in (k for k in metrics if k.endswith("top1") or k.startswith(("fid", "fd_", "reconstr", "anomaly"))):
            print(f"  {k} {metrics[k]:.4g}")
        print("top1: accuracy with E's features, beside untrained_, raw_pixels_, random_features_; fid, fd_random (NOT")
        print("FID): distance from real images, 0 is best; ratio: 0 is exact, 1 as bad as for a stranger.")


# ------------------------------------------------------------ the command line
FLAGS = {  # those whose defaults are in PRESETS
    "size": "side of G's images, pixels", "encoder_size": "side of E's images, pixels; 0: the same",
    "crop_from": "side of the squares that training images are cut from, pixels; 0: no crops",
    "z_dim": "dimensions of z", "steps": "training steps; more of them extend a finished run",
    "anneal": "step from which the learning rates fall, to a hundredth in as many steps; 0: never",
    "batch": "images a step, over all ranks and pieces", "lr": "learning rate of all three",
    "ema": "decay of the averages of G, E and D, 0 to 1; 0: none", "log_every": "steps between two lines of log.jsonl",
    "save_every": "steps between checkpoints, each with a samples.png", "fid_samples": "samples that FID is taken of",
    "fid_features": "random needs no weights, gives fd_random", "fid_split": "FID's real images",
    "probe_samples": "training images of the linear probe, with half as many test images; 0: all",
}  # fmt: skip
CHOICES = {"fid_features": ("inception", "random"), "fid_split": ("train", "test")}
FREE = (  # what may differ between two runs of one checkpoint: beginnings of names
    "command", "root", "out", "steps", "accumulate", "device", "precision", "compile", "skip_broken", "best", "log_",
    "save_", "eval_", "fid_", "probe_", "alpha")  # fmt: skip


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
    add("--method", default="bigan", choices=("bigan", "lr", "jlr"), help="baselines: (joint) latent regressor")
    add("--anomaly", metavar="CLASS", help="name or number of a class: left out of training, then looked for")
    add("--alpha", type=float, default=0.9, help="share of the reconstruction in the anomaly score, 0 to 1")
    for name, text in FLAGS.items():
        add(f"--{name.replace('_', '-')}", type=type(PAPER[name]), choices=CHOICES.get(name), help=text)
    asked, _ = parser.parse_known_args([word for word in sys.argv[1:] if word not in ("-h", "--help")])
    usual = {"imagenet": "paper", "shapes": "demo", "dsprites": "demo", "mnist": "demo", "fashion_mnist": "demo"}
    preset = asked.preset or usual.get(asked.data, "small")
    defaults = GREY.get(asked.data, PRESETS)[preset]
    parser.set_defaults(preset=preset, out=Path("runs", f"{SCRIPT}-{Path(asked.data).name}"), **defaults)
    args = parser.parse_args()
    args.encoder_size = args.encoder_size or args.size
    least = dict.fromkeys(("steps", "batch", "accumulate", "z_dim", "log_every", "save_every", "fid_samples"), 1)
    most = {"ema": 1, "seed": 2**63 - 1}
    for name, value in vars(args).items():
        low, high = least.get(name, 0), most.get(name, math.inf)
        if isinstance(value, int | float) and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be from {low} to {high}")
    name, _ = args.networks.get(args.size, ("", {}))
    larger = args.size if name == "conv" and args.method == "bigan" else math.inf  # regressors' E sees G(z)
    if not name or (args.encoder_size != args.size and args.encoder_size < larger):
        raise UserError(f"--size is one of {[*args.networks]}; --encoder-size the same, or more for a BiGAN's AlexNet")
    if 0 < args.crop_from < args.encoder_size:
        raise UserError(f"--crop-from {args.crop_from}: must be at least --encoder-size {args.encoder_size}, or 0")
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
