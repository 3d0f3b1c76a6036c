"""The contract that every script at the top level keeps, tried on each as a user runs it: a process of its own.

A new script joins by its name alone; what it must be told beside that to be tiny stands in FLAGS. The processes are
forked from one that has imported torch, which takes longer than most of these runs. About two minutes a script.
"""

import contextlib
import dataclasses
import importlib
import io
import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import socket
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS
from PIL import Image

STEPS = 6
COMMON = ["--device", "cpu", "--preset", "demo", "--batch", 8, "--log-every", 1, "--save-every", 2]
COMMON += ["--probe-samples", 200]
FLAGS = {  # script: further flags that make it tiny, or keep its schedule from ending with --steps
    "beta_vae": ["--metric-pairs", 2, "--metric-points", 20],
    "biggan": ["--sweep-samples", 64, "--classifier-steps", 20],
    "byol": ["--horizon", 100],
    "diffae": ["--autoencoder-steps", 1, "--code-samples", 300, "--classifier-steps", 20, "--reconstruct-samples", 10],
    "icgan": ["--feature-steps", 1, "--stored", 10],
    "igpt": ["--horizon", 100, "--test-samples", 50],
    "ldm": ["--first-steps", 1, "--first-batch", 8, "--disc-start", 0, "--sample-steps", 4],
    "projected_gan": ["--feature-steps", 2],
    "regene": ["--classifier-steps", 3, "--bank-samples", 300, "--judge-steps", 4],
    "vqgan_transformer": ["--vqgan-steps", 1, "--disc-start", 0, "--horizon", 100],
    "vqvae2": ["--stages", 2, 1, 3, "--warmup", 1, "--cas-samples", 20, "--sweep-samples", 20, "--classifier-steps", 3],
}
NO_SAMPLES = ("byol", "dim")  # they generate nothing: probes, and no FID
SUPERVISED = ("biggan", "ldm", "regene", "vqgan_transformer", "vqvae2")  # learn from labels, refuse sets without
TIMES = {"seconds", "best"}  # of a checkpoint: what may differ between equal runs


# ------------------------------------------------------------ processes
def become(script, words, cwd, stem, environment, before):
    """In the new process: what `python script words` would do, with its output in files."""
    os.chdir(cwd)
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{stem}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.argv, sys.path[0] = [f"{script}.py", *words], str(ROOT)
    if before:
        before()
    runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")


