"""Every private name of another library that graphpeft uses is there and works; one test for each file of `compat/`."""

from __future__ import annotations

import ast
import copy
import re
from pathlib import Path

import torch
import transformers as tf
from checks import build
from torch import nn

import graphpeft as gp
from graphpeft.compat import (
    accelerate,
    fake_tensors,
    graph_modules,
    hooks,
    operators,
    pytree,
    regexes,
    sharded,
    tensors,
    transformers_export,
    transformers_keys,
    wrappers,
)

HOUSE = Path(str(gp.__file__)).parent
PRIVATE = re.compile(r"^(torch|transformers|accelerate|torchao|bitsandbytes|peft|onnxruntime)\b.*\._")


def test_private_modules_are_imported_in_compat_alone() -> None:
    for file in HOUSE.rglob("*.py"):
        if HOUSE / "compat" in file.parents:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            assert not [name for name in names if PRIVATE.match(name)], f"{file}: {names}"


def test_pytree() -> None:
    leaves, spec = pytree.tree_flatten({"a": [1, (2, 3)]})
    assert leaves == pytree.tree_leaves({"a": [1, (2, 3)]}) == [1, 2, 3]
    assert pytree.tree_unflatten(leaves, spec) == {"a": [1, (2, 3)]}
    assert pytree.tree_map(lambda n: n + 1, [1, (2,)]) == [2, (3,)]
    assert pytree.tree_map_only(int, lambda n: -n, [1, "x"]) == [-1, "x"]


def test_operators() -> None:
    add, copy = torch.ops.aten.add.Tensor, torch.ops.aten.copy_.default
    assert operators.is_aten(add)
    assert not operators.is_aten(torch.add)
    assert (operators.plain_name(add), operators.is_mutable(add), operators.is_mutable(copy)) == ("add", False, True)


def test_hooks() -> None:
    module, optimizer = nn.Linear(2, 2), torch.optim.SGD(nn.Linear(2, 2).parameters())

    def hook(*_: object) -> None: ...

    assert not hooks.has_pre_hook(module, hook)
    module.register_forward_pre_hook(hook)
    assert hooks.has_pre_hook(module, hook)
    hooks.remove_pre_hook(module, hook)
    assert not hooks.has_pre_hook(module, hook)
    optimizer.register_step_pre_hook(hook)
    assert hooks.step_pre_hooks(optimizer) == [hook]
    assert not hooks.has_global_hooks()
    handle = nn.modules.module.register_module_forward_hook(hook)
    assert hooks.has_global_hooks()
    handle.remove()


def test_fake_tensors() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    with fake_tensors.with_shapes(model) as fitting:
        made = model(fitting(torch.ones(4, 3)))
        assert fake_tensors.is_fake(made)
        assert not fake_tensors.has_value(made)
        assert made.shape == (4, 2)
    assert model.weight.is_meta
    one = torch.ones(3)
    assert fake_tensors.storage(one) == fake_tensors.storage(one[1:]) != fake_tensors.storage(torch.ones(3))


def test_accelerate() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Doubled(ModelHook):
        def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
            return 2 * output

    module, x = nn.Linear(2, 2), torch.ones(1, 2)
    plain = module(x)
    add_hook_to_module(module, Doubled())
    assert {accelerate.INNER, accelerate.HOOK} <= module.__dict__.keys()
    assert accelerate.has_instance_forward(module) is False  # its own hook is known, and is no forward of a user's
    assert torch.equal(module(x), 2 * plain)
    with accelerate.unhooked(module):
        assert torch.equal(module(x), plain)
    assert torch.equal(module(x), 2 * plain)
    assert not accelerate.offloaded(module)


def test_sharded() -> None:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert hasattr(DTensor, "full_tensor")
    assert callable(distribute_tensor)
    assert hasattr(FSDPModule, "reshard")
    assert sharded.full_tensor(one := torch.ones(2)) is one


