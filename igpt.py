"""iGPT: "Generative Pretraining from Pixels", Mark Chen, Alec Radford, Rewon Child, Jeff Wu, Heewoo Jun, Prafulla
Dhariwal, David Luan, Ilya Sutskever, ICML 2020 (no arXiv id; version V2).

A language model for images. A small image is read pixel by pixel, rows first, each pixel a word out of a palette of 512
colours; a transformer that knows nothing of two dimensions learns to tell the next pixel from those before it (AR), or
hidden pixels from the others (BERT). It draws images and completes halves of them, and in the middle of its layers,
averaged over the pixels, stands what an image is about.

    python igpt.py                                                # rendered shapes, five CPU minutes
    python igpt.py --data cifar10                                 # a 12-layer model for 32x32 images on one GPU
    python igpt.py --data cifar10 --finetune runs/igpt-cifar10    # goes on from that run, with labels
    torchrun --nproc_per_node 8 igpt.py --data imagenet           # the paper's iGPT-L; --model S, M, XL: its others
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torchvision.utils import save_image

from common import fid, linear_probe
from common.data import NAMES, UserError, batches, generator, load, resized_crop, uniforms

SCRIPT = Path(__file__).stem
PALETTE, MASKS, PROBE, PICTURES, FAKES, SHIFTS = range(6)  # streams of random numbers

# fmt: off
MODELS = {  # layers, width d, heads (XL's are not published: those of L); the last three are not the paper's
    "S": (24, 512, 8), "M": (36, 1024, 8), "L": (48, 1536, 16), "XL": (60, 3072, 16), "cifar": (12, 256, 8),
    "tiny": (8, 128, 4), "demo": (4, 96, 4)}
RATES = {"S": (3e-3, 1e-2), "L": (1e-3, 1e-3), "XL": (3e-4, 3e-4)}  # of learning, for AR and BERT; 3e-3 for the others
PAPER = dict(  # appendix: a warm-up of one epoch. XL: --size 64 --batch 64 --warmup 20018 --steps 2000000
    size=32, model="L", colours=512, palette_pixels=1_000_000, lr=0.0, test_samples=0,
    crop=(0.34, 0.77), flip=False,  # a crop of 224 out of 256 to 384: 34 to 77 % of a square picture's area
    betas=(0.9, 0.95), warmup=10_009, steps=1_000_000, batch=128, log_every=100, save_every=5000,
    fid_features="inception", fid_samples=50_000, fid_split="test", probe_samples=50_000, sgd_probe=1_000_000)
SMALL = PAPER | dict(  # CIFAR-10 from scratch (minGPT's model): 100 epochs
    model="cifar", palette_pixels=500_000, crop=(), flip=True, warmup=391, steps=39_100, save_every=2000,
    fid_split="train", probe_samples=0, sgd_probe=0)
DEMO = SMALL | dict(  # five minutes on two CPU cores: 16x16 pixels of 32 colours, since 1,024 tokens are out of reach
    size=16, model="demo", colours=32, palette_pixels=100_000, warmup=50, steps=500, batch=16, log_every=50,
    save_every=250, fid_features="random", fid_samples=1000, fid_split="test", test_samples=1000, probe_samples=2000)
PRESETS = {"demo": DEMO, "small": SMALL, "paper": PAPER}
# fmt: on


# ------------------------------------------------------------ images as words
def nearest(palette, pixels):
    """Numbers of the palette's colours [K, 3] that are nearest to pixels [N, 3], in parts that fit into the memory."""
    exact = dict(compute_mode="donot_use_mm_for_euclid_dist")  # TF32's products confuse colours that are close
    return torch.cat([torch.cdist(part, palette, **exact).argmin(1) for part in pixels.split(2**17)])


def encode(palette, x):
    """Images [B, 3, S, S] in [-1, 1] -> tokens [B, S * S]: the nearest colours, rows first."""
    return nearest(palette, x.movedim(1, 3).reshape(-1, 3)).view(len(x), -1)


def decode(palette, ids):
    """Tokens [B, S * S] -> images [B, 3, S, S] in [-1, 1]."""
    side = math.isqrt(ids.shape[1])
    return palette[ids].unflatten(1, (side, side)).movedim(3, 1)


