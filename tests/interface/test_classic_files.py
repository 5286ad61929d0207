"""The rules of the two modes: layout, files, seeds, shards, workers, and no trace left on the model."""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pytorch_influence_functions.classic import (
    Config,
    InfluenceResult,
    calc_all_grad_then_test,
    calc_grad_z,
    calc_img_wise,
    calc_influence_function,
    calc_influences,
    calc_s_test,
    load_grad_z,
    load_s_test,
    save_json,
)
from pytorch_influence_functions.core.errors import InvalidInput
from tests.interface.classic_cases import Toy, toy
from tests.tolerance import gap, rounding

Result = InfluenceResult


@pytest.fixture(scope="module")
def t() -> Toy:
    return toy(n=30, tests=9)


def short(folder: Path, **changes: Any) -> Config:
    """Few random steps: enough where files and not numbers are looked at."""
    return Config(
        {"outdir": str(folder), "progress": False, "recursion_depth": 6, "r": 2, "test_sample_num": 1} | changes
    )


@pytest.fixture(scope="module")
def both(t: Toy, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result, Result]:
    """Each mode once into one folder."""
    folder = tmp_path_factory.mktemp("both") / "made" / "by it"
    config = short(folder)
    return (
        folder,
        calc_img_wise(config, t.model, t.train, t.test),
        calc_all_grad_then_test(config, t.model, t.train, t.test),
    )


def same(a: Result, b: Result) -> bool:
    """Whether two results hold the same items, labels and rankings, and the same influences up to rounding."""
    left_out = ("influence", "time_calc_influence_s")
    rest_a, rest_b = ({k: {**v, **dict.fromkeys(left_out)} for k, v in result.items()} for result in (a, b))
    influences = ([v["influence"] for v in result.values()] for result in (a, b))
    return rest_a == rest_b and gap(*influences) < rounding(torch.float64, condition=1e3)


# --------------------------------------------------------------------------- results


def test_result_unpacks_into_three_and_is_a_dictionary(both: tuple[Path, Result, Result]) -> None:
    """Rule 1."""
    result = both[1]
    influences, harmful, helpful = result
    assert (result[0], result[1], result[2]) == (influences, harmful, helpful) and len(result) == 3
    assert list(result.keys()) == list(influences) and list(result.values()) == list(influences.values())
    assert dict(result.items()) == influences and all(result[k] is influences[k] for k in influences)
    assert "0" in result and result.get("nothing") is None
    assert repr(result).startswith("InfluenceResult(3 test examples x 30 training examples, ")


def test_layout(t: Toy, both: tuple[Path, Result, Result]) -> None:
    """Rules 2 and 3; B16 and B27."""
    for result in both[1:]:
        for key, made in result.items():
            assert list(made) == [
                "label", "num_in_dataset", "time_calc_influence_s", "influence", "harmful", "helpful",
            ]  # fmt: skip
            assert made["num_in_dataset"] == int(key) and type(made["label"]) is int
            assert made["label"] == int(t.test_y[int(key)]) and made["time_calc_influence_s"] > 0
            assert len(made["influence"]) == 30 and all(type(v) is float for v in made["influence"])
            order = sorted(range(30), key=lambda i: (made["influence"][i], i))
            assert made["harmful"] == order
            assert made["helpful"] == sorted(range(30), key=lambda i: (-made["influence"][i], i))


def test_top_lists_are_by_the_mean(both: tuple[Path, Result, Result], t: Toy, tmp_path: Path) -> None:
    """Rule 4."""
    influences, harmful, helpful = both[1]
    mean = np.mean([np.float64(v["influence"]) for v in influences.values()], axis=0)
    assert helpful == np.argsort(-mean, kind="stable").tolist()
    assert harmful == np.argsort(mean, kind="stable").tolist()
    one = calc_img_wise(short(tmp_path), t.model, t.train, TensorDataset(t.test_x[:1], t.test_y[:1]))
    assert one.harmful == one["0"]["harmful"] and one.helpful == one["0"]["helpful"]


