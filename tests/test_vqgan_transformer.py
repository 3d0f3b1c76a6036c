"""vqgan_transformer.py against its paper: counts, layers, losses, lambda, sampling windows, parity; both stages learn.

About a minute on one core, most of it the shortened demo.
"""

import contextlib
import json
import math
import sys
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fill import fill_, inputs, values
from PIL import Image
from test_parity import GOLDEN, agree
from torch import nn

import vqgan_transformer as script


def arguments(*flags):
    """What main() makes of a command line."""
    words = ["vqgan_transformer.py", "--device", "cpu", "--precision", "fp32", *map(str, flags)]
    with mock.patch.object(sys, "argv", words):
        args = script.parse()
    script.start(args)
    return args


def count(network):
    return sum(p.numel() for p in network.parameters())


# ------------------------------------------------------------ sizes
IMAGENET = dict(ch=128, multipliers=(1, 1, 2, 2, 4), blocks=2, attention=(16,), size=256, z_channels=256)
CIFAR = dict(ch=64, multipliers=(1, 2, 2), blocks=2, attention=(8,), size=32, z_channels=64)


def test_counts_of_the_autoencoders():
    with torch.device("meta"):
        both = lambda shape, channels=3: [count(f(channels, **shape)) for f in (script.encoder, script.decoder)]
        assert both(IMAGENET) == [29_298_176, 42_449_795]
        assert both(IMAGENET, 182) == [29_504_384, 42_656_182]
        assert both(CIFAR) == [2_316_032, 3_269_123] and both(CIFAR | {"ch": 128}) == [9_096_640, 12_903_427]
        assert [count(script.VQGAN(k, 256, **IMAGENET)) for k in (1024, 16_384)] == [72_141_699, 76_073_859]
        assert count(script.VQGAN(512, 64, **CIFAR)) == 5_626_243


def test_counts_of_the_discriminators():
    with torch.device("meta"):
        assert [count(script.discriminator(64, n)) for n in (3, 2, 1)] == [2_765_633, 663_361, 136_513]
        assert count(script.discriminator(64, 3, actnorm=True)) == 2_766_529


GPTS = {  # V, S, L, heads, d
    (16_384, 256, 48, 24, 1536): 1_410_640_896,
    (1024, 256, 24, 16, 1664): 801_798_400,
    (1024, 512, 24, 16, 1024): 304_932_864,
    (8192, 348, 40, 16, 1408): 975_876_352,
    (512, 64, 12, 8, 512): 38_386_688,
    (512, 64, 8, 8, 256): 6_597_120,
}


@pytest.mark.parametrize("shape", GPTS)
def test_counts_of_the_transformers(shape):
    with torch.device("meta"):
        assert count(script.GPT(*shape)) == GPTS[shape]


def test_the_paper_preset():
    args = arguments("--data", "imagenet", "--lin", "vgg.pth")
    args.device, args.tokens = "meta", 16_384
    with torch.device("meta"):
        vqgan, D, gpt = script.build(args)
        assert [count(vqgan), count(D), count(gpt)] == [76_073_859, 2_765_633, 1_410_640_896]
        x_hat, z, _, indices = vqgan(torch.empty(1, 3, 256, 256))
        assert x_hat.shape == (1, 3, 256, 256) and z.shape == (1, 256, 16, 16) and indices.shape == (1, 16, 16)
        assert D(x_hat).shape == (1, 1, 30, 30)
        assert script.discriminator(64, 2)(torch.empty(1, 3, 32, 32)).shape == (1, 1, 6, 6)
    wanted = {"disc_start": 250_001, "disc_weight": 0.8, "perceptual": "lpips", "legacy": True, "flip": False}
    assert {name: getattr(args, name) for name in wanted} == wanted


