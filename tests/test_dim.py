"""dim.py against its paper: parameter counts, the bounds of mutual information, the critics, the prior, official code.

About a minute on one core, half of it the shortened demo.
"""

import json
import math
import sys
from itertools import islice
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fill import inputs
from PIL import Image
from test_parity import agree, filled
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import dim
from common import linear_probe
from common.data import Data, UserError, load


def arguments(*flags):
    """What main() makes of a command line."""
    with mock.patch.object(sys, "argv", ["dim.py", "--device", "cpu", "--precision", "fp32", *map(str, flags)]):
        args = dim.parse()
    dim.start(args)
    return args


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def built(*flags):
    """E, T and D on the meta device: shapes without numbers."""
    args = arguments(*flags)
    args.device = "meta"
    with torch.device("meta"):
        return args, *dim.build(args)


def randomize(module, seed=0):
    """Weights and running statistics without structure, in eval mode: zero biases and unit gains hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in [*module.named_parameters(), *module.named_buffers()]:
            if p.is_floating_point():
                n = torch.randn(p.shape, generator=generator)
                plain = name.endswith(("bias", "mean"))
                p.copy_(n / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.2 * n if plain else 1 + 0.2 * n.abs())
    return module.eval()


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------ sizes
def test_parameter_counts_of_the_paper():
    _, E, T, D = built("--data", "stl10")
    assert count(E) == 58_416_160 and count(D) == 265_401
    assert [count(m) for m in (T["local"].places, T["local"].vectors)] == [5_777_408, 4_466_688]
    convs = [m for m in (*E[0], *E[1]) if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    assert [count(*convs[i : i + 2]) for i in range(0, 10, 2)] == [2_784, 166_272, 664_320, 1_327_872, 663_936]
    assert [count(*E[2][i : i + 3]) for i in (1, 4)] == [38_543_360, 16_785_408] and count(E[3]) == 262_208
    assert count(dim.classifier(9408, 10)) == 9408 * 200 + 200 + 400 + 2010


def test_parameter_counts_of_the_cifar_model():
    _, E, T, D = built("--data", "cifar10")
    assert count(E) == 4_921_280 and count(D) == 265_401
    convs = [m for m in (*E[0], *E[1]) if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    assert [count(*convs[i : i + 2]) for i in range(0, 6, 2)] == [3_200, 131_328, 524_800]
    assert count(E[2]) == 4_196_352 and count(E[3]) == 65_600
    assert [count(m) for m in (T["local"].places, T["local"].vectors)] == [4_728_832, 4_466_688]
    assert count(E, T) == 14_116_800
    _, _, T, _ = built("--data", "cifar10", "--alpha", 0.5, "--critic", "concat")
    assert count(T["local"]) == 361_985 and count(T["global"]) == 2_393_601
    assert count(built("--data", "cifar10", "--size", 64)[1]) == 11_213_760  # the authors' basic64x64
    assert [count(dim.classifier(n, 10)) for n in (4096, 1024, 64)] == [821_810, 207_410, 15_410]
    assert count(dim.decoder(64, 512, 32)) == 3_296_256


SHAPES = {  # flags: local map, conv, fc
    "small": ((128, 8, 8), (256, 4, 4), 1024),
    "small --size 64": ((256, 8, 8), (512, 4, 4), 1024),
    "paper": ((384, 15, 15), (192, 7, 7), 4096),
    "paper --size 32": ((128, 8, 8), (256, 4, 4), 1024),
    "demo": ((64, 8, 8), (128, 4, 4), 256),
}


@pytest.mark.parametrize("flags", SHAPES)
def test_shapes(flags):
    args, E, T, D = built("--preset", *flags.split(), "--alpha", 1)
    x, (local, conv, fc) = torch.empty(3, 3, args.size, args.size, device="meta"), SHAPES[flags]
    outputs = E(x)
    assert [tuple(out.shape[1:]) for out in outputs] == [local, conv, (fc,), (64,)]
    assert (E.channels, E.conv_dim) == (local[0], math.prod(conv))
    places, conv, _, Y = outputs
    with mock.patch("torch.autocast"):  # which knows no meta device
        s = dim.scores(T, places, conv, Y)
    assert {term: tuple(value.shape) for term, value in s.items()} == {
        "global": (3, 3, 1),
        "local": (3, 3, local[1] * local[2]),
    }
    widths = {name: layers(x).shape[1] for name, layers in E.features().items()}
    assert widths == {"fc": fc, "conv": E.conv_dim, "Y": 64} and D(Y).shape == (3, 1)
    assert dim.decoder(64, 32, args.size).to("meta")(Y).shape == x.shape


def test_the_presets_are_the_papers():
    wanted = dict(size=64, alpha=0, beta=1, gamma=0.1, measure="jsd", critic="dot", units=2048, hidden=512, y_dim=64)
    wanted |= dict(batch=64, lr=1e-4, betas=(0.5, 0.999), penalty=1, crop=4 / 9, fit_lr=1e-4)
    args = arguments("--data", "stl10")
    assert {name: getattr(args, name) for name in wanted} == wanted
    assert args.steps // (105_000 // 64) == 200 and args.fits["mlp"] == (64, 150) and args.fits["ndm"] == (10_000, 1000)
    args = arguments("--data", "cifar10")
    wanted |= dict(size=32, steps=1000 * (50_000 // 64), crop=1)
    assert {name: getattr(args, name) for name in wanted} == wanted
    assert arguments("--data", "imagenet").crop == 1


def test_no_bias_before_a_norm():
    """And one everywhere else; no spectral norm."""
    _, E, _, D = built("--data", "imagenet")
    layers = [m for m in E.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert [m.bias is None for m in layers] == [True] * 7 + [False]
    assert all(m.bias is not None for m in D if isinstance(m, nn.Linear))


# ------------------------------------------------------------ the objective
def by_the_formulas(s):
    """JSD, infoNCE and DV of s [N, N, L], written out: every negative is visited."""
    s = np.asarray(s, dtype=np.float64)
    n, _, places = s.shape
    softplus = lambda t: np.logaddexp(0, t)
    joint = [s[i, i, place] for i in range(n) for place in range(places)]
    others = [[s[i, j, place] for j in range(n) if j != i for place in range(places)] for i in range(n)]
    marginal = np.concatenate(others)
    jsd = np.mean([softplus(t) - math.log(2) for t in marginal]) - np.mean([math.log(2) - softplus(-t) for t in joint])
    nce = np.mean(
        [
            np.log(np.exp(s[i, i, place]) + np.sum(np.exp(others[i]))) - s[i, i, place]
            for i in range(n)
            for place in range(places)
        ]
    )
    return {"jsd": jsd, "infonce": nce, "dv": np.log(np.mean(np.exp(marginal))) - np.mean(joint)}


@pytest.mark.parametrize("shape", [(2, 1), (3, 2), (5, 9)])
def test_estimators_by_the_formulas(shape):
    n, places = shape
    s = 2 * random(n, n, places)
    for measure, value in by_the_formulas(s).items():
        assert dim.information_loss(s, measure).item() == pytest.approx(value, abs=1e-10), measure


def all_pairs(maps, vectors):
    """s[i, j, l] = <vectors_i, maps_j at l>, maps [N, dims, L]."""
    maps, vectors = torch.tensor(maps, dtype=torch.float64), torch.tensor(vectors, dtype=torch.float64)
    return torch.einsum("iu,jul->ijl", vectors, maps)


def test_estimators_of_the_sheets_examples():
    value = lambda s, measure: dim.information_loss(s, measure).item()
    s = all_pairs([[[1]], [[-1]]], [[1], [-1]])
    found = [value(s, measure) for measure in ("jsd", "dv", "infonce")]
    assert found == pytest.approx([-0.759771, -2.0, 0.126928], abs=1e-6)
    s = all_pairs([[[1, 0], [0, 1]], [[0, 1], [1, 0]], [[1, -1], [1, 1]]], [[1, 0], [0, 1], [1, 1]])
    found = [value(s, measure) for measure in ("jsd", "dv", "infonce")]
    assert found == pytest.approx([0.212430, 0.138037, 1.746619], abs=1e-6)


def test_estimators_of_scores_that_tell_nothing():
    s = torch.zeros(64, 64, 64)
    assert dim.information_loss(s, "jsd").item() == pytest.approx(0, abs=1e-6)
    assert dim.information_loss(s, "dv").item() == pytest.approx(0, abs=1e-5)
    assert dim.information_loss(s, "infonce").item() == pytest.approx(8.302266, abs=1e-5)


def test_estimators_of_sure_scores_are_finite():
    """JSD's bound is 2 log 2; exp of scores like these is not a number."""
    eye = 2e4 * torch.eye(4)[..., None].expand(4, 4, 3) - 1e4
    for s, infonce, jsd, dv in (
        (eye, 0, -2 * math.log(2), -2e4),
        (-eye, 2e4 + math.log(9), 2e4 - 2 * math.log(2), 2e4),
    ):
        s = s.clone().requires_grad_()
        for measure, wanted in (("infonce", infonce), ("jsd", jsd), ("dv", dv)):
            loss = dim.information_loss(s, measure)
            assert loss.item() == pytest.approx(wanted, abs=1e-2), measure
            assert torch.autograd.grad(loss, s)[0].isfinite().all()


