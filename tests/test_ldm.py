"""ldm.py against its paper: counts, parity, losses, the diffusion and its samplers, conditions; both stages learn.

About a minute on one core, half of it the shortened demo.
"""

import contextlib
import json
import math
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from fill import difference, fill_, inputs, values
from test_parity import GOLDEN, agree
from torch import nn
from torch.optim.swa_utils import AveragedModel

import ldm as script


def arguments(*flags):
    """What main() makes of a command line."""
    words = ["ldm.py", "--device", "cpu", "--precision", "fp32", *map(str, flags)]
    with mock.patch.object(sys, "argv", words):
        args = script.parse()
    script.start(args)
    return args


def count(network):
    return sum(p.numel() for p in network.parameters())


# ------------------------------------------------------------ sizes
def built(*flags):
    """The networks of a command line, on the meta device, and its arguments."""
    args = arguments(*flags)
    args.device, args.classes = "meta", {"paper": 1000}.get(args.preset, 10)
    with torch.device("meta"):
        return script.build(args), args


AUTOENCODERS = {  # E, D, the 1x1 convolutions beside them, codes, all
    "kl-f4": (22_351_238, 32_960_771, 54, 0, 55_312_063),
    "kl-f8": (34_163_592, 49_490_179, 92, 0, 83_653_863),
    "kl-f16": (28_265_760, 41_343_875, 1328, 0, 69_610_963),
    "vq-f4": (22_337_411, 32_960_771, 24, 24_576, 55_322_782),
    "vq-f4-plain": (21_285_763, 31_909_123, 24, 24_576, 53_219_486),
    "vq-f8": (27_397_764, 40_253_955, 40, 65_536, 67_717_295),
    "vq-f16": (28_155_144, 41_307_011, 144, 131_072, 69_593_371),
}


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_counts_of_the_autoencoders(name):
    (A, D, *_), args = built("--preset", "paper", "--autoencoder", name)
    small = count(A.encoder[-1]) + count(A.decoder[0])
    codes = 0 if A.codes is None else A.codes.numel()
    parts = count(A.encoder) - count(A.encoder[-1]), count(A.decoder) - count(A.decoder[0]), small, codes, count(A)
    assert parts == AUTOENCODERS[name]
    assert count(D) == (663_361 if name in ("vq-f8", "vq-f16") else 2_765_633)
    x = torch.empty(1, 3, 256, 256, device="meta")
    z = A.moments(x)[0]
    assert z.shape == (1, args.z, 256 // args.f, 256 // args.f) and A.f == args.f == int(
        name.split("f")[1].split("-")[0]
    )
    assert A.decoder(z).shape == x.shape


UNETS = {  # beyond the presets: (arguments, options), parameters
    "LDM-8": ((4, 4, 256, (1, 2, 4), 2, (1, 2, 4)), dict(head=32, context=512), 394_984_196),
    "text": ((4, 4, 320, (1, 2, 4, 4), 2, (1, 2, 4)), dict(heads=8, context=1280), 872_300_484),
    "toy": ((4, 4, 32, (1, 2), 1, (1, 2)), dict(head=32, context=64), 1_077_572),
}
TASKS = {  # of the paper's preset
    "class": ("vq-f4", 400_920_579),
    "none": ("vq-f4", 274_056_163),
    "inpaint": ("vq-f4-plain", 387_245_827),
    "super": ("vq-f4", 113_622_563),
}


@pytest.mark.parametrize("task", TASKS)
def test_counts_of_the_papers_unets(task):
    autoencoder, wanted = TASKS[task]
    (_, _, unet, embed), args = built("--preset", "paper", "--condition", task, "--autoencoder", autoencoder)
    assert count(unet) == wanted and count(embed) == (1001 * 512 if task == "class" else 0)
    z = torch.empty(1, unet.down[0][0].in_channels, 64, 64, device="meta")
    context = torch.empty(1, 1, 512, device="meta") if task == "class" else None
    assert unet(z, torch.empty(1, device="meta"), context).shape == (1, 3, 64, 64)
    assert z.shape[1] == {"inpaint": 7, "super": 6}.get(task, 3) and args.b1 == script.B1[task]