def test_first_weights():
    torch.manual_seed(0)
    D, gpt, vqgan = script.discriminator(), script.GPT(64, 32, 2, 4, 64), script.VQGAN(64, 8, **CIFAR)
    assert float(D[2].weight.std()) == pytest.approx(0.02, rel=0.05)
    assert float(D[3].weight.mean()) == pytest.approx(1, abs=0.01) and not D[3].bias.any()
    assert float(gpt.blocks[1].qkv.weight.std()) == pytest.approx(0.02, rel=0.05) and not gpt.pos_emb.any()
    assert float(vqgan.Z.abs().max()) <= 1 / 64


# ------------------------------------------------------------ parity with the official code
@torch.no_grad()
def test_parity_of_the_autoencoder():
    shape = dict(ch=32, multipliers=(1, 1, 2, 2, 4), blocks=2, attention=(4,), size=64, z_channels=64)
    E, G = (fill_(make(3, **shape)).eval() for make in (script.encoder, script.decoder))
    assert [count(E), count(G)] == [1_837_952, 2_662_115]
    agree("4.out", E(*inputs(4, (2, 3, 64, 64))))
    agree("5.out", G(*inputs(5, (2, 64, 4, 4))))


@torch.no_grad()
def test_parity_of_the_discriminator():
    D, (x,) = fill_(script.discriminator()).eval(), inputs(6, (2, 3, 64, 64))
    agree("6.out", D(x))
    agree("6.train", D.train()(x))


@torch.no_grad()
def test_parity_of_the_transformer():
    gpt = fill_(script.GPT(64, 32, 3, 4, 64), {"qkv": (3, 1)}).eval()
    tokens = torch.from_numpy(np.random.default_rng(1007).integers(0, 64, (2, 32)))
    assert count(gpt) == 160_320
    agree("7.logits", gpt(tokens))
    agree("7.loss", script.transformer_loss(gpt, tokens[:, :1], tokens[:, 1:]))


def quantiser(codes):
    """A VQGAN whose E and G change nothing."""
    vqgan = script.VQGAN.__new__(script.VQGAN)
    nn.Module.__init__(vqgan)
    vqgan.Z, vqgan.E, vqgan.G = nn.Parameter(codes), nn.Identity(), nn.Identity()
    return vqgan


@pytest.mark.parametrize(("case", "legacy"), [("7d_legacy", True), ("7d_paper", False)])
def test_parity_of_the_quantiser(case, legacy):
    vqgan, (z, w) = quantiser(values((32, 8))), inputs(7, (2, 8, 4, 4), (2, 8, 4, 4))
    z_q, z_, e, indices = vqgan(z.requires_grad_())
    assert np.array_equal(indices, GOLDEN[f"{case}.indices"])
    loss = script.vq_loss(z_, e, legacy=legacy)
    agree(f"{case}.loss", loss)
    agree(f"{case}.z_q", z_q)
    for end, value in (("", loss), ("_with_straight_through", loss + (z_q * w).sum())):
        grads = torch.autograd.grad(value, [z, vqgan.Z], retain_graph=True)
        for name, grad in zip(("grad_z", "grad_codebook"), grads, strict=True):
            agree(f"{case}.{name}{end}", grad)


# ------------------------------------------------------------ stage 1
def test_quantiser_of_the_sheets_example():
    vqgan = quantiser(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    z = torch.tensor([[0.25, 0.0], [0.75, 1.5]]).T.reshape(1, 2, 1, 2).requires_grad_()
    z_q, _, e, indices = vqgan(z)
    assert indices.flatten().tolist() == [0, 1]
    (ones,) = torch.autograd.grad(z_q.sum(), z, retain_graph=True)
    assert torch.equal(ones, torch.ones_like(z))  # and nothing reaches the codebook
    assert torch.autograd.grad(z_q.sum(), vqgan.Z, retain_graph=True, allow_unused=True) == (None,)
    paper = torch.tensor([[0.03125, 0.0], [-0.03125, 0.0625]])
    for legacy, factor in ((False, 1), (True, 4)):
        loss = script.vq_loss(z, e, legacy=legacy)
        assert loss.item() == pytest.approx(0.1171875)
        dz, dZ = torch.autograd.grad(loss, [z, vqgan.Z], retain_graph=True)
        assert torch.allclose(dz[0, :, 0].T, factor * paper)
        assert torch.allclose(dZ, torch.tensor([[-0.125, 0.0], [0.125, -0.25]]) / factor)


def test_codes_are_chosen_in_full_precision():
    """Neighbours that bf16 cannot tell apart, under the autocast of a run in bf16."""
    random = torch.Generator().manual_seed(0)
    vqgan, z = quantiser(torch.randn(256, 8, generator=random) / 256), torch.randn(4, 8, 8, 8, generator=random)
    with torch.autocast("cpu", torch.bfloat16):
        found = vqgan.encode(z)[1]
    distance = (z.movedim(1, 3)[..., None, :].double() - vqgan.Z.double()).square().sum(4)
    assert (found == distance.argmin(3)).float().mean() > 0.99


def test_losses_of_the_discriminator():
    loss = script.discriminator_loss(torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0]))
    assert loss.item() == pytest.approx(0.375)


