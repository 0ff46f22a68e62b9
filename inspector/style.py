"""Colours and legends that every chart shares, in both themes, told apart by colour-blind eyes.

Hues are those of Okabe and Ito; ramps of one hue differ in lightness alone. `dark` says which theme is shown.
"""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from inspector.frames import ALONE, BOTH, CURRENT_REGION, ONLY_A, ONLY_B, SHARED
from inspector.model import KINDS

BLUE, SKY, GREEN, ORANGE, RED, PURPLE = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7"
GREY, QUIET = "#8a94a0", "#e3e7ec"
SMALLEST_MASS = 1e-4
PADDING = {"left": 2, "right": 6, "top": 2, "bottom": 4}  # of a chart, in pixels
#: One colour and one shape for each method or selector, on every page and in every figure.
METHOD_COLORS = {
    "block table": BLUE,
    "FlashPrefill": BLUE,
    "KeyBounds": SKY,
    "XAttention": GREEN,
    "Oracle": PURPLE,
    "SeerGate": ORANGE,
    "QUOKA": RED,
    "Dense": GREY,
}
METHOD_SHAPES = {
    "block table": "circle",
    "FlashPrefill": "circle",
    "KeyBounds": "triangle-right",
    "XAttention": "square",
    "Oracle": "triangle-up",
    "SeerGate": "triangle-down",
    "QUOKA": "diamond",
    "Dense": "cross",
}


def quiet(dark: bool) -> str:
    """What is there and not read."""
    return "#2c3540" if dark else QUIET


def ink(dark: bool) -> str:
    """The strongest contrast with the background."""
    return "#ffffff" if dark else "#10161d"


def paper(dark: bool) -> str:
    """The background."""
    return "#12161c" if dark else "#ffffff"


def blue(dark: bool) -> str:
    return "#2f8be6" if dark else BLUE


def sky(dark: bool) -> str:
    return "#b9e3fb" if dark else SKY


def ramp(dark: bool) -> list[str]:
    """From next to the background to the strongest contrast with it."""
    if dark:
        return ["#1d242d", "#4b2b3f", "#93344a", "#d9593b", "#f7a55a", "#fff3c4"]
    return ["#f5f1ec", "#fbd9ae", "#f6a15b", "#d9532c", "#932340", "#3b0f3f"]


def kind_scale(dark: bool) -> alt.Scale:
    return alt.Scale(domain=list(KINDS[1:]), range=[quiet(dark), blue(dark), ORANGE, sky(dark), GREEN])


def share_scale(by: str, dark: bool) -> alt.Scale:
    return alt.Scale(domain=[SHARED[by], ALONE[by], CURRENT_REGION], range=[blue(dark), RED, GREEN])


def difference_scale(dark: bool) -> alt.Scale:
    return alt.Scale(domain=[BOTH, ONLY_A, ONLY_B], range=[GREY, blue(dark), ORANGE])


def legend(title: str | None = None, **more: object) -> alt.Legend:
    return alt.Legend(
        title=title,
        orient="top",
        direction="horizontal",
        labelLimit=260,
        symbolOpacity=1.0,
        symbolSize=110,
        offset=8,
        **more,
    )


def mass_color(dark: bool) -> alt.Color:
    """Shares of the exact mass, on a ramp over their logarithm."""
    scale = alt.Scale(type="log", domain=[SMALLEST_MASS, 1], range=ramp(dark), clamp=True)
    key = legend("share of the exact mass", format=".2~%", values=[1e-4, 1e-3, 1e-2, 1e-1, 1], gradientLength=240)
    return alt.Color("mass:Q", scale=scale, legend=key)


def method_color(names: Sequence[str], field: str, dark: bool, **more: object) -> alt.Color:
    """A colour per method; `more` goes to the legend, as it must for `method_shape` where both share one."""
    shown = list(dict.fromkeys(names))
    colors = [blue(dark) if METHOD_COLORS[name] == BLUE else METHOD_COLORS[name] for name in shown]
    return alt.Color(f"{field}:N", scale=alt.Scale(domain=shown, range=colors), legend=legend(**more))


def method_shape(names: Sequence[str], field: str, **more: object) -> alt.Shape:
    shown = list(dict.fromkeys(names))
    scale = alt.Scale(domain=shown, range=[METHOD_SHAPES[name] for name in shown])
    return alt.Shape(f"{field}:N", scale=scale, legend=legend(**more))


def kv_axis(begin: int, end: int, title: str | None = "KV block") -> dict[str, object]:
    """Scale and axis over KV blocks, or over the entries of a row."""
    return {
        "scale": alt.Scale(domain=[begin, end], nice=False, zero=False),
        "axis": alt.Axis(title=title, format=",d", tickMinStep=1, grid=False),
    }
