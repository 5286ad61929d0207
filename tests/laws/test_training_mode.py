"""Law: a model handed over in training mode comes back bit for bit, and is judged as in eval mode.

A forward pass in training mode moves the running statistics of batch normalisation and draws dropout masks: the model
is changed for its owner, and the scores are those of another model. So no entry point may run one. `ENTRIES` holds
every public call that takes a model; frozen, tied and wrapped ones go through them in `test_nothing_is_changed.py`.
"""

from __future__ import annotations

import copy
import functools
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

import pytorch_influence_functions as ptif
from pytorch_influence_functions import methods
from pytorch_influence_functions.core.files import write_tensors
from pytorch_influence_functions.problem import problem as problem_module
from pytorch_influence_functions.problem.problem import first_batch
from pytorch_influence_functions.problem.wrappers import unwrap
from pytorch_influence_functions.trajectory import GroupState, RecordedStep
from pytorch_influence_functions.trajectory.recording import MOMENTS_FILE
from tests.covering import FULL
from tests.laws.pictures import differences, picture

N, QUERIES = 24, 3


def perceptron() -> nn.Module:
    """With a layer that has no rule: its per-example gradients run the model once more."""
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.PReLU(5), nn.Dropout(0.5), nn.Linear(5, 3))


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 3)
    )


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (perceptron, (4,)),
    "convolution": (convolution, (1, 3, 3)),
}


def case(name: str) -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A float64 net whose running statistics are not those of the data, in training mode, but for one frozen layer."""
    torch.manual_seed(0)
    make, shape = NETS[name]
    model = make().double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    model.train()
    model[-1].eval()
    x, y = torch.randn(N + QUERIES, *shape).double(), torch.arange(N + QUERIES) % 3
    return in_use(model), (x[:N], y[:N]), (x[N:], y[N:])


def watch(*anything: Any) -> None:
    """A hook that looks and changes nothing, as those of experiment trackers."""


def in_use(model: nn.Module) -> nn.Module:
    """The model as a training loop leaves it: gradients not cleared, hooks of a tracker on it."""
    first = next(m for m in model.modules() if any(True for _ in m.parameters(recurse=False)))
    first.register_forward_hook(watch)
    first.register_forward_pre_hook(watch)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 0.5)
            parameter.register_hook(watch)
    return model


def settled(model: nn.Module) -> nn.Module:
    """The plain model: not wrapped, in eval mode, without gradients and hooks."""
    plain = copy.deepcopy(unwrap(model)[0]).eval()  # a copied parameter has no hooks
    for module in plain.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    plain.zero_grad()
    return plain


Entry = Callable[[nn.Module, Any, Any, Path], Any]


def by_method(make: Callable[[nn.Module, Any], Any]) -> Entry:
    def run(model: nn.Module, train: Any, queries: Any, folder: Path) -> Any:
        problem = ptif.Problem(model, nn.CrossEntropyLoss(), train, weight_decay=0.01)
        return make(model, problem).fit(problem, len(queries[0])).score(queries).values

    return run


def fitted(model: nn.Module, train: Any, spec: Any = None, loss: Any = None) -> Any:
    return (spec or ptif.exact()).fit(ptif.Problem(model, loss or nn.CrossEntropyLoss(), train, weight_decay=0.01))


def states(model: nn.Module) -> list[dict[str, Tensor]]:
    """Two checkpoints near the model's weights, the buffers as they are."""
    moved = {k for k, _ in model.named_parameters(remove_duplicate=False)}
    own = model.state_dict()
    return [{k: v * (1.0 + 0.01 * s) if k in moved else v.clone() for k, v in own.items()} for s in (1, 2)]


def loader(data: Any) -> Any:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), 8)


def adam_run(model: nn.Module) -> ptif.Recording:
    """Two checkpoints of a training by Adam, as a recorder leaves them."""
    recorded = []
    for step, state in enumerate(states(settled(model)), 1):
        file = Path(tempfile.mkdtemp()) / "moments.safetensors"
        write_tensors(file, MOMENTS_FILE, dict(adam_state(settled(model)).second_moments), {"step": step})
        groups = (GroupState(1e-3, 1e-3 * step, beta2=0.999, eps=1e-8),)
        recorded.append(RecordedStep(step, state, groups, second_moments=file))
    return ptif.Recording(tuple(recorded))


def adam_state(model: nn.Module) -> ptif.trajectory.AdamState:
    return ptif.trajectory.AdamState({k: torch.full_like(v, 0.25) for k, v in unwrap(model)[0].named_parameters()})


