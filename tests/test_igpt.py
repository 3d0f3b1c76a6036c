"""igpt.py against its paper: parameter counts, layers, both objectives, palette, cache, parity, shards; it learns.

About a minute on one core, most of it the shortened demo.
"""

import contextlib
import json
import math
import os
import socket
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from fill import fill_, values
from test_parity import GOLDEN, agree

import igpt
from common.data import load


def arguments(*flags):
    """What main() makes of a command line."""
    with mock.patch.object(sys, "argv", ["igpt.py", "--device", "cpu", "--precision", "fp32", *map(str, flags)]):
        args = igpt.parse()
    igpt.start(args)
    return args


def count(network):
    return sum(p.numel() for p in network.parameters())


def randomize(network, seed=0):
    """A head that is zero would hide everything."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[-1]) + (p.ndim == 1))
    return network


@pytest.fixture(scope="module")
def net():
    return randomize(igpt.GPT(16, 12, 3, 32, 4, classes=5))


@pytest.fixture(scope="module")
def bert():
    return randomize(igpt.GPT(16, 12, 3, 32, 4, bert=True))


IDS = torch.randint(16, (4, 12), generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------ sizes
COUNTS = {
    ("S", 1024): 76_571_648,
    ("M", 1024): 455_157_760,
    ("L", 1024): 1_362_250_752,
    ("L", 2304): 1_364_216_832,
    ("XL", 1024): 6_801_438_720,
    ("XL", 4096): 6_810_875_904,
    ("cifar", 1024): 9_968_128,
    ("tiny", 1024): 1_837_312,
}


@pytest.mark.parametrize(("model", "n"), COUNTS)
def test_parameter_counts(model, n):
    with torch.device("meta"):
        assert count(igpt.GPT(512, n, *igpt.MODELS[model])) == COUNTS[model, n]


def test_presets():
    args = arguments("--data", "imagenet")
    wanted = {"model": "L", "size": 32, "colours": 512, "batch": 128, "steps": 1_000_000, "betas": (0.9, 0.95)}
    wanted |= {"lr": 1e-3, "warmup": 10_009, "flip": False}
    assert {name: getattr(args, name) for name in wanted} == wanted
    assert [arguments("--data", "imagenet", "--model", m).lr for m in ("S", "M", "L", "XL")] == [3e-3, 3e-3, 1e-3, 3e-4]
    assert arguments("--model", "S", "--objective", "bert").lr == 1e-2
    with torch.device("meta"):
        args = arguments("--preset", "demo")
        args.device, args.classes = "meta", 0
        assert count(igpt.build(args)) == 474_048


def test_first_weights():
    torch.manual_seed(0)
    net = igpt.GPT(64, 256, 24, 512, 8)
    std = lambda p: float(p.detach().std())
    assert net.blocks[0].heads == 8
    assert std(net.blocks[3].qkv.weight) == pytest.approx(512**-0.5, rel=0.05)
    assert std(net.blocks[3].out.weight) == pytest.approx(0.00902, rel=0.05)
    for p, wanted in ((net.blocks[3].up.weight, 0.02), (net.blocks[3].down.weight, 0.02), (net.wte.weight, 0.02)):
        assert std(p) == pytest.approx(wanted, rel=0.05)
    assert std(net.wpe) == pytest.approx(0.01, rel=0.05) and std(net.sos) == pytest.approx(0.02, rel=0.2)
    assert not net.wtet.weight.any() and torch.equal(net.ln_f.weight, torch.ones(512))


# ------------------------------------------------------------ layers
def rms(x, gain):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gain


def by_hand(net, h, causal=True):
    """The network after its embedding, in numpy, float64, head by head."""
    weight = lambda module: module.weight.detach().double().numpy()
    h = h.detach().double().numpy()
    for block in net.blocks:
        q, k, v = np.split(rms(h, weight(block.norm1)) @ weight(block.qkv).T, 3, axis=2)
        attended, width = np.zeros_like(h), h.shape[2] // block.heads
        for head in range(block.heads):
            part = slice(head * width, (head + 1) * width)
            score = q[..., part] @ k[..., part].swapaxes(1, 2) * width**-0.5
            score = np.where(np.tri(h.shape[1], dtype=bool), score, -1e10) if causal else score
            p = np.exp(score - score.max(2, keepdims=True))
            attended[..., part] = p / p.sum(2, keepdims=True) @ v[..., part]
        h = h + attended @ weight(block.out).T
        a = rms(h, weight(block.norm2)) @ weight(block.up).T
        h = h + a / (1 + np.exp(-1.702 * a)) @ weight(block.down).T
    return rms(h, weight(net.ln_f))


def test_forward_by_hand(net, bert):
    start = torch.cat([net.sos.expand(4, 1, -1), net.wte.weight[IDS[:, :-1]]], 1) + net.wpe
    h = by_hand(net, start)
    logits, scores = net(IDS)
    assert np.allclose(logits.detach(), h @ net.wtet.weight.detach().numpy().T, atol=1e-4)
    assert np.allclose(scores.detach(), h.mean(1) @ net.wclf.weight.detach().numpy().T, atol=1e-4)
    hidden = (torch.rand(4, 12, generator=torch.Generator().manual_seed(2)) < 0.4).float()
    start = torch.where(hidden[..., None] == 1, 0, bert.wte.weight[IDS]) + bert.wpe
    h = by_hand(bert, start, causal=False)
    assert np.allclose(bert(IDS, hidden)[0].detach(), h @ bert.wtet.weight.detach().numpy().T, atol=1e-4)


def test_rms_norm_removes_no_mean(net):
    norm = type(net.ln_f)(2, eps=net.ln_f.eps)
    assert torch.allclose(norm(torch.tensor([3.0, 4.0])), torch.tensor([0.848528, 1.131370]), atol=1e-5)
    assert torch.allclose(norm(torch.tensor([-7.0, -7.0])), torch.tensor([-1.0, -1.0]), atol=1e-5)


def test_causality(net):
    with torch.no_grad():
        logits = net(IDS)[0]
        assert torch.equal(logits[0, 0], logits[1, 0])  # the first pixel is told from nothing
        for t in (0, 5, 11):
            changed = IDS.clone()
            changed[:, t] = (changed[:, t] + 1) % 16
            difference = (net(changed)[0] - logits).abs().amax((0, 2))
            assert difference[: t + 1].max() < 1e-6 and (t == 11 or difference[t + 1 :].min() > 1e-3), t


def test_bert_sees_both_sides_and_no_hidden_pixel(bert):
    hidden = torch.zeros(4, 12)
    hidden[:, 3] = 1
    changed = IDS.clone()
    changed[:, 11] = (changed[:, 11] + 1) % 16
    with torch.no_grad():
        logits = bert(IDS, hidden)[0]
        assert (bert(changed, hidden)[0] - logits)[:, 0].abs().min() > 0
        changed = IDS.clone()
        changed[:, 3] = (changed[:, 3] + 1) % 16
        assert torch.equal(bert(changed, hidden)[0], logits)


def test_features(net):
    """f^l: the mean of the next norm's output; f^L is what the class head takes. Probing leaves no gradient."""
    with torch.no_grad():
        found, h = net.features(IDS), net.embed(IDS)
        assert found.shape == (4, 4, 32)
        for layer, block in enumerate(net.blocks):
            wanted = rms(h.double().numpy(), block.norm1.weight.double().numpy()).mean(1)
            assert np.allclose(found[:, layer], wanted, atol=1e-4)
            h = block(h)
        assert torch.allclose(net(IDS)[1], net.wclf(found[:, 3]), atol=1e-5)
    args = arguments("--colours", 16)
    network = igpt.build(args)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    assert igpt.Features(args, network, 2)(x).shape == (2, 96) and igpt.Features(args, network)(x).shape == (2, 480)
    assert all(p.grad is None for p in network.parameters())