def test_transformers_export() -> None:
    from transformers.exporters.exporter_onnx import _ONNX_TRANSLATION_TABLE

    model = build("llama").eval()
    assert transformers_export.known(model)
    program = transformers_export.export(model, {"input_ids": torch.ones(2, 3, dtype=torch.long), "use_cache": False})
    assert any(node.op == "call_function" for node in program.graph.nodes)
    assert "forward" not in model.__dict__
    with transformers_export.translating() as table:
        assert table is _ONNX_TRANSLATION_TABLE


def test_transformers_keys() -> None:
    model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                               num_attention_heads=2, num_key_value_heads=2))  # fmt: skip
    names = {name for name, _ in model.named_parameters()}
    held = transformers_keys.origins(model, names)
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert held[weight] == [("model.layers.0.self_attn.q_proj.weight", False)]


def test_transformers_config_chooses_how_experts_are_computed() -> None:
    """`capturing/samples.py` sets this private attribute, without which a loop over the chosen experts has no one graph."""
    config = tf.MixtralConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                              num_key_value_heads=2, num_local_experts=2)  # fmt: skip
    model = tf.MixtralForCausalLM(config)
    assert hasattr(model.config, "_experts_implementation")


def test_the_parser_of_regexes() -> None:
    tree = regexes.parse(r"^(?:a|[b-d]x)*?(?=\d)(?<!xy)(q)\1")
    assert isinstance(tree, regexes.Run)
    assert [type(part).__name__ for part in tree.parts] == ["Spot", "Repeat", "Look", "Look", "Char", "Odd"]
    repeat, behind, char = (tree.parts[i] for i in (1, 3, 4))
    assert isinstance(repeat, regexes.Repeat)
    assert isinstance(repeat.body, regexes.Either)
    assert isinstance(behind, regexes.Look)
    assert (repeat.least, behind.wanted, behind.behind) == (0, False, 2)
    assert isinstance(char, regexes.Char)
    assert [char.fits(each) for each in "qx"] == [True, False]


def test_tensors() -> None:
    tensor = torch.zeros(2, requires_grad=True)
    before = tensors.version(tensor)
    with torch.no_grad():
        tensor.add_(1)
    assert tensors.version(tensor) == before + 1
    with torch.inference_mode():
        assert tensors.version(torch.zeros(2)) == -1
    assert tensors.gradient_hooks(tensor) == []
    tensor.register_hook(print)
    assert tensors.gradient_hooks(tensor) == [print]

    class Kind(torch.Tensor):
        pass

    with torch.device("meta"):
        made = tensors.without_elements(Kind)
    assert type(made) is Kind
    assert made.numel() == 0


def test_graph_modules() -> None:
    module, other = (torch.fx.symbolic_trace(nn.Sequential(nn.ReLU(), *more)) for more in ((), (nn.Tanh(),)))
    x, code, own = torch.randn(3), type(module).forward, module.graph
    graph_modules.put_graph(module, other.graph)
    assert module.graph is other.graph
    assert type(module).forward is code
    assert torch.equal(module(x), x.relu())
    graph_modules.put_graph(module, own)
    module.note = ["kept"]
    graph_modules.carry(module, "note", wanted=True)
    clone = copy.deepcopy(copy.deepcopy(module))
    assert clone.note == ["kept"]
    assert clone.note is not module.note
    graph_modules.carry(module, "other", wanted=False)
    assert not module._deepcopy_hooks


def test_wrappers() -> None:
    model = nn.Linear(2, 2)
    assert wrappers.inner(model) is None
    assert wrappers.inner(torch.compile(model, backend="eager")) is model  # type: ignore[arg-type]
    assert wrappers.inner(nn.DataParallel(model)) is model


def test_hooks_of_state_dicts() -> None:
    def saved(*_: object) -> None: ...

    def loaded(*_: object) -> None: ...

    module = nn.Linear(2, 2)
    module.register_state_dict_post_hook(saved)
    module.register_load_state_dict_pre_hook(loaded)
    hooks.remove_state_hooks(module, saved, loaded)
    assert not module._state_dict_hooks
    assert not module._load_state_dict_pre_hooks
