"""beta_vae.py against its papers: parameter counts, the two objectives, the metrics of disentanglement, official code.

About a minute on one core, half of it the shortened demo.
"""

import json
import math
import sys
from dataclasses import replace
from functools import partial
from itertools import islice
from unittest import mock

import numpy as np
import pytest
import torch
from fill import fill_, inputs, values
from test_parity import agree, filled
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import beta_vae
from common import linear_probe
from common.data import DSPRITES, Data, UserError, draw_dsprites, load


def arguments(*flags):
    """What main() makes of a command line."""
    with mock.patch.object(sys, "argv", ["beta_vae.py", "--device", "cpu", "--precision", "fp32", *map(str, flags)]):
        args = beta_vae.parse()
    beta_vae.start(args)
    return args


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------ sizes
COUNTS = {  # net, channels, size, z_dim: parameters of the encoder and of the decoder
    ("mlp", 1, 64, 10): (6_381_620, 7_814_896),
    ("higgins", 3, 64, 32): (395_264, 387_971),
    ("higgins", 1, 64, 32): (394_240, 386_945),
    ("higgins", 3, 64, 10): (383_956, 382_339),
    ("higgins", 3, 32, 32): (329_664, 322_371),
    ("burgess", 1, 64, 10): (252_052, 249_953),
    ("burgess", 3, 64, 32): (264_384, 256_611),
    ("burgess", 3, 32, 10): (236_660, 234_563),
    ("burgess", 3, 32, 32): (247_968, 240_195),
    ("burgess", 1, 32, 10): (235_636, 233_537),
    ("burgess", 3, 32, 128): (297_312, 264_771),
}


def networks(net, channels, size, z_dim):
    return [network(net, channels, size, z_dim) for network in (beta_vae.Encoder, beta_vae.Decoder)]


@pytest.mark.parametrize("layout", COUNTS)
def test_parameter_counts(layout):
    with torch.device("meta"):
        E, D = networks(*layout)
        mu, logvar = E(torch.empty(2, *layout[1:2], layout[2], layout[2]))
        assert mu.shape == logvar.shape == (2, layout[3]) and D(mu).shape == (2, layout[1], layout[2], layout[2])
    assert (count(E), count(D)) == COUNTS[layout]


@pytest.mark.parametrize("size", beta_vae.SIZES)
@pytest.mark.parametrize("net", ["mlp", "higgins", "burgess"])
def test_shapes(net, size):
    with torch.device("meta"):
        E, D = networks(net, 1, size, 7)
        assert D(E(torch.empty(2, 1, size, size))[0]).shape == (2, 1, size, size)


def test_the_presets_are_the_papers():
    args = arguments("--data", "dsprites")
    wanted = dict(net="mlp", channels=1, size=64, z_dim=10, recon="bernoulli", objective="beta", beta=4)
    wanted |= dict(optimiser="adagrad", lr=1e-2, gamma=1000, capacity=25, anneal=100_000)
    assert {name: getattr(args, name) for name in wanted} == wanted
    args = arguments("--data", "celeba")
    wanted |= dict(net="higgins", channels=3, z_dim=32, recon="gaussian", beta=10, optimiser="adam", lr=1e-4)
    wanted |= dict(gamma=10_000, capacity=50)
    assert {name: getattr(args, name) for name in wanted} == wanted
    args = arguments("--data", "cifar10")
    wanted |= dict(net="burgess", size=32, recon="bernoulli", beta=4, lr=5e-4, batch=128, gamma=100, anneal=19_500)
    assert {name: getattr(args, name) for name in wanted} == wanted and args.steps == 100 * (50_000 // 128)
    assert [arguments("--data", data).channels for data in ("mnist", "fashion_mnist", "shapes")] == [1, 1, 3]
    assert arguments("--data", "chairs", "--grey").channels == 1


def test_activations():
    E, D = networks("mlp", 1, 16, 3)
    assert [type(m) for m in E.layers if not isinstance(m, nn.Linear | nn.Flatten)] == [nn.ReLU] * 2
    assert [type(m) for m in D.layers if not isinstance(m, nn.Linear | nn.Unflatten)] == [nn.Tanh] * 3
    for net in ("higgins", "burgess"):
        for network in networks(net, 1, 32, 3):
            weighted = [
                i for i, m in enumerate(network.layers) if isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)
            ]
            assert all(isinstance(network.layers[i + 1], nn.ReLU) for i in weighted[:-1])
            assert weighted[-1] == len(network.layers) - 1