def test_counts_of_other_networks():
    with torch.device("meta"):
        for shape, options, wanted in UNETS.values():
            assert count(script.UNet(*shape, **options)) == wanted
        assert count(script.SpatialTransformer(192, 32, 1, 512)) == 937_920
        assert [count(script.discriminator(n)) for n in (3, 2, 1)] == [2_765_633, 663_361, 136_513]
        sides = [script.discriminator(n)(torch.empty(1, 3, 32, 32)).shape[2] for n in (3, 2, 1)]
        assert sides == [2, 6, 14] and script.discriminator()(torch.empty(1, 3, 256, 256)).shape[2:] == (30, 30)
        shapes = {  # (ch, multipliers, blocks, z): parameters, at 32 x 32
            (64, (1, 2), 2, 4): 3_346_471,
            (64, (1, 2, 4), 2, 4): 13_859_495,
            (32, (1, 2), 1, 4): 658_375,
            (32, (1, 2, 2), 1, 4): 954_567,
            (32, (1, 1, 2), 1, 4): 732_743,
        }
        assert [count(script.Autoencoder(*shape, 32)) for shape in shapes] == [*shapes.values()]
        assert count(script.Autoencoder(64, (1, 2), 2, 4, 32, codes=512)) == 3_343_855


def test_the_small_preset():
    (A, D, unet, embed), args = built("--data", "cifar10")
    assert [count(n) for n in (A, D, unet, embed)] == [3_346_471, 663_361, 43_926_660, 5632]
    assert args.z == 4 and args.f == 2
    assert count(built("--data", "cifar10", "--condition", "none")[0][2]) == 27_490_820


# ------------------------------------------------------------ parity with the official code
@torch.no_grad()
def test_parity_of_the_unet():
    unet, t = fill_(script.UNet(3, 3, 32, (1, 2, 3, 5), 2, (2, 4, 8), context=64)).eval(), torch.tensor([17, 801])
    assert count(unet) == 11_109_379
    x, context = inputs(8, (2, 3, 32, 32), (2, 3, 64))
    agree("8.three_tokens", unet(x, t, context))
    agree("8.class_token", unet(x, t, values((11, 64))[[3, 10]][:, None]))


@torch.no_grad()
def test_parity_of_the_unet_with_plain_attention():
    unet = fill_(script.UNet(3, 3, 64, (1, 2, 2), 2, (2, 4), head=32)).eval()  # of 32 channels a head, as FFHQ's
    agree("8d_split.out", unet(*inputs(8, (2, 3, 16, 16)), torch.tensor([17, 801])))


@torch.no_grad()
def test_parity_of_the_autoencoder():
    A = fill_(script.Autoencoder(32, (1, 2, 4), 2, 3, 32)).eval()
    assert count(A) == 3_475_423
    x, z, noise = inputs(9, (2, 3, 32, 32), (2, 3, 8, 8), (2, 3, 8, 8))
    moments = A.moments(x)
    agree("9.moments", torch.cat(moments, 1))
    agree("9.sample", A.encode(x, noise))
    agree("9.kl", script.kl_loss(*moments))
    agree("9.decoded_z", A.decode(z))
    agree("9.decoded_mode", A.decode(A.encode(x)))
    A.scale.fill_(0.2)
    agree("9.decoded_mode", A.decode(A.encode(x)))  # whatever s is


SCHEDULES = {"imagenet": (0.0195, 0.0015), "churches": (0.0155, 0.0015), "text": (0.012, 0.00085)}


@pytest.mark.parametrize("name", SCHEDULES)
def test_parity_of_the_schedules(name):
    abar = script.schedule(*SCHEDULES[name])
    betas = 1 - abar / torch.cat([torch.ones(1), abar[:-1]])
    assert difference(GOLDEN, f"10.alphas_cumprod_{name}", abar) < 1e-6
    assert difference(GOLDEN, f"10.betas_{name}", betas) < 1e-6


def test_parity_of_ddim():
    steps = script.grid(script.schedule(0.0195), "ddim", 50)[::-1]
    t, a, a_prev = (np.array(column) for column in zip(*steps, strict=True))
    assert np.array_equal(t, GOLDEN["10.timesteps"])
    assert difference(GOLDEN, "10.ddim_alphas", a) < 1e-6 and difference(GOLDEN, "10.ddim_alphas_prev", a_prev) < 1e-6
    x, e, noise = inputs(10, *[(2, 3, 8, 8)] * 3)
    for eta in (0, 1):
        zero = torch.zeros(1, dtype=torch.float64)  # with z and e at 0, what is left is sigma
        sigmas = torch.cat([script.ddim_step(zero, zero, *step[1:], eta, zero + 1)[0] for step in steps])
        assert np.abs(sigmas.numpy() - GOLDEN[f"10.sigmas_eta{eta}"]).max() < 1e-6
        for i in (0, 25, 49):
            z, z0 = script.ddim_step(x, e, *steps[i][1:], eta, noise)
            assert difference(GOLDEN, f"10.x_prev_eta{eta}_index{i}", z) < 1e-5
            assert difference(GOLDEN, f"10.pred_x0_index{i}", z0) < 1e-5


