"""Building an index: choose, fit the basis once, then one pass over the data, shard by shard."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

from ..core.batches import whole_batch
from ..core.distributed import World, current
from ..core.errors import InvalidInput
from ..core.fingerprint import Fingerprint
from ..core.indexing import spread_sample
from ..curvature.base import Budget
from ..gradients.per_example import Derivatives, GradientBatch
from ..gradients.sketches import Sketch, TwoSided
from ..influence.assumptions import StationarityCheck
from ..influence.attribution import Influence
from ..influence.checks import check_problem
from ..linalg.rows import Rows
from ..methods.papers import grad_dot
from ..problem.ingredients import CODE, WEIGHTS, describe_model, digest_data, digest_model
from ..problem.labels import labels_of
from ..problem.problem import Problem, sweep
from ..problem.working_precision import in_working_precision
from .codecs import CODECS
from .columns import Columns
from .examples import COMPARED, Examples, ShardSource, hash_examples, sample_digests
from .fidelity import estimate_fidelity
from .fitted_basis import FittedBasis, check_method, composition_of, fit_basis
from .folder import IndexFolder, by_first, check_room, clear, write_basis, writing
from .layouts import AbstractLayout, FactorLayout
from .manifest import MANIFEST, Manifest, Shard
from .representation import Choice, Factors, Representation, choose

HASHES, LABELS = "hashes", "labels"
CURVATURE_DATA, SAMPLE = "curvature data", "sample"
LOSS, PARAMETERS, DATA, METHOD = "loss", "parameters", "training data", "method"
SHARD_BYTES: Final = 128 << 20
# Examples that stand for the data in the fingerprint; all others are compared where they are stored.
_SAMPLED: Final = 64
# Examples that are looked at before any is stored, and the share of the memory that their gradients may take.
_LOOKED_AT: Final = 512
_KEPT_SHARE: Final = 1 / 8


@final
@dataclass(frozen=True, eq=False)
class Look:
    """What some examples tell.

    Args:
        check: whether the weights are at a minimum.
        rows: their gradients, in factors, as far as there is room for them.
    """

    check: StationarityCheck
    rows: Sequence[Rows]


class IndexDiffers(InvalidInput):
    """The folder holds an index of something else than what is to be stored in it."""


@final
@dataclass(frozen=True, eq=False)
class Plan:
    """What an index will be, before any work is done.

    Args:
        method: whose curvature and damping.
        problem: the model in the precision in which it is computed, its loss, and the data the curvature is of.
        given: the problem as it was given.
        derivatives: how gradients are taken.
        choice: what is kept of them.
        shard_bytes: the size of a file.
    """

    method: Influence
    problem: Problem
    given: Problem
    derivatives: Derivatives
    choice: Choice
    shard_bytes: int

    @property
    def shard_rows(self) -> int:
        """Examples per shard."""
        return max(1, int(self.shard_bytes / self.choice.bytes_each))

    @staticmethod
    def of(
        problem: Problem,
        method: Any,
        representation: Any,
        dtype: Any,
        count: int | None,
        budget: Budget | int | str,
        shard: Budget | int | str,
    ) -> Plan:
        """Look at a few examples, and choose.

        Raises:
            InvalidInput: a setting cannot be used.
            TooLarge: what was asked for does not fit into `budget`.
        """
        check_problem(problem)
        method = check_method(method)
        if len(problem.checkpoints) > 0:
            raise InvalidInput(
                "An index holds the gradients at one set of weights, and the problem has checkpoints; load one of them "
                "into the model and leave checkpoints= out, or build one index each."
            )
        if problem.weight_decay.per_example and not problem.weight_decay.is_zero:
            raise InvalidInput(
                "Weight decay that every example carries is no part of stored gradients; use WeightDecay(strength, "
                "per_example=False)."
            )
        given, problem = problem, in_working_precision(problem, method.precision)
        derivatives = replace(Derivatives.of(problem), memory=Budget.of(method.memory).bytes)
        choice = choose(representation, dtype, derivatives, _look(derivatives), count, Budget.of(budget))
        return Plan(method, problem, given, derivatives, choice, Budget.of(shard).bytes)

    @staticmethod
    def of_gradients(derivatives: Derivatives, given: Problem) -> Plan:
        """Keep the gradients of the loss as they are, in factors, for a caller who solves with a curvature of its own.

        Args:
            derivatives: how gradients are taken.
            given: the problem as it was given.
        """
        # Weight decay is no part of an example's gradient.
        problem, given = (p.with_(weight_decay=0.0) for p in (derivatives.problem, given))
        derivatives = replace(derivatives, problem=problem, whole=problem.space)
        choice = choose(Factors(), None, derivatives, _look(derivatives), None, Budget())
        return Plan(grad_dot(), problem, given, derivatives, choice, SHARD_BYTES)

    def fingerprint(self) -> Fingerprint:
        """What the index is made from. The data count by a sample here; each example's digest is stored."""
        model, probes = describe_model(self.given)
        n = len(self.problem)
        sample = spread_sample(n, _SAMPLED)
        method = replace(self.method, memory=Budget())
        ingredients = model | {
            LOSS: self.derivatives.objective,
            PARAMETERS: describe_parameters(self.derivatives),
            DATA: [n, digest_data(self.problem.data, sample, "reading the data for a fingerprint")],
            METHOD: method,
            "representation": self.choice.representation,
            "dtype": self.choice.codec.name,
            "shard": self.shard_bytes,
            "weight decay": self.derivatives.whole.decay,
        }
        return Fingerprint.of(ingredients, probes)

    def look(self) -> Look:
        """Take the gradients of some examples once, for all that is told of the data before they are stored."""
        room = self.derivatives.memory * _KEPT_SHARE / 8
        kept: list[Rows] = []

        def keep(gradients: GradientBatch) -> None:
            if sum(rows.numbers for rows in kept) + gradients.rows.numbers <= room:
                kept.append(gradients.rows)

        return Look(StationarityCheck.of(self.derivatives, _LOOKED_AT, keep), kept)

    def facts(self, look: Look) -> dict[str, Any]:
        """What is needed to read the index, and to tell about it, as plain values."""
        representation, check = self.choice.representation, look.check
        composition, rule = composition_of(self.method)
        described = self.method.describe(replace(composition, damping=rule))
        fidelity = estimate_fidelity(representation, self.derivatives, look.rows)
        strength = self.problem.weight_decay.strength
        return {
            "method": described,
            "representation": {"kind": type(representation).__name__, **vars(representation)},
            "described": repr(representation),
            "why": self.choice.why,
            "fidelity": None if fidelity is None else str(fidelity),
            "dtype": self.choice.codec.name,
            "bytes_each": self.choice.bytes_each,
            "shard_rows": self.shard_rows,
            "loss": repr(self.derivatives.objective),
            "model": type(self.given.model).__name__,
            "parameters": list(self.problem.space.shapes),
            "weight_decay": strength if isinstance(strength, (int, float)) else dict(strength),
            "class_names": self.problem.data.class_names,
            CURVATURE_DATA: {
                "examples": len(self.given),
                SAMPLE: sample_digests(self.given.data, torch.arange(len(self.given)), COMPARED),
            },
            "columns": {k: list(v) for k, v in self.problem.data.columns.items() if all(isinstance(n, str) for n in v)},
            "stationarity": {**vars(check), "shares": dict(check.shares)},
            "routes": self.derivatives.routes,
            "precision": self.method.precision,
        }