@pytest.mark.parametrize(("top_k", "length"), [(5, 5), (500, 30), (None, 30)])
def test_lists_per_item_are_cut_and_those_at_the_top_are_not(
    t: Toy, tmp_path: Path, top_k: int | None, length: int
) -> None:
    """Rule 5."""
    result = calc_img_wise(short(tmp_path, top_k=top_k), t.model, t.train, t.test)
    assert all(len(v["harmful"]) == len(v["helpful"]) == length for v in result.values())
    assert len(result.harmful) == len(result.helpful) == 30


def test_both_modes_give_the_same_numbers(t: Toy, both: tuple[Path, Result, Result], tmp_path: Path) -> None:
    """Rule 9; B21 to B24."""
    _, first, second = both
    assert torch.allclose(first.scores.values, second.scores.values, rtol=1e-12, atol=1e-15)
    assert first.harmful == second.harmful and list(first.keys()) == list(second.keys())
    by_name = calc_influences(short(tmp_path, calc_method="all_grad_then_test"), t.model, t.train, t.test)
    assert by_name.path == tmp_path / "influence_results.json"
    assert calc_influences(short(tmp_path), t.model, t.train, t.test).path == tmp_path / "influence_results_0_1.json"


# --------------------------------------------------------------------------- files


def test_names_of_files(both: tuple[Path, Result, Result], t: Toy) -> None:
    """Rules 8 and 9; B19 to B21."""
    folder, first, second = both
    made = sorted(p.name for p in folder.iterdir())
    metas = [name for name in made if name.startswith("influences_results_meta_0-1")]
    assert len(metas) == 2 and "influences_results_meta_0-1.json" in metas
    assert [x for x in made if x not in metas] == [
        "grad_z",
        "index",
        "influence_results.json",
        "influence_results_0_1.json",
        "s_test",
    ]
    assert json.loads((folder / "influence_results_0_1.json").read_text()) == first.influences
    assert json.loads((folder / "influence_results.json").read_text()) == second.influences
    assert sorted(p.name for p in (folder / "s_test").iterdir()) == [
        f"{i}_recdep6_r2.s_test" for i in sorted(map(int, first.keys()))
    ]
    assert len(list((folder / "grad_z").iterdir())) == 30
    vectors = torch.load(folder / "grad_z" / "7.grad_z", weights_only=True)
    assert [v.shape for v in vectors] == [p.shape for p in t.model.parameters()]
    loss = nn.functional.cross_entropy(t.model(t.x[7:8]), t.y[7:8])
    for v, w in zip(vectors, torch.autograd.grad(loss, list(t.model.parameters())), strict=True):
        assert v.device.type == "cpu" and torch.allclose(v, w, rtol=1e-12)


def test_vectors_on_disk_make_the_result(both: tuple[Path, Result, Result]) -> None:
    """B19 to B22: what was saved is what is loaded."""
    folder, first, _ = both
    key = next(iter(first.keys()))
    mean, every = load_s_test(folder / "s_test", int(key))
    assert len(every) == 1 and all(torch.equal(a, b) for a, b in zip(mean, every[0], strict=True))
    gradients = load_grad_z(folder / "grad_z", 30)
    values, harmful, helpful = calc_influence_function(30, gradients, mean)
    assert np.allclose(values, first[key]["influence"], rtol=1e-12, atol=1e-15)
    assert harmful == first[key]["harmful"] and helpful == first[key]["helpful"]
    # B25: one given, the other read; or both read.
    for given in ({"grad_z_vecs": gradients}, {"e_s_test": mean}, {}):
        again = calc_influence_function(
            30, **given, s_test_dir=str(folder / "s_test"), grad_z_dir=str(folder / "grad_z"), s_test_id=int(key)
        )  # type: ignore[arg-type]
        assert again[0] == pytest.approx(values, rel=1e-9)


