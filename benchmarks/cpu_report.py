"""What the CPU benchmark measured: tables, the goals that are missed, a plot.

``bench_cpu.py`` prints all of it as it goes. This prints it again from a JSON file that it wrote:

    python benchmarks/cpu_report.py FILE.json [--plot FILE.png]
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

# Contenders, by the names that they have in the JSON file.
FLOAT32, BFLOAT16, GGML, READ = "F.linear float32", "F.linear bfloat16", "ggml", "read"
OURS = ("exact", "int8")
UNSTEADY = 2.0  # slowest over quickest round


class Spread(NamedTuple):
    """Median and range of the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of some values."""
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[0], ordered[-1])


@dataclasses.dataclass
class Cell:
    """One weight and number of rows, multiplied by every contender in turn.

    Attributes:
        format: the weight's format.
        n: rows of the weight.
        k: columns of the weight.
        m: rows of the activations.
        threads: threads that each contender had.
        hot: one weight, which stays in the cache; else weights rotate.
        weight_bytes: bytes of the packed weight.
        read_bytes: bytes that one call of the contender "read" reads.
        ggml_path: the path that ggml was quickest with.
        seconds: of one call, by contender and round.
    """

    format: str
    n: int
    k: int
    m: int
    threads: int
    hot: bool
    weight_bytes: int
    read_bytes: int
    ggml_path: str | None
    seconds: dict[str, list[float]]

    @property
    def shape(self) -> str:
        """``NxK``."""
        return f"{self.n}x{self.k}"

    def gflops(self, contender: str) -> Spread | None:
        """Billions of operations (2 M N K) a second."""
        if contender not in self.seconds:
            return None
        work = 2e-9 * self.m * self.n * self.k
        return Spread.of(work / seconds for seconds in self.seconds[contender])

    def speedup(self, contender: str, other: str) -> Spread | None:
        """The other's time over the contender's, round by round."""
        if contender not in self.seconds or other not in self.seconds:
            return None
        pairs = zip(self.seconds[contender], self.seconds[other], strict=True)
        return Spread.of(theirs / ours for ours, theirs in pairs)

    def memory_share(self, contender: str) -> Spread | None:
        """Packed bytes a second over those that a plain read reaches, round by round."""
        share = self.speedup(contender, READ)
        if share is None:
            return None
        return Spread(*(self.weight_bytes / self.read_bytes * value for value in share))


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a cell should reach.

    Attributes:
        speedup: against ggml.
        others: formats with another speed-up.
        memory_share: of the bandwidth of a plain read, if cold.
    """

    speedup: float
    others: dict[str, float] = dataclasses.field(default_factory=dict)
    memory_share: float | None = None