def test_lambda():
    unit = torch.tensor([1.0, 0.0])
    assert float(script.adaptive_weight(unit, 0.1 * unit, 0.8)) == pytest.approx(7.9920, abs=1e-4)
    assert float(script.adaptive_weight(2 * unit, 0 * unit, 0.8)) == pytest.approx(8000)


def test_downsampling_pads_right_and_below():
    E = script.encoder(3, 8, (1, 1), 1, (), 8, 4, groups=2)
    pad, down = next((a, b) for a, b in pairwise(E) if isinstance(a, nn.ZeroPad2d))
    assert pad.padding == (0, 1, 0, 1) and down.stride == (2, 2) and down.padding == (0, 0)


def test_residual_block_and_attention_by_hand():
    torch.manual_seed(0)
    attention, x = fill_(script.Attention(8, 2)), torch.randn(2, 8, 3, 3)
    h = attention.norm(x).flatten(2).detach().double().numpy()
    q, k, v = (
        np.einsum("oc,bcn->bon", m.weight[:, :, 0, 0].detach().double().numpy(), h)
        + m.bias.detach().double().numpy()[:, None]
        for m in (attention.q, attention.k, attention.v)
    )
    score = np.exp(np.einsum("bci,bcj->bij", q, k) / math.sqrt(8))
    out = torch.from_numpy(np.einsum("bij,bcj->bci", score / score.sum(2, keepdims=True), v)).float().view_as(x)
    assert torch.allclose(attention(x), x + attention.out(out), atol=1e-5)


def test_act_norm():
    norm, x = script.ActNorm(5), 3 + 2 * torch.randn(4, 5, 6, 6, generator=torch.Generator().manual_seed(0))
    out = norm(x)
    assert out.mean((0, 2, 3)).abs().max() < 1e-5 and torch.allclose(out.std((0, 2, 3)), torch.ones(5), atol=1e-4)
    assert torch.allclose(norm(2 * x), norm.scale * (2 * x + norm.loc)) and norm.ready  # set once
    fresh = script.ActNorm(5).eval()
    assert torch.equal(fresh(x), x)


class Passes(nn.Module):
    def forward(self, x):
        return x


def lpips():
    """LPIPS whose network passes three channels on."""
    features = nn.Sequential(*(Passes() for _ in range(31)))
    found = script.LPIPS(features)
    for i in range(5):
        setattr(found, f"lin{i}", torch.ones(3))
    return found


def test_lpips():
    distance = lpips()
    scale = lambda f: torch.tensor(f).view(1, 3, 1, 1) * distance.scale + distance.shift
    x, y = scale([3.0, 4.0, 0.0]), scale([1.0, 0.0, 0.0])
    assert distance(x, y).item() == pytest.approx(5 * 0.8, abs=1e-4)  # (3/5 - 1)^2 + (4/5)^2 in each of five layers
    assert distance(x, x).item() == 0 and distance(y, x).item() == distance(x, y).item()
    distance.lin3 = torch.tensor([2.0, 1.0, 1.0])
    assert distance(x, y).item() == pytest.approx(5 * 0.8 + 0.16, abs=1e-4)
    assert not any(p.requires_grad for p in script.LPIPS(script.vgg16(weights=None).features).parameters())


