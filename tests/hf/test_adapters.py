"""Adapters of PEFT: they alone take part, the model that they were put into is left as it is."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import pytorch_influence_functions as ptif
from tests.hf.tiny import gpt2, gradient, llama, own_loss, products, texts, tokenizer
from tests.laws.test_frozen_weights import NewTensors
from tests.tolerance import gap

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


def with_adapters(kind: str = "lora", seed: int = 0) -> Any:
    base = llama()
    layers = ["q_proj", "v_proj", "down_proj"]
    config = {
        "lora": lambda: peft.LoraConfig(r=2, target_modules=layers, lora_alpha=4),
        "dora": lambda: peft.LoraConfig(r=2, target_modules=layers, use_dora=True),
        "ia3": lambda: peft.IA3Config(target_modules=layers, feedforward_modules=["down_proj"]),
        "head too": lambda: peft.LoraConfig(r=2, target_modules=layers, modules_to_save=["lm_head"]),
    }[kind]()
    config.task_type = "CAUSAL_LM"
    model = peft.get_peft_model(base, config).double()
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return model.eval()


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "head too"])
def test_adapters_alone_take_part(kind: str) -> None:
    model, words = with_adapters(kind), tokenizer()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    problem = ptif.hf.problem(model, words, texts(5))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(problem.space.names) == trainable
    scores = ptif.attribute(problem, queries=texts(2, seed=1), method="grad_dot")
    training, asked = (
        [gradient(model, own_loss(model, words(text)["input_ids"])) for text in part]
        for part in (texts(5), texts(2, seed=1))
    )
    assert gap(scores.values.double(), products(model, asked, training)) < 1e-6
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    own = dict(model.named_parameters())
    assert all(torch.equal(own[n], value) and own[n].grad is None for n, value in frozen.items())


def test_adapters_that_were_loaded_frozen_take_part_all_the_same(tmp_path: Path) -> None:
    trained, words = with_adapters("head too"), tokenizer()
    trained.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path).double().eval()
    before = [p.requires_grad for p in loaded.parameters()]
    assert sum(before) <= 1, "older versions of peft leave the whole layer trainable"
    values = [
        ptif.attribute(ptif.hf.problem(model, words, texts(4)), queries="who wrote this book", method="grad_dot").values
        for model in (trained, loaded)
    ]
    assert gap(*values) < 1e-6
    assert [p.requires_grad for p in loaded.parameters()] == before


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "head too"])
def test_adapters_in_files_are_checkpoints(kind: str, tmp_path: Path) -> None:
    words, states = tokenizer(), [with_adapters(kind, seed) for seed in (1, 2)]
    for step, model in enumerate(states, 1):
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
    model = with_adapters(kind, 2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}

    def ask(model: Any, **options: Any) -> torch.Tensor:
        problem = ptif.hf.problem(model, words, texts(4), **options)
        return ptif.attribute(problem, queries="who wrote this book", method="grad_dot").values

    folders = [tmp_path / f"checkpoint-{step}" for step in (1, 2)]
    mean = (ask(states[0]) + ask(states[1])) / 2
    assert gap(ask(model, checkpoints=folders), mean) < 1e-6
    assert gap(ask(model, checkpoints=[folder / "adapter_model.safetensors" for folder in folders]), mean) < 1e-6
    run = ptif.Recording.open(tmp_path)
    assert run.steps == (1, 2) and run.ends_at(model)
    assert gap(ask(model, checkpoints=run.checkpoints), mean) < 1e-6
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    along = ptif.attribute(
        ptif.hf.problem(model, words, texts(4)), queries="who wrote this book", method="grad_dot", run=tmp_path
    )
    assert along.values.shape == (1, 4)


def test_an_adapter_of_other_settings_is_refused(tmp_path: Path) -> None:
    with_adapters("lora").save_pretrained(tmp_path)
    model = with_adapters("head too")
    problem = ptif.hf.problem(model, tokenizer(), texts(3), checkpoints=tmp_path)
    with pytest.raises(ptif.errors.InvalidInput, match=r"lacks '.*lm_head.*', which the model's adapter 'default' has"):
        ptif.methods.grad_dot().fit(problem)


def test_a_folder_of_adapters_is_loaded_with_its_model(tmp_path: Path) -> None:
    base, words = gpt2(dtype=torch.float32), tokenizer()
    base.save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "adapters")
    base = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", init_lora_weights=False)
        peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapters")
    problem = ptif.hf.problem(tmp_path / "adapters", words, texts(3))
    assert problem.space.names and all("lora_" in name for name in problem.space.names)
    assert ptif.attribute(problem, queries="who wrote this book", method="grad_dot").values.abs().max() > 0


@pytest.mark.parametrize("method", ["ekfac", "grad_dot"])
@pytest.mark.parametrize("where", ["as they are", "checkpoints"])
def test_no_second_copy_of_the_model_under_adapters_is_made(where: str, method: str, tmp_path: Path) -> None:
    model, words = with_adapters("lora").float(), tokenizer()
    model.save_pretrained(tmp_path)
    expected = ptif.attribute(ptif.hf.problem(model, words, texts(5)), queries=texts(2, seed=1), method=method)
    checkpoints = {"checkpoints": [tmp_path]} if where == "checkpoints" else {}
    problem = ptif.hf.problem(model, words, texts(5), **checkpoints)
    frozen = {tuple(p.shape) for p in model.parameters() if not p.requires_grad and p.dim() == 2}
    trained = {tuple(p.shape) for p in model.parameters() if p.requires_grad}
    largest = max(frozen - trained, key=lambda shape: shape[0] * shape[1])
    assert largest == (41, 16)  # the embedding and the head: nothing else has this shape
    with NewTensors(largest) as made:
        scores = ptif.attribute(problem, queries=texts(2, seed=1), method=method)
    # The share of the gradient that frozen weights have is measured on a few texts, one weight after the other.
    assert {operation.split(".")[1] for operation in made.operations} == {"mm", "embedding_dense_backward"}
    assert made.at_once == 1
    assert gap(scores.values, expected.values) < 1e-5


def test_weights_that_take_part_and_that_accelerate_offloads_are_refused(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.disk_offload(llama(dtype=torch.float32), str(tmp_path), execution_device=torch.device("cpu"))
    with pytest.raises(
        ptif.errors.InvalidInput, match=r"offloaded by accelerate \('.*' is brought in for each forward"
    ):
        ptif.hf.problem(model, tokenizer(), texts(3))
    with pytest.raises(ptif.errors.InvalidInput, match="name those that stay with parameters="):
        ptif.hf.problem(model, tokenizer(), texts(3), parameters="*.norm.weight")


def over_offloaded_layers(_: Path) -> tuple[Any, Any, dict[str, Any]]:
    """Adapters, of which the frozen layers under them are offloaded."""
    accelerate = pytest.importorskip("accelerate")
    plain, offloaded = (with_adapters("lora").float() for _ in range(2))
    for module in list(offloaded.modules()):
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            accelerate.cpu_offload(module.base_layer, execution_device=torch.device("cpu"))
    return plain, offloaded, {}


def over_a_device_map(folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """A whole model whose last layer lies on the disk; what is asked about stays."""
    pytest.importorskip("accelerate")
    llama(dtype=torch.float32).save_pretrained(folder / "model")
    names = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
    places = {name: "disk" if name.endswith("1") else "cpu" for name in names}
    load = transformers.AutoModelForCausalLM.from_pretrained
    offloaded = load(folder / "model", device_map=places, offload_folder=str(folder / "offloaded"))
    return load(folder / "model"), offloaded, {"parameters": ["model.layers.0.*", "model.norm.*"]}


@pytest.mark.parametrize("make", [over_offloaded_layers, over_a_device_map])
def test_weights_that_stay_are_asked_over_a_model_that_is_offloaded(make: Any, tmp_path: Path) -> None:
    """The same numbers as of the model that lies here whole."""
    plain, offloaded, options = make(tmp_path)
    words, before = tokenizer(), [(n, p.requires_grad, p.device.type) for n, p in offloaded.named_parameters()]
    assert "meta" in {place for *_, place in before}
    asked = ptif.hf.query(plain, words, "the cat", " sat on")
    expected = ptif.ekfac().fit(ptif.hf.problem(plain, words, texts(5), **options))
    attribution = ptif.ekfac().fit(ptif.hf.problem(offloaded, words, texts(5), **options))
    scores = attribution.score(asked)
    assert gap(scores.values, expected.score(asked).values) < 1e-5
    assert gap(attribution.token_scores(asked, [3])[3], expected.token_scores(asked, [3])[3]) < 1e-5
    assert "the others' share of the gradient was not measured" in str(scores.diagnostics)
    assert [(n, p.requires_grad, p.device.type) for n, p in offloaded.named_parameters()] == before