def test_all_other_pairs_are_negatives():
    s = torch.arange(4 * 4 * 2.0).view(4, 4, 2)
    joint, marginal = dim.pairs(s)
    assert joint.tolist() == [s[i, i].tolist() for i in range(4)]
    assert marginal.tolist() == [[s[i, j].tolist() for j in range(4) if j != i] for i in range(4)]


@pytest.mark.parametrize("measure", [*dim.F_DIVERGENCES, "dv", "infonce"])
def test_estimators_do_not_look_at_order(measure):
    """Of the places in each image by itself, and of the images in the batch."""
    s, order = random(5, 5, 6), torch.tensor([3, 0, 4, 1, 2])
    moved = torch.stack([s[:, j][:, torch.from_numpy(np.random.default_rng(j).permutation(6))] for j in range(5)], 1)
    value = dim.information_loss(s, measure)
    assert torch.allclose(dim.information_loss(moved, measure), value)
    assert torch.allclose(dim.information_loss(s[order][:, order], measure), value)
    assert not torch.allclose(dim.information_loss(s[order], measure), value, rtol=1e-3)


def test_prior_losses():
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, -0.5])
    assert dim.discriminator_loss(real, fake).item() == pytest.approx(1.444172, abs=1e-6)
    assert dim.prior_loss(fake).item() == pytest.approx(0.724077, abs=1e-6)
    zero = torch.zeros(3)
    assert dim.discriminator_loss(zero, zero).item() == pytest.approx(1.386294, abs=1e-6)
    assert dim.prior_loss(zero).item() == pytest.approx(0.693147, abs=1e-6)
    sure = torch.tensor([-1e4], requires_grad=True)  # where log(1 - D) has no gradient left
    assert torch.autograd.grad(dim.prior_loss(sure), sure)[0].item() == -1


