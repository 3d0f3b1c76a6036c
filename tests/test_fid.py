"""common/fid.py against golden values (float64 numpy, official code), closed forms, and itself on two processes."""

import hashlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from fill import difference, fill_

from common import fid
from common.data import UserError

GOLDEN = Path(__file__).parent / "golden"
metrics = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / "metrics.npz").items()}
parity = np.load(GOLDEN / "parity.npz")


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices: two threads would wait for each other more than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stats(features, batch=10_000):
    result = fid.Stats(features.shape[1])
    for part in features.split(batch):
        result.update(part)
    return result


def distance(a, b):
    return fid.frechet(stats(a), stats(b))


def golden(key):
    return pytest.approx(float(metrics[key]), rel=1e-9, abs=1e-9)


# ------------------------------------------------------------------------------------------ statistics and distance


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_stats_and_frechet_match_golden_values_in_any_batches_and_order(batch):
    real, fake = metrics["real"], metrics["fake"]
    a, b = stats(real[torch.randperm(500)], batch), stats(fake, batch)
    assert torch.allclose(a.mean, metrics["mu_real"], atol=1e-12) and torch.allclose(
        b.mean, metrics["mu_fake"], atol=1e-12
    )
    assert torch.allclose(a.cov, metrics["cov_real"], atol=1e-12) and torch.allclose(
        b.cov, metrics["cov_fake"], atol=1e-12
    )
    assert fid.frechet(a, b) == golden("fid") and fid.frechet(b, a) == golden("fid")


def test_frechet_closed_forms_and_invariances():
    real, fake = metrics["real"].double(), metrics["fake"].double()
    assert distance(real, real) == golden("fid_identical")
    assert distance(real, real + metrics["fid_shift_vec"]) == golden("fid_shift")
    assert distance(real, 2 * real) == golden("fid_scale2")
    rotation = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q
    assert distance(real @ rotation, fake @ rotation) == golden("fid")
    one, other = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [7.0]])
    assert distance(one, other) == pytest.approx((1 - 4) ** 2 + (math.sqrt(2) - math.sqrt(18)) ** 2)
    scale = torch.linspace(0.5, 2, 16)
    assert fid.frechet(stats(real), stats(fake), scale) == pytest.approx(distance(real / scale, fake / scale), rel=1e-9)


def test_frechet_of_singular_covariances():
    small = distance(metrics["small_real"], metrics["small_fake"])
    assert small == pytest.approx(float(metrics["fid_small"]), abs=2e-6)
    real, fake = (torch.cat([metrics[key], metrics[key][:, :4]], 1) for key in ("real", "fake"))
    assert distance(real, fake) == pytest.approx(float(metrics["fid_dup"]), abs=1e-6)


@pytest.mark.parametrize(("n", "expected"), [(2000, 1.104), (500, 4.416)])
def test_frechet_bias_of_finite_samples(n, expected):
    torch.manual_seed(0)
    draws = [distance(torch.randn(n, 64), torch.randn(n, 64)) for _ in range(4)]
    assert np.mean(draws) == pytest.approx(expected, rel=0.1)


def test_a_large_offset_leaves_the_covariance_where_raw_float32_moments_lose_it():
    torch.manual_seed(0)
    x = torch.randn(300, 8, dtype=torch.float64)
    offset = stats(x + 1e6, batch=7)
    assert torch.allclose(offset.cov, stats(x).cov, rtol=1e-8, atol=1e-8)
    y = (x + 1e6).float()
    raw = (y.T @ y - len(y) * torch.outer(y.mean(0), y.mean(0))) / (len(y) - 1)
    assert (raw - stats(x).cov).abs().max() > 1


def test_what_is_not_finite_or_too_few_is_refused():
    for bad in (math.nan, math.inf):
        with pytest.raises(UserError, match="finite"):
            stats(torch.tensor([[0.0], [bad]]))
    with pytest.raises(UserError, match="at least 2"):
        distance(torch.zeros(1, 4), torch.zeros(5, 4))


