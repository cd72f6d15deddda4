"""What the GPU benchmark measured: tables, the goals and what misses them, a plot.

``bench_gpu.py`` prints all of it as it goes. This prints it again from JSON files that it wrote,
those of several runs together if they are of the same device:

    python benchmarks/gpu_report.py FILE.json ... [--plot FILE.png]
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Contenders, by their names in the JSON files. Any other is a kernel of linear asked for by name.
LINEAR, DENSE, READ = "linear", "F.linear", "read"
INT8 = "int8"  # linear with activations rounded to int8, by the default choice
DEQUANTIZE, COPY = "dequantize", "copy"
UNSTEADY = 1.1  # 90th over 10th percentile


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that ``percent`` of the values are below, between neighbours in proportion."""
    ordered = sorted(values)
    place = percent / 100 * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


class Spread(NamedTuple):
    """Median, 10th and 90th percentile of the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of some values."""
        found = list(values)
        return cls(statistics.median(found), percentile(found, 10), percentile(found, 90))

    def inverse(self) -> Spread:
        """One over each."""
        return Spread(1 / self.median, 1 / self.high, 1 / self.low)


def time_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Our time over theirs, round by round; by the medians if they had unequal rounds."""
    if len(ours) == len(theirs):
        return Spread.of(a / b for a, b in zip(ours, theirs, strict=True))
    value = statistics.median(ours) / statistics.median(theirs)
    return Spread(value, value, value)


@dataclasses.dataclass
class Cell:
    """One weight and number of rows, multiplied by every contender in turn.

    Attributes:
        format: the weight's format.
        dtype: of the activations, ``"float16"``.
        n: rows of the weight.
        k: columns of the weight.
        m: rows of the activations.
        weight_bytes: bytes of the packed weight.
        workspace_bytes: memory that ``linear`` took beside its output.
        microseconds: of one call, by contender and round.
        wrong: by contender, why it was not timed.
    """

    format: str
    dtype: str
    n: int
    k: int
    m: int
    weight_bytes: int
    workspace_bytes: int = 0
    microseconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    wrong: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def shape(self) -> str:
        """``NxK``."""
        return f"{self.n}x{self.k}"

    def time(self, contender: str) -> Spread | None:
        """Microseconds of one call."""
        times = self.microseconds.get(contender)
        return Spread.of(times) if times else None

    def ratio(self, contender: str, other: str) -> Spread | None:
        """The contender's time over the other's."""
        ours, theirs = self.microseconds.get(contender), self.microseconds.get(other)
        return time_ratio(ours, theirs) if ours and theirs else None

    def unsteady(self, contender: str) -> bool:
        """Whether the contender's rounds differ much."""
        time = self.time(contender)
        return time is not None and time.high > UNSTEADY * time.low


@dataclasses.dataclass
class Decoding:
    """A whole weight dequantised, and a device-to-device copy that moves as many bytes.

    Attributes:
        format: the weight's format.
        dtype: of the values.
        n: rows of the weight.
        k: columns of the weight.
        moved_bytes: read and written.
        microseconds: of one call, by contender and round.
        wrong: by contender, why it was not timed.
    """

    format: str
    dtype: str
    n: int
    k: int
    moved_bytes: int
    microseconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    wrong: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def shape(self) -> str:
        """``NxK``."""
        return f"{self.n}x{self.k}"


# ---- the goals -----------------------------------------------------------------------------------

