"""bigbigan.py against its paper: parameter counts, losses, the two players' gradients, layers, and that it learns.

About two minutes on 2 cores, most of it the shortened demo.
"""

import json
import math
import sys
from itertools import islice, pairwise
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import AveragedModel

import bigbigan
from common import linear_probe
from common.data import Data, load


def arguments(*flags):
    """What main() makes of a command line."""
    with mock.patch.object(sys, "argv", ["bigbigan.py", "--device", "cpu", "--precision", "fp32", *map(str, flags)]):
        args = bigbigan.parse()
    bigbigan.start(args)
    return args


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def built(*flags):
    """G, E and D on the meta device: shapes without numbers."""
    args = arguments(*flags)
    args.device = "meta"
    slow = mock.patch("torch.nn.init.orthogonal_"), mock.patch.object(_SpectralNorm, "_power_method")
    with torch.device("meta"), slow[0], slow[1]:
        return args, *bigbigan.build(args)


def randomize(module, seed=0):
    """Weights without structure: an orthogonal start has all singular values equal, zero biases hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            n = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(n / math.sqrt(p[0].numel()))
            else:
                p.copy_(0.2 * n if name.endswith("bias") else 1 + 0.2 * n)
    return module


# ------------------------------------------------------------ sizes
@pytest.fixture(scope="module")
def paper():
    return built("--data", "imagenet")


def test_parameter_counts_of_the_paper(paper):
    _, G, E, D = paper
    assert count(G) == 70_306_116
    assert [count(m) for m in (D.F, D.s_x, D.H, D.s_z, D.J, D.s_xz)] == [
        86_444_833,
        1_537,
        29_870_080,
        2_049,
        44_058_624,
        2_049,
    ]
    assert count(D) == 160_379_172
    assert count(E.trunk) == 23_500_352
    assert count(E) == 91_612_976


def test_parameter_counts_of_the_32_pixel_model():
    _, G, E, D = built("--data", "cifar10")
    assert count(G) == 4_372_099
    assert [count(m) for m in (D.F, D.s_x, D.H, D.s_z, D.J, D.s_xz)] == [4_204_544, 257, 1_970_688, 513, 2_626_048, 513]
    assert count(D) == 8_802_563
    assert count(E.trunk) == 11_167_040
    assert count(E) == 15_628_864


BACKBONES = {"resnet50": 23_500_352, "revnet50": 5_408_640, "revnet50x2": 21_505_792, "revnet50x4": 85_765_632}
WIDTHS = {"resnet50": 2048, "revnet50": 2048, "revnet50x2": 4096, "revnet50x4": 8192}


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_of_the_encoder(name):
    with torch.device("meta"):
        trunk = bigbigan.Encoder(name, 256, 8, 4).trunk
        out = trunk(torch.empty(1, 3, 256, 256))
    assert count(trunk) == BACKBONES[name]
    assert out.shape == (1, WIDTHS[name], 8, 8)


def test_the_largest_encoder():
    _, _, E, _ = built("--preset", "paper", "--encoder", "revnet50x4")
    assert count(E) == 204_209_904


@pytest.mark.parametrize("flags", ["demo", "demo --size 64", "small", "small --size 64", "paper", "paper --size 64"])
def test_shapes(flags):
    args, G, E, D = built("--preset", *flags.split())
    z, x = torch.empty(2, args.z_dim, device="meta"), torch.empty(2, 3, *[args.encoder_size] * 2, device="meta")
    assert G(z).shape == (2, 3, args.size, args.size)
    assert [out.shape for out in E(x)] == [z.shape] * 2
    assert [s.shape for s in D(G(z), z)] == [(2,)] * 3
    assert args.z_dim == args.z_chunk * len(args.G[args.size])


def test_the_paper_preset_is_the_papers():
    args = arguments("--data", "imagenet")
    wanted = dict(size=128, encoder_size=256, z_dim=120, batch=2048, d_steps=2, steps=500_000, eta=10, lr_g=5e-5)
    wanted |= dict(
        lr_d=2e-4, betas=(0.0, 0.999), sn_eps=1e-4, ema=0.9999, prior="normal", encoder="resnet50", attention=64
    )
    wanted |= dict(crop_area=0.08, crop_ratio=4 / 3, scores=["x", "z", "xz"], deterministic=False)
    assert {name: getattr(args, name) for name in wanted} == wanted


def test_attention_sits_at_64_pixels(paper):
    _, G, _, D = paper
    sizes = {}
    for name, network in (("G", G), ("D", D)):
        for module in network.modules():
            if isinstance(module, bigbigan.Attention):
                keep = lambda m, inputs, out, name=name: sizes.update({name: (*sizes.get(name, ()), out.shape[-1])})
                module.register_forward_hook(keep)
    z = torch.empty(2, 120, device="meta")
    D(G(z), z)
    assert sizes == {"G": (64,), "D": (64,)}


# ------------------------------------------------------------ the objective
def scores(*values):
    return [torch.tensor([value]) for value in values]


def test_losses_of_the_sheets_example():
    real, fake = scores(0.5, 2.0, -1.0), scores(-0.5, 0.3, -2.0)
    assert bigbigan.discriminator_loss(real, fake).item() == pytest.approx(2.5 + 1.8)
    assert bigbigan.encoder_generator_loss(real, fake).item() == pytest.approx(1.5 + 2.2)


def test_hinge_values():
    zero, sure = scores(0.0, 0.0, 0.0), scores(1.0, 2.0, 9.0)
    assert bigbigan.discriminator_loss(zero, zero).item() == 6
    assert bigbigan.encoder_generator_loss(zero, zero).item() == 0
    assert bigbigan.discriminator_loss(sure, [-s for s in sure]).item() == 0
    real, fake = [torch.tensor([2.0, 0.3])], [torch.tensor([-1.5, 0.2])]
    assert bigbigan.discriminator_loss(real, fake).item() == pytest.approx(0.95)  # means over the batch
    assert bigbigan.encoder_generator_loss([], fake).item() == pytest.approx(0.65)


@pytest.fixture(scope="module")
def pairs():
    """A tiny G, E and D, images for E and D, latents, and both kinds of pairs with graphs."""
    args = arguments()
    G, E, D = (randomize(network, seed) for seed, network in enumerate(bigbigan.build(args)))
    bigbigan.power_iteration(G.train(), D.train())
    generator = torch.Generator().manual_seed(3)
    x, z, noise = (torch.randn(s, generator=generator) for s in ((8, 3, 32, 32), *[(8, args.z_dim)] * 2))
    return args, G, E, D, x.clamp(-1, 1), z, noise


def gradients(loss, *networks):
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat(
        [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(parameters, found, strict=True)]
    )


def close(a, b, tolerance=1e-5):
    return float((a - b).norm()) <= tolerance * float(b.norm())


def test_who_hears_which_score(pairs):
    """E learns through s_z and s_xz of its own pairs alone, G through s_x and s_xz of its own."""
    args, G, E, D, x, z, noise = pairs
    real, fake = map(list, bigbigan.judge(args, D, x, bigbigan.posterior(args, E, x, noise), G(z), z))
    (real_x, *real_rest), (fake_x, fake_z, fake_xz) = real, fake
    loss = bigbigan.encoder_generator_loss(real, fake)
    of_E, of_G = gradients(loss, E), gradients(loss, G)
    assert of_E.norm() > 0 and of_G.norm() > 0
    assert close(gradients(bigbigan.encoder_generator_loss(real_rest, fake), E), of_E)
    assert close(gradients(bigbigan.encoder_generator_loss(real, [fake_x, fake_xz]), G), of_G)
    assert gradients(sum(s.sum() for s in real), G).norm() == 0
    assert gradients(sum(s.sum() for s in fake), E).norm() == 0
    assert real_x.requires_grad and fake_z.requires_grad  # both train D
    for s in (real_x, fake_z):
        assert gradients(s.sum(), G, E).norm() == 0 < gradients(s.sum(), D).norm()


def test_signs_of_the_encoder_and_the_generator(pairs):
    """A small step down L_EG lowers the scores of E's pairs and raises those of G's."""
    args, _, _, _, x, z, _ = pairs
    G, E, D = (randomize(network, seed) for seed, network in enumerate(bigbigan.build(args)))
    bigbigan.power_iteration(G.train(), D.train())

    def both():
        return [torch.stack(list(s)).sum() for s in bigbigan.judge(args, D, x, E(x)[0], G(z), z)]

    before = both()
    bigbigan.encoder_generator_loss(*([s / len(x)] for s in before)).backward()
    with torch.no_grad():
        for network in (G, E):
            norm = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]).norm()
            for p in (p for p in network.parameters() if p.grad is not None):
                p -= 1e-3 * p.grad / norm
    real, fake = both()
    assert real < before[0] and fake > before[1]


def test_pairing_matters_to_the_joint_score_alone(pairs):
    _, _, _, D, x, z, _ = pairs
    with torch.no_grad():
        s_x, s_z, s_xz = D(x, z)
        t_x, t_z, t_xz = D(x, z.roll(1, 0))
    assert torch.allclose(s_x, t_x, atol=1e-5)
    assert torch.allclose(s_z.sort().values, t_z.sort().values, atol=1e-5)
    assert not torch.allclose(s_xz.sort().values, t_xz.sort().values, atol=1e-2)


def test_real_and_fake_are_judged_in_one_batch(pairs):
    args, _, _, D, x, z, _ = pairs
    calls = []
    handle = D.register_forward_hook(lambda m, inputs, out: calls.append(inputs))
    with torch.no_grad():
        real, fake = map(list, bigbigan.judge(args, D, x, z, -x, -z))
        handle.remove()
        assert [len(part) for part in calls[0]] == [16, 16] and len(calls) == 1
        for found, (image, latent) in ((real, (x, z)), (fake, (-x, -z))):
            for a, b in zip(found, D(image, latent), strict=True):
                assert torch.allclose(a, b, atol=1e-4)


def test_ablations_drop_scores(pairs):
    _, _, _, D, x, z, _ = pairs
    with torch.no_grad():
        for names in (["xz"], ["x", "xz"], ["z", "xz"], ["x", "z", "xz"]):
            real, fake = map(list, bigbigan.judge(arguments("--scores", *names), D, x, z, x, z))
            every = dict(zip(("x", "z", "xz"), D(x, z), strict=True))
            assert len(real) == len(fake) == len(names)
            assert all(torch.allclose(s, every[name], atol=1e-4) for s, name in zip(real, names, strict=True))


def test_posterior():
    """sigma = softplus(sigma_hat): log 2 at 0; z = mu + sigma * noise."""
    args = arguments()
    E, x = bigbigan.build(args)[1], torch.zeros(2, 3, 32, 32)
    half = args.z_dim // 2
    with torch.no_grad():
        nn.init.zeros_(E.head.weight), E.head.bias.copy_(torch.arange(2.0 * args.z_dim))  # mu first
        E.head.bias[args.z_dim : args.z_dim + half], E.head.bias[args.z_dim + half :] = 0, -40
    mu, sigma = E(x)
    z = bigbigan.posterior(args, E, x, torch.full((2, args.z_dim), 2.0))
    assert torch.equal(mu, torch.arange(1.0 * args.z_dim).expand(2, -1))
    assert torch.allclose(sigma[:, :half], torch.tensor(0.693147)) and sigma.min() > 0
    assert torch.allclose(z[:, :half] - mu[:, :half], torch.tensor(2 * 0.693147), atol=1e-5)
    assert torch.allclose(z[:, half:], mu[:, half:], atol=1e-6)
    assert torch.equal(bigbigan.posterior(args, E, x), mu)  # without noise: the mean
    (gradient,) = torch.autograd.grad(z.sum(), E.head.bias)
    assert torch.equal(gradient[: args.z_dim], torch.full((args.z_dim,), 2.0))  # dz / dmu = 1, for two images


def test_ablations_of_the_posterior_and_the_prior(pairs):
    _, _, E, _, x, _, noise = pairs
    E.train()
    with torch.no_grad():
        mu, sigma = E(x)
        uniform, fixed = arguments("--prior", "uniform"), arguments("--deterministic")
        assert torch.equal(bigbigan.posterior(uniform, E, x, noise), mu.tanh())
        assert torch.equal(bigbigan.posterior(fixed, E, x, noise), mu)
        assert torch.equal(bigbigan.posterior(arguments(), E, x, noise), mu + sigma * noise)
    z = bigbigan.prior(uniform, 20_000, 0, 0).flatten()
    assert z.abs().max() <= 1 and abs(z.mean()) < 0.01 and abs(z.std() - 3**-0.5) < 0.01
    z = bigbigan.prior(arguments(), 20_000, 0, 0)
    assert abs(z.mean()) < 0.01 and abs(z.std() - 1) < 0.01 and z.abs().max() > 4  # not truncated


def test_random_numbers_are_functions_of_seed_and_key():
    args = arguments()
    first = bigbigan.prior(args, 8, 0, 5)
    assert torch.equal(first, bigbigan.prior(args, 8, 0, 5))
    others = [
        bigbigan.prior(args, 8, 0, 6),
        bigbigan.prior(args, 8, 1, 5),
        bigbigan.prior(arguments("--seed", 1), 8, 0, 5),
    ]
    assert not any(torch.equal(first, other) for other in others)


# ------------------------------------------------------------ spectral norm
def test_power_iteration_is_one_iteration():
    layer = bigbigan.spectral(nn.Linear(2, 2, bias=False), 1e-12)
    (norm,), original = layer.parametrizations.weight, layer.parametrizations.weight.original
    with torch.no_grad():
        original.copy_(torch.tensor([[3.0, 0.0], [4.0, 5.0]]))
        norm._u.copy_(torch.tensor([1.0, 0.0])), norm._v.copy_(torch.tensor([1.0, 0.0]))
    bigbigan.power_iteration(layer.train())
    u, v = np.array([3, 4]) / 5, np.array([5, 4]) / math.sqrt(41)  # W v, then W^T u, normalised
    assert np.allclose(norm._u, u, atol=1e-6) and np.allclose(norm._v, v, atol=1e-6)
    assert np.allclose(layer.weight.detach(), original.detach() / (u @ original.detach().numpy() @ v), atol=1e-6)
    for _ in range(3):
        layer(torch.ones(1, 2))
    assert np.allclose(norm._u, u, atol=1e-6)  # no forward pass iterates
    for _ in range(20):
        bigbigan.power_iteration(layer)
    assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, abs=1e-5)
    assert torch.linalg.matrix_norm(original, 2).item() == pytest.approx(6.708204, abs=1e-5)  # W itself stays


def test_sigma_has_a_gradient():
    """The gradient of W / sigma(W), by hand: (dW - <dW, W / sigma> u v^T) / sigma for a cotangent dW."""
    layer = randomize(bigbigan.spectral(nn.Linear(4, 3, bias=False), 1e-12))
    for _ in range(50):
        bigbigan.power_iteration(layer.train())
    W = layer.parametrizations.weight.original.detach().double()
    cotangent = torch.randn(3, 4, dtype=torch.float64)
    (layer.weight * cotangent).sum().backward()
    u, s, v = torch.linalg.svd(W)
    by_hand = (cotangent - (cotangent * W).sum() / s[0] * torch.outer(u[:, 0], v[0])) / s[0]
    assert torch.allclose(layer.parametrizations.weight.original.grad.double(), by_hand, atol=1e-4)


def test_which_layers_are_spectral_and_orthogonal():
    _, G, E, D = built("--data", "cifar10")
    is_spectral = lambda m: hasattr(m, "parametrizations")
    layers = lambda network: [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert all(map(is_spectral, layers(G) + layers(D)))
    assert not any(map(is_spectral, [*layers(E), G.embed]))
    assert not any(map(is_spectral, layers(bigbigan.build(arguments())[2].H)))  # the demo's latents go without
    G, _, D = bigbigan.build(arguments())
    for layer in (m for m in layers(G) + layers(D) if is_spectral(m)):
        W = layer.parametrizations.weight.original.detach().flatten(1)
        gram = W @ W.T if len(W) < W.shape[1] else W.T @ W
        assert torch.allclose(gram, torch.eye(len(gram)), atol=1e-4)


# ------------------------------------------------------------ layers
def test_attention_is_the_identity_at_first():
    attention, x = bigbigan.Attention(16, 1e-6), torch.randn(2, 16, 4, 4)
    assert torch.equal(attention(x), x)
    attention(x).square().sum().backward()
    assert attention.gamma.grad.abs() > 0


def test_attention_by_the_formula():
    attention = bigbigan.Attention(16, None)
    nn.init.constant_(attention.gamma, 0.7)
    x = torch.randn(2, 16, 4, 4)
    W = {
        k: getattr(attention, k).weight.detach().numpy()[..., 0, 0].astype(float)
        for k in ("query", "key", "value", "out")
    }
    n = x.numpy().astype(float).reshape(2, 16, 16)
    pooled = lambda w: (w @ n).reshape(2, -1, 2, 2, 2, 2).max((3, 5)).reshape(2, -1, 4)  # [B, C, HW/4]
    beta = np.exp((W["query"] @ n).transpose(0, 2, 1) @ pooled(W["key"]))  # [B, HW, HW/4], no scale
    beta /= beta.sum(2, keepdims=True)
    out = n + 0.7 * W["out"] @ (pooled(W["value"]) @ beta.transpose(0, 2, 1))
    assert np.allclose(attention(x).detach().numpy(), out.reshape(x.shape), atol=1e-5)


@pytest.mark.parametrize("cond_dim", [3, 0])
def test_conditional_batch_norm(cond_dim):
    """Before each convolution of a block: gain 1 + g(c), bias b(c)."""
    affine = lambda n: nn.Linear(cond_dim, n, bias=False) if cond_dim else nn.Embedding(2, n)
    block, after = bigbigan.GBlock(1, 1, affine, False, None), []
    (_, gain, bias, grow, conv), (_, gain2, bias2, _, conv2) = block.layers
    c = torch.randn(4, 3) if cond_dim else torch.tensor([0, 1, 1, 0])
    x, wanted = (
        torch.tensor([1.0, 2, 3, 6]).view(4, 1, 1, 1),
        torch.tensor([-1.0690, -0.5345, 0, 1.6036]).view(4, 1, 1, 1),
    )
    grow.register_forward_hook(lambda m, inputs, out: after.append(inputs[0]))
    for weight in (gain.weight, bias.weight, gain2.weight, bias2.weight, block.skip[0].weight, block.skip[0].bias):
        nn.init.zeros_(weight)
    block(x, c)
    assert torch.allclose(after[0], wanted.relu(), atol=1e-4)
    nn.init.constant_(gain.weight, 0.5), nn.init.constant_(bias.weight, 2.0)
    s = c.sum(1).view(4, 1, 1, 1) if cond_dim else 1
    block(x, c)
    assert torch.allclose(after[1], (wanted * (1 + 0.5 * s) + 2 * s).relu(), atol=1e-3)
    for layer in (conv, conv2):
        nn.init.dirac_(layer.weight), nn.init.zeros_(layer.bias)
    nn.init.constant_(bias2.weight, 3.0), nn.init.zeros_(gain.weight), nn.init.zeros_(bias.weight)
    h = wanted.relu()
    h = (3 * s + (h - h.mean()) / h.std(correction=0)).relu()
    out = block(x, c)
    assert out.shape == (4, 1, 2, 2) and torch.allclose(out, h.expand(4, 1, 2, 2), atol=1e-3)


def test_chunks_of_z():
    """The first chunk draws the map, each other one conditions its own block, behind the shared embedding."""
    G, seen = bigbigan.build(arguments())[0].eval(), []
    for block in G.blocks:
        block.register_forward_hook(lambda m, inputs, out: seen.append(inputs))
    z, maps, conditions = torch.randn(2, 32), [], []
    for chunk in (None, 0, 1, 2, 3):
        seen.clear()
        changed = z.clone()
        if chunk is not None:
            changed[:, 8 * chunk : 8 * chunk + 8] += 1
        out = G(changed)
        maps.append(seen[0][0]), conditions.append([c for _, c in seen])
        assert out.min() >= -1 and out.max() <= 1
    assert all(torch.equal(m, maps[0]) for m in maps[2:]) and not torch.equal(maps[1], maps[0])
    for chunk, found in enumerate(conditions[1:]):
        differs = [not torch.equal(a, b) for a, b in zip(found, conditions[0], strict=True)]
        assert differs == [block == chunk for block in (1, 2, 3)]
    assert torch.equal(conditions[0][0], torch.cat([G.embed.weight.expand(2, -1), z[:, 8:16]], 1))


def test_a_single_label(paper):
    """The table has one row, shared by all images."""
    _, G, _, _ = paper
    assert G.embed.weight.shape == (1, 128)
    G, z = bigbigan.build(arguments())[0].eval(), torch.randn(3, 32)
    assert torch.equal(G(z), G(z, G.embed(torch.zeros(3, dtype=torch.long))))


def test_f_is_a_sum_and_scaled_for_the_pair_alone():
    D = randomize(bigbigan.Discriminator(bigbigan.image_trunk((8, 8), 1, 8), 8, 4, 16, 2, f_scale=1 / 8))
    bigbigan.power_iteration(D.train())
    x, z = torch.randn(3, 3, 8, 8), torch.randn(3, 4)
    with torch.no_grad():
        f, h, (s_x, s_z, s_xz) = F.relu(D.F(x)).flatten(2).sum(2), D.H(z), D(x, z)
        assert torch.allclose(s_x, D.s_x(f)[:, 0], atol=1e-5) and torch.allclose(s_z, D.s_z(F.relu(h))[:, 0])
        assert torch.allclose(s_xz, D.s_xz(F.relu(D.J(torch.cat([f / 8, h], 1))))[:, 0], atol=1e-5)
        D.f_scale = 1.0
        assert torch.equal(D(x, z)[0], s_x) and not torch.allclose(D(x, z)[2], s_xz, rtol=0.01)


def test_latent_mlp_by_the_formula():
    """The first block takes its raw input; a linear skip where the width changes; no ReLU at the end."""
    network = randomize(bigbigan.mlp(4, 6, 2))
    x = torch.randn(5, 4)
    linears = [m for m in network.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 5
    by_shape = {name: [] for name in ("wide", "square")}
    for m in linears:
        by_shape["wide" if m.in_features == 4 else "square"].append(m)
    first, second = network
    (skip,) = first.skip
    L1, L2 = (m for m in first.branch if isinstance(m, nn.Linear))
    L3, L4 = (m for m in second.branch if isinstance(m, nn.Linear))
    assert {skip, L1} == set(by_shape["wide"]) and len(second.skip) == 0
    h = skip(x) + L2(F.relu(L1(x)))
    assert torch.allclose(network(x), h + L4(F.relu(L3(F.relu(h)))), atol=1e-5)


def test_images_enter_d_without_relu():
    """In the first block; the pre-activation of every other one does not touch its skip."""
    first, second = randomize(bigbigan.image_trunk((8, 8), 1, 8)).eval()
    x, h = torch.randn(2, 3, 8, 8), torch.randn(2, 8, 4, 4)
    assert not torch.allclose(first.branch(x), first.branch(F.relu(x)), atol=1e-3)
    assert torch.equal(second.branch(h), second.branch(F.relu(h)))
    assert torch.allclose(second(h), h + second.branch(h))


@pytest.mark.parametrize(
    ("kind", "cin", "cout", "stride"),
    [
        ("basic", 8, 16, 2),
        ("basic", 8, 8, 1),
        ("bottleneck", 8, 32, 1),
        ("bottleneck", 32, 64, 2),
        ("bottleneck", 32, 32, 1),
    ],
)
def test_pre_activated_units(kind, cin, cout, stride):
    """Pre-activation: where the shape changes the skip is a convolution of relu(bn(x)), else x itself."""
    unit, x = randomize(bigbigan.unit(kind, cin, cout, stride)).eval(), torch.randn(2, cin, 8, 8)
    convs = [m for m in unit.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in unit.modules() if isinstance(m, nn.BatchNorm2d)]
    changes = stride > 1 or cin != cout
    assert all(conv.bias is None for conv in convs)
    assert [conv.stride[0] for conv in convs if conv.kernel_size == (3, 3)] == [stride] + [1] * (kind == "basic")
    inputs = [F.relu(norms[0](x))]
    branch = convs[:-1] if changes else convs
    h = inputs[0]
    for conv, norm in zip(branch, [*norms[1:], None], strict=True):
        h = conv(h) if norm is None else F.relu(norm(conv(h)))
    skip = convs[-1](inputs[0]) if changes else x
    assert torch.allclose(unit(x), skip + h, atol=1e-4)
    assert unit(x).shape == (2, cout, 8 // stride, 8 // stride)


def test_reversible_unit():
    unit, x = (
        randomize(bigbigan.Reversible(*bigbigan.unit("bottleneck", 32, 32).branch)).eval(),
        torch.randn(2, 64, 4, 4),
    )
    y2, y1 = unit(x).chunk(2, 1)
    x1, x2 = x.chunk(2, 1)
    assert torch.equal(y2, x2) and not torch.allclose(y1, x1, atol=1e-2)
    assert torch.allclose(y1 - nn.Sequential.forward(unit, y2), x1, atol=1e-5)  # the inverse
    nn.init.zeros_([m for m in unit.modules() if isinstance(m, nn.Conv2d)][-1].weight)
    assert torch.equal(unit(x), torch.cat([x2, x1], 1))


def test_between_reversible_stages():
    """Half the size by averaging, twice the channels by zeros on both sides."""
    with torch.device("meta"):
        trunk = bigbigan.Encoder("revnet50", 256, 8, 4).trunk
    at = next(i for i, m in enumerate(trunk) if isinstance(m, nn.AvgPool2d))
    x = torch.randn(2, 256, 8, 8)
    out = trunk[at + 1](trunk[at](x))
    assert out.shape == (2, 512, 4, 4)
    assert out[:, :128].abs().max() == 0 == out[:, 384:].abs().max()
    assert torch.allclose(out[:, 128:384], F.avg_pool2d(x, 2))


def test_stems():
    """ImageNet's from 96 pixels on; on small images a convolution that keeps the map, but for the demo."""
    for name, size, shape in (("resnet50", 256, 64), ("resnet18", 32, 32), ("resnet10", 32, 16), ("resnet18", 96, 24)):
        trunk = bigbigan.Encoder(name, size, 8, 4).trunk
        found = []
        unit = next(i for i, m in enumerate(trunk) if not isinstance(m, nn.Conv2d | nn.MaxPool2d))
        trunk[unit].register_forward_pre_hook(lambda m, inputs, found=found: found.append(inputs[0].shape[2]))
        trunk(torch.randn(2, 3, size, size))
        assert found == [shape]


