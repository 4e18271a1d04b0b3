#!/usr/bin/env python3
"""Simulates HYDRA's experiments (arXiv:2110.08633) and prints docs/reproduction.md's tables.

    scripts/reproduce.py target/release/hydra
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

JOBS = Path(__file__).resolve().parent.parent / "examples" / "hydra"
ONE_UNIT = ["--set", 'run.pipeline="never"']
SCHEDULES = [
    ("model parallelism", "model-parallel", []),
    ("GPipe", "gpipe", []),
    ("one at a time, spilled, on one device", "one-at-a-time", []),
    ("SHARP, sharded-LRTF", "sharded-lrtf", []),
    ("SHARP, locality-LRTF, one unit of a model at a time", "locality-lrtf", ONE_UNIT),
    ("SHARP, locality-LRTF", "locality-lrtf", []),
]


def simulate(job, *args):
    """What `hydra simulate --json` prints, or None where there is no plan that fits."""
    command = [sys.argv[1], "simulate", str(JOBS / f"{job}.toml"), "--json", *args]
    if "locality-lrtf" not in args or ONE_UNIT[1] in args:
        # Microbatches are of use to pipelines alone, and GPipe has its own number of them.
        models = tomllib.loads((JOBS / f"{job}.toml").read_text())["model"]
        command += [x for i, m in enumerate(models) for x in ("--set", f"model.{i}.microbatch={m['batch']}")]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode != 0:
        sys.exit(f"{' '.join(command)}: {ran.stderr.strip()}")
    return json.loads(ran.stdout)


def settings(**values):
    return [text for key, value in values.items() for text in ("--set", f"{key.replace('__', '.')}={value}")]


def share(part):
    # What rounds to nothing is nothing, whatever its sign.
    return f"{100 * (part if abs(part) >= 5e-4 else 0):.1f} %"


def main_table(job, recompute):
    print(f"\n### {job}, recompute = \"{recompute}\"\n")
    print("| schedule | makespan, s | over model parallelism | devices compute | above its bound | bound by |")
    print("| --- | --- | --- | --- | --- | --- |")
    slowest = None
    for name, policy, args in SCHEDULES:
        s = simulate(job, "--policy", policy, *args, *settings(run__recompute=f'"{recompute}"'))
        slowest = slowest or s["makespan_secs"]
        busy = sum(s["utilisation"]) / len(s["utilisation"])
        print(f"| {name} | {s['makespan_secs']:.1f} | {slowest / s['makespan_secs']:.2f} | {share(busy)} "
              f"| {share(s['gap'])} | {s['bounds']['greatest']} |")


def ablation(job):
    print(f"\n### {job}, ablation (recompute = \"always\")\n")
    print("| schedule | makespan, s | slower |")
    print("| --- | --- | --- |")
    rows = [
        ("all of it", ["--policy", "locality-lrtf"]),
        ("without pipelining", ["--policy", "locality-lrtf", *ONE_UNIT]),
        ("without double buffering too (slots = 1)", ["--policy", "locality-lrtf", "--slots", "1", *ONE_UNIT]),
        ("without SHARP too (one at a time, slots = 1)", ["--policy", "one-at-a-time", "--slots", "1"]),
    ]
    best = None
    for name, args in rows:
        secs = simulate(job, *args)["makespan_secs"]
        best = best or secs
        print(f"| {name} | {secs:.1f} | {secs / best:.2f} |")


def speedup(*args):
    ours, theirs = (simulate("drill", "--policy", p, *args)["makespan_secs"] for p in ("locality-lrtf", "model-parallel"))
    return theirs / ours


def drill_down(title, cases):
    print(f"\n### speedup over model parallelism by {title}\n")
    print("| " + " | ".join(str(name) for name, _ in cases) + " |")
    print("|" + " --- |" * len(cases))
    print("| " + " | ".join(f"{speedup(*args):.2f}" for _, args in cases) + " |")


def rates(count):
    """So many learning rates, all different: one model each."""
    values = ", ".join(f"{1e-6 * (i + 1):.0e}" if i < 9 else f"{i + 1}e-6" for i in range(count))
    return settings(model__0__search=f"{{ lr = [{values}] }}")


if __name__ == "__main__":
    for recompute in ("always", "auto"):
        for job in ("wikitext", "cifar"):
            main_table(job, recompute)
    ablation("wikitext")
    ablation("cifar")
    drill_down("number of models, 8 devices", [(n, rates(n)) for n in (2, 4, 8, 12, 16)])
    drill_down("number of devices, 4 models", [(n, ["--devices", str(n)]) for n in (2, 4, 6, 8)])
    layers = {"100M": 11, "300M": 43, "600M": 91, "900M": 139}
    drill_down("size, 8 models on 8 devices", [
        (name, rates(8) + settings(model__0__config__num_hidden_layers=n)) for name, n in layers.items()])
