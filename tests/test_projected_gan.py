"""projected_gan.py against its paper and the official code: counts, parity, losses, augmentation, who is trained, the
feature networks, the loop, and that it learns.

About 75 seconds on one core, half of it the shortened demo.
"""

import gc
import json
import math
import sys
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from fill import converge_spectral_norm_, fill_, inputs
from test_parity import agree, filled
from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import bigbigan
import byol
import projected_gan
from common.data import Data, UserError


def arguments(*flags, script=projected_gan):
    """What main() makes of a command line."""
    words = [f"{script.SCRIPT}.py", "--device", "cpu", "--precision", "fp32", *map(str, flags)]
    with mock.patch.object(sys, "argv", words):
        args = script.parse()
    script.start(args)
    return args


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.fixture
def meta():
    """Networks built here have shapes, but no numbers."""
    with torch.device("meta"), mock.patch.object(_SpectralNorm, "_power_method"):
        yield


def efficientnet(side=224):
    return projected_gan.Features(torchvision.models.efficientnet_b0().features[:-1], side, "imagenet")


# ------------------------------------------------------------ sizes
GENERATORS = {  # (size, ngf, lite): parameters
    (256, 128, False): 105_684_175,
    (512, 128, False): 105_870_961,
    (1024, 128, False): 105_884_483,
    (256, 64, False): 30_622_319,
    (256, 128, True): 79_354_307,
    (256, 64, True): 24_037_603,
    (32, 128, False): 91_124_489,
    (64, 128, False): 101_939_979,
    (128, 128, False): 104_935_821,
    (32, 64, False): 26_982_793,
    (64, 64, False): 29_687_179,
    (128, 64, False): 30_435_533,
    (32, 128, True): 66_344_707,
    (64, 128, True): 75_979_523,
    (128, 128, True): 78_679_939,
    (32, 64, True): 20_786_051,
    (64, 64, True): 23_195_011,
    (128, 64, True): 23_869_379,
}


def test_parameters_of_the_generator(meta):
    for (size, ngf, lite), parameters in GENERATORS.items():
        G = projected_gan.Generator(size, ngf, 256, lite)
        assert count(G) == parameters, (size, ngf, lite)
    z = torch.empty(2, 256)
    assert G(z).shape == (2, 3, 128, 128)


def test_parameters_of_the_layers_of_the_generator(meta):
    G = projected_gan.Generator(256)
    excited = [block.excitation and count(block.excitation) for block in G.blocks]
    assert excited == [None, None, None, 8_454_144, 2_113_536, 528_384]
    blocks = [count(block) - (n or 0) for block, n in zip(G.blocks, excited, strict=True)]
    assert blocks == [56_631_298, 14_159_874, 3_540_994, 2_361_346, 885_762, 221_698]
    assert (count(G.first), count(G.last)) == (16_785_408, 1_731)
    assert [bool(block.excitation) for block in projected_gan.Generator(1024).blocks] == [False] * 3 + [True] * 4 + [
        False
    ]


def test_parameters_of_the_discriminator(meta):
    D = projected_gan.Discriminator(efficientnet())
    assert [count(head) for head in D.heads] == [2_829_120, 2_763_392, 2_631_936, 2_106_880]
    assert count(D.heads) == 10_331_328
    assert [count(conv) for conv in D.projection.ccm] == [1_600, 5_248, 28_928, 164_352]
    assert [count(conv) for conv in D.projection.csm] == [4_160, 8_256, 32_896, 131_328]
    assert count(D.projection) == 376_768 and count(D.features) == 3_595_388
    stages = [D.features.trunk[a:b] for a, b in pairwise([0, *(end + 1 for end in D.features.ends)])]
    assert [count(stage) for stage in stages] == [19_090, 46_640, 786_078, 2_743_580]
    assert count(projected_gan.Discriminator(D.features, separable=True).heads) == 696_512
    assert count(projected_gan.Projection([24, 40, 112, 320], refine=True)) == 376_768 + 3_908_992


def test_shapes_of_the_discriminator(meta):
    D, x = projected_gan.Discriminator(efficientnet()), torch.empty(2, 3, 32, 32)
    assert D.features.shapes == [(24, 56), (40, 28), (112, 14), (320, 7)]
    assert [tuple(p.shape[1:]) for p in D.maps(x)] == [(64, 112, 112), (64, 56, 56), (128, 28, 28), (256, 14, 14)]
    assert D(x).shape == (2, 64)
    assert projected_gan.Discriminator(D.features, separable=True)(x).shape == (2, 64)
    for side, logits in ((256, 100), (512, 4 * 13**2)):  # not enlarged; the heads' depth stays
        assert projected_gan.Discriminator(efficientnet(side))(torch.empty(2, 3, side, side)).shape == (2, logits)


