"""The claims' benchmark: criteria can say yes and no, parts are disjoint, seeds are paired, the page is what results say."""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "claims"))

import adapting  # noqa: E402
import criteria  # noqa: E402
import criteria_few_shot  # noqa: E402
import criteria_gates  # noqa: E402
import digits  # noqa: E402
import docstrings  # noqa: E402
import few_shot  # noqa: E402
import gates  # noqa: E402
import names  # noqa: E402
import page  # noqa: E402
import results  # noqa: E402
from paired import difference  # noqa: E402
from run_record import Run  # noqa: E402

SEEDS = range(6)
LM = adapting.TASKS["language model"]


def few_shot_runs(**points: float) -> list[dict[str, Any]]:
    """Every arm at 50 plus its points, and a little that differs by seed and arm."""
    return [
        {"data": "digits", "method": "rlora(r=64)", "k": 2, "setting": {"arm": arm}, "seed": seed,
         "accuracy": 50 + points.get(arm, 0.0) + seed + 0.1 * ((seed * place) % 3)}
        for place, arm in enumerate(few_shot.ARMS) for seed in SEEDS
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("points", "holds"),
    [
        ({"pac": 3.0, "decay": 1.0}, True),
        ({"pac": 0.0}, False),
        ({"pac": -3.0}, False),
        ({"pac": 3.0, "decay": 5.0}, False),
        ({"pac": 3.0, "noise": 5.0}, False),
    ],
)
def test_pac_helps_only_if_it_beats_all_controls(points: dict[str, float], holds: bool) -> None:
    assert criteria_few_shot.verdicts(few_shot_runs(**points))[0].holds is holds


def gate_runs(shares: list[float], lost: float) -> list[dict[str, Any]]:
    lambdas = [0.0, 1e-4, 1e-3, 1e-2]
    rows = [(None, 1.0, 0.0), *((lam, s, lost * (lam > 0)) for lam, s in zip(lambdas, shares, strict=True))]
    return [
        {"lam": lam, "seed": seed, "accuracy": 80 + seed % 3 - less, "share": {"adapters": share}}
        for lam, share, less in rows for seed in SEEDS
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("shares", "lost", "holds"),
    [
        ([1.0, 0.4, 0.3, 0.1], 1.0, [True, True]),
        ([1.0, 0.4, 0.3, 0.1], 3.0, [False, True]),
        ([1.0, 0.9, 0.8, 0.7], 0.0, [False, True]),
        ([1.0, 0.4, 0.5, 0.1], 1.0, [True, False]),
    ],
)
def test_b_lora_has_to_save_half_and_fall(shares: list[float], lost: float, holds: list[bool]) -> None:
    assert [verdict.holds for verdict in criteria_gates.verdicts(gate_runs(shares, lost))] == holds


def adapted(gain: dict[str, float], lr: float = 0.01) -> criteria.Results:
    """Runs whose bits per byte fall from 3 by `gain`, a third of it after 25 steps; 0.5 for methods not named."""
    sizes = {"lora(r=1)": 100, "melora(n=8, r=1)": 100, "vera(r=64)": 80, "vera(r=256)": 200, "rlora(r=64)": 80}
    runs = [
        Run(method, rate, seed, sizes.get(method, 800), {0: 3.0, 25: 3 - won / 3, 150: 3 - won}, (8 if "n=8" in method else 1,))
        for method in LM.methods for rate in (lr, LM.equal) for seed in SEEDS
        for won in [gain.get(method, 0.5) + 0.001 * ((seed * len(method)) % 4)]
    ]  # fmt: skip
    return criteria.Results(runs, dict.fromkeys(LM.methods, lr))


def test_the_criteria_of_e1_to_e3_say_yes_and_no() -> None:
    better = dict.fromkeys(("olora(r=8)", "melora(n=8, r=1)", "rlora(r=64)", "vera(r=64)"), 0.6)
    yes = criteria.verdicts(LM, adapted(better))
    assert len(yes) == len(criteria.CRITERIA)
    assert [v.claim for v in yes if not v.holds] == []
    worse = dict.fromkeys(("olora(r=8)", "melora(n=8, r=1)", "rlora(r=64)"), 0.2)
    no = criteria.verdicts(LM, adapted(worse | {"vera(r=64)": 0.25, "vera(r=256)": 0.3}))
    assert [v.claim for v in no if v.holds] == ["MELoRA has n times the rank at equal parameters"]


def test_accuracy_rises_where_bits_fall() -> None:
    run = Run("lora(r=1)", 0.01, 0, 1, {0: 10.0, 5: 30.0}, (1,))
    assert criteria.Results([run], {"lora(r=1)": 0.01}, falls=False).gain("lora(r=1)") == {0: 20.0}
    assert criteria.Results([run], {"lora(r=1)": 0.01}, falls=True).gain("lora(r=1)") == {0: -20.0}


