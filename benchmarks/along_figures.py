"""The figures of `docs/along.md`, from what `along_ablation.py --write` keeps: `python benchmarks/along_figures.py`."""

from __future__ import annotations

import json
from typing import Any

from along_ablation import NUMBERS_FILE

from pytorch_influence_functions.plots import style

KINDS = {"halves": "a half removed", "5 %": "5 % removed", "one": "one removed"}
TITLES = {
    "fashion": "Fashion-MNIST",
    "adamw": "… by AdamW",
    "wrong labels": "… wrong labels",
    "diabetes": "diabetes",
    "convex": "convex",
}
CURVATURES = ("identity", "dual of the empirical Fisher", "K-FAC", "EK-FAC", "Shampoo")
MARKERS = "osD^v"
Rows = dict[str, dict[str, list[float]]]


def numbers(found: dict[str, dict[str, Rows]]) -> None:
    """LDS against the number of checkpoints; the final weights alone as a short line at 1."""
    with style.plot_style():
        figure = style.new_figure(8.4, 3.2)
        figure.set_layout_engine("constrained")
        for axes, (kind, title) in zip(figure.subplots(1, 3), KINDS.items(), strict=True):
            for colour, marker, (name, tables) in zip(style.PALETTE, MARKERS, found.items(), strict=False):
                rows = tables["number (log-spaced from 2 %)"]
                counts = [1, *map(int, rows)]
                values = [tables["EK-FAC"]["final weights"][kind][0], *(row[kind][0] for row in rows.values())]
                axes.plot(counts, values, marker=marker, markersize=4, color=colour, label=TITLES[name])
            axes.set_xscale("log")
            axes.set_xticks([1, 2, 3, 5, 10, 30], ["1", "2", "3", "5", "10", "30"])
            axes.minorticks_off()
            axes.set_xlabel("checkpoints (1: the final weights)")
            axes.set_title(title)
        figure.axes[0].set_ylabel("LDS, EK-FAC")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
        style.save_figure(figure, NUMBERS_FILE.parent / "number.png")


def grouped(name: str, found: dict[str, dict[str, Rows]], series: dict[str, tuple[str, str]]) -> None:
    """Bars by setting and kind of removal: `series` gives the table and row of each bar."""
    with style.plot_style():
        figure = style.new_figure(8.4, 3.2)
        figure.set_layout_engine("constrained")
        width = 0.8 / len(series)
        for axes, (kind, title) in zip(figure.subplots(1, 3, sharey=True), KINDS.items(), strict=True):
            for k, (label, (table, row)) in enumerate(series.items()):
                some = [(at, v[table][row][kind]) for at, v in enumerate(found.values()) if row in v[table]]
                places = [at + (k - (len(series) - 1) / 2) * width for at, _ in some]
                axes.bar(places, [v[0] for _, v in some], width, color=colour_of(k), label=label)
                for place, (_, v) in zip(places, some, strict=True):
                    if len(v) == 3:
                        axes.plot([place, place], v[1:], color=style.INK, linewidth=0.8)
            axes.set_xticks(range(len(found)), [TITLES[n] for n in found], rotation=25, ha="right", fontsize=7.5)
            axes.set_title(title)
        figure.axes[0].set_ylabel("LDS (95 %)")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
        style.save_figure(figure, NUMBERS_FILE.parent / f"{name}.png")


def colour_of(k: int) -> Any:
    return (style.FAINT, *style.PALETTE)[k]


def main() -> None:
    kept = json.loads(NUMBERS_FILE.read_text())
    found = {name: kept[name] for name in TITLES if name in kept}
    numbers(found)
    schedules = {
        "log-spaced": "log", "even": "even", "early: to 20 %": "early", "late: from 70 %": "late",
    }  # fmt: skip
    final = {"final weights": ("EK-FAC", "final weights")}
    grouped("schedule", found, final | {k: ("schedule (seven)", row) for k, row in schedules.items()})
    grouped("curvature", found, {c: ("curvature", f"{c}, along") for c in CURVATURES})


if __name__ == "__main__":
    main()
