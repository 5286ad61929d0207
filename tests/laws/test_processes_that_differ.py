"""Processes that fail, end, or ask different things: one sentence on every one of them, and nobody waits for ever."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core import arrival, processes
from pytorch_influence_functions.core.distributed import World, current, process_rank
from pytorch_influence_functions.core.errors import InvalidInput, ProcessFailed
from tests.laws.several import message_of, run_on

LOSS = nn.CrossEntropyLoss()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def data(n: int = 24) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(n + 2, 4, generator=g, dtype=torch.float64), torch.randint(3, (n + 2,), generator=g)
    return (x[:n], y[:n]), (x[n:], y[n:])


def ask(model: nn.Module | None = None, n: int = 24, method: Any = "ekfac", **options: Any) -> ptif.Scores:
    train, queries = data(n)
    return ptif.attribute(model or net(), train, queries, loss=LOSS, method=method, **options)


# --------------------------------------------------------------------------- what each process does, by its rank


def one_process_fails(rank: int) -> None:
    """While others wait for its part of a sum."""
    model = net()

    def fail(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if rank == 1 and len(inputs[0]) == 12:  # its share of the data, and not the few that are looked at before
            raise OSError("a disk is full")

    model.register_forward_hook(fail)
    ask(model, distributed=True)


def other_top(rank: int) -> None:
    ask(top=3 + rank, distributed=True)


def other_weights(rank: int) -> None:
    model: Any = net()
    with torch.no_grad():
        model[2].weight[0, 0] += rank
    ask(model, distributed=True)


def other_length(rank: int) -> None:
    ask(n=24 + rank, distributed=True)


def other_data(rank: int) -> None:
    """As where each process loaded a part of its own, all equally long."""
    train, queries = data()
    part = slice(rank * 12, rank * 12 + 12)
    ptif.attribute(net(), (train[0][part], train[1][part]), queries, loss=LOSS, distributed=True)


def other_queries(rank: int) -> None:
    train, (x, y) = data()
    ptif.attribute(net(), train, (x + rank, y), loss=LOSS, distributed=True)


def other_method(rank: int) -> None:
    ask(method=["ekfac", "dual"][rank], distributed=True)


def only_the_first_asks(rank: int) -> None:
    with ptif.distributed():
        if rank == 0:
            ask()


def other_calls(rank: int) -> None:
    problem = ptif.Problem(net(), LOSS, data()[0])
    with ptif.distributed():
        fitted = ptif.ekfac().fit(problem)
        fitted.self_influence() if rank == 0 else fitted.score(data()[1])


def the_program_fails_within_the_block(rank: int) -> None:
    with ptif.distributed():
        if rank == 1:
            raise OSError("disk full")
        ask()


SITUATIONS: dict[Callable[[int], None], tuple[str, str]] = {
    one_process_fails: (
        "ProcessFailed: Process 1 of 2 failed, and all stop with it: InvalidInput: The model failed on inputs of shape "
        "(12, 4) (OSError: a disk is full)",
        "InvalidInput: The model failed on inputs of shape (12, 4) (OSError: a disk is full)",
    ),
    the_program_fails_within_the_block: (
        "ProcessFailed: Process 1 of 2 failed, and all stop with it: OSError: disk full",
        "OSError: disk full",
    ),
}
SITUATIONS |= {
    program: (f"Disagreement: The processes {words}",) * 2
    for program, words in {
        other_top: "ask different things: top= is 3 on process 0 and 4 on process 1; give every process the same",
        other_weights: "ask different things: the tensor '2.weight' of the model is of shape (3, 6) with bits",
        other_length: "ask different things: the number of training examples is 24 on process 0 and 25 on process 1",
        other_data: "ask different things: training example ",
        other_queries: "ask different things: query 0 is ",
        other_method: "ask different things: the method is ",
        only_the_first_asks: "do different things: process 0 is at the start of attribute() and process 1 at the end",
        other_calls: "do different things: process 0 is at the start of self_influence() and process 1 at the start of",
    }.items()
}


def one_comes_late(rank: int) -> list[str]:
    """What is logged where a process waits for another."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("pytorch_influence_functions")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(processes, "_PATIENCE", 0.05)
        log.addHandler(handler)
        with ptif.distributed():
            time.sleep(0.5 * rank)
            told = ask()
        log.removeHandler(handler)
    return [*lines, *told.diagnostics.notes]