def learn_palette(pixels, colours, random, steps=20):
    """Centres [K, 3] of k-means over pixels [N, 3], by Lloyd's iterations; one that none is nearest to starts anew."""
    draw = lambda: pixels[torch.randint(len(pixels), (colours,), generator=random, device=pixels.device)]
    centres = draw()
    for _ in range(steps):
        owner = nearest(centres, pixels)
        count = owner.bincount(minlength=colours)[:, None]
        centres = torch.where(count > 0, torch.zeros_like(centres).index_add_(0, owner, pixels) / count, draw())
    return centres


# ------------------------------------------------------------ the transformer (section 2.2, and the official code)
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


class Block(nn.Module):
    """h [B, T, d] <- h + attention(norm(h)) <- h + mlp(norm(h)). Unlike GPT-2's: RMS norms, no biases, quick GELU."""

    def __init__(self, d, heads, layers, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.RMSNorm(d, eps=1e-5), nn.RMSNorm(d, eps=1e-5)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)
        for layer, std in ((self.qkv, d**-0.5), (self.out, (d * layers) ** -0.5), (self.up, 0.02), (self.down, 0.02)):
            nn.init.normal_(layer.weight, std=std)

    def forward(self, h, cache=None):
        q, k, v = self.qkv(self.norm1(h)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, T, _]
        if cache is not None:
            k, v = cache.extend(self, k, v)
        # a single token, which is the last one, may look at all
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal and q.shape[2] > 1)
        h = h + self.out(attended.transpose(1, 2).flatten(2))
        a = self.up(self.norm2(h))
        return h + self.down(a * torch.sigmoid(1.702 * a))


class GPT(nn.Module):
    """Tokens in 0 ... K-1 -> what it takes each pixel for, logits over the K colours. It also keeps the palette.

    AR    ids [B, t], t <= n: logits [B, t + 1, K] of x_0 ... x_t, each from those before it; t = n: n of them
    BERT  ids [B, n], hidden [B, n] of 0 and 1: logits [B, n, K] from those pixels that are not hidden
    """

    def __init__(self, colours, n, layers, d, heads, classes=0, bert=False):
        super().__init__()
        self.n = n
        self.register_buffer("palette", torch.zeros(colours, 3))
        self.wte, self.wpe = nn.Embedding(colours, d), nn.Parameter(0.01 * torch.randn(n, d))
        nn.init.normal_(self.wte.weight, std=0.02)
        self.register_parameter("sos", None if bert else nn.Parameter(0.02 * torch.randn(d)))
        self.blocks = nn.ModuleList(Block(d, heads, layers, causal=not bert) for _ in range(layers))
        self.ln_f = nn.RMSNorm(d, eps=1e-5)
        self.wtet = nn.Linear(d, colours, bias=False)  # not tied to wte
        self.wclf = nn.Linear(d, classes, bias=False) if classes else nn.Identity()
        for head in (self.wtet, self.wclf) if classes else (self.wtet,):
            nn.init.zeros_(head.weight)

    def embed(self, ids, hidden=None, fed=0):
        """What enters the first block, [B, T, d]; `fed` tokens are in a cache already."""
        if self.sos is None:
            return self.wte(ids) * (1 - hidden[..., None]) + self.wpe
        h = self.wte(ids[:, max(fed - 1, 0) : self.n - 1])  # shifted by one: the last pixel never enters
        if fed == 0:
            h = torch.cat([self.sos.expand(len(ids), 1, -1), h], 1)
        return h + self.wpe[fed : fed + h.shape[1]]

    def forward(self, ids, hidden=None, cache=None):
        """The logits, with a cache only those of what it has not seen; and the class logits [B, C], or without classes
        the features that these are made of, f^L [B, d]."""
        h = self.embed(ids, hidden, cache.fed if cache else 0)
        for block in self.blocks:
            h = block(h, cache)
        if cache:
            cache.fed += h.shape[1]
        with torch.autocast(h.device.type, enabled=False):
            h = self.ln_f(h.float())
            return self.wtet(h), self.wclf(h.mean(1))

    def features(self, ids, hidden=None):
        """f^l of section 2.3 for l = 0 ... L, [B, L + 1, d]: means over all positions of what the first norm of a layer
        makes of its input, and at last of ln_f's output."""
        h, found = self.embed(ids, hidden), []
        for block in self.blocks:
            found.append(block.norm1(h).mean(1))
            h = block(h)
        return torch.stack([*found, self.ln_f(h).mean(1)], 1)