def test_first_weights():
    """Kaiming's uniform, of variance 2 / inputs."""
    E, D = beta_vae.build(arguments("--z-dim", 32))
    for layer in (E.layers[0], E.layers[2], E.layers[7], D.layers[0], D.layers[4]):
        assert layer.weight.std().item() == pytest.approx((2 / layer.weight[0].numel()) ** 0.5, rel=0.05)
        assert layer.weight.abs().max() <= (6 / layer.weight[0].numel()) ** 0.5


# ------------------------------------------------------------ parity (golden/parity.md, cases 25 and 25h)
@torch.no_grad()
def test_parity_of_burgess():
    """The reference takes mu and logvar by turns from the head, ours by halves: the raw heads must agree."""
    E, D = map(filled, networks("burgess", 1, 64, 10))
    assert count(E, D) == 502_005
    x, z = inputs(25, (4, 1, 64, 64), (4, 10))
    head = E.layers(x)
    agree("25.head", head)
    agree("25.mu_interleaved", head[:, ::2])
    agree("25.logvar_interleaved", head[:, 1::2])
    agree("25.logits", D(z))
    assert torch.equal(torch.cat(E(x), 1), head)


@torch.no_grad()
def test_parity_of_higgins():
    """The reference writes two linear layers as convolutions of 4 x 4 maps, the second with 64 biases, not 1024."""
    E, D = map(fill_, networks("higgins", 3, 64, 32))
    wide = [m for network in (E, D) for m in network.layers if isinstance(m, nn.Linear) and m.weight.numel() == 2**18]
    wide[0].weight.copy_(values((256, 64, 4, 4)).flatten(1))
    wide[1].weight.copy_(values((256, 64, 4, 4)).permute(1, 2, 3, 0).flatten(0, 2))
    wide[1].bias.copy_(values((64,), 1).repeat_interleave(16))
    assert count(E, D) == 782_275 + 960
    x, z = inputs(25, (4, 3, 64, 64), (4, 32))
    agree("25h.head", torch.cat(E(x), 1))
    agree("25h.logits", D(z))


# ------------------------------------------------------------ the objective
def test_kl():
    kl = beta_vae.kl_divergence(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, math.log(4)]]))
    assert kl.tolist() == pytest.approx([0.5, 0.80685], abs=1e-5) and kl.sum().item() == pytest.approx(
        1.30685, abs=1e-5
    )
    mu, logvar = random(5, 3), random(5, 3, seed=1)
    z = mu + (logvar / 2).exp() * random(200_000, 5, 3, seed=2)  # E_q [log q(z) - log p(z)], by sampling
    log_ratio = -0.5 * ((z - mu).square() / logvar.exp() + logvar) + 0.5 * z.square()
    assert torch.allclose(beta_vae.kl_divergence(mu, logvar), log_ratio.mean((0, 1)), atol=0.02)


