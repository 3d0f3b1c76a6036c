"""byol.py against its paper: views, parameter counts, losses, LARS, who hears a gradient, collapse, and that it learns.

About a minute on one core, half of it the shortened demo.
"""

import copy
import json
import sys
from itertools import islice
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fill import difference, inputs
from PIL import Image
from test_parity import GOLDEN, filled
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torchvision import models
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as reference

import byol
from common import data as common_data
from common import linear_probe
from common.data import Data, load


def arguments(*flags, **changes):
    """What main() makes of a command line."""
    with mock.patch.object(sys, "argv", ["byol.py", "--device", "cpu", "--precision", "fp32", *map(str, flags)]):
        args = byol.parse()
    byol.start(args)
    vars(args).update(changes)
    return args


@pytest.fixture(autouse=True)
def one_thread():
    """So that the time does not depend on what else the machine does: threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def built(*flags):
    """The online and the target network on the meta device: shapes without numbers."""
    with torch.device("meta"):
        return byol.build(arguments(*flags, device="meta"))


# ------------------------------------------------------------ sizes
COUNTS = {  # flags: f, g, q (sections 3.1 and 3.2 of the sheet)
    "--data imagenet": (23_508_032, 9_449_472, 2_109_440),
    "--data imagenet --width 128": (93_907_072, None, 2_109_440),
    "--data imagenet --width 192": (211_197_120, None, 2_109_440),
    "--data imagenet --width 256": (375_378_176, None, 2_109_440),
    "--data imagenet --encoder resnet101": (42_500_160, 9_449_472, 2_109_440),
    "--data imagenet --encoder resnet152": (58_143_808, 9_449_472, 2_109_440),
    "--data imagenet --encoder resnet200": (62_624_832, 9_449_472, 2_109_440),
    "--data imagenet --encoder resnet200 --width 128": (250_128_512, None, 2_109_440),
    "--data imagenet --encoder resnet18": (11_176_512, None, 2_109_440),
    "--data cifar10": (11_168_832, 3_158_016, 2_109_440),
    "--data cifar10 --size 64": (11_168_832, 3_158_016, 2_109_440),
}


@pytest.mark.parametrize("flags", COUNTS)
def test_parameter_counts(flags):
    online, target = built(*flags.split())
    f, g, q = COUNTS[flags]
    g = g or (online.f.dim + 1) * 4096 + 2 * 4096 + 4096 * 256
    assert (count(online.f), count(online.g), count(online.q)) == (f, g, q)
    assert count(target) == f + g  # no predictor there


def test_totals_of_the_paper():
    online, target = built("--data", "imagenet")
    assert count(online) == 35_066_944 and count(target) == 32_957_504


def test_the_paper_preset_is_the_papers():
    args = arguments("--data", "imagenet")
    assert (args.size, args.batch, args.steps, args.warmup) == (224, 4096, 312_784, 3127)
    assert (args.optimiser, args.lr, args.weight_decay, args.trust, args.clip) == ("lars", 0.2, 1.5e-6, 1e-3, False)
    assert args.tau == 0.996 and args.crop_area == 0.08 and args.whole and not args.grey
    assert args.views == [
        {"jitter": 0.8, "grey": 0.2, "blur": 1.0, "solarise": 0.0},
        {"jitter": 0.8, "grey": 0.2, "blur": 0.1, "solarise": 0.2},
    ]
    assert (
        (byol.brightness, 1, 0.4),
        (byol.contrast, 1, 0.4),
        (byol.saturation, 1, 0.2),
        (byol.hue, 0, 0.1),
    ) == byol.JITTER


# ------------------------------------------------------------ operators, against torchvision's on the same parameters
def some_pictures(size=32, n=24):
    """Photograph-like and extreme ones: [n, 3, size, size] in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 3, size, size, generator=generator)
    x[:8] = F.interpolate(torch.rand(8, 3, 5, 5, generator=generator), size, mode="bicubic").clamp(0, 1)
    x[8:12] = x[8:12, :1]  # grey
    x[12], x[13] = 0, 1
    x[14:16] = (x[14:16] > 0.5).float()  # two channels alike
    x[16:18] = (x[16:18] * 255).round() / 255
    return x


ADJUST = {  # operator, torchvision's, the amounts, tolerance on [0, 1]
    "brightness": (byol.brightness, reference.adjust_brightness, (0.6, 1.4), 1e-6),
    "contrast": (byol.contrast, reference.adjust_contrast, (0.6, 1.4), 1e-6),
    "saturation": (byol.saturation, reference.adjust_saturation, (0.8, 1.2), 1e-6),
    "hue": (byol.hue, reference.adjust_hue, (-0.1, 0.1), 2e-6),
    "any hue": (byol.hue, reference.adjust_hue, (-0.5, 0.5), 2e-6),
}


