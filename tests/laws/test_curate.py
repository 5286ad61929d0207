"""Law: decisions are carried out as written, and what they are worth is what training again by hand gives."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

import pytorch_influence_functions as ptif
from pytorch_influence_functions.actions import curate
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.evaluation import Accuracy, Recipe, retrain, train_model
from pytorch_influence_functions.report import read_decisions

CLASSES = ["ant", "bee", "cow"]


def blobs(n: int = 60, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    return torch.randn(n, 4, generator=generator) + 2 * nn.functional.one_hot(y, 4), y


def recipe(**settings: Any) -> Recipe:
    return Recipe(lambda: nn.Linear(4, 3), partial(torch.optim.SGD, lr=0.5), epochs=4, batch_size=20, **settings)


def decided(path: Path, n: int, *rows: dict[str, Any]) -> Path:
    """A file as the report page downloads it."""
    content = {
        "format": "pytorch-influence-functions/decisions", "version": 2, "report": "0" * 16, "title": "",
        "training_examples": n, "decisions": list(rows),
    }  # fmt: skip
    path.write_text(json.dumps(content))
    return path


def rows(dataset: Any) -> tuple[Tensor, Tensor]:
    return torch.stack([dataset[i][0] for i in range(len(dataset))]), torch.stack(
        [torch.as_tensor(dataset[i][1]) for i in range(len(dataset))]
    )


def test_the_downloaded_file_is_carried_out(tmp_path: Path) -> None:
    x, y = blobs()
    path = decided(
        tmp_path / "decisions.json", 60,
        {"index": 3, "decision": "wrong_label", "relabel_as": "cow"},
        {"index": 7, "decision": "wrong_label"},
        {"index": 8, "decision": "duplicate"},
        {"index": 9, "decision": "keep"},
    )  # fmt: skip
    words = np.array(CLASSES)[y.numpy()]
    edited = y.clone()
    edited[3] = 2
    kept = torch.tensor([i for i in range(60) if i not in (7, 8)])
    for decisions in (path, str(path), read_decisions(path)):
        for curated in (curate((x, words), decisions), curate((x, y), decisions, class_names=CLASSES)):
            assert (curated.removed, dict(curated.relabelled)) == ((7, 8), {3: 2})
            assert curated.ids.tolist() == kept.tolist()
            assert curated.weights.sum() == 58 and curated.weights[[7, 8]].sum() == 0
            seen, labels = rows(curated.dataset)
            torch.testing.assert_close(seen, x[kept])
            assert labels.tolist() == edited[kept].tolist()
            assert str(curated) == "2 of 60 examples removed, 1 of 60 relabelled"
    # Without names the page shows numbers; a loader keeps its batch size.
    path = decided(tmp_path / "numbers.json", 60, {"index": 3, "decision": "wrong_label", "relabel_as": "2"})
    loader = curate(DataLoader(TensorDataset(x, y), batch_size=7), path).loader(shuffle=False)
    assert loader.batch_size == 7 and torch.cat([b for _, b in loader]).tolist() == edited.tolist()


def test_the_same_from_a_table_a_mapping_and_indices() -> None:
    x, y = blobs()
    problem = ptif.Problem(train_model(recipe(), (x, y)), nn.CrossEntropyLoss(), (x, y))
    issues = ptif.find_label_issues(problem)
    assert curate((x, y), issues).removed == tuple(issues.is_issue.nonzero()[:, 0].tolist())
    relabelling = issues.relabelling(4)
    assert dict(curate((x, y), relabelling).relabelled) == relabelling
    assert curate((x, y), issues.ids(4)).removed == tuple(sorted(issues.ids(4)))
    mask = torch.zeros(60, dtype=torch.bool)
    mask[[2, 5]] = True
    assert curate((x, y), mask).removed == curate((x, y), {2: None, 5: None}).removed == (2, 5)
    # Dictionaries, and labels with a column of their own.
    data = [{"input": a, "labels": int(b)} for a, b in zip(x, y, strict=True)]
    assert curate(data, {0: 1}).dataset[0]["labels"] == 1
    single = curate((x, y.float()[:, None]), {1: 0.0}).dataset[1][1]
    assert single.shape == (1,) and single.dtype == torch.float32 and float(single) == 0.0
    assert curate((x, x[:, 0]), {1: "0.5"}, as_label=lambda text: float(text) / 2).relabelled == {1: 0.25}


def test_places_are_those_of_the_dataset_where_a_sampler_chose() -> None:
    x, y = blobs()
    loader = DataLoader(TensorDataset(x, y), batch_size=8, sampler=SubsetRandomSampler(range(20, 50)))
    curated = curate(loader, {21: None, 25: 0})
    assert curated.ids.tolist() == [i for i in range(20, 50) if i != 21]
    seen, labels = rows(curated.dataset)
    torch.testing.assert_close(seen, x[curated.ids])
    assert labels[curated.ids.tolist().index(25)] == 0
    assert curate(loader, [21]).removed == (21,)
    with pytest.raises(InvalidInput, match="Example 3 is not among those that the loader's sampler draws"):
        curate(loader, [3])


def by_hand(dataset: Any, seed: int) -> nn.Module:
    """A training function of one's own."""
    x, y = rows(dataset)
    model = nn.Linear(4, 3)  # from the seed that retrain has set
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(10):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    return model


