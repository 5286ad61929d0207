"""What a run costs is known before it is paid for: forecasts against counted passes, products and bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions import curvature as curvatures
from pytorch_influence_functions import solvers
from pytorch_influence_functions.curvature import (
    EKFAC,
    GGN,
    KFAC,
    AbstractCurvature,
    Arnoldi,
    Budget,
    EmpiricalFisher,
    Fisher,
    Form,
    Hessian,
    Nystrom,
    Subsample,
)
from pytorch_influence_functions.curvature.cost import Cost, ProblemSize
from pytorch_influence_functions.damping import PerDirection, Relative
from pytorch_influence_functions.gradients.per_example import Derivatives, Tape
from pytorch_influence_functions.gradients.products import Products
from pytorch_influence_functions.influence import attribution
from pytorch_influence_functions.influence.members import bytes_of
from pytorch_influence_functions.linalg.gram import Gram
from pytorch_influence_functions.linalg.kronecker import Kronecker
from pytorch_influence_functions.linalg.rows import Rows
from pytorch_influence_functions.scaling import RelatIF
from pytorch_influence_functions.solvers import (
    CG,
    AbstractSolver,
    Blockwise,
    Cholesky,
    Factored,
    Neumann,
    Spectral,
    Woodbury,
    auto,
)
from pytorch_influence_functions.solvers.auto import choose_composition
from tests.laws.recipes import MINRES, Signs

N, QUERIES = 600, 8
FACTOR = 3.0
"""A forecast may be off by so much."""


def problem(n: int = N, width: int = 12, seed: int = 0) -> ptif.Problem:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 3))
    return ptif.Problem(model, ptif.CrossEntropy(), (torch.randn(n, 8), torch.randint(0, 3, (n,))))


def queries(count: int = QUERIES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 8, generator=generator), torch.randint(0, 3, (count,), generator=generator)


@dataclass
class Counter:
    """Work in units of half an example: a forward pass, a backward pass to the layers' outputs."""

    halves: float = 0.0
    inside: bool = False

    def passes(self, n: int) -> float:
        return self.halves / 2 / n


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> Iterator[Counter]:
    """Count every forward of the model, every backward, and products by their directions."""
    counter = Counter()
    rows = Tape.rows

    def forward(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not counter.inside:
            counter.halves += len(args[0])

    def counted_rows(self: Tape, cotangent: Tensor, keep_graph: bool = False) -> Rows:
        counter.halves += len(cotangent)
        return rows(self, cotangent, keep_graph)

    def product(original: Any, first: float, each: float) -> Any:
        def counted(self: Products, ids: Tensor, batch: Any, directions: Rows, *rest: Any) -> Any:
            counter.halves += len(ids) * (first + each * len(directions))
            counter.inside = True
            try:
                return original(self, ids, batch, directions, *rest)
            finally:
                counter.inside = False

        return counted

    handle = model.register_forward_pre_hook(forward)
    with monkeypatch.context() as patch:
        patch.setattr(Tape, "rows", counted_rows)
        # A product goes forward once, and for each direction forward and back to the parameters, twice as far.
        patch.setattr(Products, "ggn_product", product(Products.ggn_product, 1, 3))
        patch.setattr(Products, "hessian_product", product(Products.hessian_product, 0, 6))
        patch.setattr(Products, "losses_along", product(Products.losses_along, 1, 1))
        yield counter
    handle.remove()


def counted_and_forecast(
    monkeypatch: pytest.MonkeyPatch, method: Any, of: ptif.Problem, asked: tuple[Tensor, Tensor]
) -> tuple[float, float]:
    """Passes that fitting and scoring took, and passes that were forecast."""
    expected = method.forecast(of, len(asked[0])).passes
    with counting(monkeypatch, of.model) as counter:
        method.fit(of, n_queries=len(asked[0])).score(asked)
    return counter.passes(len(of)), expected


SOLVERS: dict[str, ptif.Influence] = {
    "dense": ptif.Influence(GGN(), Spectral()),
    "dense Cholesky": ptif.Influence(GGN(), Cholesky()),
    "dual": ptif.Influence(GGN(), Woodbury()),
    "dual of the gradients": ptif.dual(),
    "conjugate gradients": ptif.Influence(GGN(), CG()),
    "conjugate gradients, light damping": ptif.Influence(GGN(), CG(), Relative(0.1)),
    "conjugate gradients, tight": ptif.Influence(GGN(), CG(rtol=1e-5, max_steps=500)),
    "conjugate gradients on gradients": ptif.Influence(EmpiricalFisher(), CG()),
    "guided by EK-FAC": ptif.gauss_newton(preconditioner=EKFAC()),
    "guided by a sample": ptif.gauss_newton(preconditioner=Fisher(samples=1)),
    "Neumann": ptif.Influence(GGN(), Neumann()),
    "Neumann, so many steps": ptif.Influence(GGN(), Neumann(steps=300, batch_size=32, tolerance=0.0)),
    "ASTRA": ptif.methods.astra(steps=50, batch_size=64),
    "DataInf": ptif.methods.datainf(),
    "factored": ptif.Influence(KFAC(), Factored()),
    "block by block": ptif.methods.blockwise(),
    "block by block, conjugate gradients": ptif.Influence(GGN(), Blockwise(CG())),
    "chosen": ptif.Influence(),
    "by the recipe": ptif.Influence(GGN(), MINRES()),
}
CURVATURES: dict[str, ptif.Influence] = {
    "Identity": ptif.methods.grad_dot(),
    "Hessian": ptif.Influence(Hessian(), Spectral(), 10.0),
    "Hessian by products": ptif.Influence(Hessian(), CG(), 10.0),
    "GGN": ptif.Influence(GGN(), Spectral()),
    "Fisher": ptif.Influence(Fisher(samples=2), Spectral()),
    "Fisher, enumerated": ptif.Influence(Fisher(), Woodbury()),
    "EmpiricalFisher": ptif.Influence(EmpiricalFisher(), Spectral()),
    "KFAC": ptif.methods.kfac(),
    "EKFAC": ptif.ekfac(),
    "EKFAC on few examples": ptif.ekfac(examples=50),
    "EKFAC on gradients": ptif.ekfac(fisher=EmpiricalFisher()),
    "Shampoo": ptif.methods.shampoo(),
    "Arnoldi": ptif.Influence(Arnoldi(5, GGN()), Spectral()),
    "Nystrom": ptif.Influence(Nystrom(20), Spectral()),
    "Diagonal": ptif.methods.diagonal(),
    "Subsample": ptif.Influence(Subsample(GGN(), 100), CG()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SOLVERS, *CURVATURES])
def test_forecasts_are_near_what_is_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted, expected = counted_and_forecast(monkeypatch, (SOLVERS | CURVATURES)[name], problem(), queries())
    assert counted / FACTOR < expected < counted * FACTOR


def test_every_public_solver_and_curvature_is_forecast() -> None:
    methods = [*SOLVERS.values(), *CURVATURES.values()]
    public = {k: getattr(solvers, k) for k in solvers.__all__}
    wanted = {v for v in public.values() if isinstance(v, type) and issubclass(v, AbstractSolver)} - {AbstractSolver}
    assert wanted <= {type(m.solver) for m in methods}
    public = {k: getattr(curvatures, k) for k in curvatures.__all__}
    wanted = {v for v in public.values() if isinstance(v, type) and issubclass(v, AbstractCurvature)}
    assert {v for v in wanted if not v.__abstractmethods__} <= {type(m.curvature) for m in methods}


@pytest.mark.slow
@pytest.mark.parametrize("method", [ptif.ekfac(), ptif.gauss_newton(), ptif.Influence(GGN(), MINRES())], ids=repr)
def test_many_queries_in_little_memory_share_a_pass(method: ptif.Influence, monkeypatch: pytest.MonkeyPatch) -> None:
    of, asked = problem(300), queries(40)
    held = 1 + method.solver.vectors_held  # type: ignore[union-attr]
    memory = 4 * 4 * held * of.space.size * 4  # four queries at once
    tight = ptif.Influence(method.curvature, method.solver, memory=memory)
    counted, expected = counted_and_forecast(monkeypatch, tight, of, asked)
    assert counted / FACTOR < expected < counted * FACTOR
    assert expected == pytest.approx(method.forecast(of, 40).passes)


def test_scaling_asks_for_a_solve_per_example() -> None:
    raw, relative = (ptif.Influence(GGN(), CG(), scaling=s) for s in (ptif.scaling.Raw(), RelatIF()))
    of = problem(50)
    assert relative.forecast(of, 1).passes > 20 * raw.forecast(of, 1).passes


# --------------------------------------------------------------------------- a solver added by the recipe


def test_a_solver_by_the_recipe_equals_the_dense_solve() -> None:
    of = problem()
    got = ptif.Influence(GGN(), MINRES(1e-5), Relative(1.0)).fit(of).score(queries()).values
    want = ptif.Influence(GGN(), Spectral(), Relative(1.0)).fit(of).score(queries()).values
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("solver", [MINRES(), CG(), Neumann()], ids=repr)
def test_solvers_keep_the_memory_bound(solver: AbstractSolver[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    of = problem(100)
    each = of.space.size * 4 * (1 + solver.vectors_held)
    memory = 4 * 3 * each  # three queries with a quarter of the memory
    sizes: list[int] = []
    solve = type(solver).solve

    def watched(self: Any, state: Any, rows: Rows, *rest: Any) -> Any:
        sizes.append(len(rows))
        return solve(self, state, rows, *rest)

    monkeypatch.setattr(type(solver), "solve", watched)
    spec = ptif.Influence(GGN(), solver, Relative(3.0), memory=memory)
    spec.fit(of).score(queries())
    assert sizes == [3, 3, 2]


def test_memory_and_passes_count_the_checkpoints_that_are_kept_and_those_fitted_again() -> None:
    of, count = problem(400, width=40), 100
    states = [{k: v.clone() for k, v in of.model.state_dict().items()} for _ in range(4)]
    of = of.with_(checkpoints=states)
    kept = ptif.ekfac().fit(of).members
    held = sum(bytes_of(member) for member in kept)
    forecast = ptif.ekfac().forecast(of, count)
    # Scores, a batch's products with their sum and the scores made of it, and solutions.
    rest = (8 + 3 * 4) * count * 400 + count * of.space.size * 4
    assert kept.kept == 4 and held + rest <= forecast.memory_bytes <= 2 * (held + rest)
    # Room for one: another is fitted beside it, and three a second time for the scores.
    small = ptif.ekfac().with_options(memory=int(1.2 * held / 4)).forecast(of, count)
    assert small.memory_bytes < forecast.memory_bytes and small.passes > 1.3 * forecast.passes
    spread = ptif.ekfac().with_options(units="spread").forecast(of, count)
    assert spread.memory_bytes >= forecast.memory_bytes + 2 * 8 * count * 400


def test_a_projection_by_the_recipe_is_as_good_as_gaussian() -> None:
    of, asked = problem(width=60), queries(20)
    exact = ptif.dual(damping=0.05).fit(of).score(asked).values.flatten()
    agreement = []
    for projection in (Signs(200), ptif.gradients.Gaussian(200)):
        scores = ptif.Influence(EmpiricalFisher(), Spectral(), 0.05, projection=projection).fit(of).score(asked)
        agreement.append(float(torch.corrcoef(torch.stack([exact, scores.values.flatten()]))[0, 1]))
    assert min(agreement) > 0.8 and abs(agreement[0] - agreement[1]) < 0.1


# --------------------------------------------------------------------------- memory


def test_memory_counts_rows_factors_solutions_and_scores() -> None:
    of, count = problem(400, width=40), 1000
    dual = ptif.dual().forecast(of, count)
    operator = ptif.dual().fit(of).members[0].operator
    assert isinstance(operator, Gram)
    rows = operator.rows.numbers * 4 + 3 * 8 * 400**2
    # Scores, what a solve holds for every query and row, and a batch's products, their sum and the scores made of it.
    scores = (8 + 5 * 8 + 3 * 4) * count * 400
    assert rows + scores <= dual.memory_bytes <= 1.5 * (rows + scores)
    ekfac = ptif.ekfac().forecast(of, count)
    factors = ptif.ekfac().fit(of).members[0].operator
    assert isinstance(factors, Kronecker)
    solutions = count * of.space.size * 4
    least = factors.numbers * 4 + solutions + (8 + 3 * 4) * count * 400
    assert least <= ekfac.memory_bytes <= 2 * least
    # Ten times the queries: the scores grow, the solutions only as far as the bound lets them.
    bounded = ptif.ekfac().forecast(of, 100 * count).memory_bytes
    assert 8 * 100 * count * 400 < bounded < 8 * 100 * count * 400 + 2 * Budget().bytes


# --------------------------------------------------------------------------- what is chosen


def size_of(model: nn.Module, x: Tensor, y: Tensor, count: int, loss: Any = None) -> ProblemSize:
    of = ptif.Problem(model, loss or ptif.CrossEntropy(), (x, y))
    return ProblemSize.of(Derivatives.of(of), count)


def perceptron(inputs: int, n: int, *, hidden: int = 0, outputs: int = 10) -> ProblemSize:
    layers = [nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs)] if hidden else []
    model = nn.Sequential(*layers) if layers else nn.Linear(inputs, outputs)
    # The data need not be there to be counted.
    x, y = torch.randn(1, inputs).expand(n, -1), torch.arange(outputs)[:1].expand(n)
    return size_of(model, x, y, 1)


@pytest.mark.parametrize("given", [None, GGN(), EmpiricalFisher()])
@pytest.mark.parametrize(
    "size",
    [
        perceptron(5, 300),
        perceptron(100, 3000),
        perceptron(784, 4800),
        perceptron(784, 2000, hidden=128),
        perceptron(784, 100, hidden=64),
    ],
    ids=["tiny", "logistic", "large logistic", "perceptron", "few examples"],
)
def test_what_is_estimated_does_not_depend_on_the_number_of_queries(
    given: AbstractCurvature | None, size: ProblemSize
) -> None:
    choices = [choose_composition(given, size.for_queries(q), Budget()) for q in (1, 10, 30, 100, 10_000)]
    assert len({(repr(c.curvature), repr(c.default_damping)) for c in choices}) == 1


def test_what_was_cheap_and_exact_stays_so() -> None:
    for size, solver in ((perceptron(5, 300), Spectral()), (perceptron(100, 3000), Cholesky())):
        choice = choose_composition(None, size, Budget())
        assert (choice.curvature, choice.solver, choice.default_damping) == (GGN(), solver, Relative(0.1))
    choice = choose_composition(None, perceptron(784, 200, hidden=64), Budget())
    assert (choice.curvature, choice.solver, choice.default_damping) == (GGN(), Woodbury(), Relative(30.0))


def test_an_exact_solution_of_a_network_is_worth_a_second_and_says_what_ekfac_would_take() -> None:
    small, medium, large = (perceptron(64, n, hidden=16) for n in (200, 3000, 100_000))
    tiny = choose_composition(None, perceptron(13, 142, hidden=16, outputs=3), Budget())
    assert tiny.curvature == GGN() and "ekfac" not in tiny.why
    for size in (small, medium):
        choice = choose_composition(None, size, Budget())
        assert choice.curvature == GGN() and size.flops(choice.cost(size)) < 5e10
    told = re.search(r'method="ekfac" would take about 1/(\d+) of the time', choice.why)
    factored = medium.flops(EKFAC().cost(medium, Form.SPECTRAL) + Cost(1))
    exact = medium.flops(choice.cost(medium) + Cost(1))
    assert told and int(told[1]) == round(exact / factored) > 2
    choice = choose_composition(None, large, Budget())
    assert choice.curvature == EKFAC() and "within a second" in choice.why
    # Asked for by name, it may take longer.
    assert choose_composition(GGN(), large, Budget()).curvature == GGN()


def test_the_dual_of_a_large_network_is_damped_by_its_few_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the mean over all weights the tokens of 24 sentences had shares of 14,000 of a score of .01 (SmolLM2)."""
    monkeypatch.setattr(auto, "_FACTOR_BYTES", 0)
    choice = choose_composition(None, perceptron(64, 8000, hidden=16), Budget())
    assert (choice.curvature, choice.solver) == (EmpiricalFisher(), Woodbury())
    assert choice.default_damping == PerDirection(0.2)


def test_few_parameters_are_decomposed_and_more_get_a_factor_with_the_same_answers() -> None:
    of, asked = problem(200, width=20), queries(3)
    size = ProblemSize.of(Derivatives.of(of), 3, timed=False)
    assert size.seconds == size.once_seconds == 0.0
    assert choose_composition(None, size, Budget()).solver == Spectral()
    assert choose_composition(None, perceptron(64, 3000, hidden=16), Budget()).solver == Cholesky()
    one, other = (ptif.Influence(GGN(), s, Relative(1.0)).fit(of).score(asked) for s in (Spectral(), Cholesky()))
    torch.testing.assert_close(one.values, other.values, rtol=1e-4, atol=1e-6)
    dimensions = [s.diagnostics.effective_dimension for s in (one, other)]
    assert dimensions[0] == pytest.approx(dimensions[1], rel=1e-8) and 1 < dimensions[0] < of.space.size


def test_the_exact_solution_of_a_network_is_damped_more_than_that_of_an_affine_model() -> None:
    x, y = torch.randn(60, 5), torch.arange(60) % 3
    network = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    for part, loss, share in ((None, None, 30.0), ("2", None, 0.1), (None, ptif.FromFunction(nn.L1Loss()), 0.1)):
        targets = y if loss is None else torch.randn(60, 3)
        problem = ptif.Problem(network, loss or ptif.CrossEntropy(), (x, targets), parameters=part)
        choice = choose_composition(None, ProblemSize.of(Derivatives.of(problem), 1), Budget())
        assert choice.curvature.gauss_newton is (loss is None) and choice.default_damping == Relative(share)


def test_a_convex_loss_is_solved_exactly_and_the_number_of_queries_decides_how() -> None:
    size = perceptron(784, 4800)
    few, many = (choose_composition(None, size.for_queries(q), Budget()) for q in (100, 100_000))
    assert (few.curvature, few.solver, few.default_damping) == (GGN(), CG(rtol=1e-3, max_steps=500), Relative(3.0))
    assert few.preconditioner is not None
    assert (many.curvature, many.solver, many.default_damping) == (GGN(), Cholesky(), Relative(3.0))


@pytest.mark.parametrize("count", [1, 10, 1000])
def test_a_network_with_many_rows_gets_kronecker_factors(count: int) -> None:
    size = perceptron(784, 2000, hidden=128).for_queries(count)
    choice = choose_composition(None, size, Budget())
    assert (choice.curvature, choice.default_damping) == (EKFAC(), PerDirection())


def test_outputs_are_counted() -> None:
    """Few parameters, and 4,096 outputs per example: rows of the Gauss-Newton matrix are 4,096 times the examples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 1, 3, padding=1))
    x, y = torch.randn(4, 1, 64, 64), torch.rand(4, 1, 64, 64).round()
    size = size_of(model, x, y, 1, ptif.Bernoulli())
    assert size.outputs == 4096
    many = ProblemSize(**{**vars(size), "examples": 200})
    assert choose_composition(None, many, Budget()).curvature == EKFAC()
    # 153 products are less than 4,096 rows.
    assert 153 < Spectral().cost(size, GGN()).passes < 400 < 4096 / 2