def test_encoder_starts_as_documented():
    _, E, _ = bigbigan.build(arguments())
    assert torch.equal(E.head.bias, torch.tensor([0.0] * 32 + [-1.0] * 32))  # the demo's sigma starts at 0.31
    E = bigbigan.Encoder("resnet10", 32, 64, 8)
    conv = next(m for m in E.trunk.modules() if isinstance(m, nn.Conv2d) and m.in_channels > 3)
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / conv.weight[0].numel()), rel=0.1)  # He
    assert torch.equal(E.head.bias, torch.zeros(16))


# ------------------------------------------------------------ averages and statistics
def test_standing_statistics():
    """The means of the batches' means and of their (unbiased) variances, in a copy."""
    average = AveragedModel(nn.BatchNorm1d(1, affine=False))
    network = bigbigan.settle(arguments(), average, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [9.0]])])
    assert network.running_mean.item() == pytest.approx(4.5) and network.running_var.item() == pytest.approx(5.0)
    assert not network.training and average.module.running_mean.item() == 0


def test_settled_generator_does_not_look_at_the_batch():
    args = arguments()
    G = bigbigan.settle(args, AveragedModel(bigbigan.build(args)[0]))
    z = torch.randn(16, args.z_dim)
    with torch.no_grad():
        assert torch.allclose(G(z)[:1], G(z[:1]), atol=1e-5)
        assert not torch.allclose(G.train()(z)[:1], G(z[:2])[:1], atol=1e-3)