# ------------------------------------------------------------ stage 1
def test_reconstruction_loss():
    x = torch.zeros(1, 3, 4, 4)
    found = script.reconstruction_loss(x, x + 0.1, torch.full((1, 1, 1, 1), 0.2))
    assert found.item() == pytest.approx(14.4, rel=1e-6)  # the perceptual distance counts at every number
    random = np.random.default_rng(0)
    x, y, p = random.normal(size=(2, 3, 4, 4)), random.normal(size=(2, 3, 4, 4)), random.random((2, 1, 1, 1))
    both = [script.reconstruction_loss(*map(torch.tensor, (x, y, p)), mean=mean).item() for mean in (False, True)]
    total = np.abs(x - y).sum() + 48 * p.sum()
    assert both == pytest.approx([total / 2, total / 96])


def test_kl():
    mean, log_variance = torch.tensor([1.0, -2.0]), torch.tensor([1.0, 4.0]).log()
    assert script.kl_loss(*(v.view(1, 2, 1, 1) for v in (mean, log_variance))).item() == pytest.approx(3.3068528)


def quantiser(codes):
    """An autoencoder whose E and D change nothing."""
    A = script.Autoencoder(32, (1,), 1, codes.shape[1], 4, codes=len(codes))
    A.encoder, A.decoder, A.codes = nn.Identity(), nn.Identity(), nn.Parameter(codes)
    return A


def test_quantiser():
    A = quantiser(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    z = torch.tensor([0.2, 0.1]).view(1, 2, 1, 1).requires_grad_()
    x_hat, regularised = A(z, None)
    loss = script.vq_loss(*regularised)
    assert loss.item() == pytest.approx(0.03125) and not x_hat.any()
    dz, dcodes = torch.autograd.grad(loss, [z, A.codes], retain_graph=True)
    assert torch.allclose(dz.flatten(), torch.tensor([0.2, 0.1]))
    assert torch.allclose(dcodes, torch.tensor([[-0.05, -0.025], [0.0, 0.0]]))
    assert torch.equal(*torch.autograd.grad(x_hat.sum(), z), torch.ones_like(z))  # straight through
    assert torch.equal(A.encode(z), z) and not A.decode(z).any()  # the diffusion sees z, D its codes


def test_losses_of_the_discriminator():
    loss = script.discriminator_loss(torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.5]))
    assert loss.item() == pytest.approx(0.5)
    unit = torch.tensor([1.0, 0.0])
    assert float(script.adaptive_weight(unit, 0.1 * unit, 0.5)) == pytest.approx(0.5 / 0.1001)
    assert float(script.adaptive_weight(2 * unit, 0 * unit, 0.5)) == pytest.approx(5000)


def test_downsampling_pads_right_and_below():
    A = script.Autoencoder(32, (1, 1), 1, 4, 8)
    pad, down = next((a, b) for a, b in zip(A.encoder, A.encoder[1:], strict=False) if isinstance(a, nn.ZeroPad2d))
    assert pad.padding == (0, 1, 0, 1) and down.stride == (2, 2) and down.padding == (0, 0)
    assert script.UNet(3, 3, 32, (1, 1), 1, ()).down[2][0].padding == (1, 1)


# ------------------------------------------------------------ stage 2
def test_schedule_of_the_sheet():
    abar = script.schedule(0.0195)
    betas = 1 - abar / torch.cat([torch.ones(1), abar[:-1]])
    assert betas[[0, 1, 499, 999]].tolist() == pytest.approx([0.0015, 0.00150783468, 0.007945157, 0.0195], rel=1e-6)
    assert abar[[0, 499, 999]].tolist() == pytest.approx([0.9985, 0.11584449, 1.42303975e-4], rel=1e-6)
    assert float(script.schedule(0.0155)[999]) == pytest.approx(6.686652e-4, rel=1e-6)


def test_moments_of_the_forward_process():
    """q(z_t | z_0), and q(z_{t-1} | z_t, z_0) by Bayes' rule from two of them, in float64."""
    random = torch.Generator().manual_seed(0)
    a, z0 = 0.3, torch.tensor(1.5, dtype=torch.float64)
    z = script.diffuse(z0, torch.randn(200_000, generator=random, dtype=torch.float64), a)
    assert float(z.mean()) == pytest.approx(a**0.5 * 1.5, abs=5e-3) and float(z.var()) == pytest.approx(1 - a, rel=0.01)
    abar = script.schedule(0.0195).tolist()
    for t in (1, 300, 999):
        a, a_prev, z_t, x0 = abar[t], abar[t - 1], 0.7, -0.4
        alpha, beta = a / a_prev, 1 - a / a_prev
        precision = alpha / beta + 1 / (1 - a_prev)  # of q(z_t | z_{t-1}) q(z_{t-1} | z_0), as a function of z_{t-1}
        mean = (alpha**0.5 / beta * z_t + a_prev**0.5 / (1 - a_prev) * x0) / precision
        e = (z_t - a**0.5 * x0) / (1 - a) ** 0.5
        found = [
            script.ddim_step(torch.tensor(z_t, dtype=torch.float64), e, a, a_prev, 1.0, noise)[0] for noise in (0, 1)
        ]
        assert float(found[0]) == pytest.approx(mean, rel=1e-9)
        assert float(found[1] - found[0]) == pytest.approx(precision**-0.5, rel=1e-9)


