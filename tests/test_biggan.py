"""biggan.py against its paper: parameter counts, parity with the authors' code, losses, the two players' gradients,
truncation, standing statistics, pictures and numbers, and whether it learns to draw.

About three minutes on one core.
"""

import json
import math
import sys
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fill import coarse, inputs
from PIL import Image
from test_parity import agree, filled
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import AveragedModel

import biggan
from common import fid
from common.data import Data, UserError

CLASSES = 10


def arguments(*flags, **changes):
    """What main() makes of a command line, for a data set of ten classes."""
    with mock.patch.object(sys, "argv", ["biggan.py", "--device", "cpu", "--precision", "fp32", *map(str, flags)]):
        args = biggan.parse()
    biggan.start(args)
    vars(args).update({"classes": CLASSES} | changes)
    return args


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def built(*flags, **changes):
    """G and D on the meta device: shapes without numbers."""
    args = arguments(*flags, **changes)
    args.device = "meta"
    slow = mock.patch("torch.nn.init.orthogonal_"), mock.patch.object(_SpectralNorm, "_power_method")
    with torch.device("meta"), slow[0], slow[1]:
        return args, *biggan.build(args)


def randomize(module, seed=0):
    """Weights without structure: an orthogonal start has all singular values equal, zero biases hide mistakes."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            n = torch.randn(p.shape, generator=random)
            if p.ndim > 1:
                p.copy_(n / math.sqrt(p[0].numel()))
            else:
                p.copy_(0.2 * n if name.endswith("bias") else 1 + 0.2 * n)
    return module


def is_spectral(module):
    return parametrize.is_parametrized(module)


def layers(network):
    return [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.Embedding)]


# ------------------------------------------------------------ sizes
COUNTS = {  # flags and number of classes: parameters of G and D
    ("--data imagenet", 1000): (70_433_988, 87_982_370),
    ("--data cifar10", 10): (4_304_387, 4_207_361),
    ("--data imagenet --deep", 1000): (50_244_484, 34_590_210),
    ("--data imagenet --size 256", 1000): (82_235_844, 99_225_890),
    ("--data imagenet --ch 64", 1000): (31_978_628, 39_448_258),
    ("--data cifar10 --embed-dim 128", 10): (4_373_251, 4_207_361),  # shared embedding, z in four chunks
    ("--data cifar100", 100): (4_580_867, 4_230_401),
}


@pytest.mark.parametrize(("flags", "classes"), COUNTS)
def test_parameter_counts(flags, classes):
    _, G, D = built(*flags.split(), classes=classes)
    assert (count(G), count(D)) == COUNTS[flags, classes]


def test_parts_of_the_papers_networks():
    """Block by block, as section 3.1 of the sheet has them."""
    _, G, D = built("--data", "imagenet", classes=1000)
    sizes = [count(block) for block in G.blocks]
    assert [count(G.embed), count(G.first), count(G.last)] == [128_000, 516_096, 2_787]
    assert sizes == [45_740_544, 17_789_184, 4_618_368, 1_240_128 + 46_081, 352_800]
    blocks = [86_112, 11_521, 516_672, 2_065_536, 8_259_840, 33_034_752, 42_470_400]
    assert [count(block) for block in D.trunk] == blocks
    assert [count(D.linear), count(D.embed)] == [1_537, 1_536_000]


def test_attention_may_sit_at_128_pixels():
    """As in the authors' code, by default, at 256 pixels."""
    layouts = {256: (*biggan.LAYOUTS[256][:4], 128)}
    _, G, D = built("--data", "imagenet", "--size", 256, classes=1000, layouts=layouts)
    assert (count(G), count(D)) == (82_097_604, 99_191_330)


FLAGS = [f"{preset} --size {size}" for preset in ("demo", "small", "paper") for size in (32, 64, 128, 256)]


@pytest.mark.parametrize("flags", [*FLAGS, *(f"{flags} --deep" for flags in FLAGS if "256" not in flags)])
def test_shapes(flags):
    args, G, D = built("--preset", *flags.split())
    z, c = torch.empty(2, args.z_dim, device="meta"), torch.zeros(2, dtype=torch.long, device="meta")
    x = biggan.generate(args, G, z, c)
    assert x.shape == (2, 3, args.size, args.size)
    assert D(x, c).shape == (2,)
    assert D.features(x).shape == (2, args.ch * args.layouts[args.size][1][-1])


def test_the_paper_preset_is_the_papers():
    args = arguments("--data", "imagenet")
    wanted = dict(size=128, ch=96, z_dim=120, embed_dim=128, batch=2048, d_steps=2, steps=165_000, lr_g=5e-5, lr_d=2e-4)
    wanted |= dict(betas=(0.0, 0.999), sn_eps=1e-4, bn_eps=1e-4, ema=0.9999, ortho=1e-4, init_std=0, deep=False)
    assert {name: getattr(args, name) for name in wanted} == wanted
    deep = arguments("--data", "imagenet", "--deep")
    assert (deep.ch, deep.z_dim, deep.embed_dim) == (128, 128, 128)
    assert arguments("--data", "imagenet", "--size", 256).z_dim == 140


def test_the_small_preset_is_the_authors_recipe():
    args = arguments("--data", "cifar10")
    wanted = dict(size=32, ch=64, z_dim=128, embed_dim=0, batch=50, d_steps=4, steps=125_000, lr_g=2e-4, lr_d=2e-4)
    wanted |= dict(betas=(0.0, 0.999), sn_eps=1e-8, bn_eps=1e-5, ema=0.9999, ema_start=1000, ortho=0, init_std=0.02)
    assert {name: getattr(args, name) for name in wanted} == wanted