def everything(rank: int, folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = {program.__name__: message_of(lambda p=program: p(rank)) for program in SITUATIONS}
    told["late"] = one_comes_late(rank)
    told["afterwards"] = ask(distributed=True).values
    told["alone"] = as_programs_are_written(rank)
    told["own"], told["shared"] = fit_in(rank, True, folder), fit_in(rank, False, folder)
    told["cut up"] = cut_up(rank)
    return told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("factors")


@pytest.fixture(scope="module")
def messages(folder: Path) -> list[dict[str, Any]]:
    return run_on(2, everything, folder / "processes", folder)


@pytest.mark.slow
@pytest.mark.parametrize("program", SITUATIONS)
def test_every_process_says_what_went_wrong(messages: list[dict[str, Any]], program: Callable[[int], None]) -> None:
    for told, expected in zip(messages, SITUATIONS[program], strict=True):
        assert told[program.__name__].startswith(expected)


@pytest.mark.slow
def test_processes_that_disagreed_can_compute_afterwards(messages: list[dict[str, Any]]) -> None:
    for told in messages:
        torch.testing.assert_close(told["afterwards"], ask().values)


@pytest.mark.slow
def test_a_process_that_waits_says_so_and_goes_on(messages: list[dict[str, Any]]) -> None:
    assert "Process 0 of 2 waits for the others at the start of attribute(); where they never make this" in str(
        messages[0]["late"]
    )
    assert "computed by 2 processes" in str(messages[0]["late"])


# --------------------------------------------------------------------------- processes that do not come


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What processes write to each other before they have a group."""
    store = dist.HashStore()
    monkeypatch.setattr(arrival, "_board", lambda: store)
    monkeypatch.setattr(arrival, "_joined", [0])
    return store


def test_a_process_that_never_comes_is_not_waited_for(
    board: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(arrival, "_PATIENCE", 0.01)
    late = r"^Process 1 of 2 did not come to ptif\.distributed\(\) in time; open it\.$"
    with pytest.raises(ProcessFailed, match=late):
        arrival.wait_for_all(0, 2, 0.1, "open it")
    assert "Process 0 of 2 waits for process 1 to come to ptif.distributed(); open it." in caplog.text
    # The one that comes later is told of it, and they can meet again.
    monkeypatch.setattr(arrival, "_joined", [0])
    with pytest.raises(ProcessFailed, match=late):
        arrival.wait_for_all(1, 2, None, "open it")
    board.set("here 1 1", "")
    arrival.wait_for_all(0, 2, 1.0, "open it")
    monkeypatch.setattr(arrival, "_joined", [1])
    arrival.wait_for_all(1, 2, 1.0, "open it")


@pytest.mark.parametrize(("came", "words"), [(False, "without coming to"), (True, "as the others came to")])
def test_a_process_that_has_ended_is_told_of_in_one_sentence(
    board: Any, monkeypatch: pytest.MonkeyPatch, came: bool, words: str
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    board.set("ended 1", "")
    if came:
        board.set("here 0 1", "")
    message = (
        rf"^Process 1 of 2 ended {words} ptif\.distributed\(\); open the block on every process, or leave it out [^;]*$"
    )
    with pytest.raises(ProcessFailed, match=message):
        ptif.distributed().__enter__()


CHILDREN = """
import multiprocessing, subprocess, sys
import pytorch_influence_functions.core.arrival as arrival

if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=print, args=(arrival.__name__,))
    child.start()
    child.join()
    assert child.exitcode == 0
    subprocess.run([sys.executable, "-c", "import pytorch_influence_functions"], check=True)
    print("alive", not arrival._board().check(["ended 1"]), flush=True)
