r"""Papers as compositions: no arithmetic lives here.

Every method is one choice of curvature, solver, damping and scaling in
`score[q, i] = (1/N) <(C + lambda)^-1 grad m(q), grad loss(i)>`. Each docstring gives the formula, the cost beside one
forward and backward pass over the data (an epoch), the reference, and the identity that tests pin it to.
"""

from __future__ import annotations

from .attribution import Influence
from .curvature import GGN, AbstractCurvature, EmpiricalFisher, Hessian, Identity
from .damping import Absolute, AbstractDamping
from .scaling import Leverage
from .solvers import CG, Neumann, Spectral, Woodbury


def grad_dot() -> Influence:
    """Gradient dot product: C = I, no damping. Cost: one epoch. A baseline, not an influence function.

    Reference: the one-checkpoint case of TracIn, Pruthi et al. (2020).
    Identity: equals g_q . g_i / N of one-example autograd.
    """
    return Influence(Identity(), Spectral(), Absolute(0.0))


def koh_liang(damping: AbstractDamping | float = 0.01, rtol: float = 1e-5, max_steps: int = 500) -> Influence:
    """Influence functions by conjugate gradients on the exact Hessian; the paper's damping by default.

    Cost: about 100 epochs for all queries together. Raises when it meets negative curvature.
    Reference: Koh & Liang (2017). Identity: equals the dense float64 solve; ridge leave-one-out in closed form.
    """
    return Influence(Hessian(), CG(rtol=rtol, max_steps=max_steps), damping)


def lissa(
    damping: AbstractDamping | float = 0.01,
    step: float | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    repeats: int = 1,
    seed: int = 0,
) -> Influence:
    """LiSSA on the Hessian: stochastic gradient descent on 1/2 u^T (H + lambda) u - v^T u.

    Step, batch and depth are measured when not given (theory: 1/step >= lambda_max + lambda + trace/batch).
    Cost: independent of N for fixed depth. References: Agarwal et al. (2017), Koh & Liang (2017),
    Klochkov & Liu (2024).
    Identity: its fixed point is the dense solve.
    """
    return Influence(
        Hessian(), Neumann(step=step, steps=steps, batch_size=batch_size, repeats=repeats, seed=seed), damping
    )


def gauss_newton(damping: AbstractDamping | float | None = None, rtol: float = 1e-3, max_steps: int = 300) -> Influence:
    """Conjugate gradients on the exact Gauss-Newton matrix, all queries at once, exact up to the solver's rtol.

    Cost: 2 x (queries) epochs per step. Reference: Martens (2010); Bae et al. (2022) for why the Gauss-Newton matrix.
    Identity: equals the dense float64 solve.
    """
    return Influence(GGN(), CG(rtol=rtol, max_steps=max_steps), damping)


def dual(curvature: AbstractCurvature | None = None, damping: AbstractDamping | float | None = None) -> Influence:
    """The exact dual: all parameters, no projection, through the N x N Gram matrix of the gradients.

    score = k_q (K + N lambda)^-1 with K = G G^T. Cost: one epoch + N^2 (row size) + N^3 / 3; every further damping,
    all leverages and self-influences are free. With `curvature=GGN()` the matrix has N x outputs rows.
    Identity: equals the dense solve and CG to 1e-8 on the same curvature.
    """
    return Influence(curvature or EmpiricalFisher(), Woodbury(), damping)


def exact(curvature: AbstractCurvature | None = None, damping: AbstractDamping | float | None = None) -> Influence:
    """Dense float64 eigendecomposition, for small models: the reference the others are tested against.

    Cost: P^2 memory, P^3 time. Identity: leave-one-out of logistic regression by real refits (Pearson > 0.99).
    """
    return Influence(curvature or GGN(), Spectral(), damping)


def one_step_newton(damping: AbstractDamping | float) -> Influence:
    """Leverage-corrected exact influence: one Newton step per removed example.

    Reference: Rubinstein & Hopkins (2025). Identity: ridge leave-one-out to machine precision.
    """
    return Influence(GGN(), Spectral(), damping, scaling=Leverage())