def test_lpips_reads_five_layers_of_vgg():
    features = script.vgg16(weights=None).features
    distance, seen = script.LPIPS(features), []
    for i in distance.taps:
        features[i].register_forward_hook(lambda module, inputs, out: seen.append(tuple(out.shape[1:])))
    x, y = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    x.requires_grad_()
    distance(x, y).sum().backward()
    assert seen == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2)]
    assert x.grad.abs().sum() > 0 and count(distance) == 14_714_688
    assert distance.train()(x, y) == distance(x, y)  # no dropout


def test_lpips_needs_its_files(tmp_path):
    args = arguments("--perceptual", "lpips", "--lin", tmp_path / "vgg.pth")
    with pytest.raises(script.UserError, match=r"vgg\.pth"):
        script.perceptual_loss(args)
    lin = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}
    torch.save(lin, tmp_path / "vgg.pth")
    with mock.patch.object(script, "vgg16", lambda weights: mock.Mock(features=nn.Sequential(*[Passes()] * 31))):
        distance = script.perceptual_loss(args)
        assert torch.equal(distance.lin4, lin["lin4.model.1.weight"].flatten())
        assert script.perceptual_loss(arguments("--perceptual", "vgg")).lin4.eq(1).all()
    assert script.perceptual_loss(arguments("--perceptual", "none")) is None
    wrong = (lin["lin0.model.1.weight"], "VGG16's"), (-lin["lin2.model.1.weight"], "VGG16's"), (None, "lin2")
    for weight, message in wrong:  # another network's, negative, missing
        torch.save({k: v for k, v in (lin | {"lin2.model.1.weight": weight}).items() if v is not None}, args.lin)
        with pytest.raises(script.UserError, match=message):
            script.perceptual_loss(args)


# ------------------------------------------------------------ stage 2
def test_causality_and_cache():
    torch.manual_seed(0)
    gpt = script.GPT(16, 12, 2, 4, 32).eval()
    nn.init.normal_(gpt.pos_emb)
    tokens = torch.randint(16, (3, 12))
    with torch.no_grad():
        full = gpt(tokens)
        for t in (0, 5, 11):
            changed = tokens.clone()
            changed[:, t] = (changed[:, t] + 1) % 16
            difference = (gpt(changed) - full).abs().amax((0, 2))
            assert difference[:t].sum() < 1e-5 and difference[t:].min() > 1e-6
        for start in (1, 6):
            cache = script.Cache(12)
            parts = [gpt(tokens[:, :start], cache)] + [gpt(tokens[:, t : t + 1], cache) for t in range(start, 12)]
            assert torch.allclose(torch.cat(parts, 1), full, atol=1e-5)


def test_a_condition_that_sees_all_of_itself():
    torch.manual_seed(0)
    gpt, tokens = script.GPT(16, 12, 2, 4, 32, unmasked=4).eval(), torch.randint(16, (2, 12))
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 16
    with torch.no_grad():
        full = gpt(tokens)
        assert (gpt(changed) - full)[:, 0].abs().max() > 0  # within the condition
        changed = tokens.clone()
        changed[:, 6] = (changed[:, 6] + 1) % 16
        assert (gpt(changed) - full)[:, :6].abs().max() < 1e-6
        cache = script.Cache(12)
        parts = [gpt(tokens[:, :5], cache)] + [gpt(tokens[:, t : t + 1], cache) for t in range(5, 12)]
        assert torch.allclose(torch.cat(parts, 1), full, atol=1e-5)


