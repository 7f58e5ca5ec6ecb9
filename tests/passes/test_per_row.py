"""Each row of a batch has an adapter of its own: what it gets is what that adapter alone gives the whole batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from checks import Snapshot, adapters, build, call, delta, inputs, outputs, randomize, same
from torch import nn

import graphpeft as gp
from graphpeft.errors import AdapterError

NAMES = ["one", None, "two", "one", "three"]
RULES = {"one": "qv:lora(r=2)", "two": "o:dora(r=2); mlp:lora(r=3)", "three": "linear:rlora; embed:lora(r=2)"}


def stretched(value: Any, count: int) -> Any:
    """A call with another batch: rows of the example and turned ones, so that no two are alike."""
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return value
    return torch.stack([value[i % len(value)].roll(i // len(value), 0) for i in range(count)])


def adapted(name: str, rules: dict[str, str] = RULES) -> tuple[nn.Module, Any]:
    """A float64 model with the adapters, none of them active, and a call with five rows."""
    model = build(name, dtype=torch.float64)
    example = call(name, model)
    for seed, (each, text) in enumerate(rules.items()):
        gp.apply(model, text, name=each, inputs=inputs(name, model))
        randomize(model, each, seed=seed, std=0.2)
    gp.activate(model, None)
    return model, torch.utils._pytree.tree_map(lambda leaf: stretched(leaf, len(NAMES)), example)


def apart(model: nn.Module, example: Any, names: list[str | None] = NAMES) -> list[torch.Tensor]:
    """Every adapter on the whole batch, and of each row the result of its own."""
    results = {}
    for name in dict.fromkeys(names):
        gp.activate(model, name)
        results[name] = outputs(model, example)
    gp.activate(model, None)
    return [torch.stack([results[name][k][i] for i, name in enumerate(names)]) for k in range(len(results[names[0]]))]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "hand_written"])
def test_rows_are_those_of_single_adapters(name: str) -> None:
    model, example = adapted(name, RULES if name != "hand_written" else dict.fromkeys(RULES, "linear:lora(r=2)"))
    expected, base, before = apart(model, example), outputs(model, example), Snapshot.of(model)
    with gp.per_row(model, NAMES) as use:
        # float64: a product of fewer rows may be summed in another order.
        assert delta(outputs(model, example), expected) < 1e-12
        use([None, "three", "one", None, None])
        others = outputs(model, example)
    before.check(model)
    assert same(outputs(model, example), base)
    assert delta(others, apart(model, example, [None, "three", "one", None, None])) < 1e-12
    moved = [max(float((e[i] - b[i]).abs().max()) for e, b in zip(expected, base, strict=True)) for i in range(5)]
    assert [m > 1e-3 for m in moved] == [n is not None for n in NAMES]


class Flattened(nn.Module):
    """Reads the positions of all rows in one axis, as routers of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def test_flattened_rows() -> None:
    model = Flattened().double()
    for seed, name in enumerate(RULES):
        gp.apply(model, "path(inner):lora(r=2)", name=name, inputs=(torch.randn(2, 3, 8).double(),))
        randomize(model, name, seed=seed)
    example = ((torch.randn(5, 4, 8).double(),), {})
    expected = apart(model, example)
    with gp.per_row(model, NAMES):
        # float64: a product of fewer rows may be summed in another order.
        assert delta(outputs(model, example), expected) < 1e-12


def test_an_exported_program() -> None:
    """Its batch is that of the example."""
    model = build("gpt2", dtype=torch.float64)
    args, kwargs = call("gpt2", model)
    program = torch.export.export(model, args, {**kwargs, "use_cache": False}, strict=False)
    graph = gp.apply(program, "qv:lora(r=2)", name="one")
    gp.apply(graph, "o:dora(r=2); mlp:lora(r=2)", name="two")
    for name in ("one", "two"):
        randomize(graph, name, std=0.2)
    gp.activate(graph, None)
    example = (args, {**kwargs, "use_cache": False})
    expected = apart(graph, example, ["two", "one"])
    with gp.per_row(graph, ["two", "one"], inputs=example[1]):
        assert delta(outputs(graph, example), expected) < 1e-12


def test_rows_train_their_own_adapters() -> None:
    model, (_, kwargs) = adapted("llama")
    with gp.per_row(model, NAMES):
        (model(**kwargs).logits ** 2).sum().backward()
    found = {name: [p.grad.clone() for p in adapters(model, name).values()] for name in RULES}
    for name, gradients in found.items():
        model.zero_grad()
        gp.activate(model, name)
        mine = [i for i, each in enumerate(NAMES) if each == name]
        (model(**{key: value[mine] for key, value in kwargs.items()}).logits ** 2).sum().backward()
        alone = [p.grad for p in adapters(model, name).values()]
        # float64: gradients of size up to 1e3, summed in another order.
        assert delta(gradients, alone) < 1e-9 < max(float(g.abs().max()) for g in alone)


