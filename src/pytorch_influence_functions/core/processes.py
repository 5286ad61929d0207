"""How processes that share work talk to each other: before anything is exchanged, all see that all do the same.

Numbers on the CPU and texts travel by gloo, numbers on a GPU by NCCL, which takes nothing else. Before each exchange
three integers are compared: whether a process failed, and what each is about to do. A failure on one process then ends
the call on all of them with a sentence, and processes that do different things say so instead of mixing up numbers.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import InvalidInput, ProcessFailed, first_line

log = logging.getLogger("pytorch_influence_functions")

_PATIENCE = 60.0
"""Seconds after which a process that waits for the others says so."""


class Disagreement(InvalidInput):
    """Processes ask different things; every one of them knows it."""


@dataclass(eq=False)
class Link:
    """The processes of one group, as one of them sees them.

    Args:
        rank: which one this is.
        size: how many there are.
        control: a gloo group of all of them.
        devices: an NCCL group of all of them; None: tensors on devices travel by way of the CPU.
    """

    rank: int
    size: int
    control: Any
    devices: Any = None
    _calls: tuple[str, ...] = ()

    # ---------------------------------------------------------------- in step

    @contextmanager
    def call(self, name: str) -> Iterator[None]:
        """Begin and end something together: a failure of one process ends it on all of them.

        Args:
            name: what it is, in words; of calls inside others, the outermost and those right inside a block count.
        """
        if len(self._calls) > 1:
            yield
            return
        self._calls += (name,)
        try:
            self.meet(f"the start of {name}")
            yield
            self.meet(f"the end of {name}")
        except (ProcessFailed, Disagreement):
            raise
        except Exception as error:
            self._report(error)
            raise
        finally:
            self._calls = self._calls[:-1]

    def meet(self, doing: str, failure: str = "") -> None:
        """Wait for every process, and make sure that all do the same.

        Args:
            doing: what this process is about to do, in words.
            failure: why it does nothing more; empty where it goes on.

        Raises:
            ProcessFailed: a process failed or ended.
            InvalidInput: another one does something else.
        """
        code = zlib.crc32(doing.encode())
        flags = torch.tensor([int(bool(failure)), code, -code])
        self._reach(lambda: self._wait(dist.all_reduce(flags, dist.ReduceOp.MAX, self.control, async_op=True), doing))
        failed, largest, smallest = flags.tolist()
        if not failed and largest == -smallest:
            return
        told = [json.loads(text) for text in self._exchange(json.dumps([doing, failure]))]
        if failed:
            rank, why = next((rank, why) for rank, (_, why) in enumerate(told) if why)
            raise ProcessFailed(f"Process {rank} of {self.size} failed, and all stop with it: {why}")
        other = next(rank for rank, (what, _) in enumerate(told) if what != told[0][0])
        raise Disagreement(
            f"The processes do different things: process 0 is at {told[0][0]} and process {other} at {told[other][0]}; "
            "make the same calls on every process within `with ptif.distributed():`, and leave the block out where one "
            "computes alone."
        )

    def agree(self, facts: Mapping[str, str]) -> None:
        """Make sure that every process has the same facts, by name.

        Raises:
            InvalidInput: they differ.
        """
        told = [json.loads(text) for text in self.exchange(json.dumps(dict(facts)))]
        for rank, other in enumerate(told):
            for name in {**told[0], **other}:
                one, two = told[0].get(name, "absent"), other.get(name, "absent")
                if one != two:
                    raise Disagreement(
                        f"The processes ask different things: {name} is {one} on process 0 and {two} on process {rank};"
                        " give every process the same model, data and settings (the whole data set: it is shared out by"
                        " index), or leave distributed() out."
                    )

    def _report(self, error: Exception) -> None:
        """Tell the others, who wait for this process at their next exchange."""
        if getattr(error, "_told", None) is self:
            return
        with suppress(ProcessFailed, Disagreement):  # what this process raises is the cause
            self.meet("nothing", f"{type(error).__name__}: {error}")
        error._told = self  # type: ignore[attr-defined]

    # ---------------------------------------------------------------- numbers and texts

    def reduce(self, tensor: Tensor, operation: Any) -> None:
        """Combine every process's tensor in place.

        Args:
            tensor: of the same shape and dtype on every process.
            operation: a `dist.ReduceOp`.
        """
        self.meet(f"a sum of {tensor.dtype} {tuple(tensor.shape)}")
        if tensor.numel():
            self._in_place(tensor, lambda part, group: dist.all_reduce(part, op=operation, group=group))

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Replace the tensor by that of process `source`."""
        self.meet(f"a broadcast of {tensor.dtype} {tuple(tensor.shape)} from process {source}")
        self._send(tensor, source)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every process's tensor by rank."""
        self.meet(f"a gathering of {tensor.dtype}")
        shapes = [json.loads(text) for text in self._exchange(json.dumps(list(tensor.shape)))]
        parts = [tensor if rank == self.rank else tensor.new_empty(shape) for rank, shape in enumerate(shapes)]
        for rank, part in enumerate(parts):
            self._send(part, rank)
        return parts

    def exchange(self, text: str) -> list[str]:
        """Every process's text by rank."""
        self.meet("an exchange of texts")
        return self._exchange(text)

    def _exchange(self, text: str) -> list[str]:
        data = torch.frombuffer(bytearray(text.encode()) or bytearray(1), dtype=torch.uint8)
        length = torch.tensor([len(text.encode())])
        lengths = [torch.zeros_like(length) for _ in range(self.size)]
        self._reach(lambda: dist.all_gather(lengths, length, group=self.control))
        longest = max(1, *(int(n) for n in lengths))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = data[:longest]
        texts = [torch.zeros_like(padded) for _ in range(self.size)]
        self._reach(lambda: dist.all_gather(texts, padded, group=self.control))
        return [bytes(t[: int(n)].tolist()).decode() for t, n in zip(texts, lengths, strict=True)]

    def _send(self, tensor: Tensor, source: int) -> None:
        if tensor.numel():
            self._in_place(tensor, lambda part, group: dist.broadcast(part, src=source, group=group))

    def _in_place(self, tensor: Tensor, exchange: Callable[[Tensor, Any], Any]) -> None:
        tensor = tensor.detach()
        group = self.control if tensor.device.type == "cpu" else self.devices
        part = tensor.cpu() if group is None else tensor
        part = part.contiguous()
        self._reach(lambda: exchange(part, group or self.control))
        if part.data_ptr() != tensor.data_ptr():
            tensor.copy_(part)

    def _wait(self, work: Any, doing: str) -> None:
        """Wait for an exchange, and say so where that takes long: others may never come to it."""
        try:
            work.wait(timedelta(seconds=_PATIENCE))
        except RuntimeError:
            if not work.is_completed():
                log.warning(
                    "Process %d of %d waits for the others at %s; where they never make this call, leave it outside "
                    "`with ptif.distributed():`, or leave distributed=True out.",
                    self.rank,
                    self.size,
                    doing,
                )
            work.wait()  # which raises again what has failed

    def _reach(self, exchange: Callable[[], Any]) -> None:
        try:
            exchange()
        except RuntimeError as cause:
            raise ProcessFailed(
                f"Another of the {self.size} processes ended or did not answer in time ({first_line(cause, 120)}); "
                "start the job again, which torchrun does with --max-restarts: what a folder= keeps is found there."
            ) from cause
