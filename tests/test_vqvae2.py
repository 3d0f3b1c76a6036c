"""vqvae2.py against its paper: parameter counts, the quantiser, who hears a gradient, causality, drawing codes one
position at a time, parity with the official code, resuming inside a stage, and that it learns.

About a minute on one core, half of it the shortened demo.
"""

import json
import sys
import time
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fill import difference, fill_, inputs, values
from test_parity import GOLDEN, agree

import vqvae2
from common import data as common_data
from vqvae2 import VQVAE, Conv, Prior, Quantiser, draw


def arguments(*flags, **changes):
    """What main() makes of a command line."""
    with mock.patch.object(sys, "argv", ["vqvae2.py", "--device", "cpu", "--precision", "fp32", *map(str, flags)]):
        args = vqvae2.parse()
    vqvae2.start(args)
    vars(args).update(changes)
    return args


@pytest.fixture(autouse=True)
def one_thread():
    """So that the time does not depend on what else the machine does: threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def count(module):
    return sum(p.numel() for p in module.parameters())


# ------------------------------------------------------------ sizes
AUTOENCODERS = {  # strides from the top, residual channels: parameters (sections 3.1 and 10 of the sheet)
    ((2, 4), 32): 1_388_867,
    ((2, 4), 64): 1_716_803,
    ((2, 2), 32): 1_055_875,
    ((2, 2), 64): 1_383_811,
    ((2, 2, 8), 64): 3_270_787,
}
PRIORS = {  # a prior of the presets, without classes: parameters (section 3.2)
    (256, 256, 5, 4, 4, 8, 0, 0, 0, 0.1): 84_873_280,
    (256, 256, 5, 4, 4, 0, 0, 3, 256, 0.1): 89_762_816,
    vqvae2.PAPER["priors"][0]: 1_656_298_560,
    vqvae2.PAPER["priors"][1]: 1_384_096_768,
    vqvae2.SMALL["priors"][0]: 21_793_344,
    vqvae2.SMALL["priors"][1]: 23_304_192,
    (128, 128, 5, 4, 4, 8, 0, 3, 128, 0.1): 24_241_216,
}


def test_parameter_counts():
    with torch.device("meta"):
        check_parameter_counts()


def check_parameter_counts():
    for (strides, residual), n in AUTOENCODERS.items():
        network = VQVAE(strides, 128, residual, 2, 512, 64)
        assert count(network) == n and not [k for k, _ in network.named_parameters() if "quantiser" in k]
        buffers = sum(b.numel() for b in network.buffers())
        assert buffers == len(strides) * (512 * 64 * 2 + 512)
    for prior, n in PRIORS.items():
        assert count(Prior(512, (32, 32), 0, *prior)) == n


def test_presets_build_the_papers_networks():
    with torch.device("meta"):
        args = arguments("--data", "imagenet", classes=1000, device="meta")
        autoencoder, top, bottom = vqvae2.build(args)
        assert count(autoencoder) == 1_716_803 and (top.shape, bottom.shape) == ((32, 32), (64, 64))
        # the class moves the 20 layers, and the top's 20 of the output stack, by 2 C numbers each
        assert count(top) == 1_656_298_560 + 40 * 1000 * 1024 and count(bottom) == 1_384_096_768 + 20 * 1000 * 1024
        args = arguments("--preset", "paper", "--size", 1024, classes=0, device="meta")
        autoencoder, *priors = vqvae2.build(args)
        assert count(autoencoder) == 3_270_787 and [p.shape[0] for p in priors] == [32, 64, 128]
        assert args.steps == sum(args.stages) == 869_141 and args.levels == ("top", "middle", "bottom")
        args = arguments(
            "--preset", "demo", "--strides", 2, 2, 2, "--stages", 1, 2, "--warmup", 0, classes=3, device="meta"
        )
        assert len(vqvae2.build(args)) == 4 and args.stages == (1, 2, 2, 2) and args.steps == 7


@pytest.mark.parametrize(("strides", "size"), [((2, 4), 64), ((2, 2), 32), ((2, 2, 2), 48), ((2, 2, 8), 64)])
def test_shapes_and_decoding_by_numbers(strides, size):
    torch.manual_seed(0)
    network = VQVAE(strides, 8, 4, 2, 16, 6).eval()
    x = torch.randn(2, 3, size, size)
    e, ids, commitment = network.encode(x)
    sides = [size // int(np.prod(strides[i:])) for i in range(len(strides))]
    assert [tuple(m.shape) for m in ids] == [(2, side, side) for side in sides]
    assert [tuple(m.shape) for m in e] == [(2, 6, side, side) for side in sides] and commitment.dim() == 0
    assert network.decode(e).shape == x.shape
    assert torch.equal(network.decode_ids(ids), network.decode(e).clamp(-1, 1))
    assert network(x).shape == (2, len(strides) * 6 * 16) and network(x, 1).shape == (2, len(strides) * 6)
    assert torch.allclose(network(x, 1)[:, :6], e[0].mean((2, 3)), atol=1e-6)


# ------------------------------------------------------------ the quantiser
def quantiser(codes, **changes):
    q = Quantiser(*codes.shape)
    q.codes.copy_(codes)
    q.sums.copy_(codes)
    return q.train(), arguments(**{"restart": False, "decay": 0.99} | changes)


def test_first_step_of_the_averages():
    q, args = quantiser(torch.tensor([[0.0], [1.0], [5.0]]))
    _, ids, commitment = q(torch.tensor([0.1, 0.2, 0.9]).view(1, 1, 1, 3))
    assert ids.flatten().tolist() == [0, 0, 1] and abs(float(commitment) - 0.02) < 1e-7
    assert q.codes.flatten().tolist() == [0, 1, 5]  # the old codes are used in the step that moves them
    q.update(args, 0)
    assert np.allclose(q.counts, [1.01, 1.00, 0.99]) and np.allclose(
        q.codes.flatten(), [0.00297, 0.999, 5.0], atol=1e-4
    )


def test_averages_against_numpy():
    """Two steps of two pieces: N, m and e as in the sheet, with the sums of both pieces."""
    random = np.random.default_rng(0)
    codes = random.standard_normal((7, 3))
    q, args = quantiser(torch.tensor(codes, dtype=torch.float32), decay=0.9)
    N, m, e = np.ones(7), codes.copy(), codes.copy()
    for step in range(2):
        z = random.standard_normal((2, 4, 3, 2, 2))
        for piece in z:
            _, ids, loss = q(torch.tensor(piece, dtype=torch.float32))
        rows = z.transpose(0, 1, 3, 4, 2).reshape(-1, 3)
        nearest = ((rows[:, None] - e) ** 2).sum(2).argmin(1)
        assert np.array_equal(ids.flatten(), nearest[16:])
        assert np.isclose(float(loss), ((rows - e[nearest]) ** 2)[16:].mean(), atol=1e-6)
        one = np.eye(7)[nearest]
        N, m = 0.9 * N + 0.1 * one.sum(0), 0.9 * m + 0.1 * one.T @ rows
        smoothed = (N + 1e-5) / (N.sum() + 7e-5) * N.sum()
        assert np.isclose(smoothed.sum(), N.sum())
        e = m / smoothed[:, None]
        q.update(args, step)
        for found, expected in ((q.counts, N), (q.sums, m), (q.codes, e)):
            assert np.allclose(found, expected, atol=1e-5)


def test_a_batch_like_the_averages_moves_nothing_and_eval_never():
    q, args = quantiser(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
    z = q.codes.T.reshape(1, 2, 1, 2)
    before = [b.clone() for b in q.buffers()]
    for step in range(5):
        q(z)
        q.update(args, step)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(before, q.buffers(), strict=True))
    before = [b.clone() for b in q.buffers()]
    q.eval()(torch.randn(2, 2, 3, 3))
    assert not q.seen and all(torch.equal(a, b) for a, b in zip(before, q.buffers(), strict=True))


def test_straight_through():
    q, _ = quantiser(torch.randn(5, 4))
    z = torch.randn(2, 4, 3, 3, requires_grad=True)
    e, ids, _ = q(z)
    e.sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z)) and torch.equal(e, q.look_up(ids))
    assert q.codes.grad is None and not q.codes.requires_grad
    e, _, commitment = q(z, quantise=False)
    assert torch.equal(e, z) and commitment == 0


def test_what_the_log_says_of_a_codebook():
    q, args = quantiser(torch.eye(512)[:, :16] * 9)
    for rows, expected in ((torch.eye(16)[:4] * 9, 4.0), (torch.eye(16)[[2]] * 9, 1.0)):
        q(rows.T.reshape(1, 16, 1, -1))
        assert abs(float(q.update(args, 0)["perplexity"]) - expected) < 1e-3


def test_restarts():
    """Codes that are hardly chosen become z of the batch, others stay what the averages make of them."""
    torch.manual_seed(0)
    codes, z = torch.randn(6, 3), 0.1 * torch.randn(4, 3, 4, 4)
    codes[4:] += 100
    plain, restarted = (quantiser(codes, restart=restart) for restart in (False, True))
    for q, args in (plain, restarted):
        q.counts[4:] = 0.01
        q(z)
        q.update(args, 3)
    rare = restarted[0].codes[4:]
    assert torch.equal(plain[0].codes[:4], restarted[0].codes[:4])
    rows = z.permute(0, 2, 3, 1).reshape(-1, 3)
    assert (rare[:, None] == rows).all(2).any(1).all() and not torch.equal(rare[0], rare[1])
    tau = 0.03 * 64 / 6
    assert torch.allclose(restarted[0].counts[4:], torch.tensor(tau))
    assert torch.allclose(restarted[0].sums[4:], tau * rare)
    q, args = plain
    q(z)
    q.update(args, 4, fresh=True)
    assert (q.codes[:, None] == rows).all(2).any(1).all()
    assert torch.equal(tau * q.codes, q.sums) and torch.equal(q.counts, torch.full((6,), tau))


def test_restarts_are_of_the_seed_and_the_step():
    """With fewer z than codes as well; and two ranks do what one does with their batches as two pieces."""
    torch.manual_seed(0)
    codes, pieces = torch.randn(20, 3), torch.randn(2, 1, 3, 2, 3)

    def after(number, first=0, world=1, seed=0):
        q, args = quantiser(codes, restart=True, seed=seed, world=world)
        q.counts[5:] = 0.0
        for z in pieces[first:] if world == 1 else pieces[first : first + 1]:
            q(z)
        return q, q.update(args, number)

    (one, found), (again, _) = after(3), after(3)
    assert one.codes.isfinite().all() and torch.equal(one.codes, again.codes) and found["dead"] > 6
    assert not torch.equal(one.codes, after(4)[0].codes) and not torch.equal(one.codes, after(3, seed=1)[0].codes)
    sent = []  # what each rank would add, and what the first one's z are
    dist = mock.Mock(all_reduce=lambda t: sent.append(t.clone()), broadcast=lambda t, _: sent.append(t.clone()))
    with mock.patch.object(vqvae2, "dist", dist):
        after(3, 0, 2), after(3, 1, 2)
    for rank in range(2):
        dist.all_reduce = lambda t, other=sent[2 - 2 * rank]: t.add_(other)
        dist.broadcast = lambda t, _: t.copy_(sent[1])
        with mock.patch.object(vqvae2, "dist", dist):
            q, values_ = after(3, rank, 2)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(one.buffers(), q.buffers(), strict=True))
        assert all(torch.allclose(found[k], values_[k]) for k in found)


def touched(network):
    return {name for name, part in network.named_children() for p in part.parameters() if p.grad is not None} | {
        f"{name}.{i}"
        for name, part in network.named_children()
        for i, level in part.named_children()
        if any(p.grad is not None and p.grad.abs().sum() > 0 for p in level.parameters())
    }


def test_who_hears_a_commitment_loss():
    """The bottom's reaches all that made the bottom's z, through the quantised top too; the top's only the top's."""
    torch.manual_seed(0)
    network, losses = VQVAE((2, 4), 8, 4, 2, 16, 6), []
    for quantiser_ in network.quantisers:
        quantiser_.register_forward_hook(lambda module, args, out: losses.append(out[2]))
    for level, expected in ((1, {"heads.0", "heads.1", "encoders.0", "encoders.1", "decoders.0"}), (0, None)):
        network.zero_grad()
        losses.clear()
        network.encode(torch.randn(2, 3, 32, 32))
        losses[level].backward()
        heard = {name for name in touched(network) if "." in name}
        assert heard == (expected or {"heads.0", "encoders.0", "encoders.1"})


def test_losses():
    x, x_hat = np.random.default_rng(0).standard_normal((2, 2, 3, 4, 4))
    mse = torch.tensor(((x - x_hat) ** 2).mean())
    assert np.isclose(float(vqvae2.vqvae_loss(mse, torch.tensor(0.5), 0.25)), ((x - x_hat) ** 2).mean() + 0.125)
    logits = np.random.default_rng(1).standard_normal((2, 5, 3, 3))
    ids = np.random.default_rng(2).integers(0, 5, (2, 3, 3))
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -np.take_along_axis(log_p, ids[:, None], 1).mean()
    assert np.isclose(float(vqvae2.prior_loss(torch.tensor(logits), torch.tensor(ids))), expected, atol=1e-6)


def test_the_autoencoders_loss_is_made_of_its_parts():
    """Commitment summed over levels, beta 0.25 by default, against the images themselves."""
    args = arguments(classes=0)
    network, x = VQVAE((2, 4), 8, 4, 2, 16, 6).eval(), torch.rand(4, 3, 32, 32)
    loss, parts = vqvae2.stage_loss(args, [network], 0, x, None)
    e, _, _ = network.encode(x)
    h = network.encoders[1](x)
    z_top = network.heads[0](network.encoders[0](h))
    z_bottom = network.heads[1](torch.cat([network.decoders[0](e[0]), h], 1))
    commitment = F.mse_loss(z_top, e[0]) + F.mse_loss(z_bottom, e[1])
    assert torch.allclose(parts["commitment"], commitment) and args.beta == 0.25
    assert torch.allclose(loss, (x - network.decode(e)).square().mean() + 0.25 * commitment)


# ------------------------------------------------------------ the priors
WARM = SimpleNamespace(seed=0, device="cpu", temperature=1.0)


def prior(shape=(8, 8), classes=5, heads=4, out=1, kernel=3, c=0):
    torch.manual_seed(0)
    network = Prior(20, shape, classes, 32, 24, kernel, 2, 2, heads, out, 1 if c else 0, c, 0.0)
    return network.eval().requires_grad_(False)


def test_weights_are_normalised_after_their_mask():
    conv = Conv(3, 4, 5, causal=True)
    torch.nn.init.normal_(conv.weight)  # a mask that was applied once would now be forgotten
    torch.nn.init.normal_(conv.g)
    mask = np.ones((5, 5))
    mask[4, 2:] = 0
    v = conv.weight.detach().double().numpy() * mask
    w = conv.g.detach().double().numpy() * v / np.sqrt((v**2).sum((1, 2, 3), keepdims=True))
    x = np.random.default_rng(0).standard_normal((1, 3, 6, 6))
    padded = np.pad(x, ((0, 0), (0, 0), (4, 0), (2, 2)))
    expected = np.zeros((1, 4, 6, 6))
    for i in range(6):
        for j in range(6):
            expected[:, :, i, j] = np.einsum("bcij,ocij->bo", padded[:, :, i : i + 5, j : j + 5], w)
    found = conv(torch.tensor(x, dtype=torch.float32)).detach() - conv.bias.detach()[:, None, None]
    assert np.allclose(found, expected, atol=1e-5)
    plain = Conv(3, 4, 3)  # the start is the layer's own
    assert torch.allclose(plain.kernel(), plain.weight, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"heads": 0, "c": 12}, {"kernel": 5, "heads": 2}, {"out": 0, "c": 8}])
def test_causality(options):
    """A code changes no logits up to its own place in raster order, and some right after it; the first see none."""
    network = prior((32, 32) if not options else (8, 8), **options)
    h, w = network.shape
    ids, above = torch.randint(20, (2, h, w)), torch.randint(20, (2, h // 2, w // 2))
    y, at = torch.tensor([0, 3]), (10, 10) if h == 32 else (3, 4)
    before, changed = network(ids, above, y), ids.clone()
    changed[:, at[0], at[1]] = (changed[:, at[0], at[1]] + 1) % 20
    moved = (network(changed, above, y) - before).abs().amax((0, 1)).flatten().nonzero().flatten()
    assert moved.min() == at[0] * w + at[1] + 1
    others = network(torch.randint(20, (2, h, w)), above, y)
    assert torch.equal(others[:, :, 0, 0], before[:, :, 0, 0]) and not torch.equal(others, before)
    network.train()  # and of the gradient
    table = network.one_hot(ids).requires_grad_(True)
    with mock.patch.object(network, "one_hot", lambda _: table):
        network.stack = None
        if not options.get("c"):
            network(ids, None, y)[:, :, at[0], at[1]].sum().backward()
            reached = table.grad.abs().sum((0, 1)).flatten().nonzero().flatten()
            assert reached.max() < at[0] * w + at[1] and reached.max() == at[0] * w + at[1] - 1


def test_attention_sees_all_that_went_before():
    """Beyond the convolutions' reach: the last position hears the first through attention, not without it."""
    for heads in (4, 0):
        network, ids = prior((16, 16), heads=heads, kernel=3), torch.randint(20, (1, 16, 16))
        changed = ids.clone()
        changed[:, 0, 0] = (changed[:, 0, 0] + 1) % 20
        y = torch.tensor([0])
        assert torch.equal(network(ids, None, y)[..., -1, -1], network(changed, None, y)[..., -1, -1]) == (heads == 0)


