"""How good are the samples?  The Fréchet distance and its sisters, from one pass over the pictures.

FID (arXiv 1706.08500), Inception Score (1606.03498), KID (1801.01401), precision, recall (1904.06991), density and
coverage (2002.09797). Without Inception's weights: `fd_random`, in features of a fixed random network, which see
layout, colour, texture and diversity but no semantics. It is NOT FID, and compares only on one data set at one size.
"""

import math
import os
import sys
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torchvision.models import inception_v3

from common.data import UserError

CHUNK = 100  # pictures a call of the sampler and of the feature network
KEPT = 10_000  # pictures whose features are kept for KID, precision, recall, density and coverage
FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")  # two names, same bytes
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILES[0]}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
UNLIKE_IMAGENET = ("shapes", "dsprites", "mnist", "fashion_mnist", "celeba")  # an Inception Score would mean nothing


@contextmanager
def full_precision():
    """Plain float32: without autocast, and without TF32, whose rounding is seen in distances and stalls a solver."""
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        with convolution, torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        matmul.fp32_precision = before


def _load_weights(path=None):
    """State dict of the published file; None: from torch's download folder, or fetched into it. All ranks call this."""
    folder = Path(torch.hub.get_dir(), "checkpoints")
    places = [Path(path)] if path else [folder / name for name in FILES]
    place = next((p for p in places if p.is_file()), places[0])
    problem = "not the published file, delete it" if place.is_file() else "no such file"
    if not path and not place.is_file() and os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            folder.mkdir(parents=True, exist_ok=True)  # the next call writes to a temporary name, checks and renames
            torch.hub.download_url_to_file(URL, str(place), SHA256, progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:
            problem = " ".join(str(error).split())
    if dist.is_initialized():
        dist.barrier()
    if not place.is_file() or sha256(place.read_bytes()).hexdigest() != SHA256:
        mend = f"put {URL} into {folder}, or give its path (weights=), or do without (--fid-features random)"
        raise UserError(f"Inception weights {place}: {problem}; {mend}")
    return torch.load(place, map_location="cpu", weights_only=True)


def _tf_resize(size, target=299):
    """TensorFlow 1's bilinear resize as a float64 matrix [target, size]: no half-pixel shift, no antialiasing."""
    source = (torch.arange(target, dtype=torch.float64) * size / target).clamp(max=size - 1)
    return (1 - (source[:, None] - torch.arange(size)).abs()).clamp(min=0)


class Inception:
    """FID's network: uint8 [B, 3, H, W] -> (features [B, 2048], logits [B, 1008] without bias), float32 on `device`.

    weights: path of the published file; None: $TORCH_HOME/hub/checkpoints, or a 95 MB download; UserError if wrong.
    The attribute `network` maps floats [B, 3, 299, 299] in [-1, 1] to features: any other resize can be put before it.
    """

    def __init__(self, weights=None, device="cpu"):
        self.name, self.dim, self.resize, self.device = f"inception-tf-{SHA256[:8]}", 2048, "tf", device
        net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
        net.load_state_dict(_load_weights(weights))
        # TensorFlow's graph never counts the padding, and its last block takes the maximum: an oddity, to be kept.
        pools = [torch.nn.AvgPool2d(3, 1, 1, count_include_pad=False)] * 8 + [torch.nn.MaxPool2d(3, 1, 1)]
        for name, pool in zip(("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b", "7c"), pools, strict=True):
            block, pooled = getattr(net, f"Mixed_{name}"), []  # its own pool is lost: branch_pool is handed ours
            block.register_forward_pre_hook(lambda _, x, pool=pool, pooled=pooled: pooled.append(pool(x[0])))
            block.branch_pool.register_forward_pre_hook(lambda _, x, pooled=pooled: pooled.pop())
        self.classifier = net.fc.weight.detach().double().T.to(device)  # [2048, 1008]; the original score has no bias
        net.fc = torch.nn.Identity()
        self.network = net.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)

    @full_precision()
    def __call__(self, images):
        rows, columns = (_tf_resize(size).to(self.device) for size in images.shape[2:])
        x = rows @ images.to(self.device, torch.float64) @ columns.T  # [B, 3, 299, 299]
        features = self.network(((x - 128) / 128).float().contiguous(memory_format=torch.channels_last))
        return features, (features.double() @ self.classifier).float()


