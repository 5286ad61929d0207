"""The original package's settings: a dictionary with the README's names and defaults that refuses unknown keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

from torch import nn

from ..core.errors import InvalidInput, UnknownName, nearest
from ..core.validate import is_finite, is_whole
from ..problem.data import POLICIES
from .console import log

Number: TypeAlias = float | int | None
"""A number; None stands for the README's value."""

CALC_METHODS: Final = ("img_wise", "all_grad_then_test")
SOLVERS: Final = ("lissa", "auto")

ALIASES: Final[Mapping[str, str]] = {
    "r_averaging": "r",
    "test_start_index": "test_sample_start_per_class",
}
"""Older names on the left; both read and write the same value."""

DEFAULTS: Final[Mapping[str, Any]] = {
    # the README's
    "save_pth": None,
    "outdir": "outdir",
    "log_filename": None,
    "seed": 42,
    "gpu": -1,
    "calc_method": "img_wise",
    "train_loader": None,
    "test_loader": None,
    "test_sample_start_per_class": False,
    "test_sample_num": False,
    "recursion_depth": 5000,
    "r": 1,
    "damp": 0.01,
    "scale": 25.0,
    # only in the code
    "dataset": None,
    "num_classes": None,
    # new
    "solver": "lissa",
    "batch_size": None,
    "tolerance": 1e-4,
    "weight_decay": 0.0,
    "top_k": 500,
    "results_name": None,
    "keep_tmp": False,
    "progress": True,
    "s_test_pattern": "{i}_recdep{d}_r{r}.s_test",
    "grad_z_pattern": "{i}.grad_z",
    "grad_z_files": True,
    "deterministic": "warn",
    "num_workers": 1,
}