def test_rows_go_where_their_numbers_say():
    a = fid.Stats(16, keep=3)
    a.update(metrics["real"], numbers=torch.arange(500).flip(0))
    assert torch.equal(a.rows, metrics["real"][[499, 498, 497]])


# ------------------------------------------------------------------------------------------------- sister metrics


def test_inception_score():
    for splits in (1, 10):
        assert fid.inception_score(metrics["logits"], splits) == pytest.approx(
            metrics[f"is_{splits}"].tolist(), rel=1e-10
        )
    shifted = metrics["logits"] + torch.randn(505, 1)
    assert fid.inception_score(shifted)[0] == pytest.approx(float(metrics["is_10"][0]), rel=1e-6)
    assert fid.inception_score(torch.zeros(50, 20)) == pytest.approx((1, 0))
    assert fid.inception_score(100 * torch.eye(20).repeat(10, 1)) == pytest.approx((20, 0))


def test_kid():
    real, fake = metrics["real"], metrics["fake"]
    assert fid.kid(real, fake, subsets=1, size=1000) == (golden("kid_full"), 0)
    pairs = zip(metrics["kid_idx_real"].long(), metrics["kid_idx_fake"].long(), strict=True)
    subsets = [fid.kid(real[i], fake[j], subsets=1)[0] for i, j in pairs]
    assert subsets == pytest.approx(metrics["kid_subsets"].tolist(), rel=1e-9)
    assert np.mean(subsets) == golden("kid_mean") and np.std(subsets) == golden("kid_std")
    mean, std = fid.kid(real, fake, subsets=100, size=100)
    assert mean == pytest.approx(float(metrics["kid_full"]), abs=0.05) and 0.05 < std < 0.3
    assert (
        (mean, std) == fid.kid(real, fake, subsets=100, size=100) != fid.kid(real, fake, subsets=100, size=100, seed=1)
    )


@pytest.mark.parametrize("k", [1, 3, 5])
def test_prdc(k):
    names = ("precision", "recall", "density", "coverage")
    values = fid.prdc(metrics["real"], metrics["fake"], k)
    assert [values[name] for name in names] == pytest.approx(metrics[f"prdc_k{k}"].tolist(), abs=1e-12)
    same = fid.prdc(metrics["real"], metrics["real"])
    assert [same[name] for name in names] == pytest.approx(metrics["prdc_identical_k5"].tolist(), abs=1e-12)


def test_prdc_in_several_blocks():
    torch.manual_seed(0)
    real, fake = torch.randn(1500, 3).double(), 0.8 * torch.randn(1200, 3).double()
    r = torch.cdist(real, real).sort(1).values[:, 3]
    inside = torch.cdist(real, fake) <= r[:, None]
    values = fid.prdc(real, fake, k=3)
    assert values["precision"] == pytest.approx(inside.any(0).double().mean().item(), abs=1e-12)
    assert values["coverage"] == pytest.approx(inside.any(1).double().mean().item(), abs=1e-12)


# ------------------------------------------------------------------------------------------------------ features


def test_random_features_have_the_same_bits_everywhere():
    net = fid.RandomFeatures()
    sums = torch.tensor([[w.double().sum(), w.double().square().sum()] for w in net.filters], dtype=torch.float64)
    assert torch.allclose(sums, metrics["rnd_weight_sums"], rtol=1e-13, atol=1e-11)
    assert sum(w.numel() for w in net.filters) == 370_368
    digest = hashlib.sha256(b"".join(w.numpy().tobytes() for w in net.filters)).hexdigest()
    assert digest == "ad87e71c1ded0ae65a743974985cff8ec00886cc50fe0b10fa4a95656ec55a36"


def test_random_features_and_their_distance_match_golden_values():
    net = fid.RandomFeatures()
    features, logits = net(metrics["rnd_img"])
    assert logits is None and torch.allclose(features, metrics["rnd_feat"], rtol=1e-5, atol=2e-6)
    real, fake = stats(features[:4]), stats(features[4:])
    assert torch.allclose(net.scale(real), metrics["rnd_scale"], rtol=1e-5)
    assert fid.frechet(real, fake, net.scale(real)) == pytest.approx(float(metrics["rnd_fd"]), rel=1e-6)