@pytest.mark.parametrize(
    ("flags", "size", "parameters"),
    [
        ("--data imagenet", 256, (105_684_175, 10_331_328)),
        ("--data cifar10", 32, (26_982_793, 10_331_328)),
        ("--data cifar10 --size 64 --ngf 128 --lite --separable", 64, (75_979_523, 696_512)),
        ("--data shapes", 32, None),
        ("--data shapes --size 64", 64, None),
        ("--data shapes --plain", 32, None),
        ("--data imagenet --plain", 256, None),
        ("--data cifar10 --plain --separable", 32, None),
    ],
)
def test_presets(meta, flags, size, parameters):
    args = arguments(*flags.split())
    args.device = "meta"
    G, D = projected_gan.build(args)
    assert not parameters or (count(G), count(D.heads)) == parameters
    x = G(torch.empty(2, args.z_dim))
    assert x.shape == (2, 3, size, size)
    assert D(x).ndim == 2 and len(D(x)) == 2


def test_the_paper_preset_is_the_papers():
    args = arguments("--data", "imagenet")
    wanted = dict(size=256, ngf=128, z_dim=256, lite=False, cout=64, features="pretrained", separable=False, batch=64)
    wanted |= dict(refine=False, lr_g=2e-4, lr_d=2e-4, betas=(0.0, 0.99), plain=False, fid_samples=50_000)
    assert {name: getattr(args, name) for name in wanted} == wanted
    assert args.steps * args.batch == 10_000_000


# ------------------------------------------------------------ parity with the official code
@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "size", "parameters"), [("15", 256, 1_916_519), ("15r64", 64, 1_858_411), ("15r32", 32, 1_689_193)]
)
def test_parity_of_the_generator(case, size, parameters):
    # planar: torch's batch norm of large channels_last maps is a hundred times less exact on the CPU
    G, seen = filled(projected_gan.Generator(size, 16, 64)).to(memory_format=torch.contiguous_format), {}
    assert count(G) == parameters
    for block in G.blocks:
        for strength in block.strengths:
            strength.zero_()
    for name, module in {"map_4": G.first, "map_32": G.blocks[2], "map_64": G.blocks[-1 if size < 64 else 3]}.items():
        module.register_forward_hook(lambda m, inputs, out, name=name: seen.update({name: out}))
    for rows, prefix, key in ((2, "", "out"), (8, "train_", "train")):
        (z,) = inputs(15, (rows, 64))
        G.train(bool(prefix))
        projected_gan.power_iteration(*[G] * bool(prefix))  # from the exact singular vectors it changes nothing
        agree(f"{case}.{key}", G(z))
        for name in ("map_4", "map_32", "map_64") if case == "15" else ():
            agree(f"15.{prefix}{name}", seen[name])


class Maps(nn.Module):  # in place of a feature network
    shapes = ((24, 56), (40, 28), (112, 14), (320, 7))


@torch.no_grad()
def test_parity_of_the_heads():
    heads = filled(projected_gan.Discriminator(Maps()).heads)
    p = inputs(16, (2, 64, 112, 112), (2, 64, 56, 56), (2, 128, 28, 28), (2, 256, 14, 14))
    for prefix in ("", "train_"):
        if prefix:
            projected_gan.power_iteration(heads.train())
        logits = [head(x) for head, x in zip(heads, p, strict=True)]
        for k, found in enumerate(logits):
            agree(f"16.{prefix}d{k}", found)
        agree(f"16.{prefix}all", torch.cat([found.flatten(1) for found in logits], 1))


@torch.no_grad()
def test_parity_of_the_projections():
    projection = fill_(projected_gan.Projection([24, 40, 112, 320]))
    f = inputs(17, (2, 24, 56, 56), (2, 40, 28, 28), (2, 112, 14, 14), (2, 320, 7, 7))
    for k, found in enumerate(projection(f)):
        agree(f"17.p{k}", found)
    for k, (ccm, x) in enumerate(zip(projection.ccm, f, strict=True)):
        agree(f"17.ccm{k}", ccm(x))