class Config(dict[str, Any]):
    """The settings of a calculation. It is a dictionary that refuses unknown keys and values.

    Every key is always there; `Config(dictionary)` completes a plain dictionary. `None` for `damp` or `scale`
    means the README's value. Old and new names (`ALIASES`) read and write one value. Deleting a key brings its
    default back.

    Calculation: `seed` (of the random mini-batches), `gpu` (-1: where the model is), `solver` (`"lissa"`: the
    recursion with `damp`, `scale`, `recursion_depth`, `r` and mini-batches of `batch_size`, by default the train
    loader's; `"auto"`: the engine chooses curvature, solver and damping, and these five play no part),
    `tolerance` (the recursion stops early once it has settled to it; 0 runs every step), `weight_decay` (the L2
    strength of training), `test_sample_num` (per class; `False`: all) from `test_sample_start_per_class`,
    `deterministic` (`"warn"`, `"error"`, `"ignore"` where an item reads differently twice; `True` keeps every item as
    first read), `num_workers` (processes over test examples).

    Files: `outdir`, `save_pth`, `results_name` (may hold `{start}` and `{num}`), `keep_tmp`, `top_k` (length of the
    per-example lists, `None`: all), `s_test_pattern` (fields `i d r`), `grad_z_pattern` (field `i`),
    `grad_z_files` (whether `calc_all_grad_then_test` writes gradients to files too, beside the index it keeps).
    Output: `log_filename`, `progress` (`False`: silent, or a callback `(label, done, total)`).

    The effective damping of the recursion on the Hessian is `damp * scale`: 0.25 by default.

    Args:
        given: settings by name, old or new; keys that are left out have their defaults.
        more: the same as keyword arguments.

    Raises:
        UnknownName: a key that does not exist; the nearest one is offered.
        InvalidInput: a value that cannot be used.

    >>> config = Config(r_averaging=10, scale=None)
    >>> config["r"], config["scale"], config["recursion_depth"]
    (10, 25.0, 5000)
    """

    def __init__(self, given: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        super().__init__(DEFAULTS)
        self._spelling: dict[str, str] = {}
        self.update(given or {}, **more)
        if isinstance(given, Config):
            self._spelling = given._spelling | {ALIASES.get(key, key): key for key in more}

    @classmethod
    def of(cls, given: Any) -> Config:
        """A copy of `given` as a complete `Config`; the original is never changed."""
        if given is not None and not isinstance(given, Mapping):
            raise InvalidInput(
                f"The config is of type {type(given).__name__}; pass a dictionary, e.g. get_default_config()."
            )
        return cls(given)

    @staticmethod
    def _canonical(key: Any) -> str:
        name = ALIASES.get(key, key)
        if name not in DEFAULTS:
            raise UnknownName(f"The config has no key {key!r}.{nearest(str(key), [*DEFAULTS, *ALIASES])}")
        return str(name)

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(self._canonical(key))

    def __setitem__(self, key: str, value: Any) -> None:
        name = self._canonical(key)
        if value is None and name in ("damp", "scale"):
            value = DEFAULTS[name]
        valid = _check_value(key, value)
        super().__setitem__(name, float(valid) if name in _FLOATS else valid)
        self._spelling[name] = key

    def __delitem__(self, key: str) -> None:
        name = self._canonical(key)
        super().__setitem__(name, DEFAULTS[name])
        self._spelling.pop(name, None)

    def spelled(self, name: str) -> str:
        """The name under which the caller set a key, old or new: messages use it.

        Args:
            name: the new name.
        """
        return self._spelling.get(name, name)

    def __contains__(self, key: object) -> bool:
        return key in DEFAULTS or key in ALIASES

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`, `default` if there is no such key.

        Args:
            key: a name, old or new.
            default: the value for a key that does not exist.
        """
        return super().get(ALIASES.get(key, key), default)

    def setdefault(self, key: str, default: Any = None) -> Any:
        """The value of `key`: every key is always there.

        Args:
            key: a name, old or new.
            default: not used, as every key is there.
        """
        return self[key]

    def pop(self, key: str, *default: Any) -> Any:
        """Take out the value of `key`, which is reset to its default.

        Args:
            key: a name, old or new.
            default: the value for a key that does not exist.
        """
        if default and key not in self:
            return default[0]
        value = self[key]
        del self[key]
        return value

    def update(self, given: Any = (), /, **more: Any) -> None:
        """Set several keys; refuses a value given twice, under two names, differently.

        Args:
            given: settings by name, or pairs of them.
            more: the same as keyword arguments.
        """
        new = dict(given, **more)
        for old, name in ALIASES.items():
            if old in new and name in new and new[old] != new[name]:
                raise InvalidInput(
                    f"The config gives {name!r} twice: {new[name]!r}, and {new[old]!r} under its old name {old!r}; "
                    "keep one of them."
                )
        for key, value in new.items():
            self[key] = value

    def __ior__(self, given: Any) -> Config:  # type: ignore[override,misc]
        self.update(given)
        return self

    def copy(self) -> Config:
        """A copy that is a `Config` as well."""
        return Config(self)

    def __copy__(self) -> Config:
        return self.copy()

    def __reduce__(self) -> tuple[Any, ...]:
        return Config, (dict(self),)

    def items_for_json(self) -> dict[str, Any]:
        """The settings for JSON: what it cannot hold (loaders, callbacks, paths) becomes text."""
        return {key: _as_json(value) for key, value in self.items()}

    def auto_tune(
        self,
        model: nn.Module,
        loader: Any = None,
        *,
        damping: float | int | None = None,
        max_depth: int = 5000,
        noise: float = 0.1,
        loss_fn: Any = None,
        params: Any = None,
    ) -> Config:
        r"""Set `scale`, `damp`, `recursion_depth` and `batch_size` by measuring the model's curvature.

        The largest eigenvalue (20 steps of Lanczos) and the trace (the objective's own, or Hutchinson's estimate) give
        `batch_size = max(16, trace / largest)`, `scale = 1.1 (largest + damping + trace / batch_size)`, and
        `recursion_depth = 3 scale / damping`, at which the weakest direction has 5 % of its error left. An `r` above
        1 is lowered to the number of runs at which the noise of the mini-batches, measured in three runs, falls to
        `noise` of the answer.

        Args:
            model: the trained model; not changed.
            loader: the training data; by default `config["train_loader"]`.
            damping: what is added to the Hessian's eigenvalues; by default the present `damp * scale`.
            max_depth: the most steps. Where more would be needed, directions of curvature below `3 scale / max_depth`
                stay short of their limit, which damps them further; a log line says so.
            noise: relative standard deviation that `r` runs should come down to.
            loss_fn, params: as in `calc_img_wise`.

        Returns:
            The config itself.

        Raises:
            InvalidInput: no training data, no damping, or a curvature that is negative beyond the damping.

        Reference: the rule follows from the contraction of stochastic gradient descent; Klochkov & Liu (2024).
        """
        from .engine import ClassicSettings, measure_curvature, relative_deviation

        data = self["train_loader"] if loader is None else loader
        if data is None:
            raise InvalidInput("auto_tune needs the training data; pass the train loader as second argument.")
        damping = self["damp"] * self["scale"] if damping is None else float(damping)
        settings = ClassicSettings.of(self, loss_fn=loss_fn, params=params)
        tuning = measure_curvature(model, data, settings, damping)
        scale = 1.0 / tuning.step
        depth = max(1, math.ceil(3.0 * scale / damping))
        if depth > max_depth:
            log.warning(
                "auto_tune: damping %.3g asks for %d steps of scale %.4g; %d are kept, so directions of curvature "
                "below %.3g are damped further.",
                damping, depth, scale, max_depth, 3.0 * scale / max_depth,
            )  # fmt: skip
        self.update(scale=scale, damp=damping / scale, recursion_depth=min(depth, max_depth))
        self["batch_size"] = tuning.batch or None
        if self["r"] > 1:
            settings = ClassicSettings.of(self, loss_fn=loss_fn, params=params)
            deviation = relative_deviation(model, data, settings)
            self["r"] = min(self["r"], max(1, math.ceil((deviation / noise) ** 2)))
        log.info(
            "auto_tune: largest eigenvalue %.4g, trace %.4g: scale %.4g, damp %.4g, batch_size %s, recursion_depth %d.",
            tuning.largest, tuning.trace, scale, self["damp"], self["batch_size"], self["recursion_depth"],
        )  # fmt: skip
        return self


def get_default_config() -> Config:
    """The README's defaults; change what you like.

    >>> get_default_config()["recursion_depth"]
    5000
    """
    return Config()


# --------------------------------------------------------------------------- values


_Check = tuple[Callable[[Any], bool], str]
_COUNT: _Check = (lambda v: is_whole(v) and v >= 1, "a whole number of at least 1")
_COUNT_OR_NONE: _Check = (lambda v: v is None or _COUNT[0](v), "a whole number of at least 1, or None")
_SAMPLES: _Check = (
    lambda v: v is None or v is False or (is_whole(v) and v >= 0),
    "a whole number of at least 0, or False",
)
_BOOL: _Check = (lambda v: isinstance(v, bool), "True or False")
_TEXT_I: _Check = (lambda v: isinstance(v, str) and "{i}" in v, "a file name with {i} for the index")

_CHECKS: Mapping[str, _Check] = {
    "seed": (is_whole, "a whole number"),
    "gpu": (lambda v: is_whole(v) and v >= -1, "-1 for the CPU or the number of a GPU"),
    "calc_method": (lambda v: v in CALC_METHODS, f"one of {', '.join(map(repr, CALC_METHODS))}"),
    "test_sample_start_per_class": _SAMPLES,
    "test_sample_num": _SAMPLES,
    "recursion_depth": _COUNT,
    "r": _COUNT,
    "damp": (lambda v: is_finite(v) and v >= 0, "a finite number of at least 0, or None"),
    "scale": (lambda v: is_finite(v) and v > 0, "a finite number above 0, or None"),
    "num_classes": _COUNT_OR_NONE,
    "solver": (lambda v: v in SOLVERS, f"one of {', '.join(map(repr, SOLVERS))}"),
    "batch_size": _COUNT_OR_NONE,
    "tolerance": (lambda v: is_finite(v) and v >= 0, "a finite number of at least 0"),
    "top_k": _COUNT_OR_NONE,
    "keep_tmp": _BOOL,
    "progress": (lambda v: isinstance(v, bool) or callable(v), "True, False or a callback (label, done, total)"),
    "s_test_pattern": _TEXT_I,
    "grad_z_pattern": _TEXT_I,
    "grad_z_files": _BOOL,
    "deterministic": (lambda v: isinstance(v, bool) or v in POLICIES, "'warn', 'error', 'ignore' or True"),
    "num_workers": _COUNT,
}


_FLOATS = ("damp", "scale", "tolerance")


def _check_value(key: str, value: Any) -> Any:
    """The value, as Python's own number where it is NumPy's; `key` is the name the caller used, old or new."""
    name = ALIASES.get(key, key)
    if hasattr(value, "item") and not hasattr(value, "__len__"):
        value = value.item()  # a NumPy number
    if name in _CHECKS and not _CHECKS[name][0](value):
        raise InvalidInput(f"{key}={value!r} is not possible; it must be {_CHECKS[name][1]}.")
    return value


def _as_json(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, Mapping):
        return {str(k): _as_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(v) for v in value]
    return str(value) if hasattr(value, "__fspath__") else f"<{type(value).__name__}>"
