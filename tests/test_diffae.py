"""diffae.py: parity with the official code, parameter counts, diffusion and its inversion, both stages.

About 40 seconds on one core.
"""

import json
import math
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from fill import fill_, inputs
from test_parity import GOLDEN, agree, difference
from torch import nn

import diffae
from common.data import Data, UserError


def arguments(*flags):
    """What main() makes of a command line."""
    with mock.patch.object(sys, "argv", ["diffae.py", "--device", "cpu", "--precision", "fp32", *map(str, flags)]):
        args = diffae.parse()
    diffae.start(args)
    return args


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TOY = (32, (1, 2, 2), 2, (16,), 32, 128)  # parity's case 11
TOY_E = (32, (1, 2, 2, 2), 2, (16,), 32, 128)


# ------------------------------------------------------------ parity
FUSED = {"": None, "_split": {"qkv": (3, 1)}}  # _split: q, k and v are equal copies


def filled(network, split):
    return fill_(network, fused_maps=FUSED[split]).eval().to(memory_format=torch.channels_last)


@torch.no_grad()
@pytest.mark.parametrize("split", FUSED)
def test_autoencoder_agrees(split):
    E, D = filled(diffae.encoder(*TOY_E), split), filled(diffae.Decoder(*TOY, 128), split)
    x_0, x_t, z = inputs(11, (2, 3, 32, 32), (2, 3, 32, 32), (2, 128))
    t, z_sem = torch.tensor([17, 801]), E(x_0)
    agree(f"11{split}.z_sem", z_sem)
    agree(f"11{split}.eps", D(x_t, t, z_sem))
    if not split:
        agree("11.eps_given_z", D(x_t, t, z))


@torch.no_grad()
@pytest.mark.parametrize("split", FUSED)
def test_semantic_encoder_agrees(split):
    E = filled(diffae.encoder(32, (1, 1, 2, 3, 4, 4), 2, (16,), 128, 512), split)
    assert count(E) == 1_597_632
    agree(f"12{split}.z_sem", E(*inputs(12, (2, 3, 128, 128))))


@torch.no_grad()
def test_latent_network_agrees():
    t = torch.tensor([0, 17, 501, 999])
    agree("13.out", fill_(diffae.Latent(64, 4, 256)).eval()(*inputs(13, (4, 64)), t))
    # Float32 numbers near 999 are 6e-5 apart, and so are two ways to round an angle; a step off by one makes 0.1.
    assert difference(GOLDEN, "13_time.embedding_64", diffae.sinusoids(t, 64)) < 1e-4
    assert difference(GOLDEN, "13_time.embedding_64", diffae.sinusoids(t + 1, 64)) > 0.05


# ------------------------------------------------------------ sizes
def test_parameter_counts():
    published = {64: (71_518_723, 19_320_512, 67_841_539), 128: (103_871_619, 24_673_536, 98_618_499)}
    published |= {256: (138_341_891, 30_150_400, 131_709_827), 32: (46_138_627, 8_785_792, 42_855_427)}
    with torch.device("meta"):
        for size, (ch, of_D, of_E) in (diffae.SMALL["shapes"] | diffae.PAPER["shapes"]).items():
            D, E = (
                diffae.Decoder(ch, of_D, 2, (16,), size, 512, 512, 0.1),
                diffae.encoder(ch, of_E, 2, (16,), size, 512),
            )
            unconditional = diffae.Decoder(ch, of_D, 2, (16,), size, 512, 0)
            assert (count(D), count(E), count(unconditional)) == published[size]
        D = diffae.Decoder(128, (1, 1, 2, 3, 4), 2, (16,), 128, 512, 512)
        assert [count(part) for part in (D.time, D.down, D.middle, D.up, D.last)] == [
            328_704, 28_632_064, 12_070_912, 62_836_224, 3_715]  # fmt: skip
        assert count(diffae.Decoder(*TOY, 128), diffae.encoder(*TOY_E)) == 2_513_123
        small = [diffae.Decoder(64, (1, 2, 4), 2, (16,), 32, 512, 512)]
        small += [diffae.encoder(64, (1, 2, 4, 4), 2, (16,), 32, 512)]
        assert [count(part) for part in small] == [20_290_563, 4_891_328]
        ch, of_D, of_E = diffae.DEMO["shapes"][32]
        demo = diffae.Decoder(ch, of_D, 1, (8,), 32, 64, 64, patch=2), diffae.encoder(ch, of_E, 1, (8,), 32, 64, 2)
        assert [count(part) for part in demo] == [1_309_420, 228_832]
        wanted = {(512, 10, 2048): 54_109_696, (512, 20, 2048): 117_106_176, (512, 10, 1024): 18_945_536}
        for shape, n in (wanted | {(64, 4, 256): 261_312}).items():
            assert count(diffae.Latent(*shape)) == n
        assert count(diffae.Res(64, 128, embed=512, z_dim=512)) == 427_136 and count(diffae.Res(64, 128)) == 82_304


