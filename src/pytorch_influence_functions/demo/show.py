"""The text that each part of the demo prints. Nothing is computed here, only formatted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..evaluation.recipe import Recipe
from ..scores.scores import Scores
from .data import DemoData
from .screen import Screen
from .story import Comparison, Extent, Story, Suspects, TrainedModel, agreement

_HELPS, _HARMS = "blue", "red"


def show_setting(screen: Screen, data: DemoData, recipe: Recipe) -> None:
    """Print what the demo is about to do."""
    screen.heading(0, "A small CNN, trained on labels some of which are wrong")
    screen.line(
        f"{len(data.train_images):,} Fashion-MNIST images, {int(data.planted.sum())} of them mislabelled on purpose; "
        f"{len(data.test_images):,} clean test images; {recipe.epochs} epochs."
    )


def show_model(screen: Screen, t: TrainedModel) -> None:
    """Print the model's size and accuracy."""
    size = sum(p.numel() for p in t.model.parameters())
    screen.line(
        f"{size:,} parameters. Accuracy [bold]{t.train_accuracy:.1%}[/] on the training labels (the wrong ones "
        f"included), [bold]{t.test_accuracy:.1%}[/] on the test set."
    )


def show_scores(
    screen: Screen, data: DemoData, t: TrainedModel, scores: Scores, queries: Sequence[int], extent: Extent
) -> None:
    """Print the most helpful and the most harmful training images of each query."""
    d = scores.diagnostics
    screen.heading(1, "Which training images made the model say that?")
    screen.line(
        f"{d.n_queries:,} test images against {d.n_train:,} training images in {d.seconds:.1f} s. A score is the "
        "predicted rise of the test image's loss if that training image is removed: what helped is "
        f"[{_HELPS}]positive[/], what harmed is [{_HARMS}]negative[/]. * marks a label that is wrong on purpose."
    )
    doubts = [check.name for check in d.checks() if check.status != "ok"]
    verdict = f"[yellow]look at {', '.join(doubts)}[/]" if doubts else f"[green]all {len(d.checks())} hold[/]"
    screen.line(f"Assumptions of influence functions, checked: {verdict} (in words: summary.txt).")
    for q in queries:
        true, predicted = int(data.test_labels[q]), int(t.test_probabilities[q].argmax())
        probability = float(t.test_probabilities[q, predicted])
        verdict = f"called {data.class_names[predicted]}" if predicted != true else "recognised"
        certainty = f"{probability:.0%} sure, loss {float(t.test_losses[q]):.2f}"
        screen.line()
        screen.line(f"[bold]Test #{q}, {_with_article(data.class_names[true])}[/]: {verdict} ({certainty})")
        columns = (("most helpful", "left"), ("", "right"), ("    most harmful", "left"), ("", "right"))
        pairs = zip(scores.helpful(q, extent.shown), scores.harmful(q, extent.shown), strict=True)
        screen.table(
            columns,
            [
                (
                    _image(data, i),
                    f"[{_HELPS}]{format_change(a)}[/]",
                    "    " + _image(data, j),
                    f"[{_HARMS}]{format_change(b)}[/]",
                )
                for (i, a), (j, b) in pairs
            ],
        )


def show_suspects(screen: Screen, data: DemoData, t: TrainedModel, s: Suspects) -> None:
    """Print how many planted labels the ranking finds."""
    screen.heading(2, "Which labels are wrong?")
    screen.line(
        "Ranked by each image's predicted loss had the model never been trained on it: its loss now, plus its own "
        "influence on that loss, corrected for leverage."
    )
    screen.line()
    screen.table(
        ((f"among the first {s.count}", "left"), ("planted", "right"), ("", "left")),
        [
            (name, f"[bold]{hits}[/]", f"{hits / s.count:.0%} " + "█" * round(30 * hits / s.count))
            for name, hits in (
                ("by influence", s.hits),
                ("by highest loss", s.hits_by_loss),
                ("in random order", s.hits_at_random),
            )
        ],
    )
    screen.line()
    first = [int(i) for i in s.order[:5]]
    screen.table(
        (("most suspected", "left"), ("labelled", "left"), ("model says", "left"), ("truth", "left")),
        [
            (
                f"#{i}",
                data.class_names[int(data.train_labels[i])] + ("*" if data.planted[i] else ""),
                data.class_names[int(t.train_classes[i])],
                data.class_names[int(data.true_labels[i])],
            )
            for i in first
        ],
    )


def show_comparisons(screen: Screen, groups: Sequence[Comparison], singles: Sequence[Comparison]) -> None:
    """Print predicted beside actual changes."""
    screen.heading(3, "Is that true? Images removed, model retrained")
    screen.line(
        f"{len(groups) + len(singles)} retrainings from the same initial weights with the same batch order; "
        "only the removed images no longer count."
    )
    measures = ("Groups of images: change of the mean test loss", "One image: change of the loss of one test image")
    for comparisons, measure in zip((groups, singles), measures, strict=True):
        screen.line()
        screen.line(f"[bold]{measure}[/]")
        screen.table(
            (("removed", "left"), ("predicted", "right"), ("actual", "right")),
            [(c.name, format_change(c.predicted), format_change(c.actual)) for c in comparisons],
        )
        r, slope = agreement(comparisons)
        screen.line(f"correlation [bold]{r:.3f}[/], slope {slope:.2f} (n = {len(comparisons)})".replace("-", "−"))


def show_files(screen: Screen, story: Story, out: Path, files: Sequence[tuple[str, str]], seconds: float) -> None:
    """Print what was written where; in quiet mode also the result in three lines."""
    if screen.quiet:
        for line in summarise(story):
            screen.line(line, always=True)
    screen.heading(4, f"Written to {out}/")
    screen.table((("", "left"), ("", "left")), files)
    screen.line()
    screen.line(f"{seconds:.0f} s in all.", always=True)


def summarise(story: Story) -> list[str]:
    """The result in three lines."""
    s, t = story.suspects, story.trained
    by_group, by_single = agreement(story.groups), agreement(story.singles)
    return [
        f"Test accuracy {t.test_accuracy:.1%}, with {int(story.data.planted.sum())} wrong training labels.",
        f"Planted labels among the first {s.count}: {s.hits} by influence, {s.hits_by_loss} by highest loss, "
        f"{s.hits_at_random} in random order.",
        f"Predicted against actual change after retraining: r = {by_group[0]:.3f} for {len(story.groups)} groups, "
        f"{by_single[0]:.3f} for {len(story.singles)} single images.",
    ]


def format_change(value: float) -> str:
    """Format a change with its sign and four decimals; the minus is as wide as the plus.

    >>> format_change(0.0312), format_change(-0.2)
    ('+0.0312', '−0.2000')
    """
    return f"{value:+.4f}".replace("-", "−")


def _image(data: DemoData, i: int) -> str:
    return f"#{i} {data.class_names[int(data.train_labels[i])]}{'*' if data.planted[i] else ''}"


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
