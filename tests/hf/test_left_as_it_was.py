"""Asking a language model, and measuring its padding, leaves everything of the user's as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import pytorch_influence_functions as ptif
from tests.hf.tiny import gpt2, llama, texts, tokenizer
from tests.laws.pictures import picture_of_model

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


def answers(model: Any, words: Any) -> None:
    ptif.hf.query(model, words, ["who wrote", "the moon"], max_new_tokens=3)


def chat(model: Any, words: Any) -> None:
    ptif.hf.query(model, words, [{"role": "user", "content": "who wrote"}], max_new_tokens=3)


def doctor(model: Any, words: Any) -> None:
    ptif.hf.doctor(model, words, texts(2), most=2)


def ask(model: Any, words: Any) -> None:
    problem = ptif.hf.problem(model, words, texts(3))
    attribution = ptif.methods.grad_dot().fit(problem)
    queries = ptif.hf.query(model, words, "who", " wrote")
    attribution.token_scores(queries, [0])


ENTRIES: dict[str, Callable[[Any, Any], None]] = {"query": answers, "chat": chat, "doctor": doctor, "attribute": ask}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_model_tokenizer_settings_and_random_state_are_as_before(make: Any, entry: str) -> None:
    """In training mode with dropout or a frozen layer, gradients and a hook on it, as in the middle of a loop."""
    words = tokenizer()
    model = make()
    model.train()
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    text = torch.tensor([words(texts(1)[0])["input_ids"]])
    model(input_ids=text, labels=text).loss.backward()
    seen: list[int] = []
    hook = model.register_forward_hook(lambda *_: seen.append(1))
    settings = {k: repr(v) for k, v in vars(model.config).items()}
    generation = repr(model.generation_config)
    described, pad, side = repr(words), words.pad_token_id, words.padding_side
    before, state, enabled = picture_of_model(model), torch.get_rng_state(), torch.is_grad_enabled()
    ENTRIES[entry](model, words)
    assert picture_of_model(model) == before
    assert {k: repr(v) for k, v in vars(model.config).items()} == settings
    assert repr(model.generation_config) == generation
    assert (repr(words), words.pad_token_id, words.padding_side) == (described, pad, side)
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled() == enabled
    hook.remove()


@pytest.mark.parametrize("entry", ["query", "doctor"])
def test_also_where_it_is_interrupted(entry: str) -> None:
    model, words = llama(), tokenizer()
    model.train()
    before = picture_of_model(model)
    calls = 0

    def interrupt(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        ENTRIES[entry](model, words)
    hook.remove()
    assert picture_of_model(model) == before and model.training