@pytest.mark.parametrize(("data", "parameters"), [("imagenet", 128_545_155), ("cifar10", 54_924_419)])
def test_networks_of_the_presets(data, parameters):
    args = arguments("--data", data)
    with torch.device("meta"):
        ch, of_D, of_E = args.shapes[args.size]
        shape = args.blocks, args.attention, args.size
        E, D = diffae.encoder(ch, of_E, *shape, args.z_dim), diffae.Decoder(ch, of_D, *shape, args.embed, args.z_dim)
    assert count(E, D) == parameters and args.patch == 1 and args.dropout == 0.1 and args.ema == 0.9999
    images = {"imagenet": 130e6, "cifar10": 19.2e6}[data]
    assert args.autoencoder_steps * args.batch == pytest.approx(images, rel=1e-5)


# ------------------------------------------------------------ the networks
def test_adagn():
    """Time first, then z; both factors are 1 + what the network says; z has no shift."""
    h, row = torch.tensor([1.0, -1.0]).view(1, 1, 1, 2), lambda v: torch.tensor([[v]])
    assert diffae.adagn(h, row(0.5), row(0.25), row(-0.5)).flatten().tolist() == [0.875, -0.625]


def test_sinusoids():
    wanted = [0.5403023, 0.9950042, 0.99995, 0.9999995, 0.8414710, 0.0998334, 0.0099998, 0.001]
    assert diffae.sinusoids(torch.tensor([1]), 8)[0].tolist() == pytest.approx(wanted, abs=1e-6)


def test_a_block_by_the_formula():
    """D's residual block against NumPy, resampling before its first convolution, here of one position."""
    block = diffae.Res(4, 6, "half", embed=5, z_dim=3).double()
    for p in block.parameters():
        p.data = random(*p.shape, seed=p.numel())
    x, t, z = random(2, 4, 2, 2), random(2, 5, seed=1), random(2, 3, seed=2)
    sd = {k: v.numpy() for k, v in block.state_dict().items()}
    silu = lambda v: v / (1 + np.exp(-v))

    def group_norm(v, weight, bias):  # as many groups as channels, [B, C, n]
        v = (v - v.mean(2, keepdims=True)) / np.sqrt(v.var(2, keepdims=True) + 1e-5)
        return v * weight[:, None] + bias[:, None]

    centre = lambda name: sd[name][:, :, 1, 1]  # the padding is zero: of a 3x3 kernel only the middle counts
    h = silu(group_norm(x.flatten(2).numpy(), sd["first.0.weight"], sd["first.0.bias"])).mean(2)
    h = h @ centre("first.3.weight").T + sd["first.3.bias"]
    scale, shift = np.split(t.numpy() @ sd["time.weight"].T + sd["time.bias"], 2, 1)
    h = group_norm(h[..., None], sd["norm.weight"], sd["norm.bias"])[..., 0]
    h = (h * (1 + scale) + shift) * (1 + z.numpy() @ sd["code.weight"].T + sd["code.bias"])
    h = silu(h) @ centre("last.2.weight").T + sd["last.2.bias"]
    wanted = h + x.mean((2, 3)).numpy() @ sd["skip.1.weight"][:, :, 0, 0].T + sd["skip.1.bias"]
    assert np.allclose(block(x, t, z)[..., 0, 0].detach().numpy(), wanted)


def test_it_starts_as_nothing():
    """A fresh D returns 0, so that the first loss is the mean of eps^2; E's gradient is 0 twice, then is not."""
    torch.manual_seed(0)
    E, D = diffae.encoder(32, (1, 2), 1, (8,), 16, 64), diffae.Decoder(32, (1, 2), 1, (8,), 16, 64, 64)
    opt = torch.optim.Adam([*E.parameters(), *D.parameters()], 1e-3)
    x, eps, t = torch.rand(4, 3, 16, 16) * 2 - 1, torch.randn(4, 3, 16, 16), torch.tensor([0, 300, 600, 999])
    assert not D(x, t, E(x)).any()
    norms = []
    for step in range(3):
        opt.zero_grad()
        loss = diffae.autoencoder_loss(E, D, x, t, eps, diffae.schedule())
        if step == 0:
            assert loss.item() == pytest.approx(eps.square().mean().item(), rel=1e-6)
        loss.backward()
        norms.append(float(nn.utils.get_total_norm([p.grad for p in E.parameters()])))
        opt.step()
    assert norms[:2] == [0, 0] and norms[2] > 0


