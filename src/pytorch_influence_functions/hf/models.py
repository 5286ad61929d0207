"""What a Hugging Face object is: a Trainer, an adapter, a causal model; asked without importing transformers."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from torch import nn

from ..core.errors import InvalidInput, require

# The library's own names of losses that are means over tokens, and whether outputs predict the next token.
_TOKEN_LOSSES: Final = {"ForCausalLM": True, "ForMaskedLM": False, "ForTokenClassification": False}
_CLASS_LOSSES: Final = ("ForSequenceClassification", "ForImageClassification", "ForVideoClassification")
# Classes that are older than the names of losses, and three of them whose labels are not shifted.
_CAUSAL_CLASSES: Final = ("ForCausalLM", "LMHeadModel", "ForCausalLMWithValueHead")
_UNSHIFTED: Final = ("XLNetLMHeadModel", "XLMWithLMHeadModel", "FlaubertWithLMHeadModel")
# Of models without an encoder of texts, such as those that read pictures beside a text.
_GENERATION: Final = "ForConditionalGeneration"
_VIRTUAL_TOKENS: Final = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")
ADAPTER_CONFIG: Final = "adapter_config.json"


def is_trainer(thing: Any) -> bool:
    """Whether it is a Trainer of transformers, or of a library that builds on it."""
    kinds = type(thing).__mro__
    return any(kind.__name__ == "Trainer" and kind.__module__.startswith("transformers") for kind in kinds)


def is_pipeline(thing: Any) -> bool:
    """Whether it is a pipeline of transformers, which holds a model and its tokenizer."""
    kinds = type(thing).__mro__
    return any(kind.__name__ == "Pipeline" and kind.__module__.startswith("transformers") for kind in kinds)


def knows_texts(thing: Any) -> bool:
    """Whether it brings what texts take beside a model: a Trainer, or a pipeline."""
    return is_trainer(thing) or is_pipeline(thing)


def base_model(model: nn.Module) -> nn.Module:
    """The model that adapters of PEFT were put into; the model itself where there are none."""
    inside = getattr(model, "get_base_model", None)
    return inside() if callable(inside) and hasattr(model, "peft_config") else model


def accepted_arguments(model: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of forward."""
    return tuple(inspect.signature(base_model(model).forward).parameters)


def is_seq2seq(model: nn.Module) -> bool:
    """Whether it is an encoder with a decoder."""
    return bool(getattr(getattr(base_model(model), "config", None), "is_encoder_decoder", False))


def writes_labels(model: nn.Module) -> bool:
    """Whether labels are the text of a decoder that reads them shifted by one, and no classes or numbers."""
    return is_seq2seq(model) and token_shift(model) is False and "decoder_input_ids" in accepted_arguments(model)


def is_causal(model: nn.Module) -> bool:
    """Whether outputs at a token predict the next one."""
    return not is_seq2seq(model) and bool(token_shift(model))


def is_kind(model: nn.Module, *endings: str) -> bool:
    """Whether the class of the model, or one that it builds on, has a name that ends so.

    Args:
        model: the model, with adapters or without.
        endings: ends of names, such as `"ForSequenceClassification"`.
    """
    return any(kind.__name__.endswith(endings) for kind in type(base_model(model)).__mro__)


def token_shift(model: nn.Module) -> bool | None:
    """Whether outputs predict the next token (True) or their own (False); None where the loss is not one of tokens."""
    inside = base_model(model)
    if is_seq2seq(inside):
        return None if _is_classifier(inside) or marks_answers(inside) else False
    # A class of one's own is what the first class that it builds on is.
    shifts = (_shift_by_name(kind.__name__) for kind in type(inside).__mro__)
    by_name = next((shift for shift in shifts if shift is not None), None)
    return _TOKEN_LOSSES.get(str(getattr(inside, "loss_type", None))) if by_name is None else by_name


def _shift_by_name(name: str) -> bool | None:
    """What the name of a class says."""
    if name.endswith(_UNSHIFTED):
        return False
    if name.endswith((*_CAUSAL_CLASSES, _GENERATION)):
        return True
    return next((shift for loss, shift in _TOKEN_LOSSES.items() if name.endswith(loss)), None)


def classifies_tokens(model: nn.Module) -> bool:
    """Whether every token of a text is given a class."""
    named = is_kind(model, "ForTokenClassification")
    return named or getattr(base_model(model), "loss_type", None) == "ForTokenClassification"


def fills_blanks(model: nn.Module) -> bool:
    """Whether outputs say what stands at tokens that were hidden."""
    return token_shift(model) is False and not is_seq2seq(model) and not classifies_tokens(model)


def _is_classifier(model: nn.Module) -> bool:
    return is_kind(model, *_CLASS_LOSSES)


def marks_answers(model: nn.Module) -> bool:
    """Whether outputs say where in a text an answer starts and where it ends."""
    return is_kind(model, "ForQuestionAnswering")


def is_classifier(model: nn.Module) -> bool:
    """Whether the loss is the one that transformers chooses by `num_labels` and the type of the labels."""
    return _is_classifier(model) or getattr(base_model(model), "loss_type", None) in _CLASS_LOSSES


