"""Which cells there are, against made-up results."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from helpers.grids import finish, grid, peak

from cbn_convert.comparison.config import ComparisonConfig, read_norm
from cbn_convert.comparison.plan import Cell, Column, columns, needed
from cbn_convert.comparison.summary import Comparison
from cbn_convert.errors import RunError
from cbn_convert.training.config import FinetuneConfig


@pytest.mark.parametrize("best", [1e-5, 1e-4, 3e-3, 2e-2, 1.0])
def test_the_best_rate_has_a_worse_one_on_either_side(best: float) -> None:
    config = grid(norms=("cbn",))
    results = finish(config, peak(best))
    (column,) = columns(config)
    tried = sorted(cell.lr for cell in results if cell.seed == 0)
    chosen = column.best(results)
    assert chosen is not None
    place = tried.index(chosen)
    assert 0 < place < len(tried) - 1
    assert abs(math.log10(chosen / best)) <= 0.25 + 1e-2  # half a step of √10
    assert len(results) == len(tried) + 2  # the other two seeds at the chosen rate only
    assert {cell.lr for cell in results if cell.seed} == {chosen}


def test_what_is_run_does_not_depend_on_the_order() -> None:
    config = grid(norms=("bn", "frozen", "cbn"), batch_sizes=(1, 4), reference=32)
    expected = finish(config, peak(3e-4))
    for seed in range(5):
        assert finish(config, peak(3e-4), random.Random(seed)) == expected


def test_a_list_of_rates_is_tried_as_it_is() -> None:
    config = grid(norms=("cbn",), lrs=(1e-4, 1e-2), seeds=2)
    assert set(finish(config, peak(1e-2))) == {
        Cell("cbn", 2, 1e-4, 0), Cell("cbn", 2, 1e-2, 0), Cell("cbn", 2, 1e-2, 1)
    }  # fmt: skip


def test_what_learns_nothing_or_fails_ends_soon() -> None:
    flat = finish(grid(norms=("bn",)), lambda cell: 10.0)
    assert len(flat) == 3 + 2
    failing = finish(grid(norms=("bn",)), lambda cell: None)
    assert {cell.seed for cell in failing} == {0}
    assert sorted(cell.lr for cell in failing)[:2] == [3e-6, 9.49e-6]  # lower rates only, and not for ever
    assert len(failing) == 8
    row = Comparison.of(grid(norms=("bn",)), failing).rows[0]
    assert (row.top1, row.lr, row.failed, row.failure) == (None, None, 8, "the loss is no longer finite")


def test_where_high_rates_fail_lower_ones_are_found() -> None:
    config = grid(norms=("bn",))
    results = finish(config, lambda cell: None if cell.lr > 2e-4 else peak(1e-4)(cell))
    assert columns(config)[0].best(results) == 9.49e-5
    endless = finish(config, lambda cell: 50 - 1e5 * cell.lr)
    assert columns(config)[0].best(endless) == 3e-6


def test_a_best_rate_at_the_edge_is_told() -> None:
    def edge(config: ComparisonConfig, best: float) -> bool:
        return Comparison.of(config, finish(config, peak(best))).rows[0].at_edge

    config = grid(norms=("cbn",), lrs=(1e-4, 1e-3, 1e-2))
    assert [edge(config, best) for best in (1e-4, 1e-3, 1e-1)] == [True, False, True]
    assert not edge(grid(norms=("cbn",), lrs=(1e-3,)), 1e-1)
    assert [edge(grid(norms=("cbn",)), best) for best in (1e-3, 1e-9)] == [False, True]


def test_more_of_everything_keeps_what_is_done() -> None:
    small = finish(grid(seeds=1), peak(3e-3))
    large = grid(seeds=2, batch_sizes=(2, 4), norms=("bn", "cbn", "gn"))
    assert set(small) <= set(needed(large, small))


def test_seeds_begin_with_that_of_the_run() -> None:
    config = grid(norms=("cbn",), run=FinetuneConfig(data="d", model="m", output="o", seed=7))
    assert {cell.seed for cell in finish(config, peak(3e-3))} == {7, 8, 9}


def test_the_reference_is_a_column_of_its_own_unless_it_is_one_already() -> None:
    assert grid(reference=32).columns == [("bn", 2), ("cbn", 2), ("bn", 32)]
    assert grid(reference=2).columns == [("bn", 2), ("cbn", 2)]
    assert grid(reference=0).columns == [("bn", 2), ("cbn", 2)]
    assert grid(norms=("cbn",), reference=2).columns == [("cbn", 2), ("bn", 2)]


def test_names_of_folders_differ() -> None:
    config = grid(norms=("cbn", "cbn:taylor", "cbn:window=4", "cbn:window=16"), batch_sizes=(1, 2, 16))
    cells = list(finish(config, peak(3e-4)))
    cells += [Cell("cbn", 2, 0.01, 0), Cell("cbn", 2, 0.010001, 0)]
    assert len({cell.name for cell in cells}) == len(cells)
    assert all(set(cell.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_.-+") for cell in cells)


@pytest.mark.parametrize(
    ("norm", "settings"),
    [
        ("bn", {"norm": "bn"}),
        ("cbn:taylor:current:ring:window=8", {
            "norm": "cbn", "compensation": "taylor", "gradient": "current", "history": "ring", "window": 8,
        }),
        ("cbn:none:burn_in=10", {"norm": "cbn", "compensation": "none", "burn_in": 10}),
        ("frozen:head_lr_scale=0.1", {"norm": "frozen", "head_lr_scale": 0.1}),
        ("cbn:window=4:head_lr_scale=1e1", {"norm": "cbn", "window": 4, "head_lr_scale": 10.0}),
    ],
)  # fmt: skip
def test_a_variant_is_made_of_settings(norm: str, settings: dict[str, Any]) -> None:
    assert read_norm(norm) == settings
    cell = grid(norms=(norm,)).cell(norm, 4, 0.1, 3)
    assert {name: getattr(cell, name) for name in settings} == settings
    assert (cell.batch_size, cell.lr, cell.seed) == (4, 0.1, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norms": ("bm",)}, "norm must be one of cbn, bn, frozen, tune, gn, brn, got 'bm'"),
        ({"norms": ("bn:taylor",)}, "'bn:taylor' has the unknown part 'taylor'; bn can have head_lr_scale=N"),
        ({"norms": ("cbn:tailor",)}, "'cbn:tailor' has the unknown part 'tailor'; cbn can have projection,"),
        ({"norms": ("cbn:window=x",)}, "has the unknown part 'window=x'"),
        ({"norms": ("cbn:window=0",)}, "window must be at least 1"),
        ({"norms": ()}, "the norms must be different and at least one, got -"),
        ({"norms": ("bn", "bn")}, "the norms must be different"),
        ({"batch_sizes": (0,)}, "batch sizes must be whole numbers of at least 1, got 0"),
        ({"batch_sizes": (2, 2)}, "the batch sizes must be different"),
        ({"lrs": (0.0,)}, "learning rates must be numbers above 0"),
        ({"lrs": (math.nan,)}, "learning rates must be numbers above 0"),
        ({"seeds": 0}, "seeds must be a whole number of at least 1, got 0"),
        ({"seeds": "3"}, "seeds must be a whole number of at least 1, got '3'"),
        ({"reference": None}, "reference must be a whole number of at least 0, got None"),
        ({"images": 0}, "images must be a whole number of at least 1, got 0"),
        ({"norms": ("cbn:taylor:none",)}, "'cbn:taylor:none' sets compensation twice"),
        ({"norms": ("cbn:window=4:window=8",)}, "sets window twice"),
        ({"norms": ("cbn:window=²",)}, "has the unknown part 'window=²'"),
        ({"norms": ("cbn:window=4", "cbn:window=04")}, "the norms cbn:window=4 and cbn:window=04 are the same"),
        ({"norms": ("cbn", "cbn:projection")}, "the norms cbn and cbn:projection are the same"),
        ({"norms": ("gn", "gn:head_lr_scale=1")}, "the norms gn and gn:head_lr_scale=1 are the same"),
        ({"norms": ("gn:head_lr_scale=1_0",)}, "has the unknown part 'head_lr_scale=1_0'"),
        ({"norms": ("gn:head_lr_scale=.",)}, "has the unknown part 'head_lr_scale=.'"),
        ({"norms": ("gn:head_lr_scale=x",)}, "has the unknown part 'head_lr_scale=x'"),
        ({"norms": ("gn:head_lr_scale",)}, "has the unknown part 'head_lr_scale'"),
        ({"norms": ("gn:head_lr_scale=0",)}, "head_lr_scale must be above 0 and below inf, got 0.0"),
        ({"norms": ("gn:head_lr_scale=inf",)}, "has the unknown part 'head_lr_scale=inf'"),
        ({"run": FinetuneConfig(data="d", model="m", output="o", seed=2**31 - 1)}, "seed must be at least 0 and below"),
        ({"run": FinetuneConfig(data="d", model="m", output="o", eval_every=5)}, "eval_every would give runs of other"),
        ({"run": FinetuneConfig(data="d", model="m", output="o", max_steps=5)}, "max_steps would give runs of other"),
        ({"run": FinetuneConfig(data="d", model="m", output="o", patience=5)}, "patience would give runs of other"),
        ({"run": FinetuneConfig(data="d", model="m", output="o", epochs=0)}, "epochs must be at least 1"),
        (
            {"run": FinetuneConfig(data="d", model="m", output="o", opt="lion")},
            "lr has no automatic value for opt 'lion'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError) as caught:
        grid(**changes).check()
    assert message in str(caught.value)


def test_settings_survive_json() -> None:
    import json

    config = grid(run=FinetuneConfig(data="d", model="m", output="o", mean=(0.1, 0.2, 0.3)), lrs=(0.1, 0.2))
    assert ComparisonConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_column_follows_the_automatic_rate_of_its_batch_size() -> None:
    for size in (1, 8):
        column = Column(grid(batch_sizes=(size,)), "cbn", size)
        rates = {cell.lr for cell in column.needed({})}
        assert any(lr == pytest.approx(3e-3 * math.sqrt(size / 2), rel=1e-2) for lr in rates)