# ------------------------------------------------------------ the generator
def test_normalisation_of_z():
    G, seen = projected_gan.Generator(32, 4, 4, lite=True).eval(), []
    G.first.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    G(torch.tensor([[3.0, 4.0, 0.0, 0.0]]))
    assert torch.allclose(seen[0][:, :, 0, 0], torch.tensor([[1.2, 1.6, 0.0, 0.0]]))


@torch.no_grad()
def test_up_block_by_the_formula():
    """Nearest doubling; convolution, noise, batch norm, GLU, twice; once and without noise if lite."""
    x = torch.randn(2, 4, 4, 4)
    noise = [torch.randn(2, 1, 8, 8) for _ in range(2)]
    for lite in (False, True):
        block = converge_spectral_norm_(fill_(projected_gan.UpBlock(4, 6, lite))).eval()
        y = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        for i, (conv, norm) in enumerate(zip(block.convs, block.norms, strict=True)):
            W = conv.parametrizations.weight.original
            y = F.conv2d(y, W / torch.linalg.matrix_norm(W.flatten(1), 2), padding=1)
            y = norm(y if lite else y + block.strengths[i] * noise[i])
            y = y[:, :6] * torch.sigmoid(y[:, 6:])
        assert len(block.convs) == 2 - lite
        assert torch.allclose(block(x, None, [] if lite else list(noise)), y, atol=1e-5)
    assert torch.allclose(F.glu(torch.tensor([[1.0, -2.0, 0.0, math.log(3)]])), torch.tensor([[0.5, -1.5]]))


@torch.no_grad()
def test_noise_is_heard_once_its_strength_is_not_zero():
    args = arguments("--no-lite", "--ngf", 2)
    G, _ = projected_gan.build(args)
    G.eval()
    z, *noise = projected_gan.latents(args, G, 2, 0, 0)
    assert [n.shape[-1] for n in noise] == [8, 8, 16, 16, 32, 32] == G.noisy
    assert all(float(s) == 0 for block in G.blocks for s in block.strengths)
    silent = G(z)
    assert torch.equal(G(z, *noise), silent)
    for i, s in enumerate(s for block in G.blocks for s in block.strengths):
        s.fill_(1.0)
        louder = G(z, *noise)
        other = [torch.randn_like(n) if k == i else n for k, n in enumerate(noise)]
        assert not torch.allclose(G(z, *other), louder)  # each map has its own place
        s.fill_(0.0)


# ------------------------------------------------------------ DiffAugment
still = [0.5, 0.5, 0.5, 0.5, 0.5]  # brightness + 0, saturation * 1, contrast * 1, moved by 0


def test_colours():
    x = torch.rand(2, 3, 4, 4) * 2 - 1
    assert torch.allclose(projected_gan.recolour(x, torch.full((2, 3), 0.5)), x, atol=1e-6)
    grey = projected_gan.recolour(torch.tensor([0.9, 0.3, -0.3]).view(1, 3, 1, 1), torch.tensor([[0.5, 0.25, 0.5]]))
    assert torch.allclose(grey.flatten(), torch.tensor([0.6, 0.3, 0.0]), atol=1e-6)
    x = torch.tensor([[1.0, -1.0], [0.0, 0.5]]).expand(1, 3, 2, 2)
    wanted = torch.tensor([[1.4375, -1.5625], [-0.0625, 0.6875]])
    assert torch.allclose(projected_gan.recolour(x, torch.tensor([[0.5, 0.5, 1.0]])), wanted.expand(1, 3, 2, 2))
    brighter = projected_gan.recolour(x, torch.tensor([[0.9, 0.5, 0.5]]))
    assert torch.allclose(brighter, x + 0.4, atol=1e-6)


@pytest.mark.parametrize(("size", "reach", "hole"), [(32, 4, 6), (256, 32, 51)])
def test_translation_and_cutout(size, reach, hole):
    x = torch.rand(1, 3, size, size) + 1
    u = torch.tensor([[*still, 0.5, 0.5]])
    out = projected_gan.augment(x, u)
    assert int((out == 0).sum()) == 3 * hole * hole and torch.allclose(out[out != 0], x[out != 0], atol=1e-6)
    corner = torch.tensor([[*still, 0.0, 0.0]])  # cut by the border
    gone = (projected_gan.augment(x, corner) == 0)[0, 0]
    half = hole - hole // 2
    assert gone[:half, :half].all() and gone.sum() == half * half
    for v, shift in ((0.0, -reach), (1 - 1e-6, reach)):
        u = torch.tensor([[*still[:3], v, 0.5, 0.0, 0.0]])
        out = projected_gan.augment(x, u)[0, :, half:, half:]
        wanted = torch.zeros_like(x[0])
        if shift > 0:
            wanted[:, :-shift] = x[0, :, shift:]
        else:
            wanted[:, -shift:] = x[0, :, :shift]
        assert torch.allclose(out, wanted[:, half:, half:], atol=1e-6)


