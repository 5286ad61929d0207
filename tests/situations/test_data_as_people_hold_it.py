"""My data are a frame, a series, lists, labels in words, a sparse matrix; or my queries have no labels."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.problem.data import Source
from tests.tolerance import gap, rounding

N = 12
X, Y = torch.linspace(-3, 3, 3 * N).reshape(N, 3).sin(), torch.tensor([2, 0, 1] * 4)
NAMES = np.array(["ant", "bee", "cow"])
WORDS = NAMES[Y.numpy()]
FRAME = pd.DataFrame(X.double().numpy(), columns=["a", "b", "c"])


class Polars:
    """What has `to_numpy()` and a shape, and nothing else of pandas."""

    def __init__(self, values: Any) -> None:
        self.values, self.shape = values, values.shape

    def __len__(self) -> int:
        return len(self.values)

    def to_numpy(self) -> Any:
        return self.values


HELD: dict[str, Any] = {
    "frame and series": (FRAME, pd.Series(Y.numpy())),
    "frame and list": (FRAME, Y.tolist()),
    "shuffled index": (FRAME.set_index(pd.Index(range(N))[::-1]), pd.Series(Y.numpy(), index=range(5, 5 + N))),
    "polars": (Polars(X.double().numpy()), Polars(Y.numpy())),
    "nested lists": (X.tolist(), Y.tolist()),
    "series of words": (FRAME, pd.Series(WORDS)),
    "array of words": (X, WORDS),
    "list of words": (X.tolist(), WORDS.tolist()),
    "objects": (X, WORDS.astype(object)),
    "sparse": (scipy.sparse.csr_matrix(X.numpy()), Y),
    "sparse and words": (scipy.sparse.coo_matrix(X.double().numpy()), pd.Series(WORDS)),
    "mixed columns": (FRAME.assign(d=True)[["a", "b", "c"]], Y.numpy()),
    "mapping of series": {"input": FRAME, "labels": pd.Series(Y.numpy())},
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.layer(input)
        return output


@pytest.mark.parametrize("name", HELD)
def test_scores_are_those_of_tensors(name: str) -> None:
    model = Net()
    plain = ptif.attribute(model, (X, Y), (X[:2], Y[:2]), method="grad_dot")
    scores = ptif.attribute(model, HELD[name], HELD[name], method="grad_dot")
    assert gap(scores.values[:2], plain.values) < rounding(torch.float32)
    assert scores.train_labels == Y.tolist()
    assert scores.class_names == (NAMES.tolist() if "words" in name or name == "objects" else None)


def test_queries_in_words_are_numbered_as_the_training_labels() -> None:
    """The queries alone would call "bee" class 0."""
    model = Net()
    plain = ptif.attribute(model, (X, Y), (X[1:3], Y[[2, 0]]), method="grad_dot")
    scores = ptif.attribute(model, (X, WORDS), (X[1:3], ["bee", "cow"]), method="grad_dot")
    assert scores.query_labels == [1, 2] and gap(scores.values, plain.values) < rounding(torch.float32)
    with pytest.raises(InvalidInput, match="In the queries, label 'dog' is none of the classes 'ant', 'bee', 'cow'"):
        ptif.attribute(model, (X, WORDS), (X[:1], ["dog"]))
    with pytest.raises(InvalidInput, match="In the queries, label 'bee' is a word and the training labels are not"):
        ptif.attribute(model, (X, Y), (X[:1], ["bee"]))


def test_a_categorical_series_keeps_its_order() -> None:
    source = Source.of((X, pd.Series(pd.Categorical(WORDS, categories=["cow", "ant", "bee"]))))
    assert source.class_names == ["cow", "ant", "bee"]
    assert next(source.batches())[1][1].tolist() == [[1, 2, 0][i] for i in Y.tolist()]


def test_a_sparse_matrix_is_written_out_by_the_batch() -> None:
    class Counting(scipy.sparse.csr_matrix):  # type: ignore[misc]
        largest = 0

        def toarray(self, *args: Any, **options: Any) -> Any:
            Counting.largest = max(Counting.largest, self.shape[0])
            return super().toarray(*args, **options)

    source = Source.of((Counting(X.numpy()), Y), 4)
    rows = torch.cat([batch[0] for _, batch in source.batches()])
    assert torch.equal(rows, X) and Counting.largest <= 4
    assert torch.equal(source.item(5)[0], X[5])


class ListColumns:
    """A dataset of Hugging Face as it comes: Python lists."""

    features: ClassVar[dict[str, Any]] = {}

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": [1, 2, 3], "labels": 1}


REFUSED: dict[str, tuple[Any, str]] = {
    "one frame": (FRAME, r"columns 'a', 'b', 'c' does not say which .*\(frame\.drop\(columns='c'\), frame\['c'\]\)"),
    "words in the frame": ((FRAME.assign(d="x"), Y), r"Array 0 .*columns that are not numeric.*get_dummies"),
    "lengths": ((FRAME, [0, 1]), "0 has 12, 1 has 2"),
    "sparse lengths": ((scipy.sparse.csr_matrix(X.numpy()), [0, 1]), "0 has 12, 1 has 2"),
    "lists in a dataset": (ListColumns(), r"a Python list \(under 'input_ids'\).*with_format\('torch'\).*collate_fn"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_in_a_sentence(name: str) -> None:
    data, message = REFUSED[name]
    with pytest.raises(InvalidInput, match=message):
        list(Source.of(data).batches())


@pytest.mark.parametrize("loss", [None, torch.nn.CrossEntropyLoss()])
def test_arrays_of_double_precision_are_taken_in_the_models(loss: Any) -> None:
    model, x, y = Net(), X.double().numpy(), Y.numpy()
    want = ptif.attribute(model, (X.float(), Y), (X[:2].float(), Y[:2]), loss=loss, method="exact")
    scores = ptif.attribute(model, (x, y), (x[:2], y[:2]), loss=loss, method="exact")
    torch.testing.assert_close(scores.values, want.values, rtol=1e-4, atol=1e-6)
    # A model in double precision keeps them as they are.
    assert ptif.attribute(Net().double(), (x, y), (x[:2], y[:2]), method="exact").values.dtype == torch.float64
    mixed = ptif.attribute(
        model, {"input": x, "labels": y}, {"input": x[:2], "labels": y[:2]}, loss=loss, method="exact"
    )
    torch.testing.assert_close(mixed.values, want.values, rtol=1e-4, atol=1e-6)


def test_arrays_of_double_precision_can_be_verified() -> None:
    x, y = X.double().numpy(), Y.numpy()
    x, y = np.tile(x, (4, 1)), np.tile(y, 4)
    recipe = ptif.evaluation.Recipe(Net, epochs=2, loss=torch.nn.CrossEntropyLoss())
    model = ptif.evaluation.train_model(recipe, (x, y))
    scores = ptif.attribute(model, (x, y), (x[:2], y[:2]), method="exact")
    assert len(scores.verify(recipe, n=6).removals) == 6


def test_tensors_of_double_precision_are_refused_with_what_works() -> None:
    model, x = Net(), X.double()
    with pytest.raises(InvalidInput, match=r"torch\.float64.*the data with \.float\(\)"):
        ptif.attribute(model, (x, Y), (x[:2], Y[:2]))
    assert ptif.attribute(model, (x.float(), Y), (x[:2].float(), Y[:2]), method="grad_dot").values.any()


def test_the_pair_that_the_message_names_works() -> None:
    frame = FRAME.assign(label=Y.numpy())
    pair = (frame.drop(columns="label"), frame["label"])
    assert ptif.attribute(Net(), pair, pair, method="grad_dot").shape == (N, N)


def test_queries_without_labels_are_offered_the_predicted_ones() -> None:
    model = Net()
    with pytest.raises(InvalidInput, match=r"has no target.*unlabelled.*queries=\(x, model\(x\)\.argmax\(1\)\)"):
        ptif.attribute(model, (X, Y), X[:2])
    queries = (X[:2], model(X[:2]).argmax(1))
    assert ptif.attribute(model, (X, Y), queries, measure=ptif.Margin()).query_labels == queries[1].tolist()


# --------------------------------------------------------------------------- handing on


def test_scores_are_an_array_and_a_csv_file(tmp_path: Path) -> None:
    scores = ptif.attribute(Net(), (X, WORDS), (X[:2], WORDS[:2]), method="grad_dot")
    array = np.asarray(scores)
    assert array.shape == (2, N) and np.array_equal(array, scores.values.numpy())
    array[:] = 0
    assert scores.values.any() and np.asarray(scores, dtype=np.float64).dtype == np.float64
    with pytest.raises(InvalidInput, match=r"safetensors, not \.csv.*scores\.to_csv\(path\)"):
        scores.save(tmp_path / "x.csv")
    with pytest.raises(InvalidInput, match=r"safetensors, not \.json.*scores\.to_json\(path\)"):
        scores.save(tmp_path / "x.json")
    scores.to_csv(tmp_path / "x.csv")
    with (tmp_path / "x.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    index, score = scores.helpful(1, 1)[0]
    first = rows[N]
    assert len(rows) == 2 * N and list(first) == list(scores.to_frame().columns)
    assert (first["query"], first["train"], first["rank"]) == ("1", str(index), "1") and float(first["score"]) == score
    assert first["train_class"] == WORDS[index]