class Run:
    """A running script. `before`: a function that the process calls first."""

    def __init__(self, script, *words, cwd, before=None, environment=None):
        self.stem = cwd / f"process-{time.monotonic_ns()}"
        arguments = script, [str(word) for word in words], cwd, self.stem, environment or {}, before
        self.process = SERVER.Process(target=become, args=arguments, daemon=True)
        self.process.start()

    def wait(self, seconds=300):
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running: {self.text('out')[-500:]} {self.text('err')[-500:]}"
        return self.process.exitcode

    def text(self, name):
        path = Path(f"{self.stem}.{name}")
        return path.read_text() if path.exists() else ""

    def until(self, condition, seconds=300):
        """Wait for a condition; the process must not end before it."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "nothing happens"
            if not self.process.is_alive() and not condition():
                raise AssertionError(f"ended with {self.process.exitcode}: {self.text('err')[-2000:]}")
            time.sleep(0.02)

    def stop(self, number):
        os.kill(self.process.pid, number)
        return self.wait()


SERVER = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="session", autouse=True)
def server():
    """The process that the others are forked from: one thread each, torch and common already imported."""
    SERVER.set_forkserver_preload(
        ["pytest", "torchvision.models", "torchvision.utils", "common.fid", "common.linear_probe"]
    )
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    with mock.patch.dict(os.environ, environment):
        forkserver.ensure_running()


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request):
    return request.param


def tiny(script, root):
    fid = [] if script in NO_SAMPLES else ["--fid-samples", 64]
    return [*COMMON, *fid, *FLAGS.get(script, ()), "--root", root, "--out", "run", "--steps", STEPS]


@pytest.fixture
def start(script, root, tmp_path):
    """start(*words) begins a tiny run of the script in an empty folder, its --out being `run` there."""

    def start(*words, command="train", **options):
        return Run(script, command, *tiny(script, root), *words, **{"cwd": tmp_path} | options)

    return start


def checkpoint(folder, name="checkpoint.pt"):
    return torch.load(folder / name, weights_only=True) if (folder / name).exists() else {"step": 0}


def trained(run, folder, steps=STEPS):
    """Wait until the last checkpoint is there, and spare the pictures and the evaluation; the checkpoint."""
    seen = []

    def there():
        path = folder / "checkpoint.pt"
        stamp = path.stat().st_mtime_ns if path.exists() else None
        if stamp in (None, *seen):
            return False
        seen.append(stamp)
        return checkpoint(folder)["step"] >= steps

    run.until(there)
    run.stop(signal.SIGKILL)
    return checkpoint(folder)


def leaves(value, path=""):
    """All tensors and values of nested containers, by their path."""
    if isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            if path or key not in TIMES:
                yield from leaves(part, f"{path}/{key}")
    else:
        yield path, value


def differences(a, b):
    """The paths at which two checkpoints differ by as much as a bit."""
    a, b = dict(leaves(a)), dict(leaves(b))
    equal = lambda x, y: torch.equal(x, y) if torch.is_tensor(x) and torch.is_tensor(y) else x == y
    return sorted(set(a) ^ set(b)) + [key for key in a.keys() & b.keys() if not equal(a[key], b[key])]


def logged(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def refused(run, *words):
    """Exit status 2 and one line on stderr, beside the progress of packing, that has all the words."""
    status, lines = run.wait(), run.text("err").splitlines()
    error = "\n".join(line for line in lines if line.strip() and not line.startswith("packing "))
    assert status == 2, f"status {status}: {error}"
    assert "Traceback" not in error and len(error.splitlines()) == 1, error
    missing = [word for word in words if str(word) not in error]
    assert not missing, f"{missing} not in: {error}"
    return error


# ------------------------------------------------------------ what a run leaves
@pytest.fixture(scope="module")
def finished(script, root, tmp_path_factory):
    """A run that was never interrupted, with its evaluation."""
    cwd = tmp_path_factory.mktemp("finished")
    run = Run(script, *tiny(script, root), "--data", "shapes", cwd=cwd)
    assert run.wait(590) == 0, run.text("err")
    return cwd / "run"


def test_it_leaves_the_promised_files(finished, script):
    assert {"checkpoint.pt", "log.jsonl", "samples.png", "metrics.json"} <= {path.name for path in finished.iterdir()}
    assert not list(finished.glob("*tmp*"))
    rows = logged(finished)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all({"img_per_s", "lr"} < set(row) and any("loss" in key for key in row) for row in rows)
    assert all(isinstance(value, int | float) for row in rows for value in row.values())
    metrics = json.loads((finished / "metrics.json").read_text())
    assert {"command", "steps", "seconds", "device", "torch", "probe_top1"} <= set(metrics)
    assert metrics["steps"] == STEPS and f"{script}.py" in metrics["command"] and metrics["torch"] == torch.__version__
    assert any(key.startswith("fd_random") for key in metrics) == (script not in NO_SAMPLES)
    assert not any(key.startswith("fid") for key in metrics)
    with Image.open(finished / "samples.png") as picture:
        assert np.asarray(picture).std() > 0 and min(picture.size) >= 64
    assert checkpoint(finished)["step"] == STEPS


def interrupted(start, folder, number):
    """A run that gets a signal at some step, and the status with which it ended."""
    run, step = start(), random.randrange(1, STEPS - 1)
    run.until(lambda: (folder / "log.jsonl").exists() and len((folder / "log.jsonl").read_text().splitlines()) >= step)
    return run.stop(number), step


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_costs_nothing(start, tmp_path, finished, number, status):
    """Killed at a random step and started again, it ends in the weights of the uninterrupted run, bit for bit."""
    folder = tmp_path / "run"
    found, step = interrupted(start, folder, number)
    assert found == status
    if number != signal.SIGKILL:
        rows = logged(folder)
        assert step <= checkpoint(folder)["step"] == rows[-1]["step"] < STEPS
    assert not differences(trained(start(), folder), checkpoint(finished))
    assert [row["step"] for row in logged(folder)] == list(range(1, STEPS + 1))
    losses = lambda folder: [{k: v for k, v in row.items() if k != "img_per_s"} for row in logged(folder)]
    assert losses(folder) == losses(finished)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_writing(when=2):
    """The second checkpoint gets half its bytes."""
    save, count = torch.save, []

    def half(state, file, *args, **options):
        if "checkpoint" not in str(getattr(file, "name", file)):
            return save(state, file, *args, **options)
        count.append(file)
        if len(count) < when:
            return save(state, file, *args, **options)
        save(state, whole := io.BytesIO())
        file = file if hasattr(file, "write") else open(file, "wb")  # noqa: SIM115
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        killed()

    torch.save = half


def die_before_flushing():
    fsync, count = os.fsync, []

    def kill(number):
        count.append("checkpoint" in os.readlink(f"/proc/self/fd/{number}"))
        return killed() if sum(count) == 2 else fsync(number)

    os.fsync = kill


def die_before_renaming():
    replace, count = os.replace, []

    def kill(source, target):
        count.append("checkpoint" in str(target))
        return killed() if sum(count) == 2 else replace(source, target)

    os.replace = kill


@pytest.mark.parametrize("death", [die_while_writing, die_before_flushing, die_before_renaming])
def test_a_kill_while_a_checkpoint_is_written(start, tmp_path, finished, death):
    """The one before it is whole, the half one is in nobody's way."""
    folder = tmp_path / "run"
    assert start(before=death).wait() == -9
    assert checkpoint(folder)["step"] == 2 and len(list(folder.glob("checkpoint*"))) == 2
    assert not differences(trained(start(), folder), checkpoint(finished))
    assert [row["step"] for row in logged(folder)] == list(range(1, STEPS + 1))


