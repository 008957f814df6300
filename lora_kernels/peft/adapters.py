"""Save and load the adapters of models made of `LoRALinear`, in PEFT's own file formats only.

    folder/adapter_model.safetensors    base_model.model.<layer>.lora_A.weight [r, in], ….lora_B.weight [out, r]
                                        base_model.model.<module>.<part>, of modules that are trained whole
    folder/adapter_config.json          the fields of PEFT's `LoraConfig`

`PeftModel.from_pretrained(model, folder)` reads files that `save_adapter` writes, and `load_adapter` reads files that
PEFT's `save_pretrained` writes for plain LoRA on linear layers, number for number. `load_adapter` refuses a
configuration beyond the computation of `LoRALinear`, and refuses pickle, because pickle runs code when loaded.
"""

import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.modules.linear import LoRALinear
from lora_kernels.peft import known, trained
from lora_kernels.peft.config import check_config
from lora_kernels.peft.swap import swap_named
from lora_kernels.peft.targets import lora_layers, named_modules, pattern_value, select

__all__ = ["load_adapter", "save_adapter"]

_PREFIX, _CONFIG, _TENSORS = "base_model.model.", "adapter_config.json", "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".pkl")
# A key of a PEFT model's state dict has the adapter's name before its last part.
_NAMED = re.compile(r"(.+\.lora_[AB])\.([^.]+)\.weight")


def save_adapter(
    model: nn.Module, folder: str | Path, *, base_model_name_or_path: str | None = None, task_type: str | None = None
) -> None:
    """Write the adapters of a model's `LoRALinear` layers as PEFT does, and what else was trained; create `folder`.

    A module that `swap_linear(modules_to_save=...)` trains, that `load_adapter` read, or that has a parameter of its
    own which requires grad, is written whole, as PEFT's `modules_to_save`. Where PEFT takes its name for other modules,
    too, these are written with the numbers that they have. Files are written at last, whole or not at all.

    Args:
        model: The model. The model and its parts may be wrapped by `torch.compile`, activation checkpointing,
            DataParallel or DDP.
        folder: The folder to write to; its files are overwritten.
        base_model_name_or_path: The base model's, for PEFT's `AutoPeftModel`.
        task_type: As in PEFT, for example "CAUSAL_LM". For "SEQ_CLS" and "TOKEN_CLS" PEFT needs modules named
            `classifier` and `score` in the file, for "QUESTION_ANS" `qa_outputs`; they are written, trained or not.

    Raises:
        ValueError: The model has no `LoRALinear` layers, or modules that PEFT has wrapped; or a parameter is trained
            that PEFT's files cannot hold: a layer's weight or bias, the model's own, or one of a module with adapters
            in it. The message names the parameter.
        NotADirectoryError: `folder` is a file.
        TypeError: What would be written is not a plain tensor, or is on the meta device; gather it first.
    """
    known.check_no_wrapper("save_adapter", model)
    layers = _layers(model, "save_adapter")
    tensors = {}
    for name, layer in layers.items():
        for part in ("weight", "bias"):
            if getattr(layer, part) is not None and getattr(layer, part).requires_grad:
                raise ValueError(
                    f"save_adapter: {name}.{part} is trained, and an adapter file does not hold it. "
                    f"Save model.state_dict() in its place, or freeze it."
                )
        _check_plain("save_adapter", name, layer)
        for part in ("lora_A", "lora_B"):
            tensors[_key(name, part)] = getattr(layer, part).detach().cpu().clone(memory_format=torch.contiguous_format)
    modules = dict(named_modules(model))
    named = trained.find_trained(modules, task_type)
    whole = trained.matching(modules, named)
    trained.check_whole("save_adapter", f"modules_to_save={named!r}", modules, whole)
    state = {key: t for name in whole for key, t in trained.read_state(modules, name).items()}
    for key, t in state.items():
        trained.check_plain("save_adapter", key, t)
        tensors[_PREFIX + key] = t.detach().cpu().clone(memory_format=torch.contiguous_format)
    held = {id(t) for t in state.values()} | {id(t) for layer in layers.values() for t in (layer.lora_A, layer.lora_B)}
    lost = next((name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held), None)
    if lost is not None:
        raise ValueError(f"save_adapter: {lost} is trained, and no module has it under its name; freeze or gather it.")
    base = None if base_model_name_or_path is None else str(base_model_name_or_path)
    config = _config(model, modules, layers, named) | {"base_model_name_or_path": base, "task_type": task_type}
    _write(Path(folder), tensors, config)


