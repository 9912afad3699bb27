#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times torch._scaled_mm for gemm_bench, which starts it and asks for a batch whenever it is
torch's turn.

Reads requests from stdin, a JSON object a line, and answers each with one on stdout:
  at the start    {"torch": VERSION, "device": NAME}
  {"m": M, "n": N, "k": K, "a": "e4m3" or "e5m2", "fast": true or false}
                  makes operands and forgets those before: {"ok": true} or {"error": TEXT}
  {"runs": N}     times a batch of as many products: {"ms": MILLISECONDS OF ONE}
Ends with its input; with exit code 3 at once where there is no PyTorch or no GPU.
"""
import json
import math
import sys

LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}


def main():
    try:
        import torch
    except ImportError as error:
        print(f"torch_scaled_mm.py: PyTorch is missing ({error})", file=sys.stderr)
        return 3
    if not torch.cuda.is_available():
        print("torch_scaled_mm.py: PyTorch finds no CUDA device", file=sys.stderr)
        return 3
    types = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}

    def operand(rows, columns, name):
        """As gemm_bench's own: normal values in BF16, scaled by the largest power of two that fits,
        because power and clock depend on the values."""
        wide = torch.randn(rows, columns, device="cuda").bfloat16()
        scale = 2.0 ** math.floor(math.log2(LARGEST[name] / wide.abs().max().item()))
        return (wide * scale).to(types[name]), torch.full((), 1.0 / scale, device="cuda")

    def product(case):
        a, a_scale = operand(case["m"], case["k"], case["a"])
        b, b_scale = operand(case["n"], case["k"], "e4m3")

        def run():
            torch._scaled_mm(a, b.t(), scale_a=a_scale, scale_b=b_scale,
                             out_dtype=torch.bfloat16, use_fast_accum=case["fast"])

        run()
        torch.cuda.synchronize()
        return run

    def batch_ms(run, runs):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(runs):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / runs

    def answer(reply):
        print(json.dumps(reply), flush=True)

    torch.manual_seed(1)
    answer({"torch": torch.__version__, "device": torch.cuda.get_device_name(0)})
    run = None
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "runs" in request:
            answer({"ms": batch_ms(run, request["runs"])})
            continue
        run = None
        torch.cuda.empty_cache()
        try:
            run = product(request)
            answer({"ok": True})
        except RuntimeError as error:
            answer({"error": str(error)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