def test_loss_by_hand():
    """Output i tells z_i from c and the z before it: no code is told from itself."""
    gpt, (c, z) = script.GPT(16, 12, 1, 2, 8).eval(), (torch.tensor([[3], [4]]), torch.randint(16, (2, 5)))
    logits = gpt(torch.cat([c, z], 1)).double().detach().numpy()[:, :5]
    p = np.exp(logits) / np.exp(logits).sum(2, keepdims=True)
    wanted = -np.log(np.take_along_axis(p, z.numpy()[..., None], 2)).mean()
    assert script.transformer_loss(gpt, c, z).item() == pytest.approx(wanted, rel=1e-5)
    noise = (z + 1) % 16
    seen = gpt(torch.cat([c, noise], 1))[:, :5]
    wanted = F.cross_entropy(seen.flatten(0, 1), z.flatten()).item()  # targets stay clean
    assert script.transformer_loss(gpt, c, z, noise).item() == pytest.approx(wanted, rel=1e-5)


# ------------------------------------------------------------ sampling
@pytest.fixture(scope="module")
def tiny():
    """w = 4: a GPT of 16 codes and two classes."""
    args = arguments("--size", 16, "--codes", 16)
    args.grid = 4
    torch.manual_seed(0)
    gpt = script.GPT(18, 16, 2, 2, 16).eval()
    for p in gpt.parameters():
        nn.init.normal_(p, std=0.5)
    return args, gpt


def plainly(args, gpt, c, rows, cols, known, *key):
    """Windows by the official rules, without a cache."""
    random, w = script.generator(args.seed, *key), args.grid
    grid = torch.zeros(len(c), rows, cols, dtype=torch.long)
    grid.view(len(c), -1)[:, : known.shape[1]] = known
    for n in range(known.shape[1], rows * cols):
        i, j = divmod(n, cols)
        top = 0 if i <= w // 2 else rows - w if rows - i < w // 2 else i - w // 2
        left = 0 if j <= w // 2 else cols - w if cols - j < w // 2 else j - w // 2
        front = c[:, top : top + w, left : left + w].flatten(1) if c.ndim == 3 else c
        tokens = torch.cat([front, grid[:, top : top + w, left : left + w].flatten(1)], 1)[:, :-1]
        with torch.no_grad():
            logits = gpt(tokens)[:, front.shape[1] - 1 + (i - top) * w + j - left, : args.codes]
        grid[:, i, j] = script.probabilities(logits).multinomial(1, generator=random)[:, 0]
    return grid


@pytest.mark.parametrize(("rows", "cols", "m"), [(4, 4, 0), (4, 4, 8), (4, 9, 0), (4, 5, 7)])
def test_windows(tiny, rows, cols, m):
    args, gpt = tiny
    c, known = torch.tensor([[16], [17], [3]]), torch.randint(16, (3, m), generator=torch.Generator().manual_seed(m))
    found = script.complete(args, gpt, c, cols, known, script.FAKES, 1)
    assert torch.equal(found, plainly(args, gpt, c, rows, cols, known, script.FAKES, 1))
    assert found.max() < 16 and torch.equal(found.flatten(1)[:, :m], known)


def test_windows_over_a_map(tiny):
    args, _ = tiny
    torch.manual_seed(1)
    gpt = script.GPT(16, 32, 2, 2, 16).eval()
    for p in gpt.parameters():
        nn.init.normal_(p, std=0.5)
    c, none = torch.randint(16, (2, 7, 6)), torch.zeros(2, 0, dtype=torch.long)
    found = script.complete(args, gpt, c, 6, none, script.FAKES, 1)
    assert torch.equal(found, plainly(args, gpt, c, 7, 6, none, script.FAKES, 1))


# ------------------------------------------------------------ both stages
TINY = ["--batch", 8, "--log-every", 1, "--save-every", 100, "--probe-samples", 100, "--fid-samples", 8]