# By compute and M, for these formats. Besides, nothing may be slower than F.linear in float32.
GOAL_FORMATS = ("q4_0", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
GOALS = {
    "int8": {
        1: Goal(1.6, memory_share=0.8),
        4: Goal(1.8),
        16: Goal(2.0),
        512: Goal(2.0, dict.fromkeys(("q4_0", "q3_k", "q5_k", "q6_k", "q8_0"), 3.0)),
    },
    "exact": {
        1: Goal(1.5),
        4: Goal(1.3),
        16: Goal(1.0),
        512: Goal(1.2, dict.fromkeys(("q4_k", "q2_k"), 0.8)),
    },
}


def misses(cell: Cell, compute: str) -> tuple[int, list[str]]:
    """How many goals a cell was held to, and a line for each that its median misses."""
    held: list[tuple[Spread | None, float, str]] = [
        (cell.speedup(compute, FLOAT32), 1.0, f"x {FLOAT32}")
    ]
    goal = GOALS.get(compute, {}).get(cell.m)
    if goal and cell.format in GOAL_FORMATS:
        speedup = goal.others.get(cell.format, goal.speedup)
        held.append((cell.speedup(compute, GGML), speedup, f"x ggml ({cell.ggml_path})"))
        if goal.memory_share:
            held.append((cell.memory_share(compute), goal.memory_share, "of the read bandwidth"))
    measured = [(spread, wanted, unit) for spread, wanted, unit in held if spread]
    where = f"{compute:6} {cell.format:9} {cell.shape:>11} M={cell.m:<4} threads={cell.threads}"
    return len(measured), [
        f"{where}  {spread.median:.2f} ({spread.low:.2f}-{spread.high:.2f}) {unit}, goal {wanted}"
        for spread, wanted, unit in measured
        if spread.median < wanted
    ]


def summary(cells: list[Cell]) -> str:
    """Every goal that is missed, and how many there are."""
    held, lines = 0, []
    for compute in OURS:
        for cell in cells:
            count, missed = misses(cell, compute)
            held += count
            lines += missed
    text = [f"goals: {held - len(lines)} of {held} reached", *lines]
    unsteady = sum(
        any(max(times) > UNSTEADY * min(times) for times in cell.seconds.values()) for cell in cells
    )
    if unsteady:
        text.append(
            f"unsteady: in {unsteady} of {len(cells)} cells some contender took over {UNSTEADY:g} "
            "times as long in one round as in another; an idle machine gives better figures"
        )
    return "\n".join(text)


def heading() -> str:
    """The two lines above a table of cells."""
    groups = f"{'':22}{'F.linear':^14}   {'ggml':17}" + "".join(
        f"   {compute:38}" for compute in OURS
    )
    ours = f"   {'GFLOP/s':>7} {'x ggml':>18} {'x f32':>6} {'DRAM':>4}"
    columns = (
        f"{'format':10}{'threads':>7}{'M':>5}{'f32':>7}{'bf16':>7}   {'GFLOP/s':>7} {'path':9}"
    )
    return groups.rstrip() + "\n" + columns + len(OURS) * ours


def row(cell: Cell) -> str:
    """One line of a table."""

    def rate(contender: str) -> str:
        value = cell.gflops(contender)
        return f"{value.median:.0f}" if value else "-"

    text = f"{cell.format:10}{cell.threads:7}{cell.m:5}{rate(FLOAT32):>7}{rate(BFLOAT16):>7}"
    text += f"   {rate(GGML):>7} {(cell.ggml_path or '').removeprefix('CPU_').lower():9}"
    for compute in OURS:
        against = cell.speedup(compute, GGML)
        ratio = f"{against.median:.2f} ({against.low:.2f}-{against.high:.2f})" if against else "-"
        dense = cell.speedup(compute, FLOAT32)
        share = cell.memory_share(compute)
        text += f"   {rate(compute):>7} {ratio:>18} {f'{dense.median:.2f}' if dense else '-':>6}"
        text += f" {f'{100 * share.median:.0f}%' if share else '-':>4}"
    return text


def require_matplotlib() -> Any:
    """The module ``matplotlib.pyplot``.

    Raises:
        SystemExit: it is not installed.
    """
    try:
        importlib.import_module("matplotlib").use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError:
        raise SystemExit("--plot: needs matplotlib, which is not installed") from None


def plot(cells: list[Cell], title: str, file: Path) -> None:
    """Draws GFLOP/s by format: a column of panels for each M, a row for each shape and threads."""
    pyplot = require_matplotlib()
    columns = sorted({cell.m for cell in cells})
    rows = list(dict.fromkeys((cell.shape, cell.threads) for cell in cells))
    names = list(dict.fromkeys(cell.format for cell in cells))
    bars = {GGML: "#999999", "exact": "#0072b2", "int8": "#d55e00"}
    lines = {FLOAT32: "--", BFLOAT16: ":"}
    figure, panels = pyplot.subplots(
        len(rows),
        len(columns),
        figsize=(1 + (0.8 + 0.25 * len(names)) * len(columns), 1.2 + 3 * len(rows)),
        squeeze=False,
        layout="constrained",
    )
    for (shape, threads), line_of_panels in zip(rows, panels, strict=True):
        for m, panel in zip(columns, line_of_panels, strict=True):
            here = {c.format: c for c in cells if (c.shape, c.threads, c.m) == (shape, threads, m)}
            for index, (contender, colour) in enumerate(bars.items()):
                found = [
                    (names.index(name) + 0.27 * (index - 1), rate)
                    for name, cell in here.items()
                    if (rate := cell.gflops(contender))
                ]
                if not found:
                    continue
                panel.bar(
                    [x for x, _ in found],
                    [rate.median for _, rate in found],
                    width=0.25,
                    color=colour,
                    label=contender,
                    yerr=[
                        [rate.median - rate.low for _, rate in found],
                        [rate.high - rate.median for _, rate in found],
                    ],
                    error_kw={"elinewidth": 0.7, "ecolor": "#333333"},
                )
            for contender, style in lines.items():
                rates = [rate.median for c in here.values() if (rate := c.gflops(contender))]
                if rates:
                    panel.axhline(
                        statistics.median(rates), color="black", linestyle=style, label=contender
                    )
            panel.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
            panel.set_title(f"M = {m}, {shape}, {threads} thread{'s' * (threads > 1)}", fontsize=9)
            panel.set_ylim(bottom=0)
            panel.grid(axis="y", linewidth=0.4, alpha=0.6)
            panel.set_axisbelow(True)
        line_of_panels[0].set_ylabel("GFLOP/s")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def title_of(record: dict[str, Any]) -> str:
    """One line that says what was measured where."""
    cells = record["cells"]
    hot = "hot" if cells and cells[0]["hot"] else "cold"
    ggml = f", ggml {record['ggml']['version']}" if record["ggml"] else ""
    return f"{record['cpu']}, torch {record['torch']}{ggml}; {hot} weights, median and range"


def main() -> int:
    """Prints the tables and the summary of a JSON file, and plots it if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file", type=Path, metavar="FILE.json")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw a plot")
    options = parser.parse_args()
    record = json.loads(options.file.read_text())
    cells = [Cell(**cell) for cell in record["cells"]]
    print(title_of(record))
    for shape in dict.fromkeys(cell.shape for cell in cells):
        print(f"\n{shape}\n{heading()}")
        print("\n".join(row(cell) for cell in cells if cell.shape == shape))
    print(f"\n{summary(cells)}")
    if options.plot:
        plot(cells, title_of(record), options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
