"""Data by index: anything with a length and items, in dataset order, whatever order a loader's sampler takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
)

from ..core.batches import map_tensors
from ..core.errors import InvalidInput, TrainingDataWarning, name_ids
from ..core.indexing import spread_sample, while_cheap
from ..core.validate import choice, whole_number
from ..core.warn import warn_caller
from .cutting import holds_words, is_cut_by_rows, reordered_pair, same
from .finite import check_finite, refuse_meta
from .random_state import same_rng
from .reading import Collate, NamingCollate, NamingDataset, Reader
from .samplers import SampledSubset, examples_of
from .tables import (
    LabelledTensors,
    NamedTensors,
    as_dataset,
    class_names_of,
    columns_of,
    holds_double_arrays,
    in_order_of,
)

IdsLike: TypeAlias = Tensor | Sequence[int] | slice | None

BATCH_SIZE = 64
# The fewest examples of a batch, however large one is; the most, however small; and the most numbers that the examples
# of one batch hold together. Measured over networks of 34 to 205,000 parameters: passes in batches of 64 take up to 25
# times as long as in batches of 2^20 to 2^22 numbers, and above 2^24 they become slower again.
_FEWEST, _WIDEST, _NUMBERS = 8, 4096, 1 << 22
# Items that are read twice beside the first, middle and last, as long as all of it takes no more seconds. Of flips with
# probability 0.1 this misses 1 in 800.
_PROBES, _PROBE_SECONDS = 32, 0.02
POLICIES = ("warn", "error", "ignore")


def _check_dataset(dataset: Any) -> None:
    kind = type(dataset).__name__
    if isinstance(dataset, IterableDataset) or (hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__")):
        raise InvalidInput(
            f"{kind} can only be iterated, but examples are named by index; "
            "wrap it as a list: list(dataset), if it fits in memory."
        )
    if not hasattr(dataset, "__getitem__") or isinstance(dataset, (str, bytes, nn.Module)):
        raise InvalidInput(
            f"{kind} cannot be used as data; expected a Dataset, a DataLoader, or tensors or arrays (x, y)."
        )
    try:
        length = len(dataset)
    except (TypeError, NotImplementedError) as cause:
        raise InvalidInput(f"{kind} has no length; give it a __len__, its number of examples.") from cause
    if length == 0:
        raise InvalidInput(f"The dataset ({kind}) is empty; at least one example is needed.")


def suited_size(numbers_each: float) -> int:
    """How many examples a batch has, where one takes so many numbers and nothing else bounds it."""
    room = int(_NUMBERS / max(1.0, numbers_each))
    # Large examples lose less above the number than they would in batches of a few.
    return min(_WIDEST, max(_FEWEST, room, min(BATCH_SIZE, 4 * room)))


def check_policy(policy: str) -> None:
    """Refuse anything but `"warn"`, `"error"` or `"ignore"`.

    Raises:
        InvalidInput: another value.
    """
    choice("deterministic", policy, POLICIES)


# --------------------------------------------------------------------------- reading


def _fast_columns(dataset: Any) -> tuple[Any, Tensor | None] | None:
    """The tensors behind a dataset that only indexes them, and the indices a Subset picks from them."""
    if type(dataset) in (TensorDataset, LabelledTensors, NamedTensors):
        return dataset.tensors, None
    if type(dataset) in (Subset, SampledSubset):
        inner = _fast_columns(dataset.dataset)
        if inner is not None:
            indices = torch.as_tensor(list(dataset.indices), dtype=torch.long)
            return inner[0], indices if inner[1] is None else inner[1][indices]
    return None


@dataclass(frozen=True, eq=False)
class Source:
    """Examples by index, batched in dataset order. Made with `Source.of`.

    A loader gives its dataset, collate function, workers and batch size, whatever its shuffling and `drop_last`. A
    sampler that draws the same part of the dataset in every epoch (`SubsetRandomSampler`, or one of your own) says what
    the training set is: the source is that part, in dataset order, and `positions` are its places in the dataset, by
    which scores name it. Other samplers are refused (weights) or warned about once.

    Example:
        >>> source = Source.of((torch.arange(10.0).reshape(5, 2), torch.arange(5)), batch_size=2)
        >>> [ids.tolist() for ids, _ in source.batches()]
        [[0, 1], [2, 3], [4]]
    """

    dataset: Any
    collate: Collate = default_collate
    batch_size: int = BATCH_SIZE
    num_workers: int = 0
    worker_options: Mapping[str, Any] = field(default_factory=dict)
    fixed: bool = False
    """Whether the batch size was asked for: batches are never larger then."""
    any_precision: bool = False
    """Whether float64 says nothing about the data, as in NumPy's arrays, whose default it is: the model's is taken."""
    loaded_singly: bool = False
    """Whether it is a loader whose batches are single examples: a loss averaged over a batch is then each example's."""
    reading: str = ""
    """How a loader's sampler was read, in words; empty where it visits the whole dataset."""
    drops_last: bool = False
    """Whether a loader leaves out the last batch of an epoch where it is not full: told to what trains again."""
    columns: Mapping[str, tuple[Any, ...]] = field(default_factory=dict, repr=False)
    """The names of the columns, where frames were given: other frames are put in their order, see `read_alike`."""
    ask: Callable[..., Source] | None = field(default=None, repr=False)
    """Reads what is asked of a problem with these data, `(problem, queries, labelled=False) -> Source`, where it has a
    form of its own, as texts have; `labelled`: each has to have its label. None: queries have the form of the data."""
    _determinism: dict[str, Any] = field(default_factory=dict, repr=False)  # what reading items twice has shown

    @classmethod
    def of(
        cls,
        data: Any,
        batch_size: int | None = None,
        classes: Sequence[str] | None = None,
        columns: Mapping[str, tuple[Any, ...]] | None = None,
    ) -> Source:
        """Wrap a dataset, a loader, or tensors or arrays `(x, y)`; reads nothing.

        Args:
            data: a map-style dataset (`__len__`, `__getitem__`; a list of examples too), a `DataLoader`, a
                tuple, list or mapping of equally long tensors, arrays, frames or series (what has `to_numpy()`), a
                tuple of equally long lists, a sparse matrix with labels, or a `Source`. Real numbers of frames and
                lists are taken in torch's default precision, NumPy's float64 in the model's. Labels may be words.
            batch_size: examples per batch, never more; `None`: what suits an example's size, see `suited_to`.
            classes: what labels in words are numbered by; `None`: a categorical series' own order, else alphabetical.
            columns: the order of the columns of frames, see `Source.columns`; `None`: their own.

        Raises:
            InvalidInput: data that can only be iterated, has no length or is empty; arrays of different
                lengths or without numbers; frames with other columns; a loader without batches.
        """
        if batch_size is not None:
            batch_size = whole_number("batch_size", batch_size)
        if isinstance(data, Source):
            return data if batch_size is None else replace(data, batch_size=batch_size, fixed=True)
        if not isinstance(data, DataLoader):
            data = in_order_of(data, columns or {})
            dataset = as_dataset(data, classes)
            _check_dataset(dataset)
            fixed, loose = batch_size is not None, holds_double_arrays(data)
            named = columns_of(data)
            return cls(dataset, batch_size=batch_size or BATCH_SIZE, fixed=fixed, any_precision=loose, columns=named)
        _check_dataset(data.dataset)
        if data.batch_sampler is None:
            raise InvalidInput(
                "The DataLoader has batch_size=None, so its collate function never sees a batch; "
                "make it with a batch_size, or pass its dataset."
            )
        size = batch_size or data.batch_size or getattr(data.batch_sampler, "batch_size", None) or BATCH_SIZE
        options = {"timeout": data.timeout, "worker_init_fn": data.worker_init_fn}
        if data.pin_memory and torch.cuda.is_available():
            options["pin_memory"] = True
        if data.num_workers:
            options |= {
                "prefetch_factor": data.prefetch_factor,
                "multiprocessing_context": data.multiprocessing_context,
            }
        dataset, reading = examples_of(data)
        fixed, drops = batch_size is not None, bool(getattr(data.batch_sampler, "drop_last", False))
        singly = (data.batch_size or getattr(data.batch_sampler, "batch_size", None)) == 1
        return cls(
            dataset, data.collate_fn, int(size), data.num_workers, options, fixed, loaded_singly=singly,
            reading=reading, drops_last=drops,
        )  # fmt: skip

    def read_alike(self, data: Any, batch_size: int | None = None) -> Source:
        """Other examples in the form of these: columns of frames go together by name, and labels in words too.

        Args:
            data: as for `Source.of`.
            batch_size: as for `Source.of`.

        Raises:
            InvalidInput: as `Source.of`; columns or labels that these do not have.

        Example:
            >>> import pandas
            >>> source = Source.of((pandas.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0]}), [0, 1]))
            >>> other = source.read_alike((pandas.DataFrame({"b": [3.0], "a": [1.0]}), [0]))
            >>> other.item(0)[0].tolist()
            [1.0, 3.0]
        """
        return Source.of(data, batch_size, self.class_names or (), self.columns)

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def sides(self) -> tuple[Source, Source | None]:
        """The examples, and those that they are held against one by one; None: none are."""
        return self, None

    @property
    def names(self) -> list[str] | None:
        """What to call each of them; None: they have no names."""
        return None

    def suited_to(self, numbers_each: float, most: int = _WIDEST, workers: int = 1, memory: float = math.inf) -> Source:
        """The same examples in batches that suit the size of one: the only rule for batch sizes.

        Small batches of small examples are all overhead, and large ones of large examples leave the cache and then the
        memory. Scores do not depend on it. Where a batch size was asked for it is the upper bound. A loader's batch
        size is one for training, and does not bound; where its collate function is its own, which may pad to the
        longest of a batch, batches are not made larger than the loader's.

        Args:
            numbers_each: how many numbers are held for one example.
            most: the most examples of a batch.
            workers: over how many processes the batches are shared out.
            memory: the most numbers that a batch may hold; fewer than a few large or 64 small examples would only cost
                time.

        >>> x, y = torch.zeros(10_000, 3), torch.zeros(10_000)
        >>> [Source.of((x, y)).suited_to(n).batch_size for n in (10, 10_000, 10_000_000)]
        [4096, 419, 8]
        >>> Source.of((x, y), batch_size=32).suited_to(10).batch_size
        32
        """
        each = max(1.0, numbers_each)
        bounded = self.fixed or self.collate is not default_collate
        bound = self.batch_size if bounded else _WIDEST
        share = -(-len(self) // workers)
        # Below 16 MiB nothing is saved by batches of fewer examples, and much time is lost.
        small = min(BATCH_SIZE, int(_NUMBERS / each))
        allowed = max(_FEWEST, small, int(min(memory / each, _WIDEST)))
        return replace(self, batch_size=max(1, min(suited_size(each), bound, most, share, allowed)))

    def in_precision_of(self, batch: Any, model: nn.Module) -> Any:
        """A batch in the model's precision, where that of the data says nothing.

        Args:
            batch: on any device.
            model: whose first real parameter says which precision.
        """
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float64)
        if not self.any_precision or dtype == torch.float64:
            return batch
        return map_tensors(batch, lambda tensor: tensor.to(dtype) if tensor.dtype == torch.float64 else tensor)

    @property
    def positions(self) -> Int[Tensor, " n"] | None:
        """The place of every example in the dataset, where a sampler chose a part of it; None: all, in order."""
        return torch.tensor(list(self.dataset.indices)) if type(self.dataset) is SampledSubset else None

    @property
    def whole(self) -> Source:
        """The same source over the whole dataset, also what a sampler left out: an index is a place in the dataset."""
        return replace(self, dataset=self.dataset.dataset) if type(self.dataset) is SampledSubset else self

    def index_of(self, position: int) -> int:
        """The index in this source of the example at a place in the whole dataset.

        Raises:
            InvalidInput: a sampler left it out.
        """
        if self.positions is None:
            return position
        index = (self.positions == position).nonzero()
        if not len(index):
            raise InvalidInput(
                f"Example {position} is not among those that the loader's sampler draws, so training never saw it; "
                "choose others."
            )
        return int(index[0])

    def spread(self, values: Tensor) -> Tensor:
        """Numbers [n, ...] of the examples as [N, ...] over the whole dataset, 0 for what is not in this source."""
        if self.positions is None:
            return values
        return values.new_zeros(len(self.whole), *values.shape[1:]).index_copy(
            0, self.positions.to(values.device), values
        )

    @cached_property
    def tensor_columns(self) -> tuple[Any, Tensor | None] | None:
        """The tensors of all examples and the rows of them that are taken, None for all; None where items are read."""
        return _fast_columns(self.dataset) if self.collate is default_collate else None

    @property
    def in_memory(self) -> bool:
        """Whether a batch is picked out of tensors, so that reading it costs next to nothing."""
        return self.tensor_columns is not None

    def item(self, index: int) -> Any:
        """One example as the dataset gives it, not collated."""
        self.plan([index])
        item = NamingDataset(self.dataset)[int(index)]
        refuse_meta(item, f"Item {int(index)} of the dataset")
        return item

    def subset(self, ids: IdsLike) -> Source:
        """The examples `ids` as a source of their own, renumbered from 0 in the order given."""
        chosen = self.indices(ids)
        if not len(chosen):
            raise InvalidInput("The subset is empty; at least one example is needed.")
        return replace(self, dataset=Subset(self.dataset, chosen.tolist()))

    def indices(self, ids: IdsLike = None) -> Int[Tensor, "_"]:
        """The dataset indices that `ids` mean, in the order given; `None`: all.

        Raises:
            InvalidInput: an index outside the dataset.
        """
        if ids is None or isinstance(ids, slice):
            return torch.arange(len(self))[slice(None) if ids is None else ids]
        chosen = torch.as_tensor(ids, device="cpu")
        if chosen.dtype == torch.bool or (chosen.is_floating_point() and chosen.numel()):
            raise InvalidInput(f"Indices must be whole numbers, got {chosen.dtype}.")
        chosen = chosen.long().reshape(-1)
        outside = chosen[(chosen < 0) | (chosen >= len(self))]
        if len(outside):
            raise InvalidInput(
                f"Index {name_ids(outside.tolist())} is outside the dataset, whose items are 0 to {len(self) - 1}."
            )
        return chosen

    def plan(self, ids: IdsLike = None) -> list[Int[Tensor, "_"]]:
        """The indices of each batch; `ids` in the order given, `None` for all.

        Raises:
            InvalidInput: an index outside the dataset.
        """
        chosen, size = self.indices(ids), self.batch_size
        return [chosen[start : start + size] for start in range(0, len(chosen), size)]

    def load(self, plan: Sequence[Int[Tensor, "_"]]) -> Iterator[tuple[Int[Tensor, "_"], Any]]:
        """Yield `(ids, batch)` for each list of indices; the global random generators are not used.

        Raises:
            InvalidInput: an item cannot be read, or a batch not collated; the item is named.
        """
        if self.tensor_columns is not None:
            columns, index = self.tensor_columns
            for ids in plan:
                rows = ids if index is None else index[ids]
                named = isinstance(columns, Mapping)
                yield ids, {k: t[rows] for k, t in columns.items()} if named else [t[rows] for t in columns]
            return
        # One draw of a random transform must not stand for all passes.
        hold = self.determinism == "yes"
        reader = Reader(self.dataset, self.collate, self.num_workers, self.worker_options, not self.is_cut_by_rows)
        yield from reader.read(plan, hold)

    def batches(self, ids: IdsLike = None) -> Iterator[tuple[Int[Tensor, "_"], Any]]:
        """Yield `(ids, batch)` in dataset order, or in the order of `ids`; batches stay on the CPU.

        Raises:
            InvalidInput: an index outside the dataset, or an item that cannot be read (named).
        """
        return self.load(self.plan(ids))

    @property
    def class_names(self) -> list[str] | None:
        """The names of the classes, where the dataset knows them."""
        return class_names_of(self.dataset)

    @property
    def is_cut_by_rows(self) -> bool:
        """Whether every example of a batch is a row of its tensors; else its examples are collated again one by one."""
        return (self.collate is default_collate and not self._holds_words) or self._try_collate()["rows"]

    @property
    def _holds_words(self) -> bool:
        """Whether examples hold texts, of which a batch has a list, which no tensor's axis runs over."""
        if self.in_memory:
            return False
        if "words" not in self._determinism:
            with same_rng():
                self._determinism["words"] = holds_words(self.item(0))
        return bool(self._determinism["words"])

    @property
    def _collate_draws(self) -> bool:
        """Whether the collate function draws random numbers, as one that masks tokens does."""
        return self.collate is not default_collate and self._try_collate()["draws"]

    def _try_collate(self) -> dict[str, Any]:
        """What a collate function of the user's does to three examples; found out once."""
        if "rows" not in self._determinism:
            count, collate = len(self), NamingCollate(self.collate)
            with same_rng():
                places = (0, count // 2, count - 1)
                items = [self.item(i) for i in places]
                draws = not same(collate(items), collate(items))
                if not draws and (pair := reordered_pair(collate, items)) is not None:
                    i, j = (places[at] for at in pair)
                    raise InvalidInput(
                        f"The collate function makes the same batch of examples {i} and {j} whichever comes first: it "
                        "puts them in an order of its own, so that nobody can tell which row is whose; let it keep the "
                        "order (pack_padded_sequence(..., enforce_sorted=False) takes any), or sort inside the model."
                    )
                # What it draws would be drawn anew when an example is collated again.
                self._determinism.update(draws=draws, rows=draws or is_cut_by_rows(collate, items))
        return self._determinism

    @property
    def determinism(self) -> str:
        """`"yes"`, `"no"` or `"not checked"`: whether the items that were read twice came out the same."""
        if "differs" not in self._determinism:
            return "not checked"
        return "yes" if self._determinism["differs"] is None and not self._collate_draws else "no"

    def check_deterministic(self, policy: str = "warn") -> None:
        """Read item 0 twice, and for transforms that act only sometimes others too: more of them where that is cheap.

        The random generators are put back afterwards. Read, and warned about, once per source.

        Raises:
            InvalidInput: the readings differ and `policy` is `"error"`, or an unknown policy.
        """
        check_policy(policy)
        if policy == "ignore":
            return
        if "differs" not in self._determinism:
            with same_rng():
                first = self.item(0)
                odd = next(
                    (i for i in self._probes() if not same(first if i == 0 else self.item(i), self.item(i))), None
                )
            self._determinism.update(differs=odd, words=holds_words(first))
        differs, drawn = self._determinism["differs"], self._collate_draws
        if (differs is None and not drawn) or (policy == "warn" and self._determinism.get("warned")):
            return
        message = "every pass sees another draw, so scores belong to one random draw per pass and not to the examples "
        if differs is None:
            message = (
                "The collate function gave two different batches of the same examples (random masks?): "
                f"{message}as trained on; store one draw per example in the dataset"
            )
        else:
            message = (
                f"Item {differs} of the dataset was read twice and came out different (random augmentation?): "
                f"{message}as trained on; give the dataset without its random transform"
            )
        if policy == "error":
            raise InvalidInput(message + ", or deterministic='warn'.")
        self._determinism["warned"] = True
        warn_caller(message + ", or silence this with deterministic='ignore'.", TrainingDataWarning)

    def _probes(self) -> Iterator[int]:
        """Items to read twice: three, and where that is cheap others spread over the data."""
        three = sorted({0, len(self) // 2, len(self) - 1})
        others = [] if self.in_memory else spread_sample(len(self), _PROBES).tolist()
        return while_cheap([*three, *others], len(three), _PROBE_SECONDS)

    @property
    def padding(self) -> str | None:
        """What padding does to an example, in words, empty where it does nothing; None where it was not looked at."""
        return self._determinism.get("padding")

    def note_padding(self, text: str) -> None:
        """Remember what padding does to an example.

        Args:
            text: in words; empty where it does nothing.
        """
        self._determinism["padding"] = text

    def check_finite(self, ids: Int[Tensor, "_"], batch: Any) -> None:
        """Refuse NaN and infinity in the floating point tensors of a batch, see `check_finite`."""
        check_finite(ids, batch, self.positions)
