"""The folder of an HRM-Gemma: what it adds to a base that lies elsewhere.

config.json                  model_type "hrm_gemma3n"; base_model, the base's checkpoint, relative to this folder or
                             absolute; hrm, the fields of `ReasoningConfig`. Fields of the base may be repeated.
l_adapter/, h_adapter/       adapter_config.json and adapter_model.safetensors as PEFT writes and loads them
hrm.safetensors              the recurrent modules
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thl_engine.checkpoint.contents import Source
from thl_engine.checkpoint.index import CheckpointIndex, TensorInfo, config_beside, read_index
from thl_engine.checkpoint.pack import Progress, write_tensors
from thl_engine.config import Config, HRMGemma3nConfig, parse_config
from thl_engine.config.published import hrm_gemma3n_fields
from thl_engine.config.unknown import misspelt
from thl_engine.errors import CheckpointError, ConfigError, shown
from thl_engine.files import parse_json, read_text, write_file
from thl_engine.models import architecture
from thl_engine.models.contract import Adapters

MODEL_TYPE = "hrm_gemma3n"
FOLDERS = {"L": "l_adapter", "H": "h_adapter"}
RECURRENT = "hrm.safetensors"
ADAPTER_CONFIG, ADAPTER_TENSORS = "adapter_config.json", "adapter_model.safetensors"
# What changes the arithmetic of an adapter elsewhere, and is not computed here unless it is absent or says no.
UNSUPPORTED = (
    "use_rslora",
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layer_replication",
    "alora_invocation_tokens",
    "target_parameters",
    "trainable_token_indices",
)


# The rest of what PEFT writes, which changes nothing here or shows in the tensors.
DESCRIBED = tuple(
    """
    arrow_config auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config exclude_modules
    inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout
    lora_ga_config megatron_config megatron_core peft_type peft_version qalora_group_size r revision runtime_config
    target_modules task_type
    """.split()
)
# How an adapter began, where that left the base as it was. Others, such as PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ, take
# from the base what they put into the adapter: on the base as published such an adapter counts it twice.
INITIALISATIONS = ("gaussian", "orthogonal", "eva")


def layout() -> Adapters[HRMGemma3nConfig]:
    """Which tensors are the base's, the adapters' and the model's own."""
    adapters = architecture(MODEL_TYPE).adapters
    assert adapters is not None
    return adapters


def is_adapter_folder(path: Path) -> bool:
    """Whether any part of an HRM-Gemma is there. Raises ConfigError for a config.json that cannot be read."""
    if not os.path.isdir(path):
        return False
    if any(os.path.exists(path / name) for name in FOLDERS.values()):
        return True
    given = (config_beside(path) if os.path.exists(path / RECURRENT) else None) or (
        {},
        "",
    )  # the file may be any model's
    return "base_model" in given[0] or given[0].get("model_type") == MODEL_TYPE


def base_of(folder: Path) -> tuple[Path, dict[str, Any], str]:
    """The base's path, the fields of config.json, and where they stand. Raises ConfigError."""
    found = config_beside(folder)
    if found is None:
        raise ConfigError(
            f"{folder / 'config.json'}: no such file; the folder of an hrm_gemma3n model needs it, with "
            "base_model, the path of its base"
        )
    given, where = found
    base = given.get("base_model")
    if not isinstance(base, str) or not base or "\0" in base:
        raise ConfigError(
            f"{where}: base_model is {shown(base)}; it must be the path of the base's checkpoint, "
            f"absolute or relative to {folder}"
        )
    return folder / base, given, where


def adapted_config(given: Mapping[str, Any], base: Config, where: str) -> HRMGemma3nConfig:
    """The whole configuration of what `given` adds to a base of that configuration.

    Raises ConfigError, also where `given` repeats one of the base's fields with another value.
    """
    if base.model_type != layout().base:
        raise ConfigError(f"{where}: the base is a {base.model_type} model; it must be a {layout().base} checkpoint")
    values = base.to_dict()
    stated = {"model_type": given["model_type"]} if "model_type" in given else {}
    own = hrm_gemma3n_fields({name: value for name, value in given.items() if name != "model_type"}, where)
    config = parse_config({**values, "model_type": MODEL_TYPE, **own, **stated}, MODEL_TYPE, where)
    assert isinstance(config, HRMGemma3nConfig)  # MODEL_TYPE's
    whole = config.to_dict()
    for name in values.keys() - {"model_type"}:
        if whole[name] != values[name]:
            raise ConfigError(
                f"{where}: {name} is {shown(whole[name])}, but the base has {shown(values[name])}; leave it out"
            )
    return config


