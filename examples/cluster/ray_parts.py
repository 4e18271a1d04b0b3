"""The models of a job on the machines of a Ray cluster: each actor trains one part, on the devices that the job names.

    python ray_parts.py job.toml --parts 8 --gpus 1

The job and its run.out lie in a folder that all machines see. A part whose machine is lost, or whose hydra is killed,
runs again and goes on from its last checkpoint. Ctrl-C, or SIGTERM, lets every part write one first.
"""

import argparse
import signal
import subprocess
import sys
from pathlib import Path

import ray

INTERRUPTED = 75  # after a checkpoint
TRIES = 10
CHECKPOINT_SECS = 300  # that writing one may take


@ray.remote(max_restarts=TRIES, max_task_retries=TRIES, max_concurrency=2)
class Part:
    hydra, stops = None, False

    def train(self, job, part):
        command = ["hydra", "train", job, "--resume", "auto", "--set", f"run.part={part}"]
        for _ in range(TRIES):
            self.hydra = subprocess.Popen(command)
            code = self.hydra.wait()
            if self.stops or 0 <= code != INTERRUPTED:
                break
        return code

    def stop(self):
        self.stops = True
        if self.hydra:
            self.hydra.terminate()


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("job", type=Path)
    arguments.add_argument("--parts", type=int, required=True, help="no more than there are models")
    arguments.add_argument("--gpus", type=float, default=0, help="of each part")
    arguments.add_argument("--cpus", type=float, default=1, help="of each part")
    given = arguments.parse_args()
    ray.init()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    names = [f"{index}/{given.parts}" for index in range(given.parts)]
    parts = [Part.options(num_gpus=given.gpus, num_cpus=given.cpus).remote() for _ in names]
    job = str(given.job.resolve())
    running = {part.train.remote(job, name): (name, part) for part, name in zip(parts, names)}
    failed = False
    try:
        while running:
            for end in ray.wait(list(running))[0]:
                name, part = running.pop(end)
                if code := ray.get(end):
                    failed = True
                    print(f"part {name}: hydra ended with {code}", file=sys.stderr)
                ray.kill(part)  # others may wait for what it has
    except KeyboardInterrupt:
        for _, part in running.values():
            part.stop.remote()
        ray.wait(list(running), num_returns=len(running), timeout=CHECKPOINT_SECS)
        sys.exit(INTERRUPTED)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
