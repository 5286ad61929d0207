"""The public names: which there are, where they stand, what became of the others, and what their parameters mean."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.attribute import ProblemOptions
from pytorch_influence_functions.core.errors import InvalidInput, UnknownName
from pytorch_influence_functions.methods.names import AUTO, METHODS, as_method, find_method

NAME = "pytorch_influence_functions"


def listed(names: str) -> list[str]:
    return names.split()


DAILY = listed(
    "attribute forecast Problem WeightDecay Influence Attribution Scores PartScores Diagnostics evaluate progress "
    "distributed "
    "InfluenceError Recorder Recording Index "
    "CrossEntropy TokenCrossEntropy SquaredError Bernoulli Margin Logit FromFunction "
    "exact dual ekfac gauss_newton source tracin trak what_if find_label_issues __version__"
)
FIRST = listed(
    "calc_all_grad_then_test calc_img_wise calc_influences calc_s_test_single display_progress get_default_config "
    "influential_loader init_logging calc_influence_function influence_function utils"
)
MODULES = listed(
    "actions classic curvature damping errors evaluation gradients hf methods objectives plots scaling solvers store "
    "trajectory"
)


def public(module: ModuleType) -> dict[str, Any]:
    """What `from module import *` gives, by name."""
    return {name: getattr(module, name) for name in module.__all__}


# --------------------------------------------------------------------------- which names there are


def test_the_top_level_holds_what_is_typed_daily_the_first_names_and_the_modules() -> None:
    assert len(DAILY) == 33
    assert sorted(ptif.__all__) == sorted([*DAILY, *FIRST, *MODULES])
    assert dir(ptif) == sorted(ptif.__all__)
    assert {name for name in ptif.__all__ if inspect.ismodule(getattr(ptif, name))} == {*MODULES, *FIRST[-3:]}


@pytest.mark.parametrize("name", MODULES)
def test_a_public_module_shows_its_public_names_and_no_other(name: str) -> None:
    module = importlib.import_module(f"{NAME}.{name}")
    assert module is getattr(ptif, name)
    shown = {k for k, v in vars(module).items() if not k.startswith("_") and not inspect.ismodule(v)}
    # An old name that was asked for is kept.
    hidden = {"annotations", "TYPE_CHECKING", *getattr(module, "_MOVED", ())}
    assert shown - hidden == set(module.__all__)
    assert dir(module) == sorted(module.__all__)
    assert len(inspect.getdoc(module) or "") > 20


@pytest.mark.parametrize("name", ["", *MODULES])
def test_no_two_names_differ_in_case_only(name: str) -> None:
    names = dir(getattr(ptif, name) if name else ptif)
    assert len({n.lower() for n in names}) == len(names)


# --------------------------------------------------------------------------- names that moved


RENAMED = [(module, name) for module in (ptif, ptif.evaluation) for name in module._MOVED]


@pytest.fixture
def unseen() -> Iterator[None]:
    """As in a process that has not asked for any old name yet."""
    before = [(module, name, vars(module)[name]) for module, name in RENAMED if name in vars(module)]
    for module, name, _ in before:
        delattr(module, name)
    yield
    for module, name, value in before:
        setattr(module, name, value)


def moved(look: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What a look at an old name gives, and what is said of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = look()
    assert all(w.category is DeprecationWarning for w in caught)
    return value, [str(w.message) for w in caught]


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize(("module", "name"), RENAMED, ids=lambda x: getattr(x, "__name__", x))
def test_an_old_name_is_handed_out_with_one_sentence_that_says_where_it_went(module: Any, name: str) -> None:
    place, new_name = module._MOVED[name].split(".")
    assert new_name in getattr(ptif, place).__all__ and name not in module.__all__
    value, said = moved(lambda: getattr(module, name))
    assert value is getattr(getattr(ptif, place), new_name)
    assert said == [f"{module.__name__.replace(NAME, 'ptif')}.{name} is now ptif.{place}.{new_name}."]


@pytest.mark.usefixtures("unseen")
def test_an_old_import_is_told_once() -> None:
    def look() -> Any:
        from pytorch_influence_functions import GGN

        return GGN

    assert moved(look) == (ptif.curvature.GGN, ["ptif.GGN is now ptif.curvature.GGN."])


def test_the_sentence_names_the_line_that_uses_the_old_name(tmp_path: Path) -> None:
    """Of the tests' own process this says nothing: there every function is wrapped."""
    script = tmp_path / "script.py"
    script.write_text("import pytorch_influence_functions as ptif\n\nfrom pytorch_influence_functions import GGN\n")
    environment = os.environ | {"PYTHONPATH": str(Path(ptif.__file__).parents[1])}
    command = [sys.executable, "-W", "always::DeprecationWarning:__main__", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stderr.count("DeprecationWarning") == 1
    assert f"{script}:3: DeprecationWarning: ptif.GGN is now ptif.curvature.GGN." in done.stderr


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(AttributeError, match=r"^module '\w+' has no attribute 'atribute'\. Did you mean 'attribute'\?"):
        _ = ptif.atribute  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"evaluation' has no attribute 'retrains'\. Did you mean 'retrain'\?$"):
        _ = ptif.evaluation.retrains  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="cannot import name 'nothing_of_the_kind'"):
        from pytorch_influence_functions import nothing_of_the_kind  # noqa: F401


