"""Which training labels are wrong? One queue, the most doubtful first, with the evidence for each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.distributed import World
from ..core.errors import InvalidInput, require
from ..core.text import printable
from ..evaluation.recipe import Recipe
from ..evaluation.retraining import train_model
from ..influence.attribution import Attribution
from ..influence.question import read_asked
from ..methods.papers import ekfac
from ..objectives.class_scores import class_scores
from ..problem.data import Source
from ..problem.infer_loss import infer_objective
from ..problem.model_state import plain_autograd
from ..problem.problem import Problem, sweep
from ..scores.doubt import harm_reliability, label_doubt, likeliest_other
from .classes import require_class_scores
from .fitted_system import fit_system
from .label_votes import class_labels, label_votes

if TYPE_CHECKING:
    import pandas


@final
@dataclass(frozen=True, eq=False)
class LabelIssues:
    """Every training example with how doubtful its label is. `find_label_issues(...)` makes it.

    Attributes:
        doubt: larger is more doubtful, [N]: the votes of all others for the likeliest other class, less those for the
            given one; above 0 they would give another class.
        votes: what all others say of each class, about 0 to 1, [N, C].
        loss: the model's loss on the given label, [N].
        harm: how much better the mean loss on the validation data would be without the example, [N]; None without any.
        self_influence: the example's score on itself, [N].
        given: the given class, [N].
        predicted: the class the model predicts, [N].
        probability: the model's probability of the given class, [N].
        suggested: the class other than the given one that the others vote for, [N].
        class_names: where the data have them.
        harm_reliability: how far other validation data would give the same harm, from 0 to 1; None without any.
    """

    doubt: Float[Tensor, " n"]
    votes: Float[Tensor, "n c"]
    loss: Float[Tensor, " n"]
    harm: Float[Tensor, " n"] | None
    self_influence: Float[Tensor, " n"]
    given: Int[Tensor, " n"]
    predicted: Int[Tensor, " n"]
    probability: Float[Tensor, " n"]
    suggested: Int[Tensor, " n"]
    class_names: list[str] | None = None
    harm_reliability: float | None = None

    def __len__(self) -> int:
        return len(self.doubt)

    @property
    def order(self) -> Int[Tensor, " n"]:
        """All training examples, the most doubtful first."""
        return self.doubt.argsort(descending=True, stable=True)

    def ids(self, k: int) -> list[int]:
        """The k most doubtful training examples.

        Args:
            k: how many.
        """
        return [int(i) for i in self.order[:k]]

    @property
    def is_issue(self) -> Tensor:
        """Whether the others would give another class; bool [N]."""
        return self.doubt > 0

    def name(self, label: int) -> str | int:
        """A class by its name, where the data have names.

        Args:
            label: its number.
        """
        return self.class_names[label] if self.class_names and 0 <= label < len(self.class_names) else label

    def relabelling(self, k: int) -> dict[int, int]:
        """The suggested classes of the k most doubtful examples, as `what_if(relabel=)` takes them.

        Args:
            k: how many.
        """
        return {i: int(self.suggested[i]) for i in self.ids(k)}

    def columns(self) -> dict[str, list[Any]]:
        """The columns of `to_frame` as lists of plain values, in the order of `order`."""
        order, n = self.order, len(self)
        columns: dict[str, list[Any]] = {
            "rank": list(range(n)),
            "is_label_issue": self.is_issue[order].tolist(),
            "label_score": [rank / n for rank in range(n)],
            "given_label": [self.name(int(c)) for c in self.given[order]],
            "predicted_label": [self.name(int(c)) for c in self.predicted[order]],
            "suggested_label": [self.name(int(c)) for c in self.suggested[order]],
            "probability_of_given": self.probability[order].tolist(),
            "loss": self.loss[order].tolist(),
            "doubt": self.doubt[order].tolist(),
            "self_influence": self.self_influence[order].tolist(),
        }
        return columns if self.harm is None else columns | {"harm": self.harm[order].tolist()}

    def to_frame(self) -> pandas.DataFrame:
        """A table by index in the training data, the most doubtful first (extra `frame`).

        `is_label_issue`, `label_score` (the share of examples that are more doubtful: low is bad), `given_label` and
        `predicted_label` are the columns that cleanlab's tools read.

        Raises:
            MissingExtra: pandas is not installed.
        """
        require("pandas", "frame")
        import pandas

        return pandas.DataFrame(self.columns(), index=pandas.Index(self.order.numpy(), name="index"))

    def __repr__(self) -> str:
        first = ", ".join(
            f"{i} ({self.name(int(self.given[i]))} -> {self.name(int(self.suggested[i]))})" for i in self.ids(3)
        )
        return printable(f"LabelIssues({int(self.is_issue.sum())} of {len(self)} labels in doubt, first {first})")


@plain_autograd()
def find_label_issues(problem: Problem | Attribution, validation: Any = None, method: Any = None) -> LabelIssues:
    """Order the training examples by how doubtful their labels are.

    All other examples vote on each label: ridge regression of the classes on the gradients of the model's outputs, each
    example left out in closed form, which is the model, linearised around its weights and fitted again without it. A
    model that has memorised a wrong label gives it no loss, but the others still vote against it. Those in doubt then
    lose their vote, and the rest vote again. Validation data vote too and are never doubted.

    The harm, where validation data are given, is how much their mean loss would fall without the example: no part of
    the order, and the queue to take if the loss matters more than the labels. Figures against the highest loss and
    confident learning: the page What if?.

    Args:
        problem: model, loss and training data; or what a method's `fit(problem)` gave.
        validation: labelled data that the model did not train on and that will not judge the result: not the test set,
            whose labels would leak into the choice. Rows of texts with labels, where the problem is of such.
        method: of self-influence and harm, an `Influence` by name or made; `None`: `ekfac()`.

    Raises:
        InvalidInput: the labels are no class numbers, or the model gives no score for each class.

    References: Jacot et al. (2018), Neural Tangent Kernel; Cook & Weisberg (1982) for leaving one out.

    Example:
        >>> x, y = torch.randn(40, 3), torch.arange(40) % 2
        >>> problem = Problem(torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss(), (x, y))
        >>> len(find_label_issues(problem, (x[:9], y[:9])).ids(5))
        5
    """
    given_method = ekfac() if method is None and isinstance(problem, Problem) else method
    asked = problem.problem if isinstance(problem, Attribution) else problem
    if isinstance(asked, Problem):
        require_class_scores(
            asked,
            "find_label_issues",
            "give a problem whose model returns the scores of the classes alone, [n, C], under a loss of them such as "
            "nn.CrossEntropyLoss(), and for numbers and counts look at the residuals",
        )
    fitted = fit_system(problem, given_method, "find_label_issues")
    given, probabilities, loss = _look(fitted.problem)
    rows = torch.arange(len(given))
    if validation is not None:
        validation = read_asked(fitted.problem, validation, "validation", labelled=True)
    harms = None if validation is None else -fitted.score(validation).values.double()
    votes = label_votes(fitted, given, probabilities.shape[1], validation)
    spread = fitted.problem.data.spread
    return LabelIssues(
        _outside(spread(label_doubt(votes, given)), fitted.problem, -torch.inf),
        spread(votes),
        spread(loss),
        None if harms is None else spread(harms.mean(0)),
        fitted.self_influence(),
        spread(given),
        spread(probabilities.argmax(1)),
        spread(probabilities[rows, given]),
        spread(likeliest_other(votes, given)[1]),
        fitted.problem.data.class_names,
        None if harms is None else harm_reliability(harms),
    )


def _look(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Given classes [n], the model's probabilities [n, C], and losses [n], in float64 on the CPU."""
    labels: list[Tensor] = []
    probabilities: list[Tensor] = []
    losses: list[Tensor] = []
    objective = problem.objective
    for ids, batch in sweep(problem, label="losses", world=World()):
        with torch.no_grad():
            outputs = objective.outputs(problem.model, batch)
            objective.check(outputs, batch, ids)
            losses.append(objective.losses(outputs, batch).double().cpu())
        labels.append(class_labels(batch, len(ids)))
        probabilities.append(_probabilities(class_scores(objective, outputs).double().cpu()))
    return torch.cat(labels), torch.cat(probabilities), torch.cat(losses)