def test_augmentation_is_each_pictures_own_and_has_a_gradient():
    u = torch.rand(64, 7, generator=torch.Generator().manual_seed(0))
    x = torch.rand(1, 3, 32, 32).expand(64, -1, -1, -1).clone().requires_grad_()
    out = projected_gan.augment(x, u)
    assert not any(torch.equal(a, b) for a, b in pairwise(out))
    moved = projected_gan.augment(torch.ones(64, 3, 32, 32), torch.cat([torch.full((64, 3), 0.5), u[:, 3:]], 1))
    zeros = (moved == 0).float().mean((1, 2, 3))
    assert zeros.min() > 0 and zeros.max() < 1 - (28 / 32) ** 2 + (6 / 32) ** 2 + 1e-6
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert float(gradient.abs().sum()) > 0 and gradient.isfinite().all()


# ------------------------------------------------------------ the objective
def test_hinge_values():
    real, fake = torch.tensor([[2.0, 0.5, -1.0, 0.0]]), torch.tensor([[-2.0, 0.5, 1.0, -0.25]])
    assert projected_gan.discriminator_loss(real, torch.full((1, 4), -1.0)).item() == pytest.approx(0.875)
    assert projected_gan.discriminator_loss(torch.ones(1, 4), fake).item() == pytest.approx(1.0625)
    assert projected_gan.generator_loss(fake).item() == pytest.approx(0.1875)


def test_losses_in_numpy():
    random = np.random.default_rng(0)
    real, fake = random.standard_normal((2, 8, 16))
    wanted = np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean()
    assert projected_gan.discriminator_loss(torch.tensor(real), torch.tensor(fake)).item() == pytest.approx(wanted)
    assert projected_gan.generator_loss(torch.tensor(fake)).item() == pytest.approx(-fake.mean())
    a, b = random.standard_normal((2, 5, 7))
    codes = np.concatenate([a, b])
    codes /= np.linalg.norm(codes, axis=1, keepdims=True)
    terms = []
    for i in range(10):
        others = [j for j in range(10) if j != i]
        e = np.exp(codes @ codes[i] / 0.2)
        terms.append(-np.log(e[(i + 5) % 10] / e[others].sum()))
    assert projected_gan.contrast(torch.tensor(a), torch.tensor(b)).item() == pytest.approx(np.mean(terms))


def test_decay_of_the_average():
    assert projected_gan.ema_decay(0, 64) == 0
    assert projected_gan.ema_decay(64_000, 64) == pytest.approx(0.986233, abs=1e-6)
    assert projected_gan.ema_decay(400_000, 64) == pytest.approx(0.997784, abs=1e-6)
    assert projected_gan.ema_decay(10**7, 64) == projected_gan.ema_decay(400_000, 64)


# ------------------------------------------------------------ the projections
def test_projections_are_affine():
    projection = projected_gan.Projection([3, 5, 7, 9], cout=4, refine=True)
    random = torch.Generator().manual_seed(0)
    u, v = ([torch.randn(2, c, h, h, generator=random) for c, h in ((3, 16), (5, 8), (7, 4), (9, 2))] for _ in range(2))
    for p, q, mixed in zip(
        projection(u), projection(v), projection([0.3 * a + 0.7 * b for a, b in zip(u, v, strict=True)]), strict=True
    ):
        assert torch.allclose(0.3 * p + 0.7 * q, mixed, atol=1e-5)
    assert [tuple(p.shape[1:]) for p in projection(u)] == [(4, 32, 32), (4, 16, 16), (8, 8, 8), (16, 4, 4)]