def test_attention_against_numpy():
    """Softmax over the positions before, its output 0 at the first; keys from the block's input and output."""
    torch.manual_seed(0)
    block = vqvae2.PixelBlock((3, 3), 8, 8, 3, 0, 2, 0, 0, 0.0)
    x, place = torch.randn(1, 8, 3, 3), torch.randn(1, 2, 3, 3)
    heard = []
    block.out.register_forward_hook(lambda m, a, k, o: heard.append(k["aux"]), with_kwargs=True)
    block(x, place, None, None, None)
    query = torch.cat([x, place], 1)
    q = block.q(block.query(query))
    key = block.key(torch.cat([x, query], 1))
    flat = lambda m: m.detach().double().numpy().reshape(2, 2, 9)  # 2 heads of width 2
    q, k, v = flat(q), flat(block.k(key)), flat(block.v(key))
    expected = np.zeros((2, 2, 9))
    for head in range(2):
        for t in range(1, 9):
            score = q[head, :, t] @ k[head, :, :t] / np.sqrt(2)
            expected[head, :, t] = v[head, :, :t] @ (np.exp(score) / np.exp(score).sum())
    assert np.allclose(heard[0].detach().numpy().reshape(2, 2, 9), expected, atol=1e-5)


def test_conditions_are_heard():
    network = prior(heads=0, c=12)
    ids, above, y = torch.randint(20, (1, 8, 8)), torch.randint(20, (1, 4, 4)), torch.tensor([1])
    before, changed = network(ids, above, y), above.clone()
    changed[0, 1, 1] = (changed[0, 1, 1] + 1) % 20
    assert not torch.equal(network(ids, changed, y), before)
    assert ((network(ids, above, y + 1) - before).abs().amax((0, 1)) > 0).all()
    assert torch.equal(prior(classes=0)(ids), prior(classes=0)(ids, None, y))


