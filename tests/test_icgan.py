"""icgan.py against its paper: sizes, features, neighbours, losses, both players' gradients, parity, and that it learns.

About a minute on one core, half of it the shortened demo.
"""

import gc
import json
import math
import sys
import weakref
from itertools import islice
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fill import coarse, inputs
from PIL import Image
from test_parity import agree, filled
from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision import models

import bigbigan
import byol
import icgan
from common import fid
from common.data import Data, UserError, load


def arguments(*flags, script=icgan, **changes):
    """What main() makes of a command line."""
    with mock.patch.object(
        sys, "argv", [f"{script.__name__}.py", "--device", "cpu", "--precision", "fp32", *map(str, flags)]
    ):
        args = script.parse()
    script.start(args)
    vars(args).update(changes)
    return args


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


class Width(nn.Module):
    """In place of a feature network."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim


def built(*flags, dim=2048, classes=0):
    """G and D on the meta device: shapes without numbers."""
    args = arguments(*flags, device="meta", f=Width(dim), classes=classes)
    slow = mock.patch("torch.nn.init.orthogonal_"), mock.patch.object(_SpectralNorm, "_power_method")
    with torch.device("meta"), slow[0], slow[1]:
        return args, *icgan.build(args)


# ------------------------------------------------------------ sizes
COUNTS = {  # flags: classes, G, D (sections 3.4 and 3.5 of the sheet)
    "--preset paper --size 64": (0, 36_527_876, 21_646_018),
    "--preset paper --size 64 --class-conditional": (1000, 37_868_292, 21_108_930),
    "--data imagenet": (0, 77_032_132, 89_593_634),
    "--preset paper --class-conditional": (1000, 79_052_484, 88_788_002),
    "--preset paper --size 256": (0, 89_886_340, 100_837_154),
    "--preset paper --size 256 --class-conditional": (1000, 92_299_908, 100_031_522),
    "--preset paper --size 256 --ch 64": (0, 42_732_804, 45_520_066),
    "--preset paper --size 256 --ch 64 --class-conditional": (1000, 44_384_516, 44_982_978),
    "--preset paper --ch 48": (0, 22_143_076, 23_189_330),
    "--preset paper --size 256 --ch 48": (0, 25_733_956, 26_000_786),
    "--data cifar10": (0, 6_895_619, 4_729_345),
    "--data cifar10 --class-conditional": (10, 7_290_115, 4_468_353),
}


@pytest.mark.parametrize("flags", COUNTS)
def test_parameter_counts(flags):
    classes, *wanted = COUNTS[flags]
    args, G, D = built(*flags.split(), classes=classes)
    assert [count(G), count(D)] == wanted
    z, h = torch.empty(2, args.z_dim, device="meta"), torch.empty(2, 2048, device="meta")
    y = [torch.zeros(2, dtype=torch.long, device="meta")] * (classes > 0)
    assert G(z, h, *y).shape == (2, 3, args.size, args.size)
    assert D(G(z, h, *y), h, *y).shape == (2,)


@pytest.mark.parametrize(
    ("options", "dim", "wanted"),
    [
        (dict(), 512, (6_109_187, 4_336_129)),
        (dict(embed_dim=128), 512, (4_732_547, 4_336_129)),
        (dict(hierarchical=True), 2048, (6_600_707, 4_729_345)),
    ],
)
def test_parameter_counts_of_other_features(options, dim, wanted):
    args = arguments("--data", "cifar10", device="meta", f=Width(dim), classes=0, **options)
    slow = mock.patch("torch.nn.init.orthogonal_"), mock.patch.object(_SpectralNorm, "_power_method")
    with torch.device("meta"), slow[0], slow[1]:
        assert tuple(map(count, icgan.build(args))) == wanted


@pytest.mark.parametrize("flags", ["demo", "demo --size 64", "demo --class-conditional", "small --size 64"])
def test_shapes(flags):
    classes = 10 * ("class" in flags)
    args, G, D = built("--preset", *flags.split(), dim=128, classes=classes)
    z, h = torch.empty(2, args.z_dim, device="meta"), torch.empty(2, 128, device="meta")
    y = [torch.zeros(2, dtype=torch.long, device="meta")] * (classes > 0)
    assert D(G(z, h, *y), h, *y).shape == (2,)
    assert not args.hierarchical or args.z_dim % G.chunks == 0


def test_the_paper_preset_is_the_papers():
    wanted = dict(size=128, ch=96, z_dim=120, batch=2048, d_steps=1, lr_g=4e-5, lr_d=1e-4, betas=(0.0, 0.999), k=50)
    wanted |= dict(adam_eps=1e-6, sn_eps=1e-6, ema=0.9999, ema_start=20_000, stored=1000, flip_instances=True)
    wanted |= dict(embed_dim=512, h_gain=1.0, features="pretrained", fid_split="test", fid_samples=50_000)
    args = arguments("--data", "imagenet")
    assert {name: getattr(args, name) for name in wanted} == wanted
    args = arguments("--preset", "paper", "--size", 64)
    assert (args.ch, args.batch, args.lr_g, args.flip_instances) == (64, 256, 1e-4, True)
    args = arguments("--preset", "paper", "--size", 256)
    assert (args.ch, args.z_dim, args.flip_instances) == (96, 119, False)
    assert arguments("--preset", "paper", "--size", 64, "--ch", 32).ch == 32


def test_attention_sits_where_the_papers_does():
    for size, wanted in ((64, 32), (128, 64), (256, 64)):
        args, G, D = built("--preset", "paper", "--size", size)
        sizes = []
        for module in (m for network in (G, D) for m in network.modules() if isinstance(m, icgan.Attention)):
            module.register_forward_hook(lambda m, inputs, out, sizes=sizes: sizes.append(out.shape[-1]))
        h = torch.empty(2, 2048, device="meta")
        D(G(torch.empty(2, args.z_dim, device="meta"), h), h)
        assert sizes == [wanted, wanted]


# ------------------------------------------------------------ parity with the official code (golden/parity.md, case 18)
@torch.no_grad()
def test_generator_agrees_with_the_official_code():
    G, before = filled(icgan.Generator((256, 256, 128, 64, 32), 120, 2048, attention=32, eps=1e-6)), []
    assert count(G) == 4_297_028
    G.last.register_forward_hook(lambda module, args, out: before.append(out))
    z, h = inputs(18, (2, 120), (2, 2048))
    agree("18g.out", G(z, F.normalize(h)))
    agree("18g.before_tanh", before[0])
    z, h = inputs(18, (8, 120), (8, 2048))
    icgan.power_iteration(G.train())  # from the exact singular vectors it changes nothing
    agree("18g.train", G(z, F.normalize(h)))


@torch.no_grad()
def test_discriminator_agrees_with_the_official_code():
    D = filled(icgan.Discriminator(icgan.image_trunk((16, 32, 64, 128, 256), 4, 64, 32, 1e-6), 256, 2048))
    assert count(D) == 1_747_954
    x, h = inputs(18, (2, 3, 64, 64), (2, 2048))
    for x, name, pooled in ((x, "out", "pooled"), (coarse(18, (2, 3, 64, 64)), "blocky", "blocky_pooled")):  # noqa: B020
        agree(f"18d.{pooled}", D.features(x))
        agree(f"18d.{name}", D(x, F.normalize(h))[:, None])


# ------------------------------------------------------------ f
def features(kind, **changes):
    return icgan.feature_network(arguments("--features", kind, **changes))


def randomized(module):
    """Other statistics of batch norm than the first ones, so that it matters where they come from."""
    draw = torch.Generator().manual_seed(0)
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_(generator=draw)
        norm.running_var.uniform_(0.5, 2, generator=draw)
    return module.eval()


def checkpoint(path, script, args, **parts):
    state = {"script": script, "config": args.config, "step": 3, "best": math.inf, "seconds": 1.0}
    torch.save(state | {name: part.state_dict() for name, part in parts.items()}, path)


@pytest.mark.parametrize(("name", "size"), [("resnet10", 32), ("resnet50", 32), ("resnet18", 96)])
@torch.no_grad()
def test_features_of_bigbigan(tmp_path, name, size):
    """E's average-pooled features, of images of E's size."""
    args = arguments("--encoder", name, script=bigbigan)
    args.config["encoder_size"] = size
    E = randomized(bigbigan.Encoder(name, size, 8, 4))
    checkpoint(tmp_path / "c.pt", "bigbigan", args, G=nn.Linear(2, 2), E_ema=AveragedModel(E), E=E)
    f, x = features(tmp_path / "c.pt"), torch.rand(3, 3, size, size) * 2 - 1
    assert torch.allclose(f(x), F.normalize(E.trunk(x).mean((2, 3))), atol=1e-5) and not torch.allclose(*f(x)[:2])
    x = F.interpolate(x, 16)
    assert torch.allclose(f(x), f(F.interpolate(x, size, mode="bicubic", align_corners=False)), atol=1e-6)


@pytest.mark.parametrize(
    "flags",
    ["--data shapes", "--preset demo --no-grey", "--preset small --encoder resnet50", "--preset paper --size 96"],
)
@torch.no_grad()
def test_features_of_byol(tmp_path, flags):
    args = arguments(*flags.split(), script=byol)
    online, target = byol.build(args)
    f = randomized(online[0])
    checkpoint(tmp_path / "c.pt", "byol", args, target=target, online=online)
    x = torch.rand(3, 3, args.size, args.size) * 2 - 1
    h = features(tmp_path / "c.pt")(x)
    assert torch.allclose(h, F.normalize(f(x)), atol=1e-5) and not torch.allclose(h[0], h[1])


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@torch.no_grad()
def test_features_of_torchvision(tmp_path, name):
    """The authors' recipe: ImageNet's mean and deviation, then bicubic to 224 pixels; whatever else is in the file."""
    net = randomized(getattr(models, name)())
    weights = dict(net.state_dict())
    if name == "resnet18":  # as SwAV's: behind a prefix, with its own heads, and as old files are, without counters
        weights = {f"module.{k}": v for k, v in weights.items() if "tracked" not in k and "fc" not in k}
        weights |= {"module.projection_head.0.weight": torch.zeros(2, 2), "module.prototypes.weight": torch.zeros(2, 2)}
        weights = {"epoch": 3, "state_dict": weights}
    torch.save(weights, tmp_path / "w.pth")
    f, x = features(tmp_path / "w.pth"), torch.rand(2, 3, 32, 32) * 2 - 1
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    net.fc = nn.Identity()
    y = net(F.interpolate(((x + 1) / 2 - mean) / std, size=(224, 224), mode="bicubic", align_corners=False))
    assert y.shape == (2, 512 if name == "resnet18" else 2048)
    assert torch.allclose(f(x), F.normalize(y), atol=1e-5) and not torch.allclose(y[0], y[1])


def test_published_weights_are_fetched_by_torchvision(monkeypatch):
    """The supervised ResNet-50's. Where they cannot be had nothing else steps in."""
    weights = models.resnet50().state_dict()
    monkeypatch.setattr(models.ResNet50_Weights, "get_state_dict", lambda self, **options: weights)
    args = arguments("--features", "pretrained")
    f = icgan.feature_network(args, fresh=True)
    assert f(torch.zeros(1, 3, 32, 32)).shape == (1, f.dim) == (1, 2048)

    def unreachable(*args, **options):
        raise OSError("<urlopen error no network>")

    monkeypatch.setattr(models.ResNet50_Weights, "get_state_dict", unreachable)
    with pytest.raises(UserError, match=r"pretrained.*no network.*trained.*random"):
        icgan.feature_network(args, fresh=True)


