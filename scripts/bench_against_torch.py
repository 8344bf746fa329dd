#!/usr/bin/env python3
"""Runs our benchmarks and PyTorch's in turn and prints how they compare, as a Markdown table.

    cargo build --release -p megacontext-lora
    scripts/bench_against_torch.py --python peer/bin/python
    scripts/bench_against_torch.py --python peer/bin/python --device cuda    # both on the first GPU

Each comparison is a set of commands, ours and the peer's, run one after the other in a process each, for some rounds; a
figure is the median over the rounds. Where the peer has two ways (the loss of a step), its better one counts for each figure.
What is compared and what is wanted of it is in TARGETS, and in ON_GPU for a GPU, where nothing is wanted yet; docs/benchmarks.md says more.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LENSNET = "768,2,6"
SMOLLM2 = "576,30,9,3,1536,49152"
# With these the chunked loss runs at its fastest: large blocks stay with the process, in huge pages.
TUNABLES = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184"
)


@dataclass
class Target:
    """Our `dtypes` against the peer's `peers`: how many times as fast, with how much of the memory of `memory_peers`."""

    what: str
    pattern: str  # for lens also `causal`: dense, to earlier entries alone
    lengths: list
    dtypes: dict  # ours: (peers, speed wanted by heads and n, peers of memory, memory wanted)
    heads: list = field(default_factory=lambda: ["9,3"])


def fixed(value):
    return lambda heads, n: value


TARGETS = {
    "K1": Target(
        "attention", "s2", [2048, 4096, 8192, 16384, 32768],
        {"f32": (["f32"], lambda heads, n: 1.7 if n <= 4096 else 1.5, ["f32"], 0.6)},
        ["9,3", "16,16"],
    ),
    "K2": Target(
        "attention", "s2", [2048, 4096, 8192, 16384, 32768],
        {
            dtype: (["bf16"], lambda heads, n: 3.0 if heads == "9,3" else 2.2, ["f32"], 1.0)
            for dtype in ("mixed", "bf16")
        },
        ["9,3", "16,16"],
    ),
    "K3": Target(
        "attention", "dense", [8192],
        {
            "f32": (["f32"], fixed(1.2), ["f32"], None),
            "mixed": (["bf16"], fixed(2.0), ["bf16"], None),
            "bf16": (["bf16"], fixed(2.0), ["bf16"], None),
        },
    ),
    "S1": Target(
        "step", "s2", [2048, 4096, 8192],
        {"f32": (["f32 hf", "f32 chunked"], fixed(1.3), ["f32 hf", "f32 chunked"], 0.6)},
    ),
    "S2": Target(
        "step", "s2", [2048, 4096, 8192],
        {
            "mixed": (["mixed hf", "mixed chunked"], fixed(2.5), ["mixed hf", "mixed chunked"], 0.7),
            "bf16": (["bf16 hf", "bf16 chunked"], fixed(2.0), ["bf16 hf", "bf16 chunked"], 0.7),
        },
    ),
    "W1": Target("lens", "dense", [8192], {"f32": (["f32"], fixed(1.5), ["f32"], 1.0)}),
    "W1C": Target("lens", "causal", [8192], {"f32": (["f32"], fixed(1.5), ["f32"], 1.0)}),
}
# On a GPU.
UNASKED = {"bf16": (["bf16"], fixed(None), ["bf16"], None)}
ON_GPU = {
    "G1": Target("attention", "s2", [8192, 32768, 131072], UNASKED, ["32,8"]),
    "G2": Target("attention", "dense", [8192, 32768, 131072], UNASKED, ["32,8"]),
    "G3": Target(
        "step", "s2", [8192], {"bf16": (["bf16 hf", "bf16 chunked"], fixed(None), ["bf16 hf", "bf16 chunked"], None)}
    ),
}
# Of the plugin alone: field, at most.
ALONE = {"A1": [("call_ns", 100.0, "a call that does no work, ns"), ("load_ms", 50.0, "loading the plugin, ms")]}


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--python", default=sys.executable, help="a Python with torch, transformers and peft")
    parser.add_argument("--mclora", type=Path, default=ROOT / "target/release/mclora")
    parser.add_argument("--peer", type=Path, default=HERE / "peer", help="folder of the peer's scripts")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="what both sides run on")
    parser.add_argument("--targets", help="which comparisons, with commas; all of the device's by default")
    parser.add_argument("--n", help="lengths instead of the targets' own, with commas")
    parser.add_argument("--heads", action="append", help="heads instead of the targets' own, such as 9,3; may repeat")
    parser.add_argument("--dtypes", default="f32,mixed,bf16", help="our precision classes")
    parser.add_argument("--shape", default=SMOLLM2, help="of steps: width,blocks,heads,kv heads,MLP width,vocabulary")
    parser.add_argument("--head-dim", type=int, default=64, help="of attention")
    parser.add_argument("--group", default="0.25")
    parser.add_argument("--threads", type=int, help="2 by default; on a GPU all there are, for what the processor does")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reps", type=int, default=3, help="samples of attention or scores in a round")
    parser.add_argument("--steps", type=int, default=2, help="steps in a round")
    parser.add_argument("--json", type=Path, help="write all measurements and rows here")
    args = parser.parse_args()
    args.on_gpu = args.device == "cuda"
    args.known = ON_GPU if args.on_gpu else TARGETS
    known = [*args.known] + ([] if args.on_gpu else [*ALONE])
    args.targets = args.targets.split(",") if args.targets else known
    args.threads = args.threads or (os.cpu_count() if args.on_gpu else 2)
    unknown = [name for name in args.targets if name not in known]
    if unknown:
        parser.error(f"--targets: expected names out of {sorted(known)}, got {unknown}")
    if not args.mclora.is_file():
        parser.error(f"--mclora: {args.mclora} is no file; build it with `cargo build --release -p megacontext-lora`")
    args.dtypes = args.dtypes.split(",")
    return args