def _look(derivatives: Derivatives) -> Rows:
    """The gradients of a few examples."""
    some = torch.arange(min(4, len(derivatives.problem)))
    return next(iter(derivatives.stream(ids=some, label="looking at gradients", world=World()))).rows


def describe_parameters(derivatives: Derivatives) -> list[Any]:
    """Which parameters take part, and how they are laid out."""
    return [(b.name, b.parameters, b.shape, b.transposed) for b in derivatives.whole.blocks.values()]


def build(
    plan: Plan, folder: str | os.PathLike[str], data: Any, overwrite: bool, columns: Columns | None = None
) -> Manifest:
    """Build an index, or go on with one that was interrupted.

    Processes that share the work fit the basis together and write shards in turn, see `add_examples`; the first one
    keeps the folder and writes all else.

    Raises:
        IndexDiffers: the folder holds an index of something else.
        InUse: another process writes there.
        InvalidInput: it cannot be written to.
    """
    examples = Examples.of(data, plan.problem.data)
    with writing(folder) as path:
        opened = by_first(path, True, lambda: _resumed(path, plan, examples, overwrite)) or _begun(path, plan)
        add_examples(opened, plan.derivatives, examples, 0, columns)
    return opened.manifest


def _resumed(path: Path, plan: Plan, examples: Examples, overwrite: bool) -> IndexFolder | None:
    """The index that lies in the folder, if there is one that is to stay."""
    if overwrite:
        clear(path)
    if not (path / MANIFEST).exists():
        check_room(path, int((examples.count or 0) * plan.choice.bytes_each))
        return None
    fingerprint = plan.fingerprint()
    opened = IndexFolder.open(path)
    changed = fingerprint.differences(opened.manifest.fingerprint)
    if changed:
        raise IndexDiffers(
            f"{os.fspath(path)!r} holds an index that differs in {', '.join(changed)}; give another folder, or "
            "overwrite=True to replace it."
        )
    opened.drop_unlisted()
    return opened


