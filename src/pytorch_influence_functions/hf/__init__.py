"""Hugging Face models, tokenizers, datasets and Trainers: texts as training data, answers as queries.

Needs the extra `hf` (transformers, datasets, accelerate, peft) where one of these libraries has something to do.
"""

from ..trajectory.callbacks import lightning_callback
from ..trajectory.callbacks import trainer_callback as PtifCallback
from .doctor import Checkup, Finding, doctor
from .document_scores import document_scores
from .problem import problem
from .queries import TextQueries, query
from .texts import Texts

__all__ = [
    "Checkup",
    "Finding",
    "PtifCallback",
    "TextQueries",
    "Texts",
    "doctor",
    "document_scores",
    "lightning_callback",
    "problem",
    "query",
]


def __dir__() -> list[str]:
    return __all__
