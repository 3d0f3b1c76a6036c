"""The table's tool, on scripts of a few lines that keep the contract; and README.md's section. About 15 seconds."""

import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time

import pytest
from conftest import ROOT

TOOL = ROOT / "tests" / "benchmarks" / "table.py"
spec = importlib.util.spec_from_file_location("table", TOOL)
table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(table)

FAKE = """
import argparse, json, os, signal, sys, time
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("command", choices=("train", "sample", "eval"))
for name in ("data", "root", "preset", "out"):
    parser.add_argument(f"--{name}")
for name in ("seed", "steps", "depth"):
    parser.add_argument(f"--{name}", type=int, default=10**6)
args = parser.parse_args()
out = Path(args.out)
out.mkdir(parents=True, exist_ok=True)
with open(out / "calls", "a") as file:
    print(args.command, args.seed, args.depth, file=file)
state = out / "checkpoint.pt"
step, seconds, told = *(json.loads(state.read_text()).values() if state.exists() else (0, 0.0)), []
if args.command == "train":
    time.sleep(SETUP)  # a SIGTERM before the handler would leave nothing
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    began = time.time() - seconds
    while step < args.steps:
        time.sleep(0.02)
        step += 1
        if told or step == args.steps or step % 5 == 0:
            state.write_text(json.dumps({"step": step, "seconds": (seconds := time.time() - began)}))
        if told:
            with open(out / "calls", "a") as file:
                print("stopped at", step, file=file)
            sys.exit(143)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
if args.command != "sample":
    fake = {"device": "cpu, 1 threads", "torch": "2", "steps": step, "images": step * 10, "seconds": seconds}
    fake |= {"parameters": {"G": 1_500_000, "D": 20_000}, "fd_random_100": 50.0 + args.seed, "n_train": 200}
    fake |= {"precision_random_k3_100": 0.5, "recall_random_k3_100": 0.25, "vae_fd_random_100": 1.0}
    fake |= {"probe_top1": 0.6 + 0.1 * args.seed, "untrained_probe_top1": 0.3, "raw_pixels_probe_top1": 0.2}
    print("fake.py: not measured: no k-NN here; then: python fake.py eval", file=sys.stderr)
    (out / "metrics.json").write_text(json.dumps(fake))
"""
BROKEN = "import sys\nprint('broken.py: error: no such | thing', file=sys.stderr)\nsys.exit(2)\n"

TORCH = "import json\ndef load(path, **_):\n    return json.loads(open(path).read())\n"  # for such a checkpoint


def house(tmp_path, setup=0.0, **scripts):
    """A repository with the tool, a README of two lines and fake scripts; tool(*words) is the command."""
    (tmp_path / "tests" / "benchmarks").mkdir(parents=True)
    shutil.copy(TOOL, tmp_path / "tests" / "benchmarks")
    (tmp_path / "tests" / "benchmarks" / "table.json").write_text("[]\n")
    (tmp_path / "README.md").write_text("Before\n<!-- table -->\n<!-- /table -->\nAfter\n")
    (tmp_path / "tests" / "benchmarks" / "torch.py").write_text(TORCH)
    (tmp_path / "fake.py").write_text(FAKE.replace("SETUP", str(setup)))
    for name, source in scripts.items():
        (tmp_path / f"{name}.py").write_text(source)
    return lambda *words: [sys.executable, tmp_path / "tests/benchmarks/table.py", "--out", tmp_path / "o", *words]


def run(command, told=()):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and all(text in done.stderr for text in told), done.stderr
    return done.stdout


def calls(tmp_path, run="shapes-demo--steps10-fake-0"):
    return (tmp_path / "o" / run / "calls").read_text().splitlines()


# ------------------------------------------------------------ README.md
def test_readme_is_what_the_tool_prints():
    printed = run([sys.executable, TOOL])
    assert table.SECTION.findall((ROOT / "README.md").read_text()) == [printed]
    assert printed == table.render(json.loads(table.PUBLISHED.read_text()))


def test_publish_keeps_other_rows_and_the_rest_of_the_readme(tmp_path):
    tool = house(tmp_path)
    for seed in (0, 1, 0):
        printed = run(tool("fake", "--steps", 2, "--seeds", seed, "--publish"))
    assert (tmp_path / "README.md").read_text() == f"Before\n<!-- table -->\n{printed}<!-- /table -->\nAfter\n"
    assert [row["seed"] for row in json.loads((tmp_path / "tests/benchmarks/table.json").read_text())] == [0, 1]
    assert run([sys.executable, tmp_path / "tests/benchmarks/table.py"]) == printed
    assert "| `fake` | 0, 1 |" in printed