def test_gradient_penalty():
    """By finite differences; and every image counts, not the last alone."""
    D, x = randomize(dim.discriminator(3)).double(), random(4, 3)
    step = 1e-5 * torch.eye(3, dtype=torch.float64)
    gradients = torch.stack([(D(x + h) - D(x - h))[:, 0] / 2e-5 for h in step], 1).detach()
    x.requires_grad_()
    penalty = dim.gradient_penalty(D(x), x)
    assert penalty.item() == pytest.approx(float((gradients**2).sum(1).mean() / 2), rel=1e-4)
    assert torch.autograd.grad(penalty, D[0].weight)[0].norm() > 0  # D learns from it


# ------------------------------------------------------------ encoder and critics
def test_encoder_by_the_formula():
    """The local map is the second convolution's, after norm and ReLU; Y is linear."""
    E, x = randomize(dim.Encoder(32, *dim.NARROW, 16)), random(2, 3, 32, 32).float()
    norm = lambda h, m: (
        (h - m.running_mean.view(-1, *[1] * (h.ndim - 2)))
        / (m.running_var.view(-1, *[1] * (h.ndim - 2)) + 1e-5).sqrt()
        * m.weight.view(-1, *[1] * (h.ndim - 2))
        + m.bias.view(-1, *[1] * (h.ndim - 2))
    )
    h, wanted = x, []
    for conv, bn in ((E[0][0], E[0][1]), (E[0][3], E[0][4]), (E[1][0], E[1][1])):
        h = norm(F.conv2d(h, conv.weight, stride=2, padding=1), bn).relu()
        wanted.append(h)
    fc = norm(h.flatten(1) @ E[2][1].weight.T, E[2][2]).relu()
    wanted = [*wanted[1:], fc, fc @ E[3].weight.T + E[3].bias]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(E(x), wanted, strict=True))
    assert E(x)[3].min() < 0
    found = {name: layers.eval()(x) for name, layers in E.features().items()}
    assert torch.equal(found["fc"], E(x)[2]) and torch.equal(found["Y"], E(x)[3])
    assert torch.equal(found["conv"], E(x)[1].flatten(1))


def test_pools_come_after_the_relu():
    E = dim.Encoder(64, *dim.ALEX[:2], (8,), 4)
    kinds = [type(m).__name__ for m in (*E[0], *E[1])]
    block, pool = ["Conv2d", "BatchNorm2d", "ReLU"], ["MaxPool2d"]
    assert kinds == [*block, *pool, *block, *pool, *block, *block, *block, *pool]
    pools = [m for m in E.modules() if isinstance(m, nn.MaxPool2d)]
    assert all((m.kernel_size, m.stride, m.padding) == (3, 2, 0) for m in pools)


def test_embedder():
    """Its shortcut starts as the identity with noise; what leaves it is normed over the units."""
    embedder = dim.Embedder(16, 64)
    weight = embedder.shortcut.weight.detach()[..., 0, 0]
    assert torch.equal(weight[range(16), range(16)], torch.ones(16))
    others = weight.masked_fill(torch.eye(64, 16, dtype=torch.bool), 0)
    assert 0 < others.abs().max() <= 0.01 and others.std() > 0.004
    out = embedder(random(3, 16, 4, 4).float())
    assert out.mean(1).abs().max() < 1e-5 and torch.allclose(out.var(1, correction=0), torch.tensor(1.0), atol=1e-3)
    narrow = dim.Embedder(64, 16).shortcut.weight.detach()[..., 0, 0]
    assert not (narrow[range(16), range(16)] == 1).any() and narrow.abs().max() <= 1 / 8