# ------------------------------------------------------------ the loop
def toy(name, split, size, root, skip_broken, rows=slice(None)):
    """64 pictures of noise and no labels."""
    images = torch.randint(256, (64, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Data("toy", split, size, images, f"toy{split}", root)


@pytest.fixture
def train(monkeypatch, tmp_path):
    """train(*flags) on noise, without pictures and evaluation; returns its networks and what happened on the way.

    events: per optimiser step its name, learning rate, betas, and for each network the parameters before, after, and
    the gradients that were there.
    """
    monkeypatch.setattr(bigbigan, "load", toy)
    for name in ("sample", "evaluate", "picture"):
        monkeypatch.setattr(bigbigan, name, lambda *args: None)
    build = bigbigan.build

    def flat(network, of=lambda p: p):
        return torch.cat(
            [torch.zeros(p.numel()) if of(p) is None else of(p).detach().flatten() for p in network.parameters()]
        )

    def run(*flags, prepare=lambda *networks: None, **changes):
        events, judged = [], []
        args = arguments(
            "--batch",
            8,
            "--steps",
            1,
            "--log-every",
            100,
            "--out",
            tmp_path / str(len(list(tmp_path.iterdir()))),
            *flags,
        )
        vars(args).update(changes)
        networks = dict(zip("GED", build(args), strict=True))
        prepare(*networks.values())
        monkeypatch.setattr(bigbigan, "build", lambda args: list(networks.values()))
        owner = {id(p): name for name, network in networks.items() for p in network.parameters()}

        def before(optimizer, *_):
            group = optimizer.param_groups[0]
            grads = {name: flat(network, lambda p: p.grad) for name, network in networks.items()}
            training = all(m.training for n in networks.values() for m in n.modules() if isinstance(m, nn.BatchNorm2d))
            event = {
                "of": owner[id(group["params"][0])],
                "lr": float(group["lr"]),
                "betas": group["betas"],
                "grads": grads,
            }
            events.append(event | {"training": training, "before": {k: flat(n).clone() for k, n in networks.items()}})

        def after(optimizer, *_):
            events[-1]["after"] = {name: flat(network).clone() for name, network in networks.items()}

        handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
        handles.append(networks["D"].register_forward_hook(lambda m, inputs, out: judged.append(inputs)))
        try:
            bigbigan.train(args)
        finally:
            for handle in handles:
                handle.remove()
        return args, networks, events, judged

    return run


def test_a_step(train):
    """D twice, then E and G together; each moves alone; E at eta times G's rate; new images and latents each time."""
    args, _, events, judged = train("--d-steps", 2, "--no-reuse", "--eta", 10, "--lr-g", 1e-4, "--lr-d", 3e-4)
    assert [event["of"] for event in events] in (["D", "D", "G", "E"], ["D", "D", "E", "G"])
    for event in events:
        moved = {name for name in "GED" if not torch.equal(event["before"][name], event["after"][name])}
        assert moved == {event["of"]} and event["training"]
        assert event["lr"] == pytest.approx({"D": 3e-4, "G": 1e-4, "E": 1e-3}[event["of"]])
        assert tuple(event["betas"]) == args.betas
    for event in events[:2]:
        assert event["grads"]["G"].norm() == 0 == event["grads"]["E"].norm()
    assert torch.equal(events[2]["grads"]["D"], events[1]["grads"]["D"])  # E's and G's step gives D none
    batches = [x for x, _ in judged[:3]]
    assert [len(x) for x in batches] == [16, 16, 16]
    assert not any(torch.equal(a[half], b[half]) for a, b in pairwise(batches) for half in (slice(8), slice(8, 16)))
    latents = [z[8:] for _, z in judged[:3]]
    assert not any(torch.equal(a, b) for a, b in pairwise(latents))


def test_a_batch_is_used_again(train):
    """With --reuse E and G see D's last batch, and the next step another."""
    _, _, _, judged = train("--d-steps", 1, "--reuse", "--steps", 2)
    first, again, second = (x for x, _ in judged[:3])
    assert torch.equal(first[:8], again[:8]) and not torch.equal(first[:8], second[:8])


def test_the_generator_hears_d_after_its_step(train):
    """G's gradient, from L_EG and from what D weighs now, not from what it weighed before its step."""
    args, networks, events, judged = train("--d-steps", 1, "--lr-g", 0)
    G, _, D = networks.values()
    (x, x_hat), (z_hat, z) = (part.detach().chunk(2) for part in judged[1])

    def gradient():
        return gradients(bigbigan.encoder_generator_loss(*bigbigan.judge(args, D, x, z_hat, G(z), z)), G)

    (found,) = (event["grads"]["G"] for event in events if event["of"] == "G")
    assert torch.allclose(G(z), x_hat, atol=1e-5)  # in train mode
    assert close(found, gradient(), 1e-4)
    nn.utils.vector_to_parameters(events[0]["before"]["D"], D.parameters())
    assert not close(found, gradient(), 1e-2)


def test_one_power_iteration_a_step(train):
    calls = []
    iterate = _SpectralNorm._power_method
    with mock.patch.object(
        _SpectralNorm, "_power_method", lambda self, *args: calls.append(self) or iterate(self, *args)
    ):
        _, networks, _, _ = train("--d-steps", 2, prepare=lambda *_: calls.clear())
    for name in "GD":
        own = [m for m in networks[name].modules() if isinstance(m, _SpectralNorm)]
        assert own and all(sum(call is m for call in calls) == 3 for m in own)


def test_averages_start_as_copies(train):
    """w1 and w2 are copied, then d * average + (1 - d) * w, in E as in G."""
    args, networks, events, _ = train("--steps", 4, "--ema", 0.9, ema_start=2)
    state = torch.load(args.out / "checkpoint.pt", weights_only=True)
    for name in "GE":
        _, w2, w3, w4 = (event["after"][name] for event in events if event["of"] == name)
        average = AveragedModel(networks[name])
        average.load_state_dict(state[f"{name}_ema"])
        found = torch.cat([p.detach().flatten() for p in average.parameters()])
        assert torch.allclose(found, 0.81 * w2 + 0.09 * w3 + 0.1 * w4, atol=1e-6)
        assert not torch.allclose(found, w4, atol=1e-5)


def test_pieces_add_up_to_the_batch(train):
    """Four pieces give the gradients of one batch, where batch norm does not look at the batch."""

    def freeze(*networks):
        for module in (m for network in networks for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
            module.eval().train = lambda mode=True: None

    runs = [train("--accumulate", n, "--lr-d", 0, prepare=freeze)[2] for n in (1, 4)]
    for whole, pieces in zip(*runs, strict=True):
        assert whole["of"] == pieces["of"] and whole["grads"][whole["of"]].norm() > 0
        assert close(pieces["grads"][whole["of"]], whole["grads"][whole["of"]], 1e-4)


def test_steps_do_not_depend_on_how_often_they_are_logged(train):
    often, seldom = (train("--steps", 3, "--log-every", n)[1] for n in (1, 100))
    for name in "GED":
        a, b = (run[name].state_dict() for run in (often, seldom))
        differ = [key for key in a if not torch.equal(a[key], b[key])]
        assert not differ, f"{name}: {differ[:3]}"


def test_watched_numbers(train):
    args, *_ = train("--steps", 2, "--log-every", 1)
    text = (args.out / "log.jsonl").read_text()
    row = json.loads(text.splitlines()[-1])
    assert {"step", "loss_d", "loss_eg", "lr", "img_per_s", "pairing", "mu_std", "sigma"} <= set(row)
    assert {f"{side}_{k}" for side in ("real", "fake") for k in ("x", "z", "xz")} <= set(row)
    assert row["loss_eg"] == pytest.approx(sum(row[f"real_{k}"] - row[f"fake_{k}"] for k in ("x", "z", "xz")), abs=1e-3)


# ------------------------------------------------------------ images, pictures, numbers
def test_d_sees_the_means_of_what_e_sees(monkeypatch):
    monkeypatch.setattr(bigbigan, "load", toy)
    args = arguments("--encoder-size", 64)
    x, seen, _ = next(bigbigan.images(args, "train", 4))
    assert x.shape == (4, 3, 64, 64) and seen.shape == (4, 3, 32, 32)
    means = x.numpy().astype(float).reshape(4, 3, 32, 2, 32, 2).mean((3, 5))
    assert np.allclose(seen, means, atol=1e-6)
    args = arguments()
    x, seen, _ = next(bigbigan.images(args, "train", 4))
    assert torch.equal(x, seen)


def test_crops_are_of_whole_pictures(tmp_path):
    """With --crop-area both see one crop of the picture's own pixels, at E's resolution."""
    for i in range(12):
        noise = np.random.default_rng(i).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((80, 60)).save(tmp_path / f"{i}.png")
    args = arguments(
        "--data", tmp_path, "--preset", "demo", "--root", tmp_path / "root", "--encoder-size", 64, "--crop-area", 0.08
    )
    (x, seen, _), (y, _, _) = islice(bigbigan.images(args, "train", 4), 2)
    assert x.shape == (4, 3, 64, 64) and torch.allclose(seen, F.avg_pool2d(x, 2), atol=1e-6)
    assert x.min() >= -1 and x.max() <= 1 and not torch.equal(x, y)


def untile(path, columns):
    """The 32-pixel pictures of a sheet, float [N, 3, 32, 32] in [-1, 1]."""
    sheet = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 127.5 - 1
    rows = (sheet.shape[1] - 2) // 34
    return torch.stack(
        [sheet[:, 34 * r + 2 :][:, :32, 34 * c + 2 :][..., :32] for r in range(rows) for c in range(columns)]
    )


def test_pictures_and_reconstruction_error(train, monkeypatch):
    args = train(standing=2)[0]
    monkeypatch.undo()
    monkeypatch.setattr(bigbigan, "load", toy)
    bigbigan.sample(args)
    (x, seen, _), (G, E, _) = next(bigbigan.images(args, "test", 40)), bigbigan.restore(args)
    pairs = untile(args.out / "reconstructions.png", 10)
    with torch.no_grad():
        again, mu = G(E(x)[0]), E(x)[0]
        assert torch.allclose(pairs[0:80:2], seen, atol=0.01) and torch.allclose(pairs[1:80:2], again, atol=0.01)
        rows = untile(args.out / "interpolations.png", 10).unflatten(0, (8, 10))
        assert torch.allclose(rows[4:, 0], G(mu[:8:2]), atol=0.01) and torch.allclose(
            rows[4:, 9], G(mu[1:8:2]), atol=0.01
        )
        samples = untile(args.out / "samples.png", 8)
        assert torch.allclose(rows[:4, 0], samples[:8:2], atol=0.01) and len(samples) == 64
    monkeypatch.setattr(bigbigan.fid, "evaluate", lambda *args, **options: {"fd_random": 1.0})
    bigbigan.evaluate(args)
    metrics = json.loads((args.out / "metrics.json").read_text())
    x, seen, _ = next(bigbigan.images(args, "test", 500))
    with torch.no_grad():
        again = G(E(x)[0])
        miss, other = (float((seen - y).square().sum((1, 2, 3)).sqrt().mean()) for y in (again, again.roll(1, 0)))
    assert metrics["reconstruction_error_ratio"] == pytest.approx(miss / other, rel=1e-3)
    assert metrics["steps"] == 1 and metrics["images"] == 8 and not any("top1" in key for key in metrics)


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
    """The demo, shortened: G(E(x)) is nearer to x than to another image, and E's features tell more than at first."""
    monkeypatch.setattr(bigbigan, "sample", lambda args: None)
    monkeypatch.setattr(bigbigan, "evaluate", lambda args: None)
    monkeypatch.setattr(bigbigan, "picture", lambda *args: None)
    args = arguments("--root", root, "--out", tmp_path, "--steps", STEPS, "--save-every", 10 * STEPS)
    bigbigan.train(args)
    G, E, _ = bigbigan.restore(args)
    with torch.no_grad():
        x, seen, _ = next(bigbigan.images(args, "test", 500))
        again = G(bigbigan.posterior(args, E, x))
    miss, other = ((seen - y).flatten(1).norm(dim=1).mean() for y in (again, again.roll(1, 0)))
    train, test = (load("shapes", split, 32, root, rows=slice(n)) for split, n in (("train", 2000), ("test", 1000)))

    def accuracy(trunk):
        return linear_probe.probe(linear_probe.extract(trunk, train), linear_probe.extract(trunk, test))["top1"]

    untrained = bigbigan.build(args)[1].trunk
    linear_probe.calibrate(untrained, train)
    before, after, ratio = accuracy(untrained), accuracy(E.trunk), float(miss / other)
    print(f"reconstruction error ratio {ratio:.3f}, probe {before:.3f} -> {after:.3f} after {STEPS} steps")
    assert ratio < 0.9, f"reconstructions are no nearer to their images than to others: {ratio:.3f}"
    assert after > before + 0.03, f"E has learnt nothing: probe {before:.3f} -> {after:.3f}"
