"""Which training labels are wrong? One queue, the most doubtful first, with the evidence for each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.distributed import World
from ..core.errors import InvalidInput, SolveFailed, TooLarge, require
from ..core.text import printable
from ..evaluation.recipe import Recipe
from ..evaluation.retraining import train_model
from ..influence.attribution import Attribution
from ..methods.papers import dual, ekfac
from ..objectives.base import tensor_targets
from ..problem.data import Source
from ..problem.infer_loss import infer_objective
from ..problem.model_state import plain_autograd
from ..problem.problem import Problem, sweep
from ..scores.doubt import harm_reliability, label_doubt, left_out_loss
from .fitted_system import fit_system

if TYPE_CHECKING:
    import pandas

# Up to so many examples the Gram matrix of all gradients is taken: it costs their number squared.
_DUAL = 10_000


@final
@dataclass(frozen=True, eq=False)
class LabelIssues:
    """Every training example with how doubtful its label is. `find_label_issues(...)` makes it.

    Attributes:
        doubt: larger is more doubtful, [N]: the left-out loss in units of its spread, plus the harm in units of its
            own, times how reliable the harm is.
        loss: the model's loss on the given label, [N].
        left_out_loss: the loss that a model would have which never saw the example, predicted, [N]; the loss itself
            where that is too dear to know.
        harm: how much better the mean loss on the validation data would be without the example, [N]; None without any.
        self_influence: the example's score on itself, [N].
        given: the given class, [N].
        predicted: the class the model predicts, [N].
        probability: the model's probability of the given class, [N].
        suggested: the most probable class other than the given one, [N].
        class_names: where the data have them.
        harm_reliability: how far other validation data would give the same harm, from 0 to 1; None without any.
    """

    doubt: Float[Tensor, " n"]
    loss: Float[Tensor, " n"]
    left_out_loss: Float[Tensor, " n"]
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
        """Whether the model disagrees with the label, and the example does harm where that was measured; bool [N]."""
        disagrees = self.predicted != self.given
        return disagrees if self.harm is None else disagrees & (self.harm > 0)

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
            "left_out_loss": self.left_out_loss[order].tolist(),
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

    doubt = left-out loss / its standard deviation + reliability x harm / its standard deviation. The left-out loss is
    the loss that a model would have which never saw the example, by the closed form `loss + s / (1 - s)` with s its
    self-influence under `dual()` (up to 10,000 examples; beyond, the loss itself). The harm is how much the mean loss
    on the validation data would fall without the example; without validation data it is left out. Its reliability is
    how well the harms to two halves of the validation data agree: where these are few, or the task is mostly noise,
    harm weighs little. A wrong label has a high left-out loss, and harms those it should have helped; an example that
    is merely hard has the loss alone. Figures against the highest loss and confident learning: the page What if?.

    Args:
        problem: model, loss and training data; or what a method's `fit(problem)` gave.
        validation: labelled data that the model did not train on and that will not judge the result: not the test set,
            whose labels would leak into the choice.
        method: an `Influence` by name or made; `None`: `ekfac()`.

    Raises:
        InvalidInput: the labels are no class numbers, or the model gives no score for each class.

    Example:
        >>> x, y = torch.randn(40, 3), torch.arange(40) % 2
        >>> problem = Problem(torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss(), (x, y))
        >>> len(find_label_issues(problem, (x[:9], y[:9])).ids(5))
        5
    """
    given_method = ekfac() if method is None and isinstance(problem, Problem) else method
    fitted = fit_system(problem, given_method, "find_label_issues")
    given, probabilities, loss = _look(fitted.problem)
    rows = torch.arange(len(given))
    others = probabilities.clone()
    others[rows, given] = -1.0
    harms = None if validation is None else -fitted.score(validation).values.double()
    harm = None if harms is None else harms.mean(0)
    reliability = None if harms is None else harm_reliability(harms)
    own = _leverages(fitted.problem)
    left_out = loss if own is None else left_out_loss(loss, own)
    doubt = label_doubt(left_out, harm, reliability or 0.0)
    spread = fitted.problem.data.spread
    return LabelIssues(
        _outside(spread(doubt), fitted.problem, -torch.inf),
        spread(loss),
        spread(left_out),
        None if harm is None else spread(harm),
        fitted.self_influence() if own is None else spread(own),
        spread(given),
        spread(probabilities.argmax(1)),
        spread(probabilities[rows, given]),
        spread(others.argmax(1)),
        fitted.problem.data.class_names,
        reliability,
    )


def _look(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Given classes [n], the model's probabilities [n, C], and losses [n], in float64 on the CPU."""
    labels, probabilities, losses = [], [], []
    objective = problem.objective
    for ids, batch in sweep(problem, label="losses", world=World()):
        with torch.no_grad():
            outputs = objective.outputs(problem.model, batch)
            objective.check(outputs, batch, ids)
            losses.append(objective.losses(outputs, batch).double().cpu())
        targets = tensor_targets(batch).reshape(len(ids), -1)
        if targets.shape[1] != 1 or (targets.is_floating_point() and bool((targets != targets.round()).any())):
            raise InvalidInput(
                f"The labels have shape {tuple(tensor_targets(batch).shape)} and type {targets.dtype}, which are no "
                "class numbers; find_label_issues() is about classes, for numbers look at the residuals."
            )
        labels.append(targets[:, 0].long().cpu())
        probabilities.append(_probabilities(outputs.double().cpu(), getattr(objective, "from_probabilities", False)))
    return torch.cat(labels), torch.cat(probabilities), torch.cat(losses)


def _probabilities(outputs: Tensor, already: bool) -> Tensor:
    if outputs[0].numel() == 1:
        one = outputs.reshape(-1) if already else outputs.reshape(-1).sigmoid()
        return torch.stack([1 - one, one], 1)
    if outputs.dim() != 2:
        raise InvalidInput(
            f"The model's outputs have shape {tuple(outputs.shape)}, which are no score for each class; "
            "find_label_issues() is about one class for each example."
        )
    return outputs if already else outputs.softmax(1)


def _leverages(problem: Problem) -> Tensor | None:
    """Self-influence under the empirical Fisher, [n] in float64; None where that is too dear or too ill-conditioned."""
    if len(problem) > _DUAL:
        return None
    try:
        own = dual().fit(problem).self_influence()
    except (TooLarge, SolveFailed):
        return None
    positions = problem.data.positions
    return own.double() if positions is None else own.double()[positions]


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
        """
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