def test_projections_by_the_formula():
    """From the coarsest map: [add], [3x3 convolutions], bilinear doubling with aligned corners, 1x1 convolution."""
    up = lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
    doubled = up(torch.tensor([[0.0, 3.0], [6.0, 9.0]])[None, None])[0, 0]
    assert torch.allclose(doubled[0], torch.arange(4.0)) and torch.allclose(doubled[3], torch.arange(6.0, 10.0))
    for refine in (False, True):
        P = projected_gan.Projection([3, 5, 7, 9], cout=4, refine=refine)
        f = [torch.randn(2, c, h, h) for c, h in ((3, 16), (5, 8), (7, 4), (9, 2))]
        p = None
        for k in (3, 2, 1, 0):
            x = P.ccm[k][0](f[k])
            if refine and k < 3:
                x = x + P.ccm[k][1].branch(x)
            x = x if p is None else x + p
            if refine:
                x = x + P.csm[k][0].branch(x)
            p = P.csm[k][1](up(x))
            assert torch.allclose(P(f)[k], p, atol=1e-5)


def test_projections_start_as_in_the_code():
    weight = projected_gan.Projection([24, 40, 112, 320]).csm[3][1].weight
    assert weight.std().item() == pytest.approx(1 / math.sqrt(3 * 512), rel=0.02)
    assert weight.abs().max() <= 1 / math.sqrt(512) and not weight.requires_grad


