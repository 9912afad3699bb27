#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How much of the collectives' time a program hides, from a trace that libkernel_trace.so wrote.

    overlap.py TRACE [--skip SHARE] [--names WORD...]

A collective's kernel is one whose name has one of the words; its time is hidden where kernels of
other streams run on the same device. The first SHARE of the traced time (warm-up) is left out.
"""
import argparse
from collections import defaultdict


def read(path):
    """Kernels by device: lists of (begin, end, stream, name)."""
    devices = defaultdict(list)
    with open(path) as lines:
        for line in lines:
            device, stream, begin, end, name = line.rstrip("\n").split(" ", 4)
            devices[int(device)].append((int(begin), int(end), int(stream), name))
    return devices


def union(intervals):
    """Sorted intervals without overlap that cover the same."""
    merged = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    return merged


def common(interval, cover):
    return sum(max(0, min(interval[1], e) - max(interval[0], b)) for b, e in cover
               if b < interval[1] and e > interval[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--skip", type=float, default=0.3)
    parser.add_argument("--names", nargs="+", default=["window_mean", "ncclDevKernel", "reduce_mean"])
    options = parser.parse_args()
    for device, kernels in sorted(read(options.trace).items()):
        first, last = min(k[0] for k in kernels), max(k[1] for k in kernels)
        start = first + options.skip * (last - first)
        kernels = [k for k in kernels if k[0] >= start]
        collectives = [k for k in kernels if any(word in k[3] for word in options.names)]
        streams = defaultdict(list)
        for begin, end, stream, _ in kernels:
            streams[stream].append((begin, end))
        covers = {s: union(i for t, list_ in streams.items() if t != s for i in list_)
                  for s in {k[2] for k in collectives}}
        by_name = defaultdict(lambda: [0, 0, 0])
        for begin, end, stream, name in collectives:
            row = by_name[name]
            row[0] += 1
            row[1] += end - begin
            row[2] += common((begin, end), covers[stream])
        total = sum(row[1] for row in by_name.values())
        hidden = sum(row[2] for row in by_name.values())
        print(f"device {device}: {len(collectives)} kernels of collectives, {total / 1e6:.3f} ms, "
              f"{100 * hidden / max(total, 1):.1f} % hidden")
        for name, (count, time, beside) in sorted(by_name.items(), key=lambda i: -i[1][1]):
            print(f"  {count:6d} x {time / count / 1e3:8.1f} us, {100 * beside / max(time, 1):5.1f} "
                  f"% hidden  {name[:70]}")


if __name__ == "__main__":
    main()