def worst(found, expected):
    return float((found - expected).abs().max())


@pytest.mark.parametrize("name", ADJUST)
def test_jitter_is_torchvisions(name):
    operator, theirs, ends, tolerance = ADJUST[name]
    x, amounts = some_pictures(), torch.linspace(*ends, 24)
    expected = torch.stack([theirs(picture, float(amount)) for picture, amount in zip(x, amounts, strict=True)])
    assert worst(operator(x, amounts[:, None, None, None]), expected) <= tolerance
    assert worst(x, expected) > 0.05


@pytest.mark.parametrize(("size", "kernel"), [(32, 3), (64, 7), (96, 9), (128, 13), (224, 23)])
def test_blur_is_torchvisions(size, kernel):
    x, sigma = some_pictures(size, 18)[::3], torch.linspace(0.1, 2, 6)
    expected = torch.stack(
        [reference.gaussian_blur(p, [kernel] * 2, [float(s)] * 2) for p, s in zip(x, sigma, strict=True)]
    )
    assert worst(byol.blur(x, sigma[:, None, None, None]), expected) <= 2e-6


def test_blur_of_a_point():
    x = torch.zeros(1, 3, 32, 32)
    x[..., 10, 10] = 1
    row = np.array([0.274069, 0.451863, 0.274069])
    assert np.allclose(byol.blur(x, torch.ones(1, 1, 1, 1))[0, 0, 9:12, 9:12], np.outer(row, row), atol=1e-6)


def test_solarise_and_greyscale():
    x = torch.tensor([0.2, 0.5, 0.7, 1.0]).expand(1, 3, 1, 4)
    assert torch.allclose(byol.solarise(x)[0, 0, 0], torch.tensor([0.2, 0.5, 0.3, 0.0]))
    x = some_pictures()
    assert worst(byol.solarise(x), reference.solarize(x, 0.5)) == 0
    assert worst(byol.luma(x), reference.rgb_to_grayscale(x)) <= 1e-6


def draws(n, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random((n, byol.DRAWS), dtype=np.float32))


def one_by_one(x, u, p, size=32):
    """`augment`, an image at a time, by torchvision and from the sheet's table."""
    kernel, out = 2 * int(size / 20) + 1, []
    adjust = (reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation, reference.adjust_hue)
    for picture, draw in zip(x, u.tolist(), strict=True):
        if draw[0] < p["jitter"]:
            amounts = [
                1 + 0.4 * (2 * draw[9] - 1),
                1 + 0.4 * (2 * draw[10] - 1),
                0.8 + 0.4 * draw[11],
                0.2 * draw[12] - 0.1,
            ]
            for i in np.argsort(draw[5:9]):
                picture = adjust[i](picture, amounts[i])
        if draw[1] < p["grey"]:
            picture = reference.rgb_to_grayscale(picture, 3)
        if draw[2] < p["blur"]:
            picture = reference.gaussian_blur(picture, [kernel] * 2, [0.1 + 1.9 * draw[13]] * 2)
        if draw[3] < p["solarise"]:
            picture = reference.solarize(picture, 0.5)
        out.append(picture)
    return torch.stack(out)


@pytest.mark.parametrize("view", [0, 1])
def test_a_view_is_torchvisions(view):
    """The whole of T and T', each image with its own parameters and its own order of the jitters."""
    p, u, x = byol.PAPER["views"][view], draws(64), some_pictures(n=64)
    before = x.clone()
    found = byol.augment(x, u, p)
    assert worst(found, one_by_one(x, u, p)) <= 5e-6
    assert torch.equal(x, before) and found.min() >= 0 and found.max() <= 1 + 1e-6


def test_how_often_an_operator_is_applied():
    """Table 6, over many draws: T is always blurred and never solarised, T' in a tenth and a fifth of the cases."""
    n, x = 4000, some_pictures(16)[:1].expand(4000, -1, -1, -1)
    shares = []
    for p in byol.PAPER["views"]:
        seen = dict.fromkeys(("luma", "blur", "solarise", "brightness", "contrast", "saturation", "hue"), 0)

        def spy(name, seen=seen):
            operator = getattr(byol, name)

            def counted(x, *amounts, **out):
                seen[name] += len(x)
                return operator(x, *amounts, **out)

            return counted

        spies = {name: spy(name) for name in seen}
        jitter = [(spies[name], *rest) for name, (_, *rest) in zip([*seen][3:], byol.JITTER, strict=True)]
        with mock.patch.multiple(byol, JITTER=jitter, **{name: spies[name] for name in ("luma", "blur", "solarise")}):
            byol.augment(x, draws(n), p)
        shares.append({name: total / n for name, total in seen.items()})
    near = lambda value, share: abs(value - share) < 0.02
    for share in shares:
        assert near(share["hue"], 0.8) and share["hue"] == share["brightness"]
        assert near(share["luma"] - share["contrast"] - share["saturation"], 0.2)  # these two call it
    assert shares[0]["blur"] == 1 and shares[0]["solarise"] == 0
    assert near(shares[1]["blur"], 0.1) and near(shares[1]["solarise"], 0.2)