def test_random_features_average_large_pictures_to_64_and_ignore_the_batch():
    torch.manual_seed(0)
    small = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    net = fid.RandomFeatures()
    assert torch.allclose(net(large)[0], net(small)[0], atol=1e-5)
    assert torch.allclose(net(small)[0][1:2], net(small[1:2])[0], atol=1e-6)


def synthetic_weights():
    """The golden file's rule: one generator, keys in sorted order; a file without the 94 num_batches_tracked."""
    net = fid.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    rng, state = np.random.default_rng(0), {}
    for key, old in sorted(net.state_dict().items()):
        s = tuple(old.shape)
        if key.endswith("num_batches_tracked"):
            continue
        if key.endswith("conv.weight"):
            value = rng.standard_normal(s) * math.sqrt(2 / math.prod(s[1:]))
        elif key == "fc.weight":
            value = rng.standard_normal(s) / math.sqrt(s[1])
        elif key.endswith("running_var"):
            value = 0.5 + rng.random(s)
        else:
            value = 0.1 * rng.standard_normal(s) + (1 if key.endswith("bn.weight") else 0)
        state[key] = torch.from_numpy(value.astype(np.float32))
    return state


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / fid.FILES[0]
    torch.save(synthetic_weights(), path)
    return path


@pytest.fixture
def published(weights_file, monkeypatch):
    """The synthetic file stands for the published one: its hash is the one that is asked for."""
    monkeypatch.setattr(fid, "SHA256", hashlib.sha256(weights_file.read_bytes()).hexdigest())
    return weights_file


@pytest.fixture
def inception(published):
    return fid.Inception(published)


def close(a, b, bound=2e-6):
    return float((a - b).abs().max()) <= bound * float(b.abs().max())


@torch.inference_mode()
def test_inception_matches_golden_features_in_all_three_resizes(inception):
    count = sum(p.numel() for p in inception.network.parameters())
    assert count == 21_785_568 and count + inception.classifier.numel() + 1008 == 23_850_960
    images, middle = metrics["inc_img"], []
    inception.network.Mixed_6d.register_forward_hook(lambda *args: middle.append(args[-1]))
    features, logits = inception(images)
    assert features.dtype == logits.dtype == torch.float32
    assert close(features, metrics["inc_feat_tf"]) and close(logits, metrics["inc_logits_tf_nobias"])
    assert close(middle[0][:, :7].flatten(1), metrics["inc_sfid_tf"].float(), 2e-3)
    half_pixel = F.interpolate(images / 255, (299, 299), mode="bilinear", align_corners=False)
    assert close(inception.network(2 * half_pixel - 1), metrics["inc_feat_pytorch"])
    cubic = F.interpolate(images.float(), (299, 299), mode="bicubic", antialias=True).clamp(0, 255)
    assert close(inception.network((cubic - 128) / 128), metrics["inc_feat_clean"], 1e-5)


def test_tensorflow_resize_matches_golden_values():
    x = metrics["resize_in"].double()
    y = fid._tf_resize(24, 17) @ x @ fid._tf_resize(20, 31).T
    assert torch.allclose(y.float(), metrics["resize_tf1_bilinear"], atol=1e-4)
    wrong = F.interpolate(x[None], (17, 31), mode="bilinear", align_corners=False)[0]
    assert torch.allclose(wrong.float(), metrics["resize_half_pixel_bilinear"], atol=3e-4 * 255)
    assert (wrong - y).abs().max() > 10
    cubic = F.interpolate(x[None].float(), (17, 31), mode="bicubic", antialias=True)[0]
    assert torch.allclose(cubic, metrics["resize_pil_bicubic"], atol=3e-4 * 255)