def test_memory_bounds_the_choice() -> None:
    size = perceptron(784, 200, hidden=64)
    assert choose_composition(None, size, Budget()).curvature == GGN()
    assert choose_composition(None, size, Budget(10_000_000)).curvature == EKFAC()


# --------------------------------------------------------------------------- the dense matrix in one product per batch


@pytest.mark.parametrize(("hidden", "wide"), [(0, 1 << 15), (5, 1 << 15), (0, 1), (5, 20)])
def test_the_dense_matrix_is_the_sum_over_rows(hidden: int, wide: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytorch_influence_functions.curvature import second_moment

    monkeypatch.setattr(second_moment, "_WIDE", wide)
    torch.manual_seed(0)
    layers = [nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 3)] if hidden else [nn.Linear(4, 3)]
    model = nn.Sequential(*layers).double()
    x, y = torch.randn(50, 4).double(), torch.randint(0, 3, (50,))
    derivatives = Derivatives.of(ptif.Problem(model, ptif.CrossEntropy(), (x, y), batch_size=7))
    rows = torch.cat([r.flat() for r in GGN().stream(derivatives)])
    assert len(rows) == 100  # one less than the classes for each example
    matrix = GGN().of(derivatives, Form.MATRIX, Budget()).matrix  # type: ignore[attr-defined]
    torch.testing.assert_close(matrix, rows.T @ rows / 50, rtol=1e-10, atol=1e-12)