def load_adapter(model: nn.Module, folder: str | Path) -> list[str]:
    """Read adapters from PEFT's files into a model's `LoRALinear` layers, and modules that were trained whole.

    A model without `LoRALinear` layers gets them first, from the configuration. The adapters of new layers have the
    weight's dtype, or float32 over a float16 or bfloat16 weight, unless the file's adapters have that 16-bit dtype as
    well. The scaling is the file's; `lora_dropout` is the model's, or, for new layers, the file's. If anything does not
    fit, nothing is changed.

    What PEFT's `modules_to_save` has in the file is read into the model's modules, in the model's dtype, and
    `save_adapter` writes it again. Beside new layers these modules require grad, and one that shares a tensor with
    another module gets a copy of its own, as with `swap_linear(modules_to_save=...)`. Embeddings that PEFT saved
    because they were resized are read as well.

    Args:
        model: The model. The model and its parts may be wrapped by `torch.compile`, activation checkpointing,
            DataParallel or DDP.
        folder: The folder of `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        The names of the layers that were read.

    Raises:
        FileNotFoundError: A file does not exist.
        NotADirectoryError: `folder` is a file.
        ValueError: The model has PEFT LoRA layers, the file is a pickle, the configuration goes beyond plain LoRA, or a
            number in the configuration is not valid. Or a key is missing, superfluous, without PEFT's prefix or of
            another shape; the message names the key. Or tensors that are one in the model differ in the file.
        TypeError: An adapter, a weight that would get one, or a tensor of a module to save is not a plain tensor, or is
            on the meta device.
        RuntimeError: A layer is merged.
    """
    known.check_not_peft("load_adapter", model)
    folder = Path(folder)
    tensors, config = _read(folder)
    modules, present = dict(named_modules(model)), dict(lora_layers(model))
    to_save = config.get("modules_to_save") or []
    names = list(present) or [
        name for name in select(
            model, config["target_modules"], config.get("exclude_modules"),
            config.get("layers_to_transform"), config.get("layers_pattern"),
        ) if not trained.is_left_to_modules(name, to_save)
    ]  # fmt: skip
    if not names:
        raise ValueError(
            f"load_adapter: target_modules={config['target_modules']!r} of {folder / _CONFIG} matches no linear layer "
            f"of {type(model).__name__}."
        )
    file = {key.removeprefix(_PREFIX): t for key, t in tensors.items()}
    saved = trained.matching(modules, to_save)
    whole = list(dict.fromkeys([*saved, *trained.list_kept(modules), *trained.find_embeddings(modules, file)]))
    trained.check_whole("load_adapter", f"modules_to_save={to_save!r}", modules, whole, names)
    _check_keys(folder, names, tensors, [key for name in whole for key in trained.read_state(modules, name)])
    trained.check_values(modules, whole, () if present else saved, file)
    shapes = {name: _shapes(config, name, modules[name]) for name in names}
    for name, expected in shapes.items():
        for part, shape in expected.items():
            _check_tensor(_key(name, part), tensors[_key(name, part)], shape)
    for name, layer in present.items():
        if layer.merged:
            raise RuntimeError(f"LoRALinear {name} is merged; call unmerge() before loading.")
        _check_plain("load_adapter", name, layer)
    for name in [] if present else names:
        if modules[name].weight.is_meta:
            trained.check_plain("load_adapter", f"{name}.weight", modules[name].weight)
    rslora = bool(config.get("use_rslora"))
    ranks = {name: shape["lora_A"][0] for name, shape in shapes.items()}
    for name, rank in ranks.items():
        if (said := pattern_value(config.get("rank_pattern"), name, config["r"])) != rank:
            raise ValueError(
                f"load_adapter: {folder / _CONFIG} gives {name} the rank {said}, and {_TENSORS} has adapters of rank "
                f"{rank}; the scaling goes by that number. Set r or rank_pattern right."
            )
    alphas = {name: pattern_value(config.get("alpha_pattern"), name, config["lora_alpha"]) for name in names}
    scalings = {name: alpha / _root(ranks[name], rslora) for name, alpha in alphas.items()}
    _check_shared(modules, names, tensors, scalings)
    if not present:
        swap_named(model, ranks, dict.fromkeys(names, 1.0), config.get("lora_dropout", 0.0), False, True, saved)
    for name, layer in lora_layers(model):
        layer.lora_alpha, layer.use_rslora, layer.scaling = alphas[name], rslora, scalings[name]
        for part in ("lora_A", "lora_B"):
            t, parameter = tensors[_key(name, part)], getattr(layer, part)
            if not present and t.dtype == layer.whole_weight().dtype:
                parameter.data = torch.empty_like(parameter, dtype=t.dtype)
            with torch.no_grad():
                parameter.copy_(t)
    modules = dict(named_modules(model))
    for name in whole:
        trained.keep(modules[name])
        for key, t in trained.read_state(modules, name).items():
            with torch.no_grad():
                t.copy_(file[key])
    return names