class RandomFeatures:
    """A fixed random network: uint8 [B, 3, H, W] -> (features [B, 496], None), float32 on `device`.

    A 4x4 thumbnail (48 numbers), then the spatial means of three random convolutions (64, 128, 256). NumPy's policy
    freezes RandomState's uniform draws, and nothing here calls libm: the weights have the same bits on every machine.
    """

    def __init__(self, device="cpu"):
        random, self.device, self.filters = np.random.RandomState(0), device, []
        self.name, self.dim, self.resize = "random-496", 496, "area-64"  # pictures above 64 x 64 are averaged to it
        for shape in ((64, 3, 3, 3), (128, 64, 3, 3), (256, 128, 3, 3)):
            w = (2 * random.random_sample(shape) - 1) * math.sqrt(3)  # variance 1
            w -= w.mean((1, 2, 3), keepdims=True)  # blind to flat colour, which the thumbnail has seen
            w *= math.sqrt(2 / math.prod(shape[1:]))  # He et al. 2015
            self.filters.append(torch.from_numpy(w.astype(np.float32)).to(device))

    @full_precision()
    def __call__(self, images):
        x = images.to(self.device).float() / 127.5 - 1
        x = F.adaptive_avg_pool2d(x, 64) if max(x.shape[2:]) > 64 else x
        features = [F.adaptive_avg_pool2d(x, 4).flatten(1)]
        for layer, w in enumerate(self.filters):
            x = F.avg_pool2d(x, 2) if layer else x.contiguous(memory_format=torch.channels_last)
            x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), w).relu()
            features.append(x.mean((2, 3)))
        return torch.cat(features, 1), None

    def scale(self, real):
        """Each feature's unit [496], from the real Stats: without it the thumbnail would drown all the rest."""
        groups = real.cov.diag().split((48, 64, 128, 256))  # their means keep constant pixels from dividing by zero
        return torch.cat([(var + 0.01 * var.mean()).sqrt() for var in groups]).clamp(min=1e-12).cpu()


class Stats:
    """Streaming float64 statistics: `.n`, `.mean` [D], unbiased `.cov` [D, D]; some features: `.rows` [keep, D]."""

    def __init__(self, dim, device="cpu", keep=0):
        self.n, self.mean = 0, torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # sum of (x - mean)(x - mean)^T
        self.rows = torch.zeros(keep, dim, device=device)

    @property
    def cov(self):
        return self.scatter / (self.n - 1)

    def update(self, features, numbers=None):
        """Take in features [B, D], B > 0; those numbered below `keep` (int64 [B]) go into `.rows`. UserError on NaN."""
        x = features.detach().to(self.mean)
        if not x.isfinite().all():
            raise UserError("the features are not finite: look for NaN or infinity in the pictures or the weights")
        total, mean = self.n + len(x), x.mean(0)
        shift = mean - self.mean
        # Chan et al. 1979, (n, mean, scatter) merged; raw moments would cancel where the mean is large.
        self.scatter += (x - mean).T @ (x - mean) + torch.outer(shift, shift) * (self.n * len(x) / total)
        self.n, self.mean = total, self.mean + shift * (len(x) / total)
        if numbers is not None:
            kept = numbers < len(self.rows)
            self.rows[numbers[kept]] = x[kept].float()

    def reduce(self):
        """Turn each rank's share, of whatever size, into the statistics of all ranks. Call it once, at the end."""
        if dist.is_initialized():
            totals = torch.cat([self.mean * self.n, self.mean.new_tensor([self.n])])
            dist.all_reduce(totals)
            shift = self.mean - totals[:-1] / totals[-1]
            self.scatter += torch.outer(shift, shift) * self.n
            dist.all_reduce(self.scatter)
            dist.all_reduce(self.rows)  # each row is zero on all ranks but one
            self.n, self.mean = int(totals[-1]), totals[:-1] / totals[-1]
        return self