def test_files_that_are_no_network(tmp_path):
    (tmp_path / "text").write_text("nothing")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other")
    torch.save([1, 2], tmp_path / "list")
    half = models.resnet18().state_dict()
    torch.save({k: v for k, v in half.items() if not k.startswith("layer4.1")}, tmp_path / "half")
    for name in ("nowhere", "text", "other", "list", "half"):
        with pytest.raises(UserError, match=rf"--features \S*{name}"):
            features(tmp_path / name)


def test_the_feature_network_is_frozen():
    """No gradients, and eval mode, whatever is called; the same features whoever is beside them."""
    args = arguments("--features", "trained")
    f, x = icgan.feature_network(args), torch.rand(8, 3, 32, 32) * 2 - 1
    before, wanted = [value.clone() for value in f.state_dict().values()], f(x)
    for call in (f.train, f.eval, nn.Sequential(f).train, f.requires_grad_(False).train):
        call()
        assert not any(m.training for m in f.modules())
        assert torch.equal(f(x), wanted) and torch.allclose(f(x[:1]), wanted[:1], atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, f.state_dict().values(), strict=True))
    assert not any(p.requires_grad or p.grad is not None for p in f.parameters()) and not wanted.requires_grad
    assert torch.allclose(wanted.norm(dim=1), torch.ones(8))
    args.classes = 0
    icgan.build(args)
    kept = args.f
    icgan.build(args)
    assert args.f is kept


