"""Milliseconds of a training step of each script and preset, eager and compiled, and what the frame around it costs.

    python tests/benchmarks/train_step.py [bigbigan ...] [--presets demo small paper] [--compile] [--device cuda]

Runs the script itself, in a process of its own, and takes the median over the lines of its log.jsonl. Beside it, where
BARE has an entry, the same networks, losses and optimisers on one fixed batch, without loader, log, averages and
checkpoints: the frame should cost less than 5 %.
"""

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def run_rate(script, extra, steps, folder):
    """Images a second of a run, the median over its log lines but the first; it is stopped before it evaluates."""
    out = Path(tempfile.mkdtemp(dir=folder))
    command = [sys.executable, str(ROOT / f"{script}.py"), "--out", str(out), "--root", str(folder / "data")]
    command += ["--steps", "1000000", "--log-every", str(steps), "--save-every", "1000000", *extra]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for _ in range(6):
        if not process.stdout.readline():
            sys.exit(f"{' '.join(command)} ended early")
    process.kill()
    process.wait()
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return statistics.median(row["img_per_s"] for row in rows[1:])


def bigbigan(script, args):
    """One step of bigbigan.py without the frame."""
    G, E, D = script.build(args)
    rates = ((G, args.lr_g), (E, args.lr_g * args.eta), (D, args.lr_d))
    opt_G, opt_E, opt_D = (torch.optim.Adam(n.parameters(), lr, args.betas, fused=True) for n, lr in rates)
    x = torch.randn(args.batch, 3, args.size, args.size, device=args.device).to(memory_format=torch.channels_last)
    z, noise = torch.randn(2, args.batch, args.z_dim, device=args.device)

    def step():
        D.requires_grad_(True)
        for _ in range(args.d_steps):
            script.power_iteration(G, D)
            with torch.no_grad():
                x_hat, z_hat = G(z), script.posterior(args, E, x, noise)
            opt_D.zero_grad()
            script.discriminator_loss(*script.judge(args, D, x, z_hat, x_hat, z)).backward()
            opt_D.step()
        D.requires_grad_(False)
        script.power_iteration(G, D)
        opt_G.zero_grad(), opt_E.zero_grad()
        x_hat, z_hat = G(z), script.posterior(args, E, x, noise)
        script.encoder_generator_loss(*script.judge(args, D, x, z_hat, x_hat, z)).backward()
        opt_G.step(), opt_E.step()

    return step


BARE = {"bigbigan": bigbigan}


def bare_rate(script, extra, steps):
    module, sys.argv = importlib.import_module(script), [script, *extra]
    args = module.parse()
    module.start(args)
    step, times = BARE[script](module, args), []
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(steps):
            step()
        if args.device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return steps * args.batch / statistics.median(times[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", default=[p.stem for p in sorted(ROOT.glob("*.py"))])
    parser.add_argument("--presets", nargs="+", default=["demo"], choices=("demo", "small", "paper"))
    parser.add_argument("--compile", action="store_true", help="time the compiled networks too")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20, help="steps a log line; there are six")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for script in args.scripts:
            for preset in args.presets:
                extra = ["--preset", preset, "--batch", str(args.batch), "--device", args.device, "--precision", "fp32"]
                rates = {"run": run_rate(script, extra, args.steps, Path(folder))}
                if script in BARE and preset != "paper":
                    rates["bare networks"] = bare_rate(script, extra, args.steps)
                if args.compile:
                    rates["compiled run"] = run_rate(script, [*extra, "--compile"], args.steps, Path(folder))
                for name, rate in rates.items():
                    told = (
                        f"{1000 * args.batch / rate:8.1f} ms a step {rate:10.1f} img/s {rate / rates['run']:6.3f} x run"
                    )
                    print(f"{script} {preset}, batch {args.batch}, {name:14s} {told}", flush=True)


if __name__ == "__main__":
    main()