@torch.no_grad()
def test_z_acts_through_its_scales_only():
    D = fill_(diffae.Decoder(32, (1, 2), 1, (8,), 16, 64, 64)).eval()
    x, t, z = torch.randn(2, 3, 16, 16), torch.tensor([5, 500]), torch.randn(2, 64)
    assert (D(x, t, z) - D(x, t, z.flip(0))).abs().max() > 1e-3
    blocks = [m for m in D.modules() if isinstance(m, diffae.Res)]
    assert len(blocks) == 10  # every one: 2 + 1 down, 2 in the middle, 4 + 1 up
    for block in blocks:
        block.code.weight.zero_(), block.code.bias.zero_()
    assert torch.equal(D(x, t, z), D(x, t, z.flip(0))) and torch.equal(D(x, t, z), D(x, t))


# ------------------------------------------------------------ diffusion
def test_schedules():
    images, codes = diffae.schedule().double(), diffae.schedule(latent=True).double()
    assert images[::50][[0, 1, 2, -2, -1]].tolist() == pytest.approx(
        [0.9999, 0.96995149, 0.89514159, 0.00027024, 0.00010604], abs=1e-7
    )
    assert codes[0].item() == pytest.approx(0.992) and codes[999].item() == pytest.approx(3.2484e-4, rel=1e-4)
    assert codes[950].item() == pytest.approx(4.81504e-4, rel=1e-4)


def test_forward_moments():
    """x_t given x_0 has the mean sqrt(alpha_t) x_0 and the variance 1 - alpha_t, whether at once or step by step."""
    alpha, x_0, random = diffae.schedule(), torch.full((100_000,), 0.7), torch.Generator().manual_seed(0)
    t = torch.full((100_000,), 200)
    eps = torch.randn(100_000, generator=random)
    x_t = diffae.diffuse(x_0[:, None], t, eps[:, None], alpha)[:, 0]
    assert x_t.mean().item() == pytest.approx(0.7 * alpha[200].sqrt().item(), abs=0.01)
    assert x_t.var().item() == pytest.approx(1 - alpha[200].item(), rel=0.02)
    walk = x_0
    for beta in torch.linspace(1e-4, 0.02, 1000)[:201]:
        walk = (1 - beta).sqrt() * walk + beta.sqrt() * torch.randn(100_000, generator=random)
    assert walk.mean().item() == pytest.approx(x_t.mean().item(), abs=0.02)
    assert walk.var().item() == pytest.approx(x_t.var().item(), rel=0.03)


def test_losses_by_the_formula():
    alpha, x_0, eps, t = diffae.schedule(latent=True), random(3, 4), random(3, 4, seed=1), torch.tensor([0, 500, 999])
    a = np.cumprod(np.full(1000, 1 - 0.008))[t.numpy()][:, None]
    x_t = np.sqrt(a) * x_0.numpy() + np.sqrt(1 - a) * eps.numpy()
    seen = lambda x, t, z=0: torch.tanh(x) * (1 + t[:, None] / 1000) + z
    wanted = np.abs(np.tanh(x_t) * (1 + t.numpy()[:, None] / 1000) - eps.numpy()).mean()
    assert diffae.latent_loss(seen, x_0, t, eps, alpha).item() == pytest.approx(wanted, rel=1e-6)
    wanted = ((np.tanh(x_t) * (1 + t.numpy()[:, None] / 1000) + 2 * x_0.numpy() - eps.numpy()) ** 2).mean()
    images = [v[..., None, None] for v in (x_0, eps)]
    see = lambda x, t, z: seen(x[..., 0, 0], t, z[..., 0, 0])[..., None, None]
    found = diffae.autoencoder_loss(lambda x: 2 * x, see, images[0], t, images[1], alpha)
    assert found.item() == pytest.approx(wanted, rel=1e-6)