@torch.inference_mode()
def test_inception_parity_with_the_official_blocks(inception):
    net, bound = inception.network, json.loads(str(parity["float32_error"]))
    fill_(net, gain=math.sqrt(2))
    blocks = []
    hooks = [
        getattr(net, n).register_forward_hook(lambda *args: blocks.append(args[-1]))
        for n in ("maxpool1", "maxpool2", "Mixed_6e")
    ]

    def check(key, value):
        assert difference(parity, key, value) <= max(1e-5, 4 * bound[key])

    def resized(x):
        return 2 * F.interpolate(torch.from_numpy(x).float(), (299, 299), mode="bilinear", align_corners=False) - 1

    rng = np.random.default_rng(1024)
    check("24.pool_299", net(2 * torch.from_numpy(rng.random((2, 3, 299, 299))).float() - 1))
    for i, block in enumerate(blocks):
        check(f"24.block{i}", block)
    for hook in hooks:
        hook.remove()
    check("24.pool_64", net(resized(rng.random((2, 3, 64, 64)))))
    check("24.pool_64_blocks", net(resized(rng.random((4, 3, 8, 8)).repeat(8, 2).repeat(8, 3))))


def test_inception_is_exact_under_autocast_and_leaves_tf32_settings_alone(inception):
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.fp32_precision
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, logits = inception(metrics["inc_img"])
        random = fid.RandomFeatures()(metrics["rnd_img"])[0]
    assert close(features, metrics["inc_feat_tf"]) and close(logits, metrics["inc_logits_tf_nobias"])
    assert close(random, metrics["rnd_feat"])
    with pytest.raises(ZeroDivisionError), fid.full_precision():
        assert not torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert not torch.is_autocast_enabled("cpu")
        1 / 0  # noqa: B018
    assert before == (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.fp32_precision)


# ------------------------------------------------------------------------------------------------- the weights file


def test_a_flipped_byte_is_refused(tmp_path, monkeypatch):
    torch.save({"x": torch.arange(3)}, tmp_path / "w.pth")
    content = (tmp_path / "w.pth").read_bytes()
    monkeypatch.setattr(fid, "SHA256", hashlib.sha256(content).hexdigest())
    assert torch.equal(fid._load_weights(tmp_path / "w.pth")["x"], torch.arange(3))
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    (tmp_path / "w.pth").write_bytes(flipped)
    with pytest.raises(UserError) as error:
        fid._load_weights(tmp_path / "w.pth")
    for word in ("not the published file", str(tmp_path / "w.pth"), fid.URL, "weights=", "--fid-features"):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_are_found_under_both_names_else_fetched_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    folder, source = tmp_path / "home" / "hub" / "checkpoints", tmp_path / "source.pth"
    torch.save({"x": torch.arange(3)}, source)
    monkeypatch.setattr(fid, "SHA256", hashlib.sha256(source.read_bytes()).hexdigest())
    monkeypatch.setattr(fid, "URL", (tmp_path / "nothing.pth").as_uri())
    with pytest.raises(UserError, match=r"nothing\.pth") as error:  # offline
        fid._load_weights()
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "bad.pth").write_bytes(b"half a download")
    monkeypatch.setattr(fid, "URL", (tmp_path / "bad.pth").as_uri())
    with pytest.raises(UserError, match="hash"):
        fid._load_weights()
    assert not list(folder.iterdir())  # nothing half is left behind
    monkeypatch.setattr(fid, "URL", source.as_uri())
    fid._load_weights()
    assert [f.name for f in folder.iterdir()] == [fid.FILES[0]]
    monkeypatch.setattr(fid, "URL", "file:///nowhere")
    for name in fid.FILES:
        next(folder.iterdir()).rename(folder / name)
        assert torch.equal(fid._load_weights()["x"], torch.arange(3))
    with pytest.raises(UserError, match="no such file"):
        fid._load_weights(tmp_path / "absent.pth")


# ------------------------------------------------------------------------------------------------------- evaluate