@pytest.mark.parametrize("deep", [(), ("--deep",)])
def test_attention_sits_at_64_pixels(deep):
    args, G, D = built("--data", "imagenet", *deep)
    sizes = []
    for network in (G, D):
        for module in (m for m in network.modules() if isinstance(m, biggan.Attention)):
            module.register_forward_hook(lambda m, inputs, out, of=network: sizes.append((of, out.shape[-1])))
    c = torch.zeros(2, dtype=torch.long, device="meta")
    D(biggan.generate(args, G, torch.empty(2, args.z_dim, device="meta"), c), c)
    assert sizes == [(G, 64), (D, 64)]


# ------------------------------------------------------------ parity with the authors' code
GENERATORS = {  # case: G, whether labels condition it as they are, z's width
    "1": (lambda: biggan.Generator((256, 256, 128, 64, 32, 16), 120, 128, 10, attention=64, eps=1e-6), False, 120),
    "3a": (lambda: biggan.Generator((256,) * 4, 128, 0, 10, eps=1e-8), True, 128),
}
DISCRIMINATORS = {  # case: the trunk, size
    "2": (lambda: biggan.image_trunk((16, 32, 64, 128, 256, 256), 5, 128, attention=64, eps=1e-6), 128),
    "3b": (lambda: biggan.image_trunk((256,) * 4, 2, 32, eps=1e-8), 32),
}
PARAMETERS = {"1": 2_331_428, "2": 2_406_130, "3a": 4_304_387, "3b": 4_207_361}


@torch.no_grad()
@pytest.mark.parametrize("case", GENERATORS)
def test_parity_of_the_generator(case):
    make, direct, width = GENERATORS[case]
    G, before = filled(make()), []
    assert count(G) == PARAMETERS[case]
    G.last.register_forward_hook(lambda module, args, out: before.append(out))
    (z,), (many,) = (inputs(int(case[0]), (n, width)) for n in (2, 8))
    args = SimpleNamespace(embed_dim=0 if direct else 128)
    agree(f"{case}.out", biggan.generate(args, G, z, torch.tensor([3, 7])))
    agree(f"{case}.before_tanh", before[0])
    biggan.power_iteration(G.train())  # from the exact singular vectors it changes nothing
    agree(f"{case}.train", biggan.generate(args, G, many, torch.arange(8)))


@torch.no_grad()
@pytest.mark.parametrize("case", DISCRIMINATORS)
def test_parity_of_the_discriminator(case):
    make, size = DISCRIMINATORS[case]
    D, number, c = filled(biggan.Discriminator(make(), 256, 10)), int(case[0]), torch.tensor([3, 7])
    assert count(D) == PARAMETERS[case]
    for x, prefix in ((inputs(number, (2, 3, size, size))[0], ""), (coarse(number, (2, 3, size, size)), "blocky_")):
        agree(f"{case}.{prefix}pooled", D.features(x))
        agree(f"{case}.{prefix.strip('_') or 'out'}", D(x, c)[:, None])


# ------------------------------------------------------------ the objective
def test_losses_of_the_sheets_example():
    real, fake = torch.tensor([2.0, 0.3]), torch.tensor([-1.5, 0.2])
    assert biggan.discriminator_loss(real, fake).item() == pytest.approx(0.35 + 0.60)
    assert biggan.generator_loss(fake).item() == pytest.approx(0.65)


def test_losses_by_the_formula():
    real, fake = inputs(0, (50,), (50,))
    r, f = (s.numpy().astype(np.float64) for s in (real, fake))
    assert biggan.discriminator_loss(real, fake).item() == pytest.approx(
        np.maximum(0, 1 - r).mean() + np.maximum(0, 1 + f).mean(), rel=1e-6
    )
    assert biggan.generator_loss(fake).item() == pytest.approx(-f.mean(), rel=1e-5)


class Weights(nn.Module):
    """Something with weights, and the embedding that goes free."""

    def __init__(self, *weights):
        super().__init__()
        self.weights = nn.ParameterList(weights)
        self.embed = nn.Embedding(5, 7)
        self.bias = nn.Parameter(torch.ones(9))