def test_five_layers_where_the_last_is_best(monkeypatch):
    """Features that are their layer's number, and a probe as good as the number is high."""
    args = arguments("--probe-samples", 20)
    network, x = igpt.build(args), torch.arange(5.0).repeat_interleave(96).expand(20, -1)
    monkeypatch.setattr(igpt, "load", mock.Mock())
    monkeypatch.setattr(igpt.linear_probe, "extract", lambda *words: (x, torch.zeros(20).long()))
    monkeypatch.setattr(igpt.linear_probe, "probe", lambda train, test: {"top1": float(train[0].mean())})
    monkeypatch.setattr(igpt.linear_probe, "evaluate", lambda *words: {})
    found = igpt.probe(args, network, network)
    assert found["best_layer"] == 4 and [found[f"layer_{i}_top1"] for i in range(5)] == [0, 1, 2, 3, 4]
    assert found["five_layers_top1"] == 2


# ------------------------------------------------------------ the objective
def test_a_fresh_model_knows_nothing():
    net, ids = igpt.GPT(512, 64, 2, 32, 4, classes=10), torch.randint(512, (3, 64))
    logits, scores = net(ids)
    assert igpt.generative_loss(logits, ids, torch.ones(3, 64)).item() == pytest.approx(math.log(512), abs=1e-6)
    assert F.cross_entropy(scores, torch.tensor([1, 2, 3])).item() == pytest.approx(math.log(10), abs=1e-6)


