"""One step at the speed of the hardware: what `make bench` measures (see benchmarks/bench.py)."""