def test_orthogonality_of_the_sheets_example():
    G = Weights(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    penalty = biggan.orthogonality(G)
    penalty.backward()
    assert penalty.item() == pytest.approx(242)
    assert torch.allclose(G.weights[0].grad, torch.tensor([[132.0, 176.0], [44.0, 88.0]]), atol=1e-3)
    assert G.embed.weight.grad is None and G.bias.grad is None


def test_orthogonality_by_the_formula():
    """||W W^T * (1 - I)||^2 with 1 - I in full, for wide and tall weights, and its gradient 4 (W W^T * (1 - I)) W."""
    weights = inputs(1, (6, 3, 3, 3), (30, 4), (5, 5))
    G, wanted = Weights(*weights), 0.0
    biggan.orthogonality(G).backward()
    for weight, p in zip(weights, G.weights, strict=True):
        W = weight.flatten(1).numpy().astype(np.float64)
        off = (W @ W.T) * (1 - np.eye(len(W)))
        wanted += (off**2).sum()
        assert np.allclose(p.grad.flatten(1), 4 * off @ W, rtol=1e-4, atol=1e-4)
    assert biggan.orthogonality(G).item() == pytest.approx(wanted, rel=1e-5)


def test_orthogonal_filters_of_any_norm_cost_nothing():
    W = nn.init.orthogonal_(torch.empty(4, 6)) * torch.tensor([[1.0], [2.0], [0.5], [3.0]])
    assert abs(biggan.orthogonality(Weights(W)).item()) < 1e-4


def test_what_the_penalty_is_of():
    """All weights of G but the embedding; those of the classes' tables too, where there are such."""
    for flags in ((), ("--preset", "small", "--ch", 8)):
        G = biggan.build(arguments(*flags))[0]
        biggan.orthogonality(G).backward()
        heard = {name for name, p in G.named_parameters() if p.grad is not None}
        assert heard == {name for name, p in G.named_parameters() if p.ndim > 1 and p is not G.embed.weight}


# ------------------------------------------------------------ layers
def test_the_projection():
    """w . h + b + <embed(y), h>, w and the table over their largest singular values; h is a SUM over positions."""
    D = randomize(biggan.Discriminator(biggan.image_trunk((8, 8), 1, 8), 8, 5, eps=1e-12))
    for _ in range(100):
        biggan.power_iteration(D.train())
    x, y = torch.randn(3, 3, 8, 8), torch.tensor([4, 0, 2])
    with torch.no_grad():
        h = D.trunk(x).clamp(min=0).numpy().astype(np.float64).sum((2, 3))
        w, table = (m.parametrizations.weight.original.numpy().astype(np.float64) for m in (D.linear, D.embed))
        w, table = (W / np.linalg.svd(W, compute_uv=False)[0] for W in (w, table))
        assert np.allclose(D.features(x), h, rtol=1e-4)
        assert np.allclose(D(x, y), h @ w[0] + D.linear.bias.item() + (table[y] * h).sum(1), rtol=1e-3, atol=1e-3)
        assert not torch.allclose(D(x, y), D(x, y.flip(0)), atol=1e-2)
    unclassed = D.linear(D.features(x))[:, 0]
    D.embed = nn.Embedding.from_pretrained(torch.zeros(5, 8))
    assert torch.equal(D(x, y), D(x, y.flip(0))) and torch.allclose(D(x, y), unclassed)


def test_which_layers_are_spectral_and_orthogonal():
    """All but G's embedding, shared or in tables; D's embedding is."""
    for flags in (("--data", "imagenet", "--size", 64, "--ch", 8), ("--data", "cifar10", "--ch", 8), ("--deep",)):
        args = arguments(*flags, init_std=0.0)
        G, D = biggan.build(args)
        for m in layers(G) + layers(D):
            free = m in set(G.modules()) and isinstance(m, nn.Embedding)
            assert is_spectral(m) != free
            W = (m.weight if free else m.parametrizations.weight.original).detach().flatten(1)
            gram = W @ W.T if len(W) < W.shape[1] else W.T @ W
            assert torch.allclose(gram, torch.eye(len(gram)), atol=1e-4)
        tables = [m for m in G.blocks.modules() if isinstance(m, nn.Embedding)]
        assert len(tables) == (0 if args.embed_dim else 4 * len(G.blocks))


def test_normal_start():
    """N(0, 0.02) for weights, tables and embeddings, as on CIFAR-10; and u and v have followed it."""
    G, D = biggan.build(arguments("--data", "cifar10", "--ch", 16))
    for m in (m for m in layers(G) + layers(D) if m.weight.numel() > 1000):
        W = m.parametrizations.weight.original if is_spectral(m) else m.weight
        assert W.std().item() == pytest.approx(0.02, rel=0.1) and abs(W.mean()) < 0.002
        if W is not m.weight:
            assert torch.linalg.matrix_norm(m.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.2)


def test_epsilon_of_batch_norm():
    norms = lambda args: [m for m in biggan.build(args)[0].modules() if isinstance(m, nn.BatchNorm2d)]
    assert {norm.eps for norm in norms(arguments(bn_eps=1e-4))} == {1e-4}
    assert {norm.eps for norm in norms(arguments("--data", "cifar10", "--ch", 8))} == {1e-5}


def conditions(G, *inputs):
    """The first block's map, and what conditions each block."""
    seen = []
    handles = [b.register_forward_hook(lambda m, inputs, out: seen.append(inputs)) for b in G.blocks]
    out = G(*inputs)
    for handle in handles:
        handle.remove()
    assert out.min() >= -1 and out.max() <= 1
    return seen[0][0], [c for _, c in seen]


def test_chunks_of_z():
    """The first chunk draws the map, each other one conditions its own block, behind the shared embedding."""
    args = arguments()
    G = biggan.build(args)[0].eval()
    z, e = torch.randn(2, 32), G.embed(torch.tensor([3, 7]))
    first, found = conditions(G, z, e)
    for chunk in range(4):
        changed = z.clone()
        changed[:, 8 * chunk : 8 * chunk + 8] += 1
        again, others = conditions(G, changed, e)
        assert torch.equal(again, first) == (chunk != 0)
        assert [not torch.equal(a, b) for a, b in zip(found, others, strict=True)] == [chunk == k for k in (1, 2, 3)]
    assert torch.equal(found[0], torch.cat([e, z[:, 8:16]], 1))


def test_without_a_shared_embedding_z_stays_whole():
    args = arguments("--preset", "small", "--ch", 8)
    G, z, c = biggan.build(args)[0].eval(), torch.randn(2, 128), torch.tensor([3, 7])
    first, found = conditions(G, z, c)
    assert all(torch.equal(f, c) for f in found) and G.first[0].in_features == 128
    assert not torch.equal(conditions(G, z + torch.eye(128)[-1], c)[0], first)


def test_deep_blocks_are_conditioned_by_all():
    args = arguments("--deep")
    G, z = biggan.build(args)[0].eval(), torch.randn(2, 32)
    e = G.embed(torch.tensor([3, 7]))
    _, found = conditions(G, z, e)
    assert len(found) == 6 and all(torch.equal(f, torch.cat([e, z], 1)) for f in found)


@pytest.mark.parametrize(("cout", "grow"), [(8, 1), (4, 2)])
def test_deep_block_by_the_formula(cout, grow):
    """BN, ReLU, 1x1; BN, ReLU, up, 3x3; BN, ReLU, 3x3; BN, ReLU, 1x1; plus the first channels of the input, grown."""
    block = randomize(biggan.DeepGBlock(8, cout, lambda n: nn.Linear(3, n, bias=False), False, None, grow)).eval()
    x, c = torch.randn(2, 8, 4, 4), torch.randn(2, 3)
    h, up = x, lambda x: x.repeat_interleave(grow, 2).repeat_interleave(grow, 3)
    convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    affines = [m for m in block.modules() if isinstance(m, nn.Linear)]
    assert [conv.kernel_size[0] for conv in convs] == [1, 3, 3, 1]
    assert [conv.out_channels for conv in convs] == [2, 2, 2, cout]
    for i, conv in enumerate(convs):
        gain, bias = (affine(c)[..., None, None] for affine in affines[2 * i : 2 * i + 2])
        h = F.relu(h / math.sqrt(1 + 1e-5) * (1 + gain) + bias)
        h = F.conv2d(up(h) if i == 1 else h, conv.weight, conv.bias, padding=conv.kernel_size[0] // 2)
    assert torch.allclose(block(x, c), h + up(x[:, :cout]), atol=1e-4)


def test_deep_trunk_by_the_formula():
    """ReLU, 1x1, ReLU, 3x3, ReLU, 3x3, ReLU, halving, 1x1; plus the halved input with a 1x1 convolution's channels."""
    trunk = randomize(biggan.deep_trunk((4, 8), 1, 8, eps=None))
    x = torch.randn(2, 3, 8, 8)
    stem, *blocks = trunk
    assert len(blocks) == 2
    h = stem(x)
    for block, halve in zip(blocks, (lambda x: F.avg_pool2d(x, 2), lambda x: x), strict=True):
        branch, g = [m for m in block.branch if isinstance(m, nn.Conv2d)], h
        assert [conv.kernel_size[0] for conv in branch] == [1, 3, 3, 1]
        for conv in branch[:3]:
            g = conv(F.relu(g))
        skip = halve(h)
        for widen in (m for m in block.skip if isinstance(m, biggan.Widen)):
            skip = torch.cat([skip, widen.conv(skip)], 1)
        h = skip + branch[3](halve(F.relu(g)))
    assert h.shape == (2, 8, 4, 4) and torch.allclose(trunk(x), h, atol=1e-4)


def test_the_embedding_is_what_g_takes():
    """So that classes can be mixed; without a shared one it takes labels."""
    args = arguments()
    G, z, c = biggan.build(args)[0].eval(), torch.randn(2, 32), torch.tensor([3, 7])
    assert torch.equal(biggan.generate(args, G, z, c), G(z, G.embed(c)))
    half = G(z, (G.embed(c) + G.embed(c.flip(0))) / 2)
    assert not torch.allclose(half, G(z, G.embed(c)), atol=1e-3)


# ------------------------------------------------------------ z and classes
def test_random_numbers_are_functions_of_seed_and_key():
    args = arguments()
    first, _ = biggan.prior(args, 8, 0, 5)
    assert torch.equal(first, biggan.prior(args, 8, 0, 5)[0])
    others = [biggan.prior(args, 8, *key)[0] for key in ((0, 6), (1, 5))]
    others.append(biggan.prior(arguments("--seed", 1), 8, 0, 5)[0])
    assert not any(torch.equal(first, other) for other in others)


def test_prior():
    z, c = biggan.prior(arguments(), 20_000, 0, 0)
    assert abs(z.mean()) < 0.01 and abs(z.std() - 1) < 0.01 and z.abs().max() > 4
    assert c.dtype == torch.long and (c.bincount() / 20_000 - 0.1).abs().max() < 0.01


@pytest.mark.parametrize(("truncation", "std"), [(2.0, 0.8796), (1.0, 0.5396), (0.5, 0.2839)])
def test_truncation(truncation, std):
    """Inside the threshold and still normal there; what lay inside is as it was drawn."""
    args = arguments()
    z, c = biggan.prior(args, 20_000, 0, 0)
    t, d = biggan.prior(args, 20_000, 0, 0, truncation=truncation)
    assert t.abs().max() <= truncation and t.std().item() == pytest.approx(std, abs=0.003)
    inside = z.abs() <= truncation
    assert torch.equal(t[inside], z[inside]) and torch.equal(c, d)
    erf = lambda x: math.erf(x / math.sqrt(2))
    for x in (0.25 * truncation, 0.5 * truncation):
        assert float((t[~inside].abs() < x).float().mean()) == pytest.approx(erf(x) / erf(truncation), abs=0.01)


# ------------------------------------------------------------ standing statistics
def test_standing_statistics():
    """The means of the batches' means and of their (unbiased) variances, over z and classes drawn as for samples."""
    args = arguments(standing=3)
    average = AveragedModel(randomize(biggan.build(args)[0]))
    before = [b.clone() for b in average.buffers()]
    G, means, variances = biggan.settle(args, average, 0.7), [], []
    assert not any(m.training for m in G.modules()) and not any(p.requires_grad for p in G.parameters())
    assert all(torch.equal(a, b) for a, b in zip(average.buffers(), before, strict=True))
    replay = AveragedModel(average.module).module.train()
    norm, settled = (next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)) for net in (replay, G))
    handle = norm.register_forward_pre_hook(
        lambda m, x: means.append(x[0].mean((0, 2, 3))) or variances.append(x[0].transpose(0, 1).flatten(1).var(1))
    )
    with torch.no_grad():
        for i in range(3):
            z, c = biggan.prior(args, 64, biggan.STANDING, i, truncation=0.7)
            assert z.abs().max() <= 0.7 and len(c.unique()) == CLASSES
            biggan.generate(args, replay, z, c)
    handle.remove()
    assert torch.allclose(settled.running_mean, torch.stack(means).mean(0), atol=1e-5)
    assert torch.allclose(settled.running_var, torch.stack(variances).mean(0), rtol=1e-4)