def logits_of(ce):
    """Logits of two tokens, token 0's cross-entropy being ce."""
    return torch.stack([torch.zeros_like(ce), torch.log(torch.expm1(ce))], -1)


def test_bert_averages_in_each_image_first():
    ce = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    hidden = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 0]])
    logits, ids = logits_of(ce).requires_grad_(), torch.zeros(2, 4, dtype=torch.long)
    loss = igpt.generative_loss(logits, ids, hidden)
    assert loss.item() == pytest.approx(3.5, abs=1e-5)  # a global mean would be 4.75
    loss.backward()
    assert torch.equal(logits.grad.abs().sum(2) > 0, hidden == 1)
    assert igpt.generative_loss(logits, ids, torch.ones(2, 4)).item() == pytest.approx(4.5, abs=1e-5)
    assert igpt.generative_loss(logits, ids, torch.zeros(2, 4)).item() == 0  # nothing hidden: not 0 / 0


def test_loss_in_float64():
    logits, ids = torch.randn(4, 12, 16, generator=torch.Generator().manual_seed(3)), IDS
    x = logits.double().numpy()
    ce = np.log(np.exp(x).sum(2)) - np.take_along_axis(x, ids[..., None].numpy(), 2)[..., 0]
    assert float(igpt.generative_loss(logits, ids, torch.ones(4, 12))) == pytest.approx(ce.mean(), rel=1e-5)


def test_masks():
    args = arguments("--objective", "bert")
    hidden = igpt.masks(args, 400, igpt.MASKS, 7)
    assert hidden.shape == (400, 256) and float(hidden.mean()) == pytest.approx(0.15, abs=0.005)
    assert torch.equal(hidden, igpt.masks(args, 400, igpt.MASKS, 7))
    assert not torch.equal(hidden, igpt.masks(args, 400, igpt.MASKS, 8))
    assert igpt.masks(arguments(), 2, igpt.MASKS, 7).eq(1).all()