@pytest.mark.parametrize(("name", "beams"), [("llama", 1), ("llama", 3), ("t5", 2)])
def test_generation(name: str, beams: int) -> None:
    """Of an encoder-decoder only the decoder sees rows repeated by beams."""
    model, _ = adapted(name, {"one": "qv:lora(r=2)", "two": "attn:lora(r=2)"})
    model.generation_config.eos_token_id = None
    prompt = torch.randint(3, 100, (3, 6), generator=torch.Generator().manual_seed(0))
    options = dict(num_beams=beams, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(prompt))
    names, expected = ["two", None, "one"], []
    for i, each in enumerate(names):
        gp.activate(model, each)
        expected.append(model.generate(prompt, **options)[i].tolist())
    gp.activate(model, None)
    with gp.per_row(model, names, beams=beams):
        assert model.generate(prompt, **options).tolist() == expected
    plain = model.generate(prompt, **options).tolist()
    assert [a == b for a, b in zip(plain, expected, strict=True)] == [False, True, False]


def test_compiled_without_a_break() -> None:
    model, example = adapted("llama", {"one": "qv:lora(r=2)", "two": "mlp:rlora"})
    expected = apart(model, example, ["one", "two", None, "two", "one"])
    with gp.per_row(model, ["one", "two", None, "two", "one"]):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert delta(outputs(compiled, example), expected) < 1e-12
    torch._dynamo.reset()


def test_copies_go_their_own_way() -> None:
    model, example = adapted("llama")
    expected = apart(model, example)
    with gp.per_row(model, NAMES) as use:
        clone = copy.deepcopy(model)
        use([None] * 5)
        assert delta(outputs(clone, example), expected) < 1e-12


class LengthFirst(nn.Module):
    """Reads (length, batch, features), as torch's own encoders do; the batch is the other axis."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("length", [4, 3])  # 4 is a multiple of the batch: sizes alone would not tell
def test_a_batch_on_another_axis_is_refused(length: int) -> None:
    model = LengthFirst()
    gp.apply(model, "path(inner):lora(r=2)", inputs=(torch.randn(2, length, 8),))
    before = Snapshot.of(model)
    with (
        pytest.raises(AdapterError, match=r"inner.weight .* no rows of the batch"),
        gp.per_row(model, ["default", None]),
    ):
        pass
    before.check(model, adapted=True)
    with pytest.raises(AdapterError, match="batch of 1"), gp.per_row(model, ["default"], inputs=(torch.ones(1, 3, 8),)):
        pass


def test_lists_that_do_not_fit() -> None:
    model, example = adapted("llama")
    gp.activate(model, "two")
    with gp.per_row(model, ["one", None]) as use:
        with pytest.raises(AdapterError, match=r"got 5 rows, and gp\.per_row was told the adapters of 2"):
            outputs(model, example)
        with pytest.raises(AdapterError, match="'two', which takes no part"):
            use(["two"])
    for wrong, said in ((["gone"], "no adapter 'gone'"), ([], "of no rows")):
        with pytest.raises(AdapterError, match=said), gp.per_row(model, wrong):
            pass
    gp.merge(model)
    with pytest.raises(AdapterError, match="merged"), gp.per_row(model, NAMES):
        pass
    gp.unmerge(model)
    with pytest.raises(AdapterError, match="cannot name an adapter"):
        gp.apply(model, "q:lora", name="by_row")


@pytest.mark.parametrize(
    ("name", "rules", "said"),
    [
        ("torch_encoder", "qv:lora(r=2)", "takes the weight form"),
        ("gpt2", "qv:dora(r=2)", "is read as weight"),  # of a fused projection DoRA takes the norm of some rows
        ("llama", "qv:blora(r=2, quantize=all)", "rounds its input"),
    ],
)
def test_what_serves_the_whole_batch_is_refused(name: str, rules: str, said: str) -> None:
    model = build(name)
    gp.apply(model, rules, inputs=inputs(name, model))
    randomize(model)
    example = call(name, model)
    before = outputs(model, example)
    with pytest.raises(AdapterError, match=said), gp.per_row(model, ["default", None]):
        pass
    assert same(outputs(model, example), before)
