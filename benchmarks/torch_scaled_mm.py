#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times torch._scaled_mm on the products of gemm_bench.

Prints one line of JSON; `gemm_bench --torch FILE` reads it. Exit code 2 where there is
no PyTorch or no GPU.
"""
import json
import statistics
import sys

# (T, N, K), as in gemm_bench.
SHAPES = [(4096, 4096, 4096), (8192, 8192, 8192), (8192, 6144, 2048), (8192, 2048, 8192),
          (16384, 12288, 4096)]
ROUNDS = 7
BATCH_MS = 8.0


def products():
    """Name, [m, n, k] and whether the first operand is a gradient in E5M2."""
    for tokens, n, k in SHAPES:
        shape = f"{tokens}x{n}x{k}"
        yield f"{shape} forward", (tokens, n, k), False
        yield f"{shape} input gradient", (tokens, k, n), True
        yield f"{shape} weight gradient", (n, k, tokens), True


def main():
    try:
        import torch
    except ImportError as error:
        print(f"torch_scaled_mm.py: PyTorch is missing ({error})", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("torch_scaled_mm.py: PyTorch finds no CUDA device", file=sys.stderr)
        return 2

    def batch_ms(work, runs):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(runs):
            work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / runs

    torch.manual_seed(1)
    one = torch.ones((), device="cuda")
    results = {}
    for name, (m, n, k), gradient in products():
        a = (torch.randn(m, k, device="cuda") * 64).to(
            torch.float8_e5m2 if gradient else torch.float8_e4m3fn)
        b = (torch.randn(n, k, device="cuda") * 64).to(torch.float8_e4m3fn)
        for fast in (False, True):
            def work():
                torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16,
                                 use_fast_accum=fast)
            first = batch_ms(work, 3)
            runs = max(1, round(BATCH_MS / first))
            batch_ms(work, runs)
            times = [batch_ms(work, runs) for _ in range(ROUNDS)]
            results[f"{name}, {'fast' if fast else 'promoted'}"] = statistics.median(times)
    print(json.dumps({"torch": torch.__version__, "device": torch.cuda.get_device_name(0),
                      "ms": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