# --------------------------------------------------------------------------- method=


def classes(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 3, generator=generator), torch.arange(n) % 2


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def test_the_table_holds_every_function_that_needs_no_argument() -> None:
    functions = {k: v for k, v in public(ptif.methods).items() if inspect.isfunction(v)}
    needless = {
        name
        for name, function in functions.items()
        if all(p.default is not p.empty for p in inspect.signature(function).parameters.values())
    }
    assert set(METHODS) == needless | {AUTO}
    assert all(METHODS[name] is functions[name] for name in needless)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_found_by_its_name_however_it_is_written(name: str) -> None:
    made = METHODS[name]()
    assert find_method(name) == find_method(name.upper().replace("_", "-")) == find_method(f" {name} ") == made
    assert as_method(name) == as_method(METHODS[name]) == as_method(made) == made


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("EK-FAC", ptif.ekfac()),
        ("Gauss–Newton", ptif.gauss_newton()),
        (None, ptif.Influence()),
        (ptif.Influence, ptif.Influence()),
        (ptif.curvature.EKFAC(examples=5), ptif.Influence(ptif.curvature.EKFAC(examples=5))),
        (ptif.curvature.GGN, ptif.Influence(ptif.curvature.GGN())),
        (ptif.methods.Random, ptif.methods.Random()),
        (ptif.ekfac, ptif.ekfac()),
    ],
    ids=["hyphen", "dash", "nothing", "Influence", "curvature", "curvature class", "baseline class", "function"],
)
def test_what_else_can_only_mean_one_method_is_taken_for_it(given: Any, meant: Any) -> None:
    assert as_method(given) == meant


@pytest.mark.parametrize(
    "given",
    ["ekfac", ptif.ekfac, ptif.curvature.EKFAC(), ptif.curvature.EKFAC],
    ids=["name", "function", "record", "class"],
)
def test_attribute_takes_a_name_a_function_and_a_curvature(given: Any) -> None:
    data, queries = classes(20), classes(3)
    expected = ptif.ekfac().fit(ptif.Problem(model(), ptif.CrossEntropy(), data)).score(queries)
    scores = ptif.attribute(model(), data, queries, loss=ptif.CrossEntropy(), method=given)
    torch.testing.assert_close(scores.values, expected.values)
    assert scores.diagnostics.method == expected.diagnostics.method
    own = ptif.attribute(model(), data, queries, loss=ptif.CrossEntropy(), method=given, damping=0.3)
    assert own.diagnostics.damping == pytest.approx(0.3)


def test_a_method_that_is_fitted_is_not_fitted_again() -> None:
    fitted = ptif.exact().fit(ptif.Problem(model(), ptif.CrossEntropy(), classes(20)))
    with pytest.raises(InvalidInput, match=r"^method= is fitted already, as Attribution; call its score\(queries\)\.$"):
        as_method(fitted)


def test_a_wrong_name_offers_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"^There is no method 'bm25' .* takes as method=ptif\.methods\.BM25\(\)\.$"):
        find_method("bm25")
    with pytest.raises(UnknownName, match=r"^There is no method 'ekfca'\. Did you mean 'ekfac'\? The names are auto, "):
        find_method("ekfca")
    with pytest.raises(InvalidInput, match=r"'source' needs checkpoints, lr, steps, .*\.source\(checkpoints=\.\.\., "):
        find_method("source")


# --------------------------------------------------------------------------- attribute and forecast


def test_what_belongs_to_the_problem_is_what_the_problem_takes() -> None:
    taken = list(inspect.signature(ptif.Problem).parameters)
    assert taken[:3] == ["model", "objective", "data"] and taken[3:] == list(ProblemOptions.__annotations__)


def test_what_belongs_to_the_problem_reaches_it() -> None:
    data, queries = classes(20), classes(3)
    net = model()
    start = {k: torch.zeros_like(v) for k, v in net.state_dict().items()}
    options: dict[str, Any] = {"parameters": "weight", "weight_decay": 0.1, "checkpoints": [start], "batch_size": 7}
    scores = ptif.attribute(net, data, queries, loss=ptif.CrossEntropy(), method="exact", **options)
    problem = ptif.Problem(net, ptif.CrossEntropy(), data, **options)
    torch.testing.assert_close(scores.values, ptif.exact().fit(problem).score(queries).values)
    plain = ptif.attribute(net, data, queries, loss=ptif.CrossEntropy(), method="exact")
    assert not torch.allclose(scores.values, plain.values, rtol=0.05)