# ------------------------------------------------------------ folders of pictures
@pytest.fixture(scope="module")
def pictures(script, tmp_path_factory):
    """80 pictures of two kinds, without labels; for a script that needs them in a folder a class."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(80):
        noise = np.random.default_rng(i).integers(0, 256, (3, 4, 3), dtype=np.uint8)
        place = folder / "ab"[i % 2] if script in SUPERVISED else folder
        place.mkdir(exist_ok=True)
        Image.fromarray(noise).resize((48, 40)).save(place / f"{i}.{'png' if i % 4 else 'jpg'}")
    return folder


def test_labels_that_are_not_there(script, start, tmp_path, pictures):
    if script in SUPERVISED:
        flat = tmp_path / "flat"
        flat.mkdir()
        for path in pictures.rglob("*.*"):
            shutil.copy(path, flat)
        refused(start("--data", flat), "labels", "flat")


def test_a_folder_from_first_to_last(script, start, tmp_path, pictures):
    """It trains and is evaluated, not probed without labels; again: only evaluated; more steps extend it exactly."""
    folder, words = tmp_path / "run", ["--data", pictures, "--steps", 2]
    run = start(*words)
    assert run.wait() == 0, run.text("err")
    metrics, first = json.loads((folder / "metrics.json").read_text()), checkpoint(folder)
    assert any(key.startswith("fd_random") for key in metrics) == (script not in NO_SAMPLES)
    assert any("top1" in key for key in metrics) == (script in SUPERVISED)
    log = (folder / "log.jsonl").read_text()
    for name in ("metrics.json", "samples.png"):
        (folder / name).unlink()
    run = start(*words)
    assert run.wait() == 0, run.text("err")
    assert (folder / "metrics.json").exists() and (folder / "samples.png").exists()
    assert (
        first["step"] == 2 and not differences(checkpoint(folder), first) and (folder / "log.jsonl").read_text() == log
    )
    extended = trained(start(*words, "--steps", 4), folder, 4)
    assert [row["step"] for row in logged(folder)] == [1, 2, 3, 4]
    at_once = trained(start("--data", pictures, "--steps", 4, "--out", "other"), tmp_path / "other", 4)
    assert not differences(extended, at_once)


def test_evaluation_without_inception_weights(script, start, tmp_path, pictures):
    """The run keeps what it has, and says by which command it is evaluated later."""
    if script in NO_SAMPLES:
        assert "--fid-features" not in (ROOT / f"{script}.py").read_text()
        return
    words = ["--data", pictures, "--steps", 1, "--eval-every", 1]
    trained(start(*words), tmp_path / "run", 1)
    run = start(*words, "--fid-features", "inception", "--fid-weights", "nowhere.pth", command="eval")
    assert run.wait() == 0, run.text("err")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["steps"] == 1 and not any(key.startswith(("fid", "fd_")) for key in metrics)
    assert "nowhere.pth" in run.text("err") and " eval " in run.text("err") and "Traceback" not in run.text("err")


def test_the_best_so_far_is_kept(start, tmp_path, pictures):
    words = ["--data", pictures, "--steps", 3, "--eval-every", 1]  # the first step of some draws nothing yet
    trained(start(*words), tmp_path / "run", 3)
    best = checkpoint(tmp_path / "run", "best.pt")
    assert best["step"] in (1, 2, 3) and best["best"] < float("inf")
    run = start(*words, "--best", command="sample")
    assert run.wait() == 0, run.text("err")
    assert (tmp_path / "run" / "samples.png").exists()


def test_a_broken_picture(start, tmp_path, pictures):
    """Refused, naming it; with --skip-broken it is left out."""
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    broken = next(folder.rglob("8.jpg"))
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    refused(start("--data", folder), "8.jpg", "--skip-broken")
    assert trained(start("--data", folder, "--steps", 1, "--skip-broken"), tmp_path / "run", 1)["step"] == 1


# ------------------------------------------------------------ what is refused
REFUSED = {  # flags, and what the line must say
    "unknown data": (["--data", "imagenett"], ["imagenett", "shapes", "cifar10"]),
    "missing folder": (["--data", "no/such/folder"], ["no/such/folder"]),
    "empty folder": (["--data", "empty"], ["empty", ".jpg"]),
    "no size": (["--size", 0], ["size"]),
    "odd size": (["--size", 33], ["size"]),
    "no steps": (["--steps", 0], ["steps"]),
    "no batch": (["--batch", -8], ["batch"]),
    "pieces": (["--accumulate", 3], ["batch 8", "3", "9"]),
    "no pieces": (["--accumulate", 0], ["accumulate"]),
    "unknown flag": (["--frobnicate"], ["--frobnicate"]),
    "not a number": (["--steps", "many"], ["steps", "many"]),
    "negative seed": (["--seed", -1], ["seed"]),
    "negative number": (["--probe-samples", -2], ["probe-samples"]),
    "no folder": (["--out", "file"], ["file"]),
    "unknown preset": (["--preset", "huge"], ["huge", "demo", "small", "paper"]),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_mistakes_are_refused(start, tmp_path, mistake):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    flags, words = REFUSED[mistake]
    refused(start(*flags), *words)
    assert not list(tmp_path.glob("run/*"))  # nothing half done is left


@pytest.mark.parametrize("command", ["sample", "eval"])
def test_there_must_be_a_checkpoint(start, command):
    refused(start(command=command), "checkpoint", "run")


def test_foreign_checkpoints_are_refused(start, tmp_path, finished):
    """Another configuration's, naming what differs; another script's; a damaged one; all stay as they were."""
    folder = tmp_path / "run"
    folder.mkdir()
    path, state = folder / "checkpoint.pt", checkpoint(finished)
    shutil.copy(finished / "checkpoint.pt", path)
    error = refused(start("--seed", 5, "--batch", 4), "seed", "5", "batch", "4", "8", "--out")
    assert "steps" not in error and "root" not in error
    assert checkpoint(folder)["step"] == STEPS
    torch.save(state | {"script": "another"}, path)
    refused(start(), "another", "--out")
    whole = (finished / "checkpoint.pt").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not a checkpoint at all"):
        path.write_bytes(damaged)
        refused(start(), "checkpoint.pt")
        assert path.read_bytes() == damaged
    torch.save([1, 2, 3], path)
    refused(start(), "checkpoint.pt")


def test_help_needs_no_data(script, tmp_path):
    """It shows the defaults in force: those of the preset that --data or --preset choose; and a text for each flag."""
    presets = importlib.import_module(script).PRESETS
    for words, preset in (
        (["--data", "shapes"], "demo"),
        (["--data", "cifar10"], "small"),
        (["--preset", "paper"], "paper"),
    ):
        run = Run(script, *words, "--help", cwd=tmp_path)
        assert run.wait() == 0
        text = run.text("out")
        for name in ("steps", "batch"):
            pattern = rf"--{name} \S+\s(?:(?!--)[^(]|\((?!default))*\(default:\s+(\S+)\)"
            assert re.search(pattern, text)[1] == str(presets[preset][name]), (preset, name)
    flags = re.split(r"\n  (?=-)", text.partition("options:")[2])[1:]
    assert len(flags) > 15
    for flag in flags:
        assert len(flag.split()) > 2 and ("(default:" in flag or "--help" in flag), flag
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("process")) == []


# ------------------------------------------------------------ what is not finite
def poison():
    """From the fifth step of the optimisers on, not a number."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def after(optimizer, *_):
        counts[optimizer] = counts.get(optimizer, 0) + 1
        if counts[optimizer] == 5:
            for p in optimizer.param_groups[0]["params"]:
                p.data.fill_(float("nan"))

    counts = {}
    register_optimizer_step_post_hook(after)