# ------------------------------------------------------------ the stream of views
def toy(name, split, size, root, skip_broken, rows=slice(None)):
    """Pictures of noise, 64 or fewer, with four classes for labels."""
    images = torch.randint(
        256, (64, size or 40, size or 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return Data("toy", split, size, images[rows], f"toy{split}", root, torch.arange(64)[rows] % 4, list("abcd"))


def first_views(*flags, first=0, pieces=1, **changes):
    with mock.patch.object(byol, "load", toy):
        return list(islice(byol.views(arguments("--no-grey", "--batch", 8, *flags, **changes), first), pieces))


def test_views_are_crops_then_operators():
    """From the random numbers to the views, by torchvision: two crops, each augmented by its own T."""
    flags = ["--preset", "small", "--seed", 3]
    ((v1, v2),) = first_views(*flags, first=2)
    i = common_data.indices(64, 8, 2, 3)
    x = toy("toy", "train", 32, None, False).images[i].permute(0, 3, 1, 2) / 255
    for view, v in enumerate((v1, v2)):
        u = torch.from_numpy(common_data.uniforms(8, common_data.DRAWS, 2, 3, common_data.VIEW + view))
        boxes = common_data.crop_boxes(u, 32, 32, (0.08, 1.0), (3 / 4, 4 / 3)).tolist()
        crops = [
            reference.resized_crop(p, *box, [32, 32], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
            for p, box in zip(x, boxes, strict=True)
        ]
        crops = [crop.flip(-1) if draw[-1] < 0.5 else crop for crop, draw in zip(crops, u, strict=True)]
        u = torch.from_numpy(common_data.uniforms(8, byol.DRAWS, 2, 3, view))
        p = {"jitter": 0.8, "grey": 0.2, "blur": 0.0, "solarise": 0.2 * view}
        assert worst(v, 2 * one_by_one(torch.stack(crops), u, p) - 1) <= 1e-4
    assert v1.is_contiguous(memory_format=torch.channels_last)


def test_views_are_functions_of_the_step_alone():
    """Resumed, in pieces, and on several ranks: the same views."""
    flags = ["--preset", "paper", "--size", 32]
    steps = first_views(*flags, pieces=3)
    (again,) = first_views(*flags, first=2)
    assert all(torch.equal(a, b) for a, b in zip(again, steps[2], strict=True))
    pieces = first_views(*flags, "--accumulate", 4, first=1, pieces=4)
    ranks = [first_views(*flags, "--accumulate", 2, first=1, pieces=2, rank=rank, world=2) for rank in range(2)]
    for view in range(2):
        whole = torch.cat([piece[view] for piece in pieces])
        assert worst(whole, steps[1][view]) <= 1e-5
        assert torch.equal(whole, torch.cat([ranks[n % 2][n // 2][view] for n in range(4)]))
    assert not torch.allclose(*steps[0]) and not torch.allclose(steps[0][0], steps[1][0])


def test_operators_are_left_out():
    """--without all: what is left are the crops, not flipped."""
    ((v1, _),) = first_views(
        "--preset", "paper", "--size", 32, "--without", "flip", *byol.OPERATORS, crop_area=1, whole=False
    )
    i = common_data.indices(64, 8, 0, 0)
    x = toy("toy", "train", 32, None, False).images[i].permute(0, 3, 1, 2) / 127.5 - 1
    u = torch.from_numpy(common_data.uniforms(8, common_data.DRAWS, 0, 0, common_data.VIEW))
    box = common_data.crop_boxes(u, 32, 32, (1.0, 1.0), (3 / 4, 4 / 3))
    assert worst(v1, common_data.resized_crop(x, box, 32).clamp(-1, 1)) <= 1e-5


def test_crops_are_cut_from_whole_pictures(tmp_path):
    """With --preset paper from the files' own pixels: a view may show what a 32-pixel copy could not."""
    for i in range(8):
        board = (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)  # a chess board of single pixels
        Image.fromarray(board).convert("RGB").save(tmp_path / f"{i}.png")
    flags = ["--data", tmp_path, "--preset", "paper", "--root", tmp_path / "root", "--size", 32, "--batch", 4]
    flags += ["--without", *byol.OPERATORS]
    ((v1, v2),) = islice(byol.views(arguments(*flags, crop_area=0.01), 0), 1)
    assert v1.shape == (4, 3, 32, 32) and max(float(v.std((1, 2, 3)).max()) for v in (v1, v2)) > 0.2
    ((v1, v2),) = islice(byol.views(arguments(*flags, crop_area=0.01, whole=False), 0), 1)
    assert max(float(v.std((1, 2, 3)).max()) for v in (v1, v2)) < 0.1


# ------------------------------------------------------------ networks
@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_encoder_is_torchvisions(name):
    """The same function under weights that are filled from their shapes, in both modes, images being normalised."""
    f, theirs = (filled(net) for net in (byol.Encoder(*byol.ENCODERS[name]), getattr(models, name)()))
    theirs.fc = nn.Identity()
    (x,) = inputs(21, (4, 3, 96, 96))
    x = x.clamp(-1, 1)
    seen = reference.normalize((x + 1) / 2, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for mode in (False, True):
        found, expected = f.train(mode)(x), theirs.train(mode)(seen)
        assert found.shape == (4, f.dim)
        assert worst(found, expected) <= 1e-4 * float(expected.square().mean().sqrt())


@torch.no_grad()
def test_small_stem():
    """A 3x3 convolution with stride 1 and no pooling: the last map of 32 pixels is 4x4, and 2x2 in the demo."""
    for flags, side in (("--data cifar10", 4), ("--data cifar10 --size 64", 8), ("--preset demo", 2)):
        args, maps = arguments(*flags.split()), []
        f = byol.build(args)[0].f.eval()
        f.layers.register_forward_hook(lambda module, args, out, maps=maps: maps.append(out))
        y = f(torch.zeros(1, 3, args.size, args.size))
        assert maps[0].shape == (1, f.dim, side, side) and torch.allclose(y, maps[0].mean((2, 3)))


@torch.no_grad()
def test_grey_encoder():
    """It does not see hue, brightness and contrast."""
    f = byol.build(arguments("--grey"))[0].f.eval()
    x = 2 * torch.rand(4, 3, 32, 32) - 1
    grey = byol.luma(x).expand(-1, 3, -1, -1)
    for other in (grey, 0.4 * x - 0.3):
        assert torch.allclose(f(x), f(other), rtol=0.02, atol=0.01)
    assert not torch.allclose(f(x), f(-x), rtol=0.1, atol=0.05)


def test_first_weights():
    """Haiku's: normal, cut at two deviations of 1 / sqrt(fan in); biases 0, batch norm's scales 1."""
    online, target = byol.build(arguments("--data", "cifar10"))
    for layer in online.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            scaled = layer.weight.detach() * layer.weight[0].numel() ** 0.5
            assert scaled.abs().max() <= 2.0001 and scaled.std() == pytest.approx(0.88, abs=0.03)
            assert layer.bias is None or not layer.bias.any()
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):
            assert (layer.weight == 1).all() and layer.eps == 1e-5 and layer.momentum == 0.1
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), online[:2].parameters(), strict=True))
    assert isinstance(online.g[-1], nn.Linear) and online.g[-1].bias is None and online.g[0].bias is not None


# ------------------------------------------------------------ the objective
P1, Z2 = [[1.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [1.0, 0.0]]
P2, Z1 = [[1.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, -3.0]]


def test_loss_of_the_sheets_example():
    p1, p2, z1, z2 = (torch.tensor(v) for v in (P1, P2, Z1, Z2))
    assert torch.allclose(byol.regression_loss(p1, z2), torch.tensor([0.0, 2.0]))
    assert torch.allclose(byol.regression_loss(p2, z1), torch.tensor([0.585786, 4.0]))
    assert float(byol.byol_loss(p1, p2, z1, z2)) == pytest.approx(3.292893, abs=1e-6)
    assert float(byol.byol_loss(p1, p2, p2, p1)) == pytest.approx(0, abs=1e-6)
    assert float(byol.byol_loss(p1, p2, -p2, -p1)) == pytest.approx(8, abs=1e-5)


def test_loss_by_the_formula():
    """Against numpy in float64, by cosines; lengths and the views' order do not matter."""
    p1, p2, z1, z2 = inputs(99, *[(16, 64)] * 4)
    a, b, c, d = (
        v.double().numpy() / np.linalg.norm(v.double().numpy(), axis=1, keepdims=True) for v in (p1, p2, z1, z2)
    )
    expected = np.mean(2 - 2 * (a * d).sum(1) + 2 - 2 * (b * c).sum(1))
    loss = float(byol.byol_loss(p1, p2, z1, z2))
    assert loss == pytest.approx(expected, rel=1e-6)
    assert float(byol.byol_loss(3 * p1, p2, z1, 0.2 * z2)) == pytest.approx(loss, rel=1e-5)
    assert float(byol.byol_loss(p2, p1, z2, z1)) == pytest.approx(loss, rel=1e-6)
    assert float(byol.byol_loss(p1, p2, z2, z1)) != pytest.approx(loss, rel=1e-3)


def test_parity_with_the_official_code():
    """Case 21: losses, the gradient, and both schedules."""
    p1, p2, z1, z2 = (v.double() for v in inputs(21, *[(8, 256)] * 4))
    p1.requires_grad_()
    one = byol.regression_loss(p1, z2)
    found = {"direction_1": one, "direction_2": byol.regression_loss(p2, z1), "loss": byol.byol_loss(p1, p2, z1, z2)}
    found["grad_p1"] = torch.autograd.grad(one.mean(), p1)[0]
    steps = [int(step) for step in GOLDEN["21.tau_steps"]]
    for base in (0.996, 0.99):
        found[f"tau_{base}"] = torch.tensor([byol.target_decay(step, 1000, base) for step in steps])
    rates = [byol.learning_rate(step, 1000, 100, 0.2 * 4096 / 256) for step in steps]
    found["lr_batch4096"] = torch.tensor(rates)
    for name, value in found.items():
        off = difference(GOLDEN, f"21.{name}", value)
        print(f"21.{name}: largest difference {off:.1e} of the root mean square")
        assert off <= 1e-6, name


def test_schedules_of_the_paper():
    steps, warmup, peak = 312_784, 3127, 0.2 * 4096 / 256
    taus = [byol.target_decay(step, steps, 0.996) for step in (0, steps // 4, steps // 2, steps)]
    assert np.allclose(taus, [0.996, 0.996585786, 0.998, 1], atol=1e-9)
    middle = (steps + warmup) / 2
    rates = [byol.learning_rate(step, steps, warmup, peak) for step in (0, warmup / 2, warmup, middle, steps)]
    assert np.allclose(rates, [0, 1.6, 3.2, 1.6, 0], atol=1e-9)


def lars(values, *grads, lr=1.0, **options):
    """A parameter after steps with these gradients."""
    p = nn.Parameter(torch.tensor(values))
    optimiser = byol.LARS([p], lr, **{"weight_decay": 0.1} | options)
    for grad in grads:
        p.grad = torch.tensor(grad)
        optimiser.step()
    return p.detach()


def test_lars_of_the_sheets_example():
    one = lars([[3.0, 4.0]], [[1.0, 0.0]])
    two = lars([[3.0, 4.0]], [[1.0, 0.0]], [[1.0, 0.0]])
    assert torch.allclose(one, torch.tensor([[2.9952211, 3.9985296]]), atol=1e-6)
    assert torch.allclose(two, torch.tensor([[2.9861451, 3.9957369]]), atol=1e-6)


def test_what_lars_leaves_out():
    """Biases and batch norm: SGD with momentum, without decay. A weight or a gradient of 0: no scale."""
    assert torch.allclose(lars([3.0, 4.0], [1.0, 0.0], [1.0, 0.0]), torch.tensor([3 - 1 - 1.9, 4.0]))
    assert torch.allclose(lars([[0.0, 0.0]], [[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]]))
    assert torch.equal(lars([[3.0, 4.0]], [[0.0, 0.0]], weight_decay=0.0), torch.tensor([[3.0, 4.0]]))


def test_lars_by_the_formula():
    """Several weights at once, with a rate that changes, against numpy in float64; clipped at the rate or not."""
    for clip in (False, True):
        random = np.random.default_rng(0)
        shapes = [(4, 3), (5, 2, 3, 3), (5,)]
        weights = [random.standard_normal(shape) for shape in shapes]
        weights[1] *= 100
        ours = [nn.Parameter(torch.from_numpy(w).float()) for w in weights]
        optimiser, m = byol.LARS(ours, 0.5, 0.3, trust=0.02, clip=clip), [0, 0, 0]
        for lr in (0.0, 0.05, 0.5, 0.2):
            grads = [random.standard_normal(shape) for shape in shapes]
            for p, g in zip(ours, grads, strict=True):
                p.grad = torch.from_numpy(g).float()
            for group in optimiser.param_groups:
                group["lr"] = lr
            optimiser.step()
            for i, g in enumerate(grads):
                u = g
                if g.ndim > 1:
                    u = g + 0.3 * weights[i]
                    scale = 0.02 * np.linalg.norm(weights[i]) / np.linalg.norm(u)
                    u = u * (min(1.0, scale / lr if lr else 1.0) if clip else scale)
                m[i] = 0.9 * m[i] + u
                weights[i] = weights[i] - lr * m[i]
        for p, w in zip(ours, weights, strict=True):
            assert np.allclose(p.detach(), w, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------ the loop
def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors]).clone()


@pytest.fixture
def train(monkeypatch, tmp_path):
    """train(*flags) on noise, without pictures and evaluation: its arguments, networks, and what happened on the way.

    events: per optimiser step the learning rate, both networks' parameters before and after it, and the gradients.
    calls: which network was run, on what, in which mode.
    """
    monkeypatch.setattr(byol, "load", toy)
    for name in ("sample", "evaluate", "picture"):
        monkeypatch.setattr(byol, name, lambda *args: None)
    monkeypatch.setattr(byol, "neighbours", lambda *args: ())
    build = byol.build

    def run(*flags, prepare=lambda *networks: None, **changes):
        events, calls = [], []
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        flags = ["--batch", 16, "--steps", 1, "--log-every", 100, "--warmup", 0, "--out", out, *flags]
        args = arguments(*flags, **changes)
        online, target = build(args)
        prepare(online, target)
        monkeypatch.setattr(byol, "build", lambda args: (online, target))

        def before(optimizer, *_):
            lrs = {group["lr"] for group in optimizer.param_groups}
            grads = {
                name: flat(p.grad for p in part.parameters()) for name, part in online.named_children() if count(part)
            }
            event = {"lr": lrs, "grads": grads, "calls": len(calls)}
            event["target_grads"] = [p.grad for p in target.parameters()]
            event["target_before"] = flat(target.parameters())
            events.append(event)

        def after(optimizer, *_):
            events[-1]["online_after"] = flat(online[:2].parameters())
            events[-1]["target_still"] = flat(target.parameters())

        handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
        for name, network in (("online", online), ("target", target)):
            note = lambda module, args, out, name=name: calls.append(
                (name, args[0], out.requires_grad, module.training)
            )
            handles.append(network.register_forward_hook(note))
        try:
            byol.train(args)
        finally:
            for handle in handles:
                handle.remove()
        return args, (online, target), events, calls

    return run


def test_who_hears_a_gradient(train):
    """f, g and q of the online network, all of their parameters; the target network none."""
    _, (online, target), events, _ = train("--steps", 2)
    assert set(events[0]["grads"]) == {"f", "g", "q"}
    for part in online.children():
        assert all(p.grad.abs().sum() > 0 for p in part.parameters())
    for event in events:
        assert all(grad is None for grad in event["target_grads"])
    assert all(p.is_leaf and not p.requires_grad for p in target.parameters())  # its average keeps no graph either


def test_the_gradient_is_that_of_the_predictions_alone(train):
    """As if the target's projections were numbers; each view apart, and both networks in train mode."""
    copies = []
    _, _, events, calls = train(prepare=lambda *networks: copies.extend(copy.deepcopy(networks)))
    assert [name for name, *_ in calls] == ["online", "online", "target", "target"]
    assert all(training for *_, training in calls) and [heard for *_, heard, _ in calls] == [True, True, False, False]
    (v1, v2), (online, target) = (x for _, x, *_ in calls[:2]), copies
    assert len(v1) == len(v2) == 16 and not torch.equal(v1, v2)
    assert torch.equal(calls[2][1], v1) and torch.equal(calls[3][1], v2)
    z1, z2 = target(v1).detach().clone(), target(v2).detach().clone()
    byol.byol_loss(online(v1), online(v2), z1, z2).backward()
    for name, part in online.named_children():
        assert torch.allclose(events[0]["grads"][name], flat(p.grad for p in part.parameters()), rtol=1e-4, atol=1e-7)


def test_the_target_is_an_average_of_what_the_step_left(train):
    """xi = tau xi + (1 - tau) theta, once a step, behind the optimiser's step; tau and the rate of that step."""
    _, (_, target), events, _ = train("--steps", 4, "--accumulate", 2, "--tau", 0.9, "--warmup", 2, "--lr", 0.16)
    assert len(events) == 4 and [event["calls"] for event in events] == [
        8,
        16,
        24,
        32,
    ]  # two pieces, two views, two nets
    for step, event in enumerate(events):
        tau = 1 - 0.1 * (np.cos(np.pi * step / 4) + 1) / 2
        rate = 0.01 * (step / 2 if step < 2 else (np.cos(np.pi * (step - 2) / 2) + 1) / 2)
        assert len(event["lr"]) == 1 and float(*event["lr"]) == pytest.approx(rate)
        assert torch.equal(event["target_before"], event["target_still"])
        following = events[step + 1]["target_before"] if step < 3 else flat(target.parameters())
        expected = tau * event["target_before"] + (1 - tau) * event["online_after"]
        assert torch.allclose(following, expected, rtol=1e-5, atol=1e-7)
        assert step == 0 or not torch.allclose(following, event["target_before"], rtol=1e-5, atol=1e-7)


def test_ends_of_tau(train):
    """1 keeps the target; 0 copies the online network."""
    _, (_, target), events, _ = train("--tau", 1)
    assert torch.equal(flat(target.parameters()), events[0]["target_before"])
    _, (online, target), events, _ = train("--tau", 0)
    assert torch.equal(flat(target.parameters()), flat(online[:2].parameters()))
    assert not torch.equal(flat(target.parameters()), events[0]["target_before"])


def test_the_targets_batch_norm_is_its_own(train):
    """It has seen the batches in train mode: its running statistics are not the online network's, and have moved."""
    copies = []
    _, (online, target), _, _ = train("--steps", 3, prepare=lambda *networks: copies.extend(copy.deepcopy(networks)))
    for name, buffer in target.named_buffers():
        if "running" in name:
            assert not torch.equal(buffer, copies[1].get_buffer(name))
    assert any(not torch.equal(b, online.get_buffer(n)) for n, b in target.named_buffers() if "running" in n)


def test_pieces_add_up_to_the_batch(train):
    """Four pieces give the gradients of one batch, where batch norm does not look at the batch."""

    def freeze(*networks):
        for module in (m for n in networks for m in n.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)):
            module.eval().train = lambda mode=True: None

    (whole,), (pieces,) = (train("--accumulate", n, prepare=freeze)[2] for n in (1, 4))
    for name, grads in whole["grads"].items():
        assert grads.norm() > 0 and torch.allclose(pieces["grads"][name], grads, rtol=1e-3, atol=1e-6)


def test_steps_do_not_depend_on_how_often_they_are_looked_at(train):
    seldom = train("--steps", 3)[1]
    often = train("--steps", 3, "--log-every", 1, "--save-every", 1, "--eval-every", 1)[1]
    for a, b in zip(often, seldom, strict=True):
        a, b = a.state_dict(), b.state_dict()
        assert not [key for key in a if not torch.equal(a[key], b[key])]


def test_watched_numbers(train):
    """spread: 1 for directions all over the sphere, 0 for one; knn_top1 at --eval-every, its best in best.pt."""
    args, *_ = train("--steps", 2, "--log-every", 1, "--eval-every", 2)
    rows = [json.loads(line) for line in (args.out / "log.jsonl").read_text().splitlines()]
    assert all({"step", "loss", "spread", "tau", "lr", "img_per_s"} <= set(row) for row in rows[:2])
    assert 0.5 < rows[0]["spread"] < 1.1 and 2 < rows[0]["loss"] < 6
    best = torch.load(args.out / "best.pt", weights_only=True)
    assert best["best"] == pytest.approx(-rows[-1]["knn_top1"], abs=1e-4) and 0 < rows[-1]["knn_top1"] <= 1


def test_schedules_may_be_longer_than_the_run(train):
    """--horizon: a run that is extended takes the steps of one that was never ended."""
    _, _, whole, _ = train("--steps", 3, "--horizon", 10)
    _, _, part, _ = train("--steps", 2, "--horizon", 10)
    assert [event["lr"] for event in part] == [event["lr"] for event in whole[:2]]
    assert torch.equal(part[1]["online_after"], whole[1]["online_after"])
    with pytest.raises(byol.UserError, match="horizon"):
        arguments("--steps", 11, "--horizon", 10)


# ------------------------------------------------------------ pictures and numbers
def untile(path, columns):
    """The 32-pixel pictures of a sheet, float [N, 3, 32, 32] in [-1, 1]."""
    sheet = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 127.5 - 1
    rows = (sheet.shape[1] - 2) // 34
    return torch.stack(
        [sheet[:, 34 * r + 2 :][:, :32, 34 * c + 2 :][..., :32] for r in range(rows) for c in range(columns)]
    )


def test_pictures(train, monkeypatch):
    args, (online, _), _, _ = train("--steps", 3, "--save-every", 3)
    monkeypatch.undo()
    monkeypatch.setattr(byol, "load", toy)
    byol.sample(args)
    x = toy("toy", "test", 32, None, False).images.permute(0, 3, 1, 2) / 127.5 - 1
    rows = untile(args.out / "samples.png", 19).unflatten(0, (10, 19))
    with torch.no_grad():
        y = F.normalize(online.f.eval()(x))
    for i, row in enumerate(rows):
        nearest = (y @ y[i]).argsort(descending=True)[1:9]
        assert worst(row[:9], torch.cat([x[i : i + 1], x[nearest]])) < 0.01
        assert (row[9] > 0.99).all() and worst(row[10], x[i]) < 0.01
    assert worst(rows[:, 11:], rows[:, 1:9]) > 0.1  # the untrained network's choice
    (pair,) = first_views(out=args.out, pieces=1, grey=True, views=args.views, batch=16)
    assert worst(untile(args.out / "views.png", 10)[:32].unflatten(0, (16, 2)), torch.stack(pair, 1)) < 0.01


def test_numbers(train, monkeypatch):
    """Probe, k-NN, and the probes of 1 % and of 10 % of the labels."""
    args, *_ = train("--size", 16)
    monkeypatch.undo()

    def twenty_times(name, split, size, root, skip_broken, rows=slice(None)):
        data = toy(name, split, size, root, skip_broken)
        images, labels = data.images.repeat(10, 1, 1, 1), data.labels.repeat(10)
        return Data("toy", split, size, images[rows], f"{split}{rows}", root, labels[rows], list("abcd"))

    monkeypatch.setattr(byol, "load", twenty_times)
    sizes, probe = [], linear_probe.probe
    monkeypatch.setattr(linear_probe, "probe", lambda *a, **o: (sizes.append(len(a[0][0])), probe(*a, **o))[1])
    args.probe_samples = 100
    byol.evaluate(args)
    metrics = json.loads((args.out / "metrics.json").read_text())
    assert sizes == [100] * 4 + [6, 64]  # 640 pictures
    names = {"probe_top1", "knn_top1", "untrained_probe_top1", "untrained_knn_top1", "raw_pixels_probe_top1"}
    assert names | {"low_shot_1_percent_top1", "low_shot_10_percent_top1"} <= set(metrics)
    assert metrics["parameters"] == {name: count(part) for name, part in byol.build(args)[0].named_children()}
    assert not any(key.startswith(("fid", "fd_")) for key in metrics)


def test_effective_rank(monkeypatch):
    """Without labels: 1 when all features are alike, the dimension when all directions are used alike."""
    monkeypatch.setattr(byol, "load", lambda *args: Data("x", args[1], 32, torch.zeros(8, 32, 32, 3).byte(), "x", None))
    for y, rank in ((torch.ones(8, 4), 1), (torch.eye(8), 8)):
        monkeypatch.setattr(linear_probe, "extract", lambda f, data, device, y=y: (y, None))
        assert float(byol.judge_features(arguments(), None)["effective_rank"]) == pytest.approx(rank, rel=1e-3)


# ------------------------------------------------------------ it collapses when it should, and learns
@pytest.fixture
def demo(monkeypatch, tmp_path, root):
    """demo(*flags): the demo, shortened; its last logged numbers and its arguments."""
    for name in ("sample", "evaluate", "picture"):
        monkeypatch.setattr(byol, name, lambda *args: None)
    monkeypatch.setattr(byol, "neighbours", lambda *args: ())

    def run(*flags):
        flags = ["--root", root, "--out", tmp_path / "-".join(["run", *map(str, flags)]), *flags]
        args = arguments("--log-every", 10, "--save-every", 10_000, *flags)
        byol.train(args)
        return json.loads((args.out / "log.jsonl").read_text().splitlines()[-1]), args

    return run


def test_collapse(demo):
    """Without the predictor, and where the target hears the gradient, all images soon get one answer; else not."""
    short = ["--steps", 60, "--horizon", 1000, "--batch", 32, "--width", 8]
    spread, loss = zip(
        *(
            (row["spread"], row["loss"])
            for row, _ in (demo(*short), demo("--no-predictor", *short), demo("--no-target", *short))
        ),
        strict=True,
    )
    print(f"spread {spread}, loss {loss}")
    assert spread[0] > 0.7 and max(spread[1:]) < 0.4
    assert loss[0] > 1.2 and max(loss[1:]) < 0.5


STEPS = 200


def test_it_learns(demo, root):
    """The shortened demo's features tell more of the shapes than the untrained network's, and than pixels."""
    row, args = demo("--steps", STEPS)
    train, test = (load("shapes", split, 32, root, rows=slice(n)) for split, n in (("train", 2000), ("test", 1000)))

    def accuracy(f):
        return linear_probe.probe(linear_probe.extract(f, train), linear_probe.extract(f, test))["top1"]

    untrained = byol.build(args)[0].f
    linear_probe.calibrate(untrained, train)
    before, after = accuracy(untrained), accuracy(byol.restore(args)[0])
    print(f"probe {before:.3f} -> {after:.3f} after {STEPS} steps, spread {row['spread']:.2f}")
    assert after > before + 0.15, f"f has learnt nothing: probe {before:.3f} -> {after:.3f}"
    assert row["spread"] > 0.6