def test_learning_rate():
    args = arguments("--steps", 110, "--warmup", 10, "--lr", 2.0)
    rates = [igpt.learning_rate(args, step) for step in range(110)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2 and rates[60] == pytest.approx(1)
    assert 0 < rates[-1] < 2e-3 and np.argmax(rates) == 9
    assert igpt.learning_rate(arguments("--lr", 2.0, "--finetune", "x"), 400) == 2


# ------------------------------------------------------------ palette
def test_nearest_colours_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    x, palette = (torch.rand(*s, generator=generator) * 2 - 1 for s in ((2, 3, 8, 8), (20, 3)))
    ids = igpt.encode(palette, x)
    pixels = x.double().numpy().transpose(0, 2, 3, 1).reshape(2, 64, 1, 3)
    assert np.array_equal(ids, ((pixels - palette.double().numpy()) ** 2).sum(3).argmin(2))
    assert torch.equal(igpt.encode(palette, igpt.decode(palette, ids)), ids)
    x[0, :, 0, 1] = 1.0  # rows first: row 0, column 1 is token 1
    assert igpt.encode(palette, x)[0, 1] == ((1 - palette) ** 2).sum(1).argmin()


def test_ends_of_the_palette(tmp_path):
    from PIL import Image

    args = arguments("--out", tmp_path)
    palette = torch.tensor([[-1.0, -1, -1], [1, 1, 1]])
    igpt.picture(args, "x.png", igpt.decode(palette, torch.tensor([[0, 1, 1, 0]])), columns=1)
    pixels = np.asarray(Image.open(tmp_path / "x.png"))
    assert pixels.shape == (64, 64, 3)  # enlarged
    assert (pixels[:32, :32] == 0).all() and (pixels[32:, 32:] == 0).all() and (pixels[:32, 32:] == 255).all()


def test_k_means():
    """Centres are the means of their pixels; none stays empty where there are enough colours."""
    generator = torch.Generator().manual_seed(0)
    true = torch.rand(8, 3, generator=generator) * 2 - 1
    pixels = true.repeat(100, 1) + 0.01 * torch.randn(800, 3, generator=generator)
    centres = igpt.learn_palette(pixels, 24, torch.Generator().manual_seed(1))
    owner = igpt.nearest(centres, pixels)
    assert len(owner.unique()) >= 20
    error = (pixels - centres[owner]).square().mean()
    assert error < 0.01**2  # of noise: each cluster of the eight is cut up further
    for k in owner.unique():
        assert torch.allclose(centres[k], pixels[owner == k].mean(0), atol=0.01)


def test_empty_clusters_start_anew():
    pixels = torch.cat([torch.full((1000, 3), -0.5), torch.full((3, 3), 0.5), torch.full((3, 3), 0.9)])
    assert any(
        len(igpt.nearest(igpt.learn_palette(pixels, 4, torch.Generator().manual_seed(s), 100), pixels).unique()) == 3
        for s in range(3)
    )


# ------------------------------------------------------------ sampling
@pytest.mark.parametrize("known", [0, 1, 6])
def test_cached_logits_are_those_of_a_full_pass(net, known):
    with torch.no_grad():
        full, cache, found = net(IDS)[0], igpt.Cache(12), []
        for t in range(known, 12):
            found.append(net(IDS[:, :t], cache=cache)[0])
        assert found[0].shape[1] == known + 1 and all(logits.shape[1] == 1 for logits in found[1:])
        assert torch.allclose(torch.cat(found, 1), full, atol=1e-5)


def test_completions_keep_what_is_known(net):
    args = arguments("--size", 8, "--colours", 16)
    args.size = 8
    network = randomize(igpt.build(args))
    ids = torch.randint(16, (3, 64))
    a, b = (igpt.complete(args, network, ids[:, :32], *key) for key in ((1, 0), (1, 0)))
    assert torch.equal(a, b) and torch.equal(a[:, :32], ids[:, :32]) and a.shape == (3, 64)
    assert not torch.equal(a, igpt.complete(args, network, ids[:, :32], 1, 1))
    args.top_k = 1  # greedy: what a full pass holds likeliest
    greedy = igpt.complete(args, network, ids[:, :0], 1, 0)
    with torch.no_grad():
        assert torch.equal(network(greedy)[0].argmax(2), greedy)


def test_probabilities():
    logits = torch.tensor([[0.25, 0.5, 0.1, 0.15]]).log()
    close = lambda found, *wanted: torch.allclose(found, torch.tensor([wanted], dtype=torch.float32), atol=1e-5)
    assert close(igpt.probabilities(logits), 0.25, 0.5, 0.1, 0.15)
    assert close(igpt.probabilities(logits, 1.0, 0, 0.7), 1 / 3, 2 / 3, 0, 0)
    assert close(igpt.probabilities(logits, 1.0, 0, 0.4), 0, 1, 0, 0)  # the first one stays
    assert close(igpt.probabilities(logits, 1.0, 3), 0.25 / 0.9, 0.5 / 0.9, 0, 0.15 / 0.9)
    assert close(igpt.probabilities(logits, 1.0, 3, 0.8), 0.25 / 0.75, 0.5 / 0.75, 0, 0)  # of what top-k left
    p = np.array([0.25, 0.5, 0.1, 0.15]) ** 2
    assert close(igpt.probabilities(logits, 0.5), *(p / p.sum()).tolist())


# ------------------------------------------------------------ parity with Hugging Face's ImageGPT
@torch.no_grad()
@pytest.mark.parametrize(("case", "fused"), [("22", None), ("22_split", {"qkv": (3, 1)})])
def test_parity(case, fused):
    net, table = fill_(igpt.GPT(64, 64, 3, 64, 4), fused), values((65, 64))
    net.wte.weight.copy_(table[:64]), net.sos.copy_(table[64])
    assert count(net) == 160_256
    ids, streams = torch.from_numpy(np.random.default_rng(1022).integers(0, 64, (2, 64))), []
    for block in net.blocks:
        block.register_forward_pre_hook(lambda module, inputs: streams.append(inputs[0]))
    net.ln_f.register_forward_hook(lambda module, inputs, out: streams.append(out))
    logits, _ = net(ids)
    agree(f"{case}.logits", logits)
    agree(f"{case}.loss", igpt.generative_loss(logits, ids, torch.ones(2, 64)))
    for i, h in enumerate(streams):
        if f"{case}.hidden_{i}" in GOLDEN:
            agree(f"{case}.hidden_{i}", h)
    for i, f in enumerate(net.features(ids).unbind(1)):
        agree(f"{case}.probe_feature_{i}", f)


# ------------------------------------------------------------ runs
TINY = ["--preset", "demo", "--size", 8, "--batch", 8, "--steps", 2, "--log-every", 1, "--warmup", 1]
TINY += ["--probe-samples", 100, "--test-samples", 50]


def trained(root, out, *flags, evaluate=False):
    """A run in this process, without its evaluation unless asked for; its checkpoint."""
    args = arguments("--root", root, "--out", out, *flags)
    with contextlib.ExitStack() as stack:
        for name in () if evaluate else ("sample", "evaluate"):
            stack.enter_context(mock.patch.object(igpt, name))
        igpt.train(args)
    return torch.load(out / "checkpoint.pt", weights_only=True)


BOTH = """
import sys
sys.path.insert(0, {root!r})
import igpt
igpt.sample = igpt.evaluate = lambda args: None
igpt.main()
"""


def trained_by_two(root, out, *flags):
    """As torchrun would start them."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        world = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        world["MASTER_PORT"] = str(free.getsockname()[1])
    flags = [str(flag) for flag in ("--device", "cpu", "--root", root, "--out", out, *flags)]
    command = [sys.executable, "-c", BOTH.format(root=str(ROOT)), *flags]
    ranks = [
        subprocess.Popen(command, env=os.environ | world | {"RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    for process in ranks:
        _, error = process.communicate(timeout=590)
        assert process.returncode == 0, error
    return torch.load(out / "checkpoint.pt", weights_only=True)


def same(a, b):
    """Weights, palette and Adam's moments, under the same names."""
    assert list(a["net"]) == list(b["net"]) and a["step"] == b["step"]
    for name, p in a["net"].items():
        assert p.shape == b["net"][name].shape and torch.allclose(p, b["net"][name], atol=1e-6), name
    for i, moments in a["optimiser"]["state"].items():
        for name, value in moments.items():
            assert torch.allclose(b["optimiser"]["state"][i][name], value, atol=1e-6), (i, name)


def test_shards_do_what_pieces_do(root, tmp_path):
    """fully_shard on two processes: the same weights and moments, whole; it and one process go on from them alike."""
    flags = [*TINY, "--horizon", 3]
    shards = trained_by_two(root, tmp_path / "shards", *flags, "--shard", "--eval-every", 2)
    same(shards, trained(root, tmp_path / "pieces", *flags, "--accumulate", 2))
    for name in ("more", "alone"):
        (tmp_path / name).mkdir()
        torch.save(shards, tmp_path / name / "checkpoint.pt")
    more = trained_by_two(root, tmp_path / "more", *flags, "--shard", "--steps", 3)
    same(more, trained(root, tmp_path / "alone", *flags, "--accumulate", 2, "--steps", 3))
    assert more["step"] == 3 and not torch.equal(more["net"]["wpe"], shards["net"]["wpe"])


def test_fine_tuning(root, tmp_path):
    """L_GEN + L_CLF from a finished run's weights; errors on held-out training images choose the best."""
    first = trained(root, tmp_path / "first", *TINY)
    flags = ["--finetune", tmp_path / "first", "--eval-every", 2, "--lr", 1e-3]
    wrap = lambda name: mock.patch.object(igpt, name, wraps=getattr(igpt, name))
    with wrap("images") as learnt, wrap("judge") as judged:
        second = trained(root, tmp_path / "second", *TINY, *flags)
    assert learnt.call_args.args[4] == slice(5000, None) and judged.call_args.args[2:] == ("train", slice(5000))
    rows = [json.loads(line) for line in (tmp_path / "second" / "log.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] - rows[0]["loss_generative"] == pytest.approx(math.log(10), abs=1e-3)  # its head is zero
    assert [row["lr"] for row in rows if "lr" in row] == [1e-3, 1e-3]
    assert second["net"]["wclf.weight"].shape == (10, 96) and second["net"]["wclf.weight"].any()
    assert torch.equal(first["net"]["palette"], second["net"]["palette"])
    change = (first["net"]["wte.weight"] - second["net"]["wte.weight"]).abs().max()
    assert 0 < change < 5e-3  # two steps of Adam from there
    best = torch.load(tmp_path / "second" / "best.pt", weights_only=True)["best"]
    assert best == min(row["error"] for row in rows if "error" in row) <= 1
    net, _ = igpt.restore(args := arguments(*TINY, *flags, "--out", tmp_path / "second"))
    assert 0 <= igpt.judge(args, net, "test", slice(50))["error"] <= 1


def test_bert_runs(root, tmp_path):
    trained(root, tmp_path, *TINY, "--objective", "bert", evaluate=True)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert "probe_top1" in metrics and not any(key.startswith("fd_") for key in metrics)
    assert (tmp_path / "samples.png").exists() and not (tmp_path / "completions.png").exists()


def test_it_learns(root, tmp_path):
    """The demo on 8x8 pixels, 150 steps: far below the colours' frequencies. Without the shift it would be near 0."""
    flags = ["--size", 8, "--steps", 150, "--save-every", 150]
    trained(root, tmp_path, *flags)
    net, _ = igpt.restore(args := arguments(*flags, "--out", tmp_path, "--root", root))
    found = float(igpt.judge(args, net, "test", slice(500))["nats_per_token"])
    ids, _ = igpt.tokens(args, net, "test", slice(500))
    p = ids.flatten().bincount(minlength=32) / ids.numel()
    unigram = float(torch.special.entr(p).sum())
    print(f"nats per token {found:.3f}, unigram {unigram:.3f}")
    assert 0.3 * unigram < found < 0.5 * unigram
    with torch.no_grad():  # the logits at a place are of that place's colour: `judge` would follow a loss that is not
        assert found == pytest.approx(float(F.cross_entropy(net(ids)[0].flatten(0, 1), ids.flatten())), rel=1e-3)
    x = load("shapes", "test", 8, root, rows=slice(8)).images.permute(0, 3, 1, 2) / 127.5 - 1
    assert (igpt.decode(net.palette, igpt.encode(net.palette, x)) - x).square().mean().sqrt() < 0.25