def trained(root, out, *flags, evaluate=False):
    """A run in this process, without its evaluation unless asked for; its checkpoint."""
    args = arguments("--root", root, "--out", out, *flags)
    with contextlib.ExitStack() as stack:
        for name in () if evaluate else ("sample", "evaluate"):
            stack.enter_context(mock.patch.object(script, name))
        script.train(args)
    return torch.load(out / "checkpoint.pt", weights_only=True)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_stages_follow_each_other(root, tmp_path):
    """D learns from disc_start on, the GPT when E, Z and G are done; both stages can be gone on from, bit for bit,
    dropout and noise among it."""
    flags = [*TINY, "--preset", "demo", "--vqgan-steps", 3, "--disc-start", 2, "--horizon", 9]
    flags += ["--dropout", 0.3, "--pkeep", 0.9]
    states = {n: trained(root, tmp_path / str(n), *flags, "--steps", n) for n in (2, 3, 4)}
    for n in states:
        trained(root, tmp_path / str(n), *flags, "--steps", 5)
    whole = trained(root, tmp_path / "whole", *flags, "--steps", 5)
    same = lambda a, b: all(torch.equal(a[k], b[k]) for k in a)
    assert same(states[2]["gpt"], states[3]["gpt"]) and not same(states[3]["gpt"], states[4]["gpt"])
    assert same(states[3]["vqgan"], whole["vqgan"]) and same(states[3]["D"], whole["D"])
    assert not same(states[2]["D"], states[3]["D"]) and not same(states[2]["vqgan"], states[3]["vqgan"])
    for n in states:
        again = torch.load(tmp_path / str(n) / "checkpoint.pt", weights_only=True)
        assert all(same(again[name], whole[name]) for name in ("vqgan", "D", "gpt")), n
    rows = rows_of(tmp_path / "whole")
    assert ["loss_d" in row for row in rows] == [False, False, True, False, False]
    assert 0 < rows[2]["lambda"] <= 1e4


def test_two_pieces_make_the_step_of_the_whole(root, tmp_path):
    """Before D takes part, in both stages: Adam's averages, for Adam's steps turn rounding into signs. A bound for each
    tensor by its own size: a sum in place of the mean, or a piece left out, misses it by far."""
    flags = [*TINY, "--preset", "demo", "--vqgan-steps", 1, "--steps", 2, "--disc-start", 9]
    flags += ["--lr", 1e-30]  # the GPT of both sees the same codes
    with mock.patch.dict(script.PRESETS["demo"], warm_start=0, revive=0):  # else codes start from a piece
        one, two = (trained(root, tmp_path / str(n), *flags, "--accumulate", n) for n in (1, 2))
    for name in ("opt", "opt_gpt"):
        pairs = [(state["exp_avg"], two[name]["state"][key]["exp_avg"]) for key, state in one[name]["state"].items()]
        assert all((a - b).norm() < 1e-3 * a.norm() + 1e-6 for a, b in pairs)
        assert sum(float(a.norm() > 1e-4) for a, _ in pairs) > 0.7 * len(pairs)  # some biases do nothing


def test_each_piece_has_its_own_lambda(root, tmp_path):
    """As each rank has: the gradients of E, Z and G in two pieces are the mean of those of either half alone."""
    flags = ["--preset", "demo", "--batch", 8, "--disc-start", 0, "--root", root]
    seen, half = {}, next(script.images(arguments(*flags), "train", 8))[0].chunk(2)
    for name, pieces in (("0", half[:1]), ("1", half[1:]), ("both", half)):
        args = arguments(*flags, "--accumulate", len(pieces), "--out", tmp_path / name)
        args.tokens, args.warm_start = 128, 0
        vqgan, D, _ = script.build(args)
        opt = mock.Mock(zero_grad=lambda n=vqgan: n.zero_grad()), mock.Mock(zero_grad=lambda n=D: n.zero_grad())
        run = mock.Mock(step=0, parts={"vqgan": vqgan, "D": D, "opt": opt[0], "opt_D": opt[1]})
        run.autocast = contextlib.nullcontext()
        args.revive = 0
        weight = script.vqgan_step(args, run, [(x, None) for x in pieces], None)["lambda"]
        seen[name] = torch.cat([p.grad.flatten() for net in (vqgan, D) for p in net.parameters()]), float(weight)
    (a, lambda_a), (b, lambda_b), (both, _) = seen["0"], seen["1"], seen["both"]
    assert abs(lambda_a - lambda_b) > 0.01 * lambda_a  # else nothing is shown
    assert ((a + b) / 2 - both).norm() < 1e-4 * both.norm()