SETTINGS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "less": lambda model, problem: methods.less(adam_run(model)),
    "trackstar": lambda model, problem: methods.trackstar(adam_state(model), 8),
    "along": lambda model, problem: methods.along(states(model)),
    "tracin": lambda model, problem: ptif.tracin([0.1]),
    "trak": lambda model, problem: ptif.trak(16),
    "source": lambda model, problem: ptif.source(states(model), 0.1, 20, segments=2),
    "one_step_newton": lambda model, problem: methods.one_step_newton(0.1),
    "arnoldi": lambda model, problem: methods.arnoldi(5, damping=1.0),
    "nystrom": lambda model, problem: methods.nystrom(5),
    "lissa": lambda model, problem: methods.lissa(0.5, steps=3, step=0.05, batch_size=8),
    "koh_liang": lambda model, problem: methods.koh_liang(5.0),
    "astra": lambda model, problem: methods.astra(0.1, steps=3),
}
ENTRIES: dict[str, Entry] = {
    name: by_method(SETTINGS.get(name, lambda model, problem, name=name: getattr(methods, name)()))
    for name in methods.__all__
    # The one refuses batch normalisation and dropout and has a law of its own beside its values; the other reads texts.
    if name not in ("unrolled", "BM25")
}
ENTRIES |= {
    "attribute": lambda model, train, queries, folder: ptif.attribute(model, train, queries).values,
    "attribute, loss given": lambda model, train, queries, folder: (
        ptif.attribute(model, train, queries, loss=nn.CrossEntropyLoss(), top=3).values
    ),
    "attribute, many parameters": by_method(lambda model, problem: ptif.Influence(damping=0.1)),
    "checkpoints": lambda model, train, queries, folder: (
        ptif.attribute(model, train, queries, method=ptif.ekfac(), checkpoints=states(model)).values
    ),
    "forecast": lambda model, train, queries, folder: (
        ptif.Influence().forecast(ptif.Problem(model, nn.CrossEntropyLoss(), train), 3).passes
    ),
    "an index": lambda model, train, queries, folder: (
        ptif.Index.build(ptif.Problem(model, nn.CrossEntropyLoss(), train), folder / "index", ptif.ekfac())
        .score(queries)
        .values
    ),
    "own loss and measure": lambda model, train, queries, folder: (
        fitted(model, train, ptif.dual(), lambda outputs, targets: (outputs[:, 0] - targets).square())
        .score(queries, lambda outputs, targets: outputs[:, 1])
        .values
    ),
    "EK-FAC from disk": lambda model, train, queries, folder: [
        fitted(model, train, ptif.ekfac(folder=folder)).score(queries).values for _ in range(2)
    ],
    "leverage": lambda model, train, queries, folder: (
        fitted(model, train, ptif.Influence(ptif.curvature.GGN(), scaling=ptif.scaling.Leverage()))
        .score(queries)
        .values
    ),
    "truncated": lambda model, train, queries, folder: (
        fitted(model, train, ptif.Influence(ptif.curvature.GGN(), truncation=ptif.solvers.Truncation(rank=1)))
        .score(queries)
        .values
    ),
    "means and contrasts": lambda model, train, queries, folder: (
        fitted(model, train, ptif.dual()).score(queries, contrast=queries, aggregate={"two": [0, 1]}, ids=[2, 5]).values
    ),
    "parts": lambda model, train, queries, folder: (
        fitted(model, train, ptif.ekfac()).score(queries, by="layer").values_by_part
    ),
    "a function of the model": lambda model, train, queries, folder: (
        fitted(model, train)
        .score(ptif.objectives.FromModel(lambda m: nn.functional.cross_entropy(m(queries[0]), queries[1])))
        .values
    ),
    "damping curve": lambda model, train, queries, folder: fitted(model, train).damping_curve().losses,
    "self-influence": lambda model, train, queries, folder: fitted(model, train, ptif.ekfac()).self_influence(),
    "spectrum": lambda model, train, queries, folder: fitted(model, train).spectrum().mean,
    "responses": lambda model, train, queries, folder: (
        ptif.evaluation.pbrf(ptif.Problem(model, nn.CrossEntropyLoss(), train), [0], queries, 1.0, rtol=0.1).measured
    ),
    "many dampings": lambda model, train, queries, folder: torch.stack(
        [s.values for s in fitted(model, train, ptif.dual()).scores_over_damping(queries, [0.1, 1.0]).values()]
    ),
    "forecast of attribute": lambda model, train, queries, folder: (
        ptif.forecast(model, train, queries, loss=nn.CrossEntropyLoss(), method="gauss_newton").passes
    ),
    "tokens": lambda model, train, queries, folder: token_scores(model, train, queries),
}