# ------------------------------------------------------------ what is frozen, and stays so
def toy(name, split, size, root, skip_broken, rows=slice(None)):
    """64 pictures of noise and no labels."""
    images = torch.randint(256, (64, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Data("toy", split, size, images, f"toy{split}", root)


@pytest.fixture
def players():
    args = arguments()
    G, D = projected_gan.build(args)
    fill_(D.features)
    return args, G, D


def test_gradients_go_where_they_should(players):
    args, G, D = players
    z, u = torch.randn(4, args.z_dim), torch.rand(4, 7)
    G.train(), D.train()
    frozen = [*D.features.parameters(), *D.projection.parameters()]
    D.heads.requires_grad_(False)
    x_hat = G(z)
    x_hat.retain_grad()
    projected_gan.generator_loss(D(projected_gan.augment(x_hat, u))).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in G.parameters() if p.ndim > 1)
    assert all(p.grad is None for p in [*frozen, *D.heads.parameters()])
    assert float(x_hat.grad.norm()) > 0
    G.zero_grad()
    D.heads.requires_grad_(True)
    with torch.no_grad():
        x_hat = G(z)
    projected_gan.discriminator_loss(D(torch.rand(4, 3, 32, 32)), D(x_hat)).backward()
    assert all(p.grad is not None for p in D.heads.parameters())
    assert all(p.grad is None for p in [*frozen, *G.parameters()])
    assert not any(p.requires_grad for p in frozen)


def test_features_stay_in_evaluation_mode(players):
    _, _, D = players
    before = {k: v.clone() for k, v in D.features.state_dict().items()}
    x = torch.rand(4, 3, 32, 32)
    for _ in range(10):
        D.train()
        D(x)
    norms = [m for m in D.features.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(m.training for m in norms) and all(m.training for m in D.heads.modules())
    assert all(torch.equal(v, before[k]) for k, v in D.features.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(D.features(x), D.features(x), strict=True))
    together, alone = D.features(x), D.features(x[:1])
    assert all(torch.allclose(a[:1], b, atol=1e-5) for a, b in zip(together, alone, strict=True))


def test_there_is_one_copy_of_the_features(monkeypatch, tmp_path):
    """In a whole run, its pictures and its evaluation included, F is built once; and no gradients are kept for it."""

    def storages():  # of whatever has the shape of F's last convolution
        gc.collect()
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and o.shape == (160, 160, 3, 3)]
        return {tensor.data_ptr() for tensor in tensors}

    create, made, before = projected_gan.Features.__init__, [], storages()
    monkeypatch.setattr(projected_gan.Features, "__init__", lambda self, *a: made.append(self) or create(self, *a))
    monkeypatch.setattr(projected_gan, "load", toy)
    monkeypatch.setattr(projected_gan.fid, "evaluate", lambda *args: {"fd_random": 1.0})
    args = arguments("--out", tmp_path, "--steps", 2, "--batch", 4, "--feature-steps", 1)
    projected_gan.train(args)
    assert len(made) == 1 and (tmp_path / "metrics.json").exists()
    assert len(storages() - before) == 1
    assert all(p.grad is None and not p.requires_grad for p in made[0].parameters())


# ------------------------------------------------------------ feature networks from elsewhere
def read(path):
    return projected_gan.feature_network(arguments("--features", path))


@torch.no_grad()
def test_features_enlarge_and_normalise():
    features, x = efficientnet(), torch.rand(1, 3, 32, 32) * 2 - 1
    model = torchvision.models.efficientnet_b0().eval()
    model.features[:-1].load_state_dict(features.trunk.state_dict())
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    y = (F.interpolate(x, size=(224, 224), mode="bilinear", align_corners=False) / 2 + 0.5 - mean) / std
    for found, end in zip(features(x), (3, 4, 6, 8), strict=True):
        assert torch.allclose(found, model.features[:end](y), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["efficientnet_b0", "resnet18"])
def test_features_from_torchvision(tmp_path, name):
    model = fill_(torchvision.models.get_model(name)).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    features, x = read(tmp_path / "weights.pth"), torch.rand(2, 3, 224, 224) * 2 - 1
    assert features.side == 224 and len(features.shapes) == 4
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    maps, y = features(x), (x / 2 + 0.5 - mean) / std
    if name == "efficientnet_b0":
        wanted = model.features[:-1](y)
    else:
        wanted = nn.Sequential(*list(model.children())[:-2])(y)
    assert torch.allclose(maps[3], wanted, atol=1e-4 * float(wanted.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("flags", ["", "--encoder resnet18 --encoder-size 64", "--encoder resnet50 --encoder-size 96"])
def test_features_from_bigbigan(tmp_path, flags):
    args = arguments(*flags.split(), script=bigbigan)
    _, E, _ = bigbigan.build(args)
    fill_(E).eval()
    torch.save(
        {"script": "bigbigan", "config": args.config, "step": 1, "E": E.state_dict()}, tmp_path / "checkpoint.pt"
    )
    features, x = read(tmp_path / "checkpoint.pt"), torch.rand(2, 3, args.encoder_size, args.encoder_size) * 2 - 1
    wanted = E.trunk(x)
    assert torch.allclose(features(x)[3], wanted, atol=1e-4 * float(wanted.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize(
    "flags", ["", "--data cifar10", "--data cifar10 --encoder resnet50 --width 8 --size 96", "--no-grey"]
)
def test_features_from_byol(tmp_path, flags):
    args = arguments(*flags.split(), script=byol)
    online, _ = byol.build(args)
    fill_(online).eval()
    torch.save(
        {"script": "byol", "config": args.config, "step": 1, "online": online.state_dict()}, tmp_path / "checkpoint.pt"
    )
    features, x = read(tmp_path / "checkpoint.pt"), torch.rand(2, 3, args.size, args.size) * 2 - 1
    wanted = online.f(x)
    assert torch.allclose(features(x)[3].mean((2, 3)), wanted, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    "content", [b"", b"not a file of weights", {"a": 1}, {"conv1.weight": torch.zeros(8, 3, 7, 7)}]
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    for file in (path, tmp_path / "nowhere.pth"):
        with pytest.raises(UserError, match=str(file)) as error:
            read(file)
        assert "\n" not in str(error.value)


def test_without_weights_it_stops(tmp_path):
    """Never in silence with a random network."""
    args = arguments("--data", "cifar10", "--out", tmp_path)
    with (
        mock.patch("torchvision.models.efficientnet_b0", side_effect=OSError("no network")),
        mock.patch.object(projected_gan, "efficientnet_b0", side_effect=OSError("no network")),
        pytest.raises(UserError, match="--features"),
    ):
        projected_gan.build(args, fresh=True)
    assert args.features == "pretrained"


# ------------------------------------------------------------ features trained on the spot
def test_pretraining_is_a_function_of_the_seed():
    data, weights = toy("toy", "train", 32, None, False), []
    for seed in (0, 0, 1):
        args = arguments("--seed", seed)
        _, D = projected_gan.build(args)
        torch.randn(seed + len(weights))  # nothing else's randomness enters
        projected_gan.pretrain(args, data, D.features.trunk, 2)
        weights.append(torch.cat([v.flatten().float() for v in D.features.state_dict().values()]))
        assert not any(p.requires_grad or p.grad is not None for p in D.features.parameters())
        assert not any(m.training for m in D.features.modules())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


# ------------------------------------------------------------ the loop
@pytest.fixture
def train(monkeypatch, tmp_path):
    """train(*flags) on noise, without pictures and evaluation; returns its networks and what happened on the way.

    events: per optimiser step its name, learning rate, betas, and for each network the parameters before and after.
    """
    monkeypatch.setattr(projected_gan, "load", toy)
    for name in ("sample", "evaluate", "picture"):
        monkeypatch.setattr(projected_gan, name, lambda *args: None)
    build = projected_gan.build
    flat = lambda module: torch.cat([p.detach().flatten() for p in module.parameters()]).clone()

    def run(*flags, prepare=lambda *networks: None):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        small = ["--ngf", 2, "--cout", 4, "--z-dim", 8, "--features", "random", "--batch", 8, "--log-every", 100]
        args, events, judged = arguments(*small, "--steps", 1, "--out", folder, *flags), [], []
        G, D = build(args)
        prepare(G, D)
        monkeypatch.setattr(projected_gan, "build", lambda args, fresh=False: [G, D])
        parts = {"G": G, "heads": D.heads, "frozen": nn.ModuleList([D.features, D.projection])}
        owner = {id(p): name for name, part in parts.items() for p in part.parameters()}

        def before(optimizer, *_):
            group = optimizer.param_groups[0]
            if id(group["params"][0]) in owner:
                values = {"of": owner[id(group["params"][0])], "lr": float(group["lr"]), "betas": group["betas"]}
                modes = {
                    name: {m.training for m in part.modules() if isinstance(m, nn.BatchNorm2d)}
                    for name, part in parts.items()
                }
                grads = {name: [p.grad is not None for p in part.parameters()] for name, part in parts.items()}
                values |= {"gradient": torch.cat([p.grad.flatten() for p in parts[values["of"]].parameters()])}
                events.append(
                    values | {"modes": modes, "grads": grads, "before": {k: flat(m) for k, m in parts.items()}}
                )

        def after(optimizer, *_):
            if id(optimizer.param_groups[0]["params"][0]) in owner:
                events[-1]["after"] = {k: flat(m) for k, m in parts.items()}

        handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
        handles.append(D.register_forward_hook(lambda m, inputs, out: judged.append(inputs[0].detach())))
        try:
            projected_gan.train(args)
        finally:
            for handle in handles:
                handle.remove()
        return args, G, D, events, judged

    return run


def test_a_step(train):
    """G first, then D's heads; each moves alone, in train mode, F never; fresh latents and augmentations for each."""
    args, _, _, events, judged = train("--lr-g", 1e-4, "--lr-d", 3e-4, "--steps", 2)
    assert [event["of"] for event in events] == ["G", "heads", "G", "heads"]
    for event in events:
        moved = {name for name, value in event["before"].items() if not torch.equal(value, event["after"][name])}
        assert moved == {event["of"]}
        assert event["modes"] == {"G": {True}, "heads": {True}, "frozen": {False}}
        assert event["lr"] == pytest.approx({"G": 1e-4, "heads": 3e-4}[event["of"]])
        assert tuple(event["betas"]) == args.betas and not any(event["grads"]["frozen"])
    assert not any(events[0]["grads"]["heads"]) and all(events[1]["grads"]["heads"])
    assert [len(x) for x in judged[:3]] == [8, 8, 8]  # drawn for G; drawn and real for D, apart
    assert not any(torch.equal(a, b) for i, a in enumerate(judged[:6]) for b in judged[:i])


def test_gradients_that_are_not_finite_are_cleaned(train):
    def spoil(G, D):
        parameters = list(G.parameters())[:2]
        parameters[0].register_hook(lambda g: torch.full_like(g, float("nan")))
        parameters[1].register_hook(lambda g: torch.full_like(g, float("inf")))

    _, G, _, events, _ = train(prepare=spoil)
    assert all(p.isfinite().all() for p in G.parameters())
    first = next(G.parameters()).numel()
    moved = events[0]["before"]["G"] - events[0]["after"]["G"]
    assert (moved[:first] == 0).all() and (moved[first : first + 1] > 0).all()


def test_one_power_iteration_a_phase(train):
    calls, iterate = [], _SpectralNorm._power_method
    record = lambda self, *args: calls.append(self) or iterate(self, *args)
    with mock.patch.object(_SpectralNorm, "_power_method", record):
        _, G, D, _, _ = train("--accumulate", 2, prepare=lambda *_: calls.clear())
    own = [m for network in (G, D) for m in network.modules() if isinstance(m, _SpectralNorm)]
    assert own and all(sum(call is m for call in calls) == 2 for m in own)


def test_average(train):
    """beta ema + (1 - beta) theta of the parameters, theta's own buffers; beta by the images seen before the step."""
    args, G, _, events, _ = train("--steps", 4)
    w = [event["after"]["G"] for event in events if event["of"] == "G"]
    wanted = w[0]
    for n in (1, 2, 3):
        beta = 0.5 ** (8 / min(2500, 0.05 * 8 * n))
        wanted = beta * wanted + (1 - beta) * w[n]
    state = torch.load(args.out / "checkpoint.pt", weights_only=True)["G_ema"]
    found = torch.cat([state[f"module.{k}"].flatten() for k, _ in G.named_parameters()])
    assert torch.allclose(found, wanted, atol=1e-6) and not torch.allclose(found, w[3], atol=1e-6)
    assert all(torch.equal(state[f"module.{k}"], v) for k, v in G.named_buffers())


def test_features_and_projections_are_in_the_checkpoint(train):
    args, _, D, _, _ = train("--steps", 2)
    state = torch.load(args.out / "checkpoint.pt", weights_only=True)["D"]
    for part in ("features", "projection"):
        values = getattr(D, part).state_dict()
        assert values and all(torch.equal(state[f"{part}.{k}"], v) for k, v in values.items())


def test_pieces_add_up_to_the_batch(train):
    """The gradients of four pieces are those of one batch, G's and D's, where batch norm does not look at the batch."""

    def freeze(*networks):
        for module in (m for network in networks for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
            module.eval().train = lambda mode=True: None

    whole, pieces = (train("--accumulate", n, "--lr-g", 0, "--lr-d", 0, prepare=freeze)[3] for n in (1, 4))
    for a, b in zip(whole, pieces, strict=True):
        assert a["of"] == b["of"]
        bound = 1e-4 * float(a["gradient"].abs().max())
        assert bound > 0 and torch.allclose(a["gradient"], b["gradient"], atol=bound)


def test_watched_numbers(train):
    args, *_ = train("--steps", 2, "--log-every", 1)
    row = json.loads((args.out / "log.jsonl").read_text().splitlines()[-1])
    assert {"step", "loss_d", "loss_g", "lr", "img_per_s", "gap_0", "gap_1", "gap_2", "gap_3"} <= set(row)


def test_baseline(monkeypatch, tmp_path):
    """One command, two runs of the same G: by pixels in OUT/plain, by projected features in OUT; both distances."""
    monkeypatch.setattr(projected_gan, "load", toy)
    monkeypatch.setattr(projected_gan.fid, "evaluate", lambda *args, **options: {"fd_random_100": 2.0, "n_fake": 100})
    small = ["--steps", 4, "--eval-every", 2, "--batch", 4, "--feature-steps", 1]
    projected_gan.train(arguments("--out", tmp_path, "--baseline", *small))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for name in ("projected", "plain"):
        rows = metrics[name]
        assert [row["step"] for row in rows] == [2, 4] and all(row["fd_random_100"] == 2 for row in rows)
        assert 0 < rows[0]["seconds"] < rows[1]["seconds"]
    plain = torch.load(tmp_path / "plain" / "checkpoint.pt", weights_only=True)
    assert plain["config"]["plain"] and not any(key.startswith("features") for key in plain["D"])
    assert (tmp_path / "plain" / "samples.png").exists() and metrics["parameters"].keys() == {"G", "D"}
    one, two = (projected_gan.build(arguments(*flags))[0].state_dict() for flags in ((), ("--plain",)))
    assert all(torch.equal(a, b) for a, b in zip(one.values(), two.values(), strict=True))


# ------------------------------------------------------------ it learns
def test_it_learns(monkeypatch, tmp_path, root):
    """The demo, shortened: the drawn pictures' distance from real ones falls far below that of an untrained G, whose
    batch norm may look at its own batch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in ("sample", "evaluate", "picture"):
            monkeypatch.setattr(projected_gan, name, lambda *args: None)
        short = ["--steps", 60, "--feature-steps", 10, "--save-every", 60, "--fid-samples", 1000]
        args = arguments("--root", root, "--out", tmp_path, *short)
        G, _ = projected_gan.build(args)
        with torch.no_grad():
            before = projected_gan.judge_samples(args, G.train(), full=False)["fd_random_1000"]
        projected_gan.train(args)
        G, *_ = projected_gan.restore(args)
        after = projected_gan.judge_samples(args, G, full=False)["fd_random_1000"]
    finally:
        torch.set_num_threads(threads)
    print(f"fd_random_1000 {before:.0f} -> {after:.0f}")
    assert after < 0.4 * before, f"G has learnt nothing: fd_random_1000 {before:.0f} -> {after:.0f}"