# ------------------------------------------------------------ neighbours and stored instances
def test_neighbours_of_the_sheets_example():
    h = torch.tensor([[2.0, 0], [0, 3], [1, 1.2], [3, 0.3], [-1, 0.2]])
    assert icgan.nearest(h, 2).tolist() == [[3, 2], [2, 4], [1, 3], [0, 2], [1, 2]]
    radius = (F.normalize(h)[icgan.nearest(h, 2)[:, 1].long()] - F.normalize(h)).norm(dim=1)
    assert np.allclose(radius, [0.8483, 1.2680, 0.7570, 0.7570, 1.7188], atol=1e-4)
    assert torch.equal(icgan.nearest(7 * h, 2), icgan.nearest(h, 2))


def test_neighbours_are_exact_in_blocks():
    """Against float64; nobody is its own neighbour, not even among copies."""
    h = torch.randn(230, 16, generator=torch.Generator().manual_seed(0))
    h[100:104], h[229] = h[0], h[7]
    n = F.normalize(h.double())
    cosine = (n @ n.T).fill_diagonal_(-2)
    for rows in (1, 64, 1000):
        found = icgan.nearest(h, 5, rows).long()
        assert not (found == torch.arange(230)[:, None]).any()
        assert torch.allclose(cosine.gather(1, found), cosine.topk(5).values, atol=1e-6)
        assert set(found[0, :4].tolist()) == {100, 101, 102, 103} and found[229, 0] == 7


def test_central_instances():
    x = torch.tensor([[0.0, 0], [0.9, 0], [2, 0], [10, 0], [11.2, 0], [12, 0]])
    assert icgan.central(x, 2, 0).tolist() == [1, 4]  # pictures, never the centres themselves
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(12_000, 2, generator=draw) * 0.1 + torch.randint(3, (12_000, 2), generator=draw)
    found = icgan.central(x, 40, 0)  # the parts into which the rows are cut do not matter
    assert len(found) == len(set(found.tolist())) <= 40 and found.max() > 10_000 > found.min()
    assert len(x[found].round().unique(dim=0)) == 9  # all nine heaps


def test_precision_and_its_sisters():
    """The sheet's example, for the code that judges the samples."""
    real, fake = torch.tensor([[0.0], [1], [3]]), torch.tensor([[0.5], [10], [10.2]])
    wanted = {"precision": 1 / 3, "recall": 1, "density": 2 / 3, "coverage": 2 / 3}
    assert fid.prdc(real, fake, 1) == pytest.approx(wanted)


def toy(name, split, size, root, skip_broken, rows=slice(None)):
    """64 pictures of noise in four classes."""
    random = torch.Generator().manual_seed(int(split == "test"))
    images = torch.randint(256, (64, size, size, 3), dtype=torch.uint8, generator=random)[rows]
    return Data("toy", split, size, images, f"toy{split}", icgan.Path(root), torch.arange(64)[rows] % 4, list("abcd"))


@pytest.fixture
def instances(tmp_path):
    """Of 64 pictures: (args, data, f, Instances)."""
    args = arguments("--features", "random", "--k", 5, "--root", tmp_path, "--batch", 16, classes=4)
    data, f = toy("toy", "train", 32, tmp_path, False), icgan.feature_network(args)
    return args, data, f, icgan.prepare(args, f, data)


@torch.no_grad()
def test_prepared_once(instances, tmp_path):
    """Features of the pictures and of their mirror images; the next run reads them from the cache."""
    args, data, f, found = instances
    x = icgan.pixels(args, data, torch.arange(64))
    assert torch.allclose(x, data.images.permute(0, 3, 1, 2) / 127.5 - 1, atol=1e-6)
    assert torch.allclose(found.h, f(torch.cat([x, x.flip(3)])), atol=1e-5)
    assert torch.equal(found.neighbours, icgan.nearest(found.h[:64], 5)) and torch.equal(found.labels, data.labels)
    with mock.patch.object(icgan.linear_probe, "extract", side_effect=AssertionError):
        again = icgan.prepare(args, f, data)
        assert torch.equal(again.h, found.h) and torch.equal(again.neighbours, found.neighbours)
        fewer = icgan.prepare(arguments("--k", 3, classes=4, f=f), f, data, stored=9)
        assert torch.equal(fewer.neighbours, found.neighbours[:, :3])
        assert torch.equal(fewer.pool, icgan.central(found.h[:64], 9, 0))
    args.flip_instances = False
    assert len(icgan.prepare(args, f, data).h) == 64
    args.k = 500
    assert icgan.prepare(args, f, data).neighbours.shape == (64, 63)
    data.images = data.images[:1]
    with pytest.raises(UserError, match="single"):
        icgan.prepare(args, f, data)