def test_reconstruction_losses():
    x = (random(2, 1, 64, 64) > 0).double()
    loss = beta_vae.reconstruction_loss
    assert loss(0 * x, x, "bernoulli").item() == pytest.approx(2839.1309, abs=1e-3)
    x, logits = torch.tensor([[0, 1, 0.25]]), torch.tensor([[0, 2.0, -1]])
    assert loss(logits, x, "bernoulli").item() == pytest.approx(1.3833, abs=1e-4)
    x, logits = random(3, 2, 4, 4).sigmoid(), random(3, 2, 4, 4, seed=1)
    p, t = 1 / (1 + np.exp(-logits.numpy())), x.numpy()
    nll = -(t * np.log(p) + (1 - t) * np.log(1 - p))
    assert loss(logits, x, "bernoulli").item() == pytest.approx(nll.sum((1, 2, 3)).mean(), rel=1e-9)
    assert loss(logits, x, "gaussian").item() == pytest.approx(((p - t) ** 2).sum((1, 2, 3)).mean(), rel=1e-9)
    twice = torch.cat([logits, logits]), torch.cat([x, x])
    for recon in ("bernoulli", "gaussian"):
        assert loss(*twice, recon).item() == pytest.approx(loss(logits, x, recon).item(), rel=1e-12)
        floor = beta_vae.reconstruction_floor(x, recon)
        assert loss(x.logit(), x, recon).item() == pytest.approx(floor.item(), abs=1e-9)
        assert loss(x.logit() + 0.1, x, recon) > floor
    assert beta_vae.reconstruction_floor(torch.tensor([[0.0, 1.0]]), "bernoulli") == 0


def test_capacity():
    assert [beta_vae.capacity(t, 25, 1e5) for t in (0, 5e4, 1e5, 3e5)] == [0, 12.5, 25, 25]


def test_objectives():
    args = arguments("--beta", 4, "--gamma", 10, "--capacity", 6, "--anneal", 100)
    value = lambda KL, t: float(beta_vae.objective(args, torch.tensor(7.0), torch.tensor(KL), t))
    assert value(3.0, 50) == 7 + 4 * 3
    args.beta = 8
    assert value(3.0, 50) == 7 + 8 * 3
    args.objective = "capacity"
    assert [value(3.0, 50), value(2.0, 50), value(4.0, 50), value(4.0, 500)] == [7, 17, 17, 27]


# ------------------------------------------------------------ metrics of disentanglement
def test_higgins_feature():
    z1, z2 = torch.tensor([[0, 1, 2], [1, 1, 0.0]]), torch.tensor([[0.5, 1, 4], [1, 3, 0]])
    assert beta_vae.higgins_feature(z1, z2).tolist() == [0.25, 1, 1]


@pytest.fixture
def open_world(monkeypatch):
    """`shapes` whose pictures are their factors, and what was drawn of them."""
    drawn = []
    factors = torch.rand(500, 7, generator=torch.Generator().manual_seed(0))
    factors[:, :2] = (factors[:, :2] * 6).floor()
    labels = torch.arange(500) % 10
    images = torch.zeros(500, 32, 32, 3, dtype=torch.uint8)
    data = Data("shapes", "test", 32, images, "key", None, labels, list("abcdefghij"), factors)
    monkeypatch.setattr(beta_vae, "load", lambda *words: data)
    monkeypatch.setattr(beta_vae, "render_shapes", lambda labels, v, size: drawn.append((labels, v)) or v)
    monkeypatch.setattr(beta_vae, "floats", lambda args, v: v)
    return drawn


def test_pairs_share_one_factor(open_world):
    args, columns = arguments("--metric-pairs", 8), [1, 3, 5, 6]
    features, y = beta_vae.higgins_points(args, {"": lambda v: v}, columns, 40)
    labels, v = open_world[0]
    first, second = v.unflatten(0, (2, 40, 8))
    for i in range(40):
        equal = (first[i] == second[i]).double().mean(0)
        assert equal[columns[y[i]]] == 1 and all(equal[c] < 1 for c in columns[1:] if c != columns[y[i]])
        assert len(first[i, :, columns[y[i]]].unique()) > 2  # drawn anew for each pair
        assert torch.allclose(features[""][i], (first[i] - second[i]).abs().mean(0))
    assert ((v[:, 0] < 3) != (v[:, 1] < 3)).all()  # the figure is never as light or dark as its ground
    assert len(labels.unique()) == 10