def test_the_forecast_is_that_of_the_method_and_the_problem() -> None:
    data, queries = classes(20), classes(3)
    costs = ptif.forecast(model(), data, queries, method="kfac", damping=0.1, checkpoints=[model().state_dict()] * 2)
    problem = ptif.Problem(model(), ptif.CrossEntropy(), data, checkpoints=[model().state_dict()] * 2)
    expected = as_method("kfac").forecast(problem, 3)  # type: ignore[attr-defined]
    assert (costs.passes, costs.memory_bytes) == (expected.passes, expected.memory_bytes)
    assert "KFAC" in costs.method and "Absolute(value=0.1)" in costs.method and costs.seconds > 0


def test_the_forecast_computes_nothing_but_a_batch() -> None:
    read = []

    class Counted(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 500

        def __getitem__(self, index: int) -> Any:
            read.append(index)
            return torch.zeros(3), index % 2

    ptif.forecast(model(), Counted(), classes(3), batch_size=10)
    assert len(set(read)) <= 90  # some are read twice, to see whether they stay the same


# --------------------------------------------------------------------------- parameters are explained


def explained(documentation: str) -> set[str]:
    """The names under `Args:` and `Attributes:`."""
    names: set[str] = set()
    inside = False
    for line in documentation.splitlines():
        if line.strip():
            inside = line in ("Args:", "Attributes:") or (inside and line.startswith(" "))
        if inside and (entry := re.match(r" {4}(\w+(?:, \w+)*):", line)):
            names |= set(entry[1].split(", "))
    return names


def parameters(function: Any) -> list[str]:
    """The parameters that a caller writes; `**options` by the names they may have, where that is known."""
    names = []
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.VAR_KEYWORD and "ProblemOptions" in str(p.annotation):
            names += list(ProblemOptions.__annotations__)
        elif p.name not in ("self", "cls") and not p.name.startswith("_"):
            names.append(p.name)
    return names


def unexplained(function: Any, documentation: str) -> list[str]:
    names = parameters(function)
    # A single parameter may be explained in the text.
    if len(names) == 1 and re.search(rf"`{names[0]}\b", documentation):
        return []
    return [name for name in names if name not in explained(documentation)]


def callables() -> Iterator[tuple[str, Any, str]]:
    """Every public function, class and method by name, with its documentation."""
    places = [("", ptif), *((f"{name}.", getattr(ptif, name)) for name in MODULES)]
    found: set[int] = set()
    for place, module in places:
        for name, value in public(module).items():
            if id(value) in found or inspect.ismodule(value):
                continue
            found.add(id(value))
            if inspect.isfunction(value):
                yield place + name, value, inspect.getdoc(value) or ""
            if not inspect.isclass(value) or issubclass(value, BaseException):
                continue
            if "__init__" in vars(value):
                yield place + name, value, inspect.getdoc(value) or ""
            for key, member in vars(value).items():
                if not key.startswith("_") and inspect.isfunction(getattr(member, "__func__", member)):
                    method = getattr(value, key)
                    yield f"{place}{name}.{key}", method, inspect.getdoc(method) or ""


def test_the_search_finds_parameters_without_a_word() -> None:
    def f(a: int, b: int, **more: int) -> None:
        """Do.

        Args:
            a, more: these two.
        """

    assert unexplained(f, inspect.getdoc(f) or "") == ["b"]
    assert unexplained(lambda k: k, "The first `k` ones.") == []
    assert len(list(callables())) > 200


def test_every_parameter_is_explained() -> None:
    assert {name: found for name, value, text in callables() if (found := unexplained(value, text))} == {}


def claims() -> dict[str, str]:
    """For every method the damping that its documentation names for `None`."""
    found = {}
    for name, make in METHODS.items():
        entry = re.search(r"(?m)^    damping: ((?:.*\n)(?: {8}.*\n)*)", inspect.getdoc(make) or "")
        claimed = entry and re.search(r"`None`: `(\w+\([^`]*\))`", " ".join(entry[1].split()))
        if claimed and name != AUTO:
            found[name] = claimed[1]
    return found


SMALL = {"arnoldi": {"rank": 3}, "nystrom": {"rank": 3}, "trak": {"k": 3}, "lissa": {"steps": 3}}


@pytest.mark.parametrize("name", sorted(claims()))
def test_the_damping_of_a_method_is_the_one_it_names(name: str) -> None:
    """`None` in the documentation is what is used."""
    make: Any = METHODS[name]
    problem = ptif.Problem(model(), ptif.CrossEntropy(), classes(20))
    fitted = make(damping=None, **SMALL.get(name, {})).fit(problem)
    claimed = eval(claims()[name], vars(ptif.damping))
    assert f"damping={claimed!r}" in fitted.method


def test_most_methods_name_their_damping() -> None:
    assert len(claims()) >= 12