def test_steps_of_the_samplers():
    abar = script.schedule(0.0195)
    times = lambda *how: [step[0] for step in script.grid(abar, *how)[::-1]]
    assert times("ddim", 50) == [*range(1, 1000, 20)] and times("ddpm", 1000) == [*range(1000)]
    for steps in (1, 7, 27, 300, 400, 1000):  # whatever divides 1000 and what does not
        for sampler in ("ddim", "ddpm"):
            grid = script.grid(abar, sampler, steps)
            assert len(grid) == steps and all(0 <= t <= 999 for t, *_ in grid)
            assert [step[2] for step in grid[:-1]] == [step[1] for step in grid[1:]]
            assert grid[-1][2] == (1.0 if sampler == "ddpm" else float(abar[0]))
    z = torch.tensor(0.5)
    found, z0 = script.ddim_step(z, 1.0, 0.11400478, 0.13336291)
    assert float(found) == pytest.approx(0.45366411, abs=1e-6) and float(z0) == pytest.approx(-1.30691097, abs=1e-6)
    found = [float(script.ddim_step(z, 1.0, 0.11400478, 0.13336291, 1.0, noise)[0]) for noise in (0.0, 1.0)]
    assert found[0] == pytest.approx(0.37399725, abs=1e-6) and found[1] - found[0] == pytest.approx(
        0.37680537, abs=1e-6
    )


def gaussian(args, mean, variance):
    """The exact eps of data N(mean, variance), and the arguments of a sampler."""
    abar = script.schedule(args.b1).float()

    def unet(z, t):
        a = abar[t][:, None, None, None]
        return (1 - a).sqrt() * (z - a.sqrt() * mean) / (a * variance + 1 - a)

    return unet, nn.Identity()


@pytest.mark.parametrize(("sampler", "eta", "steps"), [("ddim", 0, 500), ("ddim", 1, 500), ("ddpm", 0, 1000)])
def test_samplers_draw_gaussian_data(sampler, eta, steps):
    args = arguments("--sampler", sampler, "--eta", eta, "--sample-steps", steps, "--condition", "none")
    z = script.denoise(args, gaussian(args, 0.8, 0.25), None, 200, script.FAKES, 0)
    assert z.shape == (200, 4, 8, 8)
    assert float(z.mean()) == pytest.approx(0.8, abs=0.03) and float(z.std()) == pytest.approx(0.5, abs=0.03)