def test_real_pairs(instances):
    """Each instance once an epoch; a picture is one of its neighbours, mirrored or not, with the neighbour's label."""
    args, data, _, found = instances
    x = icgan.pixels(args, data, torch.arange(64))
    centres, sides, ranks = [], [], []
    for pictures, h, y in islice(icgan.pairs(args, data, found, 0), 16):
        for picture, row, label in zip(pictures, h, y, strict=True):
            i = int((found.h - row).norm(dim=1).argmin())
            both = torch.stack([x, x.flip(3)]) - picture
            side, j = divmod(int(both.flatten(2).norm(dim=2).argmin()), 64)
            assert both[side, j].abs().max() < 1e-5 and label == data.labels[j]
            ranks.append(found.neighbours[i % 64].tolist().index(j))
            centres.append(i % 64), sides.append((side, i // 64))
    assert all(sorted(centres[start : start + 64]) == list(range(64)) for start in range(0, 256, 64))
    assert min(np.bincount(ranks, minlength=5)) > 25 and len(ranks) == 256  # of 51 each
    assert min(np.bincount([2 * a + b for a, b in sides], minlength=4)) > 40  # of 64 each: two coins


def test_pieces_of_pairs(instances):
    """Two pieces, or two ranks, see the halves of the batch; any batch can be had without those before."""
    args, data, _, found = instances
    whole = [torch.cat([x.flatten(1), h], 1) for x, h, _ in islice(icgan.pairs(args, data, found, 0), 3)]
    join = lambda parts: torch.cat([torch.cat([x.flatten(1), h], 1) for x, h, _ in parts])
    args.accumulate = 2
    assert torch.equal(join(islice(icgan.pairs(args, data, found, 2), 2)), whole[2])
    args.accumulate, args.world, parts = 1, 2, []
    for args.rank in range(2):
        parts += islice(icgan.pairs(args, data, found, 1), 1)
    assert torch.equal(join(parts), whole[1])


def test_conditions_of_samples(instances):
    """Uniform over all instances, mirrored or not, or over the stored ones; the label is a neighbour's."""
    args, data, _, found = instances
    h, y = icgan.choose(args, found, 4000, icgan.INSTANCES, 3)
    i = torch.cdist(h, found.h).argmin(1)
    assert len(i.unique()) == 128 and torch.equal(found.h[i], h)
    own = data.labels[found.neighbours.long()][i % 64]
    assert (own == y[:, None]).any(1).all() and not (data.labels[i % 64] == y).all()
    again, other = (icgan.choose(args, found, 4000, icgan.INSTANCES, step)[0] for step in (3, 4))
    assert torch.equal(again, h) and not torch.equal(other, h)
    h, _ = icgan.choose(args, found._replace(pool=torch.tensor([5, 9])), 100, icgan.INSTANCES, 3)
    assert torch.equal(torch.cdist(h, found.h).argmin(1).unique(), torch.tensor([5, 9]))
    label_free = icgan.choose(args, found._replace(labels=None), 4000, icgan.INSTANCES, 3)
    assert len(label_free) == 1


def test_latents():
    args = arguments()
    z = icgan.prior(args, 20_000, 0, 5)
    assert torch.equal(z, icgan.prior(args, 20_000, 0, 5)) and z.shape == (20_000, 32)
    assert abs(z.mean()) < 0.01 and abs(z.std() - 1) < 0.01 and z.abs().max() > 4
    for key in ((0, 6), (1, 5)):
        assert not torch.equal(z, icgan.prior(args, 20_000, *key))
    for t, std in ((2.0, 0.8796), (1.0, 0.5396)):  # of truncated normals
        z = icgan.prior(args, 20_000, 0, 5, truncation=t)
        assert z.abs().max() <= t and z.std().item() == pytest.approx(std, abs=0.01)


# ------------------------------------------------------------ networks and losses
def test_losses_of_the_sheets_example():
    real, fake = torch.tensor([2.0, 0.5, -1, 0]), torch.tensor([-2.0, 0.5, 1, -0.25])
    assert icgan.discriminator_loss(real, fake).item() == pytest.approx(0.875 + 1.0625)
    assert icgan.discriminator_loss(real, torch.full((4,), -2.0)).item() == pytest.approx(0.875)
    assert icgan.generator_loss(fake).item() == pytest.approx(0.1875)


def test_projection_of_the_sheets_example():
    """w . phi + b + <W h, phi>; with classes [embedding, W h]."""
    D, phi = icgan.Discriminator(nn.Identity(), 3, 2, eps=None), torch.tensor([[1.0, 2, 0]])
    with torch.no_grad():
        D.linear.weight.copy_(torch.tensor([[0.5, -0.25, 1]])), D.linear.bias.fill_(0.1)
        D.map.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1]])), D.map.bias.zero_()
        assert D(phi[..., None, None], torch.tensor([[0.6, 0.8]])).item() == pytest.approx(2.3)
        half = phi[..., None, None].expand(-1, -1, 2, 1) / 2  # phi is a sum over positions
        assert D(half, torch.tensor([[0.6, 0.8]])).item() == pytest.approx(2.3)
        D = icgan.Discriminator(nn.Identity(), 4, 2, classes=3, eps=None)
        h, y, phi = torch.tensor([[0.6, 0.8]]), torch.tensor([2]), torch.tensor([[1.0, 2, 3, 4]])
        v = torch.cat([D.embed.weight[2], D.map.weight @ h[0] + D.map.bias])
        wanted = float(D.linear.weight[0] @ phi[0] + D.linear.bias + v @ phi[0])
        assert D(phi[..., None, None], h, y).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("flags", ["--preset demo", "--preset small", "--preset demo --class-conditional"])