def adapter_parameters(model: nn.Module) -> list[str] | None:
    """The parameters of the active adapters, where a model was loaded with adapters and all of it is frozen.

    None: the model has no adapters, or some of it is trainable, which then takes part.
    """
    if not hasattr(model, "peft_config") or not _loaded_frozen(model):
        return None
    active: Any = getattr(model, "active_adapters", None) or getattr(model, "active_adapter", None) or []
    adapters = [active] if isinstance(active, str) else list(active)
    prefix = str(getattr(getattr(model, "base_model", None), "prefix", "lora_"))
    names = [
        name
        for name, _ in model.named_parameters()
        if any(f".{adapter}" in f"{name}." for adapter in adapters) and (prefix in name or ".modules_to_save." in name)
    ]
    if not names:
        raise InvalidInput(
            "No parameter of the model is trainable and its adapters have none of their own; load it with "
            "PeftModel.from_pretrained(model, path, is_trainable=True), or name them with parameters=."
        )
    return names


def _loaded_frozen(model: nn.Module) -> bool:
    """Whether nothing is trainable; older versions of peft leave whole layers saved beside the adapters trainable."""
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    loaded = bool(getattr(getattr(model, "active_peft_config", None), "inference_mode", False))
    return not trainable or (loaded and all(".modules_to_save." in name for name in trainable))


def refuse_adapters(model: nn.Module) -> None:
    """Refuse adapters that take no part, or that make texts longer than they are.

    Raises:
        InvalidInput: adapters were merged in place, or are virtual tokens before the text.
    """
    if not hasattr(model, "peft_config"):
        return
    if any(getattr(module, "merged_adapters", None) for module in model.modules()):
        raise InvalidInput(
            "The adapters are merged into the weights under them, so their own parameters take no part in what the "
            "model says; call model.unmerge_adapter() first."
        )
    config: Any = getattr(model, "active_peft_config", None)
    kind = str(getattr(getattr(config, "peft_type", None), "value", ""))
    if kind in _VIRTUAL_TOKENS:
        raise InvalidInput(
            f"{kind} adapters put virtual tokens before every text, whose outputs stand beside no label; adapters "
            "inside the layers, such as LoRA, can be used."
        )


def load_model(path: str | os.PathLike[str]) -> nn.Module:
    """A model from a folder or a name on the hub; with its adapters, where the folder holds those alone.

    Raises:
        MissingExtra: transformers (or, for adapters, peft) is not installed.
        InvalidInput: there is no model of a class that transformers knows.
    """
    transformers = require("transformers", "hf")
    if (Path(path) / ADAPTER_CONFIG).exists():
        peft = require("peft", "hf")
        adapted: nn.Module = peft.AutoPeftModelForCausalLM.from_pretrained(os.fspath(path), is_trainable=True)
        return adapted
    try:
        config = transformers.AutoConfig.from_pretrained(os.fspath(path))
    except (OSError, ValueError) as cause:
        why = str(cause).strip().split("\n")[0]
        raise InvalidInput(
            f"There is no model at {os.fspath(path)!r} ({why}); give the folder that model.save_pretrained(folder) "
            "wrote, or a name on the hub."
        ) from cause
    kinds: Iterable[str] = getattr(config, "architectures", None) or ("AutoModelForCausalLM",)
    kind = getattr(transformers, next(iter(kinds)), None)
    if kind is None:
        raise InvalidInput(
            f"{os.fspath(path)!r} holds a model of the class {next(iter(kinds))}, which transformers does not have; "
            "load it yourself and pass the model."
        )
    loaded: nn.Module = kind.from_pretrained(os.fspath(path))
    return loaded


def load_with_tokenizer(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """A model and its tokenizer, where the model is given by its path, whose folder then holds both; else as they are.

    Args:
        model: a model, or the path of its folder.
        tokenizer: a tokenizer, or the path of one; None: not given.

    Raises:
        InvalidInput: as `load_model`.
    """
    if not isinstance(model, (str, os.PathLike)):
        return model, tokenizer
    return load_model(model), model if tokenizer is None else tokenizer


def find_tokenizer(
    model: nn.Module, given: Any = None, cure: str = "pass tokenizer=, the one that training used"
) -> Any:
    """The tokenizer that was given, or the one that lies beside the model.

    Args:
        model: the model.
        given: a tokenizer, or the path of one.
        cure: what to do where there is none.

    Raises:
        InvalidInput: none was given and none lies where the model was loaded from.
    """
    if given is not None and not isinstance(given, (str, os.PathLike)):
        return given
    transformers = require("transformers", "hf")
    place = os.fspath(given) if given is not None else str(getattr(base_model(model), "name_or_path", "") or "")
    try:
        if not place:
            raise OSError("the model was not loaded from anywhere")
        return transformers.AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as cause:
        where = f"at {place!r}" if place else "beside the model, which was not loaded from a folder or the hub"
        raise InvalidInput(f"There is no tokenizer {where}; {cure}.") from cause