def test_ddim_can_be_inverted():
    """From an image to its noise by the steps taken backwards, and to the image again."""
    args = arguments("--condition", "none")
    (unet, _), grid = gaussian(args, 0.8, 0.25), script.grid(script.schedule(args.b1), "ddim", 500)
    z = z0 = 0.8 + 0.5 * torch.randn(50, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    e = lambda z, t: unet(z, torch.full((50,), t))
    for (_, a, _), (t_prev, a_prev, _) in zip(grid[-2::-1], grid[:0:-1], strict=True):
        z, _ = script.ddim_step(z, e(z, t_prev), a_prev, a)
    assert float(z.std()) == pytest.approx(1, abs=0.1)  # noise it is
    for t, a, a_prev in grid:
        z, _ = script.ddim_step(z, e(z, t), a, a_prev)
    assert (z - z0).square().mean() < 1e-3 * z0.var()


def tiny(context=16, **options):
    torch.manual_seed(0)
    unet = script.UNet(4, 4, 32, (1, 2), 1, (1, 2), head=32, context=context, **options)
    return unet, nn.Embedding(4, context or 1)


def awake(nets):
    """Layers that start from 0 do not here."""
    for net in nets:
        for p in net.parameters():
            nn.init.normal_(p, std=0.1)
    return nets


@torch.no_grad()
def test_guidance():
    nets, z, t, c = awake(tiny()), torch.randn(3, 4, 8, 8), torch.tensor([5, 600, 999]), torch.tensor([0, 1, 2])
    e_null, e = script.predict(nets, z, t, torch.full_like(c, 3)), script.predict(nets, z, t, c)
    assert not torch.allclose(e, e_null, atol=1e-3)
    assert torch.equal(script.guided(nets, z, t, c, 1, 3), e)
    for scale, wanted in ((0, e_null), (2, 2 * e - e_null)):
        assert torch.allclose(script.guided(nets, z, t, c, scale, 3), wanted, atol=1e-4)
    assert torch.allclose(script.guided(nets, z, t, torch.full_like(c, 3), 5, 3), e_null, atol=1e-4)


def test_a_fresh_unet_says_nothing():
    nets, random = tiny(), torch.Generator().manual_seed(0)
    z0, eps = (torch.randn(8, 4, 8, 8, generator=random) for _ in range(2))
    how = z0, eps, torch.arange(8) * 100, script.schedule(0.0195).float(), torch.arange(8) % 3
    assert not script.predict(nets, z0, how[2], how[4]).any()
    assert script.ldm_loss(nets, *how).item() == pytest.approx(eps.square().mean().item())
    assert script.ldm_loss(nets, *how, l1=True).item() == pytest.approx(eps.abs().mean().item())


def test_loss_by_hand():
    """In numpy: z_t by the schedule of squared roots, and the mean of squares."""
    nets, random = awake(tiny()), np.random.default_rng(0)
    z0, eps, t = random.normal(size=(3, 4, 8, 8)), random.normal(size=(3, 4, 8, 8)), np.array([0, 400, 999])
    abar = np.cumprod(1 - np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2)
    a, c = abar[t][:, None, None, None], torch.tensor([0, 1, 2])
    with torch.no_grad():
        z_t = torch.tensor(np.sqrt(a) * z0 + np.sqrt(1 - a) * eps, dtype=torch.float32)
        said = script.predict(nets, z_t, torch.tensor(t), c).double().numpy()
        values = (torch.tensor(v, dtype=torch.float32) for v in (z0, eps))
        found = script.ldm_loss(nets, *values, torch.tensor(t), script.schedule(0.0195).float(), c)
    assert found.item() == pytest.approx(((said - eps) ** 2).mean(), rel=1e-4)


@torch.no_grad()
def test_a_unet_of_v_by_hand():
    """In numpy: its last layer's v turned into eps, and the loss that of v."""
    nets, random = awake(tiny()), np.random.default_rng(0)
    z0, eps, t = random.normal(size=(3, 4, 8, 8)), random.normal(size=(3, 4, 8, 8)), np.array([0, 400, 999])
    abar = np.cumprod(1 - np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2)
    a, how = abar[t][:, None, None, None], (torch.tensor(t), torch.tensor([0, 1, 2]))
    z_t = np.sqrt(a) * z0 + np.sqrt(1 - a) * eps
    v = script.predict(nets, torch.tensor(z_t, dtype=torch.float32), *how).double().numpy()
    nets[0].abar = script.schedule(0.0195).float()
    said = script.predict(nets, torch.tensor(z_t, dtype=torch.float32), *how).double().numpy()
    assert np.allclose(said, np.sqrt(a) * v + np.sqrt(1 - a) * z_t, atol=1e-5)
    values = (torch.tensor(v, dtype=torch.float32) for v in (z0, eps))
    found = script.ldm_loss(nets, *values, how[0], nets[0].abar, how[1], of_v=True)
    wanted = ((v - (np.sqrt(a) * eps - np.sqrt(1 - a) * z0)) ** 2).mean()
    assert found.item() == pytest.approx(wanted, rel=1e-3)


def test_gradients_of_cross_attention():
    """With one token all weights of attention are 1: its queries and keys learn nothing."""
    for tokens, learns in ((1, False), (3, True)):
        unet, _ = awake(tiny())
        unet(torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, tokens, 16)).square().mean().backward()
        cross = next(m for m in unet.modules() if isinstance(m, script.SpatialTransformer)).cross
        assert all((layer.weight.grad.abs().max() > 1e-9) == learns for layer in (cross.q, cross.k))
        assert cross.v.weight.grad.abs().max() > 1e-9


def test_moving_average():
    weight = nn.Linear(1, 1, bias=False)
    nn.init.ones_(weight.weight)
    ema = AveragedModel(weight, multi_avg_fn=script.moving_average)
    ema.update_parameters(weight)
    nn.init.constant_(weight.weight, 2)
    for wanted in (1.8181818, 1.9545455):
        ema.update_parameters(weight)
        assert ema.module.weight.item() == pytest.approx(wanted, abs=1e-6)
    nn.init.constant_(weight.weight, ema.module.weight.item())
    ema.update_parameters(weight)
    assert ema.module.weight.item() == pytest.approx(wanted, abs=1e-6)