def test_encode_and_dot_by_the_formula():
    critic = randomize(dim.EncodeAndDot(5, 3, 8))
    maps, Y = random(4, 5, 2, 3).float(), random(4, 3, seed=1).float()

    def embed(embedder, v):  # one vector
        first, bn, _, second = embedder.nonlinear
        h = first.weight[..., 0, 0] @ v
        h = ((h - bn.running_mean) / (bn.running_var + 1e-5).sqrt() * bn.weight + bn.bias).relu()
        h = second.weight[..., 0, 0] @ h + second.bias + embedder.shortcut.weight[..., 0, 0] @ v
        h = (h - h.mean()) / (h.var(correction=0) + 1e-5).sqrt()
        return h * embedder.norm.weight + embedder.norm.bias

    s = critic(maps, Y)
    assert s.shape == (4, 4, 6)
    for i, j, row, column in ((0, 0, 0, 0), (1, 2, 1, 0), (3, 0, 0, 2), (2, 3, 1, 2)):
        wanted = embed(critic.vectors, Y[i]) @ embed(critic.places, maps[j, :, row, column])
        assert s[i, j, 3 * row + column].item() == pytest.approx(wanted.item(), abs=1e-4)


def test_concat_and_convolve_by_the_formula():
    """Y tiled behind the map's channels, for every pair; values and gradients."""
    critic = randomize(dim.ConcatAndConvolve(5, 3, 8))
    maps, Y = random(4, 5, 2, 3).float().requires_grad_(), random(4, 3, seed=1).float().requires_grad_()
    both = torch.cat([maps.expand(4, 4, 5, 2, 3), Y[:, None, :, None, None].expand(4, 4, 3, 2, 3)], 2).flatten(0, 1)
    wanted, s = critic.rest(critic.first(both)).view(4, 4, 6), critic(maps, Y)
    assert torch.allclose(s, wanted, atol=1e-5)
    cotangent, leaves = random(4, 4, 6, seed=2).float(), (maps, Y, *critic.parameters())
    for a, b in zip(*(torch.autograd.grad((out * cotangent).sum(), leaves) for out in (s, wanted)), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_prior_discriminator():
    D = randomize(dim.discriminator(4))
    x, (a, _, b, _, c) = random(3, 4).float(), D
    h = (x @ a.weight.T + a.bias).relu()
    h = (h @ b.weight.T + b.bias).relu()
    assert torch.allclose(D(x), h @ c.weight.T + c.bias, atol=1e-5)
    assert [m.out_features for m in (a, b, c)] == [1000, 200, 1]


# ------------------------------------------------------------ parity with the official code (golden/parity.md, case 23)
def case_23():
    maps, vectors = inputs(23, (6, 16, 9), (6, 16, 1))
    maps, vectors = (maps * 0.25).requires_grad_(), vectors.requires_grad_()
    return maps, vectors, torch.einsum("iu,jul->ijl", vectors[..., 0], maps)


@pytest.mark.parametrize("name", ["JSD", "GAN", "KL", "RKL", "H2", "X2", "infonce_definition", "DV_definition"])
def test_parity_of_the_estimators(name):
    maps, vectors, s = case_23()
    loss = dim.information_loss(s, name.removesuffix("_definition").lower())
    agree(f"23.{name}", loss)
    if name == "JSD":
        for key, gradient in zip(("local", "global"), torch.autograd.grad(loss, (maps, vectors)), strict=True):
            agree(f"23.JSD_grad_{key}", gradient)


def test_parity_of_the_authors_infonce():
    """Which lets the nine places of Y's own image compete with a score of -10: the one difference."""
    maps, vectors, s = case_23()
    joint, marginal = dim.pairs(s)
    own = torch.full((6, 9), -10.0)
    loss = F.softplus(torch.cat([marginal.flatten(1), own], 1).logsumexp(1, keepdim=True) - joint).mean()
    agree("23.infonce_official", loss)
    assert loss.item() == pytest.approx(dim.information_loss(s, "infonce").item(), rel=1e-5)
    for key, gradient in zip(("local", "global"), torch.autograd.grad(loss, (maps, vectors)), strict=True):
        agree(f"23.infonce_official_grad_{key}", gradient)


@torch.no_grad()
def test_parity_of_the_embedder():
    embedder, (x,) = filled(dim.Embedder(32, 64)), inputs(23, (4, 32, 4, 4))
    assert count(embedder) == 8_512
    agree("23c.out", embedder(x))
    agree("23c.train", embedder.train()(x))


# ------------------------------------------------------------ the loop
def toy(name, split, size, root, skip_broken, rows=slice(None)):
    """64 pictures of noise and no labels."""
    seed = {"train": 0, "test": 1}[split]
    images = torch.randint(256, (64, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Data("toy", split, size, images, f"toy{split}", root)


def flat(network, of=lambda p: p):
    return torch.cat(
        [torch.zeros(p.numel()) if of(p) is None else of(p).detach().flatten() for p in network.parameters()]
    )


@pytest.fixture
def train(monkeypatch, tmp_path):
    """train(*flags) on noise, without pictures and evaluation: its arguments, its networks, what happened on the way.

    events: of every optimiser step whose it is, rate, betas, and by network gradients and parameters before and after.
    """
    monkeypatch.setattr(dim, "load", toy)
    for name in ("sample", "evaluate", "picture"):
        monkeypatch.setattr(dim, name, lambda *args, **options: None)
    build = dim.build

    def run(*flags, prepare=lambda *networks: None, **changes):
        events, folder = [], tmp_path / str(len(list(tmp_path.iterdir())))
        words = ["--batch", 8, "--steps", 1, "--log-every", 100, "--units", 16, "--hidden", 8, "--out", folder]
        args = arguments(*words, *flags)
        vars(args).update(changes)
        networks = dict(zip("ETD", build(args), strict=True))
        prepare(*networks.values())
        monkeypatch.setattr(dim, "build", lambda args: list(networks.values()))
        owner = {id(p): name for name, network in networks.items() for p in network.parameters()}

        def before(optimizer, *_):
            group = optimizer.param_groups[0]
            event = {"of": "".join(sorted({owner[id(p)] for p in group["params"]})), "betas": group["betas"]}
            event |= {
                "lr": float(group["lr"]),
                "training": all(m.training for n in networks.values() for m in n.modules()),
            }
            event["grads"] = {name: flat(network, lambda p: p.grad) for name, network in networks.items()}
            events.append(event | {"before": {name: flat(network).clone() for name, network in networks.items()}})

        def after(optimizer, *_):
            events[-1]["after"] = {name: flat(network).clone() for name, network in networks.items()}

        handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
        try:
            dim.train(args)
        finally:
            for handle in handles:
                handle.remove()
        return args, networks, events

    return run


def recorder(network, calls):
    return network.register_forward_hook(lambda m, inputs, out: calls.append((inputs, out)))


def test_a_step(train):
    """D once, then encoder and critics together; each moves alone, and hears nothing of the other's step."""
    _, _, events = train("--lr", 3e-4, "--alpha", 1)
    assert [event["of"] for event in events] == ["D", "ET"]
    for event in events:
        moved = {name for name in "ETD" if not torch.equal(event["before"][name], event["after"][name])}
        assert moved == set(event["of"]) and event["training"]
        assert event["lr"] == pytest.approx(3e-4) and tuple(event["betas"]) == (0.5, 0.999)
    first, second = (event["grads"] for event in events)
    assert first["E"].norm() == 0 == first["T"].norm() and first["D"].norm() > 0
    assert torch.equal(second["D"], first["D"]) and second["E"].norm() > 0 < second["T"].norm()


def test_who_sees_what(train):
    """One forward pass of E; critics see the raw Y, D sigmoid(Y) and numbers from 0 to 1."""
    seen, calls, judged = [], [], []

    def prepare(E, T, D):
        for network, record in ((E, seen), (T["local"], calls), (D, judged)):
            recorder(network, record)

    train(prepare=prepare)
    seen = [call for call in seen if len(call[0][0]) == 8 and call[1][3].requires_grad]  # not the pictures'
    (((x,), (places, _, _, Y)),) = seen
    (((maps, vectors), _),) = calls
    (((v,), _), ((z,), _), ((again,), _)) = judged
    assert x.shape == (8, 3, 32, 32) and maps is places and vectors is Y
    assert torch.equal(z, Y.sigmoid()) and torch.equal(again, Y.sigmoid())
    assert v.shape == (8, 64) and v.min() >= 0 and v.max() < 1 and v.std().item() == pytest.approx(12**-0.5, abs=0.02)


def test_no_prior(train):
    """With --gamma 0 D is not even asked."""
    calls = []
    _, _, events = train("--gamma", 0, prepare=lambda E, T, D: recorder(D, calls))
    assert [event["of"] for event in events] == ["ET"] and not calls


def test_the_objective_is_the_weighted_sum(train):
    """Equation 8; and E's gradient by hand: of both information losses, and of what D says after its step."""
    seen, weights = [], {"--alpha": 0.7, "--beta": 1.3, "--gamma": 0.4}
    flags = [word for pair in weights.items() for word in pair]
    flags += ["--log-every", 1, "--measure", "jsd", "--lr", 1e-2]
    args, networks, events = train(*flags, prepare=lambda E, T, D: recorder(E, seen))
    E, T, D = networks.values()
    row = json.loads((args.out / "log.jsonl").read_text())
    wanted = 0.7 * row["loss_global"] + 1.3 * row["loss_local"] + 0.4 * row["loss_prior"]
    assert row["loss"] == pytest.approx(wanted, rel=1e-3)
    assert {"lr", "loss_d", "z_std", "joint_local", "marginal_local", "joint_global", "marginal_global"} <= set(row)
    ((x,), _) = seen[0]
    for name, network in (("E", E.train()), ("T", T.train())):
        nn.utils.vector_to_parameters(events[1]["before"][name], network.parameters())

    def gradient():
        places, conv, _, Y = E(x)
        s = dim.scores(T, places, conv, Y)
        loss = 0.7 * dim.information_loss(s["global"], "jsd") + 1.3 * dim.information_loss(s["local"], "jsd")
        loss = loss + 0.4 * dim.prior_loss(D(Y.sigmoid()))
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(E.parameters()))])

    found = events[1]["grads"]["E"]
    close = lambda tolerance: float((found - gradient()).norm()) <= tolerance * float(found.norm())
    assert close(1e-4)
    nn.utils.vector_to_parameters(events[0]["before"]["D"], D.parameters())
    assert not close(1e-3)  # what D would have said before its step


