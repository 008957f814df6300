"""What an adapter's configuration may say: a field that no list here knows is refused by name, as is a wrong value.

Fields and neutral values are those of `LoraConfig` in PEFT 0.19 to 0.21. Of a field that came later the installed PEFT,
if there is one, is asked for the default.
"""

import dataclasses
import functools
import importlib
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["check_config"]

_NEEDED = ("r", "lora_alpha", "target_modules")
# These say where a file comes from, how adapters began, or something of a field that is refused.
_WITHOUT_EFFECT = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "loftq_config",
    "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "task_type",
)  # fmt: skip
# Other initialisations change the base weight.
_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
_BEYOND = (
    "alora_invocation_tokens", "arrow_config", "ensure_weight_tying", "fan_in_fan_out", "kasa_config",
    "layer_replication", "lora_bias", "megatron_config", "monteclora_config", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "velora_config",
)  # fmt: skip

# For each number: the field, the field of exceptions, the test of a value, and the words for the test.
_NUMBERS: tuple[tuple[str, str, Callable[[Any], bool], str], ...] = (
    ("r", "rank_pattern", lambda n: type(n) is int and n > 0, "an integer of at least 1"),
    ("lora_alpha", "alpha_pattern", lambda n: type(n) in (int, float) and math.isfinite(n), "a finite number"),
    ("lora_dropout", "", lambda n: type(n) in (int, float) and 0 <= n <= 1, "a number in [0, 1]"),
)
_PATTERNS = tuple(exceptions for _, exceptions, *_ in _NUMBERS if exceptions)


def _is_list(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(type(each) is kind for each in value)


_are_names, _are_numbers = _is_list(str), _is_list(int)
# For each further field that is read, and that may be null: the test of a value, and the words for the test.
_SELECTORS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "target_modules": (lambda v: isinstance(v, str) or _are_names(v), "a list of names or a regular expression"),
    "exclude_modules": (lambda v: isinstance(v, str) or _are_names(v), "a list of names or a regular expression"),
    "layers_to_transform": (lambda v: type(v) is int or _are_numbers(v), "an integer or a list of integers"),
    "layers_pattern": (lambda v: isinstance(v, str) or _are_names(v), "a name or a list of names"),
    "modules_to_save": (_are_names, "a list of names"),
    "use_rslora": (lambda v: type(v) is bool, "true or false"),
}
# What PEFT puts around each expression; a list of target_modules or of exclude_modules is one of names.
_EXPRESSIONS = {
    "target_modules": "", "exclude_modules": "", "layers_pattern": r"(?:^|.*?\.){}\.(\d+)\.",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    **dict.fromkeys(_PATTERNS, r"(.*\.)?({})$"),
}  # fmt: skip
_READ = {*_SELECTORS, *_PATTERNS, *(field for field, *_ in _NUMBERS), "bias", "init_lora_weights"}


def check_config(path: Path, config: Any) -> None:
    """Refuse what `adapter_config.json` at `path` says if `LoRALinear` would compute something else.

    Raises:
        ValueError: The method is not LoRA, a field is missing or has a wrong value, or a field, known or not, has a
            value by which PEFT may compute more than y = x Wᵀ + scaling · dropout(x) Aᵀ Bᵀ. The message names it.
    """
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"load_adapter: {path} has peft_type {kind!r}; LoRALinear computes 'LORA'.")
    for field in _NEEDED:
        if config.get(field) is None:
            raise ValueError(f"load_adapter: {path} has no {field!r}.")
    _check_numbers(path, config)
    for field, (fits, words) in _SELECTORS.items():
        value = config.get(field)
        if value is not None and not fits(value):
            raise ValueError(f"load_adapter: {path} has {field}={value!r}; it must be {words}.")
    if isinstance(config["target_modules"], str) and config.get("layers_to_transform") is not None:
        raise ValueError(
            f"load_adapter: {path} has layers_to_transform={config['layers_to_transform']!r} beside "
            f"target_modules={config['target_modules']!r}; PEFT takes it beside a list of names alone."
        )
    _check_expressions(path, config)
    for field in _BEYOND:
        if config.get(field):
            raise ValueError(
                f"load_adapter: {path} has {field}={config[field]!r}, which is more than LoRALinear computes. "
                "Load it with PEFT and call lora_kernels.patch_peft."
            )
    if config.get("bias", "none") != "none":
        raise ValueError(f"load_adapter: {path} has bias={config['bias']!r}; LoRALinear keeps the base's bias frozen.")
    if config.get("init_lora_weights", True) not in _PLAIN_INITS:
        raise ValueError(
            f"load_adapter: {path} has init_lora_weights={config['init_lora_weights']!r}, which changes the base "
            "weights as well. Save it from PEFT with path_initial_model_for_weight_conversion."
        )
    _check_unknown(path, config)


def _check_numbers(path: Path, config: Mapping[str, Any]) -> None:
    for field, exceptions, fits, words in _NUMBERS:
        pattern = config.get(exceptions) or {}
        if not isinstance(pattern, dict):
            raise ValueError(f"load_adapter: {path} has {exceptions}={pattern!r}; it must be an object.")
        values = {field: config.get(field, 0)} | {f"{exceptions}[{key!r}]": value for key, value in pattern.items()}
        for where, value in values.items():
            if not fits(value):
                raise ValueError(f"load_adapter: {path} has {where}={value!r}; it must be {words}.")


def _check_expressions(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse what is matched against names of layers and is not a regular expression."""
    for field, frame in _EXPRESSIONS.items():
        value = config.get(field) or ()
        for expression in [value] if isinstance(value, str) else value if frame else ():
            try:
                re.compile(frame.format(expression) if frame else expression)
            except re.error as error:
                raise ValueError(
                    f"load_adapter: {path} has {expression!r} in {field}, which is no regular expression: {error}."
                ) from error


def _check_unknown(path: Path, config: Mapping[str, Any]) -> None:
    for field, value in config.items():
        known = field in _READ or field in _WITHOUT_EFFECT or field in _BEYOND
        if known:
            continue
        defaults = _peft_defaults()
        # PEFT writes every field of its configuration; a method that is not used stands there as one of these.
        unused = value is None or value is False or value in ([], {})
        # One that is used unless a file says otherwise has another default.
        if defaults[field] == value or (unused and not defaults[field]) if field in defaults else unused:
            continue
        raise ValueError(
            f"load_adapter: {path} has {field}={value!r}, which is no field that load_adapter knows, and which may "
            "change what is computed. Load it with PEFT and call lora_kernels.patch_peft; if you know that it changes "
            "nothing, take it out of the file."
        )


@functools.cache
def _peft_defaults() -> Mapping[str, Any]:
    """Return the default of each field of the installed PEFT's `LoraConfig`; nothing if PEFT is not installed."""
    try:
        LoraConfig = importlib.import_module("peft").LoraConfig
    except ImportError:
        return {}
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(LoraConfig)
    }