def test_not_finite_ends_it(start, tmp_path, finished):
    """Status 1 and one clear line; the last good checkpoint stays as it was."""
    run = start(before=poison)
    assert run.wait() == 1
    error = run.text("err").strip()
    assert len(error.splitlines()) == 1 and re.search("finite at step [56]", error), error
    state = checkpoint(tmp_path / "run")
    assert state["step"] == 4
    assert not [key for key, value in leaves(state) if torch.is_tensor(value) and not value.isfinite().all()]
    assert not differences(trained(start(), tmp_path / "run"), checkpoint(finished))  # and can be gone on from


# ------------------------------------------------------------ processes and pieces
def keep_parameters():
    """Writes each optimiser's parameters, when the process's last step is done, to parameters-RANK-NUMBER.pt."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    steps, number = {}, {}

    def after(optimizer, *_):
        steps[optimizer], number[optimizer] = steps.get(optimizer, 0) + 1, number.get(optimizer, len(number))
        parameters = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
        path = f"parameters-{os.environ.get('RANK', 'alone')}-{number[optimizer]}-{steps[optimizer]}.pt"
        torch.save(parameters, path)

    register_optimizer_step_post_hook(after)


def test_two_processes_do_what_two_pieces_do(start, tmp_path):
    """As torchrun starts them: the same parameters after each step, on both ranks and on one with --accumulate 2."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        world["MASTER_PORT"] = str(free.getsockname()[1])
    words = ["--steps", 3, "--save-every", 3]
    ranks = [
        start(*words, before=keep_parameters, environment=world | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    folder = tmp_path / "run"
    ranks[0].until(lambda: checkpoint(folder)["step"] == 3)
    for run in ranks:
        run.stop(signal.SIGKILL)
    pieces = trained(start(*words, "--accumulate", 2, "--out", "alone", before=keep_parameters), tmp_path / "alone", 3)
    files = sorted(tmp_path.glob("parameters-0-*.pt"))
    assert files and pieces["step"] == 3
    for file in files:
        one, two, alone = (torch.load(str(file).replace("s-0-", f"s-{name}-")) for name in ("0", "1", "alone"))
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)), f"the ranks differ in {file.name}"
        worst = max(float((a - b).abs().max()) for a, b in zip(one, alone, strict=True))
        assert worst <= 1e-6, f"{file.name}: {worst:.1e} between two processes and two pieces"


# ------------------------------------------------------------ labels
def permute_labels():
    from common import data

    load = data.load

    def permuted(*args, **options):
        found = load(*args, **options)
        columns = {name: getattr(found, name) for name in ("labels", "factors")}
        return dataclasses.replace(found, **{name: c if c is None else c.flip(0) for name, c in columns.items()})

    data.load = permuted


def test_no_label_is_learnt_from(script, start, tmp_path, finished):
    """Other labels, the same weights."""
    found = differences(trained(start(before=permute_labels), tmp_path / "run"), checkpoint(finished))
    assert bool(found) == (script in SUPERVISED), found[:5]