def test_the_penalty_is_in_ds_gradient(train):
    gradients = [train(penalty=penalty)[2][0]["grads"]["D"] for penalty in (1.0, 0.0)]
    assert float((gradients[0] - gradients[1]).norm()) > 1e-3 * float(gradients[1].norm())


def test_pieces_have_their_own_negatives(train):
    """Two pieces' gradients are the mean of what each gives alone, norms and negatives included."""
    calls = []
    runs = [train("--accumulate", n, "--lr", 0, prepare=lambda E, T, D: recorder(T["local"], calls)) for n in (1, 2)]
    assert [len(maps) for (maps, _), _ in calls] == [8, 4, 4]
    (_, networks, _), (_, _, events) = runs
    (E, T, D), grads = networks.values(), []
    x = next(dim.images(runs[0][0], "train", 8))
    for part in x.chunk(2):
        places, conv, _, Y = E.train()(part)
        s = dim.scores(T.train(), places, conv, Y)
        loss = dim.information_loss(s["local"], "infonce") + 0.1 * dim.prior_loss(D(Y.sigmoid()))
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(E.parameters()))]))
    found = events[1]["grads"]["E"]
    assert float((found - sum(grads) / 2).norm()) <= 1e-4 * float(found.norm())


def test_a_piece_must_have_two_images(train):
    with pytest.raises(UserError, match="--batch 8"):
        train("--accumulate", 8)


