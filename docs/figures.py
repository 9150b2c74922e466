"""The pictures of `docs/equations.md`: `python docs/figures.py` writes them to `docs/pictures/`.

Every number in them comes from running the library: the tree from `minrnn.ops.scans`, the counts
and errors from `minrnn.bench`. Takes about half a minute; needs matplotlib.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from math import log2
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.nn.functional import softplus

from minrnn import bench
from minrnn.ops import scans

PICTURES = Path(__file__).parent / "pictures"

# the example of equations.md: halves and ones, so that every number stays short
EXAMPLE_A = (1.0, 0.5, 1.0, 0.5, 0.5, 1.0, 0.5, 1.0)
EXAMPLE_B = (2.0, 1.0, 8.0, 3.0, 2.0, 6.0, 8.0, 1.0)
EXAMPLE_H0 = 16.0

INK, GREY, BLUE = "#222222", "#808080", "#1f5a99"
ORANGE, GREEN, RED = "#b85a00", "#2c7a3f", "#a8203a"
COLOURS = {"sequential": INK, "hillis_steele": GREEN, "blelloch": BLUE, "log_space": RED}
MARKERS = {"sequential": "o", "hillis_steele": "^", "blelloch": "s", "log_space": "D"}


def main() -> None:
    """Draw all pictures."""
    torch.set_num_threads(1)
    matplotlib.use("agg")
    matplotlib.rcParams.update({"font.size": 10, "axes.spines.top": False})
    matplotlib.rcParams.update({"axes.spines.right": False, "text.color": INK})
    PICTURES.mkdir(exist_ok=True)
    for name, draw in {"tree": tree, "cost": cost, "precision": precision}.items():
        path = PICTURES / f"{name}.png"
        # without the version of matplotlib in it, the file depends on the picture alone
        draw().savefig(path, dpi=125, facecolor="white", metadata={"Software": None})
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KB")


def tree() -> Figure:
    """The up-sweep and the down-sweep of `scans.blelloch` over eight steps."""
    levels, befores = _sweeps()
    figure = Figure(figsize=(8, 8.6))
    up, down = figure.subplots(2, height_ratios=(4.45, 6.1))
    figure.subplots_adjust(left=0.01, right=0.99, top=0.995, bottom=0.005, hspace=0.02)
    for axes in (up, down):
        axes.set_axis_off()
        axes.set_xlim(-1.75, 7.55)
    _draw_up(up, levels)
    _draw_down(down, levels, befores)
    return figure


def _sweeps() -> tuple[list[list[tuple[float, float]]], list[list[float]]]:
    """(a, b) of each node and the state before it, row by row from the steps to the root."""
    a, b = (torch.tensor(x).view(1, 8, 1) for x in (EXAMPLE_A, EXAMPLE_B))
    rows = [scans._Steps(a, b, None)]
    while rows[-1].b.shape[1] > 1:
        rows.append(scans._up(rows[-1]))
    before = [torch.tensor([[[EXAMPLE_H0]]])]
    for row in reversed(rows[:-1]):
        before.append(scans._down(row, before[-1]))
    levels = [
        [*zip(row.a.flatten().tolist(), row.b.flatten().tolist(), strict=True)] for row in rows
    ]
    return levels, [x.flatten().tolist() for x in reversed(before)]


def _draw_up(axes: Axes, levels: Sequence[Sequence[tuple[float, float]]]) -> None:
    axes.set_ylim(-0.8, 3.65)
    axes.text(-1.7, 3.45, "Up-sweep", fontsize=13, weight="bold", va="center")
    rule = "a parent composes its children: (a left · a right,  a right · b left + b right)"
    axes.text(-0.35, 3.45, rule, va="center")
    for depth, row in enumerate(levels):
        side = ("a, b of\neach step", "each pair", "each four", "all")[depth]
        axes.text(-1.7, depth, side, **_SIDE)
        for n, (a, b) in enumerate(row):
            x = _centre(depth, n)
            if depth > 0:
                for child in (2 * n, 2 * n + 1):
                    _edge(axes, (_centre(depth - 1, child), depth - 1), (x, depth), BLUE)
            _node(axes, x, depth, f"{_short(a)},  {_short(b)}", BLUE)
    _draw_times(axes, -0.5)


def _draw_down(
    axes: Axes,
    levels: Sequence[Sequence[tuple[float, float]]],
    befores: Sequence[Sequence[float]],
) -> None:
    axes.set_ylim(-1.95, 4.05)
    axes.text(-1.7, 3.82, "Down-sweep", fontsize=13, weight="bold", va="center")
    rule = "the root gets h0 = 16; a left child gets what its parent got,\n"
    rule += "a right child what its left sibling makes of that: a left · state + b left"
    axes.text(0.0, 3.72, rule, va="center", linespacing=1.35)
    for depth, row in enumerate(befores):
        side = ("state before\neach step", "each pair", "each four", "all")[depth]
        axes.text(-1.7, depth, side, **_SIDE)
        for n, before in enumerate(row):
            x, is_right = _centre(depth, n), n % 2 == 1 and depth < 3
            words = _short(before)
            if depth < 3:
                colour = ORANGE if is_right else GREY
                _edge(axes, (_centre(depth + 1, n // 2), depth + 1), (x, depth), colour)
            if is_right:
                a, b = levels[depth][n - 1]
                words += f"\n{_short(a)}·{_short(befores[depth + 1][n // 2])} + {_short(b)}"
            _node(axes, x, depth, words, ORANGE if is_right else GREY)
    axes.text(-1.7, -1.2, "h, after\neach step", **_SIDE)
    for t, ((a, b), before) in enumerate(zip(levels[0], befores[0], strict=True)):
        _edge(axes, (t, 0), (t, -1.2), BLUE)
        h = a * before + b
        _node(axes, t, -1.2, f"{_short(h)}\n{_short(a)}·{_short(before)} + {_short(b)}", BLUE)
    _draw_times(axes, -1.75)


def _draw_times(axes: Axes, y: float) -> None:
    for t in range(8):
        axes.text(t, y, f"t = {t + 1}", ha="center", va="center", color=GREY, fontsize=9.5)


_SIDE = {"ha": "left", "va": "center", "color": GREY, "fontsize": 9.5}


def _centre(depth: int, n: int) -> float:
    """Where node n of a row stands, over the middle of the steps that it spans."""
    return 2**depth * (n + 0.5) - 0.5


def _edge(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    axes.plot(*zip(start, end, strict=True), color=colour, linewidth=1.3, zorder=1)


def _node(axes: Axes, x: float, y: float, words: str, colour: str) -> None:
    """A white box; a second line of words is the sum behind the first."""
    box = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": colour}
    first, *sums = words.split("\n")
    words = "\n".join([f"$\\mathbf{{{first}}}$", *sums]) if sums else first
    axes.text(x, y, words, ha="center", va="center", fontsize=9, bbox=box, linespacing=1.3)


def _short(x: float) -> str:
    """A number as a person would write it: 12, ½, 1/16."""
    vulgar = {Fraction(1, 2): "½", Fraction(1, 4): "¼", Fraction(1, 8): "⅛"}
    return vulgar.get(Fraction(x), str(Fraction(x)))


def cost() -> Figure:
    """Work and depth against T, counted, with the formulas as lines."""
    lengths = [2**n for n in range(1, 13)]
    counts = {name: [bench.cost(name, T) for T in lengths] for name in bench.SCANS}
    work: dict[str, tuple[str, Callable[[int], float]]] = {
        "sequential": ("T", lambda T: T),
        "hillis_steele": ("2 (T log2 T - T + 1)", lambda T: 2 * (T * log2(T) - T + 1)),
        "blelloch": ("4 T - 3", lambda T: 4 * T - 3),
        "log_space": ("11 T - 4", lambda T: 11 * T - 4),
    }
    depth: dict[str, tuple[str, Callable[[int], float]]] = {
        "sequential": ("T", lambda T: T),
        "hillis_steele": ("log2 T", log2),
        "blelloch": ("2 log2 T", lambda T: 2 * log2(T)),
        "log_space": ("4 log2 T + 4", lambda T: 4 * log2(T) + 4),
    }
    figure = Figure(figsize=(8, 7.8))
    above, below = figure.subplots(2, sharex=True)
    figure.subplots_adjust(left=0.085, right=0.7, top=0.955, bottom=0.165, hspace=0.2)
    above.set_title("Work: arithmetic operations per channel", loc="left", fontsize=11)
    below.set_title("Depth: longest chain of dependent operations", loc="left", fontsize=11)
    for axes, formulas, which in ((above, work, 0), (below, depth, 1)):
        for name, (words, formula) in formulas.items():
            marks = [count[which] for count in counts[name]]
            line = [formula(T) for T in lengths]
            axes.plot(lengths, line, color=COLOURS[name], linewidth=1.2)
            style = {"color": COLOURS[name], "marker": MARKERS[name], "markersize": 5}
            axes.plot(lengths, marks, linestyle="none", **style)
            _label(axes, lengths[-1], line[-1], f"{name}:  {words}", COLOURS[name])
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(color="#e8e8e8", linewidth=0.7)
    below.set_xlabel("T, number of steps")
    caption = (
        "Marks are counted while the code runs, lines are the formulas beside them. A multiply-add "
        "is one\noperation; views, cat, stack and clone cost nothing. cumsum and logcumsumexp of "
        "log_space are not\nlooked into: each is charged as one prefix scan, work 3 T - 2 and "
        "depth 2 log2 T."
    )
    figure.text(0.03, 0.012, caption, fontsize=9.5, linespacing=1.35, va="bottom")
    return figure


def _label(axes: Axes, x: float, y: float, words: str, colour: str) -> None:
    """Words to the right of the last point of a line."""
    offset = {"xytext": (9, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(words, (x, y), color=colour, annotation_clip=False, fontsize=10, **offset)


def precision() -> Figure:
    """The relative error of the four scans against T, one panel for each gate mean."""
    lengths = [2**n for n in range(4, 17)]
    rows = bench.precision(lengths=lengths, algorithms=bench.SCANS)
    figure = Figure(figsize=(8, 4.6))
    panels = figure.subplots(1, 3, sharey=True)
    figure.subplots_adjust(left=0.085, right=0.985, top=0.89, bottom=0.23, wspace=0.07)
    for axes, mean in zip(panels, bench.GATE_MEANS, strict=True):
        for name in bench.SCANS:
            errors = [
                row.error
                for row in rows
                if (row.algorithm, row.gate_mean, row.dtype) == (name, mean, torch.float32)
            ]
            style = {"marker": MARKERS[name], "markersize": 4, "linewidth": 1.2}
            axes.plot(lengths, errors, color=COLOURS[name], label=name, **style)
        decay, rounding = _log_decay(mean), [2.0**-24 * _log_decay(mean) * T for T in lengths]
        axes.plot(lengths, rounding, color=RED, linestyle=":", linewidth=1.2)
        title = f"gate mean {mean:g}\nmean of |log a| = {decay:.2g}"
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_xticks([2**n for n in (4, 8, 12, 16)])
        axes.set_yscale("log")
        axes.set_ylim(2e-8, 5e-2)
        axes.grid(color="#e8e8e8", linewidth=0.7)
        axes.set_xlabel("T, number of steps")
    panels[0].set_ylabel("largest relative error")
    panels[0].text(2**11.6, 3e-3, "log_space", color=RED, ha="right")
    panels[0].text(2**12.3, 3.5e-5, "2⁻²⁴ · |A_T|", color=RED, ha="left", fontsize=9)
    panels[2].legend(loc="upper left", frameon=False, fontsize=9.5)
    caption = (
        "float32 on the CPU against float64, eight channels. Dotted: 2⁻²⁴ times |A_T|, the sum of "
        "|log a| over\nall steps: what rounding this one number to float32 may change in the "
        "exponent of h."
    )
    figure.text(0.03, 0.015, caption, fontsize=9.5, linespacing=1.35, va="bottom")
    return figure


def _log_decay(mean: float) -> float:
    """The mean of |log a| = softplus(k) for k normal around `mean`."""
    quantiles = (torch.arange(10000, dtype=torch.float64) + 0.5) / 10000
    return softplus(torch.special.ndtri(quantiles) + mean).mean().item()


if __name__ == "__main__":
    main()
