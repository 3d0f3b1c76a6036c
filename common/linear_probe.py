"""What has an encoder learnt? Frozen features in, accuracy (0 to 1) out: a linear classifier, and weighted k-NN.

With features of un-augmented pictures the linear probe is a convex problem: it is solved, not tuned. The processes of a
distributed run extract a share of the features each, gather them, and all solve the same small problem.
"""

import math
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from common.data import UserError, batches
from common.fid import RandomFeatures, full_precision


@torch.no_grad()
def _features(encoder, pictures):
    """Yields [m, D] for each batch; those modules that were training are in eval mode meanwhile."""
    training = [m for m in encoder.modules() if m.training] if isinstance(encoder, torch.nn.Module) else []
    try:
        for module in training:
            module.training = False
        for x in pictures:
            z = encoder(x).float()
            yield z.flatten(2).mean(2) if z.dim() > 2 else z
    finally:
        for module in training:
            module.training = True


def extract(encoder, data, device="cpu", batch=256):
    """Features and labels of a data set in order: x float32 [N, D], y int64 [N] or None; UserError if x is not finite.

    The encoder maps [B, 3, S, S] in [-1, 1] to [B, D], or to [B, D, h, w], which is average-pooled, in eval mode.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    parts = torch.arange(rank, len(data), world).split(batch)
    pictures = (data.images[rows].to(device).permute(0, 3, 1, 2).float() / 127.5 - 1 for rows in parts)
    x = torch.cat(list(_features(encoder, pictures)))
    if world > 1:
        share, x = x, x.new_zeros(len(data), x.shape[1])
        x[rank::world] = share
        dist.all_reduce(x)  # each row is zero on all ranks but one
    if not x.isfinite().all():
        raise UserError("the encoder's features are not finite: evaluate a checkpoint from before it diverged")
    return x, None if data.labels is None else data.labels.to(device)


def calibrate(encoder, data, device="cpu", batch=256):
    """Sets a module's batch-norm statistics, in place, to their average over 10,000 pictures; no weight changes."""
    shuffled = batches(data, batch, seed=0, flip=False, device=device, rank=0, world=1)  # folders are sorted by class
    torch.optim.swa_utils.update_bn(islice(shuffled, max(1, min(len(data), 10_000) // batch)), encoder)


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


@full_precision()
def fit(x, y, l2, classes, start=None, tolerance=1e-5, limit=500):
    """Logistic regression, x [N, D], y [N], at S strengths l2 [S] > 0: W [S, D, K], b [S, K], gradient [S].

    Minimises `_objective` from `start` [S, D + 1, K] or 0 until no entry of the gradient exceeds `tolerance`, or for
    `limit` steps; returns the largest entry left. L-BFGS sees v, W = R^-T v, where R R^T = x^T x / 2N + l2: for centred
    x that is Böhning's bound (1992) of the Hessian, and the identity bounds it in v.
    """
    bound = torch.block_diag(x.T @ x / (2 * len(x)), x.new_ones(1, 1))
    rounding = 10 * torch.finfo(x.dtype).eps * bound.trace()  # keeps a singular matrix positive
    root = torch.linalg.cholesky(bound + (l2 + rounding)[:, None, None] * torch.eye(len(bound), device=x.device))
    on = torch.arange(len(l2), device=x.device)  # strengths that have arrived leave it, and cost nothing more

    def evaluate(W):
        f, gradient = _objective(x, y, W, l2[on])
        return W, f, torch.linalg.solve_triangular(root, gradient, upper=False), gradient.abs().amax((1, 2))

    W, f, g, worst = evaluate(x.new_zeros(len(l2), len(bound), classes) if start is None else start)
    step, gamma, history = torch.ones_like(l2), 1, []
    for _ in range(limit):
        left = worst[on] > tolerance
        if not left.any():
            break
        on, root = (on, root) if left.all() else (on[left], root[left])
        d, before = step[:, None, None] * _direction(g, history, gamma), g
        new = evaluate(W[on] + torch.linalg.solve_triangular(root.mT, d[on], upper=True))
        armijo = f + 1e-4 * (g * d).sum((1, 2)) + 1e-7 * f.abs()  # the last term is for float32's rounding
        accept = new[1] <= armijo[on]
        moved = on[accept]
        W, f, g, worst = (a.index_copy(0, moved, b[accept]) for a, b in zip((W, f, g, worst), new, strict=True))
        step = (step / 2).index_fill(0, moved, 1)
        s, change = torch.zeros_like(d).index_copy(0, moved, d[moved]), g - before
        curvature, square = (s * change).sum((1, 2), keepdim=True), change.square().sum((1, 2), keepdim=True)
        useful = curvature > 1e-12 * square
        history = [*history[-9:], (s, change, torch.where(useful, 1 / curvature, 0))]  # 0: the pair counts for nothing
        gamma = torch.where(useful, curvature / square, gamma)
    return W[:, :-1], W[:, -1], worst


def _accuracy(x, y, W, b, k=1):
    best = torch.einsum("nd,sdk->snk", x, W).add_(b[:, None]).topk(k).indices  # [S, N, k]
    return (best == y[:, None]).any(2).double().mean(1)  # [S]


def _held_out(y, seed):
    """A tenth of every class, but at most 50,000 pictures, and never a class's only one: bool [N]."""
    y, share = y.cpu(), min(0.1, 50_000 / len(y))
    order = torch.from_numpy(np.random.default_rng([seed, 1]).permutation(len(y)))
    classes = [order[y[order] == label] for label in y.unique()]
    held = torch.cat([rows[: min(max(1, int(len(rows) * share)), len(rows) - 1)] for rows in classes])
    return torch.zeros(len(y), dtype=torch.bool).index_fill(0, held, True)


def _standardiser(x):
    """(x - mean) / std by the statistics of x, in place; what is constant but for rounding becomes 0."""
    std, mean = torch.std_mean(x, 0, correction=0)
    std = std.where(std > 1e-5 * std.max(), torch.inf)
    return lambda z: z.sub_(mean).div_(std)


def probe(train, test, seed=0, l2=(1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0), crelu=False):
    """Linear classification, train and test = (x [N, D], y [N]): {top1, top5 if K >= 100, l2, edge, dim, converged}.

    Fits every strength l2 (1 / (C N) in scikit-learn's terms) on nine tenths of train, picks the best on the rest (of
    equals the strongest), refits it on all of train. `edge`: 1 where it is the sweep's first or last. `crelu`: reads
    [relu(z), relu(-z)] of the standardised features z (BigBiGAN's BN + CReLU).
    """
    held, l2 = _held_out(train[1], seed), train[0].new_tensor(sorted(l2))
    order, n = held.int().argsort(stable=True).to(train[0].device), int((~held).sum())
    x, y = train[0][order], train[1][order]  # the first n are fitted, the others pick the strength
    standardise = _standardiser(x[:n])
    x, test_x = standardise(x), standardise(test[0].clone())
    if crelu:
        x, test_x = (torch.cat([z.relu(), z.neg().relu_()], 1) for z in (x, test_x))
    classes = int(y.max()) + 1
    W, b, sweep = fit(x[:n], y[:n], l2, classes, tolerance=1e-4)  # enough to compare accuracies
    best = len(l2) - 1 - int(_accuracy(x[n:], y[n:], W, b).flip(0).argmax())  # argmax finds the first of equals
    W, b, last = fit(x, y, l2[[best]], classes, start=torch.cat([W, b[:, None]], 1)[[best]])
    result = {f"top{k}": float(_accuracy(test_x, test[1], W, b, k)) for k in ((1, 5) if classes >= 100 else (1,))}
    result |= {"l2": float(l2[best]), "edge": float(best in (0, len(l2) - 1)), "dim": x.shape[1]}
    return result | {"converged": float(sweep.max() <= 1e-4 and last <= 1e-5)}


@full_precision()
def knn(train, test_x, k=20, temperature=0.07):
    """Labels int64 [M] of test_x [M, D]: votes of the k nearest in train (x [N, D], y [N]) as in DINO; ties: lowest."""
    (x, y), labels = (F.normalize(train[0], dim=1), train[1]), []
    for part in F.normalize(test_x, dim=1).split(max(1, 2**25 // len(x))):  # bounds the cosines to 128 MiB
        cosine, neighbours = (part @ x.T).topk(min(k, len(x)))
        weights = ((cosine - cosine[:, :1]) / temperature).exp()  # relative to the nearest's, so no T can overflow
        votes = weights.new_zeros(len(part), int(y.max()) + 1).scatter_add_(1, y[neighbours], weights)  # [m, K]
        labels.append(votes.argmax(1))
    return torch.cat(labels)


def sgd_probe(encoder, augmented, held_out, test, steps, device="cpu", rates=(3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)):
    """The papers' protocol for ImageNet, SGD on the features of augmented pictures: {top1, rate, dim}.

    `augmented`: batches (pictures [m, (views,) 3, S, S] in [-1, 1], labels [m], ...) that `held_out` lacks. All rates
    are trained at once, momentum 0.9, cosine schedule; the accuracy on `held_out` picks one. `held_out` and `test` have
    the evaluation size. Features are standardised by held_out's statistics (batch norm without affine).
    """
    x, y = extract(encoder, held_out, device)
    standardise, rate = _standardiser(x), torch.tensor(rates, device=device)
    W, velocity = torch.zeros(2, len(rates), x.shape[1] + 1, len(held_out.classes), device=device)
    for step, (pictures, labels, *_) in zip(range(steps), augmented, strict=False):
        (z,) = _features(encoder, [pictures.flatten(0, -4)])  # [m views, D]
        _, gradient = _objective(standardise(z), labels.repeat_interleave(len(z) // len(labels)), W, 0 * rate)
        if dist.is_initialized():
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
        velocity = 0.9 * velocity + gradient
        W -= rate[:, None, None] * (1 + math.cos(math.pi * step / steps)) / 2 * velocity
    best = [int(_accuracy(standardise(x), y, W[:, :-1], W[:, -1]).argmax())]
    x, y = extract(encoder, test, device)
    top1 = _accuracy(standardise(x), y, W[best, :-1], W[best, -1])
    return {"top1": float(top1), "rate": rates[best[0]], "dim": x.shape[1]}


def evaluate(encoder, train, test, untrained=None, device="cpu", crelu=False):
    """Probe and k-NN of an encoder beside their yardsticks, flat: probe_top1, knn_top1, chance, ...; needs labels.

    `untrained`: the same with its first weights; `calibrate` changes it. `crelu` adds the probe of BN + CReLU.
    """
    chance = float(test.require_labels().bincount().max() / len(test))
    result = {"chance": chance, "n_train": len(train.require_labels()), "n_test": len(test)}
    random = RandomFeatures(device)
    encoders = {
        "": encoder,
        "raw_pixels_": lambda x: F.interpolate(x, size=min(x.shape[-1], 32), mode="area").flatten(1),
        "random_features_": lambda x: random(((x + 1) * 127.5).round().to(torch.uint8))[0],
    }
    if untrained is not None:
        calibrate(untrained, train, device)
        encoders["untrained_"] = untrained
    for prefix, measured in encoders.items():
        fitting, testing = extract(measured, train, device), extract(measured, test, device)
        for name in ("probe", "crelu_probe") if crelu and not prefix else ("probe",):
            scores = probe(fitting, testing, crelu=name == "crelu_probe")
            result |= {f"{prefix}{name}_{key}": value for key, value in scores.items()}
        if prefix in ("", "untrained_"):
            result[f"{prefix}knn_top1"] = float((knn(fitting, testing[0]) == testing[1]).double().mean())
    return result | {"converged": min(value for key, value in result.items() if key.endswith("converged"))}