def test_differences_need_equal_seeds() -> None:
    with pytest.raises(ValueError, match="not paired"):
        difference({0: 1.0, 1: 2.0}, {0: 1.0, 2: 2.0})


def test_a_sweep_goes_on_where_its_best_rate_is_at_an_end() -> None:
    assert adapting.beyond({0.01: 1.0, 0.03: 2.0, 0.1: 1.5}, falls=False) == []
    assert adapting.beyond({0.01: 1.0, 0.03: 2.0}, falls=False) == [0.09]
    assert adapting.beyond({0.01: 1.0, 0.03: 2.0}, falls=True) == [0.003]


def test_no_image_no_script_and_no_class_is_in_two_parts() -> None:
    sets: list[list[set[Any]]] = [
        [set(part) for part in digits.PARTS.values()],
        [
            {s for s, part in names.scripts().items() if part == name}
            for name in ("source", "train", "validation", "test")
        ],
        [{text.group for text in part} for part in docstrings.split().values()],
    ]
    for parts in sets:
        assert all(parts)
        assert not any(one & other for one, other in combinations(parts, 2))


def test_shots_are_a_function_of_the_seed_and_balanced() -> None:
    data = digits.part("train")
    first, again, other = (digits.shots(data, 3, seed) for seed in (0, 0, 1))
    assert first.x.equal(again.x)
    assert not first.x.equal(other.x)
    assert first.y.bincount().tolist() == [3] * 10


def test_reported_seeds_are_paired_and_chose_nothing() -> None:
    for task in adapting.TASKS.values():
        kept = results.read(task.module)
        seeds = {(run["method"], run["lr"]): set() for run in kept["runs"]}
        for run in kept["runs"]:
            seeds[run["method"], run["lr"]].add(run["seed"])
        assert len(set(map(frozenset, seeds.values()))) == 1
        assert not {run["seed"] for run in kept["tuning"]} & set.union(*seeds.values())
    runs = results.read("few_shot")["runs"]
    for cell in {(run["data"], run["method"], run["k"]) for run in runs}:
        by_arm = {arm: set(criteria_few_shot.accuracies(runs, *cell, arm)) for arm in few_shot.ARMS}
        assert len(set(map(frozenset, by_arm.values()))) == 1
        assert max(by_arm["none"]) < few_shot.TUNING
    for name in page.LENGTHS:
        kept = results.read(name)
        by_lam = {
            frozenset(criteria_gates.by_seed(kept["runs"], lam))
            for lam in (None, *criteria_gates.lambdas(kept["runs"]))
        }
        assert len(by_lam) == 1
        assert not {run["seed"] for run in kept["tuning"]} & set.union(*map(set, by_lam))


def test_verdicts_are_what_the_criteria_make_of_the_runs() -> None:
    for task in adapting.TASKS.values():
        said = [(v["claim"], v["holds"]) for v in results.read(task.module)["verdicts"]]
        assert said == [(v.claim, v.holds) for v in criteria.verdicts(task, page.loaded(task))]
    for name, judge in {"few_shot": criteria_few_shot, "gates": criteria_gates}.items():
        kept = results.read(name)
        assert [v["holds"] for v in kept["verdicts"]] == [v.holds for v in judge.verdicts(kept["runs"])]


def test_the_page_says_what_the_results_say() -> None:
    text = page.PAGE.read_text()
    assert page.render(text, page.blocks()) == text
    for plot in ("quality", "olora", "few_shot", "gates"):
        assert f"claims/{plot}.svg" in text
        assert (page.PAGE.parent / "claims" / f"{plot}.svg").stat().st_size < 100_000


@pytest.mark.slow
def test_every_experiment_runs() -> None:
    for arm in ("none", "decay", "noise", "pac"):
        setting = next(setting for setting in few_shot.SETTINGS if setting.arm == arm)
        found = few_shot.work(few_shot.Job("digits", "rlora(r=64)", 2, setting, 0.1, 0, 3))
        assert 0 <= found["accuracy"] <= 100
        assert ("kl" in found) == (arm in ("noise", "pac"))
    assert few_shot.work(few_shot.Job("names", "lora(r=4)", 4, few_shot.SETTINGS[0], 0.01, 0, 3))["accuracy"] > 10
    found = gates.work(gates.Job(1e-2, 1, 1e-2, 0, 3))
    assert found["gated"] == pytest.approx(found["accuracy"], abs=1)
    for task in adapting.TASKS.values():
        run = adapting.work(adapting.Job(task, "lora(r=1)", 1e-3, 0, 6, "validation"))
        assert max(run.curve) == 6
        assert set(run.ranks) == {1}