def _write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write both files beside those of the same names, and put them in their places when both are written."""
    from safetensors.torch import save_file

    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"save_adapter: {folder} is a file; pass a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    written = {name: folder / f"{name}.{os.getpid()}.tmp" for name in (_TENSORS, _CONFIG)}
    try:
        save_file(tensors, written[_TENSORS], metadata={"format": "pt"})
        written[_CONFIG].write_text(text, encoding="utf-8")
        for name, path in written.items():
            path.replace(folder / name)
    finally:
        for path in written.values():
            path.unlink(missing_ok=True)


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if folder.suffix in _PICKLES and not folder.is_dir():
        raise ValueError(_pickle_text(folder))
    if folder.is_file():
        raise NotADirectoryError(
            f"load_adapter: {folder} is a file; pass the folder it lies in: {str(folder.parent)!r}."
        )
    path = folder / _TENSORS
    if not path.is_file():
        for pickle in sorted(folder.glob("adapter_model.*")):
            if pickle.suffix in _PICKLES:
                raise ValueError(_pickle_text(pickle))
        if shards := sorted(each.name for each in folder.glob("adapter_model-*.safetensors")):
            raise FileNotFoundError(
                f"load_adapter: there is no {path}, but {_some(shards)}. PEFT keeps an adapter in one file: join the "
                "shards' tensors with safetensors.torch.load_file and save_file."
            )
        raise FileNotFoundError(f"load_adapter: there is no {path}.")
    if not (folder / _CONFIG).is_file():
        raise FileNotFoundError(f"load_adapter: there is no {folder / _CONFIG}.")
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"load_adapter: {folder / _CONFIG} is not JSON: {error}.") from error
    check_config(folder / _CONFIG, config)
    try:
        return load_file(path), config
    except SafetensorError as error:
        raise ValueError(f"load_adapter: {path} is not a safetensors file: {error}.") from error


def _pickle_text(path: Path) -> str:
    return (
        f"{path.name} is a pickle file and can run code when loaded. Convert it to safetensors: where you trust it, "
        f"PeftModel.from_pretrained(model, {str(path.parent)!r}).save_pretrained({str(path.parent)!r})."
    )


def _check_keys(folder: Path, names: list[str], tensors: Mapping[str, Tensor], whole: list[str]) -> None:
    where = folder / _TENSORS
    for key in tensors:
        if not key.startswith(_PREFIX):
            raise ValueError(f"load_adapter: {where}: {key} does not begin with {_PREFIX!r}, as PEFT's keys do.")
        if named := _NAMED.fullmatch(key):
            raise ValueError(
                f"load_adapter: {where} has {key}; expected {named[1]}.weight, as PEFT's files leave out an adapter's "
                f"name ({named[2]!r}). These are keys of a PEFT model's state_dict(): save it by its save_pretrained()."
            )
    expected = {_key(name, part) for name in names for part in ("lora_A", "lora_B")}
    expected |= {_PREFIX + key for key in whole}
    missing, surplus = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
    if surplus:
        also = f"; expected {_some(missing)}, which it lacks" if missing else ""
        raise ValueError(f"load_adapter: {where} has {_some(surplus)}, for which the model has no LoRA layer{also}.")
    if missing:
        raise ValueError(f"load_adapter: {where} lacks {_some(missing)}, for which the model has a layer.")


def _shapes(config: dict[str, Any], name: str, layer: Any) -> dict[str, tuple[int, int]]:
    """Return the shapes that a layer's adapters need, by the layer's rank or, for a new layer, the configuration's."""
    r = layer.r if isinstance(layer, LoRALinear) else pattern_value(config.get("rank_pattern"), name, config["r"])
    return {"lora_A": (r, layer.in_features), "lora_B": (layer.out_features, r)}


def _check_plain(call: str, name: str, layer: LoRALinear) -> None:
    for part in ("lora_A", "lora_B"):
        t = getattr(layer, part)
        # FSDP1 leaves a flat piece of the parameter.
        if type(t) is not nn.Parameter or t.dim() != 2:
            shape = tuple(t.shape)
            raise TypeError(
                f"{call}: {name}.{part} is a {type(t).__name__} of shape {shape}; gather it into a plain tensor."
            )
        trained.check_plain(call, f"{name}.{part}", t)