def test_v():
    """What the layers say is v: eps follows from it, and the loss is its squared error, by NumPy."""
    D = diffae.Decoder(32, (1, 2), 1, (8,), 16, 64, 64, v=True)
    alpha, t, x_0, eps = (
        diffae.schedule(),
        torch.tensor([0, 400, 999]),
        random(3, 3, 16, 16),
        random(3, 3, 16, 16, seed=1),
    )
    a = alpha[t].double().numpy()[:, None, None, None]
    x_t = np.sqrt(a) * x_0.numpy() + np.sqrt(1 - a) * eps.numpy()
    v = np.sqrt(a) * eps.numpy() - np.sqrt(1 - a) * x_0.numpy()
    z = torch.zeros(3, 64)
    assert np.allclose(D(torch.tensor(x_t).float(), t, z).detach(), np.sqrt(1 - a) * x_t, atol=1e-5)  # a fresh v is 0
    loss = diffae.autoencoder_loss(lambda x: z, D, x_0.float(), t, eps.float(), alpha, v=True)
    assert loss.item() == pytest.approx((v**2).mean(), rel=1e-4)
    D.last = torch.nn.Identity()  # of v itself, through layers that are handed it
    D.down, D.middle, D.up = nn.ModuleList(), nn.Identity(), nn.ModuleList()
    D.middle.forward = lambda h, *conditions: torch.tensor(v).float()
    assert np.allclose(D(torch.tensor(x_t).float(), t, z), eps, atol=1e-4)
    assert diffae.autoencoder_loss(lambda x: z, D, x_0.float(), t, eps.float(), alpha, v=True) < 1e-4


ORACLE = {  # steps: x_T of the datum 0.3, and what comes back; the data are N(0, 0.25), eps is exact
    10: (0.448916, 0.167952), 20: (0.520480, 0.225750), 50: (0.566939, 0.267844), 100: (0.583192, 0.283420),
    250: (0.593160, 0.293191), 1000: (0.598212, 0.298206)}  # fmt: skip


@pytest.mark.parametrize("steps", ORACLE)
def test_encoding_is_the_inverse_of_decoding(steps):
    """With ever more steps the datum comes back, and x_T is what standardises it, 0.3 / 0.5."""
    alpha = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    eps = lambda x, t: (1 - alpha[t]).sqrt() * x / (0.25 * alpha[t] + 1 - alpha[t])
    x_T = diffae.ddim(eps, torch.tensor([0.3], dtype=torch.float64), alpha, steps, encode=True, clamp=False)
    again = diffae.ddim(eps, x_T, alpha, steps, clamp=False)
    assert (x_T.item(), again.item()) == pytest.approx(ORACLE[steps], abs=1e-6)


def test_the_sampler_by_the_formula():
    """Against NumPy, with images held in [-1, 1], and the original t."""
    alpha, x, seen = diffae.schedule().double(), 1.5 * random(2, 3, 4, 4), []

    def eps(x, t):
        seen.append(t.unique().tolist())
        return torch.sin(3 * x)

    for encode in (False, True):
        y, times = x.numpy(), list(range(0, 1000, 100))
        stops = [1.0, *alpha[times].tolist(), 0.0]
        for i in range(10) if encode else reversed(range(10)):
            a, to = stops[i + 1], stops[i + 2 if encode else i]
            x_0 = np.clip((y - np.sqrt(1 - a) * np.sin(3 * y)) / np.sqrt(a), -1, 1)
            e = (y - np.sqrt(a) * x_0) / np.sqrt(1 - a)
            y = np.sqrt(to) * x_0 + np.sqrt(1 - to) * e
        seen.clear()
        found = diffae.ddim(eps, x, alpha, 10, encode)
        assert np.allclose(found, y) and [t for (t,) in seen] == (times if encode else times[::-1])
    assert diffae.ddim(eps, x, alpha, 10).abs().max() <= 1


# ------------------------------------------------------------ what is done with codes
def test_slerp():
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    found = diffae.slerp(a, b, torch.tensor([0.0, 0.25, 1.0]))[0]
    assert torch.allclose(found, torch.tensor([[1, 0], [0.92387953, 0.38268343], [0, 1]]), atol=1e-6)
    a, b = random(3, 3, 8, 8), random(3, 3, 8, 8, seed=1)
    path = diffae.slerp(a, b, torch.linspace(0, 1, 5, dtype=torch.float64))
    assert path.shape == (3, 5, 3, 8, 8) and torch.allclose(path[:, 0], a) and torch.allclose(path[:, -1], b)
    unit = lambda v: v / v.flatten(1).norm(dim=1)[:, None, None, None]
    norms = diffae.slerp(unit(a), unit(b), torch.tensor([0.3, 0.5]).double()).flatten(2).norm(dim=2)
    assert torch.allclose(norms, torch.ones_like(norms))