def test_its_worth_is_what_training_by_hand_gives() -> None:
    x, y = blobs()
    test = blobs(45, seed=2)
    spoilt = y.clone()
    spoilt[:30] = 0
    decisions = {i: int(y[i]) for i in range(10)} | dict.fromkeys(range(10, 30))
    effect = curate((x, spoilt), decisions).retrain(by_hand, test, seeds=3)
    edited, kept = spoilt.clone(), torch.tensor([*range(10), *range(30, 60)])
    edited[:10] = y[:10]
    gains = []
    for seed in range(3):
        accuracies = []
        for data in (TensorDataset(x, spoilt), TensorDataset(x[kept], edited[kept])):
            torch.manual_seed(seed)
            accuracies.append(float((by_hand(data, seed)(test[0]).argmax(1) == test[1]).double().mean()))
        gains.append(accuracies[1] - accuracies[0])
    gains = torch.tensor(gains, dtype=torch.float64)
    assert effect.gain.value == pytest.approx(float(gains.mean()), abs=1e-7)
    around = 4.302653 * float(gains.std()) / 3**0.5  # Student's t with two degrees of freedom
    assert (effect.gain.low, effect.gain.high) == pytest.approx(
        (effect.gain.value - around, effect.gain.value + around), rel=1e-4
    )
    assert effect.gain.value == pytest.approx(effect.after.value - effect.before.value) and effect.gain.value > 0.05
    assert str(effect).startswith("20 of 60 examples removed, 10 of 60 relabelled: accuracy 0.")
    assert "over 3 seeds, 45 test examples" in repr(effect)
    loss = curate((x, spoilt), decisions).retrain(by_hand, test, 2, measure=nn.CrossEntropyLoss())
    assert loss.gain.value < 0 and "CrossEntropy" in str(loss)


def test_by_a_recipe_and_with_labels_in_words() -> None:
    x, y = blobs()
    words, test = np.array(CLASSES)[y.numpy()], blobs(45, seed=2)
    test_words = np.array(CLASSES)[test[1].numpy()]
    curated = curate((x.numpy(), words), {5: "ant", 6: None})
    # The test data lack a class: its words are numbered as the training data's.
    few = test_words != "ant"
    effect = curated.retrain(recipe(), (test[0].numpy()[few], test_words[few]), seeds=2)
    edited, kept = y.clone(), [i for i in range(60) if i != 6]
    edited[5] = 0
    # The order of a training is drawn over all examples, so the subset of the edited whole is what it equals.
    truth = retrain(
        recipe(), torch.tensor([[i in kept for i in range(60)]]), 2, train=(x, edited),
        queries=(test[0][few], test[1][few]), measure=Accuracy(),
    )  # fmt: skip
    torch.testing.assert_close(effect.truth.measured, truth.measured)
    once = curated.retrain(recipe(), (test[0].numpy(), test_words), seeds=1)
    assert "(" not in str(once).split("accuracy")[1] and once.gain.low != once.gain.low


