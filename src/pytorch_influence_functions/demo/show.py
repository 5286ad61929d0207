"""The demo's words: what each part prints. No arithmetic beyond formatting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..scores.scores import Scores
from .data import DemoData
from .screen import Screen
from .story import Plan, Removal, Story, Suspects, Trained, agreement
from .train import Recipe

_HELPS, _HARMS = "blue", "red"


def opening(screen: Screen, data: DemoData, recipe: Recipe) -> None:
    """What is about to happen."""
    screen.heading(0, "A small CNN, trained on labels some of which are wrong")
    screen.line(
        f"{len(data.train_images):,} Fashion-MNIST images, {int(data.planted.sum())} of them mislabelled on purpose; "
        f"{len(data.test_images):,} clean test images; {recipe.epochs} epochs."
    )


def trained(screen: Screen, t: Trained) -> None:
    """How well the model does."""
    size = sum(p.numel() for p in t.model.parameters())
    screen.line(
        f"{size:,} parameters. Accuracy [bold]{t.train_accuracy:.1%}[/] on the training labels (the wrong ones "
        f"included), [bold]{t.test_accuracy:.1%}[/] on the test set."
    )


def explained(screen: Screen, data: DemoData, t: Trained, scores: Scores, queries: Sequence[int], plan: Plan) -> None:
    """The most helpful and the most harmful training images of each query."""
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
        true, said = int(data.test_labels[q]), int(t.test_odds[q].argmax())
        odds = float(t.test_odds[q, said])
        verdict = f"called {data.class_names[said]}" if said != true else "recognised"
        sure = f"{odds:.0%} sure, loss {float(t.test_losses[q]):.2f}"
        screen.line()
        screen.line(f"[bold]Test #{q}, {_a(data.class_names[true])}[/]: {verdict} ({sure})")
        columns = (("most helpful", "left"), ("", "right"), ("    most harmful", "left"), ("", "right"))
        pairs = zip(scores.helpful(q, plan.shown), scores.harmful(q, plan.shown), strict=True)
        screen.table(
            columns,
            [
                (
                    _image(data, i),
                    f"[{_HELPS}]{signed(a)}[/]",
                    "    " + _image(data, j),
                    f"[{_HARMS}]{signed(b)}[/]",
                )
                for (i, a), (j, b) in pairs
            ],
        )


def suspected(screen: Screen, data: DemoData, t: Trained, s: Suspects) -> None:
    """How many planted labels the ranking finds."""
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
                data.class_names[int(t.train_said[i])],
                data.class_names[int(data.true_labels[i])],
            )
            for i in first
        ],
    )


def checked(screen: Screen, groups: Sequence[Removal], singles: Sequence[Removal]) -> None:
    """Predicted beside actual."""
    screen.heading(3, "Is that true? Images removed, model retrained")
    screen.line(
        f"{len(groups) + len(singles)} retrainings from the same initial weights with the same batch order; "
        "only the removed images no longer count."
    )
    measures = ("Groups of images: change of the mean test loss", "One image: change of the loss of one test image")
    for removals, measured in zip((groups, singles), measures, strict=True):
        screen.line()
        screen.line(f"[bold]{measured}[/]")
        screen.table(
            (("removed", "left"), ("predicted", "right"), ("actual", "right")),
            [(r.name, signed(r.predicted), signed(r.actual)) for r in removals],
        )
        r, slope = agreement(removals)
        screen.line(f"correlation [bold]{r:.3f}[/], slope {slope:.2f} (n = {len(removals)})".replace("-", "−"))


def closing(screen: Screen, story: Story, out: Path, files: Sequence[tuple[str, str]], seconds: float) -> None:
    """Where everything is; in quiet mode also the result in three lines."""
    if screen.quiet:
        for words in summary(story):
            screen.line(words, always=True)
    screen.heading(4, f"Written to {out}/")
    screen.table((("", "left"), ("", "left")), files)
    screen.line()
    screen.line(f"{seconds:.0f} s in all.", always=True)


def summary(story: Story) -> list[str]:
    """The result in a few lines."""
    s, t = story.suspects, story.trained
    by_group, by_single = agreement(story.groups), agreement(story.singles)
    return [
        f"Test accuracy {t.test_accuracy:.1%}, with {int(story.data.planted.sum())} wrong training labels.",
        f"Planted labels among the first {s.count}: {s.hits} by influence, {s.hits_by_loss} by highest loss, "
        f"{s.hits_at_random} in random order.",
        f"Predicted against actual change after retraining: r = {by_group[0]:.3f} for {len(story.groups)} groups, "
        f"{by_single[0]:.3f} for {len(story.singles)} single images.",
    ]


def signed(value: float) -> str:
    """Four digits after the point, with a minus as wide as the plus.

    >>> signed(0.0312), signed(-0.2)
    ('+0.0312', '−0.2000')
    """
    return f"{value:+.4f}".replace("-", "−")


def _image(data: DemoData, i: int) -> str:
    return f"#{i} {data.class_names[int(data.train_labels[i])]}{'*' if data.planted[i] else ''}"


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
