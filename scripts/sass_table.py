"""Prints a table of the built kernels: what ptxas said of registers and memory, and what the machine code holds.

    sass_table.py CUOBJDUMP FATBIN_DIR [--write DOC] [ARCH ..]

FATBIN_DIR is what build.rs leaves: one fatbin and one ptxas log a source file. With --write the table replaces what stands between the two
markers in DOC. Standard library only.
"""
import collections
import pathlib
import re
import subprocess
import sys

BEGIN, END = "<!-- sass-table: begin -->", "<!-- sass-table: end -->"
# The instructions that tell how a kernel works: matrix products of Ampere and Hopper, bulk copies, tile loads and stores, local memory.
OPCODES = ["HMMA", "HGMMA", "UTMALDG", "UTMASTG", "LDSM", "STSM", "LDGSTS", "USETMAXREG"]
LOCAL = ["LDL", "STL"]
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")


def said(log):
    """Registers, spill stores, spill loads, stack frame and static shared bytes by (kernel, arch), from a log of ptxas."""
    facts, current = {}, None
    for line in log.read_text().splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            current = facts.setdefault((entry[1], entry[2]), {})
        elif current is None:
            continue
        elif frame := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if "stack" not in current:
                current.update(stack=int(frame[1]), stores=int(frame[2]), loads=int(frame[3]))
        elif used := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            current.update(registers=int(used[1]), shared=int(shared[1]) if shared else 0)
            current = None
    return facts


def opcodes(cuobjdump, fatbin, arch):
    """How often each opcode occurs, by kernel."""
    run = subprocess.run([cuobjdump, "-sass", "-arch", arch, str(fatbin)], capture_output=True, text=True)
    if run.returncode != 0:
        sys.exit(f"{cuobjdump} on {fatbin}: {run.stderr.strip()}")
    counts, current = {}, None
    for line in run.stdout.splitlines():
        if function := re.search(r"Function : (\w+)", line):
            current = counts.setdefault(function[1], collections.Counter())
        elif current is not None and (found := INSTRUCTION.match(line)):
            current[found[1]] += 1
    return counts


def table(cuobjdump, directory, archs):
    lines = []
    for arch in archs:
        lines += [
            f"### {arch}",
            "",
            "| file | kernel | registers | spills | stack | static shared | " + " | ".join(OPCODES) + " | local | instructions |",
            "| --- | --- |" + " ---: |" * (6 + len(OPCODES)),
        ]
        for log in sorted(directory.glob("*.log")):
            facts = said(log)
            counts = opcodes(cuobjdump, log.with_suffix(".fatbin"), arch)
            for (kernel, of), fact in sorted(facts.items()):
                if of != arch:
                    continue
                count = counts.get(kernel)
                if count is None:
                    sys.exit(f"{log.stem}: no machine code of {kernel} for {arch}")
                if sum(count[o] for o in count if o not in ("NOP", "BRA")) <= 4:
                    continue  # an empty body: the kernel is for other chips
                shown = [f"{fact['stores']}/{fact['loads']}", fact["stack"], fact["shared"]]
                shown += [count[opcode] or "" for opcode in OPCODES]
                shown += [sum(count[opcode] for opcode in LOCAL), sum(count.values())]
                lines.append(f"| {log.stem} | {kernel} | {fact['registers']} | " + " | ".join(map(str, shown)) + " |")
        lines.append("")
    return "\n".join(lines)


def main():
    arguments = sys.argv[1:]
    doc = None
    if "--write" in arguments:
        at = arguments.index("--write")
        doc = pathlib.Path(arguments[at + 1])
        del arguments[at:at + 2]
    cuobjdump, directory, *archs = arguments
    text = table(cuobjdump, pathlib.Path(directory), archs or ["sm_90a", "sm_80"])
    if doc is None:
        print(text)
        return
    before, _, rest = doc.read_text().partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        sys.exit(f"{doc}: the markers {BEGIN} and {END} are not there")
    doc.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")


main()