def test_segmentation_maps_as_a_condition(root, tmp_path):
    """A VQGAN of one-hot maps, and a GPT that its codes stand in front of."""
    for folder in ("maps", "photos"):
        for i in range(30):
            place = tmp_path / folder / f"{i:02}.png"
            place.parent.mkdir(exist_ok=True)
            pixels = np.random.default_rng(i).integers(0, 4, (4, 4), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            Image.fromarray(pixels if folder == "maps" else 60 * pixels).save(place)
    flags = ["--preset", "demo", *TINY, "--steps", 3, "--vqgan-steps", 1, "--disc-start", 9]
    maps = trained(root, tmp_path / "first", *flags, "--data", tmp_path / "maps", "--labels", 4)
    assert maps["vqgan"]["E.0.0.weight"].shape[1] == 4 and maps["step"] == 3
    assert rows_of(tmp_path / "first")[0]["loss"] == pytest.approx(math.log(2), abs=0.2)  # BCE of a fresh G
    args = arguments("--data", tmp_path / "maps", "--labels", 4, "--preset", "demo", "--root", root)
    x, _ = next(script.images(args, "train", 4))
    assert x.shape == (4, 4, 32, 32) and torch.equal(x.sum(1), torch.ones(4, 32, 32))
    flags += ["--data", tmp_path / "photos", "--maps", tmp_path / "maps", "--condition", tmp_path / "first"]
    state = trained(root, tmp_path / "second", *flags, evaluate=True)
    assert state["gpt"]["pos_emb"].shape[1] == 128
    assert {"samples.png", "large.png", "completions.png"} <= {path.name for path in (tmp_path / "second").iterdir()}


def test_unconditional_and_noise(root, tmp_path):
    flags = [*TINY, "--preset", "demo", "--vqgan-steps", 1, "--steps", 2, "--condition", "none"]
    clean = trained(root, tmp_path / "1", *flags)
    noise = trained(root, tmp_path / "0", *flags, "--pkeep", 0)
    assert clean["gpt"]["tok_emb.weight"].shape[0] == 128
    assert not torch.equal(clean["gpt"]["head.weight"], noise["gpt"]["head.weight"])


def test_both_stages_learn(root, tmp_path):
    """140 and 60 steps, the quantiser from the 30th on: the L1 of decoded codes falls far below that of flat pictures,
    the GPT below the frequencies of its codes."""
    flags = ["--steps", 200, "--vqgan-steps", 140, "--disc-start", 999, "--save-every", 200, "--log-every", 10]
    flags += ["--warmup", 10, "--out", tmp_path, "--root", root]
    with mock.patch.dict(script.PRESETS["demo"], warm_start=30, revive=20):
        trained(root, tmp_path, *flags)
        args = arguments(*flags)
        vqgan, gpt, table, _ = script.restore(args)
    x, i = next(script.images(args, "test", 100))
    with torch.no_grad():
        x_hat, z, e, indices = vqgan(x)
        nats = script.transformer_loss(gpt, table[i], indices.flatten(1)).item()
    p = indices.flatten().bincount(minlength=args.codes) / indices.numel()
    unigram, error = torch.special.entr(p).sum().item(), (x - x_hat).abs().mean().item()
    grey = (x - x.mean((2, 3), keepdim=True)).abs().mean().item()
    missed = ((z - e).square().mean() / z.var(dim=(0, 2, 3)).mean()).item()  # by the codes, of what E says
    print(f"L1 {error:.3f}, of flat pictures {grey:.3f}; nats a code {nats:.3f}, of frequencies {unigram:.3f}")
    print(f"missed {missed:.3f}, codes in use {(p > 0).sum()}")
    assert error < 0.8 * grey and nats < 0.75 * unigram and missed < 0.3 and (p > 0).sum() > 20
