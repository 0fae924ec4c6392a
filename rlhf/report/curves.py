"""The plot that every panel of a report is drawn with: the only file that imports bokeh.

One figure is described here in Python; the page holds its description once, and fills it with
each panel's lines, points, intervals and bars (page.js, "plots").
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Readable on white and on black alike; beyond ten runs the second ten are dashed, and so on.
PALETTE = (
    "#1f83d0", "#e0681b", "#2a9d4a", "#d6404a", "#8f6ad0",
    "#a0705f", "#d85fb4", "#808890", "#a59a1c", "#17a5b5",
)  # fmt: skip
DASHES = ("solid", "6 3", "2 2")
GREY = "#7a7d84"
POINT = ["x", "y", "step", "run", "color", "alpha", "value"]


def library() -> str:
    """The JavaScript of Bokeh that plots need, as it comes with its Python package."""
    import bokeh

    folder = Path(bokeh.__file__).parent / "server" / "static" / "js"
    return (folder / "bokeh.min.js").read_text(encoding="utf-8")


def style(place: int) -> dict[str, str]:
    """Colour and dash of the run at `place` in a page's list."""
    return {
        "color": PALETTE[place % len(PALETTE)],
        "dash": DASHES[place // len(PALETTE) % len(DASHES)],
    }


def figure() -> dict[str, Any]:
    """An empty plot as Bokeh's JSON; page.js finds its parts by their names."""
    from bokeh.embed import json_item
    from bokeh.models import (
        ColumnDataSource,
        DataRange1d,
        HoverTool,
        Plot,
        Toolbar,
    )
    from bokeh.models.glyphs import MultiLine, Patches, Quad, Scatter, Segment
    from bokeh.models.grids import Grid
    from bokeh.models.tools import BoxZoomTool

    plot = Plot(
        name="plot",
        x_range=DataRange1d(name="x_range", range_padding=0.03),
        y_range=DataRange1d(name="y_range", range_padding=0.06),
        height=230,
        sizing_mode="stretch_width",
        min_border=4,
        min_border_right=14,  # half of the last number below
        outline_line_color=None,
        background_fill_alpha=0,
        border_fill_alpha=0,
        toolbar=Toolbar(name="toolbar", logo=None, active_drag=None),
        toolbar_location=None,  # page.js lets a mouse zoom; a finger is to scroll the page
        output_backend="canvas",
    )
    x_axis, y_axis = (_axis(name) for name in ("x_axis", "y_axis"))
    plot.add_layout(x_axis, "below")
    plot.add_layout(y_axis, "left")
    grid: dict[str, Any] = {"grid_line_color": GREY, "grid_line_alpha": 0.25}
    plot.add_layout(Grid(dimension=0, axis=x_axis, **grid))
    plot.add_layout(Grid(dimension=1, axis=y_axis, **grid))
    sources = {
        "bars": ["left", "right", "top", "bottom"],
        "bands": ["xs", "ys", "color"],
        "whiskers": ["x", "low", "high", "color"],
        "knees": ["x", "low", "high", "color"],
        "lines": ["xs", "ys", "color", "dash"],
        "points": POINT,
        "near": POINT,
    }
    data = {
        name: ColumnDataSource(name=name, data={column: [] for column in columns})
        for name, columns in sources.items()
    }
    plot.add_glyph(
        data["bars"],
        Quad(
            left="left", right="right", top="top", bottom="bottom",
            fill_color=PALETTE[0], fill_alpha=0.6, line_color=None,
        ),
    )  # fmt: skip
    plot.add_glyph(
        data["bands"],
        Patches(xs="xs", ys="ys", fill_color="color", fill_alpha=0.15, line_color=None),
    )
    plot.add_glyph(
        data["whiskers"],
        Segment(
            x0="x", x1="x", y0="low", y1="high", line_color="color", line_alpha=0.35, line_width=3
        ),
    )
    plot.add_glyph(
        data["knees"],
        Segment(
            x0="x", x1="x", y0="low", y1="high", line_color="color", line_dash="4 3", line_width=2
        ),
    )
    plot.add_glyph(
        data["lines"],
        MultiLine(xs="xs", ys="ys", line_color="color", line_dash="dash", line_width=1.6),
    )
    plot.add_glyph(
        data["points"],
        Scatter(x="x", y="y", size=5, fill_color="color", line_color=None, fill_alpha="alpha"),
    )
    # page.js puts the point that is nearest to the pointer here; a tooltip of all that are near
    # would not say which is which.
    plot.add_glyph(
        data["near"],
        Scatter(x="x", y="y", size=13, fill_color="color", fill_alpha=0.25, line_color="color"),
    )
    near = plot.add_glyph(
        data["near"], Scatter(x="x", y="y", size=60, fill_alpha=0, line_color=None)
    )
    hover = HoverTool(
        renderers=[near],
        attachment="horizontal",
        tooltips=[("run", "@run"), ("step", "@step"), ("value", "@value")],
    )
    plot.add_tools(hover, BoxZoomTool(name="zoom"))
    return json.loads(json.dumps(json_item(plot)))


def _axis(name: str) -> Any:
    from bokeh.models import LinearAxis

    axis = LinearAxis(
        name=name,
        axis_line_color=GREY,
        major_tick_line_color=GREY,
        minor_tick_line_color=None,
        major_label_text_color=GREY,
        major_label_text_font_size="12px",
        axis_label_text_color=GREY,
        axis_label_text_font_style="normal",
        axis_label_text_font_size="12px",
        axis_label_standoff=4,
    )
    axis.ticker.desired_num_ticks = 5
    return axis