def _begun(path: Path, plan: Plan) -> IndexFolder:
    look = plan.look()
    fitted = fit_basis(plan.method, plan.choice.representation, plan.choice.codec, plan.derivatives, look.rows)

    def begin() -> IndexFolder:
        manifest = Manifest(plan.fingerprint(), plan.facts(look), write_basis(path, *fitted.to_file()))
        manifest.write(path)
        opened = IndexFolder(path, manifest)
        opened.drop_unlisted()
        return opened

    opened = by_first(path, True, begin)
    assert opened is not None
    return opened


def add_examples(
    opened: IndexFolder, derivatives: Derivatives, examples: Examples, part: int, columns: Columns | None = None
) -> None:
    """Store what is not stored yet of one part of the data; what is stored is compared with the data first.

    Of W processes that share the work, process r takes the shards r, r + W, ... After every W shards the first process
    lists them in the record, so that what is listed has no gap and any other number of processes can go on from there.

    Args:
        opened: the folder, kept for this process.
        derivatives: how gradients are taken, not projected.
        examples: all examples of the part.
        part: which one, counted from 0.
        columns: what will be stored of them besides; of a stream it is known at its end whether they are as many.

    Raises:
        IndexDiffers: the data are not those that the part was begun with.
        InvalidInput: there are other columns than examples; these are stored to the end, without columns.
    """
    manifest, world = opened.manifest, current()
    opened.check_shared()
    first = manifest.parts[part]
    stop = manifest.parts[part + 1] if part + 1 < len(manifest.parts) else None
    representation = representation_of(manifest)
    fitted = FittedBasis.from_file(opened.read(manifest.basis), representation)
    layout = layout_of(manifest, fitted, representation)
    projected = derivatives if fitted.projector is None else replace(derivatives, projector=fitted.projector)
    written = [s for s in manifest.shards if s.first >= first and (stop is None or s.first < stop)]
    place = first
    fresh: list[Shard] = []
    for number, shard in enumerate(examples.shards(int(manifest.facts["shard_rows"]))):
        n, own = len(shard.ids), number % world.size == world.rank
        if number < len(written):
            if own:
                stored = opened.read(written[number].file).tensors[HASHES]
                _compare(stored, written[number].stop - written[number].first, projected, shard, place)
        elif stop is not None or manifest.complete:
            raise IndexDiffers(
                f"The data hold more examples than the {place - first:,} that {os.fspath(opened.path)!r} was built "
                "from; add them with append(), or build with overwrite=True."
            )
        elif own:
            tensors, record = encode_shard(layout, projected, shard)
            sample = sample_digests(shard.source, shard.ids)
            fresh.append(opened.write_shard(place, place + n, tensors, record, sample))
        place += n
        if (number + 1) % world.size == 0:
            _list(opened, fresh, place)
            fresh = []
    _list(opened, fresh, place)
    if place == first:
        raise InvalidInput("The data hold no example; at least one is needed.")
    _check_length(opened, place, written[-1].stop if written else first)
    if not opened.manifest.complete and part == len(manifest.parts) - 1:
        opened.write(replace(opened.manifest, complete=True))
    if columns is not None:
        # The gradients are worth more than the columns: the index is whole without them, and answers.
        columns.check_length(
            place - first,
            f"the index holds all {opened.manifest.examples:,} examples without it: open it, and give each of them one "
            "with index.annotate(columns)",
        )


def _list(opened: IndexFolder, fresh: list[Shard], place: int) -> None:
    """Let the shards that were written since the last time count, of all processes that share the work."""
    # A stream may give one process other examples than another.
    current().agree(lambda: {"the number of examples that were read": f"{place:,}"})
    opened.list_shards(fresh)


def _check_length(opened: IndexFolder, given: int, stored: int) -> None:
    if given < stored:
        raise IndexDiffers(
            f"The data end at example {given:,} and {os.fspath(opened.path)!r} holds {stored:,}; give all of the data "
            "that it was built from, or build with overwrite=True."
        )


