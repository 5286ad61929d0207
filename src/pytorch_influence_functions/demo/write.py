"""The files that the demo writes into its folder."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path

from ..core.files import write_bytes
from ..plots.query import plot_agreement, plot_influences
from .show import summarise
from .story import Comparison, Story, agreement

_IMAGES_PER_ROW = 6


def write_files(story: Story, out: Path) -> list[tuple[str, str]]:
    """Write all files into `out`; returns (name, description) for each.

    Raises:
        MissingExtra: matplotlib, jinja2 or pillow is not installed.
    """
    query_scores = story.scores[list(story.queries)]
    plot_influences(query_scores, 0, _IMAGES_PER_ROW, path=out / "influences.png")
    story.scores.report(
        out / "report.html",
        predictions=story.trained.test_probabilities,
        train_predictions=story.trained.train_probabilities,
        self_influence=story.suspects.self_influence,
        title="Fashion-MNIST, a tenth of the labels wrong",
        about=f"A small convolutional network, trained on {story.scores.n_train:,} images; "
        f"{int(story.data.planted.sum())} of their labels are wrong on purpose.",
    )
    _plot_comparisons(story.groups, out / "agreement.png", "Groups removed: mean test loss")
    _plot_comparisons(story.singles, out / "agreement_single.png", "One image removed: one test loss")
    story.scores.save(out / "scores.safetensors")
    query_scores.to_json(out / "influence_results.json")
    write_bytes(out / "label_errors.csv", _label_errors_csv(story).encode())
    write_bytes(out / "summary.json", (json.dumps(_summary_numbers(story), indent=1, allow_nan=False) + "\n").encode())
    files = [
        ("report.html", "a page to look through, search and tick: open it in a browser"),
        ("influences.png", "a test image, what helped it, what harmed it"),
        ("agreement.png", "predicted against actual change, groups"),
        ("agreement_single.png", "the same for single images"),
        ("scores.safetensors", f"all {len(story.scores):,} x {story.scores.n_train:,} scores: ptif.Scores.load"),
        ("influence_results.json", f"the {len(query_scores)} test images above, in the classic layout"),
        ("label_errors.csv", "every training image, most suspected label first"),
        ("summary.json", "the numbers of this run"),
        ("summary.txt", "this list, the result, and how far to trust it"),
    ]
    write_bytes(out / "summary.txt", _summary_text(story, files).encode())
    return files


def _plot_comparisons(comparisons: tuple[Comparison, ...], path: Path, title: str) -> None:
    plot_agreement(
        [c.predicted for c in comparisons],
        [c.actual for c in comparisons],
        path=path,
        title=title,
        names=[c.name.partition(",")[0] for c in comparisons],
    )


def _label_errors_csv(story: Story) -> str:
    data, t = story.data, story.trained
    name = data.class_names
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("rank", "index", "label", "model_says", "predicted_loss_unseen", "loss", "planted", "true_label"))
    for rank, i in enumerate(story.suspects.order.tolist(), 1):
        rows.writerow(
            (
                rank,
                i,
                name[int(data.train_labels[i])],
                name[int(t.train_classes[i])],
                f"{float(story.suspects.suspicion[i]):.6g}",
                f"{float(t.train_losses[i]):.6g}",
                int(data.planted[i]),
                name[int(data.true_labels[i])],
            )
        )
    return text.getvalue()


def _summary_numbers(story: Story) -> dict[str, object]:
    s, t = story.suspects, story.trained
    parts = {}
    for name, comparisons in (("groups", story.groups), ("singles", story.singles)):
        r, slope = agreement(comparisons)
        parts[name] = {"correlation": r, "slope": slope, "removals": [dataclasses.asdict(c) for c in comparisons]}
    return {
        "recipe": repr(story.recipe),
        "seed": story.seed,
        "accuracy": {"train": t.train_accuracy, "test": t.test_accuracy},
        "queries": list(story.queries),
        "label_errors": {
            "first": s.count,
            "by_influence": s.hits,
            "by_highest_loss": s.hits_by_loss,
            "in_random_order": s.hits_at_random,
        },
        **parts,
        "seconds": story.seconds,
    }


def _summary_text(story: Story, files: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in files)
    lines = ["What `ptif demo` found", "", *summarise(story), "", "Files", ""]
    lines += [f"{name:<{width}}  {description}" for name, description in files]
    lines += ["", "How far to trust it (print(scores.diagnostics))", "", str(story.scores.diagnostics), ""]
    return "\n".join(lines)
