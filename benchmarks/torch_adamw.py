#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times torch.optim.AdamW(fused=True) in FP32 on the parameters of optim_bench.

Prints one line of JSON; `optim_bench --torch FILE` reads it. Exit code 2 where there is
no PyTorch or no GPU.
"""
import argparse
import json
import statistics
import sys

WARMUP = 3
WIDTH = 2048
VOCABULARY = 50304


def gpt_shapes(layers):
    """Embedding, and per layer qkv, out, up and down."""
    layer = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)]
    return [(VOCABULARY, WIDTH)] + layer * layers


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=["full", "small"], default="full",
                        help="small: 3 layers instead of 24")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    try:
        import torch
    except ImportError as error:
        print(f"torch_adamw.py: PyTorch is missing ({error})", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("torch_adamw.py: PyTorch finds no CUDA device", file=sys.stderr)
        return 2

    torch.manual_seed(1)
    params = []
    for shape in gpt_shapes(24 if args.scale == "full" else 3):
        param = torch.nn.Parameter(torch.randn(shape, device="cuda:0") * 0.02)
        param.grad = torch.randn(shape, device="cuda:0") * 0.02
        params.append(param)
    optimizer = torch.optim.AdamW(params, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
                                  fused=True)
    for _ in range(WARMUP):
        optimizer.step()
    torch.cuda.synchronize()
    # As in optim_bench: one after the other with an event between each two.
    events = [torch.cuda.Event(enable_timing=True) for _ in range(args.repeats + 1)]
    events[0].record()
    for event in events[1:]:
        optimizer.step()
        event.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in zip(events, events[1:])]
    median = statistics.median(times)
    print(json.dumps({
        "case": "torch fused AdamW FP32",
        "ms": median,
        "torch": torch.__version__,
        "spread": (max(times) - min(times)) / median,
        "parameters": sum(param.numel() for param in params),
        "tensors": len(params),
        "device": torch.cuda.get_device_name(0),
    }))
    return 0


if __name__ == "__main__":
    sys.exit(main())
