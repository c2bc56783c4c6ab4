"""The look of every figure, and its way from matplotlib into a page.

Figures are drawn once and shown in light and dark: each colour below is written to the SVG as a CSS variable that the
page defines twice. Text stays text, so that it can be read aloud, selected and searched.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

# sentinels: colours no colour map yields, replaced in the SVG
INK, MUTED, GRID, SURFACE = "#010203", "#010205", "#010207", "#01020b"
# Okabe and Ito (2008), distinguishable with every common colour vision deficiency
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW = (
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442",
)  # fmt: skip
WAIT = "#01020d"
CYCLE = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, MUTED)
DASHES = ("-", (0, (5, 1.5)), (0, (7, 1.5, 1.5, 1.5)), (0, (2.5, 1)), (0, (10, 2)))
_VARIABLES = {
    INK: "ink", MUTED: "muted", GRID: "grid", SURFACE: "surface", WAIT: "wait",
    BLUE: "blue", ORANGE: "orange", GREEN: "green", RED: "red", PURPLE: "purple", SKY: "sky", YELLOW: "yellow",
}  # fmt: skip

# monotone in lightness and within what both page backgrounds can carry
SPEED = LinearSegmentedColormap.from_list("speed", ["#3fb8af", "#3a86c8", "#7a5cc4", "#c0478f", "#e0552f"])
AMOUNT = LinearSegmentedColormap.from_list("amount", ["#f3ecd8", "#a9d3c0", "#4fa7b3", "#2b6f9c", "#223d6b"])

_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    # names from clients may hold a dollar sign, which is no formula
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 8.0,
    "axes.titlesize": 9.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8.0,
    "axes.labelsize": 8.0,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "patch.linewidth": 0.0,
}


@contextmanager
def style() -> Iterator[None]:
    """Draw in the look of the report; matplotlib's settings are put back afterwards."""
    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        # a name in a script that DejaVu lacks is drawn by the browser's own fonts: text stays text
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def hide_grid(ax: Axes, axis: str = "both") -> None:
    """Remove grid lines that carry no information on ``axis`` (x, y or both)."""
    ax.grid(False, axis=axis)  # type: ignore[arg-type]


def add_tip(artist: Artist, text: str) -> None:
    """Show ``text`` when the pointer rests on ``artist``."""
    artist.set_gid("tip:" + text)


def clean(text: object, limit: int = 60) -> str:
    """Return ``text`` on one line, printable and at most ``limit`` characters: clients choose some of these names."""
    shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(text))
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def render(figure: Figure, slug: str, title: str, description: str) -> str:
    """Return ``figure`` as an ``<svg>`` element to be put into a page.

    Parameters
    ----------
    slug : prefix of every id, unique in the page.
    title, description : what a screen reader says instead of the picture.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\n?", "", svg, flags=re.DOTALL)
    # a hundredth of a point is finer than any screen; matplotlib writes a millionth, a third of the page
    svg = re.sub(r' d="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), svg)
    # tips first, while their text is still what matplotlib escaped
    svg = re.sub(r'<g id="tip:([^"]*)">', r'<g class="tip"><title>\1</title>', svg)
    # ids repeat from figure to figure; only the referenced ones are of use
    referenced = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{slug}-{m[1]}"' if m[1] in referenced else "", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{slug}-", svg)
    for colour, name in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    opening = svg.index(">")
    head = re.sub(r' (?:width|height)="[^"]*"', "", svg[:opening])
    label = f'role="img" aria-labelledby="{slug}-title {slug}-description"'
    words = f'<title id="{slug}-title">{html.escape(title)}</title>'
    words += f'<desc id="{slug}-description">{html.escape(description)}</desc>'
    return f"{head} {label}>{words}{svg[opening + 1 :]}"