def read_adapters(folder: Path, config: HRMGemma3nConfig) -> CheckpointIndex:
    """The tensors of the folder's three files, by the names of the model's blocks."""
    files: dict[Path, dict[str, TensorInfo]] = {}
    for side, name in FOLDERS.items():
        _check_adapter(folder / name / ADAPTER_CONFIG, config, side)
        files[folder / name / ADAPTER_TENSORS] = {}
    files[folder / RECURRENT] = {}
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_index(file).tensors.items():
            stored = architecture(MODEL_TYPE).stored_name(config, name)
            if stored in tensors:
                raise CheckpointError(f"{file}: tensor {shown(name)} is in {tensors[stored].file} as well")
            if stored is not None:
                tensors[stored] = info
    return CheckpointIndex(tensors, {}, tuple(files), folder)


def _check_adapter(file: Path, config: HRMGemma3nConfig, side: str) -> None:
    """Whether PEFT's description of an adapter is of what is computed here; the tensors are checked by themselves."""
    given = parse_json(read_text(file), str(file))
    rank, alpha = layout().rank_and_alpha(config, side)
    for name, own, expected in (
        ("peft_type", "", "LORA"),
        ("r", f"{side}_rank", rank),
        ("lora_alpha", f"{side}_alpha", alpha),
    ):
        if given.get(name) != expected or isinstance(given.get(name), bool):
            source = f", as config.json's hrm has it ({own})" if own else ""
            raise CheckpointError(f"{file}: {name} is {shown(given.get(name))}; it must be {expected!r}{source}")
    if given.get("bias", "none") != "none":
        raise CheckpointError(f"{file}: bias is {shown(given['bias'])}; supported is 'none'")
    start = given.get("init_lora_weights")
    if not (start is None or isinstance(start, bool) or start in INITIALISATIONS):
        raise CheckpointError(
            f"{file}: init_lora_weights is {shown(start)}, which changes the base, or may; save the adapter for the "
            "base as published (PEFT: path_initial_model_for_weight_conversion)"
        )
    for name in given:
        near = [] if name in DESCRIBED or name in UNSUPPORTED else misspelt(name, (*DESCRIBED, *UNSUPPORTED))
        if near:
            raise CheckpointError(f"{file}: unknown field {shown(name)}; did you mean {shown(near[0])}?")
    for name in UNSUPPORTED:
        if given.get(name):
            raise CheckpointError(f"{file}: {name} is {shown(given[name])}; adapters with it are not supported")


def adapter_config(config: HRMGemma3nConfig, side: str, base: str) -> dict[str, Any]:
    """PEFT's description of the adapter "L" or "H" of a base at the path `base`."""
    rank, alpha = layout().rank_and_alpha(config, side)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "target_modules": list(layout().targets[side]),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def write_adapters(
    folder: Path, config: HRMGemma3nConfig, base: str, sources: Mapping[str, Source], progress: Progress | None = None
) -> None:
    """Writes a folder that `read_adapters` reads, config.json last.

    base: the path of the base as config.json is to have it. sources: the tensors by the names of the model's blocks.
    """
    names = {RECURRENT: {block.name: block.name for block in layout().own(config)}}
    texts = {}
    for side, name in FOLDERS.items():
        names[f"{name}/{ADAPTER_TENSORS}"] = {
            layout().prefix + block.name: block.name for block in layout().blocks(config, side)
        }
        texts[f"{name}/{ADAPTER_CONFIG}"] = adapter_config(config, side, base)
    own = {"model_type": config.model_type, "base_model": base, "hrm": config.to_dict()["hrm"]}
    texts["config.json"] = own
    try:
        for name in ("", *FOLDERS.values()):
            (folder / name).mkdir(exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot make the folder: {error.strerror}") from None
    for file, tensors in names.items():
        write_tensors(folder / file, {name: sources[block] for name, block in tensors.items()}, progress)
    for file, content in texts.items():
        text = json.dumps(content, indent=1).encode() + b"\n"
        write_file(folder / file, text)