# ------------------------------------------------------------ running
def test_a_failing_script_has_its_row_and_the_others_go_on(tmp_path):
    tool = house(tmp_path, broken=BROKEN)
    printed = run(tool("--steps", 10, "--flags", "--depth", 3, "--width", 4), ["fake.py has no --width"])
    assert "| `broken` | failed, see below |" in printed
    assert "- `broken`: train ended with 2: broken.py: error: no such | thing" in printed
    cells = next(line for line in printed.splitlines() if line.startswith("| `fake` | 0 | G 1.50, D 0.02 | 100 |"))
    assert cells.split(" | ")[-6:] == ["`fd_random_100` 50.0", "0.500; 0.250", "0.600", "0.300", "0.200", "200 |"]
    assert "k-NN |" not in printed and "inception" not in printed, "columns without a value"
    assert "- `fake`: not measured: no k-NN here\n" in printed
    assert "- `fake`: with `--depth 3`\n" in printed
    assert calls(tmp_path) == ["train 0 3"]

    again = ["fake on shapes, seed 0: had finished", "broken on shapes, seed 0: begins"]  # what has failed
    assert run(tool("--steps", 10, "--flags", "--depth", 3), again) == printed
    assert calls(tmp_path) == ["train 0 3"]
    run(tool("fake", "--steps", 10, "--flags", "--depth", 4))
    assert calls(tmp_path) == ["train 0 3", "train 0 4"], "other flags are another run"
    run(tool("fake", "--steps", 5, "--flags", "--depth", 4))
    assert calls(tmp_path, "shapes-demo--steps5-fake-0") == ["train 0 4"], "another budget has another folder"


def test_a_killed_tool_ends_its_script_and_goes_on(tmp_path):
    tool, folder = house(tmp_path), tmp_path / "o" / "shapes-demo--steps200-fake-0"
    process = subprocess.Popen([str(word) for word in tool("--steps", 200)], stdout=subprocess.DEVNULL)
    while not (folder / "checkpoint.pt").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while len(calls(tmp_path, folder.name)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    step = json.loads((folder / "checkpoint.pt").read_text())["step"]
    assert calls(tmp_path, folder.name) == ["train 0 1000000", f"stopped at {step}"] and step < 200
    run(tool("--steps", 200))
    assert calls(tmp_path, folder.name)[2:] == ["train 0 1000000"]
    assert json.loads(folder.with_name(f"{folder.name}.json").read_text())["metrics"]["images"] == 2000


def test_seconds_are_of_training_and_end_by_sigterm(tmp_path):
    tool, name = house(tmp_path, setup=0.7), "shapes-demo--seconds0.5-fake-0"
    run(tool("--seconds", 0.5))
    place, commands = tmp_path / "o" / f"{name}.json", lambda: [call.split()[0] for call in calls(tmp_path, name)]
    metrics = json.loads(place.read_text())["metrics"]
    assert commands() == ["train", "stopped", "sample", "eval"]
    assert 0.3 < metrics["seconds"] < 10 and 2 < metrics["steps"] < 500 and 2 < metrics["memory"] < 4000
    place.unlink()  # as if the tool had been killed before the evaluation
    (tmp_path / "o" / name / "checkpoint.pt").write_text('{"step": 25, "seconds": 0.51}')
    run(tool("--seconds", 0.5))
    assert commands()[4:] == ["sample", "eval"], "it had trained long enough"
    run(tool("--seconds", 60, "--steps", 5))
    name = "shapes-demo--steps5--seconds60-fake-0"
    assert commands() == ["train"], "it ended by itself, evaluated"


# ------------------------------------------------------------ arithmetic
def test_spread():
    assert table.spread([], ".1f") == "" and table.spread([0.25], ".3f") == "0.250"
    values = [0.2, 0.5, 0.8]
    assert table.spread(values, ".2f") == "0.50 ± 0.30"  # n - 1: with n it would be 0.24
    assert f"{statistics.stdev(values):.2f}" == "0.30"


def published(script, seed, **metrics):
    usual = {"device": "cpu, 2 threads", "torch": "2", "steps": 5, "images": 500, "seconds": 10.0, "memory": 300}
    row = {"data": "shapes", "preset": "demo", "budget": "", "script": script, "seed": seed, "flags": []}
    return row | {"metrics": usual | {"parameters": 474_048} | metrics, "missing": []}


def test_rows_of_several_seeds_are_one():
    one = published(
        "a", 0, fid_1000=10.0, inception_score_1000=3.0, knn_top1=0.5, probe_top1=0.7, probe_saw_labels=True
    )
    two = published("a", 1, fid_1000=14.0, inception_score_1000=4.0, knn_top1=0.5, probe_top1=0.9)
    cells = table.cells([one, two])
    assert cells["distance"] == "`fid_1000` 12.0 ± 2.8" and cells["inception score"] == "3.50 ± 0.71"
    assert cells["probe"] == "0.800 ± 0.141†" and cells["k-NN"] == "0.500 ± 0.000"
    assert (cells["images/s"], cells["parameters, M"], cells["seeds"]) == ("50 ± 0", "0.47", "0, 1")
    one["missing"] = two["missing"] = ["no weights"]
    printed = table.render([two, published("b", 0) | {"budget": "--steps 9"}, one, published("b", 0, fid_1000=1.5)])
    assert "\n- `a`, seed 0; `a`, seed 1: not measured: no weights\n" in printed
    assert printed.count("| script |") == 2, "another budget is another table"
    assert printed.index("| `a` |") < printed.index("| `b` |") < printed.index("--steps 9")


@pytest.mark.parametrize("key", ("recon_fd_random_5000", "fd_random_std", "untrained_probe_l2", "layer_1_top1", "kid"))
def test_only_what_the_table_shows_is_kept(key):
    assert not table.KEPT.fullmatch(key)
    assert table.KEPT.fullmatch("fd_random_5000") and table.KEPT.fullmatch("raw_pixels_probe_top1")


def test_a_handler_is_seen():
    assert not table.listens(os.getpid()) or signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)
    before = signal.signal(signal.SIGTERM, lambda number, _: None)
    assert table.listens(os.getpid())
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert not table.listens(os.getpid())
    signal.signal(signal.SIGTERM, before)