def test_edit():
    z, w = torch.ones(1, 2), torch.tensor([3.0, 4.0])
    assert diffae.edit(z, w, 0.3)[0].tolist() == pytest.approx([1.25455844, 1.33941125])
    assert torch.equal(diffae.edit(z, w, 0.0), z)


def test_ssim():
    """1 of an image and itself; by the formula where the window is whole."""
    x, y = torch.rand(2, 3, 11, 11).double(), torch.rand(2, 3, 11, 11).double()
    assert torch.allclose(diffae.ssim(x.float(), x.float()), torch.ones(2))
    g = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    w = np.outer(g, g) / g.sum() ** 2
    pad = lambda v: np.pad(v.numpy(), ((0, 0), (0, 0), (5, 5), (5, 5)))
    blur = lambda v: np.einsum("bcijkl,kl->bcij", np.lib.stride_tricks.sliding_window_view(v, (11, 11), (2, 3)), w)
    a, b = pad(x), pad(y)
    ma, mb = blur(a), blur(b)
    luminance = (2 * ma * mb + 1e-4) / (ma**2 + mb**2 + 1e-4)
    structure = (2 * (blur(a * b) - ma * mb) + 9e-4) / (blur(a * a) - ma**2 + blur(b * b) - mb**2 + 9e-4)
    wanted = (luminance * structure).mean((1, 2, 3))
    assert np.allclose(diffae.ssim(x.float(), y.float()), wanted, atol=1e-4)


# ------------------------------------------------------------ both stages
def toy(name, split, size, root, skip_broken, rows):
    """80 pictures of one colour each: light ones of class 0, dark ones of class 1."""
    rng = np.random.default_rng(split == "test")
    levels = np.where(np.arange(80) % 2, 45, 210)[:, None, None, None] + rng.integers(-40, 41, (80, 1, 1, 3))
    images = torch.from_numpy(np.broadcast_to(levels, (80, 32, 32, 3)).astype(np.uint8))[rows]
    return Data("toy", split, 32, images, "key", None, (torch.arange(80) % 2)[rows], ["light", "dark"])


@pytest.fixture
def train(monkeypatch, tmp_path):
    """train(*flags) trains on `toy`: the arguments, the log, the checkpoint."""
    for name in ("sample", "evaluate", "picture"):
        monkeypatch.setattr(diffae, name, lambda *args: None)
    monkeypatch.setattr(diffae, "load", toy)

    def train(*flags, out="run", **settings):
        small = ("--preset", "demo", "--batch", 8, "--latent-batch", 16, "--log-every", 1, "--decode-steps", 2)
        args = arguments(*small, "--encode-steps", 2, "--latent-steps", 10, "--out", tmp_path / out, *flags)
        vars(args).update(
            {"shapes": {32: (8, (1, 2), (1, 2))}, "hidden": 32, "embed": 16, "z_dim": 8, "groups": 2} | settings
        )
        args.config.update(settings)
        diffae.train(args)
        log = [json.loads(line) for line in (args.out / "log.jsonl").read_text().splitlines()]
        return args, log, torch.load(args.out / "checkpoint.pt")

    return train


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in ("seconds", "config"))
    if isinstance(a, list | tuple):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_resuming_inside_either_stage_is_exact(train, stop):
    """After the second step of E and D, after their last, and after the second of L; with dropout."""
    flags = ("--autoencoder-steps", 3, "--dropout", 0.1)
    _, log, whole = train(*flags, "--steps", 7)
    train(*flags, "--steps", stop, out="cut")
    _, again, resumed = train(*flags, "--steps", 7, out="cut")
    assert same(whole, resumed)
    strip = lambda rows: [{k: v for k, v in row.items() if k != "img_per_s"} for row in rows]
    assert strip(log) == strip(again) and ["loss" in row for row in log] == [True] * 3 + [False] * 4


def test_two_pieces_do_what_one_does(train):
    """In both stages: E's gradient and L's weights agree but for rounding, which Adam magnifies where it divides."""
    flags = ("--autoencoder-steps", 4, "--steps", 8)
    (_, a, one), (_, b, two) = train(*flags), train(*flags, "--accumulate", 2, out="pieces")
    assert [row["E_gradient"] for row in a[:4]] == pytest.approx([row["E_gradient"] for row in b[:4]], rel=1e-3)
    for k, v in one["L"].items():
        assert torch.allclose(v, two["L"][k], atol=3e-4), k


