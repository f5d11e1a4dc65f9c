"""Linear layers of few rows: torch's own product and ours, python benchmarks/linear.py [--threads 2]

Decoding has few rows and reads every weight for them. Prints microseconds by rows for the layers of models of
four widths: of torch's x Wᵀ and of what language_self_play/linear.py lays out, in float32 and in bfloat16. The
last columns say which type is the faster one where both are laid out. Every product reads other weights than
the one before, as decoding does: they come from memory, not from a cache.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import cycle

import torch

from language_self_play.linear import lay_out

# (inputs, outputs): the MLPs of models of about 1 M, 8 M, 30 M and 135 M parameters.
LAYERS = ((128, 768), (256, 1536), (512, 2816), (576, 3072))
ROWS = (1, 8, 64, 256)
REPEATS = 9
# Weights that are read in turn, in bytes.
READ_IN_TURN = 1 << 26


def microseconds(call: Callable[[], object], calls: int, clock: Callable[[], float]) -> float:
    """Median over REPEATS of the mean of `calls`; the first repeat warms up."""
    times = []
    for _ in range(REPEATS + 1):
        start = clock()
        for _ in range(calls):
            call()
        times.append((clock() - start) / calls)
    return 1e6 * statistics.median(times[1:])


def of_all(products: Sequence[Callable[[torch.Tensor], object]], x: torch.Tensor, clock) -> float:
    each = cycle(products)
    return microseconds(lambda: next(each)(x), len(products), clock)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="processor time, on a busy machine")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    print(
        "| layer | rows | float32, µs | laid out | times as fast | bfloat16, µs | laid out |"
        " times as fast | bfloat16 against float32 |\n|---|---|---|---|---|---|---|---|---|"
    )
    for inputs, outputs in LAYERS:
        number = max(4, READ_IN_TURN // (4 * inputs * outputs))
        layers = [torch.nn.Linear(inputs, outputs, bias=False) for _ in range(number)]
        of_type = {}
        for dtype in (torch.float32, torch.bfloat16):
            plain = [copy.deepcopy(layer).to(dtype) for layer in layers]
            of_type[dtype] = plain, [lay_out([layer], dtype) for layer in plain]
        for rows in ROWS:
            cells = []
            for dtype, (plain, laid_out) in of_type.items():
                x = torch.randn(rows, inputs, dtype=dtype)
                before, now = of_all(plain, x, clock), of_all(laid_out, x, clock)
                cells += [before, now]
            a, b, c, d = cells
            print(
                f"| {inputs} → {outputs} | {rows} | {a:.0f} | {b:.0f} | {a / b:.2f} | {c:.0f} |"
                f" {d:.0f} | {c / d:.2f} | {b / d:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