def frechet(a, b, scale=1.0):
    """|m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2) of two Stats, of features / scale [D]; UserError if n < 2."""
    if min(a.n, b.n) < 2:
        raise UserError(f"a Fréchet distance needs at least 2 pictures on each side, not {a.n} and {b.n}")
    scale = torch.as_tensor(scale, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(torch.stack([a.cov.cpu(), b.cov.cpu()]) / (scale * scale[..., None]))
    roots = vectors * values.clamp(min=0).sqrt()[:, None]  # L with L L^T = S
    # tr (S1 S2)^(1/2) is the nuclear norm of L1^T L2: real, and exact for singular S too, where sqrtm breaks down.
    cross = torch.linalg.svdvals(roots[0].T @ roots[1]).sum()
    shift = (a.mean.cpu() - b.mean.cpu()) / scale
    return max(0.0, float(shift.square().sum() + roots.square().sum() - 2 * cross))


def inception_score(logits, splits=10):
    """exp E_x KL(p(y|x) || p(y)) of logits [N >= splits, K] in random order: (mean, population std) over the splits."""
    n, scores = len(logits), []
    for i in range(splits):
        log_p = logits[i * n // splits : (i + 1) * n // splits].double().log_softmax(1)
        log_marginal = log_p.logsumexp(0) - math.log(len(log_p))
        scores.append(float((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def kid(real, fake, subsets=100, size=1000, seed=0):
    """MMD^2 under (x.y / D + 1)^3 of features [N, D], [M, D]: (mean, std) over random subsets of <= size; unbiased."""
    draw, values = torch.Generator().manual_seed(seed), []
    for _ in range(subsets):
        x, y = (rows[torch.randperm(len(rows), generator=draw)[:size]].double() for rows in (real, fake))
        xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = sum((k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (xx, yy))
        values.append(float(within - 2 * xy.mean()))
    return float(np.mean(values)), float(np.std(values))


def _balls(centres, points, k):
    """Which points [M, D] lie no farther from a centre [N, D] than the k-th nearest other centre: bool [N, M]."""
    blocks = centres.split(1000)
    # The nearest centre of all is the centre itself.
    radii = (torch.cdist(block, centres).kthvalue(k + 1, keepdim=True).values for block in blocks)
    return torch.cat([torch.cdist(block, points) <= radius for block, radius in zip(blocks, radii, strict=True)])


def prdc(real, fake, k=5):
    """Precision, recall, density, coverage of features [N, D], [M, D], with N, M > k."""
    real, fake = real.double(), fake.double()  # float32 would decide wrongly for copies
    around_real, around_fake = _balls(real, fake, k), _balls(fake, real, k)
    shares = {"precision": around_real.any(0), "recall": around_fake.any(0), "coverage": around_real.any(1)}
    return {key: float(x.double().mean()) for key, x in (shares | {"density": around_real.sum(0).double() / k}).items()}


def _measure(net, pictures, n, logits=None):
    """Stats of n pictures, chunks shared over the ranks; pictures(chunk, m) gives [m, 3, S, S]; fills logits [n, K]."""
    numbers = torch.from_numpy(np.random.RandomState(0).permutation(n))  # shuffled: folders come sorted by class
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    stats = Stats(net.dim, net.device, keep=min(n, KEPT))
    for chunk in range(rank, math.ceil(n / CHUNK), world):
        part = numbers[chunk * CHUNK :][:CHUNK]
        features, scores = net(pictures(chunk, len(part)))
        stats.update(features, part)
        if logits is not None:
            logits[part] = scores
    if logits is not None and dist.is_initialized():
        dist.all_reduce(logits)
    return stats.reduce()


def _real_statistics(net, data, first):
    """Stats of the real set, from a file whose name changes with the network, its weights and resize, and the data."""
    n, size = data.images.shape[:2]
    path, stats = Path(data.cache, f"{net.name}-{data.key}-{data.split}-{size}-{n}.pt"), [Stats(0)]
    with suppress(Exception):  # absent, or broken in any way: measured afresh
        vars(stats[0]).update(torch.load(path, map_location="cpu", weights_only=True))
    if dist.is_initialized():
        dist.broadcast_object_list(stats)  # the first rank's word, or those that found none would wait for the rest
    if not stats[0].n:
        stats = [_measure(net, lambda chunk, m: data.images[chunk * CHUNK :][:m].permute(0, 3, 1, 2), n)]
        if first:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(vars(stats[0]), temporary := path.with_suffix(f".tmp-{os.getpid()}"))
            temporary.replace(path)  # a killed run leaves the old file or the new one, never half of it
    return stats[0]


def evaluate(sample, data, samples=50_000, features="inception", device="cpu", weights=None, full=True):
    """Judge a sampler against all of a data set (common.data.Data). All ranks call it and get the same numbers.

    sample: (chunk number, n) -> [n, 3, S, S] in [-1, 1], rounded to uint8 here as in a file; if the chunk number keys
    its noise, the world size does not matter. features: "inception" or "random". full=False: only the first of these:
    `fid` or `fd_random`, `inception_score` (Inception, natural pictures), `kid`, both also with `_std`, `precision_k3`,
    `recall_k3`, `density_k5`, `coverage_k5` (or `kid_random`, `precision_random_k3`, ...). From `kid` on they read
    min(10,000, n_real, n_fake) pictures of each side. A key ends in its number of pictures unless 50,000, or 10,000.
    """
    random, first = features == "random", not dist.is_initialized() or dist.get_rank() == 0
    net = RandomFeatures(device) if random else Inception(weights, device)
    distance, tag = ("fd_random", "_random") if random else ("fid", "")
    if first and (few := min(samples, len(data.images))) < 2 * net.dim:
        print(f"{distance}: {few} pictures are few for {net.dim} features, the value is far too high", file=sys.stderr)

    def generated(chunk, m):
        x = sample(chunk, m).detach().float()
        assert x.shape == (m, 3, *data.images.shape[1:3]), f"sample returned {tuple(x.shape)}"
        if not x.isfinite().all():
            raise UserError("the samples are not finite: the model has diverged, go back to an earlier checkpoint")
        return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    real = _real_statistics(net, data, first)
    logits = torch.zeros(samples, 1008, device=device) if full and not random else None
    fake = _measure(net, generated, samples, logits)
    scale = net.scale(real) if random else torch.ones(net.dim)
    end = "" if samples == 50_000 else f"_{samples}"
    out = {distance + end: frechet(real, fake, scale)}
    if logits is not None and samples >= 10 and data.name not in UNLIKE_IMAGENET:
        out[f"inception_score{end}"], out[f"inception_score_std{end}"] = inception_score(logits)
    if full and (m := min(len(real.rows), len(fake.rows))) > 5:
        a, b = ((stats.rows[:m].cpu() / scale).to(device) for stats in (real, fake))
        end = "" if m == KEPT else f"_{m}"
        out[f"kid{tag}{end}"], out[f"kid{tag}_std{end}"] = kid(a, b)
        for k, keys in ((3, ("precision", "recall")), (5, ("density", "coverage"))):
            out |= {f"{key}{tag}_k{k}{end}": value for key, value in prdc(a, b, k).items() if key in keys}
    return out | {"n_real": real.n, "n_fake": fake.n, "split": data.split, "resize": net.resize, "features": net.name}