def token_scores(model: nn.Module, train: Any, queries: Any) -> Any:
    """Every example taken for a text of one token."""
    longer = Lengthened(model)
    texts, asked = ((x, y[:, None]) for x, y in (train, queries))
    problem = ptif.Problem(longer, ptif.TokenCrossEntropy(), texts, weight_decay=0.01)
    return [*ptif.ekfac().fit(problem).token_scores(asked, [0, 5]).values()]


class Lengthened(nn.Module):
    """Gives the outputs of a net as those of a sequence of one token."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.net(x)
        return outputs[:, None]


# --------------------------------------------------------------------------- the entries of version 0.1

SHORT: dict[str, Any] = {"recursion_depth": 5, "damp": 0.5, "scale": 5.0, "progress": False}


def classic_run(mode: str) -> Entry:
    def run(model: nn.Module, train: Any, queries: Any, folder: Path) -> Any:
        config = ptif.classic.get_default_config()
        config.update(recursion_depth=5, r_averaging=1, scale=5.0, damp=0.5, test_sample_num=False, gpu=-1)
        config.update(outdir=str(folder))
        results: Any = getattr(ptif.classic, mode)(config, model, loader(train), loader(queries), progress=False)
        results = results[0] if isinstance(results, tuple) else results
        return torch.tensor([results[str(i)]["influence"] for i in range(len(queries[0]))])

    return run


def tuned(model: nn.Module, train: Any, queries: Any, folder: Path) -> Any:
    config = ptif.classic.get_default_config()
    return config.auto_tune(model, loader(train), damping=1.0)["scale"]


def joined(vectors: Any) -> Tensor:
    return torch.cat([v.flatten() for v in vectors])


CLASSIC: dict[str, Entry] = {
    "classic, one item": lambda model, train, queries, folder: torch.tensor(
        ptif.classic.calc_influence_single(model, loader(train), loader(queries), 0, **SHORT)[0]
    ),
    "classic, calc_img_wise": classic_run("calc_img_wise"),
    "classic, calc_influences": classic_run("calc_influences"),
    "classic, calc_all_grad_then_test": classic_run("calc_all_grad_then_test"),
    "classic, calc_grad_z": lambda model, train, queries, folder: [
        joined(v) for v in ptif.classic.calc_grad_z(model, loader(train), progress=False)[0]
    ],
    "classic, grad_z": lambda model, train, queries, folder: joined(ptif.classic.grad_z(*queries, model)),
    "classic, calc_s_test": lambda model, train, queries, folder: [
        joined(v) for v in ptif.classic.calc_s_test(model, loader(queries), loader(train), **SHORT)[0]
    ],
    "classic, calc_s_test_single": lambda model, train, queries, folder: joined(
        ptif.calc_s_test_single(model, *queries, loader(train), **SHORT)
    ),
    "classic, s_test": lambda model, train, queries, folder: joined(
        ptif.classic.s_test(*queries, model, loader(train), **SHORT)
    ),
    "classic, auto_tune": tuned,
}

# --------------------------------------------------------------------------- entries that train again


def recipe() -> Any:
    loss = nn.CrossEntropyLoss()
    return ptif.evaluation.Recipe(lambda: nn.Linear(4, 3).double(), epochs=2, batch_size=8, loss=loss)


def truth(train: Any, queries: Any) -> Any:
    subsets = ptif.evaluation.Subsets.halves(len(train[0]), count=3)
    return ptif.evaluation.retrain(recipe(), subsets, seeds=1, train=train, queries=queries, workers=1)


def table(model: nn.Module, train: Any, queries: Any, folder: Path) -> Any:
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), train)
    rows = ptif.evaluate(ptif.dual(), truth(train, queries), problem=problem, queries=queries, resamples=10).rows
    return torch.tensor([row.estimate.value for row in rows], dtype=torch.float64)


def removed(model: nn.Module, train: Any, queries: Any, folder: Path) -> Any:
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), train)
    curves = ptif.evaluation.removal_curves(
        recipe(), {"dual": ptif.dual()}, (2,), 1, train=train, queries=queries, problem=problem, workers=1
    )
    return torch.stack([curves.measured[name] for name in sorted(curves.measured)])


def patched(model: nn.Module, train: Any, queries: Any, folder: Path) -> Any:
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), train)
    patch = ptif.evaluation.tail_patch(problem, {"dual": ptif.dual()}, queries, k=2)
    return torch.stack([patch.changes[name] for name in sorted(patch.changes)])


def retrained_from(model: nn.Module, train: Any, queries: Any, folder: Path) -> Any:
    """A training function of the user's own that begins with a copy of the model at hand."""

    def training(data: Any, seed: int) -> nn.Module:
        return settled(model)

    subsets = ptif.evaluation.Subsets.halves(len(train[0]), count=2)
    loss = nn.CrossEntropyLoss()
    return ptif.evaluation.retrain(training, subsets, seeds=1, train=train, queries=queries, measure=loss).measured