# ------------------------------------------------------------ the objective
def generative_loss(logits, ids, hidden):
    """L_AR and L_BERT (equations 1 and 2), nats a token: -log p of the hidden pixels, their mean in each image and then
    over the images. To AR all pixels are hidden, each from those before it."""
    ce = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
    return ((ce * hidden).sum(1) / hidden.sum(1).clamp(min=1)).mean()


def masks(args, n, *key):
    """hidden [n, size * size]: to AR all are 1, to BERT each is 1 with probability 0.15."""
    if args.objective == "ar":
        return torch.ones(n, args.size**2, device=args.device)
    random = generator(args.seed, *key, args.device)
    return (torch.rand(n, args.size**2, generator=random, device=args.device) < 0.15).float()


def learning_rate(args, step):
    """Rises linearly, then falls to 0 as a cosine over what is left of the steps; constant in fine-tuning."""
    if args.finetune or step < args.warmup:
        return args.lr * (1 if args.finetune else (step + 1) / args.warmup)
    part = (step - args.warmup) / max(1, (args.horizon or args.steps) - args.warmup)
    return args.lr * (1 + math.cos(math.pi * part)) / 2


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
def complete(args, net, ids, *key):
    """Continues known tokens ids [B, t], t >= 0, to [B, n], token by token."""
    cache, random = Cache(net.n), generator(args.seed, *key, args.device)
    while ids.shape[1] < net.n:
        logits, _ = net(ids, cache=cache)
        p = probabilities(logits[:, -1], args.temperature, args.top_k, args.top_p)
        ids = torch.cat([ids, p.multinomial(1, generator=random)], 1)
    return ids


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
    """The network with its first weights, a function of the seed: every rank starts from the same."""
    torch.manual_seed(args.seed)
    net = GPT(args.colours, args.size**2, *MODELS[args.model], args.classes, args.objective == "bert")
    return net.to(args.device)


def save_whole(args, net, optimiser):
    """Makes the checkpoints of a sharded run those of a run on one GPU: whole tensors, in the first rank's memory."""
    weights = dict(net.named_parameters())
    cut = lambda v, p: distribute_tensor(v.to(p.device), p.device_mesh, p.placements) if v.ndim else v

    def gather(v, _=None):
        whole = v.full_tensor() if isinstance(v, DTensor) else v
        return whole.cpu() if args.rank == 0 else None

    def weights_before_loading(_, state, *__):
        state.update({k: cut(v, weights[k]) for k, v in state.items() if k in weights})

    def moments(state, change):  # Adam numbers them in the order of the parameters
        kept = zip(state["state"].items(), weights.values(), strict=False)
        return state | {"state": {i: {k: change(v, p) for k, v in moment.items()} for (i, moment), p in kept}}

    net.register_state_dict_post_hook(lambda _, state, *__: state.update({k: gather(v) for k, v in state.items()}))
    net.register_load_state_dict_pre_hook(weights_before_loading)
    optimiser.register_state_dict_post_hook(lambda _, state: moments(state, gather))
    optimiser.register_load_state_dict_pre_hook(lambda _, state: moments(state, cut))


