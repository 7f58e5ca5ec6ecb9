"""Save and load adapters: from a model to a folder and back, in our own format or PEFT's."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import fx, nn

from graphpeft.adapters import places
from graphpeft.ambient import plain
from graphpeft.capture.samples import settled
from graphpeft.chain import Chain, Factor
from graphpeft.errors import AdapterError, CaptureError, FileError
from graphpeft.passes.activate import remove
from graphpeft.passes.initialize import initialize
from graphpeft.passes.insert import check_name, insert, usable
from graphpeft.plan import Entry
from graphpeft.program import Site, stored
from graphpeft.quantized import levels
from graphpeft.quantized import shape as float_shape
from graphpeft.sharded import gathered, written
from graphpeft.state import (
    base_weight,
    branches,
    chains,
    find_state,
    get_state,
    hidden,
    inactive,
    names,
    saved,
    set_active,
)
from graphpeft.steps import step
from graphpeft.store.hub import local, upload
from graphpeft.store.native import DESCRIPTION, AdapterFile, fingerprint, read_adapter, write_adapter
from graphpeft.store.peft_config import CONFIG
from graphpeft.store.peft_read import read_peft
from graphpeft.store.peft_write import write_peft
from graphpeft.survey import survey

Format = Literal["graphpeft", "peft"]


@plain()
def save(model: nn.Module, folder: str | Path, name: str | None = None, format: Format = "graphpeft") -> Path:
    """Write one adapter (the only one, or the one called `name`) to a folder; returns the folder.

    Only what was trained is stored, in the adapter's own dtype. Warns about base parameters that train too, for they
    belong to no adapter.

    With `format="peft"` the folder is one that `peft.PeftModel.from_pretrained(base, folder)` loads to the same outputs. LoRA
    (with rsLoRA) and DoRA go as they are; of a fused projection the whole weight is adapted there, with zeros in the rows
    that no site has, and of its several sites one LoRA of the summed rank. VeRA goes as VeRA. Every other method goes as
    the plain LoRA that it equals, as `gp.lower` makes it, so that it does not load as that method again.

    Of a model sharded by FSDP2 every process has to call it: the tensors are gathered, and the first process writes them.

    Raises `AdapterError`, and writes nothing, if the model has several adapters and none is named, or for a site whose
    update PEFT cannot hold; `FileError` if the folder holds an adapter in the other format.
    """
    if format not in get_args(Format):
        raise AdapterError(f"There is no format {format!r}. Formats: {', '.join(get_args(Format))}.")
    state = get_state(model)
    if name is None and len(state.adapters) > 1:
        raise AdapterError(
            f"{type(model).__name__} has several adapters: {', '.join(state.adapters)}. Say which one to save, as in "
            f"gp.save(model, folder, name={next(iter(state.adapters))!r})."
        )
    (chosen,) = names(model, name)
    loose = [n for n, p in model.named_parameters() if p.requires_grad and n in state.required]
    if loose:
        warnings.warn(
            f"{', '.join(loose[:3])} {'and others train' if len(loose) > 3 else 'train'} too but belong to no adapter, so they "
            f"are not saved with it. Save them yourself: torch.save or safetensors on model.state_dict().",
            stacklevel=2,
        )
    with gathered(model, branches(model, chosen)):
        written(model, Path(folder), partial(_write, model, chosen, format))
    return Path(folder)


def _write(model: nn.Module, name: str, format: Format, folder: Path) -> None:
    other = folder / (DESCRIPTION if format == "peft" else CONFIG)
    if other.exists():
        raise FileError(
            f"{other} is an adapter in another format, which would stay beside this one. Name another folder."
        )
    if format == "peft":
        write_peft(model, name, folder)
        return
    adapter = get_state(model).adapters[name]
    tensors = {key: p for site, chain in chains(model, name).items() for key, p in saved(site, chain)}
    absent = next((key for key, tensor in tensors.items() if tensor.is_meta), None)
    if absent is not None:
        raise AdapterError(
            f"{absent} has no values to save: it is on the meta device. Usually accelerate offloaded the adapter with its "
            f"model. Call dispatch_model before gp.apply, which then leaves the adapter where it trains."
        )
    base = _fingerprint(model, adapter.entries)
    write_adapter(folder, AdapterFile(name, adapter.rules, adapter.seed, adapter.entries, tensors, base))


def push_to_hub(
    model: nn.Module, repo_id: str, name: str | None = None, format: Format = "graphpeft", **options: Any
) -> str:
    """Save an adapter as `save` does, and put it into a repository of the Hugging Face Hub; returns the commit's URL.

    The repository is made if it is not there. `options` are those of `huggingface_hub.upload_folder`, such as `token` and
    `commit_message`, and `private`. Raises as `save` and huggingface_hub do.
    """
    with tempfile.TemporaryDirectory() as folder:
        return upload(save(model, folder, name, format), repo_id, **options)


@plain()
def load(
    model: nn.Module,
    folder: str | Path,
    name: str | None = None,
    *,
    any_base: bool = False,
    strict: bool = True,
    hub: bool = False,
    revision: str | None = None,
) -> nn.Module:
    """Add the adapter of a folder to a model and activate it; returns the model.

    Args:
        folder: one that `save` wrote, or PEFT (LoRA, rsLoRA, DoRA and VeRA in safetensors); or `hub:owner/name`, a repository
            of the Hugging Face Hub.
        name: renames it; an adapter of PEFT's has no name of its own, and is called `default`.
        any_base: other base weights than the adapter was trained on are a warning rather than an error. PEFT's format says
            nothing of them, but for those that it saved too (`modules_to_save`), which are never loaded.
        strict: tensors of PEFT's that are missing, unexpected, or of another shape are an error rather than a warning.
        hub: whether `folder` is `owner/name` of a repository on the Hub. Nothing else asks the Hub.
        revision: of the repository.

    Raises `FileError`, and leaves the model as it was, if the folder is not an intact adapter, does not fit the model, or
    was trained on other base weights.
    """
    place = local(folder, revision, hub)
    content = read(model, place, name, None, any_base=any_base, strict=strict)
    chosen = name or content.name
    before = state.active if (state := find_state(model)) else ()
    attach(model, chosen, content)
    try:
        with step("activate", model):
            set_active(model, (chosen,))
    except BaseException as error:
        remove(model, chosen)
        if before:
            set_active(model, before)
        if isinstance(error, AdapterError):  # what the file says of the model's code is not so
            raise FileError(f"{place} does not fit {type(model).__name__}: {error}") from error
        raise
    return model


def read(
    model: nn.Module, folder: Path, name: str | None, sites: tuple[Site, ...] | None, *, any_base: bool, strict: bool
) -> AdapterFile:
    """What a folder holds, checked against the model; PEFT's names are looked up among `sites`, or all that are found."""
    if (folder / CONFIG).is_file() and not (folder / DESCRIPTION).is_file():
        check_name(model, name or "default")
        found = _sites(model) if sites is None else sites
        content = read_peft(model, folder, found, any_base=any_base, strict=strict)
    else:
        content = read_adapter(folder)
    if name is None and not usable(content.name):
        raise FileError(
            f"{folder} calls its adapter {content.name!r}, which is no name here. Give it another one, with name=."
        )
    check_name(model, name or content.name)
    _check_sites(model, content, folder)
    _check_tensors(content, folder)
    _check_base(model, content, folder, any_base)
    return content


