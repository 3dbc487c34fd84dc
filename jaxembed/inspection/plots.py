"""Plots as SVG text, drawn in the colours of the page around them."""

import math
from collections.abc import Callable, Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 560, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 42
_NUM_BARS = 48


def norm_histogram(lower: np.ndarray, upper: np.ndarray, counts: np.ndarray) -> str:
    """Rows by norm, gathered into bars of equal width; of equal ratio where norms span more than a thousandfold.

    Args:
      lower: lower edges of the fine bins, in order.
      upper: their upper edges.
      counts: rows in each.
    """
    if not counts.size:
        return ""
    alive = lower[lower > 0]
    is_log = alive.size > 0 and upper[-1] / alive[0] > 1e3
    if is_log:
        # Rows of norm 0 are counted as dead, and have no place on this axis.
        lower, upper, counts = lower[-alive.size :], upper[-alive.size :], counts[-alive.size :]
    to = np.log10 if is_log else (lambda x: x)
    first, last = float(to(lower[0])), float(to(upper[-1]))
    span = (last - first) or 1.0
    middle = to((lower + upper) / 2)
    index = np.clip(((middle - first) / span * _NUM_BARS).astype(int), 0, _NUM_BARS - 1)
    heights = np.bincount(index, weights=counts, minlength=_NUM_BARS)
    x, y = _scale(first, last, _LEFT, WIDTH - _RIGHT), _scale(0, heights.max(), HEIGHT - _BOTTOM, _TOP)
    edges = [first + span * i / _NUM_BARS for i in range(_NUM_BARS + 1)]
    value = (lambda v: 10**v) if is_log else (lambda v: v)
    parts = [
        f'<rect class="bar" x="{x(a) + 0.5:.1f}" y="{y(h):.1f}" width="{max(x(b) - x(a) - 1, 1):.1f}" '
        f'height="{y(0) - y(h):.1f}"><title>{value(a):.4g} to {value(b):.4g}: {int(h):,} rows</title></rect>'
        for a, b, h in zip(edges, edges[1:], heights, strict=False)
        if h
    ]
    x_ticks = _decades(first, last) if is_log else [(t, f"{t:g}") for t in _ticks(first, last)]
    y_ticks = [(t, _short(t)) for t in _ticks(0, heights.max(), 4)]
    return _frame(parts, x, y, x_ticks, y_ticks, "norm of a row", "rows", "Histogram of the norms of rows")


def rank_curve(ranks: Sequence[float], counts: Sequence[float]) -> str:
    """How often the id of each rank was looked up, both axes logarithmic."""
    points = [(math.log10(r), math.log10(c)) for r, c in zip(ranks, counts, strict=True) if r > 0 and c > 0]
    if not points:
        return ""
    last, top = max(max(p[0] for p in points), 1e-9), max(max(p[1] for p in points), 1e-9)
    x, y = _scale(0, last, _LEFT, WIDTH - _RIGHT), _scale(0, top, HEIGHT - _BOTTOM, _TOP)
    line = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
    parts = [f'<polyline class="line" points="{line}"/>']
    if len(points) <= 64:
        parts += [
            f'<circle class="dot" cx="{x(a):.1f}" cy="{y(b):.1f}" r="3"><title>rank {10**a:,.0f}: '
            f"{10**b:,.0f} lookups</title></circle>"
            for a, b in points
        ]
    return _frame(
        parts,
        x,
        y,
        _decades(0, last),
        _decades(0, top),
        "rank of the id",
        "lookups",
        "Lookups by rank of the id",
    )


def _frame(
    parts: list[str],
    x: Callable[[float], float],
    y: Callable[[float], float],
    x_ticks: list[tuple[float, str]],
    y_ticks: list[tuple[float, str]],
    x_label: str,
    y_label: str,
    title: str,
) -> str:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    grid = [
        f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{y(t) + 4:.1f}" text-anchor="end">{escape(label)}</text>'
        for t, label in y_ticks
    ]
    grid += [
        f'<line class="grid" x1="{x(t):.1f}" x2="{x(t):.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
        f'<text x="{x(t):.1f}" y="{bottom + 17}" text-anchor="middle">{escape(label)}</text>'
        for t, label in x_ticks
    ]
    labels = (
        f'<text class="label" x="{(_LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text class="label" x="12" y="{(_TOP + bottom) / 2}" text-anchor="middle" '
        f'transform="rotate(-90 12 {(_TOP + bottom) / 2})">{escape(y_label)}</text>'
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(grid)}{''.join(parts)}"
        f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>{labels}</svg>'
    )


def _scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (stop - start)


def _ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers in [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    unit = 10 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[tuple[float, str]]:
    """Powers of ten in an axis of logarithms, not too many of them."""
    powers = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)
    every = -(-len(powers) // 8)
    labels = [(float(p), _power(p)) for p in powers if p % every == 0]
    return labels or [(low, f"{10**low:.2g}"), (high, f"{10**high:.2g}")]


def _power(exponent: int) -> str:
    return f"{10**exponent:g}" if -3 <= exponent <= 2 else _short(10.0**exponent)


def _short(number: float) -> str:
    for bound, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= bound:
            return f"{number / bound:g}{letter}"
    return f"{number:g}"
