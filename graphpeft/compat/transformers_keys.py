"""Which stored tensor is which weight: transformers renames some, and computes some from others, while it loads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def origins(model: Any, keys: Iterable[str]) -> dict[nn.Parameter, list[tuple[str, bool]]]:
    """For every parameter of a transformers model, the keys of a checkpoint that hold it, under any of its tied names.

    The flag with each key says whether transformers converts the tensor (splits, stacks, permutes it), so that it
    differs from the parameter. A parameter that is computed from others may be missing altogether.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    # These are from_pretrained's calls in its order of keys, because some renamings keep state between keys.
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    prefix, names = model.base_model_prefix, model.state_dict()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: dict[nn.Parameter, list[tuple[str, bool]]] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, names)
        if name not in names and key in names:
            name, pattern = rename_source_key(key, [], [], prefix, names)
        if name in parameters:
            found.setdefault(parameters[name], []).append((key, pattern is not None))
    return found