def test_calc_s_test_and_calc_grad_z_round_trip(t: Toy, both: tuple[Path, Result, Result], tmp_path: Path) -> None:
    run: dict[str, Any] = {"recursion_depth": 6, "r": 2, "progress": False}
    vectors, save = calc_s_test(t.model, t.test, t.train, tmp_path / "s", **run, start=7)
    assert save == tmp_path / "s" and len(vectors) == 2
    mean, _ = load_s_test(save, 8)
    assert all(torch.equal(a, b) for a, b in zip(mean, vectors[1], strict=True))
    of_run = load_s_test(both[0] / "s_test", int(next(iter(both[1].keys()))))[0]
    assert all(
        gap(a, b) < rounding(b)
        for a, b in zip(
            of_run, calc_s_test(t.model, t.test, t.train, **run)[0][int(next(iter(both[1].keys())))], strict=True
        )
    )
    kept, no = calc_grad_z(t.model, t.train, start=20)
    assert no is False and len(kept) == 10
    stored, where = calc_grad_z(t.model, t.train, tmp_path / "g", pattern="z-{i}.pt")
    assert where == tmp_path / "g" and len(stored) == 30 and len(stored[5:9]) == 4
    assert all(gap(a, b) < rounding(b) for a, b in zip(stored[25], kept[5], strict=True))
    assert all(
        torch.equal(a, b)
        for x, y in zip(load_grad_z(where, pattern="z-{i}.pt"), stored, strict=True)
        for a, b in zip(x, y, strict=True)
    )
    with pytest.raises(InvalidInput, match="start=30 lies outside"):
        calc_grad_z(t.model, t.train, start=30)