def _probabilities(scores: Float[Tensor, "n c"]) -> Float[Tensor, "n k"]:
    """Of logits or log-probabilities, which an objective's outputs are even where the model's are probabilities."""
    if scores.shape[1] > 1:
        return scores.softmax(1)
    one = scores.sigmoid()
    return torch.cat([1 - one, one], 1)


def _outside(values: Tensor, problem: Problem, filler: float) -> Tensor:
    """The values, with a filler for examples that a loader's sampler left out."""
    positions = problem.data.positions
    if positions is None:
        return values
    filled = torch.full_like(values, filler)
    filled[positions] = values[positions]
    return filled


@final
@dataclass(eq=False)
class LabelIssueFinder:
    """`find_label_issues` in the manner of scikit-learn: `fit(x, y)` trains by a recipe and looks.

    Args:
        recipe: how the model is trained.
        validation: as for `find_label_issues`.
        method: as for `find_label_issues`.
        seed: of the training.

    Attributes:
        model_: the trained model, after `fit`.
        issues_: the `LabelIssues`.
        ranked_label_issues_: indices of the training examples, the most doubtful first, as an array.

    Example:
        >>> x, y = torch.randn(40, 3), torch.arange(40) % 2
        >>> finder = LabelIssueFinder(Recipe(lambda: torch.nn.Linear(3, 2), epochs=2))
        >>> finder.fit(x, y).ranked_label_issues_.shape
        (40,)
    """

    recipe: Recipe
    validation: Any = None
    method: Any = None
    seed: int = 0
    model_: Any = field(default=None, init=False, repr=False)
    issues_: LabelIssues | None = field(default=None, init=False, repr=False)

    def fit(self, x: Any, y: Any) -> LabelIssueFinder:
        """Train on the data and order their labels.

        Args:
            x: inputs, as `ptif.attribute` takes them.
            y: given labels.

        Raises:
            InvalidInput: `recipe` is none; and as `find_label_issues`.
        """
        if not isinstance(self.recipe, Recipe):
            raise InvalidInput(
                f"LabelIssueFinder trains by a Recipe, got {type(self.recipe).__name__}; write "
                "Recipe(make_model, epochs=...) with a function that builds the model, or ask find_label_issues() "
                "about a model that is trained already."
            )
        self.model_ = train_model(self.recipe, (x, y), self.seed)
        source = Source.of((x, y))
        loss = infer_objective(self.model_, source) if self.recipe.loss is None else self.recipe.loss
        self.issues_ = find_label_issues(Problem(self.model_, loss, source), self.validation, self.method)
        return self

    @property
    def ranked_label_issues_(self) -> Any:
        """Indices of the training examples, the most doubtful first.

        Raises:
            InvalidInput: `fit` has not been called.
        """
        if self.issues_ is None:
            raise InvalidInput("This LabelIssueFinder has not been fitted; call fit(x, y) first.")
        return self.issues_.order.numpy()