def attach(model: nn.Module, name: str, content: AdapterFile) -> None:
    """Put an adapter onto the model without activating it; if that fails the model is as it was."""
    insert(model, name, content.rules, content.seed, content.entries)
    try:
        initialize(model, name)
        _fill(model, name, content)
    except BaseException:
        remove(model, name)
        raise


def _sites(model: nn.Module) -> tuple[Site, ...]:
    """What dataflow finds; of a model that cannot be captured, nothing, and weights are known by their paths."""
    try:
        with inactive(model), hidden(model), settled(model):
            return survey(model).sites
    except CaptureError:
        return ()


def _check_base(model: nn.Module, content: AdapterFile, folder: Path, any_base: bool) -> None:
    """Base weights are those that the adapter was trained on, but for a cast to bfloat16; PEFT's files do not say."""
    if not content.fingerprint or content.fingerprint == _fingerprint(model, content.entries):
        return
    found = f"{folder} was trained on other base weights than {type(model).__name__} has now."
    if not any_base:
        raise FileError(
            f"{found} Usually another checkpoint was loaded, or it was trained further, or one of the two is quantized or was "
            f"cast to float16. Load the base that the adapter was made for; if the difference is meant, pass any_base=True and "
            f"check the outputs."
        )
    warnings.warn(f"{found} The adapter is loaded as any_base=True asks; check its outputs.", stacklevel=4)


