"""The linear probe and k-NN against golden/probe.npz, and the protocol around them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from common import data as common_data
from common import linear_probe
from common.linear_probe import calibrate, evaluate, extract, fit, knn, probe, sgd_probe

GOLDEN = np.load(Path(__file__).parent / "golden" / "probe.npz")
STRENGTHS = ("C0p1", "C1", "C10")
L2 = torch.tensor([1 / (600 * C) for C in (0.1, 1, 10)], dtype=torch.float64)


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices: two threads would wait for each other more than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def golden(name):
    return torch.from_numpy(GOLDEN[name])


def blobs(n, dim=12, classes=5, spread=1.0, seed=0):
    """Gaussian classes: train, test = (x, y)."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=g)
    y = torch.arange(2 * n) % classes
    x = centres[y] + spread * torch.randn(2 * n, dim, generator=g)
    return (x[:n], y[:n]), (x[n:], y[n:])


def pictures(n, seed=0, classes=3, size=8, labels=True):
    """Noise whose brightness depends on the class, sorted by class like a folder."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) * classes // n
    noise = torch.randint(0, 120, (n, size, size, 3), generator=g)
    return common_data.Data(
        name="blobs",
        split="train",
        size=size,
        images=(noise + 40 * y[:, None, None, None]).to(torch.uint8),
        labels=y if labels else None,
        classes=[str(c) for c in range(classes)],
        key=f"{seed:08x}",
        cache=Path("unused"),
    )


def objective(x, y, W, b, l2):
    """Mean cross-entropy + l2/2 ||W||², in numpy float64."""
    logits = x.astype(np.float64) @ np.asarray(W, np.float64) + np.asarray(b, np.float64)
    top = logits.max(1, keepdims=True)
    log_z = np.log(np.exp(logits - top).sum(1)) + top[:, 0]
    return (log_z - logits[np.arange(len(y)), y]).mean() + l2 / 2 * (np.asarray(W, np.float64) ** 2).sum()


# ------------------------------------------------------------------------------------------------ logistic regression


def test_fit_float64_finds_the_golden_optimum():
    W, b, gradient = fit(golden("train_x").double(), golden("train_y"), L2, 7, tolerance=1e-7)
    assert gradient.max() <= 1e-7
    for s, name in enumerate(STRENGTHS):
        value = objective(GOLDEN["train_x"], GOLDEN["train_y"], W[s], b[s], float(L2[s]))
        assert abs(value - GOLDEN[f"lr_{name}_mean_objective"]) < 1e-9
        C = float(1 / (600 * L2[s]))
        assert abs(value * C * 600 - GOLDEN[f"lr_{name}_objective"]) < 1e-5
        assert (W[s].T - golden(f"lr_{name}_W")).abs().max() < 1e-3
        assert (b[s] - golden(f"lr_{name}_b")).abs().max() < 1e-3
        test = golden("test_x").double() @ W[s] + b[s]
        assert torch.equal(test.argmax(1), golden(f"lr_{name}_test_pred").long())
        assert (test.argmax(1) == golden("test_y")).double().mean() == pytest.approx(GOLDEN[f"lr_{name}_test_acc"])
        train = golden("train_x").double() @ W[s] + b[s]
        assert (train.argmax(1) == golden("train_y")).double().mean() == pytest.approx(GOLDEN[f"lr_{name}_train_acc"])


def test_fit_float32_is_within_1e_5_of_the_optimum():
    W, b, gradient = fit(golden("train_x"), golden("train_y"), L2.float(), 7)
    assert gradient.max() <= 1e-5
    for s, name in enumerate(STRENGTHS):
        value = objective(GOLDEN["train_x"], GOLDEN["train_y"], W[s], b[s], float(L2[s]))
        assert 0 <= value - GOLDEN[f"lr_{name}_mean_objective"] + 1e-9 < 1e-5
        accuracy = ((golden("test_x") @ W[s] + b[s]).argmax(1) == golden("test_y")).double().mean()
        assert accuracy == pytest.approx(GOLDEN[f"lr_{name}_test_acc"])


def test_objective_and_its_gradient_in_chunks():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 6, generator=g).double(), torch.arange(40) % 4
    W, l2 = torch.randn(2, 7, 4, generator=g).double().requires_grad_(), torch.tensor([0.1, 2.0]).double()
    expected = [
        nn.functional.cross_entropy(x @ w[:-1] + w[-1], y) + s / 2 * w[:-1].square().sum()
        for w, s in zip(W, l2, strict=True)
    ]
    (slope,) = torch.autograd.grad(sum(expected), W)
    f, gradient = linear_probe._objective(x, y, W.detach(), l2)
    assert torch.allclose(f, torch.stack(expected).detach(), atol=1e-12)
    assert torch.allclose(gradient, slope, atol=1e-12)
    copies = 2**24 // 8 // 40 + 1  # more rows than one chunk holds: the mean must not notice
    f, gradient = linear_probe._objective(x.repeat(copies, 1), y.repeat(copies), W.detach(), l2)
    assert torch.allclose(f, torch.stack(expected).detach(), atol=1e-9)
    assert torch.allclose(gradient, slope, atol=1e-9)


def test_direction_is_bfgs_with_the_dense_matrix():
    rng, history, gamma = np.random.default_rng(0), [], torch.tensor([0.3, 0.7]).double()[:, None, None]
    H = [0.3 * np.eye(6), 0.7 * np.eye(6)]
    for step in range(3):
        s = rng.standard_normal((2, 6))
        y = s + 0.2 * rng.standard_normal((2, 6))
        rho = 1 / (s * y).sum(1)
        if step == 1:
            rho[1] = 0  # a pair that one strength has dropped
        for i in range(2):
            V = np.eye(6) - rho[i] * np.outer(y[i], s[i])
            H[i] = V.T @ H[i] @ V + rho[i] * np.outer(s[i], s[i])  # Nocedal and Wright, equation 7.16
        history.append(tuple(torch.from_numpy(a).view(2, -1, k) for a, k in ((s, 2), (y, 2), (rho, 1))))
    g = rng.standard_normal((2, 6))
    d = linear_probe._direction(torch.from_numpy(g).view(2, 3, 2), history, gamma)
    assert np.allclose(d.flatten(1), [-H[i] @ g[i] for i in range(2)], atol=1e-12)


def test_steps_that_are_too_long_are_halved(monkeypatch):
    monkeypatch.setattr(linear_probe, "_direction", lambda gradient, history, gamma: -300 * gradient)
    (x, y), _ = blobs(200)
    assert fit(x, y, torch.tensor([0.1, 1.0]), 5, limit=200)[2].max() < 0.05


def test_strengths_do_not_touch_each_other():
    (x, y), _ = blobs(200)
    l2 = torch.tensor([1e-4, 1e-2, 1.0])
    together, _, _ = fit(x, y, l2, 5, tolerance=1e-6)
    for s in range(3):
        alone, _, _ = fit(x, y, l2[s : s + 1], 5, tolerance=1e-6)
        assert (together[s] - alone[0]).abs().max() < 2e-3 * alone.abs().max()


def test_permuting_classes_permutes_the_weights():
    (x, y), _ = blobs(200)
    order = torch.tensor([3, 0, 4, 1, 2])
    x, l2 = x.double(), torch.tensor([1e-2]).double()
    W, b, _ = fit(x, y, l2, 5, tolerance=1e-9)
    permuted_W, permuted_b, _ = fit(x, order[y], l2, 5, tolerance=1e-9)
    assert torch.allclose(permuted_W[..., order], W, atol=1e-6)
    assert torch.allclose(permuted_b[..., order], b, atol=1e-6)


def test_fit_says_when_it_did_not_arrive():
    (x, y), _ = blobs(200)
    assert fit(x, y, torch.tensor([1e-4]), 5, limit=3)[2] > 1e-5


def test_start_is_where_it_starts():
    (x, y), _ = blobs(200)
    l2 = torch.tensor([1e-2])
    W, b, _ = fit(x, y, l2, 5)
    again, _, gradient = fit(x, y, l2, 5, start=torch.cat([W, b[:, None]], 1), limit=0)
    assert torch.allclose(again, W, atol=1e-4)
    assert gradient < 1e-4


# -------------------------------------------------------------------------------------------------------------- probe


def test_probe_reports_and_survives_odd_features():
    train, test = blobs(400, spread=0.5)
    plain = probe(train, test)
    assert plain["top1"] > 0.9 and plain["dim"] == 12 and plain["converged"] == 1
    assert plain["edge"] == float(plain["l2"] in (pytest.approx(1e-6), 1.0)) and "top5" not in plain

    def changed(change):
        return probe((change(train[0].clone()), train[1]), (change(test[0].clone()), test[1]))

    def scaled(x):
        x[:, 0] *= 1000
        return x

    assert changed(scaled)["top1"] == plain["top1"]
    constant = changed(lambda x: torch.cat([x, torch.full((len(x), 1), 0.1)], 1))
    assert constant["top1"] == plain["top1"]
    # A feature that is constant in train but not in test must not count.
    odd_train = (torch.cat([train[0], torch.full((400, 1), 0.1)], 1), train[1])
    odd_test = (torch.cat([test[0], 100 * torch.randn(400, 1)], 1), test[1])
    assert probe(odd_train, odd_test)["top1"] == plain["top1"]


def test_probe_leaves_its_inputs_alone_and_repeats_itself():
    train, test = blobs(100)
    before = train[0].clone(), test[0].clone()
    assert probe(train, test) == probe(train, test)
    assert torch.equal(train[0], before[0]) and torch.equal(test[0], before[1])


def test_probe_with_fewer_rows_than_features():
    train, test = blobs(60, dim=100, spread=0.5)
    result = probe(train, test)
    assert result["top1"] > 0.9 and result["converged"] == 1


def test_probe_with_a_class_of_one_picture():
    (x, y), test = blobs(100, spread=0.2)
    y = torch.where(torch.arange(100) == 7, 5, y)  # a sixth class, which the held-out part cannot have
    result = probe((x, y), test)
    assert np.isfinite(result["top1"]) and result["top1"] > 0.9


def test_random_labels_give_chance():
    train, test = blobs(500)
    g = torch.Generator().manual_seed(1)
    random = probe((train[0], torch.randint(5, (500,), generator=g)), (test[0], torch.randint(5, (500,), generator=g)))
    assert abs(random["top1"] - 0.2) < 4 * (0.16 / 500) ** 0.5


def test_ties_go_to_the_stronger_regularisation():
    train, test = blobs(200, spread=0.01)  # every strength is perfect
    result = probe(train, test)
    assert result["l2"] == 1 and result["edge"] == 1 and result["top1"] == 1


def test_top5_from_a_hundred_classes_on():
    train, test = blobs(400, dim=6, classes=100, spread=0.5)
    result = probe(train, test, l2=(1e-2,))
    assert result["top1"] < result["top5"] <= 1 and result["l2"] == pytest.approx(1e-2)


def test_held_out_part_is_stratified():
    y = torch.cat([torch.zeros(1000), torch.ones(50), torch.full((3,), 2), torch.full((1,), 3)]).long()
    held = linear_probe._held_out(y, 0)
    assert [int(held[y == c].sum()) for c in range(4)] == [100, 5, 1, 0]
    assert not torch.equal(held, linear_probe._held_out(y, 1))


def test_standardisation_and_crelu_of_bigbigan(monkeypatch):
    a, read, plain_fit = torch.tensor([[1.0], [3.0], [2.0], [6.0]]), [], linear_probe.fit
    z = linear_probe._standardiser(a)(a.clone())
    assert torch.allclose(z[:, 0], torch.tensor([-1.0690, 0, -0.5345, 1.6036]), atol=1e-4)
    monkeypatch.setattr(linear_probe, "fit", lambda x, *rest, **named: read.append(x) or plain_fit(x, *rest, **named))
    (x, y), test = blobs(100)
    probe((x, y), test)
    probe((x, y), test, crelu=True)
    plain, crelu = read[1], read[3]
    assert torch.equal(crelu[:, :12], plain.clamp(min=0)) and torch.equal(crelu[:, 12:], (-plain).clamp(min=0))


def test_crelu_sees_what_a_linear_probe_cannot():
    x = torch.linspace(-2, 2, 600)[torch.randperm(600, generator=torch.Generator().manual_seed(0))][:, None]
    y = (x[:, 0].abs() > 1).long()
    train, test = (x[:400], y[:400]), (x[400:], y[400:])
    assert probe(train, test)["top1"] < 0.7
    result = probe(train, test, crelu=True)
    assert result["top1"] > 0.9 and result["dim"] == 2


# --------------------------------------------------------------------------------------------------------------- k-NN


@pytest.mark.parametrize("k", [1, 5, 20])
def test_knn_golden(k):
    labels = knn((golden("train_x"), golden("train_y")), golden("test_x"), k=k)
    assert torch.equal(labels, golden(f"knn_k{k}_pred").long())
    assert (labels == golden("test_y")).double().mean() == pytest.approx(GOLDEN[f"knn_k{k}_acc"])


def test_knn_votes_by_weight():
    """Three near neighbours outvote a nearer one if the temperature is high, and do not if it is low."""
    angle = torch.tensor([0.1, 0.4, 0.4, -0.4])
    train = (
        torch.stack([angle.cos(), angle.sin()], 1) * torch.tensor([[1.0], [5], [0.1], [2]]),
        torch.tensor([1, 0, 0, 0]),
    )
    gap = float(torch.tensor(0.1).cos() - torch.tensor(0.4).cos())  # e^(gap / T) = 3 where the vote turns
    turn = gap / np.log(3)
    assert knn(train, torch.tensor([[7.0, 0]]), k=4, temperature=1.05 * turn).tolist() == [0]
    assert knn(train, torch.tensor([[7.0, 0]]), k=4, temperature=0.95 * turn).tolist() == [1]


def test_knn_with_large_k_and_small_temperature():
    train, test = blobs(60)
    assert knn(train, test[0], k=1000).shape == (60,)
    assert torch.equal(knn(train, train[0], k=1000, temperature=1e-5), train[1])


def test_knn_in_parts_and_ties(monkeypatch):
    train = (torch.eye(3), torch.tensor([2, 1, 0]))
    assert knn(train, torch.ones(2, 3), k=3).tolist() == [0, 0]  # all three are as near: the lowest class
    train, test = blobs(300)
    whole = knn(train, test[0])
    assert torch.equal(torch.cat([knn(train, row[None]) for row in test[0]]), whole)


# --------------------------------------------------------------------------------------- extraction and the yardsticks


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.drop = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5)

    def forward(self, x):
        assert not torch.is_grad_enabled()
        return self.drop(self.norm(self.conv(x)).relu())  # [B, 6, 6, 6]


def test_extract_is_in_order_pooled_and_restores_modes():
    data, encoder = pictures(50), Encoder().train()
    encoder.norm.eval()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    x, y = extract(encoder, data, batch=7)
    assert [m.training for m in (encoder, encoder.conv, encoder.norm, encoder.drop)] == [True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    encoder.eval()
    with torch.no_grad():
        expected = encoder(data.images.permute(0, 3, 1, 2).float() / 127.5 - 1).mean((2, 3))
    assert torch.allclose(x, expected, atol=1e-6) and torch.equal(y, data.labels)


def test_extract_restores_modes_after_an_error():
    encoder = nn.Sequential(nn.Dropout(), nn.Linear(5, 5)).train()
    with pytest.raises(RuntimeError):
        extract(encoder, pictures(4))
    assert encoder.training and encoder[0].training


def test_extract_takes_a_function_and_refuses_what_is_not_finite():
    data = pictures(9)
    x, _ = extract(lambda x: x.flatten(1), data)
    assert torch.equal(((x + 1) * 127.5).round().to(torch.uint8), data.images.permute(0, 3, 1, 2).flatten(1))
    with pytest.raises(common_data.UserError, match="not finite"):
        extract(lambda x: x.flatten(1) / 0, data)


def test_calibration_sets_the_statistics_and_nothing_else():
    data, encoder = pictures(70), Encoder().eval()
    before = {name: p.clone() for name, p in encoder.named_parameters()}
    calibrate(encoder, data, batch=10)
    assert all(torch.equal(p, before[name]) for name, p in encoder.named_parameters()) and not encoder.training
    with torch.no_grad():
        activations = encoder.conv(data.images.permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert torch.allclose(encoder.norm.running_mean, activations.mean((0, 2, 3)), atol=1e-5)
    # The mean of the batches' variances lacks what the batches' means vary by: little in batches of mixed classes.
    assert torch.allclose(encoder.norm.running_var, activations.var((0, 2, 3)), rtol=0.1)


def test_evaluate_reports_the_yardsticks():
    train, test = pictures(300), pictures(150, seed=1)
    encoder = Encoder()
    result = evaluate(encoder, train, test, untrained=Encoder(), crelu=True)
    for key in ("probe_top1", "knn_top1", "untrained_probe_top1", "untrained_knn_top1", "crelu_probe_top1"):
        assert 0.5 < result[key] <= 1
    assert result["raw_pixels_probe_top1"] > 0.5 and result["raw_pixels_probe_dim"] == 192
    assert result["random_features_probe_top1"] > 0.5 and result["random_features_probe_dim"] == 496
    assert result["probe_dim"] == 6 and result["crelu_probe_dim"] == 12 and "probe_top5" not in result
    assert result["chance"] == pytest.approx(1 / 3) and (result["n_train"], result["n_test"]) == (300, 150)
    assert result["converged"] == 1 and all(isinstance(value, int | float | str) for value in result.values())


def test_large_pictures_are_averaged_to_32_for_the_raw_pixels(monkeypatch):
    measured = []

    def record(train, test, crelu=False):
        measured.append(train[0])
        return {"converged": 1.0}

    monkeypatch.setattr(linear_probe, "probe", record)
    train = pictures(30, size=64)
    result = evaluate(lambda x: x.mean((2, 3)), train, pictures(30, seed=1, size=64))
    assert [x.shape[1] for x in measured] == [3, 3072, 496] and "untrained_probe_converged" not in result
    blocks = train.images.double().view(30, 32, 2, 32, 2, 3).mean((2, 4)).permute(0, 3, 1, 2).flatten(1)
    assert torch.allclose((measured[1].double() + 1) * 127.5, blocks, atol=1e-3)


def test_labels_are_needed():
    with pytest.raises(common_data.UserError, match="label"):
        evaluate(Encoder(), pictures(9, labels=False), pictures(9))
    with pytest.raises(common_data.UserError, match="label"):
        evaluate(Encoder(), pictures(9), pictures(9, labels=False))
    assert extract(Encoder(), pictures(9, labels=False))[1] is None


# ---------------------------------------------------------------------------------------------------------- SGD probe


def test_sgd_probe_learns_from_augmented_batches_and_chooses_on_the_held_out_part():
    train, held_out, test = pictures(300), pictures(60, seed=2), pictures(150, seed=1)
    seen = []

    def encoder(x):
        seen.append(len(x))
        return x.mean((2, 3)) * torch.tensor([1.0, 100.0, 0.01])  # badly scaled

    crops = common_data.batches(train, 32, seed=0, crop=(2, 6, (0.5, 1.0), (0.75, 4 / 3), "bilinear"))
    result = sgd_probe(encoder, crops, held_out, test, steps=60)
    assert result["top1"] > 0.9 and result["rate"] in (3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0) and result["dim"] == 3
    assert seen == [60] + 60 * [64] + [150]
    pairs = ((x, y) for x, y, _ in common_data.batches(train, 32, seed=0))
    again = sgd_probe(encoder, pairs, held_out, test, steps=60, rates=(1e-9, 0.1))
    assert again["top1"] > 0.9 and again["rate"] == 0.1


# ------------------------------------------------------------------------------------------------------ two processes

WORKER = """
import json, sys
import torch, torch.distributed as dist
from test_linear_probe import measure
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=int(sys.argv[1]), world_size=2)
print(json.dumps(measure()))
dist.destroy_process_group()
"""


def measure():
    train, test = pictures(101), pictures(50, seed=1)  # odd: the shares are not equally long
    x, y = extract(Encoder(), train)
    result = evaluate(Encoder(), train, test, untrained=Encoder())
    sgd = sgd_probe(Encoder(), common_data.batches(train, 32, seed=0, flip=False), pictures(31, 2), test, steps=20)
    return {"x": x.tolist(), "y": y.tolist(), "result": result, "sgd": sgd}


def test_two_processes_measure_what_one_does(tmp_path):
    here = Path(__file__).resolve().parent
    environment = os.environ | {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path / "meet")],
            stdout=subprocess.PIPE,
            env=environment,
        )
        for rank in range(2)
    ]
    one = measure()
    first, second = (json.loads(process.communicate(timeout=120)[0]) for process in processes)
    assert first == second
    assert first["y"] == one["y"] and torch.allclose(torch.tensor(first["x"]), torch.tensor(one["x"]), atol=1e-6)
    for key, value in one["result"].items():
        assert first["result"][key] == pytest.approx(value, abs=1e-5), key
    assert first["sgd"]["top1"] == pytest.approx(one["sgd"]["top1"], abs=0.05)