def _check_shared(
    modules: Mapping[str, nn.Module], names: list[str], tensors: Mapping[str, Tensor], scalings: Mapping[str, float]
) -> None:
    first: dict[int, str] = {}
    for name in names:
        twin = first.setdefault(id(modules[name]), name)
        same = (torch.equal(tensors[_key(name, part)], tensors[_key(twin, part)]) for part in ("lora_A", "lora_B"))
        if twin != name and not (scalings[name] == scalings[twin] and all(same)):
            raise ValueError(f"load_adapter: {twin} and {name} are one layer of the model and two in the file.")


def _check_tensor(key: str, t: Tensor, shape: tuple[int, int]) -> None:
    if not t.is_floating_point():
        raise ValueError(
            f"load_adapter: {key} is {t.dtype} in the file; adapters are floating-point numbers, and nothing says what "
            "these stand for. Save them unquantised."
        )
    if t.shape == shape:
        return
    at = 0 if ".lora_A." in key else 1
    if t.dim() == 2 and t.shape[1 - at] == shape[1 - at]:
        raise ValueError(
            f"load_adapter: {key}: file rank {t.shape[at]}, layer rank {shape[at]}. "
            f"Build the layer with r={t.shape[at]}, or name it in rank_pattern."
        )
    raise ValueError(f"load_adapter: {key} is {tuple(t.shape)} in the file, the layer needs {shape}.")


def _config(
    model: nn.Module, modules: Mapping[str, nn.Module], layers: dict[str, LoRALinear], whole: list[str]
) -> dict[str, Any]:
    ranks = {name: layer.r for name, layer in layers.items()}
    usual = all(layer.use_rslora for layer in layers.values())
    found = {rule: {name: _alpha(layer, rule) for name, layer in layers.items()} for rule in (usual, not usual)}
    exact = (
        rule for rule, alphas in found.items()
        if all(alphas[name] / _root(layer.r, rule) == layer.scaling for name, layer in layers.items())
    )  # fmt: skip
    rslora = next(exact, usual)
    alphas = found[rslora]
    dropouts = Counter(layer.lora_dropout for layer in layers.values())
    if len(dropouts) > 1:
        warnings.warn(
            f"save_adapter: PEFT has one lora_dropout for all layers; of {sorted(dropouts)} the most frequent is kept.",
            stacklevel=3,
        )
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA", "r": r, "lora_alpha": alpha, "use_rslora": rslora,
        "lora_dropout": dropouts.most_common(1)[0][0], "target_modules": _targets(modules, list(layers)),
        "rank_pattern": {_exactly(name): value for name, value in ranks.items() if value != r},
        "alpha_pattern": {_exactly(name): value for name, value in alphas.items() if value != alpha},
        "bias": "none", "fan_in_fan_out": False, "use_dora": False, "lora_bias": False,
        "modules_to_save": whole or None, "init_lora_weights": True, "inference_mode": True,
    }  # fmt: skip


def _alpha(layer: LoRALinear, rslora: bool) -> float:
    """Return a `lora_alpha` that gives the layer's exact scaling, preferably its own; the nearest one if none does.

    Quotients by 3, for example, leave out some numbers. One of these is 0.1, which is a quotient by √3.
    """
    root = _root(layer.r, rslora)
    near = layer.scaling * root
    candidates = (layer.lora_alpha, near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    return next((alpha for alpha in candidates if alpha / root == layer.scaling), near)


def _root(r: int, rslora: bool) -> float:
    return math.sqrt(r) if rslora else r


def _targets(modules: Mapping[str, nn.Module], names: list[str]) -> list[str] | str:
    """Return the last parts of the names if these name no other module; else an expression for the full names."""
    ends = sorted({name.rpartition(".")[2] for name in names})
    if {name for name in modules if name.rpartition(".")[2] in ends} == set(names):
        return ends
    return "|".join(map(re.escape, names))


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}"


def _layers(model: nn.Module, call: str) -> dict[str, LoRALinear]:
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError(f"{call}: the model has no LoRALinear layers; see lora_kernels.swap_linear.")
    if "" in layers:
        raise ValueError(f"{call}: the model is a LoRALinear itself and has no name; put it into a module.")
    return layers


def _key(name: str, part: str) -> str:
    return f"{_PREFIX}{name}.{part}.weight"


def _some(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"