def run(command, env=None):
    """The one JSON line that a command prints, or {"error": ...}."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env={**os.environ, **(env or {})}
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0 and len(lines) == 1:
        return json.loads(lines[0])
    said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
    return {"error": said[-1]}


def commands(args, target, n, heads):
    """Name: (command, environment) of everything that a target compares at one size."""
    ours, peers = {}, {}
    for dtype in (dtype for dtype in target.dtypes if dtype in args.dtypes):
        if target.what == "attention":
            flags = ["--pattern", target.pattern, "--heads", heads, "--head-dim", args.head_dim, "--reps", args.reps]
        elif target.what == "lens":
            # The peer reads what ours, which runs before it, leaves there.
            flags = ["--attn", "dense", "--shape", LENSNET, "--reps", args.reps, "--files", args.files]
            flags += ["--causal"] if target.pattern == "causal" else []
        else:
            flags = ["--attn", target.pattern, "--shape", args.shape, "--steps", args.steps]
        common = [*flags, "--n", n, "--group", args.group, "--threads", args.threads]
        # Scores are made on the processor whatever there is.
        mine, theirs = ([], []) if target.what == "lens" else (["--device", name] for name in args.devices)
        ours[dtype] = ([args.mclora, "bench", target.what, "--dtype", dtype, *common, *mine], None)
        speed, _, memory, _ = target.dtypes[dtype]
        for peer in [*speed, *memory]:
            dtype_of_peer, _, loss = peer.partition(" ")
            own = ["--dtype", "f32" if dtype_of_peer == "mixed" else dtype_of_peer]
            if dtype_of_peer == "mixed":
                own += ["--products", "bf16"]
            if loss:
                own += ["--loss", loss]
            tunables = {"GLIBC_TUNABLES": TUNABLES} if loss == "chunked" else None
            peers[peer] = ([args.python, args.peer / f"{target.what}.py", *own, *common, *theirs], tunables)
    return ours, peers


def medians(rounds):
    """Every number of several lines as its median; an error if all failed."""
    good = [line for line in rounds if "error" not in line]
    if not good:
        return rounds[0]
    merged = dict(good[0])
    for key, value in merged.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            merged[key] = statistics.median(line[key] for line in good)
    return merged


class Measured:
    """Every command is run once for all targets that need it at a size, interleaved with the others there."""

    def __init__(self, args):
        self.args, self.lines, self.all = args, {}, []

    def at(self, targets, n, heads):
        ours, peers = {}, {}
        for target in targets:
            mine, theirs = commands(self.args, target, n, heads)
            ours.update(mine)
            peers.update(theirs)
        first = targets[0]
        size = (first.what, first.pattern, n, heads)
        todo = [(("ours", name), command) for name, command in ours.items()]
        todo += [(("peer", name), command) for name, command in peers.items()]
        rounds = {key: [] for key, _ in todo}
        for number in range(self.args.rounds):
            for key, (command, env) in todo:
                print(f"round {number + 1}: {size} {key}", file=sys.stderr, flush=True)
                line = run(command, env)
                rounds[key].append(line)
                self.all.append({"side": key[0], "variant": key[1], "round": number, **line})
        for key, lines in rounds.items():
            self.lines[(*size, *key)] = medians(lines)


def best(lines, key, pick):
    values = [line[key] for line in lines if line.get(key) is not None]
    return pick(values) if values else None


def ratio(a, b):
    return a / b if a and b else None


# What is compared: time, memory.
FIELDS = {
    "attention": ("fb_ms", "peak_extra_MB"), "lens": ("fwd_ms", "peak_extra_MB"), "step": ("step_s", "peak_rss_MB"),
}
FIELDS_ON_GPU = {**FIELDS, "step": ("step_s", "peak_device_MB")}


def rows_of(name, target, measured, args):
    """One row for each size and precision of a target."""
    time, memory = (FIELDS_ON_GPU if args.on_gpu else FIELDS)[target.what]
    for heads in args.heads or target.heads if target.what == "attention" else [None]:
        for n in args.lengths or target.lengths:
            for dtype in (dtype for dtype in target.dtypes if dtype in args.dtypes):
                speed_peers, wanted, memory_peers, memory_wanted = target.dtypes[dtype]
                at = (target.what, target.pattern, n, heads)
                ours = measured.lines[(*at, "ours", dtype)]
                against = [measured.lines[(*at, "peer", peer)] for peer in speed_peers]
                beside = [measured.lines[(*at, "peer", peer)] for peer in memory_peers]
                their_time, their_memory = best(against, time, min), best(beside, memory, min)
                speed, share = ratio(their_time, ours.get(time)), ratio(ours.get(memory), their_memory)
                errors = [line["error"] for line in (ours, *against, *beside) if "error" in line]
                met = None
                if speed is not None and wanted(heads, n) is not None:
                    met = speed >= wanted(heads, n)
                    if memory_wanted is not None:
                        met = met and share is not None and share <= memory_wanted
                yield {
                    "target": name, "what": target.what, "pattern": target.pattern, "n": n, "heads": heads,
                    "head_dim": args.head_dim if heads else None,
                    "dtype": dtype, "peer": " or ".join(speed_peers), "unit": time.rpartition("_")[2],
                    "ours": ours.get(time), "theirs": their_time, "speed": speed, "speed_wanted": wanted(heads, n),
                    "gflops": ours.get("gflops"), "ours_MB": ours.get(memory), "theirs_MB": their_memory,
                    "memory": share, "memory_wanted": memory_wanted, "met": met, "errors": errors,
                }


def shown(value, digits=2):
    return "-" if value is None else f"{value:.{digits}f}"


def markdown(rows, limits):
    head = ["target", "what", "ours", "peer", "n", "time ours", "time peer", "times as fast (wanted)",
            "memory ours, MB", "memory peer, MB", "memory ratio (wanted)", "GFLOP/s", "of the limit", "met"]
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        what = f"{row['what']} {row['pattern']}" + (f" {row['heads'].replace(',', '/')}" if row["heads"] else "")
        what += f" d {row['head_dim']}" if row["head_dim"] else ""
        digits, limit = (1 if row["unit"] == "ms" else 2), limits.get(row["dtype"])
        wanted = "-" if row["memory_wanted"] is None else f"≤ {row['memory_wanted']}"
        faster = "-" if row["speed_wanted"] is None else f"≥ {row['speed_wanted']}"
        verdict = "-" if row["speed"] and row["speed_wanted"] is None else "not measured"
        cells = [
            row["target"], what, row["dtype"], row["peer"], str(row["n"]),
            f"{shown(row['ours'], digits)} {row['unit']}", f"{shown(row['theirs'], digits)} {row['unit']}",
            f"{shown(row['speed'])} ({faster})", shown(row["ours_MB"], 0), shown(row["theirs_MB"], 0),
            f"{shown(row['memory'])} ({wanted})", shown(row["gflops"], 0),
            shown(ratio(row["gflops"], limit)), {True: "yes", False: "no", None: verdict}[row["met"]],
        ]
        yield "| " + " | ".join(cells) + " |"


def machine():
    """Name of the processor."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"