@pytest.mark.parametrize("options", [{}, {"heads": 0, "c": 12}, {"kernel": 5, "out": 0}])
def test_drawing_by_positions_is_drawing_by_maps(options):
    priors, y = [prior((2, 2)), prior((4, 4), **options)], torch.tensor([0, 3, 1])
    cached, plain = (draw(WARM, priors, y, 0, 0, cached=way) for way in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(cached, plain, strict=True))
    assert all(getattr(m, key, None) is None for p in priors for m in p.modules() for key in ("kept", "past", "said"))
    given = draw(WARM, priors, y, 0, 0, given=cached[:1])
    assert torch.equal(given[1], cached[1])  # the same numbers, whether the top is drawn or given
    cold = draw(SimpleNamespace(seed=0, device="cpu", temperature=0.01), priors, y, 0, 0)
    logits = priors[0](cold[0], None, y)
    assert (logits.argmax(1) == cold[0]).float().mean() > 0.9


def test_drawing_follows_the_probabilities():
    network = prior((1, 2), heads=2)
    codes = draw(WARM, [network], torch.full((4000,), 2), 0, 0)[0][:, 0]
    p = network(torch.zeros(1, 1, 2, dtype=torch.long), None, torch.tensor([2]))[0, :, 0, 0].softmax(0)
    assert (codes[:, 0].bincount(minlength=20) / 4000 - p).abs().max() < 0.03
    first = int(codes[:, 0].mode().values)
    p = network(torch.full((1, 1, 2), first), None, torch.tensor([2]))[0, :, 0, 1].softmax(0)
    rows = codes[codes[:, 0] == first, 1]
    assert (rows.bincount(minlength=20) / len(rows) - p).abs().max() < 0.12


