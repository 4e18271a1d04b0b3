"""The models of a job on the machines of a Ray cluster: each task trains one part, on the devices that the job names.

    python ray_parts.py job.toml --parts 8 --gpus 1

The job and its run.out lie in a folder that all machines see. A task whose machine is lost runs again elsewhere and
goes on from its last checkpoint.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import ray

INTERRUPTED = 75  # after a checkpoint


@ray.remote(max_retries=10)
def train(job, part):
    command = ["hydra", "train", job, "--resume", "auto", "--set", f"run.part={part}"]
    while (code := subprocess.run(command).returncode) == INTERRUPTED:
        pass
    return code


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("job", type=Path)
    arguments.add_argument("--parts", type=int, required=True, help="as many tasks")
    arguments.add_argument("--gpus", type=float, default=0, help="of each task")
    arguments.add_argument("--cpus", type=float, default=1, help="of each task")
    given = arguments.parse_args()
    ray.init()
    task = train.options(num_gpus=given.gpus, num_cpus=given.cpus)
    parts = [f"{index}/{given.parts}" for index in range(given.parts)]
    codes = ray.get([task.remote(str(given.job.resolve()), part) for part in parts])
    failed = [(part, code) for part, code in zip(parts, codes) if code]
    for part, code in failed:
        print(f"part {part}: hydra ended with {code}", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
