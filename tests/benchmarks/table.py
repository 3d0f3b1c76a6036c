"""One table of any choice of scripts under one budget, a process each, from the metrics.json files that they leave.

    python tests/benchmarks/table.py --data shapes --seeds 0 --out runs/table        # all scripts, demo, its own steps
    python tests/benchmarks/table.py byol dim --seeds 0 1 2 --out runs/table --publish    # the rows go into README.md
    python tests/benchmarks/table.py bigan --seconds 120 --out runs/table --flags --fid-samples 1000
    python tests/benchmarks/table.py                                                 # prints what has been published

A script that fails has a row that says so, and the others go on. The same command again runs what has not finished, a
killed script from its own checkpoint. Published rows are kept in table.json; README.md's section is what this prints.
Needs Linux: its processes end with this one, and a budget in seconds begins when the script listens to SIGTERM.
"""

import argparse
import ctypes
import functools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = Path(__file__).with_suffix(".json")
SECTION = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- /table -->)", re.DOTALL)  # of README.md
KEY = ("data", "preset", "budget", "script", "seed")  # of a row
DISTANCE, SCORE = r"(fid|fd_random)(_\d+)?", r"inception_score(_\d+)?"
PRECISION, RECALL = (rf"{name}(_random)?_k3(_\d+)?" for name in ("precision", "recall"))
YARDSTICKS = r"(untrained_|raw_pixels_)?(probe|knn)_top1"
KEPT = rf"device|torch|parameters|steps|images|seconds|n_train|probe_saw_labels|{YARDSTICKS}"
KEPT = re.compile(rf"{KEPT}|{DISTANCE}|{SCORE}|{PRECISION}|{RECALL}")  # what a row keeps of metrics.json
LEGEND = """\
### Every script on the same ground

As `python tests/benchmarks/table.py` prints it; its first lines say how to run it, for which scripts and how long.
Seconds are of training, images/s the quotient; memory is the process's largest resident set, or what it takes of a GPU.
The distance stands under its own name, with the number of its samples (`fd_random` is not FID); precision and recall
are in the same features, k = 3. Probe and k-NN: accuracy with the script's features, the same network's untrained, raw
pixels; † the features have seen labels. Several seeds: mean ± standard deviation."""


# ------------------------------------------------------------ running
def write(path, value):
    path.with_suffix(".tmp").write_text(value if isinstance(value, str) else json.dumps(value, indent=1) + "\n")
    os.replace(path.with_suffix(".tmp"), path)


def end_with_parent():
    """In the new process: SIGTERM to it when this one ends, however it ends (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def listens(pid):
    """Whether a process has a handler for SIGTERM, as the scripts have while they train."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def gpu_memory():
    """MB in use on the GPUs; 0 where there are none."""
    if not shutil.which("nvidia-smi"):
        return 0
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return sum(map(int, re.findall(r"\d+", subprocess.run(query, capture_output=True, text=True).stdout)))


def follow(command, stem, seconds=None):
    """Runs a command, for so many seconds of training: its status, or "stopped", and peak MB on the host and GPU."""
    began, told, idle, gpu, looked = None, False, gpu_memory(), 0, 0.0
    with open(f"{stem}.out", "a") as out, open(f"{stem}.err", "a") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, preexec_fn=end_with_parent)
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        now = time.monotonic()
        if seconds is not None and not told and listens(process.pid):
            began = began or now
            if told := now - began >= seconds:
                process.send_signal(signal.SIGTERM)
        if now - looked > 1:
            gpu, looked = max(gpu, gpu_memory() - idle), now
        time.sleep(0.05)
    process.returncode = os.waitstatus_to_exitcode(ended[1])
    stopped = told and process.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM)
    return "stopped" if stopped else process.returncode, ended[2].ru_maxrss / 1024, gpu


def trained(folder):
    """Seconds of training in a checkpoint."""
    if not (folder / "checkpoint.pt").exists():
        return 0.0
    import torch  # not above: a child's resident set is never less than its parent's

    return torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)["seconds"]


@functools.cache
def known(script, words):
    """Those of the words, flags and their values, that a script's --help lists."""
    if not words:
        return []
    listed = subprocess.run([sys.executable, ROOT / f"{script}.py", "--help"], capture_output=True, text=True).stdout
    flags, kept = set(re.findall(r"--[\w-]+", listed.partition("options:")[2])), []
    for word in words:
        if word.startswith("--"):
            has = word.partition("=")[0] in flags
            if not has:
                print(f"{script}.py has no {word}, and runs without it", file=sys.stderr)
        kept += [word] * has
    return kept