def test_higgins_metric_of_the_truth_and_of_noise(open_world):
    args, columns, n = arguments("--metric-pairs", 50), [1, 3, 5, 6], 1500
    noise = torch.Generator().manual_seed(1)
    encoders = {"true": lambda v: v[:, columns], "noise": lambda v: torch.randn(len(v), 4, generator=noise)}
    features, y = beta_vae.higgins_points(args, encoders, columns, n)
    score = lambda x: linear_probe.probe((x[:500], y[:500]), (x[500:], y[500:]))["top1"]
    assert score(features["true"]) == 1
    assert score(features["noise"]) == pytest.approx(0.25, abs=0.05)


def test_dsprites_are_indexed_by_their_factors(monkeypatch):
    """Pairs of dSprites are drawn from its file, whose order is the factors'."""
    assert np.ravel_multi_index((0, 1, 2, 3, 4, 5), DSPRITES) == 330_885

    class Rows:
        def __getitem__(self, rows):
            return torch.from_numpy(np.stack(np.unravel_index(rows, DSPRITES), 1))

        def __len__(self):
            return math.prod(DSPRITES)

    rows = np.random.default_rng(0).integers(math.prod(DSPRITES), size=1000)
    factors = Rows()[rows]
    data = Data("dsprites", "test", 32, Rows(), "key", None, factors[:, 1], list("abc"), factors)
    monkeypatch.setattr(Data, "__len__", lambda self: len(self.factors))
    monkeypatch.setattr(beta_vae, "load", lambda *words: data)
    monkeypatch.setattr(beta_vae, "floats", lambda args, x: x.float())
    seen = []
    args = arguments("--data", "dsprites", "--metric-pairs", 20)
    _, y = beta_vae.higgins_points(args, {"": lambda x: seen.append(x) or x}, [2, 3, 4, 5], 30)
    first, second = seen[0].unflatten(0, (2, 30, 20))
    assert [c for c in range(30) if not torch.equal(first[c, :, 2 + y[c]], second[c, :, 2 + y[c]])] == []
    assert not torch.equal(first[:, :, 1], second[:, :, 1])
    _, v = beta_vae.known(args)
    assert list(v) == ["shape", "scale", "orientation", "x", "y"] and v["x"].max() == 31


def test_mutual_information_gap():
    v = torch.tensor([0, 0, 1, 1])
    gap = lambda *codes: beta_vae.mutual_information_gaps(torch.stack([c.float() for c in codes], 1), v[:, None])[0]
    assert gap(v, torch.tensor([0, 1, 0, 1])) == pytest.approx(1)
    assert gap(v, v) == pytest.approx(0)
    assert gap(v, torch.tensor([0, 0, 0, 1])) == pytest.approx(0.68872, abs=1e-5)
    assert gap(v, torch.full((4,), 3.0)) == pytest.approx(1)  # a collapsed latent
    assert gap(v) == pytest.approx(1)  # a single one