def test_cached_drawing_is_ten_times_as_fast():
    """On a 32x32 grid, whose plain loop takes 1024 whole maps: two are timed. tests/benchmarks has all of them."""
    torch.manual_seed(0)
    network, y = Prior(20, (32, 32), 5, 16, 16, 3, 1, 1, 2, 0, 0, 0, 0.0).eval(), torch.arange(4)
    began = time.process_time()
    codes = draw(WARM, [network], y, 0, 0)[0]
    cached = time.process_time() - began
    with torch.no_grad():
        network(codes, None, y)
        began = time.process_time()
        for _ in range(2):
            network(codes, None, y)
    plain = (time.process_time() - began) / 2 * 1024
    print(f"cached {cached:.1f} s, plain {plain:.1f} s")
    assert plain > 10 * cached


def test_rejection_keeps_what_the_judge_finds_likeliest(root):
    """Of each three samples of a class one is left, and the classes still take turns."""
    x = torch.rand(18, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    networks, labels = [SimpleNamespace(decode_ids=lambda y: x)], []
    judge = lambda x: 40 * x[:, :3, 0, 0]  # 3 classes
    args = arguments("--root", root, classes=3)
    judged = lambda sample, data, n, *how, **options: {"kept": sample(0, n)}
    noted = lambda args, priors, y, *key: labels.append(y)
    with mock.patch.object(vqvae2, "draw", noted), mock.patch.object(vqvae2.fid, "evaluate", judged):
        kept = vqvae2.judge_samples(args, networks, 6, 3, judge)["best_of_3_kept"]
    assert labels[0].tolist() == [0, 1, 2, 0, 1, 2] * 3
    sure = judge(x).softmax(1).numpy()
    for i, picture in enumerate(kept):
        best = max((i, i + 6, i + 12), key=lambda row: sure[row, i % 3])
        assert torch.equal(picture, x[best])


# ------------------------------------------------------------ parity with the official code (rosinality's, case 20)
@torch.no_grad()
def test_parity_of_the_autoencoder():
    network = fill_(VQVAE((2, 4), 32, 16, 2, 64, 16)).eval().to(memory_format=torch.channels_last)
    for q in network.quantisers:
        q.codes.copy_(values((64, 16)))
    assert count(network) == 108_947
    random = np.random.default_rng(1020)
    x = torch.from_numpy(random.standard_normal((2, 3, 64, 64)).astype(np.float32))
    ids = [torch.from_numpy(random.integers(0, 64, (2, side, side))) for side in (8, 16)]
    bottom = network.encoders[1](x)
    top = network.encoders[0](bottom)
    e, found, commitment = network.encode(x)
    agree("20.enc_bottom", bottom)
    agree("20.enc_top", top)
    agree("20.pre_top", network.heads[0](top))
    agree("20.commitment", commitment[None])
    agree("20.reconstruction", network.decode(e))
    agree("20.decode_code", network.decode([q.look_up(i) for q, i in zip(network.quantisers, ids, strict=True)]))
    for numbers, key in zip(found, ("20.ids_top", "20.ids_bottom"), strict=True):
        assert np.array_equal(numbers, GOLDEN[key])


def test_parity_of_the_averages():
    q, args = quantiser(values((32, 8)))
    assert np.allclose(q.codes, GOLDEN["20_ema.codebook_before"])
    for step, z in enumerate(inputs(20, (2, 4, 4, 8), (2, 4, 4, 8)), start=1):
        e, ids, loss = q(z.permute(0, 3, 1, 2))
        q.update(args, step)
        found = {"quantized": e.permute(0, 2, 3, 1), "diff": loss, "cluster_size": q.counts, "sums": q.sums}
        for key, value in (found | {"codebook": q.codes}).items():
            worst = difference(GOLDEN, f"20_ema.{key}_{step}", value)
            print(f"20_ema.{key}_{step}: {worst:.1e}")
            assert worst <= 1e-5
        assert np.array_equal(ids, GOLDEN[f"20_ema.ids_{step}"])


# ------------------------------------------------------------ training
TINY = ["--strides", 2, 8, "--stages", 3, 2, 3, "--batch", 4, "--warmup", 1, "--log-every", 1, "--save-every", 100]


def run(root, out, *flags, tiny=TINY, dropout=0.0):
    """Trains, without pictures and evaluation; the checkpoint."""
    args = arguments(*tiny, "--root", root, "--out", out, *flags)
    args.priors = tuple((*p[:-1], dropout) for p in args.priors)
    with mock.patch.object(vqvae2, "sample"), mock.patch.object(vqvae2, "evaluate"):
        vqvae2.train(args)
    return torch.load(out / "checkpoint.pt", weights_only=True)


def same(a, b, *names):
    return all(torch.equal(a[k][key], value) for k in names for key, value in b[k].items())


def test_dropout_resumes_and_a_stage_leaves_the_others_alone(root, tmp_path):
    whole = run(root, tmp_path / "whole", dropout=0.5)
    for steps in (2, 4, 7, 8):  # inside each stage, and on the last step
        parts = run(root, tmp_path / "parts", "--steps", steps, dropout=0.5)
    assert same(whole, parts, "autoencoder", "priors")
    plain = run(root, tmp_path / "plain")
    assert same(whole, plain, "autoencoder") and not same(whole, plain, "priors")
    after_top = run(root, tmp_path / "top", "--steps", 5, dropout=0.5)
    tops = lambda state: {"priors": {k: v for k, v in state["priors"].items() if k.startswith("0.")}}
    assert same(whole, after_top, "autoencoder") and same(tops(whole), tops(after_top), "priors")


def test_a_warm_up_that_never_ends_is_refused():
    with pytest.raises(vqvae2.UserError, match="warmup"):
        arguments("--stages", 50, 20, 30)


@pytest.mark.parametrize("bare", ["train", "test"])
def test_pictures_without_labels_are_refused_before_training(root, tmp_path, bare):
    load = common_data.load

    def loaded(data, split, *rest):
        found = load(data, split, *rest)
        found.labels = None if split == bare else found.labels
        return found

    with mock.patch.object(vqvae2, "load", loaded), pytest.raises(vqvae2.UserError, match="no labels"):
        run(root, tmp_path, "--steps", 1)


def test_the_untrained_yardstick_tells_pictures_apart(root):
    """All z of an untrained encoder choose one of the codes at first: it is measured with codes that start as z."""
    args, seen = arguments("--root", root, "--probe-samples", 200, classes=10), {}
    networks = [network.eval() for network in vqvae2.build(args)[:1]]
    x = vqvae2.read(args, "test", 6).images.permute(0, 3, 1, 2) / 127.5 - 1

    def measured(encoder, train, test, untrained, device):
        seen.update(first=encoder(x), untrained=untrained.eval()(x))
        return {}

    with mock.patch.object(vqvae2.linear_probe, "evaluate", measured):
        vqvae2.probe(args, networks)
    assert len(seen["first"].unique(dim=0)) == 1 and len(seen["untrained"].unique(dim=0)) == 6


def test_labels_move_the_priors_only(root, tmp_path):
    load = common_data.load

    def permuted(*args, **options):
        found = load(*args, **options)
        found.labels = found.labels.flip(0)
        return found

    found = {}
    for flags in ([], ["--no-conditional"]):
        for loader in (load, permuted):
            with mock.patch.object(vqvae2, "load", loader):
                found[len(flags), loader] = run(root, tmp_path / f"{len(found)}", *flags)
    assert same(found[0, load], found[0, permuted], "autoencoder")
    assert not same(found[0, load], found[0, permuted], "priors")
    assert same(found[1, load], found[1, permuted], "autoencoder", "priors")


def test_a_stage_ends_in_its_best_weights(root, tmp_path):
    """With held-out losses that rise, the weights of a stage's first measurement are what the next one builds on."""
    values_ = iter([1.0, 2.0, 3.0, 1.0, 2.0, 0.1, 0.2, 0.3])
    with mock.patch.object(vqvae2, "measure", lambda *_: next(values_)):
        kept = run(root, tmp_path / "kept", "--eval-every", 1)
    first = run(root, tmp_path / "first", "--steps", 1)
    assert same(kept, first, "autoencoder")
    best = torch.load(tmp_path / "kept" / "best.pt", weights_only=True)
    assert best["step"] == 6 and best["best"] == 0.1
    assert [json.loads(row)["stage"] for row in (tmp_path / "kept" / "log.jsonl").open() if "lr" in row] == [
        0, 0, 0, 1, 1, 2, 2, 2]  # fmt: skip


def perplexity(ids):
    p = ids.flatten().bincount(minlength=256).double().numpy() / ids.numel()
    return np.exp(-(p * np.log(p + 1e-10)).sum())


def test_it_learns(root, tmp_path):
    """The demo, shortened: codes in use say what the pictures are; both priors beat a guess by the codes' shares alone,
    the bottom's by the codes above it too."""
    flags = ["--stages", 250, 80, 150, "--batch", 32, "--warmup", 50, "--log-every", 10, "--save-every", 10_000]
    state = run(root, tmp_path, *flags, tiny=())
    rows = [json.loads(row) for row in (tmp_path / "log.jsonl").open()]
    assert rows[0]["mse"] > 0.2 and rows[24]["mse"] < 0.1  # a grey picture: 0.3; one of the ground's colour: 0.12
    assert rows[24]["perplexity_top"] > 30 and rows[24]["perplexity_bottom"] > 60
    args = arguments("--root", root, *flags, classes=10)
    networks = vqvae2.build(args)
    networks[0].load_state_dict(state["autoencoder"])
    torch.nn.ModuleList(networks[1:]).load_state_dict(state["priors"])
    x = vqvae2.read(args, "test", 1000).images.permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        entropies = [np.log(perplexity(ids)) for ids in networks[0].eval().encode(x)[1]]
    top, bottom = (vqvae2.measure(args, networks, stage) for stage in (1, 2))
    wrong = vqvae2.measure(args, networks, 2, shift=1)
    print(f"{rows[24]} entropies {entropies}, top {top}, bottom {bottom}, with the wrong top {wrong}")
    assert top < entropies[0] - 1 and bottom < entropies[1] - 1 and wrong > bottom + 1