def test_enumerated_classes_cost_no_more_than_one_row() -> None:
    """Ten classes of a logistic regression: the sum over classes is taken before the outer product."""
    from pytorch_influence_functions.curvature.second_moment import SecondMoment

    derivatives = Derivatives.of(
        ptif.Problem(nn.Linear(20, 10), ptif.CrossEntropy(), (torch.randn(64, 20), torch.arange(64) % 10))
    )
    total = SecondMoment(derivatives.space, torch.device("cpu"))
    for batch in GGN().batches(derivatives):
        total.add(batch)
    assert total._pairs and total._flat is None


def test_many_outputs_take_products_instead_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass per parameter is less than one per output, and writes no row of any output out."""
    from pytorch_influence_functions.curvature import exact

    torch.manual_seed(0)
    model = nn.Conv1d(1, 1, 2).double()
    x, y = torch.randn(20, 1, 30).double(), torch.rand(20, 1, 29).double().round()
    derivatives = Derivatives.of(ptif.Problem(model, ptif.Bernoulli(), (x, y)))
    rows = torch.cat([r.flat() for r in GGN().stream(derivatives)])
    assert len(rows) == 20 * 29 > 3 * 20 * derivatives.space.size
    monkeypatch.setattr(exact, "roots_of", lambda *_: pytest.fail("a row was made for every output"))
    matrix = GGN().of(derivatives, Form.MATRIX, Budget()).matrix  # type: ignore[attr-defined]
    torch.testing.assert_close(matrix, rows.T @ rows / 20)


# --------------------------------------------------------------------------- seconds


@pytest.mark.parametrize(
    ("method", "timed"),
    [
        (ptif.gauss_newton(), True),
        (ptif.Influence(Arnoldi(5, GGN()), Spectral()), True),
        (ptif.Influence(Subsample(GGN(), 50), CG()), True),
        (ptif.Influence(EmpiricalFisher(), CG()), True),
        (ptif.ekfac(), False),
        (ptif.dual(), False),
    ],
    ids=str,
)
def test_a_product_is_timed_where_products_are_taken(
    method: ptif.Influence, timed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[ProblemSize] = []
    original = attribution.estimate_cost

    def watched(choice: Any, size: ProblemSize, *rest: Any) -> Any:
        sizes.append(size)
        return original(choice, size, *rest)

    monkeypatch.setattr(attribution, "estimate_cost", watched)
    method.forecast(problem(), 4)
    (size,) = sizes
    assert size.seconds > 0 and (size.product_seconds is not None) == timed
    assert size.product_seconds is None or size.product_seconds > 0


def test_a_forecast_reads_few_examples() -> None:
    read: set[int] = set()

    class Watched(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 20_000

        def __getitem__(self, index: int) -> Any:
            read.add(index)
            return torch.zeros(8), index % 3

    of = problem()
    for method in (ptif.gauss_newton(), ptif.ekfac()):
        method.forecast(ptif.Problem(of.model, ptif.CrossEntropy(), Watched()), 10)
    assert len(read) < 600


def test_a_named_curvature_with_eigenvalues_is_not_asked_whether_outputs_are_affine() -> None:
    asked: list[bool] = []
    x, y = torch.randn(20, 3), torch.arange(20) % 2
    size = ProblemSize.of(Derivatives.of(ptif.Problem(nn.Linear(3, 2), ptif.CrossEntropy(), (x, y))), 2)
    size = replace(size, asks_affine=lambda: bool(asked.append(True)))
    choose_composition(EKFAC(), size, Budget())
    assert not asked
    choose_composition(None, size, Budget())
    assert asked