@torch.no_grad()
def test_instances_act_through_batch_norm_alone(flags):
    args = arguments(*flags.split(), f=Width(24), classes=10 * ("class" in flags))
    G = icgan.build(args)[0].eval()
    z, h = icgan.prior(args, 1, 0, 0), F.normalize(torch.randn(2, 24))
    y = [torch.tensor([3, 3])] * (args.classes > 0)
    seen = []
    G.blocks[0].register_forward_hook(lambda m, inputs, out: seen.append(inputs))
    a, b = G(z.expand(2, -1), h, *y)
    assert not torch.allclose(a, b, atol=1e-6)
    assert torch.equal(*seen[0][0])  # the 4x4 map
    chunk = args.z_dim // G.chunks if args.hierarchical else 0
    start = args.class_dim * (args.classes > 0)
    assert seen[0][1].shape == (2, start + args.embed_dim + chunk)  # [class, h, z] in this order
    assert torch.equal(seen[0][1][:, start : start + args.embed_dim], G.map(args.h_gain * h))
    assert not chunk or torch.equal(seen[0][1][0, -chunk:], z[0, chunk : 2 * chunk])
    if args.classes:
        assert torch.equal(seen[0][1][0, :start], G.embed.weight[3])
        a, b = G(z.expand(2, -1), h[:1].expand(2, -1), torch.tensor([3, 4]))
        assert not torch.allclose(a, b, atol=1e-6)
    for block in G.blocks:
        for _, gain, bias, _, _ in block.layers:
            for layer in (gain, bias):
                icgan.parametrize.remove_parametrizations(layer, "weight")
                layer.weight[:, start : start + args.embed_dim] = 0
    a, b = G(z.expand(2, -1), h, *y)
    assert torch.allclose(a, b, atol=1e-6)


def test_averages_start_as_copies_and_take_the_buffers_along():
    network = nn.BatchNorm1d(1)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9999), use_buffers=True)
    for value, start in ((1.0, True), (2.0, False)):
        with torch.no_grad():
            network.weight.fill_(value), network.running_mean.fill_(value)
        if start:
            average.n_averaged.zero_()
        average.update_parameters(network)
    for value in (average.module.weight, average.module.running_mean):
        assert value.item() == pytest.approx(1.0001, abs=1e-6)


def test_a_settled_generator():
    """Spectral norms are exact again though u and v were averaged; samples do not depend on their batch."""
    args = arguments(f=Width(24), classes=0)
    G = icgan.build(args)[0]
    average = AveragedModel(G, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    average.update_parameters(G)
    z, h = icgan.prior(args, 16, 0, 0), F.normalize(torch.randn(16, 24))
    with torch.no_grad():
        for p in G.parameters():
            p.normal_(std=0.1)
        G.train()
        for _ in range(100):
            icgan.power_iteration(G)
        for _ in range(20):
            G(z, h)
        for _ in range(30):
            average.update_parameters(G)
    settled = icgan.settle(average)
    assert not settled.training and not any(p.requires_grad for p in settled.parameters())
    for layer in (m for m in settled.modules() if icgan.parametrize.is_parametrized(m)):
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)
    assert torch.allclose(settled(z, h)[:1], settled(z[:1], h[:1]), atol=1e-5)
    norms = [[m for m in n.modules() if isinstance(m, nn.BatchNorm2d)] for n in (settled, G)]
    for a, b in zip(*norms, strict=True):  # they were 1 at first
        assert torch.allclose(a.running_var, torch.lerp(b.running_var, torch.ones(()), 0.9**30), rtol=1e-3)


# ------------------------------------------------------------ the loop
@pytest.fixture
def train(monkeypatch, tmp_path):
    """train(*flags) on noise, without pictures and evaluation; returns its networks and what happened on the way.

    events: per optimiser step of G or D its name, learning rate, betas, and for each network the parameters before,
    after, and the gradients that were there. judged: what went into D.
    """
    monkeypatch.setattr(icgan, "load", toy)
    for name in ("sample", "evaluate", "picture"):
        monkeypatch.setattr(icgan, name, lambda *args, **options: None)
    build = icgan.build

    def flat(network, of=lambda p: p):
        return torch.cat(
            [torch.zeros(p.numel()) if of(p) is None else of(p).detach().flatten() for p in network.parameters()]
        )

    def run(*flags, prepare=lambda *networks: None, **changes):
        events, judged, networks = [], [], {}
        args = arguments("--features", "random", "--batch", 8, "--steps", 1, "--log-every", 100, "--k", 5, *flags)
        vars(args).update({"out": tmp_path / str(len(list(tmp_path.iterdir()))), "root": tmp_path / "root"} | changes)

        def remember(args, fresh=False):
            networks.update(zip("GD", build(args), strict=True))
            prepare(*networks.values())
            networks["D"].register_forward_hook(lambda m, inputs, out: judged.append(inputs))
            return list(networks.values())

        monkeypatch.setattr(icgan, "build", remember)

        def before(optimizer, *_):
            group = optimizer.param_groups[0]
            owner = {id(p): name for name, network in networks.items() for p in network.parameters()}
            grads = {name: flat(network, lambda p: p.grad) for name, network in networks.items()}
            training = all(m.training for m in networks["G"].modules() if isinstance(m, nn.BatchNorm2d))
            event = {"of": owner[id(group["params"][0])], "lr": float(group["lr"]), "betas": group["betas"]}
            event |= {"before": {k: flat(n).clone() for k, n in networks.items()}, "eps": group["eps"]}
            events.append(event | {"grads": grads, "training": training})

        def after(optimizer, *_):
            events[-1]["after"] = {name: flat(network).clone() for name, network in networks.items()}

        handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
        try:
            icgan.train(args)
        finally:
            for handle in handles:
                handle.remove()
        return args, networks, events, judged

    return run