def test_steps_do_not_depend_on_how_often_they_are_logged(train):
    often, seldom = (train("--steps", 3, "--log-every", n)[1] for n in (1, 100))
    for name in "ETD":
        a, b = (run[name].state_dict() for run in (often, seldom))
        assert not [key for key in a if not torch.equal(a[key], b[key])], name


@pytest.mark.parametrize("flags", ["--measure dv", "--measure jsd --critic concat", "--alpha 1 --beta 0 --gamma 1"])
def test_every_variant_trains(train, flags):
    args, networks, events = train(*flags.split(), "--steps", 2, "--log-every", 1)
    assert [event["of"] for event in events] == ["D", "ET"] * 2
    assert all((p.grad is not None and p.grad.norm() >= 0) for p in networks["T"].parameters())
    assert set(networks["T"]) == ({"global"} if args.alpha else {"local"})


# ------------------------------------------------------------ images, pictures
def test_images_are_neither_cropped_nor_mirrored(monkeypatch):
    monkeypatch.setattr(dim, "load", toy)
    everything = toy("toy", "train", 32, None, False).images.permute(0, 3, 1, 2) / 127.5 - 1
    for x in islice(dim.images(arguments(), "train", 32), 4):
        assert all((everything - one).abs().amax((1, 2, 3)).min() < 1e-6 for one in x)


