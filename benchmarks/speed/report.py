"""Results to Markdown tables: medians, the range over rounds, targets and whether they are met."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from speed.timing import ratio

Result = dict[str, Any]
BEGIN, END = "<!-- begin: made by bench.py --report -->", "<!-- end: made by bench.py --report -->"
LARGE_VOCABULARY = 49_152

TITLES = {
    "0": "TRL's settings: seconds of a step",
    "1a": "1a. The Solver's half of a step against TRL's GRPOTrainer",
    "1b": "1b. A whole step against TRL's GRPOTrainer, the Challenger's group as one more prompt",
    "2": "2. Sampling alone",
    "3": "3. Learning alone against a plain padded implementation",
    "4": "4. Peak memory, growth over the imports",
    "5": "5. Growth when one quantity doubles",
    "6": "6. Distance to the machine",
}


def report(results: Iterable[Result]) -> str:
    """All tables that there are results for."""
    results = list(results)
    sections = []
    for item, title in TITLES.items():
        rows = [r for r in results if r["item"] == item]
        if item == "6":
            rows = [r for r in results if "flops" in r]
        if rows:
            header, line = TABLES[item]
            good = [r for r in rows if "error" not in r]
            lines = [_line(header), "|" + "---|" * len(header)]
            lines += [_line(cells) for r in good for cells in line(r)]
            failed = [] if item == "6" else [r for r in rows if "error" in r]
            lines += [f"\nNot measured: {r['id']}: {r['error']}" for r in failed]
            lines += [f"\nNot measured: {note}" for r in good for note in r.get("failed", [])]
            sections.append(f"### {title}\n\n" + "\n".join(lines))
    return "\n\n".join([*sections, _conditions(results)]) + "\n"


def replace_between(text: str, tables: str) -> str:
    """`text` with `tables` between the marks; at its end if it has none."""
    if BEGIN not in text:
        return f"{text.rstrip()}\n\n{BEGIN}\n{tables}{END}\n".lstrip()
    before, rest = text.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{tables}{END}{rest.split(END, 1)[1]}"


def _conditions(results: list[Result]) -> str:
    """Where the numbers come from: one sentence for each way in which rows were measured."""
    ways = sorted({r["conditions"] for r in results if "conditions" in r})
    return "\n".join(f"Measured with: {way}." for way in ways)


def _model(r: Result) -> list[str]:
    work = r["work"]
    size = work["size"] + (f", V = {work['vocabulary']}" if work["vocabulary"] else "")
    return [size, work["dtype"]]


def _kl(r: Result) -> str:
    return "yes" if r["work"]["beta"] else "no"


def _seconds(times: list[float]) -> str:
    return f"{statistics.median(times):.3g}"


def _fraction(r: Result, theirs: str, target: float | None) -> list[str]:
    """Ours, theirs, ours as a fraction of theirs, its range, the target, if any, met or not."""
    mine, other = r["times"]["ours"], r["times"][theirs]
    middle, least, most = ratio(mine, other)
    aimed = ["", ""] if target is None else [f"≤ {target}", _verdict(middle <= target)]
    numbers = [f"{middle:.3f}", f"{least:.3f}–{most:.3f}", str(len(mine))]
    return [_seconds(mine), _seconds(other), *numbers, *aimed]


def _speedup(r: Result, theirs: str, target: float) -> list[str]:
    """Ours, theirs, how many times as fast ours is, its range, the target, met or not."""
    mine, other = r["times"]["ours"], r["times"][theirs]
    middle, least, most = ratio(other, mine)
    numbers = [f"{middle:.2f}", f"{least:.2f}–{most:.2f}", str(len(mine)), f"≥ {target}"]
    return [_seconds(mine), _seconds(other), *numbers, _verdict(middle >= target)]


def _verdict(met: bool) -> str:
    return "met" if met else "**missed**"


def _settings(r: Result) -> list[list[str]]:
    fastest = min(r["times"], key=lambda name: min(r["times"][name]))
    return [
        [*_model(r), name, _seconds(times), "kept" if name == fastest else ""]
        for name, times in r["times"].items()
    ]


def _against_trl(r: Result) -> list[list[str]]:
    return [
        [
            *_model(r),
            _kl(r),
            *_fraction(r, "TRL", 0.4 if r["item"] == "1b" else None),
            r["settings"],
        ]
    ]


def _sampling(r: Result) -> list[list[str]]:
    theirs = next(side for side in r["times"] if side != "ours")
    target = 2.5 if theirs == "generate" else 1.0
    return [[*_model(r), f"{theirs}, {r['settings']}", *_speedup(r, theirs, target)]]


def _learning(r: Result) -> list[list[str]]:
    target = 2.5 if r["case"] == "challenger" else 1.0
    difference = f"{r['gradient_difference']:.0e}"
    return [[*_model(r), r["case"], *_speedup(r, "padded", target), difference]]


def _memory(r: Result) -> list[list[str]]:
    peaks = r["peaks_gib"]
    is_large = (r["work"]["vocabulary"] or 0) >= LARGE_VOCABULARY or r["work"]["size"] == "135M"
    pairs = [
        ("our step", "TRL's step"),
        ("our step", "TRL's step, 8 rows at once"),
        ("our sampling", "generate"),
        ("our learning", "padded learning"),
    ]
    lines = []
    for ours, theirs in pairs:
        if ours in peaks and theirs in peaks:
            fraction = peaks[ours] / peaks[theirs]
            # The target speaks of TRL as it is compared above.
            aimed = is_large and theirs == "TRL's step"
            cells = ["≤ 0.5", _verdict(fraction <= 0.5)] if aimed else ["", ""]
            numbers = [f"{peaks[ours]:.3f}", f"{peaks[theirs]:.3f}", f"{fraction:.2f}"]
            lines.append([*_model(r), f"{ours} / {theirs}", *numbers, *cells])
    return lines


def _growth(r: Result) -> list[list[str]]:
    once, twice = r["times"]["once"], r["times"]["twice"]
    middle, least, most = ratio(twice, once)
    memory = r["peaks_gib"]["twice"] / r["peaks_gib"]["once"]
    aimed = r["case"] in ("N", "G")
    cells = ["≤ 2.1", _verdict(middle <= 2.1)] if aimed else ["", ""]
    numbers = [f"{middle:.2f}", f"{least:.2f}–{most:.2f}", *cells, f"{memory:.2f}"]
    return [[*_model(r), r["case"], _seconds(once), _seconds(twice), *numbers]]


def _distance(r: Result) -> list[list[str]]:
    step_s, rate = statistics.median(r["times"]["ours"]), statistics.median(r["matmul_rates"])
    share = r["flops"] / step_s / rate
    numbers = [f"{r['flops'] / 1e9:.0f}", f"{step_s:.3g}", f"{rate / 1e9:.0f}", f"{share:.2f}"]
    return [[*_model(r), _kl(r), *numbers]]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


_COMPARED = ["range", "rounds", "target", "is"]
TABLES: dict[str, tuple[list[str], Callable[[Result], list[list[str]]]]] = {
    "0": (["model", "dtype", "settings", "s", "choice"], _settings),
    "1a": (
        ["model", "dtype", "KL", "ours, s", "TRL, s", "ours / TRL", *_COMPARED, "TRL's settings"],
        _against_trl,
    ),
    "1b": (
        ["model", "dtype", "KL", "ours, s", "TRL, s", "ours / TRL", *_COMPARED, "TRL's settings"],
        _against_trl,
    ),
    "2": (
        ["model", "dtype", "against", "ours, s", "theirs, s", "times as fast", *_COMPARED],
        _sampling,
    ),
    "3": (
        [
            "model",
            "dtype",
            "groups",
            "ours, s",
            "padded, s",
            "times as fast",
            *_COMPARED,
            "Δ gradient",
        ],
        _learning,
    ),
    "4": (["model", "dtype", "what", "ours, GiB", "theirs, GiB", "ratio", "target", "is"], _memory),
    "5": (
        [
            "model",
            "dtype",
            "doubled",
            "once, s",
            "twice, s",
            "time ×",
            "range",
            "target",
            "is",
            "memory ×",
        ],
        _growth,
    ),
    "6": (
        ["model", "dtype", "KL", "GFLOP of a step", "step, s", "matrix product, GFLOP/s", "share"],
        _distance,
    ),
}