def _compare(stored: Tensor, count: int, derivatives: Derivatives, shard: ShardSource, place: int) -> None:
    """Refuse data that are not those of a shard that is written already."""
    if len(stored) != count:
        return  # some of it was removed and compacted
    if count != len(shard.ids):
        raise IndexDiffers(
            f"The data hold {len(shard.ids):,} examples from {place:,} on where the index has {count:,}; give the data "
            "that it was built from, or build with overwrite=True."
        )
    source = derivatives.batched(shard.source)
    batches = sweep(derivatives.problem, source, shard.ids, "comparing the data", World())
    hashes = torch.cat([hash_examples(batch, len(ids)) for ids, batch in batches])
    differing = (hashes != stored).nonzero().flatten()
    if len(differing):
        raise IndexDiffers(
            f"Example {place + int(differing[0]):,} is not what it was when the index was built ({len(differing):,} of "
            f"{count:,} in its shard differ); give the same data, or build with overwrite=True."
        )


def encode_shard(
    layout: AbstractLayout, derivatives: Derivatives, shard: ShardSource
) -> tuple[dict[str, list[Tensor]], dict[str, Any]]:
    """The tensors of one shard, batch by batch, and its record: rows, digests of the examples, and their labels."""
    coded: list[tuple[dict[str, list[Tensor]], dict[str, Any]]] = []
    rows: list[Rows] = []
    hashes: list[Tensor] = []
    labels: list[Tensor | None] = []
    for gradients in _stream(derivatives, shard):
        hashes.append(hash_examples(gradients.batch, len(gradients.ids)))
        labels.append(labels_of(whole_batch(gradients.batch), len(gradients.ids)))
        coded.append(layout.encode(gradients.rows))
        if isinstance(layout, FactorLayout):
            rows.append(gradients.rows)
    if rows and any(forms != coded[0][1] for _, forms in coded):
        # Batches differ in their number of terms, as padded texts do; the form is that of all together.
        coded = [layout.encode(Rows.cat(rows))]
    together = {name: [piece for tensors, _ in coded for piece in tensors[name]] for name in coded[0][0]}
    together[HASHES] = hashes
    known = [label for label in labels if label is not None]
    if len(known) == len(labels):
        # Batches of other types: the type that holds all of them.
        together[LABELS] = known if len({label.dtype for label in known}) == 1 else [torch.cat(known)]
    return together, {"forms": coded[0][1]}


def _stream(derivatives: Derivatives, shard: ShardSource) -> Iterator[GradientBatch]:
    yield from derivatives.stream(shard.source, ids=shard.ids, label="gradients of a shard", world=World())


def representation_of(manifest: Manifest) -> Representation:
    """What the index keeps of a gradient."""
    stored = dict(manifest.facts["representation"])
    kinds: dict[str, Any] = {kind.__name__: kind for kind in (Factors, TwoSided, Sketch)}
    made: Representation = kinds[stored.pop("kind")](**stored)
    return made


def layout_of(manifest: Manifest, fitted: FittedBasis, representation: Representation) -> AbstractLayout:
    """How the index stores rows."""
    return fitted.layout(representation, CODECS[manifest.facts["dtype"]])


def refuse_cut_up(problem: Problem) -> None:
    """Refuse to store gradients of a model whose passes all processes make together: each writes files of its own.

    Raises:
        InvalidInput: `fully_shard` has cut the model up.
    """
    if problem.is_cut_up:
        raise InvalidInput(
            "The model is cut up by fully_shard, whose passes all processes make together, and in an index each writes "
            "files of its own; put the model together first, or ask with ptif.attribute(..., distributed=True)."
        )


def check_model_is_same(manifest: Manifest, problem: Problem, where: str) -> None:
    """Refuse a model with other weights or code, before anything is computed with it.

    Raises:
        InvalidInput: it is another one; says what changed.
    """
    changed = Fingerprint.of(digest_model(problem)).differences(manifest.fingerprint, among=(WEIGHTS, CODE))
    if changed:
        raise InvalidInput(
            f"The model is not the one that the index in {where!r} was built from: its {' and '.join(changed)} differ; "
            "load that model, or build another index."
        )


def fitted_of(folder: IndexFolder) -> FittedBasis:
    """What stays the same for all rows of an index."""
    manifest = folder.manifest
    return FittedBasis.from_file(folder.read(manifest.basis), representation_of(manifest))


def whole_layout(folder: IndexFolder, fitted: FittedBasis) -> AbstractLayout:
    """How the rows of an index are stored.

    Args:
        folder: the index.
        fitted: its basis.

    Raises:
        InvalidInput: it was not built to its end.
    """
    manifest = folder.manifest
    if not manifest.complete:
        raise InvalidInput(
            f"The index in {os.fspath(folder.path)!r} was not built to its end: {manifest.examples:,} examples are "
            "stored; call Index.build(...) or append(...) again, which goes on, or wait for the process that is at it."
        )
    return layout_of(manifest, fitted, representation_of(manifest))