def test_crops_of_stl10(monkeypatch):
    """64x64 of the 96x96 pixels as they are, some mirrored; in the test set none."""
    pictures = torch.randint(256, (4, 96, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def stl10(name, split, size, *_):
        images = pictures if size is None else pictures[:, :size, :size]
        return Data(name, split, size, images, "key", None)

    monkeypatch.setattr(dim, "load", stl10)
    args, mirrored = arguments("--data", "stl10"), 0
    windows = pictures.permute(0, 3, 1, 2).unfold(2, 64, 1).unfold(3, 64, 1)[:, 0]  # [4, 33, 33, 64, 64], red
    for x in next(dim.images(args, "train", 8)):
        red = ((x[0] + 1) * 127.5).round().byte()
        straight, flipped = ((windows == side).all(4).all(3).any() for side in (red, red.flip(1)))
        assert straight != flipped
        mirrored += int(flipped)
    assert 0 < mirrored < 8
    assert next(dim.images(args, "test", 2)).shape == (2, 3, 64, 64)


def untile(path, columns):
    """The 32-pixel pictures of a sheet, float [N, 3, 32, 32] in [-1, 1]."""
    sheet = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 127.5 - 1
    tiles = [
        sheet[:, 34 * r + 2 :][:, :32, 34 * c + 2 :][..., :32]
        for r in range((sheet.shape[1] - 2) // 34)
        for c in range(columns)
    ]
    return torch.stack(tiles)


def test_pictures(train, monkeypatch):
    """samples.png: the nearest by L1; maps.png: scores of every Y with every map, a row a Y."""
    args, _, _ = train("--steps", 2)
    monkeypatch.undo()
    monkeypatch.setattr(dim, "load", toy)
    dim.sample(args)
    E, T, _ = dim.restore(args)
    x, data = next(dim.images(args, "test", 8)), toy("toy", "train", 32, None, False)
    pool = dim.pixels(args, data, torch.arange(64))
    rows = untile(args.out / "samples.png", 10).unflatten(0, (8, 10))
    distance = (E(x)[3][:, None] - E(pool)[3]).abs().sum(2)
    assert torch.allclose(rows[:, 0], x, atol=0.01)
    for i, order in enumerate(distance.argsort(1)[:, :9]):
        assert torch.allclose(rows[i, 1:], pool[order], atol=0.01)
    table = untile(args.out / "maps.png", 9).unflatten(0, (9, 9))
    assert torch.allclose(table[0, 1:], x, atol=0.01) and torch.allclose(table[1:, 0], x, atol=0.01)
    places, _, _, Y = E(x)
    s = T["local"](places, Y)
    for i, j, place in ((0, 0, 0), (2, 5, 19), (7, 3, 63)):
        wanted = 2 * (s[i, j, place] - s[i].min()) / (s[i].max() - s[i].min()) - 1
        cell = table[1 + i, 1 + j][:, 4 * (place // 8) :, 4 * (place % 8) :][:, :4, :4]
        assert torch.allclose(cell, wanted, atol=0.01)


# ------------------------------------------------------------ numbers
def test_mlp_probe_learns_labels():
    """What no linear probe can tell: which of two coordinates' signs agree."""
    args, x = arguments(), random(3000, 8).float()
    y = (x[:, 0] * x[:, 1] > 0).long()
    parts = (x[:2000], y[:2000]), (x[2000:], y[2000:])
    torch.manual_seed(0)
    assert dim.mlp_probe(args, *parts, 2) > 0.85 > 0.6 > linear_probe.probe(*parts)["top1"]


def test_fit_lowers_the_rate(monkeypatch):
    """At 50 and 100 of 150 epochs; the last incomplete batch is dropped."""
    args, network, rates, seen = arguments("--data", "cifar10"), nn.Linear(1, 1), [], []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(float(optimizer.param_groups[0]["lr"])))
    with mock.patch("torch.optim.Adam", lambda p, *a, **k: torch.optim.SGD(p, *a[:1])):
        dim.fit(args, "mlp", network, lambda rows: seen.append(len(rows)) or network.weight.sum(), 150, (1 / 3, 2 / 3))
    hook.remove()
    assert seen == [64] * 300 and rates == pytest.approx([1e-4] * 100 + [1e-5] * 100 + [1e-6] * 100)


def test_ndm():
    """0 for independent columns; for equal ones more than the little that two normal numbers can tell."""
    args, independent = arguments(), random(4500, 4).float()
    args.fits = {"ndm": (250, 4)}
    torch.manual_seed(0)
    equal = independent[:, :2].repeat(1, 2)
    assert abs(dim.ndm(args, independent[:3000], independent[3000:])) < 0.05
    assert dim.ndm(args, equal[:3000], equal[3000:]) > 1


def test_mine(monkeypatch):
    """Of a Y that tells of the image, and of one that does not."""
    args, (train, test) = arguments("--hidden", 32), (toy("toy", split, 32, None, False) for split in ("train", "test"))
    args.fits = {"mine": (64, 150)}
    for data in (train, test):  # the picture's brightness is one of two
        data.images[:] = torch.tensor([40, 200], dtype=torch.uint8)[torch.arange(64) % 2, None, None, None]
    bright = (torch.arange(64) % 2).float()[:, None].repeat(1, 64)
    torch.manual_seed(0)
    found = [dim.mine(args, train, test, Y, Y) for Y in (2 * bright - 1, bright * 0)]
    assert 0.5 < found[0] <= math.log(2) + 0.05 and abs(found[1]) < 0.02


def test_ms_ssim_by_the_formula():
    x, y = random(2, 3, 32, 32).clamp(-1, 1), random(2, 3, 32, 32, seed=1).clamp(-1, 1)
    y = 0.7 * x + 0.3 * y
    g = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    g = np.outer(g, g) / np.outer(g, g).sum()

    def scale(a, b):  # mean luminance times contrast, mean contrast, of one image
        luminance, contrast = [], []
        for channel in range(3):
            for r in range(a.shape[1] - 10):
                for c in range(a.shape[2] - 10):
                    p, q = a[channel, r : r + 11, c : c + 11], b[channel, r : r + 11, c : c + 11]
                    mp, mq = (g * p).sum(), (g * q).sum()
                    vp, vq, cov = (g * (p - mp) ** 2).sum(), (g * (q - mq) ** 2).sum(), (g * (p - mp) * (q - mq)).sum()
                    contrast.append((2 * cov + 0.06**2) / (vp + vq + 0.06**2))
                    luminance.append((2 * mp * mq + 0.02**2) / (mp**2 + mq**2 + 0.02**2))
        return np.mean(np.multiply(luminance, contrast)), np.mean(contrast)

    def both(a, b):  # two scales fit into 32 pixels
        halved = [v.reshape(3, 16, 2, 16, 2).mean((2, 4)) for v in (a, b)]
        share = 0.0448 / (0.0448 + 0.2856)
        return scale(a, b)[1] ** share * scale(*halved)[0] ** (1 - share)

    wanted = np.mean([both(*pair) for pair in zip(x.numpy(), y.numpy(), strict=True)])
    assert dim.ms_ssim(x.float(), y.float()).item() == pytest.approx(wanted, abs=1e-4)
    assert dim.ms_ssim(x.float(), x.float()).item() == pytest.approx(1, abs=1e-5)
    assert dim.ms_ssim(x.float(), -x.float()).item() == 0


def test_held_out_loss(train):
    args, _, _ = train("--steps", 2, "--alpha", 0.5)
    E, T, _ = dim.restore(args)
    values = []
    for x in islice(dim.images(args, "test", 8), 16):
        places, conv, _, Y = E(x)
        s = dim.scores(T, places, conv, Y)
        values.append(0.5 * by_the_formulas(s["global"])["infonce"] + by_the_formulas(s["local"])["infonce"])
    assert dim.held_out(args, E, T) == pytest.approx(np.mean(values), rel=1e-4)


def test_evaluation_leaves_the_encoder_alone(train, monkeypatch):
    """And names its numbers; fine-tuning is of a copy."""
    args, _, _ = train("--finetune")
    monkeypatch.undo()

    def labelled(*words):
        data = toy(*words)
        data.labels, data.classes = torch.arange(64) % 2, ["even", "odd"]
        return data

    monkeypatch.setattr(dim, "load", labelled)
    args.fits = dict.fromkeys(args.fits, (16, 1))
    restored, restore = [], dim.restore
    monkeypatch.setattr(dim, "restore", lambda args: restored.append(restore(args)) or restored[0])
    dim.evaluate(args)
    state, (E, T, _) = dim.read_checkpoint(args), restored[0]
    for name, network in (("E", E), ("T", T)):
        assert all(torch.equal(value, state[name][key]) for key, value in network.state_dict().items()), name
    metrics = json.loads((args.out / "metrics.json").read_text())
    assert {"probe_top1", "knn_top1", "untrained_probe_top1", "raw_pixels_probe_top1", "chance"} <= set(metrics)
    assert {f"{k}{name}_probe_top1" for k in ("", "untrained_") for name in ("conv", "Y")} <= set(metrics)
    assert {f"{name}_mlp_top1" for name in ("conv", "fc", "Y")} | {"finetuned_top1"} <= set(metrics)
    assert {"ndm", "mine", "ms_ssim", "loss_test"} <= set(metrics) and not any(
        key.startswith(("fid", "fd_")) for key in metrics
    )
    assert metrics["parameters"] == {"E": count(E), "T": count(T), "D": 265_401}
    assert (args.out / "reconstructions.png").exists()


def test_nothing_to_learn_is_refused():
    with pytest.raises(UserError, match="--alpha"):
        arguments("--beta", 0)


# ------------------------------------------------------------ it learns
STEPS = 200


@pytest.fixture
def one_thread():
    """So that the time does not depend on what else the machine does: threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_it_learns(monkeypatch, tmp_path, root, one_thread):
    """The demo, shortened: it tells whose the places of test images are, and fc tells more of shapes than before."""
    for name in ("sample", "evaluate", "picture"):
        monkeypatch.setattr(dim, name, lambda *args, **options: None)
    args = arguments("--root", root, "--out", tmp_path, "--steps", STEPS, "--save-every", 10 * STEPS)
    dim.train(args)
    E, T, _ = dim.restore(args)
    train, test = (load("shapes", split, 32, root, rows=slice(n)) for split, n in (("train", 3000), ("test", 1500)))

    def accuracy(network):
        return linear_probe.probe(*(linear_probe.extract(network.features()["fc"], data) for data in (train, test)))[
            "top1"
        ]

    untrained = dim.build(args)[0]
    linear_probe.calibrate(untrained, train)
    before, after, loss = accuracy(untrained), accuracy(E), dim.held_out(args, E, T)
    print(f"infoNCE {loss:.3f}, probe {before:.3f} -> {after:.3f} after {STEPS} steps")
    assert loss < 7.3, f"the critic cannot tell whose places they are: infoNCE {loss:.3f}, 8.302 if it guesses"
    assert after > before + 0.04, f"E has learnt nothing: probe {before:.3f} -> {after:.3f}"