RETRAINING: dict[str, Entry] = {
    "retraining": lambda model, train, queries, folder: truth(train, queries).measured,
    "retraining by a function": retrained_from,
    "table": table,
    "removal curves": removed,
    "tail patch": patched,
    "verification": lambda model, train, queries, folder: torch.tensor(
        [
            removal.actual
            for removal in ptif.attribute(model, train, queries, loss=nn.CrossEntropyLoss(), method="dual")
            .verify(recipe(), n=6, size=4, seeds=1)
            .removals
        ]
    ),
    "attribute and verify": lambda model, train, queries, folder: (
        ptif.attribute(model, train, queries, loss=nn.CrossEntropyLoss(), method="dual", verify=recipe()).values
    ),
}

# --------------------------------------------------------------------------- actions


def about(ask: Callable[[Any, Any], Any]) -> Entry:
    def run(model: nn.Module, train: Any, queries: Any, folder: Path) -> Any:
        return ask(ptif.Problem(model, nn.CrossEntropyLoss(), train, weight_decay=0.01), queries)

    return run


def last_bias(model: nn.Module) -> Tensor:
    return list(model.parameters())[-1][0]


def answered(problem: ptif.Problem, queries: Any) -> tuple[Tensor, Tensor]:
    """The first query with the label that the model gives it, found without leaving a trace."""
    copied = copy.deepcopy(problem.model).eval()
    with torch.no_grad():
        return queries[0][:1], copied(queries[0][:1]).argmax(1)


DAMPED = ptif.exact(damping=1.0)
ONE_STEP = ptif.actions.SignSteps(0.1, rounds=1, bounds=None)
ACTIONS: dict[str, Entry] = {
    "what if": about(lambda problem, queries: ptif.what_if(problem, remove=[0, 3], method=DAMPED).change(queries)),
    "label issues": about(
        lambda problem, queries: torch.tensor(ptif.find_label_issues(problem, queries, method="ekfac").ids(5))
    ),
    "smallest removal": about(
        lambda problem, queries: (
            ptif.actions.smallest_removal(problem, last_bias, threshold=5.0, most=3, method=DAMPED).predicted
        )
    ),
    "flip prediction": about(
        lambda problem, queries: (
            ptif.actions.flip_prediction(problem, (queries[0][:1], queries[1][:1]), most=3, method=DAMPED).predicted
        )
    ),
    "input influence": about(
        lambda problem, queries: ptif.actions.input_influence(problem, queries, ids=[0, 5], method=DAMPED)
    ),
    "training-set attack": about(
        lambda problem, queries: (
            ptif.actions.attack_training_set(
                problem,
                answered(problem, queries),
                lambda data, seed: copy.deepcopy(problem.model),
                steps=ONE_STEP,
                controls=1,
                method=DAMPED,
            ).inputs
        )
    ),
}

# --------------------------------------------------------------------------- page and command line

HANDED: dict[str, Any] = {}
"""What the task file below gives to the command line: the very model, and the data."""
TASK = """
from tests.laws.test_training_mode import HANDED

problem, queries = HANDED["problem"], HANDED["queries"]
"""


def by_command(command: str, read: Callable[[Any, Path], Any], *flags: str) -> Entry:
    def run(model: nn.Module, train: Any, queries: Any, folder: Path) -> Any:
        from tests.interface.cli_cases import Ran

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "task.py").write_text(TASK)
        HANDED.update(problem=ptif.Problem(model, nn.CrossEntropyLoss(), train), queries=queries)
        path, out = list(sys.path), folder / "out"
        try:
            ran = Ran(command, folder / "task.py", "--out", out, *flags, "--json")
            assert ran.code == 0, ran.stderr or ran.stdout
            return read(ran.found, out)
        finally:
            sys.path[:] = path  # the command is a process of its own elsewhere

    return run


