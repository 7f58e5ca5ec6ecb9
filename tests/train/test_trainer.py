"""AdapterCallback in a real Trainer: noise, penalties, events, logs, and what is left when training ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import runs
import torch
import transformers as tf
from checks import build
from runs import PRIORS, STEPS, Prior, adapted, losses, plain_loop, state, trainer

import graphpeft as gp
from graphpeft.errors import AdapterError
from graphpeft.rewrite.state import get_state
from graphpeft.train import AdapterCallback, at, every
from graphpeft.train.pac import _redraw

CLOSE = 2e-5
"""float32: losses of size 5 and tensors of size 1, gradients summed in another order through some steps."""


def near(one: dict[str, list[float]], other: dict[str, list[float]]) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        assert values == pytest.approx(other[name], abs=CLOSE), name


def distance(one: dict[str, list[float]], other: dict[str, list[float]]) -> float:
    return max(abs(a - b) for name in one for a, b in zip(one[name], other[name], strict=True))


@pytest.mark.parametrize("prior", PRIORS)
def test_accumulated_steps_are_those_of_the_whole_batch(prior: Prior, tmp_path: Path) -> None:
    """4 × 4 equals 16, and both equal a loop in which noise and penalty are written out."""
    model, pac = adapted(prior)
    before = state(model)
    expected = plain_loop(model, pac, adds=False)
    moved = state(model)
    assert distance(before, moved) > 1e-2
    model, pac = adapted(prior)
    assert plain_loop(model, pac, 4) == pytest.approx(expected, abs=CLOSE)
    near(state(model), moved)
    for micro in (16,) if prior == "closed" else (4,):
        model, pac = adapted(prior)
        run = trainer(
            model,
            tmp_path,
            AdapterCallback(),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=16 // micro,
        )
        run.train()
        assert losses(run) == pytest.approx(expected, abs=CLOSE)
        near(state(model), moved)
        assert pac.step is None


def test_nothing_is_added_without_the_callback(tmp_path: Path) -> None:
    """The control of the test above: without it there is no penalty, and each micro-batch has noise of its own."""
    model, pac = adapted()
    expected = plain_loop(model, pac)
    model, pac = adapted()
    pac.step = 0
    start = pac.kl(model).item()
    run = trainer(model, tmp_path)
    run.train()
    assert not losses(run, "penalty")
    assert losses(run)[0] == pytest.approx(expected[0], abs=CLOSE)  # the noise of step 0
    assert pac.kl(model).item() > 0.9 * start, "nothing pulls"
    model, pac = adapted()
    run = trainer(model, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    run.train()
    assert abs(losses(run)[0] - expected[0]) > 10 * CLOSE


def test_callbacks_add_once_and_leave_nothing(tmp_path: Path) -> None:
    model, pac = adapted()
    plain_loop(model, pac)
    expected = state(model)
    model, pac = adapted()
    attached = []
    run: tf.Trainer

    def look(_: Any) -> None:
        attached.append(len(run.optimizer.optimizer._optimizer_step_pre_hooks))

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    breaks = at(0, stop)
    broken = AdapterCallback(lambda *now: breaks(*now))
    first = AdapterCallback(every(1, look))
    run = trainer(model, tmp_path, first, broken, AdapterCallback())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    breaks = every(1000, stop)
    run.train()
    near(state(model), expected)
    assert attached == [1] * STEPS
    assert not run.optimizer.optimizer._optimizer_step_pre_hooks
    assert _redraw in model._forward_pre_hooks.values()
    pac.detach(model)
    assert _redraw not in model._forward_pre_hooks.values()
    with pytest.raises(AdapterError, match="has no adapters"):
        trainer(build("llama"), tmp_path, AdapterCallback()).train()


def test_resumed_runs_go_on_as_if_uninterrupted(tmp_path: Path) -> None:
    model, _ = adapted("trained")
    run = trainer(model, tmp_path, AdapterCallback(), save_strategy="steps", save_steps=2)
    run.train()
    again, _ = adapted("trained")
    # Trainer restores the state of torch's generator, which the noise does not depend on.
    resumed = trainer(again, tmp_path, AdapterCallback(lambda *now: torch.rand(1)))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == pytest.approx(losses(run), abs=CLOSE)
    assert losses(resumed, "penalty") == pytest.approx(losses(run, "penalty"), abs=CLOSE)
    near(state(again), state(model))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_events_fire_at_optimizer_steps(accumulate: int, tmp_path: Path) -> None:
    model, pac = adapted()
    seen: dict[str, list[int]] = {}
    run: tf.Trainer

    def note(name: str) -> Any:
        return lambda found: seen.setdefault(name, []).append(run.state.global_step if found is model else -1)

    frozen: list[bool] = []
    callback = AdapterCallback(
        at(0, note("0")), at(0.5, pac.freeze), every(3, note("every")), at(1.0, note("end")),
        lambda model, step, total: frozen.append(pac.frozen),
    )  # fmt: skip
    run = trainer(model, tmp_path, callback, per_device_train_batch_size=4, gradient_accumulation_steps=accumulate)
    run.train()
    assert seen == {"0": [0], "every": [3], "end": [4]}
    assert frozen == [False, False, True, True, True]
    assert [p == 0 for p in losses(run, "penalty")] == [False, False, True, True][: len(losses(run, "penalty"))]


def test_evaluation_has_no_noise_and_logs_tell_the_bound(tmp_path: Path) -> None:
    model, pac = adapted()
    run = trainer(
        model, tmp_path, AdapterCallback(), eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=16
    )
    run.train()
    model.eval()
    ids = runs.Rows().ids
    with torch.no_grad():
        mean = model(input_ids=ids, labels=ids).loss.item()
    assert losses(run, "eval_loss")[-1] == pytest.approx(mean, abs=CLOSE)
    assert len(losses(run, "penalty")) == len(losses(run, "pac_kl")) == STEPS
    assert losses(run, "penalty")[-1] == pytest.approx(gp.penalty(model).item(), abs=CLOSE)
    assert losses(run, "pac_kl")[-1] == pytest.approx(pac.kl(model).item(), abs=1e-3)  # a sum of some thousand terms
    assert losses(run, "pac_bound")[-1] == pytest.approx(pac.bound(model, losses(run)[-1]), abs=1e-3)


def test_several_objectives_are_told_apart(tmp_path: Path) -> None:
    model, _ = adapted()
    gp.apply(model, "o:lora", name="second")
    gp.PAC(examples=9).attach(model, "second")
    gp.activate(model, ("default", "second"))
    run = trainer(model, tmp_path, AdapterCallback(), max_steps=1)
    run.train()
    (logged,) = [entry for entry in run.state.log_history if "loss" in entry]
    assert {"pac_kl_default", "pac_kl_second", "pac_bound_default", "pac_bound_second"} <= logged.keys()
    objectives = [a.objective for a in get_state(model).adapters.values()]
    assert logged["penalty"] == pytest.approx(sum(o.penalty(model).item() for o in objectives), rel=1e-6)


def test_half_precision(tmp_path: Path) -> None:
    model, pac = adapted()
    expected = plain_loop(model, pac)
    model, pac = adapted()
    run = trainer(model, tmp_path, AdapterCallback(), bf16=True)
    run.train()
    assert losses(run) == pytest.approx(expected, abs=2e-2)  # products in bfloat16, of 8 bits
    assert losses(run) != pytest.approx(expected, abs=CLOSE)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
