"""Bad input, curvatures and solvers for those who compare: low rank, diagonal, DataInf, block-wise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import SolveFailed, TooLarge
from pytorch_influence_functions.curvature import Arnoldi, Diagonal, Nystrom
from pytorch_influence_functions.solvers import CG, BlockGroup, Blockwise, DataInf, Spectral, Woodbury
from tests.interface.bad_input_cases import GGN, HESSIAN, INFINITE, INPUT, NAMED, NAN, Row, broken, fitted, put_in

Asked = Callable[[nn.Module], Any]


def arnoldi(*args: Any, **changes: Any) -> Asked:
    return lambda model: fitted(model, curvature=Arnoldi(*args, **changes), solver=Spectral(), damping=0.1)


def nystrom(*args: Any, **changes: Any) -> Asked:
    return lambda model: fitted(model, curvature=Nystrom(*args, **changes), solver=Spectral(), damping=0.1)


def blocks(groups: Any, damping: Any = 0.1, **changes: Any) -> Asked:
    """GGN by blocks, fitted."""
    return lambda m: fitted(m, curvature=GGN, solver=Blockwise(groups=groups, **changes), damping=damping)


def group(patterns: Any = "0", **changes: Any) -> Asked:
    return lambda model: BlockGroup(patterns, **changes)


LOW_RANK = [
    Row("rank 0", arnoldi(0), INPUT, r"^Arnoldi\(rank=0\) must be a whole number of at least 1"),
    Row("rank 2.5", nystrom(2.5), INPUT, r"^Nystrom\(rank=2.5\) must be a whole number"),
    Row("rank yes", nystrom(True), INPUT, r"^Nystrom\(rank=True\) must be a whole number"),
    Row(
        "rank above P", arnoldi(44), INPUT, r"asks for more directions than there are parameters \(43\); use at most 43"
    ),
    Row("rank above P, Nystrom", nystrom(99), INPUT, r"^Nystrom\(rank=99\) asks for more directions .*or exact\(\)"),
    Row(
        "default rank above P",
        put_in(method=ptif.methods.arnoldi()),
        INPUT,
        r"^Arnoldi\(rank=50\) asks for more .*most 43",
    ),
    Row("width 0", arnoldi(3, width=0), INPUT, r"^Arnoldi\(width=0\) must be a whole number"),
    Row("steps 0", arnoldi(3, steps=0), INPUT, r"^Arnoldi\(steps=0\) must be a whole number"),
    Row("few steps", arnoldi(9, steps=5), INPUT, r"cannot find 9 directions with fewer products; use twice the rank"),
    Row(
        "complement",
        arnoldi(3, complement="drop"),
        INPUT,
        r"^Arnoldi\(complement='drop'\) must be 'zero', 'smallest' or 'dropped'",
    ),
    Row("inner class", arnoldi(3, ptif.curvature.GGN), INPUT, r"is the class GGN; write GGN\(\), an instance"),
    Row(
        "inner text", arnoldi(3, "ggn"), INPUT, r"^Arnoldi\(curvature='ggn'\) has no products .*use GGN\(\) or Hessian"
    ),
    Row(
        "inner of inner",
        arnoldi(3, Nystrom(3)),
        INPUT,
        r"^Arnoldi\(curvature=Nystrom\(.* has no products",
    ),
    Row(
        "indefinite Nystrom", nystrom(3, HESSIAN), INPUT, r"needs a positive semidefinite curvature.*use GGN\(\), or Ar"
    ),
    Row("NaN weights", nystrom(3), INFINITE, r"NaN", broken),
    Row(
        "no room",
        lambda m: fitted(m, curvature=Nystrom(9), solver=Spectral(), memory=1000),
        TooLarge,
        r"^Directions for Nystrom\(rank=9\) would take .*; use a smaller rank, or CG\(\)",
    ),
    Row(
        "dropped by CG",
        lambda m: fitted(m, curvature=Arnoldi(3, complement="dropped"), solver=CG()),
        INPUT,
        r"drops what lies across its directions, which only Spectral\(\) can; use it, or complement='zero'",
    ),
    Row(
        "dropped guide",
        lambda m: fitted(
            m,
            curvature=GGN,
            solver=CG(),
            preconditioner=Nystrom(3, complement="dropped"),
            damping=0.1,
        ),
        INPUT,
        r"has no inverse across its directions and cannot precondition; use complement='zero'",
    ),
    Row(
        "dual of low rank",
        lambda m: fitted(m, curvature=Nystrom(3), solver=Woodbury(), damping=0.1),
        INPUT,
        r"^Nystrom\(\) cannot be given as rows G.*only as known eigenvalues; choose another solver",
    ),
    Row(
        "diagonal of Hessian",
        lambda m: Diagonal(HESSIAN),  # type: ignore[arg-type]
        INPUT,
        r"^Diagonal\(curvature=Hessian\(\)\) needs a curvature made of rows, .* use GGN\(\)",
    ),
]

DATAINF = [
    Row(
        "of GGN",
        lambda m: fitted(m, curvature=GGN, solver=DataInf()),
        INPUT,
        r"24 rows for a count of 12; use Em",
    ),
    Row(
        "of Hessian",
        lambda m: fitted(m, curvature=HESSIAN, solver=DataInf()),
        INPUT,
        r"^Hessian\(\) cannot be given as rows G.*another solver",
    ),
    Row(
        "of low rank",
        lambda m: fitted(m, curvature=Nystrom(3), solver=DataInf()),
        INPUT,
        r"^Nystrom\(\) cannot be given as rows G",
    ),
    Row(
        "undamped",
        put_in(method=ptif.methods.datainf(0.0)),
        INPUT,
        r"^DataInf\(\) divides by the damping .*positive damping",
    ),
    Row(
        "per block",
        lambda m: DataInf("layer"),
        INPUT,
        r"^DataInf\(per_block='layer'\) must be True or False",
    ),  # type: ignore[arg-type]
    Row(
        "damping NaN",
        lambda m: ptif.methods.datainf(NAN),
        INPUT,
        r"^Absolute\(value=nan\) must be a finite number of at least 0",
    ),
]

BLOCKWISE = [
    Row("groups text", blocks("0"), INPUT, r"^Blockwise\(groups='0'\) must map names to patterns"),
    Row("no groups", blocks({}), INPUT, r"^Blockwise\(groups={}\) must map names to patterns"),
    Row("pattern", blocks({"a": "0.wieght", "b": "2"}), NAMED, r"'0.wieght' of group 'a' .* Did you mean '0.weight'\?"),
    Row("far pattern", blocks({"a": "encoder*"}), NAMED, r"'encoder\*' of group 'a' matches no block. There are '0', "),
    Row("twice", blocks({"a": "0", "b": "*"}), INPUT, r"^The block '0' is in the groups 'a' and 'b'.*disjoint"),
    Row("left out", blocks({"a": "0"}), INPUT, r"^No group holds 1 of the blocks \('2'\); add a group for them, or"),
    Row("patterns 3", group(3), INPUT, r"^BlockGroup\(patterns=3\) must name blocks by one or several patterns"),
    Row("no pattern", group([]), INPUT, r"^BlockGroup\(patterns=\[\]\) must name blocks"),
    Row("solver text", group(solver="cg"), INPUT, r"^BlockGroup\(solver='cg'\) must be a solver for one group"),
    Row(
        "solver class",
        blocks(None, solver=CG),
        INPUT,
        r"^Blockwise\(solver=\) is the class CG; write CG\(\)",
    ),
    Row("nested", blocks(None, solver=Blockwise()), INPUT, r"^Blockwise\(solver=Blockwise.* for one group"),
    Row("curvature text", group(curvature="ggn"), INPUT, r"^BlockGroup\(curvature='ggn'\) must be a curvature"),
    Row("damping", group(damping=-1.0), INPUT, r"value=-1.0\) must be a finite number of at least 0"),
    Row(
        "damped twice",
        blocks({"a": BlockGroup("*", damping=0.1)}, damping=0.2),
        INPUT,
        r"would do nothing: every group of Blockwise\(groups=...\) has its own damping; leave one",
    ),
    Row(
        "no rows in a group",
        blocks({"a": "0", "b": BlockGroup("2", Woodbury(), HESSIAN)}),
        INPUT,
        r"^Hessian\(\) cannot be given as rows G",
    ),
    Row(
        "preconditioned",
        lambda m: fitted(m, curvature=GGN, solver=Blockwise(CG()), preconditioner=GGN, damping=0.1),
        INPUT,
        r"^Blockwise\(\) solves directly and has no use for a preconditioner",
    ),
    Row(
        "singular group",
        blocks(None, damping=0.0),
        SolveFailed,
        r"^In group '0': The smallest eigenvalue .* is 0 within rounding",
    ),
]

CURVATURES = [
    row._replace(name=f"{part}, {row.name}")
    for part, rows in {"low rank": LOW_RANK, "DataInf": DATAINF, "blocks": BLOCKWISE}.items()
    for row in rows
]