def page_of_a_run(found: Any, out: Path) -> Any:
    from tests.interface.cli_cases import Ran

    ran = Ran("report", out, "--task", out.parent / "task.py", "--json")
    assert ran.code == 0, ran.stderr or ran.stdout
    return ptif.Scores.load(out / "scores.safetensors").values


def reported(model: nn.Module, train: Any, queries: Any, folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    scores = ptif.attribute(model, train, queries, loss=nn.CrossEntropyLoss(), method="dual")
    scores.report(folder / "page.html")
    scores.plot(0, path=folder / "figure.png")
    return scores.values


OUTSIDE: dict[str, Entry] = {
    "report and figure": reported,
    "ptif attribute": by_command(
        "attribute", lambda found, out: ptif.Scores.load(out / "scores.safetensors").values, "--method", "ekfac"
    ),
    "ptif attribute, dry run": by_command("attribute", lambda found, out: found["passes"], "--dry-run"),
    "ptif report": by_command("attribute", page_of_a_run, "--method", "dual"),
    "ptif self-influence": by_command(
        "self-influence",
        lambda found, out: torch.tensor([row["self_influence"] for row in found["worst"]]),
        "--method",
        "exact",
    ),
    "ptif self-influence, dry run": by_command("self-influence", lambda found, out: found["passes"], "--dry-run"),
}
ENTRIES |= CLASSIC | RETRAINING | ACTIONS | OUTSIDE

# --------------------------------------------------------------------------- the law


@contextmanager
def training_passes(model: nn.Module) -> Iterator[list[str]]:
    """The layers of `model` that are run in training mode while this is open."""
    names = {id(module): name for name, module in model.named_modules()}
    noted: list[str] = []

    def note(module: nn.Module, args: Any) -> None:
        if id(module) in names and module.training:
            noted.append(f"{names[id(module)]} {type(module).__name__}")

    handle = register_module_forward_pre_hook(note)
    try:
        yield noted
    finally:
        handle.remove()


@functools.cache
def expected(entry: str, net: str) -> Any:
    """What the plain model gives: not wrapped, in eval mode."""
    model, train, queries = case(net)
    with tempfile.TemporaryDirectory() as folder:
        return ENTRIES[entry](settled(model), train, queries, Path(folder))


# These multiply with the curvature, in the same way for any net, or train linear models beside it: one net is enough.
ITERATIVE = ("arnoldi", "astra", "gauss_newton", "koh_liang", "lissa", "nystrom", "source", "classic, auto_tune")
ONE_NET = (*ITERATIVE, *CLASSIC, *RETRAINING, *OUTSIDE)
# The rules of layers do not know which entry asks, so of the others every third goes through the second net.
TWO_NETS = [entry for entry in ENTRIES if entry not in ONE_NET][:: 1 if FULL else 3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("entry", "net"),
    [(entry, net) for entry in ENTRIES for net in NETS if net == "perceptron" or entry in TWO_NETS],
)
def test_a_model_in_training_mode_is_neither_moved_nor_judged_so(entry: str, net: str, tmp_path: Path) -> None:
    model, train, queries = case(net)
    before = picture(model, train, queries)
    with training_passes(model) as noted:
        values = ENTRIES[entry](model, train, queries, tmp_path)
    assert not noted
    assert differences(before, picture(model, train, queries)) == []
    torch.testing.assert_close(values, expected(entry, net))


def test_the_first_batch_is_looked_at_in_eval_mode_and_the_mode_comes_back() -> None:
    model, train, _ = case("perceptron")
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), train, batch_size=5)
    with first_batch(problem) as (ids, batch):
        assert ids.tolist() == [0, 1, 2, 3, 4] and torch.equal(batch[0], train[0][:5])
        assert not any(m.training for m in model.modules())
    assert model.training
    with pytest.raises(ZeroDivisionError), first_batch(problem, ids=[7]) as (ids, _):
        assert ids.tolist() == [7]
        raise ZeroDivisionError
    assert model.training


def test_nothing_takes_the_first_of_a_sweep_and_goes_on_without_its_guard() -> None:
    root = Path(problem_module.__file__).parent.parent
    pattern = re.compile(r"next\(\s*(iter\()?\s*sweep\(\w")
    assert [str(p.relative_to(root)) for p in root.rglob("*.py") if pattern.search(p.read_text())] == []