def test_gradients_are_kept_in_an_index_that_later_runs_find(
    t: Toy, both: tuple[Path, Result, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted, asked again, asked of other data, of another model: never computed twice, never stale."""
    from pytorch_influence_functions.store import build

    config, folder = short(tmp_path, grad_z_files=False), tmp_path / "index"
    monkeypatch.setattr(build, "SHARD_BYTES", 500)
    shards, encode = 0, build.encode_shard

    def counting(*args: Any) -> Any:
        nonlocal shards
        shards += 1
        if shards == stop:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(build, "encode_shard", counting)
    stop = 3
    with pytest.raises(KeyboardInterrupt):
        calc_all_grad_then_test(config, t.model, t.train, t.test)
    stop = -1
    result = calc_all_grad_then_test(config, t.model, t.train, t.test)
    files = sorted(folder.glob("rows-*"))
    assert len(files) > 4 and shards == len(files) + 1  # the one it was stopped at again, no other
    assert gap(result.scores.values, both[2].scores.values) < rounding(torch.float64, condition=1e3)
    assert not (tmp_path / "grad_z").exists()
    gradients = load_grad_z(folder, 30)
    assert len(gradients[5:9]) == 4 and len(gradients) == 30
    for a, b in zip(
        [gradients[29], gradients[3:9][2]], [calc_grad_z(t.model, t.train)[0][i] for i in (29, 5)], strict=True
    ):
        assert all(v.shape == w.shape and gap(v, w) < rounding(w) for v, w in zip(a, b, strict=True))
    with pytest.raises(InvalidInput, match="holds 30 training gradients and 31 were expected"):
        load_grad_z(folder, 31)
    calc_all_grad_then_test(short(tmp_path, grad_z_files=False, seed=7), t.model, t.train, t.test)
    assert shards == len(files) + 1  # another question computes no gradient again
    other = TensorDataset(torch.cat([t.x[:29], t.x[:1]]), t.y)
    for data, model in ((other, t.model), (t.train, doubled(t.model))):
        expected = calc_img_wise(short(tmp_path / "live"), model, data, t.test)
        again = calc_all_grad_then_test(config, model, data, t.test)
        assert gap(again.scores.values, expected.scores.values) < rounding(torch.float64, condition=1e3)
    assert len(list(folder.glob("rows-*"))) == len(files)


def doubled(model: nn.Module) -> nn.Module:
    """Another model of the same shape."""
    other = nn.Linear(4, 3).double()
    with torch.no_grad():
        other.weight.copy_(2 * model.weight)  # type: ignore[operator]
        other.bias.copy_(model.bias)
    return other


def test_custom_patterns_round_trip(t: Toy, tmp_path: Path) -> None:
    config = short(
        tmp_path,
        grad_z_pattern="{i}-of-{i}.z",
        save_pth=str(tmp_path / "v"),
    )
    config["s_test_pattern"] = "test {i} (depth {d}, r {r}).pt"
    result = calc_all_grad_then_test(config, t.model, t.train, t.test)
    key = int(next(iter(result.keys())))
    assert (tmp_path / "v" / "grad_z" / "3-of-3.z").exists()
    assert (tmp_path / "v" / "s_test" / f"test {key} (depth 6, r 2).pt").exists()
    assert load_s_test(tmp_path / "v" / "s_test", key, pattern=config["s_test_pattern"])[1]
    assert len(load_grad_z(tmp_path / "v" / "grad_z", pattern=config["grad_z_pattern"])) == 30


def test_img_wise_saves_s_test_where_asked(t: Toy, tmp_path: Path) -> None:
    result = calc_img_wise(short(tmp_path, save_pth=str(tmp_path / "v")), t.model, t.train, t.test)
    assert len(list((tmp_path / "v" / "s_test").iterdir())) == len(result.influences)


def test_load_s_test_uses_the_deepest_and_averages(tmp_path: Path) -> None:
    for name, value in {"0_recdep5_r1": 9.0, "0_recdep9_r1": 1.0, "0_recdep9_r2": 3.0, "1_recdep9_r1": 7.0}.items():
        torch.save([torch.full((2,), value)], tmp_path / f"{name}.s_test")
    mean, every = load_s_test(tmp_path, 0)
    assert torch.equal(mean[0], torch.full((2,), 2.0)) and len(every) == 2
    assert torch.equal(load_s_test(tmp_path, 0, r_sample_size=1)[0][0], torch.ones(2))


def test_missing_or_damaged_vectors_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no folder"):
        load_grad_z(tmp_path / "nothing")
    with pytest.raises(InvalidInput, match="holds no file like"):
        load_grad_z(tmp_path)
    torch.save([torch.ones(1)], tmp_path / "0.grad_z")
    torch.save({"a": torch.ones(1)}, tmp_path / "2.grad_z")
    with pytest.raises(InvalidInput, match="lacks training gradients 1;"):
        load_grad_z(tmp_path, 3)
    with pytest.raises(InvalidInput, match="holds no s_test of test example 4"):
        load_s_test(tmp_path, 4)
    (tmp_path / "1.grad_z").write_bytes(b"garbage")
    found = load_grad_z(tmp_path)
    with pytest.raises(InvalidInput, match="cannot be read as a list"):
        found[1]
    with pytest.raises(InvalidInput, match="holds dict"):
        found[2]


def test_partial_results(t: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule 8, B17: one file at a time, whole, and gone at the end unless kept."""
    kept = calc_img_wise(short(tmp_path / "kept", keep_tmp=True), t.model, t.train, t.test)
    names = sorted(p.name for p in (tmp_path / "kept").glob("influence_results_tmp_*"))
    assert names == ["influence_results_tmp_0_1_last-i_0.json", "influence_results_tmp_0_1_last-i_1.json"]
    assert list(json.loads((tmp_path / "kept" / names[0]).read_text())) == list(kept.keys())[:1]

    from pytorch_influence_functions.classic import calc, engine

    seen: list[list[str]] = []
    real = calc._calculate_items

    def watched(run: Any, ids: list[int]) -> Any:
        seen.append(sorted(p.name for p in (tmp_path / "w").glob("*tmp*")))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(run, ids)

    monkeypatch.setattr(calc, "_calculate_items", watched)
    monkeypatch.setattr(engine, "_MOST_ITEMS", 1)
    monkeypatch.setattr(calc._WriteTimer, "due", True)
    with pytest.raises(KeyboardInterrupt):
        calc_img_wise(short(tmp_path / "w"), t.model, t.train, t.test)
    assert seen == [[], ["influence_results_tmp_0_1_last-i_0.json"], ["influence_results_tmp_0_1_last-i_1.json"]]
    assert len(json.loads((tmp_path / "w" / seen[2][0]).read_text())) == 2  # what was done is not lost


def test_names_never_collide(t: Toy, tmp_path: Path) -> None:
    config = short(tmp_path, results_name="mine_{start}_{num}")
    paths = [calc_img_wise(config, t.model, t.train, t.test).path for _ in range(3)]
    assert paths[0] == tmp_path / "mine_0_1.json" and len(set(paths)) == 3
    assert all(p and re.fullmatch(r"mine_0_1_\d{4}(-\d\d){5}(-\d+)?\.json", p.name) for p in paths[1:])
    loaded = InfluenceResult.load(paths[0])  # type: ignore[arg-type]
    assert loaded.harmful == InfluenceResult.load(paths[1]).harmful  # type: ignore[arg-type]
    (tmp_path / "other.json").write_text("[1, 2]")
    with pytest.raises(InvalidInput, match="not a result of calc_img_wise"):
        InfluenceResult.load(tmp_path / "other.json")


def test_save_json_flags(tmp_path: Path) -> None:
    """B31."""
    path = tmp_path / "deep" / "a.json"
    assert save_json({"a": 1}, path) == path
    assert save_json({"a": 2}, path, append_if_exists=True) == path
    assert json.loads(path.read_text()) == [{"a": 1}, {"a": 2}]
    save_json([3], path, append_if_exists=True)
    assert json.loads(path.read_text()) == [{"a": 1}, {"a": 2}, [3]]
    (tmp_path / "two.json").write_text('{"a": 1}\n{"a": 2}\n')
    with pytest.raises(InvalidInput, match=r"two\.json is not one JSON document"):
        save_json({}, tmp_path / "two.json", append_if_exists=True)
    other = save_json({"a": 3}, path)
    assert other != path and other.name.startswith("a_2") and json.loads(other.read_text()) == {"a": 3}
    save_json({"a": 4}, path, overwrite_if_exists=True)
    assert json.loads(path.read_text()) == {"a": 4}
    with pytest.raises(FileExistsError, match="overwrite_if_exists"):
        save_json({}, path, unique_fn_if_exists=False)
    for bad in (torch.ones(1), float("nan")):
        with pytest.raises(InvalidInput, match=r"a\.json cannot be written as JSON"):
            save_json({"a": bad}, path, overwrite_if_exists=True)
    assert json.loads(path.read_text()) == {"a": 4}


# --------------------------------------------------------------------------- seeds, shards, workers


def test_same_seed_same_json(t: Toy, both: tuple[Path, Result, Result], tmp_path: Path) -> None:
    """Rule 11."""
    torch.manual_seed(99)
    random.seed(99)
    again = calc_img_wise(short(tmp_path), t.model, t.train, t.test)
    assert same(again, both[1])
    other = calc_img_wise(short(tmp_path, seed=43), t.model, t.train, t.test)
    assert not same(other, both[1])
    drawn = [
        calc_img_wise(short(tmp_path), t.model, t.train, t.test, generator=torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    ]
    assert same(drawn[0], drawn[1]) and not same(drawn[1], drawn[2])


def test_shards_make_the_whole(t: Toy, tmp_path: Path) -> None:
    """Rule 7."""
    whole = calc_img_wise(short(tmp_path, test_sample_num=3), t.model, t.train, t.test)
    parts = [
        calc_img_wise(short(tmp_path, test_sample_num=n, test_start_index=s), t.model, t.train, t.test)
        for s, n in ((0, 1), (1, 2))
    ]
    union: dict[str, Any] = {}
    for part in parts:
        union |= {k: v["influence"] for k, v in part.items()}
    assert union.keys() == whole.keys() and len(union) == 9
    assert all(union[k] == pytest.approx(v["influence"], rel=1e-9) for k, v in whole.items())
    assert (tmp_path / "influence_results_1_2.json").exists()


@pytest.mark.parametrize("num", [False, None, 0])
def test_all_items_from_start(t: Toy, tmp_path: Path, num: Any) -> None:
    """Rule 7, B1 and B2: the README's own defaults."""
    config = short(tmp_path, test_sample_num=num, test_sample_start_per_class=6)
    result = calc_img_wise(config, t.model, t.train, t.test)
    assert list(result.keys()) == ["6", "7", "8"]
    assert (tmp_path / "influence_results_6_all.json").exists()


def test_too_few_of_a_class(t: Toy, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """B3."""
    with caplog.at_level(logging.WARNING, "pytorch_influence_functions"):
        result = calc_img_wise(short(tmp_path, test_sample_num=2, test_start_index=2), t.model, t.train, t.test)
    assert len(result.influences) == 3 and "has 3 test items, so of the 2 asked for" in caplog.text
    with pytest.raises(InvalidInput, match="lies behind the end of any class"):
        calc_img_wise(short(tmp_path, test_start_index=3), t.model, t.train, t.test)
    with pytest.raises(InvalidInput, match="lies behind the end of the test data, which have 9 items"):
        calc_img_wise(short(tmp_path, test_start_index=9, test_sample_num=False), t.model, t.train, t.test)


def test_two_workers_equal_one(t: Toy, both: tuple[Path, Result, Result], tmp_path: Path) -> None:
    result = calc_img_wise(short(tmp_path, num_workers=2), t.model, t.train, t.test)
    assert gap(result.scores.values, both[1].scores.values) < rounding(torch.float64, condition=1e3)
    assert same(result, both[1])


def test_the_loaders_order_plays_no_part(t: Toy, both: tuple[Path, Result, Result], tmp_path: Path) -> None:
    """B14: indices are positions in the dataset."""
    loader = DataLoader(TensorDataset(t.x, t.y), batch_size=8, sampler=range(29, -1, -1))
    assert same(calc_img_wise(short(tmp_path), t.model, loader, t.test), both[1])


# --------------------------------------------------------------------------- no trace


def test_the_model_and_all_random_states_are_as_before(t: Toy, tmp_path: Path) -> None:
    """B28, rule 11."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    model[0].bias.requires_grad_(False)
    model.train()
    model[1].eval()
    for p in model.parameters():
        p.grad = torch.ones_like(p)

    def state() -> Iterator[Any]:
        yield [m.training for m in model.modules()]
        yield [(p.requires_grad, p.data.tolist(), p.grad.tolist()) for p in model.parameters() if p.grad is not None]
        yield [b.tolist() for b in model.buffers()]
        yield torch.get_rng_state().tolist()
        # Not Python's own generator: whoever checks annotations in this process draws from it.
        yield [str(part) for part in np.random.get_state()]
        yield logging.getLogger("pytorch_influence_functions").level

    before = list(state())
    changes = {"scale": 50, "damp": 0.05, "log_filename": str(tmp_path / "logs" / "run.log")}
    result = calc_img_wise(short(tmp_path, **changes), model, t.train, t.test)
    assert list(state()) == before
    assert len(calc_grad_z(model, t.train)[0][0]) == 5  # the frozen bias is not among them
    assert "LiSSA: scale 50" in (tmp_path / "logs" / "run.log").read_text()
    alone = calc_img_wise(short(tmp_path, scale=50, damp=0.05), model, t.train, t.test, params="3")
    assert not same(alone, result)
    with pytest.raises(InvalidInput):
        calc_img_wise(short(tmp_path), model, t.train, TensorDataset(t.test_x, t.test_y + 5))
    assert list(state()) == before


def test_unused_parameters_have_zeros(t: Toy, both: tuple[Path, Result, Result], tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spare, self.used = nn.Linear(3, 3).double(), t.model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)  # type: ignore[no-any-return]

    result = calc_img_wise(short(tmp_path), Wrapped(), t.train, t.test)
    assert torch.allclose(result.scores.values, both[1].scores.values, rtol=1e-10, atol=1e-14)
    assert not any(bool(v.any()) for v in calc_grad_z(Wrapped(), t.train)[0][3][:2])