def test_settled_generator_does_not_look_at_the_batch():
    args = arguments()
    G, (z, c) = biggan.settle(args, AveragedModel(biggan.build(args)[0])), biggan.prior(args, 64, 0, 0)
    with torch.no_grad():
        alone = biggan.generate(args, G, z[:1], c[:1])
        assert torch.allclose(biggan.generate(args, G, z, c)[:1], alone, atol=1e-5)
        assert not torch.allclose(biggan.generate(args, G.train(), z, c)[:1], alone, atol=1e-3)


# ------------------------------------------------------------ the loop
def toy(name, split, size, root, skip_broken, rows=slice(None)):
    """80 pictures of noise in ten classes; those of one class share a colour."""
    random = torch.Generator().manual_seed(int(split == "test"))
    labels = torch.arange(80) % CLASSES
    images = torch.randint(128, (80, size, size, 3), dtype=torch.uint8, generator=random)
    images[..., 0] += (12 * labels[:, None, None]).to(torch.uint8)
    images, labels = images[rows], labels[rows]
    return Data("toy", split, size, images, f"toy{split}", root, labels, [str(k) for k in range(CLASSES)])


@pytest.fixture
def train(monkeypatch, tmp_path):
    """train(*flags) on noise, without pictures and evaluation; returns args, networks, and what happened on the way.

    events: per optimiser step its network's name, learning rate, betas, and for each network the parameters before,
    after, and the gradients that were there. judged: what D was given.
    """
    monkeypatch.setattr(biggan, "load", toy)
    for name in ("sample", "evaluate", "picture"):
        monkeypatch.setattr(biggan, name, lambda *args, **options: None)
    build = biggan.build

    def flat(network, of=lambda p: p):
        return torch.cat(
            [torch.zeros(p.numel()) if of(p) is None else of(p).detach().flatten() for p in network.parameters()]
        )

    def run(*flags, prepare=lambda *networks: None, **changes):
        events, judged = [], []
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        args = arguments("--batch", 8, "--steps", 1, "--log-every", 100, "--out", out, "--root", tmp_path, *flags)
        vars(args).update({"standing": 2} | changes)
        networks = dict(zip("GD", build(args), strict=True))
        prepare(*networks.values())
        monkeypatch.setattr(biggan, "build", lambda args: list(networks.values()))
        owner = {id(p): name for name, network in networks.items() for p in network.parameters()}

        def before(optimizer, *_):
            group = optimizer.param_groups[0]
            event = {"of": owner[id(group["params"][0])], "lr": float(group["lr"]), "betas": group["betas"]}
            event["grads"] = {name: flat(network, lambda p: p.grad) for name, network in networks.items()}
            event["training"] = all(m.training for m in networks["G"].modules() if isinstance(m, nn.BatchNorm2d))
            events.append(event | {"before": {k: flat(n).clone() for k, n in networks.items()}})

        def after(optimizer, *_):
            events[-1]["after"] = {name: flat(network).clone() for name, network in networks.items()}

        handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
        handles.append(networks["D"].register_forward_hook(lambda m, inputs, out: judged.append((*inputs, out))))
        try:
            biggan.train(args)
        finally:
            monkeypatch.setattr(biggan, "build", build)
            for handle in handles:
                handle.remove()
        return args, networks, events, judged

    return run


