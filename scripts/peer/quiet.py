"""What the peer's scripts share: memory of this process, quiet samples, one JSON line per measurement.

The rules are those of `mclora bench`: a warm-up first; the median is over the samples during which other processes used
less than 0.15 cores, or over all where none was so quiet; memory is VmHWM, reset through /proc/self/clear_refs. Linux only.
"""
import ctypes
import gc
import json
import os
import statistics
import time

TICKS = os.sysconf("SC_CLK_TCK")
QUIET = 0.15
SAMPLE = 0.2


def status(key):
    """A figure of /proc/self/status, in bytes."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise KeyError(key)


def start_of_memory():
    """Gives unused memory back, resets the peak, returns what is resident now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return status("VmRSS")


def processor_times():
    """Busy seconds of the machine and of this process."""
    with open("/proc/stat") as file:
        fields = [int(field) for field in file.readline().split()[1:]]
    busy = sum(fields[i] for i in (0, 1, 2, 5, 6, 7))
    times = os.times()
    return busy / TICKS, times.user + times.system


def sample(work, reps, tries, warm_up):
    """(median, best, quiet samples, cores that others used), in seconds; `warm_up` is how long the work took before."""
    runs = max(1, int(SAMPLE / max(warm_up, 1e-9)))
    samples = []
    while len(samples) < tries and sum(others < QUIET for _, others in samples) < reps:
        (busy, own), begin = processor_times(), time.perf_counter()
        for _ in range(runs):
            work()
        seconds = time.perf_counter() - begin
        busy_after, own_after = processor_times()
        samples.append((seconds / runs, max(0.0, (busy_after - busy - (own_after - own)) / seconds)))
    quiet = [seconds for seconds, others in samples if others < QUIET]
    return (
        statistics.median(quiet or [seconds for seconds, _ in samples]),
        min(seconds for seconds, _ in samples),
        len(quiet),
        round(statistics.median(others for _, others in samples), 2),
    )


def timed(work):
    """Seconds of one run."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def group_of(text, n):
    """A group in entries: `0.25` is a part of n, `2048` a number of them."""
    number = float(text)
    return round(number * n) if "." in text else min(int(number), n)


def numbers(text):
    return [int(part) for part in text.split(",")]


def tell(**fields):
    print(json.dumps(fields), flush=True)