# ------------------------------------------------------------ conditions
def test_holes():
    u = torch.rand(200, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    m = script.holes(u, 32)
    assert m.shape == (200, 1, 32, 32) and set(m.unique().tolist()) == {0, 1}
    share = m.mean((1, 2, 3))
    assert share.min() > 0.1 and share.max() < 0.5 and share.std() > 0.05
    assert (script.holes(u, 64).mean((1, 2, 3)) - share).abs().max() < 0.05  # the same at any size
    u[0, :] = torch.tensor([0.2, 0.5, 0.8, 0.5, 0.5, 0.2])
    u[0, :, 1:, :4] = 0.1  # a horizontal stroke, and three dots that only a larger last number would add
    strokes = script.distances(32, u[0, 0, :, :4]) < 0.09
    for number in range(1, 5):
        u[0, :, 0, 5] = number / 4 - 0.05
        assert torch.equal(script.holes(u, 32)[0, 0].bool(), strokes[:number].any(0)), number


def test_distances():
    found = script.distances(10, torch.tensor([[0.25, 0.25, 0.75, 0.25]]))[0]
    assert float(found[2, 5]) == pytest.approx(0, abs=1e-6) and float(found[7, 5]) == pytest.approx(0.5, abs=1e-6)
    assert float(found[2, 9]) == pytest.approx(0.2, abs=1e-6)


@torch.no_grad()
def test_what_the_unet_is_told():
    x, y, m = torch.rand(2, 3, 32, 32) * 2 - 1, torch.tensor([1, 2]), torch.zeros(2, 1, 32, 32)
    m[:, :, :16] = 1
    A = script.Autoencoder(32, (1, 1, 2), 1, 4, 32)
    A.scale.fill_(3.0)
    told = lambda name: script.condition(arguments("--condition", name), A, x, y, m)
    assert told("none") is None and torch.equal(told("class"), y)
    c = told("inpaint")
    black = x.clone()
    black[:, :, :16] = -1
    assert torch.allclose(c[:, :4], 3 * A.moments(black)[0]) and c.shape == (2, 5, 8, 8)
    assert c[:, 4, :4].eq(1).all() and c[:, 4, 4:].eq(-1).all()
    flat = script.condition(arguments("--condition", "super"), A, torch.full((1, 3, 32, 32), 0.3), None, None)
    assert flat.shape == (1, 3, 8, 8) and torch.allclose(flat, torch.tensor(0.3), atol=1e-5)


def test_what_is_known_stays():
    """Without training for it: outside of the hole the latent ends near the image's."""
    args = arguments("--condition", "none", "--sample-steps", 50)
    z0, k = torch.full((20, 4, 8, 8), -0.5), torch.zeros(20, 1, 8, 8)
    k[..., :4] = 1
    z = script.denoise(args, gaussian(args, 0.8, 0.25), None, 20, script.FAKES, 1, known=(z0, k))
    assert (z[..., :4] + 0.5).abs().mean() < 0.1 and float(z[..., 4:].mean()) == pytest.approx(0.8, abs=0.05)


# ------------------------------------------------------------ both stages
TINY = ["--batch", 8, "--first-batch", 8, "--log-every", 1, "--save-every", 100, "--preset", "demo"]


def trained(root, out, *flags):
    """A run in this process, without its evaluation; its checkpoint."""
    args = arguments("--root", root, "--out", out, *flags)
    with contextlib.ExitStack() as stack:
        for name in ("sample", "evaluate", "first_samples"):
            stack.enter_context(mock.patch.object(script, name))
        script.train(args)
    return torch.load(out / "checkpoint.pt", weights_only=True)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("autoencoder", ["kl-f4", "vq-f4"])
def test_stages_follow_each_other(root, tmp_path, autoencoder):
    """D learns from disc_start on, the U-Net when the autoencoder is done; either stage can be gone on from, bit for
    bit; s makes the latents' standard deviation 1 where they have a posterior."""
    flags = [*TINY, "--first-steps", 3, "--disc-start", 2, "--autoencoder", autoencoder]
    states = {n: trained(root, tmp_path / str(n), *flags, "--steps", n) for n in (2, 4)}
    for n in [*states]:
        trained(root, tmp_path / str(n), *flags, "--steps", 5)
        states[n, "again"] = torch.load(tmp_path / str(n) / "checkpoint.pt", weights_only=True)
    a, b, last = states[2], states[4], states[2, "again"]
    for name in ("A", "D", "unet", "embed", "ema"):
        assert same(last[name], states[4, "again"][name]), name
    average = {k.removeprefix("module."): v for k, v in last["ema"].items()}
    assert average.pop("n_averaged") == 3  # the first weights and two steps
    assert not same(average, last["unet"]) and not same(average, a["unet"])
    assert same(b["A"], last["A"]) and same(b["D"], last["D"]) and not same(b["unet"], last["unet"])
    assert a["A"]["scale"] == 1 and not same(a["D"], last["D"]) and not same(a["embed"], last["embed"])
    rows = rows_of(tmp_path / "2")
    assert ["loss_d" in row for row in rows] == [False, False, True, False, False]
    assert 0 < rows[2]["weight_g"] <= 1e4
    if autoencoder == "kl-f4":
        assert rows[3]["latent_std"] == pytest.approx(1, abs=1e-5) and last["A"]["scale"] != 1
    else:
        assert last["A"]["scale"] == 1


def test_two_pieces_make_the_step_of_the_whole(root, tmp_path):
    """Adam's averages, for Adam's steps turn rounding into signs; before D takes part, in both stages."""
    flags = [*TINY, "--first-steps", 1, "--steps", 2, "--lr-first", 1e-30]
    one, two = (trained(root, tmp_path / str(n), *flags, "--accumulate", n) for n in (1, 2))
    for name in ("opt", "opt_unet"):
        pairs = [(state["exp_avg"], two[name]["state"][key]["exp_avg"]) for key, state in one[name]["state"].items()]
        total = sum(float(a.square().sum()) for a, _ in pairs)
        assert sum(float((a - b).square().sum()) for a, b in pairs) < 1e-6 * total and total > 0
    assert float(one["A"]["scale"]) == pytest.approx(float(two["A"]["scale"]), rel=1e-6)


@pytest.fixture(scope="module")
def first_stage(root, tmp_path_factory):
    """A run of one step of stage 1."""
    trained(root, out := tmp_path_factory.mktemp("first"), *TINY, "--first-steps", 1, "--steps", 1)
    return out


@pytest.mark.parametrize("task", ["none", "inpaint", "super"])
def test_other_tasks_from_anothers_autoencoder(root, first_stage, tmp_path, task):
    """A U-Net each on the autoencoder of another run, and its pictures."""
    flags = [*TINY, "--condition", task, "--stage1", first_stage, "--steps", 2, "--sample-steps", 2]
    first = torch.load(first_stage / "checkpoint.pt", weights_only=True)
    state = trained(root, tmp_path / "second", *flags)
    assert same({k: v for k, v in first["A"].items() if k != "scale"}, state["A"]) and state["A"]["scale"] != 1
    args = arguments("--root", root, "--out", tmp_path / "second", *flags)
    script.sample(args)
    pictures = {path.name for path in (tmp_path / "second").glob("*.png")}
    assert pictures == {
        "samples.png",
        "reconstructions.png",
        f"{'superresolution' if task == 'super' else 'inpainting'}.png",
    }
    A, nets, _ = script.restore(args)
    x_hat, x, m = script.draw(args, A, nets, script.load("shapes", "test", 32, root), torch.arange(3), script.FAKES, 0)
    assert x_hat.shape == (3, 3, 32, 32) and (x is None) == (task == "none")
    if task == "inpaint":
        assert torch.equal(x_hat[(m == 0).expand_as(x)], x[(m == 0).expand_as(x)]) and not torch.equal(x_hat, x)


def test_stage1_must_fit(root, first_stage, tmp_path):
    with pytest.raises(script.UserError, match="vq-f4"):
        trained(root, tmp_path / "a", *TINY, "--autoencoder", "vq-f4", "--stage1", first_stage, "--steps", 1)
    with pytest.raises(script.UserError, match=r"checkpoint\.pt"):
        trained(root, tmp_path / "b", *TINY, "--stage1", tmp_path / "nowhere", "--steps", 1)


def steps_of(root, *flags):
    """Networks, a batch, and a run whose optimisers only gather gradients."""
    args = arguments(*TINY, "--root", root, *flags)
    args.classes = 10
    A, D, unet, embed = nets = script.build(args)
    parts = dict(zip(("A", "D", "unet", "embed"), nets, strict=True)) | {"ema": AveragedModel(unet)}
    parts |= {name: torch.optim.SGD(net.parameters(), 0.0) for name, net in (("opt", A), ("opt_D", D))}
    parts["opt_unet"] = torch.optim.SGD([*unet.parameters(), *embed.parameters()], 0.0)
    run = mock.Mock(step=0, parts=parts, autocast=contextlib.nullcontext(), abar=script.schedule(args.b1).float())
    x = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return args, run, x, torch.arange(8)


@pytest.mark.parametrize("disc_start", [0, 1])
def test_gradients_of_stage_one(root, disc_start):
    """Of A by L1, 1e-6 KL and, once D takes part, w g, in train mode; of D by the hinge on new reconstructions. The KL
    is made a billion times larger, or nobody would see it."""
    args, run, x, y = steps_of(root, "--disc-start", disc_start)
    A, D, weights = run.parts["A"], run.parts["D"], [*run.parts["A"].parameters()]
    with mock.patch.object(script, "kl_loss", lambda *how, real=script.kl_loss: 1e9 * real(*how)):
        found = script.autoencoder_step(args, run, [(x, y)], None)
    noises = torch.randn(2, 8, 4, 8, 8, generator=script.generator(args.seed, script.POSTERIOR, 0))
    (x_hat, moments), fake = A(x, noises[0]), A(x, noises[1])[0].detach()
    assert ("loss_d" in found) == ("loss_g" in found) == (disc_start == 0)
    nll, wanted_D = (x - x_hat).abs().sum() / 8, [None for _ in D.parameters()]
    loss = nll + 1e3 * script.kl_loss(*moments).mean()
    if disc_start == 0:
        g, last = -D(x_hat).mean(), A.decoder[-1].weight
        rec, gan = (torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (nll, g))
        loss = loss + 0.3 * rec / (gan + 1e-4) * g
        hinge = 0.5 * ((1 - D(x)).clamp(min=0).mean() + (1 + D(fake)).clamp(min=0).mean())
        wanted_D = torch.autograd.grad(hinge, [*D.parameters()])
    for p, wanted in zip(weights, torch.autograd.grad(loss, weights), strict=True):
        assert (p.grad - wanted).norm() < 1e-3 * wanted.norm() + 1e-3
    for p, wanted in zip(D.parameters(), wanted_D, strict=True):
        assert (p.grad is None) if wanted is None else (p.grad - wanted).norm() < 1e-3 * wanted.norm() + 1e-5


@pytest.mark.parametrize("task", ["class", "inpaint"])
def test_what_a_step_of_stage_two_learns_from(root, task):
    """Draws of the posterior, noise, t and what the U-Net is told, a share of the classes dropped; A has no gradient,
    and a fresh U-Net's v is 0."""
    args, run, x, y = steps_of(root, "--condition", task, "--first-steps", 0, "--class-dropout", 0.4)
    with mock.patch.object(script, "ldm_loss", wraps=script.ldm_loss) as seen:
        loss = script.unet_step(args, run, [(x, y)])["loss"].item()
    _, z0, eps, t, abar, c, *_ = seen.call_args.args
    random = script.generator(args.seed, script.NOISE, 0)
    noise, wanted = torch.randn(2, 8, 4, 8, 8, generator=random)
    assert torch.equal(eps, wanted) and torch.equal(t, torch.randint(1000, (8,), generator=random))
    A, drop = run.parts["A"], torch.rand(8, generator=random) < 0.4
    assert torch.allclose(z0, A.scale * A(x, noise)[1][0] + A.scale * (A.moments(x)[1] / 2).exp() * noise, atol=1e-5)
    assert z0.std().item() == pytest.approx(1, abs=1e-5) and all(p.grad is None for p in A.parameters())
    if task == "class":
        assert c.tolist() == [10 if gone else i for i, gone in enumerate(drop.tolist())] and 0 < drop.sum() < 8
    else:
        assert c.shape == (8, 5, 8, 8) and set(c[:, 4].unique().tolist()) == {-1, 1}
    a = abar[t][:, None, None, None]
    v = a.sqrt() * eps - (1 - a).sqrt() * z0
    assert loss == pytest.approx((v.abs() if task == "inpaint" else v.square()).mean().item(), rel=1e-4)


def test_both_stages_learn(root, tmp_path):
    """120 and 60 steps: L1 far below that of flat pictures, and noise told far better than by saying nothing."""
    flags = ["--first-steps", 120, "--steps", 180, "--save-every", 180, "--log-every", 10, "--first-batch", 16]
    flags += ["--batch", 16, "--lr", 2e-3, "--target", "eps"]
    trained(root, tmp_path, *flags)
    args = arguments("--root", root, "--out", tmp_path, *flags)
    A, _, state = script.restore(args)
    x = script.floats(args, script.load("shapes", "test", 32, root).images[:100])
    with torch.no_grad():
        error = (x - A.decode(A.encode(x))).abs().mean().item()
    grey = (x - x.mean((2, 3), keepdim=True)).abs().mean().item()
    rows = [row["loss"] for row in rows_of(tmp_path)]
    print(f"L1 {error:.3f}, of flat pictures {grey:.3f}; noise {np.mean(rows[-2:]):.3f}, at first {rows[12]:.3f}")
    assert error < 0.6 * grey and np.mean(rows[-2:]) < 0.4 and math.isfinite(state["seconds"])