def test_mutual_information_gap_by_counting():
    codes, factors = random(400, 3), (random(400, 2, seed=1) * 2).long().clamp(-2, 2) + 2
    codes[:, 0] += factors[:, 0]
    codes[:, 1] += 0.5 * factors[:, 0]
    wanted = []
    for v in factors.T.numpy():
        values = []
        for z in codes.T.numpy():
            table, _, _ = np.histogram2d(z, v, bins=[np.linspace(z.min(), z.max(), 21), np.arange(6) - 0.5])
            p = table / 400
            q = p.sum(1, keepdims=True) * p.sum(0)
            values.append((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())
        p = p.sum(0)
        a, b = sorted(values)[:-3:-1]
        wanted.append((a - b) / -(p[p > 0] * np.log(p[p > 0])).sum())
    assert beta_vae.mutual_information_gaps(codes, factors) == pytest.approx(wanted, abs=1e-5)


def test_factor_vae_vote():
    z = torch.tensor([[0, 1, 2], [0.1, 3, 2.5], [0.05, 5, 1], [0, -1, 2]])
    assert z.var(0).tolist() == pytest.approx([0.0022917, 6.6667, 0.39583], rel=1e-4) and z.var(0).argmin() == 0


def test_factor_vae_score():
    """1 where latents are factors, scaled at will; chance where they say nothing; 0 where none varies."""
    factors = torch.stack(torch.meshgrid(*[torch.arange(5)] * 3, indexing="ij"), -1).reshape(-1, 3)
    score = lambda codes: beta_vae.factor_vae_score(codes, factors, 300, np.random.default_rng(0))
    true = factors.float()
    assert score(true * torch.tensor([100, 1, 0.1])) == 1
    assert score(torch.cat([0.01 * random(125, 1).float(), true.roll(1, 1)], 1)) == 1  # dead latents do not vote
    assert score(random(125, 3).float()) < 0.6
    assert score(0.01 * true) == 0


def test_disentanglement(monkeypatch, root):
    """All metrics are there, of mu and of its yardsticks, and are shares."""
    data = load("shapes", "test", 32, root, rows=slice(600))
    monkeypatch.setattr(beta_vae, "load", lambda *words: data)
    monkeypatch.setattr(linear_probe, "probe", partial(linear_probe.probe, l2=(1e-2,)))
    args = arguments("--metric-pairs", 4, "--metric-points", 40)
    E, untrained = (beta_vae.Encoder("burgess", 3, 32, 10) for _ in range(2))
    found = beta_vae.disentanglement(args, E.requires_grad_(False), untrained.requires_grad_(False))
    prefixes = ("", "untrained_", "pca_")
    assert {f"{p}{k}" for p in prefixes for k in ("higgins", "mig", "factor_vae")} <= set(found)
    assert "raw_pixels_higgins" in found and found["factors"] == ["ground", "scale", "x", "y"]
    assert all(0 <= v <= 1 for k, v in found.items() if k.endswith(("higgins", "mig", "factor_vae")))


# ------------------------------------------------------------ training
def toy(*words):
    """64 pictures of two grey levels."""
    random = np.random.default_rng(0).integers(0, 256, (64, 1, 1, 3), dtype=np.uint8)
    images = np.broadcast_to(random, (64, 32, 32, 3)).copy()
    images[:, 8:24, 8:24] = 255 - images[:, 8:24, 8:24]
    return Data("toy", words[1], 32, torch.from_numpy(images), "key", None, torch.arange(64) % 2, ["a", "b"])


@pytest.fixture
def train(monkeypatch, tmp_path):
    """train(*flags) trains on `toy`; returns the arguments, the gradients before each step, and the log."""
    for name in ("sample", "evaluate"):
        monkeypatch.setattr(beta_vae, name, lambda args: {})
    monkeypatch.setattr(beta_vae, "load", toy)

    def train(*flags):
        grads = []
        flags = ("--out", tmp_path / str(len(list(tmp_path.iterdir()))), "--batch", 8, "--log-every", 1, *flags)
        args = arguments("--preset", "demo", *flags)
        keep = lambda opt, *_: grads.append([p.grad.clone() for group in opt.param_groups for p in group["params"]])
        hook = register_optimizer_step_pre_hook(keep)
        beta_vae.train(args)
        hook.remove()
        return args, grads, [json.loads(line) for line in (args.out / "log.jsonl").read_text().splitlines()]

    return train


@pytest.mark.parametrize("recon", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("flags", [["--beta", 3], ["--objective", "capacity", "--capacity", 9, "--anneal", 2]])
def test_a_step(train, flags, recon):
    """The gradients of the first step are those of the formula, of noise and images drawn by hand."""
    args, grads, log = train("--steps", 1, "--recon", recon, *flags)
    E, D = beta_vae.build(args)
    x = next(beta_vae.images(args, "train", 8))
    assert x.shape == (8, 3, 32, 32) and x.min() >= 0 and x.max() <= 1
    mu, logvar = E.layers(x).chunk(2, 1)
    logits = D.layers(mu + (0.5 * logvar).exp() * beta_vae.normal(args, 8, beta_vae.POSTERIOR, 0))
    p = logits.sigmoid()
    nll = (p - x) ** 2 if recon == "gaussian" else -(x * p.log() + (1 - x) * (1 - p).log())
    rec, KL = nll.sum() / 8, 0.5 * (mu**2 + logvar.exp() - logvar - 1).sum() / 8
    loss = rec + 3 * KL if flags[0] == "--beta" else rec + 100 * (KL - 4.5).abs()
    loss.backward()
    for grad, p in zip(grads[0], [*E.parameters(), *D.parameters()], strict=True):
        assert torch.allclose(grad, p.grad, rtol=1e-3, atol=1e-4 * p.grad.abs().max())
    assert log[0]["loss"] == pytest.approx(loss.item(), rel=1e-4) and log[0]["kl"] == pytest.approx(KL.item(), rel=1e-4)
    found = [log[0][f"kl_{j}"] for j in range(1, 11)]
    assert found == sorted(found, reverse=True) and sum(found) == pytest.approx(KL.item(), rel=1e-3)


def test_capacity_is_about_the_whole_batch(train):
    """|KL - C| of pieces would have another sign than that of the batch: C lies between the two pieces' KLs."""
    args = arguments("--preset", "demo", "--batch", 8)
    E, _ = beta_vae.build(args)
    kls = [beta_vae.kl_divergence(*E(x)).sum().item() for x in islice(beta_vae.images(args, "train", 8, 0, 2), 2)]
    C = 0.3 * max(kls) + 0.7 * min(kls)
    flags = ("--steps", 1, "--objective", "capacity", "--capacity", C, "--anneal", 1)
    assert min(kls) < C < sum(kls) / 2
    (_, (whole,), log), (_, (pieces,), log_2) = train(*flags), train(*flags, "--accumulate", 2)
    for a, b in zip(whole, pieces, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * a.abs().max())
    assert log[0]["kl"] == pytest.approx(log_2[0]["kl"], rel=1e-4)


def test_kl_has_no_gradient_in_the_decoder(train):
    _, (one,), _ = train("--steps", 1, "--beta", 0)
    args, (two,), _ = train("--steps", 1, "--beta", 50)
    n = len([*beta_vae.build(args)[0].parameters()])
    assert all(torch.equal(a, b) for a, b in zip(one[n:], two[n:], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one[:n], two[:n], strict=True))


def test_adagrad_trains(train):
    args, _, log = train("--steps", 3, "--optimiser", "adagrad", "--net", "mlp", "--size", 32, "--grey", "--lr", 1e-3)
    assert log[-1]["above_floor"] < log[0]["above_floor"] and args.channels == 1


def test_nothing_is_mirrored(monkeypatch):
    seen = []
    monkeypatch.setattr(beta_vae, "load", lambda *words: replace(toy(*words), flip=True))
    monkeypatch.setattr(
        beta_vae, "batches", lambda *words: seen.append(words) or iter([(torch.zeros(2, 3, 8, 8), None)])
    )
    next(beta_vae.images(arguments(), "train", 2))
    assert seen[0][5] is False


# ------------------------------------------------------------ pictures and numbers
def test_pictures(monkeypatch, tmp_path):
    args = arguments("--preset", "demo", "--out", tmp_path / "run", "--steps", 1, "--batch", 8, "--z-dim", 5)
    monkeypatch.setattr(beta_vae, "load", toy)
    monkeypatch.setattr(beta_vae, "evaluate", lambda args: {})
    shown = {}
    monkeypatch.setattr(beta_vae, "picture", lambda args, name, x, columns=8: shown.update({name: x}))
    args.data = "toy"
    beta_vae.train(args)
    E, D, _ = beta_vae.restore(args)
    x = next(beta_vae.images(args, "test", 40))
    mu, logvar = E(x)
    pairs = shown["reconstructions.png"].unflatten(0, (40, 2))
    assert torch.allclose(pairs[:, 0], 2 * x - 1) and torch.allclose(pairs[:, 1], 2 * D(mu).sigmoid() - 1, atol=1e-5)
    order = beta_vae.kl_divergence(mu, logvar).argsort(descending=True)
    rows = shown["traversals.png"].unflatten(0, (5, 2, 10))
    for i, unit in enumerate(order):  # a row a latent, the other latents as the image has them
        z = mu[:2, None].repeat(1, 10, 1)
        z[:, :, unit] = torch.linspace(-3, 3, 10)
        assert torch.allclose(rows[i], beta_vae.drawn(D, z.flatten(0, 1)).unflatten(0, (2, 10)), atol=1e-5)
    between = shown["interpolations.png"].unflatten(0, (8, 10))
    assert torch.allclose(between[:, 0], pairs[:8, 1], atol=1e-5)
    assert torch.allclose(between[:, -1], pairs[8:16, 1], atol=1e-5)
    z = beta_vae.normal(args, 64, beta_vae.PICTURES, 0)
    assert torch.allclose(shown["samples.png"], 2 * D(z).sigmoid() - 1, atol=1e-5)


def test_responses(monkeypatch, tmp_path):
    """Of dSprites: a map over places, and one over scale and orientation for each shape, of the true means."""
    args = arguments("--data", "dsprites", "--preset", "demo", "--out", tmp_path, "--z-dim", 4)
    rows = np.random.default_rng(0).integers(math.prod(DSPRITES), size=1500)
    factors = torch.from_numpy(np.stack(np.unravel_index(rows, DSPRITES), 1))
    images = torch.from_numpy(draw_dsprites(rows))[:, ::2, ::2, None].expand(-1, -1, -1, 3) * 255
    data = Data("dsprites", "test", 32, images, "key", None, factors[:, 1], list("abc"), factors)

    class Rows:
        def __getitem__(self, rows):
            return images[: len(rows)]

    monkeypatch.setattr(beta_vae, "load", lambda *words: data if len(words) > 4 else replace(data, images=Rows()))
    monkeypatch.setattr(beta_vae, "images", lambda *words: iter([images[:40, None, :, :, 0] / 255]))
    shown, networks = {}, (*beta_vae.build(args), {})
    monkeypatch.setattr(beta_vae, "restore", lambda args: [n.requires_grad_(False) if n else n for n in networks])
    monkeypatch.setattr(beta_vae, "picture", lambda args, name, x, columns=8: shown.update({name: (x, columns)}))
    beta_vae.sample(args)
    maps, columns = shown["responses.png"]
    assert columns == 4 and maps.shape == (4 * 4, 1, 32, 32) and shown["traversals.png"][1] == 30
    mu, logvar = networks[0](images[:40, None, :, :, 0] / 255)
    unit = int(beta_vae.kl_divergence(mu, logvar).argmax())
    codes = networks[0](images[:, None, :, :, 0] / 255)[0][:, unit]
    x, y = factors[0, 4:].tolist()
    here = (factors[:, 4] == x) & (factors[:, 5] == y)
    assert maps[0, 0, y, x].item() == pytest.approx(codes[here].mean().item() / 2, abs=1e-4)


def test_evaluation(monkeypatch, tmp_path):
    """Its nats are those of the formulas; samples and reconstructions are judged apart."""
    monkeypatch.setattr(beta_vae, "load", toy)
    flags = ("--out", tmp_path, "--steps", 2, "--batch", 8, "--fid-samples", 60)
    monkeypatch.setattr(beta_vae, "sample", lambda args: None)
    args = arguments("--preset", "demo", *flags, "--probe-samples", 60)
    args.data = "toy"
    probe = lambda encoder, train, test, untrained, device: {"probe_top1": encoder(torch.ones(2, 3, 32, 32)).shape[1]}
    monkeypatch.setattr(linear_probe, "evaluate", probe)
    real = []
    monkeypatch.setattr(
        beta_vae.fid, "evaluate", lambda draw, data, n, *rest: real.append((draw(0, 8), n)) or {f"fd_random_{n}": 1.0}
    )
    metrics = beta_vae.train(args)
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    assert {"fd_random_60", "recon_fd_random_60"} <= set(metrics) and metrics["probe_top1"] == 10  # mu, not the head
    E, D, _ = beta_vae.restore(args)
    assert torch.allclose(real[0][0], beta_vae.drawn(D, beta_vae.normal(args, 8, beta_vae.FAKES, 0)), atol=1e-5)
    x = toy(0, "test").images[:8].permute(0, 3, 1, 2) / 255
    assert torch.allclose(real[1][0], 2 * D(E(x)[0]).sigmoid() - 1, atol=1e-5)
    assert metrics["elbo"] == pytest.approx(-metrics["rec"] - metrics["kl"])
    assert metrics["beta_norm"] == pytest.approx(4 * 10 / 3072) and metrics["kl"] == pytest.approx(
        sum(metrics["kl_units"])
    )
    assert metrics["rec"] > metrics["rec_floor"] > 0


def test_study(monkeypatch, tmp_path, capsys):
    """Each seed with each beta, in folders of their own; means and spreads are theirs."""
    monkeypatch.setattr(beta_vae, "load", toy)
    monkeypatch.setattr(beta_vae, "sample", lambda args: None)
    value = lambda args: {
        "higgins": args.beta + args.seed / 10,
        "pca_higgins": 0.5,
        "mig": 0.25,
        "recon_fd_random_9": 2.0,
    }
    monkeypatch.setattr(beta_vae, "evaluate", value)
    flags = ("--preset", "demo", "--steps", 1, "--batch", 8, "--out", tmp_path)
    beta_vae.train(arguments(*flags, "--seeds", 3, "--betas", 1, 4))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        f"beta-{beta}-seed-{seed}" for beta in (1, 4) for seed in range(3)
    ]
    states = [torch.load(tmp_path / f"beta-{b}-seed-{s}" / "checkpoint.pt") for b, s in ((1, 0), (1, 1), (4, 0))]
    assert [(state["config"]["beta"], state["config"]["seed"]) for state in states] == [(1, 0), (1, 1), (4, 0)]
    first = [state["E"]["layers.0.weight"] for state in states]
    assert not torch.equal(first[0], first[1])
    table = json.loads((tmp_path / "study.json").read_text())
    assert table["higgins"]["beta 4"] == pytest.approx([4, 4.1, 4.2]) and table["higgins"]["pca"] == [0.5] * 6
    out = capsys.readouterr().out
    assert "beta 4       4.1 +- 0.1  (3)" in out and "pca          0.5 +- 0  (6)" in out and "recon_fd_random_9" in out


def test_wrong_sizes_are_refused():
    for flags, word in ((["--size", 48], "--size 48"), (["--betas", 1, -4], "--betas")):
        with pytest.raises(UserError, match=word):
            arguments(*flags)


# ------------------------------------------------------------ it learns
STEPS = 250


def test_it_learns(monkeypatch, tmp_path, root):
    """The demo, shortened: test images come back, through a few latents that tell something."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in ("sample", "evaluate", "picture"):
        monkeypatch.setattr(beta_vae, name, lambda *args, **options: None)
    args = arguments("--root", root, "--out", tmp_path, "--steps", STEPS, "--save-every", 10 * STEPS)
    beta_vae.train(args)
    torch.set_num_threads(threads)
    x = next(beta_vae.images(args, "test", 500))
    floor = beta_vae.reconstruction_floor(x, "bernoulli")

    @torch.no_grad()
    def above(E, D):
        return float(beta_vae.reconstruction_loss(D(E(x)[0]), x, "bernoulli") - floor)

    mean = x.mean(0, keepdim=True).expand_as(x)
    blind = float(beta_vae.reconstruction_loss(mean.logit(), x, "bernoulli") - floor)  # the best without a code
    E, D, _ = beta_vae.restore(args)
    before, after, kl = above(*beta_vae.build(args)), above(E, D), beta_vae.kl_divergence(*E(x)).sum()
    print(
        f"above the floor: {before:.0f} -> {after:.0f} nats in {STEPS} steps, without a code {blind:.0f}; KL {kl:.1f}"
    )
    assert after < 0.75 * blind, f"{after:.0f} nats above the floor, {blind:.0f} without a code"
    assert 2 < kl < 15  # summed over the batch too, the reconstruction loss lets 35 nats through
