"""Linear layers in bfloat16 on few rows, x Wᵀ against (W xᵀ)ᵀ: python benchmarks/linear.py [--threads 2]

Decoding has few rows and reads every weight for them. Prints microseconds of both, by rows, for the layers of
models of three widths; the second is what language_self_play/linear.py does up to MOST_ROWS.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from language_self_play.linear import MOST_ROWS

# (inputs, outputs): MLPs of models of about 1 M, 30 M and 135 M parameters.
LAYERS = ((128, 384), (512, 1408), (576, 1536))
ROWS = (1, 8, 64, 256, MOST_ROWS, 2 * MOST_ROWS)
REPEATS = 9
CALLS = 20


def microseconds(call: Callable[[], torch.Tensor], clock: Callable[[], float]) -> float:
    """Median over REPEATS of the mean of CALLS; the first repeat warms up."""
    times = []
    for _ in range(REPEATS + 1):
        start = clock()
        for _ in range(CALLS):
            call()
        times.append((clock() - start) / CALLS)
    return 1e6 * statistics.median(times[1:])


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="processor time, on a busy machine")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    print("| layer | rows | x Wᵀ, µs | (W xᵀ)ᵀ, µs | times as fast |\n|---|---|---|---|---|")
    for inputs, outputs in LAYERS:
        weight = torch.randn(outputs, inputs).bfloat16()
        for rows in ROWS:
            x = torch.randn(rows, inputs).bfloat16()
            plain = microseconds(lambda x=x, w=weight: torch.nn.functional.linear(x, w), clock)
            turned = microseconds(lambda x=x, w=weight: (w @ x.T).T, clock)
            cells = f"{plain:.0f} | {turned:.0f} | {plain / turned:.2f}"
            print(f"| {inputs} → {outputs} | {rows} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