def test_a_step(train):
    """D twice, then G; each moves alone, and hears no other; other pictures, latents and instances each time."""
    args, _, events, judged = train("--d-steps", 2, "--lr-g", 1e-4, "--lr-d", 3e-4, adam_eps=1e-6)
    assert [event["of"] for event in events] == ["D", "D", "G"]
    for event in events:
        moved = {name for name in "GD" if not torch.equal(event["before"][name], event["after"][name])}
        assert moved == {event["of"]} and event["training"]
        assert event["lr"] == pytest.approx({"D": 3e-4, "G": 1e-4}[event["of"]]) and event["eps"] == 1e-6
        assert tuple(event["betas"]) == args.betas
    for event in events[:2]:
        assert event["grads"]["G"].norm() == 0
    assert torch.equal(events[2]["grads"]["D"], events[1]["grads"]["D"])  # G's step gives D none
    judged = judged[:3]  # what follows is the log's
    assert [len(x) for x, _ in judged] == [16, 16, 8]  # real and drawn in one batch; then drawn ones alone
    x, h = (torch.cat(part) for part in zip(*judged, strict=True))
    assert len(x.flatten(1).unique(dim=0)) > 30 and len(h.unique(dim=0)) > 25
    assert not judged[0][0].requires_grad and judged[2][0].requires_grad and not h.requires_grad
    data = icgan.training_set(args)
    instances, pictures = icgan.prepare(args, args.f, data), icgan.pixels(args, data, torch.arange(64))
    pictures = torch.cat([pictures, pictures.flip(3)]).flatten(1)
    for x, h in judged[:2]:  # a real picture is beside the instance whose neighbour it is; the drawn ones have others
        i, j = torch.cdist(h[:8], instances.h).argmin(1) % 64, torch.cdist(x[:8].flatten(1), pictures).argmin(1) % 64
        assert (instances.neighbours[i] == j[:, None]).any(1).all()
        assert not torch.equal(h[:8].unique(dim=0), h[8:].unique(dim=0))
    assert not any(p.requires_grad or p.grad is not None for p in args.f.parameters())


def test_with_classes(train):
    args, networks, _, judged = train("--class-conditional")
    assert args.classes == 4
    _, _, y = judged[0]
    assert y.shape == (16,) and networks["D"].embed.parametrizations.weight.original.shape == (4, 32)
    assert torch.load(args.out / "checkpoint.pt", weights_only=True)["config"]["class_conditional"]


def test_no_label_without_classes(train, monkeypatch):
    weights = []
    for labels in (torch.arange(64) % 4, torch.zeros(64).long(), None):
        monkeypatch.setattr(icgan, "load", lambda *args, labels=labels: icgan_replace(toy(*args), labels))
        _, networks, _, _ = train("--steps", 2)
        weights.append(torch.cat([p.flatten() for n in networks.values() for p in n.parameters()]))
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


def icgan_replace(data, labels):
    data.labels = labels
    return data