def make_data(folder, n=250, size=32, key="abc", name="cifar10"):
    images = torch.randint(0, 256, (n, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = images.repeat_interleave(size // 8, 1).repeat_interleave(size // 8, 2)
    return SimpleNamespace(images=images, key=key, cache=folder, split="train", name=name, size=size)


def noise(chunk, n, size=32):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(chunk)) / 2


def replay(data):
    return lambda chunk, n: data.images[chunk * fid.CHUNK :][:n].permute(0, 3, 1, 2).float() / 127.5 - 1


def test_evaluate_keys_are_honest(tmp_path, capsys, monkeypatch):
    data = make_data(tmp_path)
    values = fid.evaluate(noise, data, samples=150, features="random")
    numbers = {"fd_random", "kid_random", "kid_random_std", "precision_random_k3", "recall_random_k3"}
    numbers |= {"density_random_k5", "coverage_random_k5"}
    about = {"n_real": 250, "n_fake": 150, "split": "train", "resize": "area-64", "features": "random-496"}
    assert set(values) == {f"{key}_150" for key in numbers} | set(about) and about.items() <= values.items()
    assert all(isinstance(values[f"{key}_150"], float) and math.isfinite(values[f"{key}_150"]) for key in numbers)
    assert "150 pictures are few for 496 features" in capsys.readouterr().err
    light = fid.evaluate(noise, data, samples=150, features="random", full=False)
    assert light == {"fd_random_150": values["fd_random_150"], **about}
    some = stats(torch.randn(600, 496))
    some.rows = torch.randn(20, 496)
    monkeypatch.setattr(fid, "_measure", lambda *args: some)
    monkeypatch.setattr(fid, "KEPT", 20)
    assert numbers <= set(fid.evaluate(noise, data, 50_000, "random"))  # the usual counts need no mention


def test_evaluate_the_data_set_itself_is_zero_through_uint8(tmp_path):
    levels = torch.arange(256, dtype=torch.uint8).repeat(3, 32, 4).reshape(32, 3, 32, 32)
    data = make_data(tmp_path, n=32)
    data.images = levels.permute(0, 2, 3, 1).contiguous()
    seen, net = [], fid.RandomFeatures.__call__

    def spy(self, x):
        seen.append(x)
        return net(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid.RandomFeatures, "__call__", spy)
        fid.evaluate(replay(data), data, samples=32, features="random", full=False)
    assert torch.equal(seen[0], levels) and torch.equal(seen[1], levels)
    data = make_data(tmp_path, key="noise")
    values = fid.evaluate(replay(data), data, samples=250, features="random")
    assert values["fd_random_250"] < 1e-6 and values["precision_random_k3_250"] == values["recall_random_k3_250"] == 1


def test_evaluate_with_inception(inception, published, tmp_path, monkeypatch):
    measured = []  # 2,048 features take the distance seconds, and other tests have it: look at what it is given
    monkeypatch.setattr(fid, "frechet", lambda *args: measured.append(args) or 1.5)
    data = make_data(tmp_path, n=12)
    values = fid.evaluate(noise, data, samples=12, weights=published)
    numbers = {"fid", "inception_score", "inception_score_std", "kid", "kid_std"}
    numbers |= {"precision_k3", "recall_k3", "density_k5", "coverage_k5"}
    assert {key for key in values if key.endswith("_12")} == {f"{key}_12" for key in numbers}
    assert values["fid_12"] == 1.5 and torch.all(measured[0][2] == 1)
    fake = ((noise(0, 12).clamp(-1, 1) + 1) * 127.5).round().byte()
    for given, images in zip(measured[0], (data.images.permute(0, 3, 1, 2), fake), strict=False):
        features = inception(images)[0].double()
        assert close(given.mean, features.mean(0), 1e-5) and close(given.cov, features.T.cov(), 1e-4)
    data.name = "mnist"  # a class of ImageNet says nothing about a digit
    values = fid.evaluate(noise, data, samples=12, weights=published)
    assert "kid_12" in values and not any("inception_score" in key for key in values)
    data.name = "cifar10"
    values = fid.evaluate(noise, data, samples=2, weights=published)  # too few for all but a distance
    assert {key for key in values if key.endswith("_2")} == {"fid_2"}


def test_evaluate_refuses_what_makes_no_sense(tmp_path):
    data = make_data(tmp_path, n=10)
    with pytest.raises(UserError, match="not finite"):
        fid.evaluate(lambda chunk, n: noise(chunk, n) * math.nan, data, samples=10, features="random")
    for samples in (0, 1):
        with pytest.raises(UserError, match="at least 2"):
            fid.evaluate(noise, data, samples=samples, features="random")
    with pytest.raises(AssertionError, match="sample returned"):
        fid.evaluate(lambda chunk, n: noise(chunk, n, 16), data, samples=10, features="random")
    data.images[:] = 7  # one picture many times: no unit of length, yet no crash and no nan
    data.key = "flat"
    assert math.isfinite(fid.evaluate(noise, data, samples=10, features="random", full=False)["fd_random_10"])


def test_statistics_of_the_real_set_are_cached_by_content(tmp_path, monkeypatch):
    calls, net = [], fid.RandomFeatures.__call__
    monkeypatch.setattr(fid.RandomFeatures, "__call__", lambda self, x: calls.append(len(x)) or net(self, x))

    def seen(data):
        calls.clear()
        values.append(fid.evaluate(noise, data, samples=50, features="random", full=False))
        return sum(calls) - 50

    values, data = [], make_data(tmp_path / "cache")
    assert (seen(data), seen(data)) == (250, 0) and values[0] == values[1]
    assert seen(make_data(tmp_path / "cache", key="other")) == 250
    assert seen(make_data(tmp_path / "cache", n=240)) == 240
    (file,) = [f for f in (tmp_path / "cache").iterdir() if "abc" in f.name and "-250" in f.name]
    network = fid.RandomFeatures()
    read = fid._real_statistics(network, data, first=True)
    file.unlink()
    measured = fid._real_statistics(network, data, first=True)
    assert read.n == measured.n and all(
        torch.equal(vars(read)[k], vars(measured)[k]) for k in ("mean", "scatter", "rows")
    )
    assert len(list((tmp_path / "cache").iterdir())) == 3  # and no temporary file
    good = file.read_bytes()
    for broken in (b"", b"rubbish", good[: len(good) // 2]):
        file.write_bytes(broken)
        assert (seen(data), seen(data)) == (250, 0) and values[-1] == values[0]


# --------------------------------------------------------------------------------------------------- two processes


def two_ranks(rank, folder, features):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    share = fid.Stats(5, keep=8)
    mine = slice(0, 3) if rank == 0 else slice(3, 8)
    share.update(features[mine], numbers=torch.arange(8)[mine])
    share.reduce()
    data = make_data(Path(folder) / f"cache{rank}")  # each its own: the first rank's word counts
    values = fid.evaluate(noise, data, samples=130, features="random")
    again = fid.evaluate(noise, data, samples=130, features="random", full=False)
    torch.save([share.n, share.mean, share.cov, share.rows, values, again], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path):
    features = metrics["small_real"][:8, :5].clone()
    mp.spawn(two_ranks, (str(tmp_path), features), nprocs=2)
    alone = fid.evaluate(noise, make_data(tmp_path / "alone"), samples=130, features="random")
    whole = stats(features)
    for rank in range(2):
        n, mean, cov, rows, values, again = torch.load(tmp_path / f"{rank}.pt")
        assert n == 8 and torch.equal(rows, features)
        assert torch.allclose(mean, whole.mean, atol=1e-12) and torch.allclose(cov, whole.cov, atol=1e-12)
        assert values.keys() == alone.keys() and again["fd_random_130"] == values["fd_random_130"]
        for key, value in alone.items():
            assert values[key] == (value if isinstance(value, (str, int)) else pytest.approx(value, rel=1e-6)), key
    assert len(list((tmp_path / "cache0").iterdir())) == 1 and not (tmp_path / "cache1").exists()