def run(args, script, seed):
    """A row: what a script's run has left, from its folder where it has finished."""
    data, limits = Path(args.data).name, {"--steps": args.steps, "--seconds": args.seconds}
    budget = " ".join(f"{flag} {value:.12g}" for flag, value in limits.items() if value)
    row = {"data": f"DIR/{data}" if "/" in args.data else data, "preset": args.preset, "budget": budget}
    row |= {"script": script, "seed": seed, "flags": known(script, tuple(args.flags))}
    name = f"{script} on {data}, seed {seed}"
    folder = args.out / f"{data}-{args.preset}{budget.replace(' ', '')}-{script}-{seed}"
    place, stem = folder.with_name(f"{folder.name}.json"), str(folder)
    before = json.loads(place.read_text()) if place.exists() else {"error": "has not run"}
    if "error" not in before and all(before[key] == value for key, value in row.items()):
        print(f"{name}: had finished", file=sys.stderr)
        return before
    print(f"{name}: begins at {time.strftime('%H:%M:%S')}; {stem}.out has what it prints", file=sys.stderr)
    for end in ("out", "err"):
        Path(f"{stem}.{end}").unlink(missing_ok=True)
    words = ["--data", args.data, "--root", args.root, "--preset", args.preset, "--seed", seed, "--out", folder]
    words = [str(word) for word in words + ["--steps", args.steps] * bool(args.steps) + row["flags"]]
    start, peaks, left = time.monotonic(), [], args.seconds and args.seconds - trained(folder)
    for command in ("train", "sample", "eval"):  # train does all three, but where it is stopped
        if command != "train" or left is None or left > 0:
            status, *peak = follow([sys.executable, str(ROOT / f"{script}.py"), command, *words], stem, left)
            peaks.append(peak)
            if status != "stopped" and (status or command == "train"):
                break
    complaints = Path(f"{stem}.err").read_text().strip()
    for path, short in ((folder, "OUT"), (args.data, row["data"]), (args.root, "ROOT")):
        complaints = complaints.replace(str(path), short) if "/" in str(path) else complaints
    if status:
        row["error"] = f"{command} ended with {status}: {complaints.splitlines()[-1][:300] if complaints else ''}"
    else:
        metrics = json.loads((folder / "metrics.json").read_text())
        memory = max(peak[not metrics["device"].startswith("cpu")] for peak in peaks)
        short = lambda value: float(f"{value:.6g}") if isinstance(value, float) else value
        row["metrics"] = {k: short(v) for k, v in metrics.items() if KEPT.fullmatch(k)} | {"memory": round(memory)}
        row["missing"] = re.findall(r"not (?:measured|probed): (.*?)(?:; then: .*)?$", complaints, re.MULTILINE)
    write(place, row)
    print(f"{name}: {row.get('error', 'finished')} after {time.monotonic() - start:.0f} s", file=sys.stderr)
    return row


# ------------------------------------------------------------ the table
def spread(values, form):
    """Mean and, of several, sample standard deviation; nothing of nothing."""
    if len(values) < 2:
        return f"{values[0]:{form}}" if values else ""
    return f"{statistics.fmean(values):{form}} ± {statistics.stdev(values):{form}}"


def cells(rows):
    """{heading: text} of one script's finished runs, one a seed."""
    metrics = [row["metrics"] for row in rows]
    find = lambda pattern: [v for m in metrics for k, v in m.items() if re.fullmatch(pattern, k)]
    told = lambda pattern, form=".3f": spread(find(pattern), form)
    names = dict.fromkeys(k for m in metrics for k in m if re.fullmatch(DISTANCE, k))
    parts = metrics[0]["parameters"]
    parts = {"": parts} if isinstance(parts, int) else parts
    rates = [m["images"] / m["seconds"] for m in metrics if m["seconds"]]
    pair = [told(PRECISION), told(RECALL)]
    return {
        "script": f"`{rows[0]['script']}`",
        "seeds": ", ".join(str(row["seed"]) for row in rows),
        "parameters, M": ", ".join(f"{name} {n / 1e6:.2f}".strip() for name, n in parts.items()),
        "images seen": told("images", ",.0f"),
        "seconds": told("seconds", ",.0f"),
        "images/s": spread(rates, ",.0f"),
        "memory, MB": told("memory", ",.0f"),
        "distance": ", ".join(f"`{name}` {told(name, '.1f')}" for name in names),
        "inception score": told(SCORE, ".2f"),
        "precision, recall": "; ".join(pair) if all(pair) else "",
        "probe": told("probe_top1") + "†" * any(m.get("probe_saw_labels", False) for m in metrics),
        "untrained": told("untrained_probe_top1"),
        "raw pixels": told("raw_pixels_probe_top1"),
        "probed on": ", ".join(f"{n:,}" for n in dict.fromkeys(find("n_train"))),
        "k-NN": told("knn_top1"),
        "k-NN untrained": told("untrained_knn_top1"),
    }