def gpu_of_peer(args):
    """What PyTorch calls its GPU; leaves with a line where it has none."""
    done = subprocess.run([args.python, args.peer / "device.py"], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or f"{args.python} ended with {done.returncode}").splitlines()[-1]
        raise SystemExit(f"--device cuda: {said}")
    return done.stdout.strip()


def main():
    args = parse()
    args.devices = ("cuda:0", "cuda") if args.on_gpu else ("cpu", "cpu")
    gpu = f"{gpu_of_peer(args)}, " if args.on_gpu else ""
    args.lengths = [int(n) for n in args.n.split(",")] if args.n else None
    folder = tempfile.TemporaryDirectory()
    args.files = Path(folder.name)
    measured, limits = Measured(args), {}
    # The limit is of products on the processor.
    for dtype in [] if args.on_gpu else args.dtypes:
        # A large product, in and out and back: as fast as our products get.
        sizes = ["--n", 4096, "--in", 2048, "--out", 2048, "--rank", 0, "--threads", args.threads]
        lines = [run([args.mclora, "bench", "linear", "--dtype", dtype, *sizes]) for _ in range(args.rounds)]
        limits[dtype] = medians(lines).get("gflops")
    chosen = {name: args.known[name] for name in args.targets if name in args.known}
    sizes = {}
    for target in chosen.values():
        for heads in args.heads or target.heads if target.what == "attention" else [None]:
            for n in args.lengths or target.lengths:
                sizes.setdefault((target.what, target.pattern, n, heads), []).append(target)
    for (_, _, n, heads), targets in sizes.items():
        measured.at(targets, n, heads)
    rows = [row for name, target in chosen.items() for row in rows_of(name, target, measured, args)]

    example = next((line for line in measured.all if line.get("lib") == "megacontext"), {})
    versions = next(
        (f"torch {line['version']}" for line in measured.all if line.get("lib") == "torch"), "no torch"
    )
    others = max((line["other"] for line in measured.all if line.get("other") is not None), default=None)
    limit = ", ".join(f"{dtype} {shown(value, 0)}" for dtype, value in limits.items()) or "not measured"
    print(
        f"{gpu}{machine()}, {args.threads} threads, {example.get('cpu', '-')}; {versions}; {args.rounds} rounds. "
        f"Large products of ours, GFLOP/s: {limit}. Other processes used up to {shown(others)} cores.\n"
    )
    if rows:
        print("\n".join(markdown(rows, limits)))
    for row in rows:
        for error in row["errors"]:
            print(f"\n{row['target']} {row['dtype']} at {row['n']}: {error}", end="")
    alone = []
    for name in (name for name in args.targets if name in ALONE):
        line = run([args.mclora, "bench", "load"])
        for key, most, text in ALONE[name]:
            value = line.get(key)
            alone.append({"target": name, "what": text, "value": value, "at_most": most})
            verdict = "not measured" if value is None else "yes" if value <= most else "no"
            print(f"\n{name}: {text}: {shown(value, 1)} (wanted: at most {most:g}; met: {verdict})", end="")
    print()
    if args.json:
        report = {"machine": machine(), "limits": limits, "rows": rows, "alone": alone, "measurements": measured.all}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
