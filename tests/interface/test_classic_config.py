"""The config: the README's names and defaults, aliases, refusal of what it does not know, and tuning itself."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from pytorch_influence_functions.classic import Config, calc_img_wise, get_default_config, s_test
from pytorch_influence_functions.classic.engine import ClassicSettings, Engine, calculation
from pytorch_influence_functions.core.errors import InvalidInput, UnknownName
from tests.interface.classic_cases import flat, gradient, hessian, quick, toy

README = {
    "save_pth": None,
    "outdir": "outdir",
    "log_filename": None,
    "seed": 42,
    "gpu": -1,
    "calc_method": "img_wise",
    "test_sample_start_per_class": False,
    "test_sample_num": False,
    "recursion_depth": 5000,
    "r": 1,
    "damp": 0.01,
    "scale": 25,
}


def test_the_readme_names_and_defaults() -> None:
    config = get_default_config()
    assert isinstance(config, dict)
    assert {key: config[key] for key in README} == README
    assert config["train_loader"] is None and config["test_loader"] is None


@pytest.mark.parametrize(
    ("old", "new", "value"), [("r_averaging", "r", 7), ("test_start_index", "test_sample_start_per_class", 3)]
)
def test_aliases_work_both_ways(old: str, new: str, value: int) -> None:
    config = Config()
    config[old] = value
    assert config[new] == value and config[old] == value and config.get(old) == value
    config[new] = value + 1
    assert config[old] == value + 1
    assert old in config and new in config and old not in list(config)
    assert Config({old: value})[new] == value


def test_one_value_under_two_names_must_agree() -> None:
    assert Config({"r": 3, "r_averaging": 3})["r"] == 3
    with pytest.raises(InvalidInput, match="gives 'r' twice: 1, and 10 under its old name 'r_averaging'"):
        Config({"r": 1, "r_averaging": 10})


@pytest.mark.parametrize("how", ["set", "get", "update", "init", "del"])
def test_unknown_keys_are_refused_with_the_nearest_name(how: str) -> None:
    config = Config()
    with pytest.raises(UnknownName, match=r"no key 'recursion_dept'\. Did you mean 'recursion_depth'"):
        if how == "set":
            config["recursion_dept"] = 1
        elif how == "get":
            config["recursion_dept"]
        elif how == "update":
            config.update(recursion_dept=1)
        elif how == "del":
            del config["recursion_dept"]
        else:
            Config({"recursion_dept": 1})


def test_none_for_damp_and_scale_is_the_readme_value() -> None:
    config = Config({"damp": None, "scale": None})
    assert (config["damp"], config["scale"]) == (0.01, 25)


def test_missing_keys_are_filled_and_the_given_dictionary_is_left_alone() -> None:
    given = {"r_averaging": 2, "outdir": "here"}
    config = Config.of(given)
    assert config["recursion_depth"] == 5000 and config["r"] == 2
    config["r"] = 9
    assert given == {"r_averaging": 2, "outdir": "here"}
    with pytest.raises(InvalidInput, match="config is of type int"):
        Config.of(3)


def test_a_deleted_key_has_its_default_again() -> None:
    config = Config(r=4, seed=1)
    del config["r_averaging"]
    assert config["r"] == 1
    assert config.pop("seed") == 1 and config["seed"] == 42
    assert config.pop("nothing", 5) == 5
    assert config.setdefault("top_k", 3) == 500
    config |= {"r": 2}
    assert config["r"] == 2


def test_copies_and_pickles_stay_configs() -> None:
    config = Config(r=4)
    for made in (config.copy(), copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(made) is Config and made == config and made is not config
        with pytest.raises(UnknownName):
            made["nothing"] = 1


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("recursion_depth", 0, "at least 1"),
        ("recursion_depth", 2.5, "whole number"),
        ("r", True, "whole number"),
        ("scale", -1.0, "above 0"),
        ("damp", math.nan, "finite"),
        ("solver", "cg", "'lissa', 'auto'"),
        ("calc_method", "all", "'all_grad_then_test'"),
        ("gpu", -2, "number of a GPU"),
        ("top_k", 0, "or None"),
        ("test_sample_num", True, "or False"),
        ("test_sample_start_per_class", -1, "or False"),
        ("num_workers", 0, "at least 1"),
        ("grad_z_pattern", "z.pt", r"\{i\} for the index"),
        ("progress", "yes", "callback"),
        ("deterministic", "maybe", "'warn'"),
        ("seed", "42", "whole number"),
    ],
)
def test_values_that_cannot_be_used(key: str, value: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        Config({key: value})


@pytest.mark.parametrize(("old", "new"), [("r_averaging", "r"), ("test_start_index", "test_sample_start_per_class")])
def test_messages_name_the_key_that_the_caller_used(old: str, new: str) -> None:
    for key in (old, new):
        with pytest.raises(InvalidInput, match=f"^{key}=-1 is not possible"):
            Config({key: -1})
        assert Config.of({key: 2}).spelled(new) == Config(Config({key: 2})).copy().spelled(new) == key


def test_whatever_is_in_the_config_can_be_written_down(tmp_path: Path) -> None:
    t = toy()
    config = quick(tmp_path / "a" / "b", train_loader=t.train, test_loader=t.test, progress=lambda *_: None)
    config.update(outdir=tmp_path / "a" / "b", test_sample_num=1, recursion_depth=20)
    calc_img_wise(config, t.model)
    written = json.loads((tmp_path / "a" / "b" / "influences_results_meta_0-1.json").read_text())
    assert written["train_loader"] == "<DataLoader>" and written["recursion_depth"] == 20
    assert written["outdir"] == str(tmp_path / "a" / "b")


# --------------------------------------------------------------------------- auto_tune


def test_auto_tune_reaches_the_answer_in_fewer_steps() -> None:
    t = toy()
    config = Config(progress=False, damp=0.05 / 25)
    asked = config["damp"] * config["scale"]
    assert config.auto_tune(t.model, t.train) is config
    assert config["damp"] * config["scale"] == pytest.approx(asked)
    assert config["recursion_depth"] < 5000 and config["batch_size"] >= 16

    def loss() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(t.model(t.x), t.y)

    h = hessian(t.model, loss)
    largest = float(torch.linalg.eigvalsh(h).max())
    assert config["scale"] > largest + asked
    v = gradient(t.model, lambda: torch.nn.functional.cross_entropy(t.model(t.test_x[:1]), t.test_y[:1]))
    exact = torch.linalg.solve(h + asked * torch.eye(len(h), dtype=h.dtype), v)
    made = s_test(
        t.test_x[:1], t.test_y[:1], t.model, t.train, progress=False, r=2, batch_size=config["batch_size"],
        damp=config["damp"], scale=config["scale"], recursion_depth=config["recursion_depth"],
    )  # fmt: skip
    assert (flat(made) - exact).norm() < 0.2 * exact.norm()


def test_auto_tune_never_diverges_on_inputs_forty_times_as_large(tmp_path: Path) -> None:
    t = toy(n=24, tests=2)
    large = TensorDataset(40 * t.x, t.y)
    with torch.no_grad():
        t.model.weight /= 40
    config = quick(tmp_path, scale=25.0, damp=0.01, batch_size=None, tolerance=1e-3)
    config.auto_tune(t.model, DataLoader(large, batch_size=4), max_depth=100)
    assert config["recursion_depth"] <= 100 and config["scale"] > 100
    values = calc_img_wise(config, t.model, large, TensorDataset(40 * t.test_x, t.test_y)).scores.values
    assert bool(torch.isfinite(values).all())


def test_auto_tune_lowers_r_where_runs_agree() -> None:
    t = toy(n=24)
    agreed = Config(progress=False, r=10, damp=0.02).auto_tune(t.model, (t.x[:16], t.y[:16]))
    assert agreed["batch_size"] == 16 and agreed["r"] == 1  # as large as the data: nothing is random
    noisy = Config(progress=False, r=3, damp=0.02).auto_tune(t.model, t.train, noise=1e-3)
    assert noisy["r"] == 3
    between = Config(progress=False, r=1000, damp=0.02).auto_tune(t.model, t.train, noise=0.02)
    assert 1 < between["r"] < 1000


NOISE = 0.005


def test_the_r_of_auto_tune_brings_the_noise_down_to_what_was_asked() -> None:
    """The mean of r runs varies by 1 / sqrt(r) of one run's standard deviation, seen in three runs."""
    t = toy(n=24)
    data = (t.x, t.y)  # as a loader, it would be shuffled anew
    config = Config(progress=False, r=10**6).auto_tune(t.model, data, damping=2.0, noise=NOISE)
    runs = []
    for k in range(3):
        settings = ClassicSettings.of(Config(config, r=1, seed=config["seed"] + k))
        with calculation(t.model, settings):
            engine = Engine.of(t.model, data, settings)
            runs.append(engine.s_test(engine.gradients(engine.problem.data, [0]).rows).flat()[0])
    every = torch.stack(runs)
    deviation = every.std(0, unbiased=True).norm() / every.mean(0).norm()
    needed = float(deviation / NOISE) ** 2
    assert needed > 20, "too few runs to tell one rule from another"
    assert config["r"] == math.ceil(needed)


def test_auto_tune_needs_data_and_damping() -> None:
    t = toy()
    with pytest.raises(InvalidInput, match="needs the training data"):
        Config().auto_tune(t.model)
    with pytest.raises(InvalidInput, match="positive damping"):
        Config(damp=0.0).auto_tune(t.model, t.train)
    config = Config(train_loader=t.train, progress=False)
    assert config.auto_tune(t.model)["scale"] != 25


def test_auto_tune_names_negative_curvature() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
    t = toy()
    with pytest.raises(InvalidInput, match=r"smallest eigenvalue is about -.*pass damping="):
        Config(progress=False).auto_tune(model, (t.x, t.y), damping=1e-6)
