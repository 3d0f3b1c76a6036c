"""What has an encoder learnt? Frozen features in, accuracy (0 to 1) out: a linear classifier, and weighted k-NN.

With the features of un-augmented pictures the linear probe is a convex problem, so it is solved instead of tuned. The
processes of a distributed run extract a share of the features each, gather them, and all solve the same small problem.
"""

import math
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from common.data import UserError

STRENGTHS = tuple(10.0**e for e in range(-6, 1))  # l2 = 1 / (C N) in scikit-learn's terms


def _pictures(data, rows, device, batch=256):
    for part in rows.split(batch):
        yield data.images[part].to(device).permute(0, 3, 1, 2).float() / 127.5 - 1  # [m, 3, S, S] in [-1, 1]


@torch.no_grad()
def _features(encoder, pictures, training=False):
    """Yields [m, D] for each batch; modules are in eval (or train) mode meanwhile, then each in its own again."""
    modes = {module: module.training for module in encoder.modules()} if isinstance(encoder, nn.Module) else {}
    try:
        for module in modes:
            module.training = training
        for x in pictures:
            z = encoder(x).float()
            yield z.flatten(2).mean(2) if z.dim() > 2 else z
    finally:
        for module, mode in modes.items():
            module.training = mode


def extract(encoder, data, device="cpu", batch=256, rows=None):
    """Features and labels of a data set (or of its `rows`) in order: x float32 [N, D], y int64 [N] or None.

    The encoder, on `device`, maps [B, 3, S, S] in [-1, 1] to [B, D], or to [B, D, h, w], which is average-pooled; a
    module runs in eval mode and gets its modes back. UserError where a feature is not finite.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rows = torch.arange(len(data)) if rows is None else rows
    share = rows[torch.arange(rank, math.ceil(len(rows) / world) * world, world) % len(rows)]  # as long on every rank
    x = torch.cat(list(_features(encoder, _pictures(data, share, device, batch))))
    if world > 1:
        shares = [torch.empty_like(x) for _ in range(world)]
        dist.all_gather(shares, x.contiguous())
        x = torch.stack(shares, 1).flatten(0, 1)[: len(rows)]  # cuts again what made the shares equally long
    if not x.isfinite().all():
        raise UserError("the encoder's features are not finite: evaluate a checkpoint from before it diverged")
    return x, None if data.labels is None else data.labels[rows].to(device)


def calibrate(encoder, data, device="cpu", batch=256):
    """Sets a module's batch-norm statistics, in place, to their average over 10,000 pictures; no weight changes."""
    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # PyTorch's word for the plain average of all batches
    rows = torch.from_numpy(np.random.default_rng(0).permutation(len(data))[:10_000])  # folders are sorted by class
    rows = rows[: len(rows) // batch * batch or None]  # a short last batch would weigh too much
    for _ in _features(encoder, _pictures(data, rows, device, batch), training=True):
        pass


@contextmanager
def _full_precision():
    """No TF32: with its rounding the gradient never gets small enough, and neighbours change places."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _objective(x, y, W, l2):
    """f_s [S] and its gradient [S, D + 1, K]: mean CE(x W_s + b_s, y) + l2_s/2 ||W_s||², with b as W's last row."""
    S, _, K = W.shape
    flat = W.transpose(0, 1).flatten(1)  # [D + 1, S K]: one product serves all strengths
    loss, gradient = 0, torch.zeros_like(flat)
    rows = max(1, 2**24 // (S * K))  # bounds the logits to 64 MiB
    for part, labels in zip(x.split(rows), y.split(rows), strict=True):
        log_p = torch.addmm(flat[-1], part, flat[:-1]).view(-1, S, K).log_softmax(2)
        loss = loss - log_p.gather(2, labels[:, None, None].expand(-1, S, 1)).sum((0, 2), dtype=torch.float64)
        residual = (log_p.exp_() - F.one_hot(labels, K)[:, None]).flatten(1)
        gradient[:-1].addmm_(part.T, residual)
        gradient[-1] += residual.sum(0)
    decay = F.pad(W[:, :-1], (0, 0, 0, 1))  # the bias is free
    f = loss / len(x) + l2 / 2 * decay.square().sum((1, 2), dtype=torch.float64)
    return f, gradient.unflatten(1, (S, K)).transpose(0, 1) / len(x) + l2[:, None, None] * decay


def _direction(gradient, history, gamma):
    """L-BFGS's two loops, -H g (Nocedal and Wright, algorithm 7.4), for all strengths at once."""
    d, weights = -gradient, []
    for s, y, rho in reversed(history):
        weights.append(rho * (s * d).sum((1, 2), keepdim=True))
        d = d - weights[-1] * y
    d = gamma * d
    for s, y, rho in history:
        d = d + (weights.pop() - rho * (y * d).sum((1, 2), keepdim=True)) * s
    return d


@torch.no_grad()
@_full_precision()
def fit(x, y, l2, classes, start=None, tolerance=1e-5, limit=500):
    """Logistic regression, x [N, D], y [N], at S strengths l2 [S] > 0: W [S, D, K], b [S, K], gradient [S].

    Minimises `_objective` until no entry of the gradient exceeds `tolerance`, or for `limit` steps, from `start`
    [S, D + 1, K] or 0, and returns the largest entry left. With w, A the eigenvalues and -vectors of x^T x / N, L-BFGS
    sees v, W = A v / sqrt(w/2 + l2), in which Böhning's bound (1992) of the Hessian is the identity, if x is centred.
    """
    w, axes = torch.linalg.eigh(x.T @ x / len(x))
    scale = F.pad((w.clamp(min=0) / 2 + l2[:, None]).sqrt()[..., None], (0, 0, 0, 1), value=1)  # [S, D + 1, 1]

    def turn(axes, W):
        return torch.cat([torch.einsum("de,sek->sdk", axes, W[:, :-1]), W[:, -1:]], 1)

    def evaluate(v, on):
        f, gradient = _objective(x, y, turn(axes, v / scale[on]), l2[on])
        return f, turn(axes.T, gradient) / scale[on], gradient.abs().amax((1, 2))

    v = x.new_zeros(len(l2), x.shape[1] + 1, classes) if start is None else turn(axes.T, start) * scale
    f, g, worst = evaluate(v, torch.arange(len(l2), device=x.device))
    step, gamma, history = torch.ones_like(l2), 1, []
    for _ in range(limit):
        active = worst > tolerance
        on = active.nonzero().flatten()  # strengths that have arrived cost nothing more
        if len(on) == 0:
            break
        d = step[:, None, None] * _direction(g, history, gamma)
        new = evaluate((v + d)[on], on)
        f_new, g_new, worst_new = (a.index_copy(0, on, b) for a, b in zip((f, g, worst), new, strict=True))
        armijo = f + 1e-4 * (g * d).sum((1, 2)) + 1e-7 * f.abs()  # the last term is for float32's rounding
        accept = active & (f_new <= armijo)
        mask = accept[:, None, None]
        s, change = torch.where(mask, d, 0), torch.where(mask, g_new - g, 0)
        curvature, square = (s * change).sum((1, 2), keepdim=True), change.square().sum((1, 2), keepdim=True)
        useful = curvature > 1e-12 * square
        history = [*history[-9:], (s, change, torch.where(useful, 1 / curvature, 0))]  # 0: the pair counts for nothing
        gamma = torch.where(useful, curvature / square, gamma)
        v, g, step = v + s, torch.where(mask, g_new, g), torch.where(accept, 1, step / 2)
        f, worst = torch.where(accept, f_new, f), torch.where(accept, worst_new, worst)
    W = turn(axes, v / scale)
    return W[:, :-1], W[:, -1], worst


def _accuracy(x, y, W, b, k=1):
    best = torch.einsum("nd,sdk->snk", x, W).add_(b[:, None]).topk(k).indices  # [S, N, k]
    return (best == y[:, None]).any(2).double().mean(1)  # [S]


def _held_out(y, seed):
    """A tenth of every class, but at most 50,000 pictures, and never a class's only one: bool [N]."""
    y, held = y.cpu(), torch.zeros(len(y), dtype=torch.bool)
    order = torch.from_numpy(np.random.default_rng([seed, 1]).permutation(len(y)))
    for label in y.unique():
        rows = order[y[order] == label]
        held[rows[: min(max(1, int(len(rows) * min(0.1, 50_000 / len(y)))), len(rows) - 1)]] = True
    return held


def _standardiser(x):
    """(x - mean) / std by the statistics of x, in place; what is constant but for rounding becomes 0."""
    variance, mean = torch.var_mean(x, 0, correction=0)
    std = variance.sqrt()
    gain = torch.where(std > 1e-5 * std.max(), 1 / std, 0)
    return lambda z: z.sub_(mean).mul_(gain)


def _crelu(z):
    return torch.cat([z.relu(), z.neg().relu_()], 1)


def probe(train, test, seed=0, l2=STRENGTHS, crelu=False):
    """Linear classification, train and test = (x [N, D], y [N]): {top1, top5 if K >= 100, l2, dim, converged, ...}.

    Fits every strength on nine tenths of train, picks the best on the rest (of equals the strongest), refits it on all
    of train and reports the accuracy on test. `edge` is 1 where the pick is the sweep's first or last. With `crelu` the
    classifier reads [relu(z), relu(-z)] of the standardised features z (BigBiGAN's BN + CReLU).
    """
    held, l2 = _held_out(train[1], seed), train[0].new_tensor(sorted(l2))
    order, n = held.int().argsort(stable=True).to(train[0].device), int((~held).sum())
    x, y = train[0][order], train[1][order]  # the first n are fitted, the others pick the strength
    standardise = _standardiser(x[:n])
    x, test_x = standardise(x), standardise(test[0].clone())
    if crelu:
        x, test_x = _crelu(x), _crelu(test_x)
    classes = int(y.max()) + 1
    W, b, gradient = fit(x[:n], y[:n], l2, classes)
    accuracy = _accuracy(x[n:], y[n:], W, b).tolist()
    best = max(range(len(l2)), key=lambda s: (accuracy[s], s))
    W, b, last = fit(x, y, l2[[best]], classes, start=torch.cat([W, b[:, None]], 1)[[best]])
    result = {"top1": float(_accuracy(test_x, test[1], W, b))}
    if classes >= 100:
        result["top5"] = float(_accuracy(test_x, test[1], W, b, k=5))
    left = float(torch.cat([gradient, last]).max())
    edge = float(best in (0, len(l2) - 1))
    return result | {
        "l2": float(l2[best]),
        "edge": edge,
        "dim": x.shape[1],
        "gradient": left,
        "converged": float(left <= 1e-5),
    }


def _votes(x, y, test_x, k, temperature):
    cosine, neighbours = (test_x @ x.T).topk(min(k, len(x)))
    weights = ((cosine - cosine[:, :1]) / temperature).exp()  # relative to the nearest's, so no T can overflow
    return weights.new_zeros(len(test_x), int(y.max()) + 1).scatter_add_(1, y[neighbours], weights)  # [m, K]


@_full_precision()
def knn(train, test_x, k=20, temperature=0.07):
    """Weighted k-NN (Wu et al. 2018, as in DINO) of train = (x [N, D], y [N]) for test_x [M, D]: labels int64 [M].

    The k nearest by cosine vote with exp(cosine / temperature); of equal classes the lowest wins.
    """
    x, y = F.normalize(train[0], dim=1), train[1]
    parts = F.normalize(test_x, dim=1).split(max(1, 2**25 // len(x)))  # bounds the cosines to 128 MiB
    return torch.cat([_votes(x, y, part, k, temperature).argmax(1) for part in parts])


@torch.no_grad()
def sgd_probe(encoder, batches, train, test, steps, device="cpu", rates=(3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0), seed=0):
    """The papers' protocol for ImageNet: a linear layer, trained by SGD on features of augmented pictures of train.

    `batches` is `common.data.batches` of train's pictures, with crop = (views, size, ...) or without; train and test
    have the evaluation size. Features standardised (batch norm without affine), momentum 0.9, cosine schedule, all
    learning rates at once; the one that is best on a tenth of train, never learnt from, is reported on test.
    """
    held = _held_out(train.require_labels(), seed).to(device)
    x, y = extract(encoder, train, device, rows=held.nonzero().flatten().cpu())
    standardise = _standardiser(x)
    rate, none = torch.tensor(rates, device=device)[:, None, None], torch.zeros(len(rates), device=device)
    W = torch.zeros(len(rates), x.shape[1] + 1, int(train.labels.max()) + 1, device=device)
    velocity = torch.zeros_like(W)
    for step, (pictures, labels, i) in zip(range(steps), batches, strict=False):
        pictures, labels = pictures[~held[i]], labels[~held[i]]
        (z,) = _features(encoder, [pictures.flatten(0, -4)])  # [m views, D]
        _, gradient = _objective(standardise(z), labels.repeat_interleave(len(z) // len(labels)), W, none)
        if dist.is_initialized():
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
        velocity = 0.9 * velocity + gradient
        W -= rate * (1 + math.cos(math.pi * step / steps)) / 2 * velocity
    accuracy = _accuracy(standardise(x), y, W[:, :-1], W[:, -1])
    best = [int(accuracy.argmax())]
    x, y = extract(encoder, test, device)
    top1 = _accuracy(standardise(x), y, W[best, :-1], W[best, -1])
    return {"top1": float(top1), "rate": rates[best[0]], "dim": x.shape[1]}


def evaluate(encoder, train, test, untrained=None, device="cpu", crelu=False):
    """Probe and k-NN of an encoder (see `extract`) beside their yardsticks, flat: probe_top1, knn_top1, chance, ...

    `untrained`: the same module with its first weights; `calibrate` changes its batch-norm statistics. `crelu` adds the
    probe of BN + CReLU. UserError without labels.
    """
    from common.fid import RandomFeatures

    chance = float(test.require_labels().bincount().max() / len(test))
    result = {"chance": chance, "n_train": len(train.require_labels()), "n_test": len(test)}

    def measure(prefix, encoder, neighbours=True, crelu=False):
        fitting, testing = extract(encoder, train, device), extract(encoder, test, device)
        for name in ("probe", "crelu_probe") if crelu else ("probe",):
            scores = probe(fitting, testing, crelu=name == "crelu_probe")
            result.update({f"{prefix}{name}_{key}": value for key, value in scores.items()})
        if neighbours:
            result[f"{prefix}knn_top1"] = float((knn(fitting, testing[0]) == testing[1]).double().mean())

    measure("", encoder, crelu=crelu)
    if untrained is not None:
        calibrate(untrained, train, device)
        measure("untrained_", untrained)
    random = RandomFeatures(device)
    measure("raw_pixels_", lambda x: F.interpolate(x, size=min(x.shape[-1], 32), mode="area").flatten(1), False)
    measure("random_features_", lambda x: random(((x + 1) * 127.5).round().to(torch.uint8))[0], False)
    return result | {"converged": min(value for key, value in result.items() if key.endswith("converged"))}
