"""Adapters in Hugging Face's Trainer: penalties, events and noise, step by step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from graphpeft.train.events import Event, fire
from graphpeft.train.penalty import add_penalties, objectives, penalty


class AdapterCallback(TrainerCallback):
    """A callback for a Trainer whose model `gp.apply` adapted: `callbacks=[AdapterCallback(*events)]`.

    The gradient of `gp.penalty` is added once per optimizer step, after clipping, so it is not clipped itself. PAC's noise
    is drawn once per step. It is the same in all micro-batches and processes, and in a run resumed at that step. `events`
    (see `graphpeft.train.events`) fire before each step and after the last.

    Logs of the loss also contain `penalty`, and for a PAC objective `pac_kl` and `pac_bound`, with the adapter's name as a
    suffix if there are several. Trainer calls reporters such as TensorBoard before later callbacks; to report these values
    too, move this callback to the front of `trainer.callback_handler.callbacks`.

    Raises `AdapterError` when training begins, if the model has no adapters.
    """

    def __init__(self, *events: Event) -> None:
        self.events = events
        self._handle: RemovableHandle | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._release()  # left by an interrupted run
        self._handle = add_penalties(given["model"], given["optimizer"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        model = given["model"]
        fire(self.events, model, state.global_step, state.max_steps)
        for objective in objectives(model).values():
            objective.step = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        model = given["model"]
        fire(self.events, model, state.global_step, state.max_steps)
        for objective in objectives(model).values():
            objective.step = None
        self._release()

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        logs = given["logs"]
        if "loss" in logs:
            found = _report(given["model"], logs["loss"])
            logs.update(found)
            state.log_history[-1].update(found)  # Trainer copied the logs there before this callback

    def _release(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None


@torch.no_grad()
def _report(model: nn.Module, loss: float) -> dict[str, float]:
    found = {"penalty": float(penalty(model))}
    every = objectives(model)
    for name, objective in every.items():
        suffix = f"_{name}" if len(every) > 1 else ""
        found[f"pac_kl{suffix}"] = float(objective.kl(model))
        found[f"pac_bound{suffix}"] = objective.bound(model, loss)
    return found