GOAL_FORMATS = ("q4_0", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
FOUR_BIT_FORMATS = ("q4_0", "q4_k")
GOAL_DTYPES = ("float16", "bfloat16")
ONE_ROW = "M=1"
WORKSPACE_BYTES = 256 << 20
HOST_MICROSECONDS = 8.0  # beyond F.linear's own


@dataclasses.dataclass(frozen=True)
class Goal:
    """What ``linear`` should reach.

    Attributes:
        rows: the M that it is about.
        against: READ, DENSE, or ONE_ROW for the same product's time at M = 1.
        most: our time over that, at most.
        formats: which it is about.
        shapes: likewise, ``NxK``; None for all.
    """

    rows: tuple[int, ...]
    against: str
    most: float
    formats: tuple[str, ...] = GOAL_FORMATS
    shapes: tuple[str, ...] | None = None

    def concerns(self, cell: Cell) -> bool:
        """Whether the cell is held to it."""
        return (
            cell.m in self.rows
            and cell.dtype in GOAL_DTYPES
            and cell.format in self.formats
            and (self.shapes is None or cell.shape in self.shapes)
        )

    def words(self, value: float) -> str:
        """A time ratio in the goal's terms: speed-ups against F.linear, times against others."""
        return f"{1 / value:.2f}x" if self.against == DENSE else f"{value:.2f}"

    @property
    def sentence(self) -> str:
        """The goal in words."""
        rows = "/".join(str(m) for m in self.rows)
        if self.against == DENSE:
            return f"M={rows}: at least {self.words(self.most)} as fast as F.linear"
        other = "the read-only kernel's time" if self.against == READ else "the time at M=1"
        return f"M={rows}: at most {self.most:.2f} of {other}"


def _faster(rows: tuple[int, ...], speed: float, formats: tuple[str, ...]) -> Goal:
    return Goal(rows, DENSE, 1 / speed, formats)


GOALS = (
    Goal((1,), READ, 1.15, shapes=("14336x4096", "4096x14336")),
    Goal((1,), READ, 1.3, shapes=("4096x4096",)),
    Goal((2, 4, 8, 16), ONE_ROW, 1.15),
    _faster((2, 4, 8, 16), 2.0, FOUR_BIT_FORMATS),
    _faster((32,), 2.0, FOUR_BIT_FORMATS),
    _faster((64,), 1.5, FOUR_BIT_FORMATS),
    _faster((128,), 1.0, FOUR_BIT_FORMATS),
    _faster((512,), 0.65, GOAL_FORMATS),
    _faster((2048,), 0.88, GOAL_FORMATS),
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A cell held to a goal.

    Attributes:
        cell: the cell.
        goal: the goal.
        ratio: our time over the goal's reference; None if ``linear`` was wrong.
    """

    cell: Cell
    goal: Goal
    ratio: Spread | None

    @property
    def met(self) -> bool:
        """Whether the median reaches the goal."""
        return self.ratio is not None and self.ratio.median <= self.goal.most

    @property
    def figure(self) -> str:
        """What was reached, and where."""
        where = f"{self.cell.format} M={self.cell.m}"
        if self.ratio is None:
            return f"{where} WRONG"
        return f"{where} {self.goal.words(self.ratio.median)}"


def _key(cell: Cell) -> tuple[str, str, str]:
    return cell.shape, cell.dtype, cell.format


def outcomes(cells: Iterable[Cell], goals: Iterable[Goal] = GOALS) -> list[Outcome]:
    """Every cell against every goal that concerns it and whose reference was measured."""
    known = list(cells)
    one_row = {
        _key(c): c.microseconds[LINEAR] for c in known if c.m == 1 and LINEAR in c.microseconds
    }
    found = []
    for goal in goals:
        for cell in filter(goal.concerns, known):
            ours = cell.microseconds.get(LINEAR)
            if goal.against == ONE_ROW:
                theirs = one_row.get(_key(cell))
            else:
                theirs = cell.microseconds.get(goal.against)
            if LINEAR in cell.wrong:
                found.append(Outcome(cell, goal, None))
            elif ours and theirs:
                found.append(Outcome(cell, goal, time_ratio(ours, theirs)))
    return found


def summary(cells: list[Cell]) -> str:
    """How many goals are reached, and what misses them; what was wrong; what was unsteady."""
    held = outcomes(cells)
    text = [f"goals: {sum(one.met for one in held)} of {len(held)} reached"]
    for place in dict.fromkeys((one.cell.shape, one.cell.dtype) for one in held):
        text.append(" ".join(place))
        here = [one for one in held if (one.cell.shape, one.cell.dtype) == place]
        for goal in dict.fromkeys(one.goal for one in here):
            those = [one for one in here if one.goal == goal]
            missed = ", ".join(one.figure for one in those if not one.met)
            text.append(
                f"  {goal.sentence}: {sum(one.met for one in those)} of {len(those)}"
                + (f"; missed: {missed}" if missed else "")
            )
    workspace = max((cell.workspace_bytes for cell in cells), default=0)
    kept = "reached" if workspace <= WORKSPACE_BYTES else "MISSED"
    text.append(
        f"  workspace at most {WORKSPACE_BYTES >> 20} MB: {kept}, {workspace / 2**20:.0f} MB"
    )
    text += _wrongs(cells)
    measured = [(cell, contender) for cell in cells for contender in cell.microseconds]
    unsteady = sum(cell.unsteady(contender) for cell, contender in measured)
    if unsteady:
        text.append(
            f"unsteady (~): {unsteady} of {len(measured)} times, whose 90th percentile is over "
            f"{UNSTEADY:g} times the 10th"
        )
    return "\n".join(text)


def _wrongs(cells: list[Cell]) -> list[str]:
    """A line for each contender and format that was wrong, with the first place."""
    found: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        for contender in cell.wrong:
            found.setdefault((*_key(cell), contender), []).append(cell)
    return [
        f"WRONG: {' '.join(key)}: at M={', '.join(str(cell.m) for cell in those)}; "
        f"first: {those[0].wrong[key[-1]]}"
        for key, those in found.items()
    ]


# ---- tables --------------------------------------------------------------------------------------

# Another run on another day, to compare speed-ups with, not times: llama.cpp's CUDA kernels on
# 14336x4096 and this run's F.linear in float16, microseconds by M. Cold weights, CUDA graphs,
# activation quantisation included. 2026-11-22, one H100, torch 2.11.
REFERENCE_SHAPE, REFERENCE_DTYPE = "14336x4096", "float16"
REFERENCE_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
REFERENCE_DENSE = (43, 42, 42, 43, 43, 45, 44, 46, 92, 369)
REFERENCE = {
    "q4_0": (16.5, 16, 21, 34, 42, 49, 65, 97, 321, 1141),
    "q4_k": (19, 24, 38, 71, 40, 50, 68, 112, 362, 1279),
    "q5_k": (21, 30, 44, 72, 45, 55, 75, 117, 382, 1341),
    "q6_k": (30, 30, 40, 61, 54, 64, 86, 137, 446, 1610),
    "q8_0": (24, 27, 30, 44, 49, 57, 71, 103, 317, 1139),
    "q2_k": (21, 24, 39, 62, 45, 62, 91, 269, 701, 2011),
    "q3_k": (33, 37, 52, 71, 44, 60, 78, 143, 449, 1597),
}
REFERENCE_TITLE = (
    "for comparison, ANOTHER run (2026-11-22, measured on one H100 with torch 2.11): llama.cpp's "
    "speed against that run's F.linear"
)


def grid(title: str, corner: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as text: a title, a head, and rows whose first field is their name."""
    table = [(corner, *columns), *rows]
    first = max(len(row[0]) for row in table)
    widths = [max(len(row[i]) for row in table) for i in range(1, len(columns) + 1)]
    lines = [
        "  ".join(
            [f"{row[0]:{first}}", *(f"{v:>{w}}" for v, w in zip(row[1:], widths, strict=True))]
        )
        for row in table
    ]
    return "\n".join([title, *lines])


def micro(value: float) -> str:
    """Microseconds, to three figures or so."""
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _time(cell: Cell | None, contender: str) -> str:
    if cell is None:
        return "-"
    if contender in cell.wrong:
        return "WRONG"
    time = cell.time(contender)
    if time is None:
        return "-"
    return micro(time.median) + ("~" if cell.unsteady(contender) else "")


def _speed(cell: Cell | None, other: str, percent: bool) -> str:
    """``linear``'s speed over another contender's."""
    ratio = cell.ratio(LINEAR, other) if cell else None
    if ratio is None:
        return "WRONG" if cell and LINEAR in cell.wrong else "-"
    return f"{100 / ratio.median:.0f}%" if percent else f"{1 / ratio.median:.2f}"


def tables(cells: list[Cell]) -> str:
    """All tables of the cells of one shape and dtype."""
    by_place = {(cell.format, cell.m): cell for cell in cells}
    names = list(dict.fromkeys(cell.format for cell in cells))
    rows = sorted({cell.m for cell in cells})
    heads = [f"M={m}" for m in rows]
    where = f"{cells[0].shape} {cells[0].dtype}"

    def lines(show: Callable[[Cell | None], str]) -> list[list[str]]:
        return [[name, *(show(by_place.get((name, m))) for m in rows)] for name in names]

    dense = ["F.linear"]
    for m in rows:
        times = [time.median for cell in cells if cell.m == m and (time := cell.time(DENSE))]
        dense.append(micro(statistics.median(times)) if times else "-")
    found = [
        grid(
            f"{where}: microseconds of linear, packed cold weights",
            "format",
            heads,
            [*lines(lambda cell: _time(cell, LINEAR)), dense],
        )
    ]
    speeds = lines(lambda cell: _speed(cell, DENSE, percent=False))
    found.append(grid("speed against F.linear on the dequantised weight", "format", heads, speeds))
    if any(READ in cell.microseconds for cell in cells):
        shares = lines(lambda cell: _speed(cell, READ, percent=True))
        for line in shares:
            own = [time.median for c in cells if c.format == line[0] and (time := c.time(READ))]
            line.insert(1, micro(statistics.median(own)) if own else "-")
        title = "share of the speed of a kernel that only reads the packed weight"
        found.append(grid(title, "format", ["read us", *heads], shares))
    return "\n\n".join([*found, *_kernel_table(by_place, names, rows)])


def reference_table(shape: str, dtype: str, device: str, rows: Sequence[int]) -> str | None:
    """llama.cpp's speed-ups from another run; None for what that run did not measure."""
    if (shape, dtype) != (REFERENCE_SHAPE, REFERENCE_DTYPE) or "H100" not in device:
        return None
    places = [REFERENCE_ROWS.index(m) for m in rows if m in REFERENCE_ROWS]
    return grid(
        REFERENCE_TITLE,
        "format",
        [f"M={REFERENCE_ROWS[i]}" for i in places],
        [
            [name, *(f"{REFERENCE_DENSE[i] / times[i]:.2f}" for i in places)]
            for name, times in REFERENCE.items()
        ],
    )


def quickest(cell: Cell) -> str | None:
    """The kernel asked for by name that took the least time; not of those that round to int8."""
    times = {
        name: statistics.median(values)
        for name, values in cell.microseconds.items()
        if name not in (LINEAR, DENSE, READ, INT8)
    }
    return min(times, key=lambda name: times[name]) if times else None


def _kernel_table(
    by_place: dict[tuple[str, int], Cell], names: list[str], rows: list[int]
) -> list[str]:
    tried = {
        name: None
        for cell in by_place.values()
        for name in (*cell.microseconds, *cell.wrong)
        if name not in (LINEAR, DENSE, READ)
    }
    if not tried:
        return []
    lines = []
    for name in names:
        for kernel in (*tried, LINEAR):
            line = [f"{name} {kernel}"]
            for m in rows:
                cell = by_place.get((name, m))
                best = cell is not None and quickest(cell) == kernel
                line.append(("*" if best else "") + _time(cell, kernel))
            lines.append(line)
    title = "kernels asked for by name, microseconds; * the quickest, linear is the default choice"
    return [grid(title, "format kernel", [f"M={m}" for m in rows], lines)]


def decoding_table(decodings: list[Decoding]) -> str:
    """``dequantize`` of one shape and dtype."""
    lines = []
    for one in decodings:
        ours = one.microseconds.get(DEQUANTIZE)
        if not ours:
            lines.append([one.format, "WRONG" if DEQUANTIZE in one.wrong else "-", "-", "-"])
            continue
        time = statistics.median(ours)
        copy = one.microseconds.get(COPY)
        share = f"{100 / time_ratio(ours, copy).median:.0f}%" if copy else "-"
        lines.append([one.format, micro(time), f"{1e-3 * one.moved_bytes / time:.0f}", share])
    title = (
        f"{decodings[0].shape} {decodings[0].dtype}: dequantize, against a copy of as many bytes"
    )
    return grid(title, "format", ["us", "GB/s", "of copy"], lines)


def host_table(host: dict[str, dict[str, dict[str, float]]]) -> str:
    """Microseconds of host time by mode, M and function, and the goal."""
    functions = list(next(iter(next(iter(host.values())).values())))
    lines, missed = [], []
    for mode, by_rows in host.items():
        for m, times in by_rows.items():
            lines.append([f"{mode} M={m}", *(f"{times[name]:.1f}" for name in functions)])
            beyond = times[LINEAR] - times[DENSE]
            if beyond > HOST_MICROSECONDS:
                missed.append(f"{mode} M={m} {beyond:.1f}")
    goal = f"goal: linear at most {HOST_MICROSECONDS:g} us beyond F.linear: "
    table = grid("host microseconds of one call on a tiny weight", "mode", functions, lines)
    return f"{table}\n{goal}{'missed: ' + ', '.join(missed) if missed else 'reached'}"


# ---- plot ----------------------------------------------------------------------------------------


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
    """Draws time against M: a panel for each shape and dtype, a line for each format."""
    pyplot = require_matplotlib()
    places = list(dict.fromkeys((cell.shape, cell.dtype) for cell in cells))
    names = list(dict.fromkeys(cell.format for cell in cells))
    colours = {name: f"C{i % 10}" for i, name in enumerate(names)}
    styles = {name: "-" if i < 10 else "-." for i, name in enumerate(names)}
    columns = min(3, len(places))
    lines = -(-len(places) // columns)
    figure, panels = pyplot.subplots(
        lines,
        columns,
        figsize=(1.5 + 5 * columns, 0.5 + 5 * lines),
        squeeze=False,
        layout="constrained",
    )
    for spare in panels.flat[len(places) :]:
        spare.set_axis_off()
    for place, panel in zip(places, panels.flat, strict=False):
        here = [cell for cell in cells if (cell.shape, cell.dtype) == place]
        rows = sorted({cell.m for cell in here})
        for name in names:
            found = [(c.m, t) for c in here if c.format == name and (t := c.time(LINEAR))]
            if not found:
                continue
            found.sort()
            panel.errorbar(
                [m for m, _ in found],
                [t.median for _, t in found],
                yerr=[[t.median - t.low for _, t in found], [t.high - t.median for _, t in found]],
                color=colours[name],
                linestyle=styles[name],
                marker="o",
                markersize=3,
                linewidth=1.2,
                elinewidth=0.7,
                label=name,
            )
        dense = []
        for m in rows:
            times = [t.median for c in here if c.m == m and (t := c.time(DENSE))]
            if times:
                dense.append((m, statistics.median(times)))
        panel.plot([m for m, _ in dense], [t for _, t in dense], "k--", linewidth=1.5, label=DENSE)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(rows, [str(m) for m in rows], fontsize=8)
        panel.set_xlabel("M, rows of activations")
        panel.set_title(" ".join(place), fontsize=9)
        panel.grid(which="both", linewidth=0.3, alpha=0.6)
    for line in panels:
        line[0].set_ylabel("microseconds")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


# ---- the whole of a run --------------------------------------------------------------------------


def title_of(record: dict[str, Any]) -> str:
    """One line that says what was measured where."""
    return (
        f"{record['device']}, {record['driver']}, torch {record['torch']}, {record['date']}; "
        "cold weights, median and 10th to 90th percentile"
    )


def place_report(cells: list[Cell], decodings: list[Decoding], device: str) -> str:
    """Everything about one shape and dtype."""
    parts = [tables(cells)] if cells else []
    if decodings:
        parts.append(decoding_table(decodings))
    if cells:
        rows = sorted({cell.m for cell in cells})
        reference = reference_table(cells[0].shape, cells[0].dtype, device, rows)
        parts += [reference] if reference else []
    return "\n\n".join(parts)


def report(record: dict[str, Any]) -> str:
    """A JSON file's tables and goals."""
    cells = [Cell(**cell) for cell in record["cells"]]
    decodings = [Decoding(**one) for one in record["decodings"]]
    parts = [title_of(record), f"an empty node of a graph: {record['empty_node_us']:.2f} us"]
    measured: list[Cell | Decoding] = [*cells, *decodings]
    for place in dict.fromkeys((one.shape, one.dtype) for one in measured):
        parts.append(
            place_report(
                [cell for cell in cells if (cell.shape, cell.dtype) == place],
                [one for one in decodings if (one.shape, one.dtype) == place],
                record["device"],
            )
        )
    if record["host_us"]:
        parts.append(host_table(record["host_us"]))
    if cells:
        parts.append(summary(cells))
    return "\n\n".join(parts)


def merged(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Several runs as one; a cell that was measured again counts as measured last.

    Raises:
        SystemExit: they are of different devices or versions.
    """
    first, *others = records
    for other in others:
        for what in ("device", "torch"):
            if other[what] != first[what]:
                raise SystemExit(f"{what}: must be {first[what]} in all files, got {other[what]}")
    record = {**first, "host_us": {}}
    for key, place in (
        ("cells", ("n", "k", "dtype", "format", "m")),
        ("decodings", ("n", "k", "dtype", "format")),
    ):
        kept = {tuple(one[p] for p in place): one for run in records for one in run[key]}
        record[key] = list(kept.values())
    for run in records:
        record["host_us"] = run["host_us"] or record["host_us"]
    return record


def main() -> int:
    """Prints the tables and goals of JSON files, and plots them if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw a plot")
    options = parser.parse_args()
    record = merged([json.loads(file.read_text()) for file in options.files])
    print(report(record))
    if options.plot:
        plot([Cell(**cell) for cell in record["cells"]], title_of(record), options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