def images(args, batch, first=0, pieces=1, rows=slice(None)):
    """Endless pieces of training batches from number `first` on: x [m, 3, S, S] in [-1, 1], labels or None."""
    crop = (1, args.size, args.crop, (1.0, 1.0), "bicubic") if args.crop else None  # the paper draws sides, not areas
    data = load(args.data, "train", None if crop else args.size, args.root, args.skip_broken, rows)
    cut = pieces, args.flip or bool(args.finetune), crop, args.device, args.rank, args.world
    for number, (x, y, _) in enumerate(batches(data, batch, args.seed, first, *cut), first * pieces):
        x = x[:, 0] if crop else x
        if args.finetune and not crop:  # Wide ResNet's: moved by up to 4 pixels
            share = args.rank, args.world, number % pieces, pieces
            shift = torch.from_numpy(uniforms(batch, 2, number // pieces, args.seed, SHIFTS, *share)).to(x.device)
            box = torch.cat([(9 * shift).long(), torch.full_like(shift, args.size).long()], 1)
            x = resized_crop(F.pad(x, (4, 4, 4, 4), mode="reflect"), box, args.size)
        yield x, y


def start_palette(args, net):
    """k-means over pixels drawn from the training set, centre squares at the model's resolution."""
    data = load(args.data, "train", args.size, args.root, args.skip_broken, slice(50_000))
    pixels, random = data.images.reshape(-1, 3), generator(args.seed, PALETTE, 0)
    pixels = pixels[torch.randint(len(pixels), (args.palette_pixels,), generator=random)].to(args.device) / 127.5 - 1
    random = generator(args.seed, PALETTE, 1, args.device)
    net.palette.copy_(learn_palette(pixels, args.colours, random))
    if args.world > 1:
        dist.broadcast(net.palette, 0)


def train(args):
    args.shard = args.world > 1 and (args.model in ("L", "XL") if args.shard is None else args.shard)
    learnt, judged = slice(None), ("test", slice(args.test_samples or None))
    if args.finetune:  # a tenth of the training set tells when to stop
        data = load(args.data, "train", args.size, args.root, args.skip_broken)
        args.classes = args.config["classes"] = len(data.require_labels().unique())
        learnt, judged = slice(len(data) // 10, None), ("train", slice(len(data) // 10))
    net = build(args)
    if args.finetune:
        kept = {k: args.config[k] for k in ("model", "size", "colours", "objective")}
        source, _ = restore(argparse.Namespace(**vars(args) | {"out": Path(args.finetune), "config": kept}))
        net.load_state_dict(source.state_dict(), strict=False)  # all but the class head
    if args.shard:  # over the ranks; each block gathers its own weights when it works
        mesh = dist.init_device_mesh(args.device.split(":")[0], (args.world,))
        for part in (*net.blocks, net):
            fully_shard(part, mesh=mesh)
    optimiser = torch.optim.Adam(net.parameters(), args.lr, args.betas, fused=True)
    if args.shard:
        save_whole(args, net, optimiser)
    run = Run(args, net=net, optimiser=optimiser)
    if run.step == 0 and not args.finetune:
        start_palette(args, net)
    if args.compile:
        net.compile()
    autocast = torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.precision == "bf16")
    stream = images(args, args.batch, run.step, args.accumulate, learnt)

    while run.step < args.steps:
        optimiser.zero_grad()
        whole = masks(args, args.batch, MASKS, run.step)
        pieces = whole.chunk(args.world * args.accumulate)[args.rank :: args.world]
        for hidden, (x, y) in zip(pieces, islice(stream, args.accumulate), strict=True):
            ids = encode(net.palette, x)
            with autocast:
                logits, scores = net(ids, hidden)
            loss = generative = generative_loss(logits, ids, hidden)
            if args.finetune:  # L_GEN + L_CLF (section 2.3)
                loss = generative + F.cross_entropy(scores, y)
            (loss / args.accumulate).backward()
        if not args.shard:  # fully_shard has done it
            average_gradients(args, net)
        optimiser.param_groups[0]["lr"] = lr = learning_rate(args, run.step)
        optimiser.step()
        run.step += 1

        if run.every(args.log_every):
            run.log(loss=loss, loss_generative=generative, bits_per_token=generative / math.log(2), lr=lr)
        if run.every(args.save_every) or run.every(args.eval_every):
            run.save()
            # from the checkpoint just saved: pixel by pixel, shards would be gathered, and compiled code made, anew
            picture(args, "samples.png", draw(args, restore(args)[0], 64, PICTURES, 0))
        if run.every(args.eval_every):
            found = judge(args, net, *judged)
            run.log(**found)
            if (value := next(iter(found.values()))) < run.best:
                run.best = value
                run.save("best.pt")
        run.leave_if_told()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    sample(args)
    evaluate(args)


# ------------------------------------------------------------ pictures and numbers
def picture(args, name, x, columns=8):
    if args.rank == 0:  # at least 64 pixels wide, so that each can be seen
        x = F.interpolate(x, scale_factor=max(1, 64 // x.shape[3]))
        save_image(x, args.out / name, nrow=columns, normalize=True, value_range=(-1, 1))


def restore(args, name="checkpoint.pt"):
    """The network, whole, and the checkpoint that it comes from."""
    if (state := read_checkpoint(args, name)) is None:
        raise UserError(f"there is no {name} in {args.out}: train first, or give the run's --out")
    args.classes = state["config"].get("classes", 0)
    net = build(args)
    net.load_state_dict(state["net"])
    return net.eval().requires_grad_(False), state


def tokens(args, net, split, rows):
    """Pictures of a split as tokens [N, size * size], and their labels [N] or None."""
    data = load(args.data, split, args.size, args.root, args.skip_broken, rows)
    parts = data.images.permute(0, 3, 1, 2).split(1000)
    ids = torch.cat([encode(net.palette, part.to(args.device) / 127.5 - 1) for part in parts])
    return ids, None if data.labels is None else data.labels.to(args.device)


def draw(args, net, n, *key):
    """n samples [n, 3, S, S]. BERT cannot draw: eight test images with pixels hidden, as it fills them, as they are."""
    if args.objective == "ar":
        nothing = torch.zeros(n, 0, dtype=torch.long, device=args.device)
        return decode(net.palette, complete(args, net, nothing, *key))
    ids, hidden = tokens(args, net, "test", slice(8))[0], masks(args, 8, *key)
    with torch.no_grad():
        filled = torch.where(hidden == 1, net(ids, hidden)[0].argmax(2), ids)
    x = decode(net.palette, ids)
    return torch.cat([x * (1 - hidden).view(-1, 1, args.size, args.size), decode(net.palette, filled), x])


def sample(args):
    """samples.png; completions.png: in a row a test image in the palette's colours, its upper half, six completions."""
    net, _ = restore(args, "best.pt" if args.best else "checkpoint.pt")
    picture(args, "samples.png", draw(args, net, 64, PICTURES, 0))
    if args.objective == "ar":
        ids, _ = tokens(args, net, "test", slice(8))
        upper = ids[:, : ids.shape[1] // 2].repeat_interleave(6, 0)
        x, ends = (decode(net.palette, z) for z in (ids, complete(args, net, upper, PICTURES, 1)))
        half = torch.cat([x[:, :, : args.size // 2], torch.ones_like(x[:, :, args.size // 2 :])], 2)
        rows = torch.cat([x[:, None], half[:, None], ends.unflatten(0, (-1, 6))], 1)
        picture(args, "completions.png", rows.flatten(0, 1))


@torch.no_grad()
def judge(args, net, split, rows):
    """Of those pictures the loss, nats a token, and a fine-tuned network's share of errors. BERT sees them masked."""
    ids, y = tokens(args, net, split, rows)
    losses, wrong = [], []
    for i, part in enumerate(ids.split(100)):
        hidden = masks(args, len(part), PROBE, i)
        logits, scores = net(part, hidden)
        losses += [generative_loss(logits, part, hidden).repeat(len(part))]
        wrong += [scores.argmax(1) != y[100 * i :][: len(part)]] if args.finetune else []
    error = {"error": torch.cat(wrong).double().mean()} if args.finetune else {}
    return error | {"nats_per_token": torch.cat(losses).mean()}


class Features(nn.Module):
    """Images [B, 3, S, S] -> features f^l [B, d] of one layer l, or of all layers, [B, (L + 1) d], for the probe.
    BERT's are of masked images, as in training (the paper); its vote over five masks is not repeated here."""

    def __init__(self, args, net, layer=slice(None)):
        super().__init__()
        self.args, self.net, self.layer = args, net, layer

    def forward(self, x):
        hidden = masks(self.args, len(x), PROBE, 0)
        return self.net.features(encode(self.net.palette, x), hidden)[:, self.layer].flatten(1)


def probe(args, net, untrained):
    """Logistic regression on each layer's features; on those of the best, by a tenth of the training pictures, beside
    its yardsticks; on five layers at once (the paper's 72.0 of XL); with few labels a class."""
    n = args.probe_samples or None
    read = lambda split, rows: load(args.data, split, args.size, args.root, args.skip_broken, rows)
    train, test = read("train", slice(n)), read("test", slice(n and n // 2))
    train.require_labels()
    (x, y), tested = (linear_probe.extract(Features(args, net), data, args.device) for data in (train, test))

    def accuracy(layers, rows, tested):
        pick = lambda z: z.unflatten(1, (len(net.blocks) + 1, -1))[:, layers].flatten(1)
        return linear_probe.probe((pick(x[rows]), y[rows]), (pick(tested[0]), tested[1]))["top1"]

    shuffled = [torch.randperm(len(x), generator=generator(args.seed, PROBE, i)).to(args.device) for i in range(5)]
    held_out, rest = shuffled[0].tensor_split([len(x) // 10])
    layers = range(len(net.blocks) + 1)
    chosen = [accuracy([layer], rest, (x[held_out], y[held_out])) for layer in layers]
    best = max(layers, key=chosen.__getitem__)
    found = {f"layer_{layer}_top1": accuracy([layer], slice(None), tested) for layer in layers}
    five = layers[max(0, min(best - 2, len(layers) - 5)) :][:5]
    found |= {"best_layer": best, "five_layers_top1": accuracy(five, slice(None), tested)}
    for shots in () if n else (4, 25, 400):  # of the whole set, as the paper does it on CIFAR-10
        draws = (torch.cat([order[y[order] == label][:shots] for label in y.unique()]) for order in shuffled)
        name, five = f"labels_{shots}_a_class", torch.tensor([accuracy([best], rows, tested) for rows in draws])
        found |= {f"{name}_top1": float(five.mean()), f"{name}_std": float(five.std())}
    found |= linear_probe.evaluate(Features(args, net, best), train, test, Features(args, untrained, best), args.device)
    if args.sgd_probe:  # the paper's protocol on ImageNet, which holds out 4 % of the training images
        data = images(args, 128, rows=slice(51_247, None)), read("train", slice(51_247)), read("test", slice(None))
        scores = linear_probe.sgd_probe(Features(args, net, best), *data, args.sgd_probe, args.device)
        found |= {f"sgd_probe_{k}": value for k, value in scores.items()}
    return found


def evaluate(args):
    """metrics.json: the loss beside that of the colours' frequencies; the probe of each layer; FID and its sisters."""
    net, state = restore(args, "best.pt" if args.best else "checkpoint.pt")
    untrained = build(args)
    untrained.palette.copy_(net.palette)
    device = torch.cuda.get_device_name() if "cuda" in args.device else f"cpu, {torch.get_num_threads()} threads"
    metrics = {"command": " ".join(sys.argv), "device": device, "torch": torch.__version__, "steps": state["step"]}
    metrics |= {"images": state["step"] * args.batch, "seconds": round(state["seconds"], 1)}
    metrics["parameters"] = sum(p.numel() for p in net.parameters())

    def likelihood():
        rows = slice(args.test_samples or None)
        found = {f"test_{k}": float(value) for k, value in judge(args, net, "test", rows).items()}
        found["test_bits_per_token"] = found["test_nats_per_token"] / math.log(2)
        (seen, _), (ids, _) = tokens(args, net, "train", slice(10_000)), tokens(args, net, "test", rows)
        frequency = (seen.flatten().bincount(minlength=args.colours) + 1.0) / (seen.numel() + args.colours)
        found["unigram_bits_per_token"] = float(-frequency.log2()[ids].mean())
        x = load(args.data, "test", args.size, args.root, args.skip_broken, rows).images.permute(0, 3, 1, 2) / 127.5 - 1
        return found | {"palette_rmse": float((x - decode(net.palette, ids).cpu()).square().mean().sqrt())}

    def samples():
        data = load(args.data, args.fid_split, args.size, args.root, args.skip_broken)
        drawn = lambda chunk, n: draw(args, net, n, FAKES, chunk)
        return fid.evaluate(drawn, data, args.fid_samples, args.fid_features, args.device, args.fid_weights)

    measures = [likelihood, lambda: probe(args, net, untrained)] + [samples] * (args.objective == "ar")
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
        shown = ("top1", "_token", "error", "best_layer")
        for k in (k for k in metrics if k.endswith(shown) or k.startswith(("fid", "fd_"))):
            print(f"  {k} {metrics[k]:.4g}")
        print("bits per token, a pixel, compare under one palette only; top1: accuracy with a layer's features, of the")
        print("best beside untrained_, raw_pixels_, random_features_; fid, fd_random (NOT FID): distance, 0 is best.")


# ------------------------------------------------------------ the command line
# fmt: off
FLAGS = {  # those whose defaults are in PRESETS
    "size": "side of the images, pixels, a multiple of 8; its square is the length of a sequence",
    "model": "layers, width and heads: the paper's S, M, L, XL, or smaller", "colours": "words: those of the palette",
    "lr": "highest learning rate; 0: the paper's for the model", "warmup": "steps in which the learning rate rises",
    "steps": "training steps; more of them extend a finished run",
    "batch": "images a step, over all ranks and pieces", "log_every": "steps between two lines of log.jsonl",
    "save_every": "steps between checkpoints, each with a samples.png", "fid_samples": "samples that FID is taken of",
    "fid_features": "random needs no weights, gives fd_random", "fid_split": "FID's real images",
    "test_samples": "test images that the loss is taken of; 0: all",
    "probe_samples": "training images of the linear probe, with half as many test images; 0: all",
    "sgd_probe": "steps of the papers' linear probe, SGD on augmented images; 0: none",
}
CHOICES = {"model": MODELS, "fid_features": ("inception", "random"), "fid_split": ("train", "test")}
FREE = (  # what may differ between two runs of one checkpoint: beginnings of names
    "command", "root", "out", "steps", "accumulate", "device", "precision", "compile", "skip_broken", "best", "log_",
    "save_", "eval_", "fid_", "test_", "probe_", "sgd_", "temperature", "top_", "shard")
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
    add("--eval-every", type=int, default=0, help="steps between test losses, the lowest keeps best.pt; 0: none")
    add("--best", action="store_true", help="sample and evaluate best.pt, not checkpoint.pt")
    add("--fid-weights", help="file of the Inception weights; else they are fetched")
    add("--skip-broken", action="store_true", help="do without images that cannot be read")
    add("--horizon", type=int, default=0, help="steps until the learning rate is 0; 0: as --steps")
    add("--objective", default="ar", choices=("ar", "bert"), help="the next pixel, or hidden ones")
    add("--finetune", help="folder of a finished run to go on from, with labels; --eval-every then counts errors")
    add("--shard", action=argparse.BooleanOptionalAction, help="ranks share the weights, or not; default: L and XL do")
    add("--temperature", type=float, default=1.0, help="of sampling: below 1 safer, above 1 wilder")
    add("--top-k", type=int, default=0, help="colours that a sample chooses from, the likeliest; 0: all")
    add("--top-p", type=float, default=1.0, help="sampling leaves out the unlikeliest colours beyond this mass")
    for name, text in FLAGS.items():
        add(f"--{name.replace('_', '-')}", type=type(PAPER[name]), choices=CHOICES.get(name), help=text)
    asked, _ = parser.parse_known_args([word for word in sys.argv[1:] if word not in ("-h", "--help")])
    usual = {"imagenet": "paper", "shapes": "demo", "dsprites": "demo", "mnist": "demo", "fashion_mnist": "demo"}
    preset = asked.preset or usual.get(asked.data, "small")
    out = Path("runs", f"{SCRIPT}-{Path(asked.data).name}{'-finetuned' if asked.finetune else ''}")
    parser.set_defaults(preset=preset, out=out, **PRESETS[preset])
    args = parser.parse_args()
    least = dict.fromkeys(("steps", "batch", "accumulate", "log_every", "save_every", "fid_samples"), 1)
    least |= {"size": 8, "colours": 2, "temperature": 0.01, "top_p": 0.01}
    most = {"top_p": 1, "seed": 2**63 - 1}
    for name, value in vars(args).items():
        low, high = least.get(name, 0), most.get(name, math.inf)
        if isinstance(value, int | float) and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be from {low} to {high}")
    if args.size % 8:
        raise UserError(f"--size {args.size}: must be a multiple of 8")
    if 0 < args.horizon < args.steps:
        raise UserError(f"--steps {args.steps}: nothing is learnt after --horizon {args.horizon}")
    if not args.lr:  # fine-tuned at a tenth of the rate (ours: the paper searched)
        args.lr = RATES.get(args.model, (3e-3, 3e-3))[args.objective == "bert"] * (0.1 if args.finetune else 1)
    args.config = {k: v for k, v in vars(args).items() if not k.startswith(FREE)}
    args.classes = 0  # of the head, which only fine-tuning adds
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