def _fingerprint(model: nn.Module, entries: tuple[Entry, ...]) -> str:
    def weight_of(name: str) -> torch.Tensor:
        found = levels(stored(model, name), model.get_submodule(name.rpartition(".")[0]))
        return base_weight(model, name) if found is None else found

    return fingerprint((e.site.weight for e in entries), weight_of)


def _check_sites(model: nn.Module, content: AdapterFile, folder: Path) -> None:
    """Every weight that the file names is there with the shape it had, before anything is allocated."""
    shapes = {n: float_shape(p, m) for m_path, m in model.named_modules() for n, p in _own(m_path, m)}
    for site in (place for entry in content.entries for place in places(entry.site)):
        shape, wanted = shapes.get(site.weight), _shape(site)
        if shape is None or not _fits(shape, wanted):
            there = f"it is {shape} here" if shape is not None else "it is not there"
            raise FileError(
                f"{folder} does not fit {type(model).__name__}: it adapts {site.weight} of shape {wanted}, and {there}. "
                f"Usually the adapter was trained on another model. Load it on the base it was made for."
            )
        if site.owner and not _has(model, site.owner):
            raise FileError(f"{folder} does not fit {type(model).__name__}: there is no module {site.owner}.")
        held_by = site.weight.rpartition(".")[0]
        if site.form == "weight" and site.owner != held_by and not isinstance(model, fx.GraphModule):
            raise FileError(
                f"{folder}: {site.weight} is to be read as weight + ΔW in {site.owner or 'the model'}, which does not hold it "
                f"itself. The file was changed by hand, or damaged."
            )
    for site in (entry.site for entry in content.entries):
        loose = [p.weight for p in site.tied if stored(model, p.weight) is not stored(model, site.weight)]
        if loose:
            raise FileError(
                f"{folder} does not fit {type(model).__name__}: one adapter serves {site.weight} and {', '.join(loose)}, "
                f"which were one tied tensor and are two here. Tie them as the base model did (tie_word_embeddings)."
            )


def _shape(site: Site) -> tuple[int, ...]:
    """The shape of a site's weight as a matrix, or as a stack of matrices."""
    matrix = (site.inputs, site.full) if site.transposed else (site.full, site.inputs)
    return (site.stack, *matrix) if site.stack else matrix


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a weight is that matrix with inputs or outputs spread over several axes, as a convolution's are."""
    *stack, rows, columns = wanted
    rest = shape[len(stack) :]
    cuts = range(1, len(rest))
    return shape[: len(stack)] == tuple(stack) and any(
        (prod(rest[:i]), prod(rest[i:])) == (rows, columns) for i in cuts
    )


def _own(path: str, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(prefix=path, recurse=False, remove_duplicate=False))


def _has(model: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in model.named_modules(remove_duplicate=False))


def _check_tensors(content: AdapterFile, folder: Path) -> None:
    """The file has the tensors that its sites' methods make, and no others: seen on the meta device, where none is made."""
    wanted: dict[str, tuple[int, ...]] = {}
    try:
        with torch.device("meta"):
            made = [(entry.site, entry.build()) for entry in content.entries]
            _share([chain for _, chain in made])  # what sites share is as wide as the widest needs it
            for site, chain in made:
                wanted |= {key: tuple(tensor.shape) for key, tensor in saved(site, chain)}
    except (AdapterError, RuntimeError, ValueError, OverflowError, TypeError) as error:
        raise FileError(
            f"{folder}: its methods do not fit its sites: {error}. It was changed by hand, or damaged."
        ) from error
    missing, extra = sorted(wanted.keys() - content.tensors.keys()), sorted(content.tensors.keys() - wanted.keys())
    if missing or extra:
        raise FileError(
            f"{folder}: tensors and sites disagree; missing {missing[:3] or 'none'}, unexpected {extra[:3] or 'none'}. "
            f"The file was written by another version or changed by hand."
        )
    for key, shape in wanted.items():
        if tuple(content.tensors[key].shape) != shape:
            found = tuple(content.tensors[key].shape)
            raise FileError(f"{folder}: {key} has shape {found}, the method makes {shape}.")


def _share(chains: Iterable[Chain]) -> None:
    pool: dict[str, Any] = {}
    for chain in chains:
        for place, factor in enumerate(chain.factors):
            assert isinstance(factor, Factor)
            chain.factors[place] = factor.joined(pool)


@torch.no_grad()
def _fill(model: nn.Module, name: str, content: AdapterFile) -> None:
    for site, chain in chains(model, name).items():
        for key, parameter in saved(site, chain):
            parameter.copy_(content.tensors[key])
