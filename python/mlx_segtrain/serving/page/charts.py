"""Charts, whose colours are the page's: they are SVG, so that a change of theme reaches them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nicegui import ui

from .runs import Curve, Point

#: Lines of several runs, as style.css has them.
COLORS = [f"var(--line-{i})" for i in range(1, 7)]
#: Beside a colour, what tells a line: for who cannot tell colours apart.
#: Points that are still shown as such.
FEW = 60
DASHES = ["solid", "dashed", "dotted"]


@dataclass(frozen=True)
class Line:
    """A curve: `marked` shows its points, if they are few; `pale` stands behind the others."""

    name: str
    points: Sequence[Point]
    color: str = COLORS[0]
    dash: str = "solid"
    marked: bool = False
    pale: bool = False


def lines_of(name: str, curve: Curve, color: str, dash: str = "solid") -> list[Line]:
    """A curve; of a long one its means, and behind them from where to where it goes."""
    shown = [Line(name, curve.points, color, dash)]
    if curve.extremes:
        shown.append(Line(f"{name}, range", curve.extremes, color, pale=True))
    return shown


def chart(
    label: str,
    lines: Sequence[Line],
    *,
    unit: str = "",
    tall: bool = False,
    end: int | None = None,
) -> ui.echart:
    """A chart of lines over steps up to `end`. The label is for who cannot see it."""
    made = ui.echart(options(lines, unit=unit, legend=tall, end=end), renderer="svg")
    made.classes("chart tall" if tall else "chart").props("role=img")
    made.props["aria-label"] = label
    return made


def draw(made: ui.echart, lines: Sequence[Line], **how: Any) -> None:
    """Shows other points in a chart; `how` as of options."""
    made.options.clear()
    made.options.update(options(lines, **how))
    made.update()


def options(
    lines: Sequence[Line], *, unit: str = "", legend: bool = False, end: int | None = None
) -> dict[str, Any]:
    text = {"color": "var(--muted)", "fontSize": 11, "fontFamily": "inherit"}
    rule = {"lineStyle": {"color": "var(--rule)"}}
    return {
        "animation": False,
        "grid": {"left": 8, "right": 30, "top": 30 if legend else 10, "bottom": 4}
        | {"containLabel": True},
        "legend": {
            "show": legend,
            "type": "scroll",
            "data": [line.name for line in lines if not line.pale],
            "top": 0,
            "left": 0,
            "itemWidth": 22,
            "icon": "path://M0 0h9v2h-9z",
            "textStyle": text | {"fontSize": 12},
            "selectedMode": False,
        },
        "tooltip": {
            "trigger": "axis",
            "confine": True,
            "backgroundColor": "var(--surface)",
            "borderColor": "var(--rule)",
            "textStyle": {"color": "var(--ink)", "fontSize": 12},
            "axisPointer": {
                "lineStyle": {"color": "var(--muted)"},
                "label": {"show": False, ":formatter": "own => 'step ' + Math.round(own.value)"},
            },
            ":valueFormatter": f"value => value == null ? '–' : (+value.toPrecision(5)) + {unit!r}",
        },
        "xAxis": {
            "type": "value",
            "min": 0,
            "max": end,
            "minInterval": 1,
            "axisLabel": text | {"hideOverlap": True},
            "axisLine": rule,
            "axisTick": rule,
            "splitLine": {"show": False},
        },
        "yAxis": {"type": "value", "scale": True, "splitNumber": 4}
        | {"axisLabel": text, "splitLine": rule},
        "series": [_series(line) for line in lines],
    }


def _series(line: Line) -> dict[str, Any]:
    return {
        **{"type": "line", "name": line.name, "data": [list(point) for point in line.points]},
        "showSymbol": len(line.points) <= (FEW if line.marked else 1),
        **{"symbol": "circle", "symbolSize": 6, "itemStyle": {"color": line.color}},
        "lineStyle": {
            **{"color": line.color, "type": line.dash},
            **({"width": 1, "opacity": 0.28} if line.pale else {"width": 1.8}),
        },
        "z": 1 if line.pale else 2,
        "tooltip": {"show": not line.pale},
        "emphasis": {"disabled": True},
    }