def test_stage_2(train):
    """It changes L only; the codes it learns from have mean 0 and standard deviation 1."""
    flags = ("--autoencoder-steps", 3, "--classifier-steps", 50)
    _, _, before = train(*flags, "--steps", 3)
    args, _, after = train(*flags, "--steps", 6)
    for name in ("E", "D", "E_ema", "D_ema"):
        assert same(before[name], after[name])
    assert not same(before["L"], after["L"])
    E, _, L, _ = diffae.restore(args)
    x = diffae.images(args, toy("", "train", 32, "", False, slice(None)).images)
    z = L.normalise(E(x))
    assert z.mean(0).abs().max() < 1e-4 and (z.std(0) - 1).abs().max() < 1e-4
    assert torch.allclose(L.denormalise(z), E(x), atol=1e-5)
    networks = [{k: v.clone() for k, v in network.state_dict().items()} for network in (E, L)]
    assert diffae.attributes(args, E, L).shape == (2, 8)  # a classifier changes neither
    assert same(networks, [dict(network.state_dict()) for network in (E, L)])


def test_average(train):
    """ema * average + (1 - ema) * weights, from the first step on and from the first weights."""
    args, _, state = train("--autoencoder-steps", 2, "--steps", 1, "--ema", 0.9)
    for k, network in zip("ED", diffae.build(args), strict=False):
        for name, v in network.state_dict().items():
            wanted = 0.9 * v + 0.1 * state[k][name]
            assert torch.allclose(state[f"{k}_ema"][f"module.{name}"], wanted, atol=1e-6)
    assert not torch.equal(state["D"]["last.2.bias"], state["D_ema"]["module.last.2.bias"])


def test_it_learns(train):
    """The right colour comes back from z_sem and any noise; samples are light or dark; edits turn one into the other.
    Were z_sem not told to D, or not from this image, the colours would be those of strangers."""
    flags = ("--autoencoder-steps", 150, "--steps", 450, "--decode-steps", 10, "--latent-steps", 50, "--batch", 16)
    flags += ("--lr", 4e-3, "--ema", 0.95, "--lr-latent", 3e-3, "--classifier-steps", 300)
    args, log, _ = train(*flags)
    E, D, L, _ = diffae.restore(args)
    x = diffae.images(args, toy("", "test", 32, "", False, slice(None)).images)
    z, x_T = E(x), torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    error = lambda y: float((y.mean((2, 3)) - x.mean((2, 3))).abs().mean())
    found, stranger = error(diffae.decode(args, D, z, x_T)), error(diffae.decode(args, D, z.roll(1, 0), x_T))
    exact = error(diffae.decode(args, D, z, diffae.decode(args, D, z, x, encode=True)))
    drawn = diffae.samples(args, D, L, diffae.FAKES, 0, 80).mean((1, 2, 3))
    w = diffae.attributes(args, E, L)[1]  # of being dark
    moved = L.denormalise(diffae.edit(L.normalise(z), w, 1.0))
    darker = diffae.decode(args, D, moved, x_T).mean((1, 2, 3)) - diffae.decode(args, D, z, x_T).mean((1, 2, 3))
    light = float((drawn > 0).float().mean())
    print(f"loss {log[0]['loss']:.3f} -> {np.mean([row['loss'] for row in log[130:150]]):.3f}; colour off by"
          f" {found:.3f}, encoded x_T {exact:.3f}, another's z {stranger:.3f}; samples: {light:.2f} light, |mean|"
          f" {drawn.abs().mean():.2f}; edits: {darker[::2].mean():.2f}")  # fmt: skip
    assert found < 0.3 * stranger
    assert 0.2 < light < 0.8 and drawn.abs().mean() > 0.3
    assert darker[::2].mean() < -0.4


def test_what_is_refused(train):
    for flags in (["--size", 48], ["--decode-steps", 30], ["--latent-steps", 0], ["--layers", 1], ["--ema", 2]):
        with pytest.raises(UserError):
            arguments("--preset", "demo", *flags)
    with pytest.raises(UserError, match="latent-batch 15"):
        train("--latent-batch", 15, "--accumulate", 2, "--steps", 1)
    assert math.isclose(diffae.PAPER["steps"] - diffae.PAPER["autoencoder_steps"], 101e6 / 256, rel_tol=1e-5)