"""


@pytest.mark.slow
def test_a_process_that_a_rank_started_ends_without_ending_the_rank(tmp_path: Path) -> None:
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    program = tmp_path / "children.py"
    program.write_text(CHILDREN)
    job = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2", "RANK": "1"}
    environment = os.environ | job | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    run = subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "alive True" in run.stdout
    # The rank itself has ended, without ever having come.
    assert store.check(["ptif 0/ended 1"])


def test_an_exchange_that_ends_as_patience_does_has_succeeded(caplog: pytest.LogCaptureFixture) -> None:
    class Work:
        waits = 0

        def wait(self, _: Any = None) -> None:
            self.waits += 1
            if self.waits == 1:
                raise RuntimeError("Operation timed out!")

        def is_completed(self) -> bool:
            return True

    work = Work()
    processes.Link(0, 2, None)._wait(work, "a sum")
    assert work.waits == 2 and not caplog.records


# --------------------------------------------------------------------------- one process alone


def as_programs_are_written(rank: int) -> tuple[ptif.Scores | None, Tensor]:
    """The first process asks alone, while the other sums something of its own."""
    total = torch.full((24,), float(process_rank() + 1))
    scores = ask() if rank == 0 else None
    dist.all_reduce(total)
    return scores, total


@pytest.mark.slow
def test_a_process_that_was_not_asked_to_share_computes_alone(messages: list[dict[str, Any]]) -> None:
    scores = messages[0]["alone"][0]
    torch.testing.assert_close(scores.values, ask().values)
    assert any(re.match("2 processes are running and this one computed all", n) for n in scores.diagnostics.notes)
    for told in messages:
        assert torch.equal(told["alone"][1], torch.full((24,), 3.0))


def test_in_one_process_the_block_changes_nothing() -> None:
    with ptif.distributed() as world:
        assert world == World() == current()
    scores = ask(distributed=True)
    torch.testing.assert_close(scores.values, ask().values)
    assert not any("process" in note for note in scores.diagnostics.notes)


def test_a_world_without_a_link_says_how_to_open_one() -> None:
    with pytest.raises(InvalidInput, match=r"^A world of 2 cannot compute together: its processes are not joined"):
        World(0, 2).gather(torch.ones(1))


# --------------------------------------------------------------------------- factors in a folder


def fit_in(rank: int, own: bool, folder: Path) -> list[Tensor]:
    place = folder / (str(rank) if own else "shared")
    values = [ask(method=ptif.ekfac(folder=place), distributed=True).values for _ in range(2)]
    # What process 0 keeps is lost, and then what process 1 does.
    for lost in (0, 1):
        if own and rank == lost:
            next(place.glob("*/*.safetensors")).unlink()
        dist.barrier()
        values.append(ask(method=ptif.ekfac(folder=place), distributed=True).values)
    return values


@pytest.mark.slow
@pytest.mark.parametrize("own", [True, False], ids=["own", "shared"])
def test_kept_factors_are_used_by_all_wherever_they_lie(
    messages: list[dict[str, Any]], folder: Path, own: bool
) -> None:
    expected = ask().values
    for told in messages:
        for several in told["own" if own else "shared"]:
            torch.testing.assert_close(several, expected)
    places = [folder / "0", folder / "1"] if own else [folder / "shared"]
    assert [len(list(place.glob("*/*.safetensors"))) for place in places] == [2] * len(places)
    # Another number of processes finds them.
    torch.testing.assert_close(ask(method=ptif.ekfac(folder=places[-1])).values, expected)


# --------------------------------------------------------------------------- models that are cut up


def cut_up(rank: int) -> tuple[str, Tensor]:
    model = net()
    parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    message = message_of(lambda: ask(model, distributed=True))
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    whole = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    whole.load_state_dict(state)
    return message, ask(whole, distributed=True).values


@pytest.mark.slow
def test_a_model_that_no_pass_has_whole_is_refused_and_the_advice_works(messages: list[dict[str, Any]]) -> None:
    for told in messages:
        message, values = told["cut up"]
        assert message.startswith("InvalidInput: The model is cut up over processes (parallelize_module: '0.")
        torch.testing.assert_close(values, ask().values)


# --------------------------------------------------------------------------- a process that is lost

PROGRAM = """
import os, signal, torch
from torch import nn
import pytorch_influence_functions as ptif