def test_accuracy_of_one_number_and_of_classes() -> None:
    logits, y = torch.tensor([[2.0], [-1.0], [0.3]]), torch.tensor([[1.0], [1.0], [0.0]])
    assert Accuracy().losses(logits, (None, y)).tolist() == [1.0, 0.0, 0.0]
    assert Accuracy(threshold=0.5).losses(logits[:, 0], (None, y[:, 0])).tolist() == [1.0, 0.0, 1.0]
    assert Accuracy().losses(torch.eye(3), (None, torch.tensor([0, 1, 0]))).tolist() == [1.0, 1.0, 0.0]
    with pytest.raises(InvalidInput, match=r"Label 5 at dataset index 2|[Ll]abel"):
        Accuracy().check(torch.eye(3), (torch.eye(3), torch.tensor([0, 1, 5])), torch.arange(3))
    with pytest.raises(InvalidInput, match="threshold=nan"):
        Accuracy(threshold=float("nan"))


BAD: dict[str, tuple[Any, str]] = {
    "out of range": ([60], r"decisions= names index 60, and the training examples are 0 to 59"),
    "below": ({-1: 0}, r"decisions= names index -1, and the training examples are 0 to 59"),
    "doubled": ([3, 4, 3], r"decisions= names index 3 more than once; give each once"),
    "everything": (list(range(60)), r"Of the 60 training examples nothing would be left"),
    "nothing": ({}, r"These decisions change nothing \({}\); decide on at least one example"),
    "no class": ({2: 3}, r"The new label 3 of example 2 is no class: they are 0 to 2"),
    "no number": ({2: 0.5}, r"The new label 0.5 of example 2 is no class number, as tensor\(2\) is"),
    "no name": ({2: "dog"}, r"'dog' is no class of the training data. Give its number"),
    "no decision": ("nowhere.json", r"'nowhere.json' cannot be read"),
    "an object": (object(), r"decisions= takes indices of training examples"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_decisions_in_one_sentence(name: str) -> None:
    decisions, match = BAD[name]
    with pytest.raises(InvalidInput, match=match):
        curate(blobs(), decisions)


def test_a_table_in_which_nothing_is_decided(tmp_path: Path) -> None:
    table = tmp_path / "label_issues.csv"
    table.write_text("index,decision\n3,\n4,keep\n")
    with pytest.raises(
        InvalidInput, match=r"in '.*label_issues\.csv' change nothing: none is wrong_label or duplicate"
    ):
        curate(blobs(), table)


def test_decisions_on_other_data_in_one_sentence(tmp_path: Path) -> None:
    x, y = blobs()
    path = decided(tmp_path / "d.json", 50, {"index": 3, "decision": "duplicate"})
    with pytest.raises(InvalidInput, match="was written on a report of 50 training examples, and these are 60"):
        curate((x, y), path)
    with pytest.raises(InvalidInput, match="The decisions are on a report of 50 training examples, and these are 60"):
        curate((x, y), read_decisions(path))
    issues = ptif.find_label_issues(ptif.Problem(nn.Linear(4, 3), nn.CrossEntropyLoss(), (x[:50], y[:50])))
    with pytest.raises(InvalidInput, match="The label issues are of 50 training examples, and these are 60"):
        curate((x, y), issues)
    with pytest.raises(InvalidInput, match="'catt' is no class of the training data"):
        curate((x, y), {2: "catt"}, class_names=["cat", "dog", "cow"])
    with pytest.raises(InvalidInput, match="has no target to relabel"):
        curate([(x[0],), (x[1],)], {0: 1})
    with pytest.raises(InvalidInput, match="cannot be relabelled; rename its target"):
        curate([{"input": x[0]}, {"input": x[1]}], {0: 1})