def gradients(loss, network):
    found = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
    return torch.cat(
        [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(network.parameters(), found, strict=True)]
    )


def close(a, b, tolerance=1e-4):
    return float((a - b).norm()) <= tolerance * float(b.norm())


def test_a_step(train):
    """D twice, then G; each moves alone, by its own rate; new images, latents and classes each time."""
    args, _, events, judged = train("--d-steps", 2, "--lr-g", 1e-4, "--lr-d", 3e-4)
    assert [event["of"] for event in events] == ["D", "D", "G"]
    for event in events:
        moved = {name for name in "GD" if not torch.equal(event["before"][name], event["after"][name])}
        assert moved == {event["of"]} and event["training"]
        assert event["lr"] == pytest.approx({"D": 3e-4, "G": 1e-4}[event["of"]])
        assert tuple(event["betas"]) == args.betas
    assert all(event["grads"]["G"].norm() == 0 for event in events[:2])
    assert torch.equal(events[2]["grads"]["D"], events[1]["grads"]["D"])  # G's step gives D none
    assert [len(x) for x, _, _ in judged] == [16, 16, 8]  # real and drawn ones as one batch
    drawn = [x[-8:] for x, _, _ in judged]
    assert not any(torch.equal(a, b) for a, b in pairwise(drawn))
    assert not torch.equal(judged[0][0][:8], judged[1][0][:8])