torch.manual_seed(0)
x, y = torch.randn(400, 8), torch.randint(3, (400,))
model, left = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)), [0]

def count(*_):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)

model[0].register_forward_hook(count)
for passes in (0, 12 if os.environ["RANK"] == "1" else 0):  # at first none is lost
    left[0] = passes
    with ptif.distributed(timeout=900) as world:
        scores = ptif.attribute(model, (x, y), (x[:2], y[:2]), loss=nn.CrossEntropyLoss(), method="gauss_newton")
    print("scores", world.size, f"{scores.values.double().norm():.8f}", flush=True)
"""


def start(folder: Path, count: int) -> list[subprocess.Popen[str]]:
    """The program on each of `count` processes, with the environment that torchrun gives."""
    port = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False).port
    program = folder / "program.py"
    program.write_text(PROGRAM)
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, str(program)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


@pytest.mark.parametrize(
    ("restarts", "words"),
    [("0", r"open the block on every process, or"), ("1", r"start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")],
)
def test_a_group_that_cannot_be_made_says_what_to_do(
    restarts: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": restarts}
    for name, value in (environment | agent).items():
        monkeypatch.setenv(name, value)

    def refused(*_: Any, **__: Any) -> None:
        raise RuntimeError("Connection refused")

    monkeypatch.setattr(dist, "TCPStore", refused)
    message = message_of(lambda: ptif.distributed().__enter__())
    assert re.match(r"ProcessFailed: Not every process came .* in time \(Connection refused\); .*" + words, message)


@pytest.mark.slow
def test_a_group_is_made_from_what_torchrun_says_and_a_lost_process_ends_the_others(tmp_path: Path) -> None:
    began = time.monotonic()
    first, second = start(tmp_path, 2)
    told = [process.communicate(timeout=300) for process in (first, second)]
    # Each printed the scores of the first call, and none of the second.
    lines = [out.splitlines() for out, _ in told]
    assert [len(printed) for printed in lines] == [1, 1], told
    assert [printed[0].split()[1] for printed in lines] == ["2", "2"], told
    assert len({printed[0].split()[2][:6] for printed in lines}) == 1
    assert second.returncode == -signal.SIGKILL and first.returncode == 1
    assert "ProcessFailed: Another of the 2 processes ended or did not answer in time (" in told[0][1]
    assert time.monotonic() - began < 600  # at once, and not after the group's time-out


RESTARTED = """
import os, signal, sys, torch
from torch import nn
import pytorch_influence_functions as ptif

torch.manual_seed(0)
x, y = torch.randn(400, 8), torch.randint(3, (400,))
model, calls = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)), [0]
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]

def count(*_):
    calls[0] += 1

model[0].register_forward_hook(count)
with ptif.distributed(timeout=900) as world:
    fitted = ptif.ekfac(folder=sys.argv[1]).fit(ptif.Problem(model, nn.CrossEntropyLoss(), (x, y), batch_size=50))
    print(f"fitted {attempt} {calls[0]}\\n", end="", flush=True)  # one piece, which the other process cannot part
    if attempt == "0" and world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    scores = fitted.score((x[:2], y[:2]))
print(f"scored {attempt} {scores.values.double().norm():.6f}\\n", end="", flush=True)
"""


@pytest.mark.slow
def test_torchrun_starts_a_job_again_which_finds_what_was_fitted(tmp_path: Path) -> None:
    program = tmp_path / "restarted.py"
    program.write_text(RESTARTED)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command = [sys.executable, *launch, str(program), str(tmp_path / "factors")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    fits = {attempt: [int(n) for what, a, n in lines if (what, a) == ("fitted", attempt)] for attempt in "01"}
    assert len(fits["1"]) == 2 and max(fits["1"]) < min(fits["0"])  # batches that were read to fit
    scored = [(attempt, norm) for what, attempt, norm in lines if what == "scored"]
    assert scored == [("1", scored[0][1])] * 2
