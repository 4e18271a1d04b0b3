"""Finds the least makespan of small schedules and proves it, for tests/optimal.rs.

    HYDRA_OPTIMAL_CASES=cases.json cargo test --test optimal
    python -m venv VENV && VENV/bin/pip install -r scripts/optimal/requirements.txt
    VENV/bin/python scripts/optimal/solve.py cases.json tests/fixtures/optimal/cases.json [--limit SECONDS] [--workers N]

A case has devices, each with a link, and models: chains of units. A step of a model with shards 0 .. n-1 is the units F(0) .. F(n-2), then
B(n-1) .. B(0), where B(n-1) is the last shard's forward, loss and backward. Chosen are each unit's device, the moment when it starts, and the
moment when the fetch of its shard's weights starts. What holds of every schedule, whatever a policy chooses:

 1. A model's units run one after another, in order. A device runs one unit at a time.
 2. A unit starts after its shard's weights have been fetched over its device's link, which carries one fetch at a time; a fetch that has
    begun is not interrupted.
 3. F(s) and B(s) of one step may share a fetch, if they run on one device which keeps the weights in a slot from the one to the other. No other
    two units share one: the update between two steps makes every copy stale.
 4. A fetch for a step begins when the shard's unit B(s) of the step before has ended, since the weights do not exist before.
 5. A unit has its weight slot from its fetch's start to its own end, and in between where F(s) and B(s) share one. A device has
    `slots` of them.
 6. Units of a model that a device has claimed run there, so the fetch for a unit begins when the unit before has ended or has the same device.

Left out, so that this is a relaxation and its optimum a lower bound: copies of boundary tensors, inputs and gradients, updates, that a device's
units run in the order in which they were claimed, that a claim cannot be taken back, and which slot the executor reuses first. The
cases make the copies and updates (nearly) free. Seconds are rounded down to whole ticks, which can only make the optimum less.

The output is those cases that were proved in time, with `optimum_secs` and `proved`: no schedule is shorter, and there is one at most 0.1 % longer.
"""

import argparse
import json
import math
import time

from ortools.sat.python import cp_model

# Ticks of all arithmetic on the fastest device. Rounding takes less than a tick off every unit and fetch.
TICKS = 200_000
# A schedule this little above the bound is proved well enough.
GAP = 0.001


def units_of(model, device_count):
    """Units in order: step, shard, whether it is a backward, seconds by device."""
    n = len(model["shard_bytes"])
    for step in range(model["steps"]):
        for i in range(2 * n - 1):
            shard, backward = (i, False) if i < n - 1 else (2 * (n - 1) - i, True)
            yield step, shard, backward, [model["unit_secs"][d][i] for d in range(device_count)]


def solve(case, limit, workers):
    """The least makespan in seconds, and what the solver says of it."""
    rates = case["h2d_bytes_per_sec"]
    devices = range(len(rates))
    chains = [list(units_of(model, len(rates))) for model in case["models"]]
    tick = sum(min(secs) for chain in chains for _, _, _, secs in chain) / TICKS

    def ticks(secs):
        # What is a whole number but for the last bits of a double stays that number.
        return math.floor(secs / tick + 1e-6)

    m = cp_model.CpModel()
    horizon = sum(max(ticks(s) for s in secs) for chain in chains for _, _, _, secs in chain)
    horizon += sum(
        max(ticks(model["shard_bytes"][shard] / rate) for rate in rates)
        for model, chain in zip(case["models"], chains)
        for _, shard, _, _ in chain
    )
    makespan = m.new_int_var(0, horizon, "makespan")
    compute = [[] for _ in devices]
    fetches = [[] for _ in devices]
    slots = [[] for _ in devices]
    work = []
    for model, chain in zip(case["models"], chains):
        before = None
        forwards, backwards = {}, {}
        for step, shard, backward, secs in chain:
            # `slot` is when the unit's slot is taken: its fetch's start, or where the weights were kept, the end of the forward.
            slot, start, end = (m.new_int_var(0, horizon, "") for _ in range(3))
            here = [m.new_bool_var("") for _ in devices]
            m.add_exactly_one(here)
            m.add(slot <= start)
            kept = None
            if backward and (step, shard) in forwards:
                kept = m.new_bool_var("")
                forward = forwards[step, shard]
                m.add(slot == forward["end"]).only_enforce_if(kept)
                for d in devices:
                    m.add_implication(kept, here[d].Not()).only_enforce_if(forward["here"][d].Not())
            for d in devices:
                span = ticks(secs[d])
                compute[d].append(m.new_optional_interval_var(start, span, end, here[d], ""))
                held = m.new_int_var(0, horizon, "")
                slots[d].append(m.new_optional_interval_var(slot, held, end, here[d], ""))
                work.append((d, span, here[d]))
                fetch = ticks(model["shard_bytes"][shard] / rates[d])
                if fetch == 0:
                    continue
                fetched = here[d]
                if kept is not None:
                    fetched = m.new_bool_var("")
                    m.add_bool_or(fetched, here[d].Not(), kept)
                    m.add_implication(fetched, here[d])
                    m.add_implication(fetched, kept.Not())
                fetches[d].append(m.new_optional_fixed_size_interval_var(slot, fetch, fetched, ""))
                m.add(slot + fetch <= start).only_enforce_if(fetched)
            if before is not None:
                m.add(before["end"] <= start)
                for d in devices:
                    moved = [here[d], before["here"][d].Not()]
                    m.add(slot >= before["end"]).only_enforce_if(moved)
            if (step - 1, shard) in backwards:
                stale = m.add(slot >= backwards[step - 1, shard]["end"])
                if kept is not None:
                    stale.only_enforce_if(kept.Not())
            before = {"end": end, "here": here}
            (backwards if backward else forwards)[step, shard] = before
        m.add(makespan >= before["end"])
    for d in devices:
        m.add_no_overlap(compute[d])
        m.add_no_overlap(fetches[d])
        m.add_cumulative(slots[d], [1] * len(slots[d]), case["slots"])
        # Implied, and a help to the proof.
        m.add(sum(span * here for on, span, here in work if on == d) <= makespan)
    m.minimize(makespan)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = limit
    solver.parameters.num_workers = workers
    solver.parameters.relative_gap_limit = GAP
    status = solver.solve(m)
    return solver.best_objective_bound * tick, solver.objective_value * tick, status == cp_model.OPTIMAL


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cases")
    parser.add_argument("out")
    parser.add_argument("--limit", type=float, default=600, help="seconds for each case")
    parser.add_argument("--workers", type=int, default=8)
    args = parser.parse_args()
    with open(args.cases) as file:
        cases = json.load(file)
    for case in cases:
        began = time.time()
        bound, found, case["proved"] = solve(case, args.limit, args.workers)
        case["optimum_secs"] = bound
        units = sum(model["steps"] * (2 * len(model["shard_bytes"]) - 1) for model in case["models"])
        said = "proved" if case["proved"] else f"NOT PROVED, found {found:.5f}"
        print(f"{case['name']}, {units} units: {bound:.5f} s {said}, {time.time() - began:.1f} s", flush=True)
    with open(args.out, "w") as file:
        json.dump([case for case in cases if case["proved"]], file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