def table(rows):
    """The Markdown table of runs on one data set, with one preset and budget, and what is to be said of them."""
    lines, notes = [], {}
    for script in sorted({row["script"] for row in rows}):
        runs = sorted((row for row in rows if row["script"] == script), key=lambda row: row["seed"])
        finished = [row for row in runs if "error" not in row]
        lines.append(cells(finished) if finished else {"script": f"`{script}`", "seeds": "failed, see below"})
        for row in runs:
            flags = " ".join(Path(word).name if "/" in word else word for word in row["flags"])
            said = [f"with `{flags}`"] if flags else []
            said += [row["error"]] if "error" in row else [f"not measured: {text}" for text in row["missing"]]
            for text in said:
                notes.setdefault(text, []).append(f"`{script}`" + f", seed {row['seed']}" * (len(runs) > 1))
    headings = dict.fromkeys(key for line in lines for key, text in line.items() if text)
    headings = [key for key in max(lines, key=len) if key in headings]  # columns without any value are left out
    head = ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings)]
    body = ["| " + " | ".join(line.get(key, "").replace("|", "/") for key in headings) + " |" for line in lines]
    machines = {f"{m['device']}, torch {m['torch']}" for m in (row["metrics"] for row in rows if "metrics" in row)}
    told = [f"- {'; '.join(who)}: {text}" for text, who in notes.items()]
    data, preset, budget = (rows[0][key] for key in KEY[:3])
    command = f"python tests/benchmarks/table.py --data {data} --preset {preset} {budget}".strip()
    first = "; ".join([f"**{data}**, {budget or 'the steps of the preset'}: `{command}`", *sorted(machines)])
    return "\n".join([first, "", *head, *body, *[""] * bool(notes), *told])


def render(rows):
    """All tables, as they stand in README.md."""
    groups = {}
    for row in sorted(rows, key=lambda row: [str(row[key]) for key in KEY]):
        groups.setdefault(tuple(row[key] for key in KEY[:3]), []).append(row)
    return "\n\n".join([LEGEND, *map(table, groups.values())]) + "\n"


def publish(rows):
    """Puts rows in the place of those with the same key in table.json, and README.md's section in step with it."""
    kept = {tuple(row[key] for key in KEY): row for row in json.loads(PUBLISHED.read_text()) + rows}
    text, rows = (ROOT / "README.md").read_text(), list(kept.values())
    if not SECTION.search(text):
        sys.exit("README.md has no place for the table: <!-- table --> and <!-- /table -->, each on a line of its own")
    write(PUBLISHED, rows)
    write(ROOT / "README.md", SECTION.sub(lambda _: render(rows), text))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scripts = sorted(path.stem for path in ROOT.glob("*.py"))
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help=f"of {', '.join(scripts)}; none: all")
    parser.add_argument("--data", default="shapes", help="as the scripts'")
    parser.add_argument("--root", default="data", help="as the scripts'")
    parser.add_argument("--preset", default="demo", choices=("demo", "small", "paper"), help="as the scripts'")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="each script is run once with each of them")
    parser.add_argument("--steps", type=int, help="training steps; the preset's own if neither is given")
    parser.add_argument("--seconds", type=float, help="of training, after which SIGTERM ends it, if it goes on so long")
    parser.add_argument("--out", type=Path, help="folder of all runs; without it nothing is run")
    parser.add_argument("--publish", action="store_true", help="write the rows to table.json, and README.md's section")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="all that follows goes to the scripts")
    args = parser.parse_args()
    if unknown := set(args.scripts) - set(scripts):
        parser.error(f"there is no {', '.join(sorted(unknown))} among {', '.join(scripts)}")
    if args.flags and not args.flags[0].startswith("--"):
        parser.error(f"--flags: {args.flags[0]} is not a flag")
    rows = [] if args.out else json.loads(PUBLISHED.read_text())
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        rows = [run(args, script, seed) for seed in args.seeds for script in args.scripts or scripts]
    print(render(publish(rows) if args.publish else rows), end="")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