def test_the_generator_hears_d_after_its_step(train):
    """G's gradient, from L_G and from what D weighs now, not from what it weighed before its step."""
    _, networks, events, judged = train("--lr-g", 0)
    G, D = networks.values()
    x_hat, *c = (part.detach() for part in judged[1])
    leaf = x_hat.clone().requires_grad_(True)

    def gradient():
        (found,) = torch.autograd.grad(icgan.generator_loss(D(leaf, *c)), leaf)
        return found

    now = gradient()
    nn.utils.vector_to_parameters(events[0]["before"]["D"], D.parameters())
    assert not torch.allclose(gradient(), now, rtol=1e-2)
    args = arguments(classes=0)
    z = icgan.prior(args, 8, icgan.LATENTS, 1)
    for norm in (m for m in G.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.train()  # but not the spectral norms, which would iterate
    assert torch.allclose(G(z, *c), x_hat, atol=1e-5)
    parameters = list(G.parameters())
    found = torch.autograd.grad(G(z, *c), parameters, now, allow_unused=True)
    found = torch.cat(
        [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(parameters, found, strict=True)]
    )
    (heard,) = (event["grads"]["G"] for event in events if event["of"] == "G")
    assert float((found - heard).norm()) <= 1e-4 * float(heard.norm()) > 0


def test_one_power_iteration_a_step(train):
    calls = []
    iterate = _SpectralNorm._power_method
    spy = lambda self, *args: calls.append(self) or iterate(self, *args)
    with mock.patch.object(_SpectralNorm, "_power_method", spy):
        _, networks, _, _ = train("--d-steps", 2, prepare=lambda *_: calls.clear())
    for network in networks.values():
        own = [m for m in network.modules() if isinstance(m, _SpectralNorm)]
        assert own and all(sum(call is m for call in calls) == 3 for m in own)


def test_pieces_add_up_to_the_batch(train):
    """Four pieces give the gradients of one batch, where batch norm does not look at the batch. In float64: in float32
    a piece rounds otherwise than the batch, and a ReLU that flips by it moves up to 0.3 % of a gradient."""

    def freeze(*networks):
        double = lambda module, inputs: tuple(x.double() for x in inputs)
        for module in (m for network in networks for m in network.double().modules()):
            if isinstance(module, nn.BatchNorm2d):
                module.eval().train = lambda mode=True: None
        for module in (*networks, networks[1].linear):  # pictures, h and phi are float32
            module.register_forward_pre_hook(double)

    runs = [train("--accumulate", n, "--lr-d", 0, prepare=freeze)[2] for n in (1, 4)]
    for whole, pieces in zip(*runs, strict=True):
        a, b = (event["grads"][whole["of"]] for event in (whole, pieces))
        assert a.dtype == torch.float64 and whole["of"] == pieces["of"]
        assert float((a - b).norm()) <= 1e-9 * float(a.norm()) > 0


def test_steps_do_not_depend_on_how_often_they_are_logged(train):
    often, seldom = (train("--steps", 3, "--log-every", n)[1] for n in (1, 100))
    for name in "GD":
        a, b = (run[name].state_dict() for run in (often, seldom))
        differ = [key for key in a if not torch.equal(a[key], b[key])]
        assert not differ, f"{name}: {differ[:3]}"


def test_watched_numbers(train):
    args, *_ = train("--steps", 2, "--log-every", 1)
    row = json.loads((args.out / "log.jsonl").read_text().splitlines()[-1])
    assert {"step", "loss_d", "loss_g", "real", "fake", "gap", "pairing", "lr", "img_per_s"} == set(row)


def test_the_checkpoint_knows_the_best(train, monkeypatch):
    """Else a run that was killed and goes on would put a worse network into best.pt."""
    values = iter((3.0, 5.0, 2.0))
    monkeypatch.setattr(icgan, "judge_samples", lambda *args, **options: {"fd": next(values)})
    args, *_ = train("--steps", 3, "--eval-every", 1)
    for name in ("best.pt", "checkpoint.pt"):
        state = torch.load(args.out / name, weights_only=True)
        assert (state["step"], state["best"]) == (3, 2.0), name


def test_conditioning_gap():
    """Of samples that are the instances' own pictures: one less the cosine with another; of deaf samples: 0."""
    args = arguments("--features", "random")
    f, x = icgan.feature_network(args), torch.rand(16, 3, 32, 32)
    h = f(x)
    assert torch.allclose(icgan.gap(f, x, h), 1 - (h * h.roll(1, 0)).sum(1), atol=1e-5)
    assert icgan.gap(f, x[:1].expand(16, -1, -1, -1), h).mean().item() == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------ pictures, numbers, and the whole
def untile(path, columns):
    """The 32-pixel pictures of a sheet, float [rows, columns, 3, 32, 32] in [-1, 1]."""
    sheet = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 127.5 - 1
    rows = [sheet[:, 34 * row + 2 :][:, :32] for row in range((sheet.shape[1] - 2) // 34)]
    return torch.stack([torch.stack([row[..., 34 * c + 2 :][..., :32] for c in range(columns)]) for row in rows])


@pytest.mark.parametrize("flags", [(), ("--class-conditional",)])
def test_the_whole_run(monkeypatch, tmp_path, flags):
    """Training, pictures and numbers, then `sample --condition`: what stands where, and one feature network in all."""
    monkeypatch.setattr(icgan, "load", toy)
    made, alive = [], []
    initialise = icgan.Features.__init__

    def spy(self, *args):
        gc.collect()
        alive.append(sum(ref() is not None for ref in made))
        initialise(self, *args)
        made.append(weakref.ref(self))

    monkeypatch.setattr(icgan.Features, "__init__", spy)
    judge, probe = {"fd_random": 1.0}, {"probe_top1": 0.5, "untrained_probe_top1": 0.4}
    monkeypatch.setattr(icgan.linear_probe, "evaluate", lambda *args: probe)
    monkeypatch.setattr(icgan.fid, "evaluate", lambda draw, data, *args: judge | {"drawn": draw(0, 7).shape[0]})
    words = [
        "--feature-steps",
        1,
        "--batch",
        8,
        "--steps",
        2,
        "--k",
        5,
        "--stored",
        9,
        "--out",
        tmp_path / "run",
        *flags,
    ]
    args = arguments(*words, "--root", tmp_path)
    icgan.train(args)
    assert alive == [0] and sum(ref() is not None for ref in made) == 1
    f = args.f
    assert not any(m.training for m in f.modules())
    assert not any(p.requires_grad or p.grad is not None for p in f.parameters())
    metrics = json.loads((args.out / "metrics.json").read_text())
    assert metrics["instances"] == 9 and metrics["neighbours"] == 5 and metrics["drawn"] == 7
    G, _, f, data, instances, state = icgan.restore(args)
    agree = [data.labels[i] == data.labels[j] for i in range(64) for j in instances.neighbours[i]]
    assert metrics["neighbour_agreement"] == pytest.approx(float(torch.stack(agree).double().mean()))
    assert metrics["steps"] == 2 and probe.items() <= metrics.items()
    assert 0 <= metrics["condition_probe_top1"] <= 1
    assert torch.equal(state["f"]["trunk.0.weight"], f.trunk[0].weight)

    shown = instances.pool[torch.linspace(0, 8, 8).long()]
    pictures = icgan.pixels(args, data, torch.arange(64))
    near = untile(args.out / "neighbours.png", 6)
    for row, i in zip(near, shown, strict=True):
        numbers = [i, *instances.neighbours[i]]
        assert torch.allclose(row, pictures[[int(n) for n in numbers]], atol=0.01)
    samples, test = (
        untile(args.out / "samples.png", 10),
        icgan.pixels(args, toy("", "test", 32, "", False), torch.arange(8)),
    )
    assert torch.allclose(samples[:, 0], pictures[shown], atol=0.01)
    z = icgan.prior(args, 72, icgan.PICTURES, 0)
    y = [data.labels[shown].repeat_interleave(9)] if flags else []
    with torch.no_grad():
        drawn = G(z, instances.h[shown].repeat_interleave(9, 0), *y).unflatten(0, (8, 9))
        assert torch.allclose(samples[:, 1:], drawn, atol=0.01)
        for name, x in (("unseen", test), ("transfer", -test)):
            sheet = untile(args.out / f"{name}.png", 10)
            y = [(torch.arange(9) % 4).repeat(8)] if flags else []
            drawn = G(z, f(x).repeat_interleave(9, 0), *y).unflatten(0, (8, 9))
            assert torch.allclose(sheet[:, 0], x, atol=0.01) and torch.allclose(sheet[:, 1:], drawn, atol=0.01)
        rows = untile(args.out / "interpolations.png", 10)
        z = icgan.prior(args, 8, icgan.PICTURES, 1)
        y = [data.labels[shown]] if flags else []
        assert torch.allclose(rows[:, 0], G(z, instances.h[shown], *y), atol=0.01)
        assert torch.allclose(rows[:, 9], G(z, instances.h[shown].roll(-1, 0), *y), atol=0.01)


def test_pictures_of_a_folder(monkeypatch, tmp_path):
    """`sample --condition DIR` draws around its pictures, be there one or many, with nothing trained again."""
    toys = lambda name, *args: toy(name, *args) if name == "shapes" else load(name, *args)
    monkeypatch.setattr(icgan, "load", toys)
    monkeypatch.setattr(icgan, "evaluate", lambda args: None)
    words = ["--feature-steps", 1, "--batch", 8, "--steps", 1, "--k", 5, "--out", tmp_path / "run", "--root", tmp_path]
    icgan.train(arguments(*words))
    before = (tmp_path / "run/checkpoint.pt").read_bytes()
    for n in (1, 5, 30):
        (tmp_path / str(n)).mkdir()
        for i in range(n):
            noise = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / str(n) / f"{i}.png")
        args = arguments(*words, "--condition", tmp_path / str(n))
        icgan.sample(args)
        sheet, (G, _, f, *_) = untile(args.out / "transfer.png", 10), icgan.restore(args)
        assert len(sheet) == min(n, 8)
        wanted = torch.stack([torch.from_numpy(np.array(Image.open(p))) for p in (tmp_path / str(n)).iterdir()])
        wanted = wanted.permute(0, 3, 1, 2) / 127.5 - 1
        x = wanted[torch.cdist(sheet[:, 0].flatten(1), wanted.flatten(1)).argmin(1)]
        assert torch.allclose(sheet[:, 0], x, atol=0.01) and len(x.unique(dim=0)) == len(x)
        with torch.no_grad():
            z = icgan.prior(args, 9 * len(x), icgan.PICTURES, 0)
            drawn = G(z, f(x).repeat_interleave(9, 0)).unflatten(0, (len(x), 9))
        assert torch.allclose(sheet[:, 1:], drawn, atol=0.01)
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before


# ------------------------------------------------------------ it learns
STEPS = 150


@pytest.fixture
def one_thread():
    """So that the time does not depend on what else the machine does: threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@torch.no_grad()
def heard(args, data, f, instances, G):
    """The conditioning gap of samples, as a share of that of the instances' neighbours: 0 for a deaf G."""
    x, h = icgan.generate(args, G, instances, 0, 500)
    rows = torch.arange(500)
    near = icgan.pixels(args, data, instances.neighbours[rows, 0].long())
    return float(icgan.gap(f, x, h).mean() / icgan.gap(f, near, instances.h[rows]).mean())


def test_it_learns(monkeypatch, tmp_path, root, one_thread):
    """The demo, shortened, on fewer pictures: samples get nearer to their own instance than to others, and to the real
    pictures."""
    few = lambda name, split, size, root, skip_broken, rows=None: load(name, split, size, root, rows=slice(4000))
    monkeypatch.setattr(icgan, "load", few)
    for name in ("sample", "evaluate", "picture"):
        monkeypatch.setattr(icgan, name, lambda *args, **options: None)
    args = arguments("--feature-steps", 20, "--root", root, "--out", tmp_path, "--steps", STEPS, "--ema", 0.97)
    vars(args).update(ema_start=50, fid_samples=1000, save_every=10 * STEPS, log_every=10 * STEPS)
    icgan.train(args)
    G, D, f, data, instances, _ = icgan.restore(args)
    rows = torch.arange(500)
    with torch.no_grad():  # of real pictures, beside their instances and beside others: 0 for a D that is deaf to them
        x, h = icgan.pixels(args, data, instances.neighbours[rows, 0].long()), instances.h[rows]
        pairing = float((D(x, h) - D(x, h.roll(1, 0))).mean())
    assert pairing > 0.15, f"D does not hear the instances: {pairing:.3f}"
    first = icgan.build(args)[0]
    with torch.no_grad():
        for i in range(20):  # statistics for its batch norms
            first.train()(icgan.prior(args, 64, 50, i), *icgan.choose(args, instances, 64, 51, i))
    (before, far), (after, near) = (
        (heard(args, data, f, instances, network), icgan.judge_samples(args, network, instances, full=False))
        for network in (first.eval(), G)
    )
    far, near = (found["fd_random_1000"] for found in (far, near))
    print(f"gap {before:.3f} -> {after:.3f} of the neighbours', fd_random {far:.0f} -> {near:.0f} after {STEPS} steps")
    assert after > before + 0.4, f"G does not hear the instances: {before:.3f} -> {after:.3f}"
    assert near < 0.3 * far, f"G draws nothing: {far:.0f} -> {near:.0f}"