def test_d_gets_the_labels_of_its_images(train):
    """Real images with their own, drawn ones with the class that they were drawn as."""
    args, networks, _, judged = train("--lr-d", 0, "--lr-g", 0, "--batch", 40)
    (x, y, _), data = judged[0], toy("toy", "train", 32, "", False)
    pictures = data.images.permute(0, 3, 1, 2).float() / 127.5 - 1
    for image, label in zip(x[:40], y[:40], strict=True):
        assert data.labels[(pictures - image).abs().amax((1, 2, 3)).argmin()] == label
    assert (pictures - x[0]).abs().amax((1, 2, 3)).min() < 1e-5  # and they are not mirrored
    z, c = biggan.prior(args, 40, biggan.LATENTS, 0)
    assert torch.equal(y[40:], c)
    with torch.no_grad():
        assert torch.allclose(biggan.generate(args, networks["G"].train(), z, c), x[40:], atol=1e-5)


def test_d_and_g_descend_their_losses(train, monkeypatch):
    """D's gradient is that of the hinge; G's that of -D as D weighs after its step, in train mode."""
    still = lambda *networks: [m.parametrizations.eval() for n in networks for m in n.modules() if is_spectral(m)]
    monkeypatch.setattr(biggan, "power_iteration", still)
    args, networks, events, judged = train("--lr-g", 0)
    (G, D), (first, second) = networks.values(), events
    (x, y, _), *_ = judged
    still(G.train(), D.train())  # the log line leaves G in eval mode
    weigh = lambda when: nn.utils.vector_to_parameters(first[when]["D"], D.parameters())
    z, c = biggan.prior(args, 8, biggan.LATENTS, 1)
    loss_g = lambda: -D(biggan.generate(args, G, z, c), c).mean()
    weigh("after")
    assert close(second["grads"]["G"], gradients(loss_g(), G))
    weigh("before")
    assert not close(second["grads"]["G"], gradients(loss_g(), G), 1e-2)
    real, fake = D.requires_grad_(True)(x, y).chunk(2)
    loss_d = (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
    assert close(first["grads"]["D"], gradients(loss_d, D))


def test_the_penalty_joins_g(train):
    """beta times the gradient of R, whatever the number of pieces."""
    G = biggan.build(arguments())[0]
    R = gradients(biggan.orthogonality(G), G)
    for pieces in (1, 4):
        plain, beta = (train("--ortho", ortho, "--accumulate", pieces)[2][-1]["grads"]["G"] for ortho in (0, 0.5))
        assert R.norm() > 0 and close(beta - plain, 0.5 * R, 1e-3)


def freeze(*networks):
    """Batch norm no longer looks at the batch."""
    for module in (m for network in networks for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        module.eval().train = lambda mode=True: None


def test_pieces_add_up_to_the_batch(train):
    """Four pieces give the gradients of one batch, where batch norm does not look at the batch."""
    runs = [train("--accumulate", n, "--lr-d", 0, "--d-steps", 2, prepare=freeze)[2] for n in (1, 4)]
    for whole, pieces in zip(*runs, strict=True):
        assert whole["of"] == pieces["of"] and whole["grads"][whole["of"]].norm() > 0
        assert close(pieces["grads"][whole["of"]], whole["grads"][whole["of"]])


def test_one_power_iteration_a_step(train):
    calls, iterate = [], _SpectralNorm._power_method
    count = lambda self, *args: calls.append(self) or iterate(self, *args)
    with mock.patch.object(_SpectralNorm, "_power_method", count):
        _, networks, _, _ = train("--d-steps", 2, "--log-every", 1, prepare=lambda *_: calls.clear())
    own = [m for network in networks.values() for m in network.modules() if isinstance(m, _SpectralNorm)]
    counts = {sum(call is m for call in calls) for m in own}
    assert own and counts == {3}


def test_the_average_starts_as_a_copy(train):
    """w1 and w2 are copied, then d * average + (1 - d) * w."""
    args, networks, events, _ = train("--steps", 4, "--ema", 0.9, ema_start=2)
    state = torch.load(args.out / "checkpoint.pt", weights_only=True)
    _, w2, w3, w4 = (event["after"]["G"] for event in events if event["of"] == "G")
    average = AveragedModel(networks["G"])
    average.load_state_dict(state["G_ema"])
    found = torch.cat([p.detach().flatten() for p in average.parameters()])
    assert torch.allclose(found, 0.81 * w2 + 0.09 * w3 + 0.1 * w4, atol=1e-6)
    assert not torch.allclose(found, w4, atol=1e-5)


def test_steps_do_not_depend_on_how_often_they_are_logged(train):
    often, seldom = (train("--steps", 3, "--log-every", n, "--save-every", n)[1] for n in (1, 100))
    for name in "GD":
        a, b = (run[name].state_dict() for run in (often, seldom))
        differ = [key for key in a if not torch.equal(a[key], b[key])]
        assert not differ, f"{name}: {differ[:3]}"


def test_watched_numbers(train):
    """Against the linear algebra, and the pictures themselves."""
    args, _, _, judged = train("--steps", 2, "--log-every", 1)
    row = json.loads((args.out / "log.jsonl").read_text().splitlines()[-1])
    assert {"step", "loss_d", "loss_g", "real", "fake", "spread", "spread_real", "label", "lr"} <= set(row)
    real, fake = judged[-2][2].detach().chunk(2)
    assert row["real"] == pytest.approx(real.mean().item(), rel=1e-3, abs=1e-4)
    assert row["fake"] == pytest.approx(fake.mean().item(), rel=1e-3, abs=1e-4)
    assert row["loss_d"] == pytest.approx(biggan.discriminator_loss(real, fake).item(), rel=1e-3)
    assert row["loss_g"] == pytest.approx(-judged[-1][2].mean().item(), rel=1e-3, abs=1e-4)
    x = judged[-2][0][:8]
    assert row["spread_real"] == pytest.approx((x - x.roll(1, 0)).abs().mean().item(), rel=1e-3)


def test_signs_of_collapse():
    """One picture whatever z: spread is 0; whatever the class: label is 0. sigma is the largest singular value."""
    args = arguments()
    G, D = (randomize(network) for network in biggan.build(args))
    (z, c), x = biggan.prior(args, 16, 0, 0), torch.rand(16, 3, 32, 32)
    for _ in range(100):
        biggan.power_iteration(G.train(), D.train())
    found = {k: v.mean().item() for k, v in biggan.watch(args, G, D, x, z, c).items()}
    assert found["spread"] > 0.01 < found["label"]
    for name, layer in (("G_first", G.first[0]), ("G_last", G.last[-1]), ("D_first", D.trunk[0].branch[0])):
        W = layer.parametrizations.weight.original.detach().flatten(1).double()
        assert found[f"sigma_{name}"] == pytest.approx(torch.linalg.matrix_norm(W, 2).item(), rel=1e-2)
    with torch.no_grad():
        G.first[0].parametrizations.weight.original *= 7
    again = {k: v.mean().item() for k, v in biggan.watch(args, G, D, x, z, c).items()}
    assert again["sigma_G_first"] == pytest.approx(7 * found["sigma_G_first"], rel=1e-3)
    assert biggan.watch(args, G, D, x, z[:1].expand(16, -1), c)["spread"].max() < 1e-5
    assert biggan.watch(args, G, D, x, z, c[:1].expand(16))["label"].max() < 1e-5


# ------------------------------------------------------------ what is refused
def test_pictures_without_labels_are_refused(tmp_path, monkeypatch):
    for i in range(12):
        noise = np.random.default_rng(i).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    args = arguments("--data", tmp_path, "--root", tmp_path / "root", "--preset", "demo", "--out", tmp_path / "run")
    with pytest.raises(UserError, match="no labels"):
        biggan.train(args)
    assert not (tmp_path / "run").exists()


def test_another_number_of_classes_is_refused(train, monkeypatch):
    args = train()[0]
    fewer = lambda *given, **options: Data(
        "toy", "train", 32, (data := toy(*given)).images, data.key, args.root, data.labels % 3, ["a", "b", "c"]
    )
    monkeypatch.setattr(biggan, "load", fewer)
    with pytest.raises(UserError, match="classes is 10 there and 3 here"):
        biggan.train(args)


@pytest.mark.parametrize(
    ("flags", "word"),
    [("--ch 4", "ch"), ("--deep --embed-dim 0", "embed-dim"), ("--truncation 0", "truncation"), ("--size 48", "size")],
)
def test_impossible_flags_are_refused(flags, word):
    with pytest.raises(UserError, match=word):
        arguments(*flags.split())


# ------------------------------------------------------------ pictures and numbers
def untile(path, columns=10):
    """The 32-pixel pictures of a sheet, float [rows, columns, 3, 32, 32] in [-1, 1]."""
    sheet = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 127.5 - 1
    rows = (sheet.shape[1] - 2) // 34
    cut = lambda r, c: sheet[:, 34 * r + 2 :][:, :32, 34 * c + 2 :][..., :32]
    return torch.stack([torch.stack([cut(r, c) for c in range(columns)]) for r in range(rows)])


@pytest.fixture
def trained(train, monkeypatch):
    def trained(*flags):
        args = train("--steps", 2, *flags)[0]
        monkeypatch.undo()
        monkeypatch.setattr(biggan, "load", toy)
        return args

    return trained


def same(a, b):
    return torch.allclose(a, b, atol=0.01)


def test_pictures(trained):
    args = trained("--truncation", 1.5)
    biggan.sample(args)
    average, _, _ = biggan.restore(args)
    G, E = biggan.settle(args, average, 1.5), average.module.embed.weight.detach()
    rows = untile(args.out / "samples.png")
    z, _ = biggan.prior(args, 100, biggan.PICTURES, 0, truncation=1.5)
    for k in range(CLASSES):  # a row a class
        part = slice(10 * k, 10 * k + 10)
        assert same(rows[k], biggan.generate(args, G, z[part], torch.full((10,), k)))

    sweep = untile(args.out / "truncation.png")
    thresholds = (math.inf, *biggan.TRUNCATIONS)
    assert len(sweep) == 2 * len(thresholds) and list(thresholds) == sorted(thresholds, reverse=True)
    for i, t in enumerate(thresholds):
        z, _ = biggan.prior(args, 100, biggan.PICTURES, 0, truncation=t)
        settled = biggan.settle(args, average, t)
        assert same(sweep[i], biggan.generate(args, settled, z[:10], torch.zeros(10, dtype=torch.long)))
        assert same(sweep[len(thresholds) + i], biggan.generate(args, settled, z[90:], torch.full((10,), 9)))

    between = untile(args.out / "interpolations.png")
    z, _ = biggan.prior(args, 24, biggan.PICTURES, 1, truncation=1.5)
    for row in range(12):
        first, last = z[2 * row : 2 * row + 1], z[2 * row + 1 : 2 * row + 2]
        of, to = 2 * row % 10, (2 * row + 1) % 10
        last, to = (last, of) if row < 4 else (first, to) if row < 8 else (last, to)
        for column in (0, 3, 9):
            t = column / 9
            x = G((1 - t) * first + t * last, (1 - t) * E[of : of + 1] + t * E[to : to + 1])
            assert same(between[row, column], x[0]), (row, column)


def test_pictures_without_a_shared_embedding(trained):
    args = trained("--embed-dim", 0)
    biggan.sample(args)
    average, _, _ = biggan.restore(args)
    G, between = biggan.settle(args, average), untile(args.out / "interpolations.png")
    z, _ = biggan.prior(args, 24, biggan.PICTURES, 1)
    assert len(between) == 4
    assert same(between[1, 9], biggan.generate(args, G, z[3:4], torch.tensor([2]))[0])


def test_metrics(trained, monkeypatch):
    args, heard, judged = trained("--sweep-samples", 40), [], []
    settle = biggan.settle
    monkeypatch.setattr(biggan, "settle", lambda *given: heard.append(given[2]) or settle(*given))
    scores = {"fd_random": 1.0, "precision_random_k3": 0.5, "recall_random_k3": 0.25, "kid_random": 2.0}
    monkeypatch.setattr(fid, "evaluate", lambda *args: judged.append(args[2]) or scores)
    args.classifier_steps = 30
    biggan.evaluate(args)
    metrics = json.loads((args.out / "metrics.json").read_text())
    assert metrics["steps"] == 2 and metrics["images"] == 16 and metrics["probe_saw_labels"]
    assert {"probe_top1", "untrained_probe_top1", "raw_pixels_probe_top1", "fd_random"} <= set(metrics)
    assert heard == [math.inf, math.inf, *biggan.TRUNCATIONS, math.inf] and judged == [5000, *[40] * 5]
    swept = {k: v for k, v in scores.items() if k != "kid_random"}
    wanted = {f"truncation_{t:g}_{k}": v for t in (math.inf, *biggan.TRUNCATIONS) for k, v in swept.items()}
    assert {k: v for k, v in metrics.items() if k.startswith("truncation_")} == wanted
    assert 0 <= metrics["class_agreement"] <= 0.4  # G was hardly trained


def test_precision_and_recall_of_the_sweep(monkeypatch, tmp_path):
    """Of samples that are real images: all precise; one picture for all: precise and without variety."""
    monkeypatch.setattr(biggan, "load", toy)
    args, heard = arguments("--fid-split", "test", "--root", tmp_path), []
    real = toy("toy", "test", 32, "", False).images.permute(0, 3, 1, 2).float() / 127.5 - 1
    draws = {math.inf: real, 2.0: real[:1].expand(80, -1, -1, -1), 1.0: -real, 0.5: real.roll(7, 0)}
    monkeypatch.setattr(biggan, "settle", lambda args, average, t: draws[t])
    monkeypatch.setattr(biggan, "generate", lambda args, G, z, c: heard.append(z.abs().max()) or G)
    found = {t: biggan.judge_samples(args, None, 80, t) for t in draws}
    shares = {t: [scores[f"{k}_random_k3_80"] for k in ("precision", "recall")] for t, scores in found.items()}
    assert all(z <= t for z, t in zip(heard, draws, strict=True)) and heard[0] > 2  # drawn as it was settled
    assert shares[math.inf] == shares[0.5] == [1, 1]
    assert shares[2.0][0] == 1 and shares[2.0][1] < 0.1
    assert shares[1.0][0] < 0.1


def test_agreement_is_of_the_class_that_was_asked_for(monkeypatch):
    """A G that returns real images of its class is right as often as the classifier is; of the next class, never."""
    monkeypatch.setattr(biggan, "load", toy)
    args = arguments("--classifier-steps", 200)
    data = toy("toy", "test", 32, "", False)
    real = torch.stack([data.images[data.labels == k][0] for k in range(CLASSES)]).permute(0, 3, 1, 2) / 127.5 - 1
    monkeypatch.setattr(biggan, "generate", lambda args, G, z, c: real[(c + G) % CLASSES])
    right, wrong = (biggan.name_samples(args, shift) for shift in (0, 5))
    assert right["classifier_top1"] == wrong["classifier_top1"] > 0.4
    assert right["class_agreement"] > 0.4 and wrong["class_agreement"] < 0.1


# ------------------------------------------------------------ it learns
STEPS = 150


@pytest.fixture
def one_thread():
    """So that the time does not depend on what else the machine does: threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_it_learns(monkeypatch, tmp_path, root, one_thread):
    """The demo, shortened: its samples come nearer to the shapes than the untrained G's. That they are of the class
    that was asked for takes longer than a test may."""
    for name in ("sample", "evaluate", "picture"):
        monkeypatch.setattr(biggan, name, lambda *args, **options: None)
    flags = ["--steps", STEPS, "--save-every", 10 * STEPS, "--fid-samples", 1000]
    args = arguments("--root", root, "--out", tmp_path, *flags)
    biggan.train(args)
    averages = AveragedModel(biggan.build(args)[0]), biggan.restore(args)[0]
    with torch.no_grad():
        before, after = (biggan.judge_samples(args, G, 1000, math.inf, False)["fd_random_1000"] for G in averages)
    print(f"fd_random_1000 {before:.0f} -> {after:.0f} after {STEPS} steps")
    assert after < before / 2
