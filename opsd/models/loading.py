"""Loads a model and its tokenizer for a command: a folder, a hub id, or an adapter on its base.

Reads weights from safetensors only (a pickle can run code when it is opened), and runs no code that came with them
unless the user allows it.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, extract_model_from_parallel
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from torch import nn
from transformers import CONFIG_NAME, AutoTokenizer, PreTrainedTokenizerBase, Trainer
from transformers.utils import cached_file

from opsd.errors import ConfigError, OPSDWarning
from opsd.models.causal import load_causal_model, reads_images
from opsd.models.vocabulary import (
    ADAPTER_CONFIG,
    check_adapter_vocabulary,
    check_has_tokenizer,
    check_is_tokenizer,
    is_adapter,
)
from opsd.settings import looked_in
from opsd.sources import is_hub_id


def check_model_name(model: str) -> str:
    """Return `model` if it can be a folder or a hub id.

    Raises:
        ConfigError: neither.
    """
    if not Path(model).is_dir() and not is_hub_id(model):
        raise ConfigError(
            f"{model!r} is neither a folder that exists nor a hub id (organisation/name), so its weights cannot be "
            f"found.{looked_in(model)} Give the folder that `save_pretrained` wrote, or a hub id."
        )
    return model


def check_reachable(model: str, revision: str | None = None) -> None:
    """Refuse a hub id that is neither in the cache of this machine nor to be had from the hub.

    Raises:
        ConfigError: the hub's answer, and what to do.
    """
    if Path(model).is_dir():
        return
    problem, is_unreachable = "", False
    for name in (CONFIG_NAME, ADAPTER_CONFIG):
        try:
            cached_file(model, name, revision=revision, local_files_only=is_unreachable)
            return
        except OSError as error:
            problem = problem or str(error).splitlines()[0]
            is_unreachable = isinstance(error.__cause__, LocalEntryNotFoundError)  # a second try would wait as long
    raise ConfigError(
        f"the model {model!r} is not on this machine, and could not be had from the hub: {problem}\nCheck its "
        "name, the connection, and for a gated model that you are logged in (`hf auth login`); or download it where "
        "there is a connection, and give its folder."
    )


def own_device(device: torch.device, processes: int) -> dict[str, str] | None:
    """Return the `device_map` of a model that its process holds alone.

    TRL's default spreads the layers over all GPUs of the machine, and the loss reads last states and head on one.

    Args:
        device: of this process.
        processes: of the run; with several, the accelerator places the model.
    """
    return {"": str(device)} if processes == 1 and device.type not in ("cpu", "mps") else None


def without_autocast(model: nn.Module) -> nn.Module:
    """Return a model without the mixed-precision wrapper that an earlier trainer left on its `forward`.

    accelerate wraps `forward` of the object it prepares, and the wrapper stays: a model from TRL's SFTTrainer would
    sample and score in another precision than this run's.
    """
    return extract_model_from_parallel(model, keep_fp32_wrapper=False)


def without_dropout(model: nn.Module) -> nn.Module:
    """Set every dropout probability of a model to 0, and return the model.

    TRL's `disable_dropout` changes modules; Llama and most others also keep attention dropout as a number, which they
    use in train mode.
    """
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


def broadcast_parameters(model: nn.Module, device: torch.device) -> None:
    """Give every process the parameters of the first: an adapter drawn without a seed differs between them.

    Args:
        model: the student.
        device: where processes exchange; a parameter that is elsewhere is copied there and back, one at a time.
    """
    for p in model.parameters():
        here = p.data.to(device)
        broadcast(here, from_process=0)
        if here is not p.data:
            p.data.copy_(here)


def load_tokenizer(model: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model's own folder or hub id, which pads on the left.

    Args:
        model: a folder or a hub id.
        kwargs: for `from_pretrained`: `revision`, `trust_remote_code`.

    Raises:
        ConfigError: no such model, or a folder without a tokenizer; an adapter's base is not asked.
    """
    check_has_tokenizer(check_model_name(model))
    check_reachable(model, kwargs.get("revision"))
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left", **kwargs)
    check_is_tokenizer(tokenizer)
    return tokenizer


def load_model(
    model: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
    trainable: bool = False,
    **kwargs: Any,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Return a model and its tokenizer; of a checkpoint that reads images, its language model alone.

    Args:
        model: a folder, a hub id, or a folder with an adapter.
        tokenizer: the model's; None loads it from the same place.
        trust_remote_code: whether code that came with the weights may run.
        trainable: whether a loaded adapter is trainable.
        kwargs: for `from_pretrained`; dtype is float32 by default.

    Returns:
        The model, on the GPU where there is one, and its tokenizer, which pads on the left.

    Raises:
        ConfigError: no such model, no tokenizer, or an adapter whose tokenizer does not fit its base.
    """
    check_model_name(model)
    kwargs = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": trust_remote_code, **kwargs}
    if tokenizer is None:
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)  # which asks the hub
    else:
        check_reachable(model, kwargs.get("revision"))
    if is_adapter(model):
        check_adapter_vocabulary(model, tokenizer, trust_remote_code=trust_remote_code)
        loaded = _load_adapter(model, trainable, **kwargs)
    else:
        loaded = load_causal_model(model, **kwargs)
    is_placed = getattr(loaded, "is_quantized", False) or not torch.cuda.is_available()
    return loaded if is_placed else loaded.to("cuda"), tokenizer


def _load_adapter(folder: str, trainable: bool, **kwargs: Any) -> nn.Module:
    adapter = {"revision": kwargs["revision"]} if kwargs.get("revision") else {}
    config = PeftConfig.from_pretrained(folder, **adapter)
    base, code = config.base_model_name_or_path, kwargs["trust_remote_code"]
    if base and reads_images(base, revision=config.revision, trust_remote_code=code):
        model = load_causal_model(base, **{**kwargs, "revision": config.revision})
        return PeftModel.from_pretrained(model, folder, is_trainable=trainable, **adapter)
    return AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=trainable, **kwargs)


def student_of(given: Any, tokenizer: Any) -> tuple[str | nn.Module, Any]:
    """Return a student and its tokenizer as training left them; loads nothing.

    Args:
        given: a model id, a folder, a loaded model, or a transformers Trainer, whose model and tokenizer are taken.
        tokenizer: the user's, or None.

    Returns:
        The model or its name, and the tokenizer or None, where the model's own place has it.

    Raises:
        ConfigError: nothing says for certain which tokenizer and chat template the model was trained with.
    """
    if isinstance(given, Trainer):
        given, tokenizer = given.model, tokenizer or given.processing_class
    if tokenizer is None and isinstance(given, str):
        check_has_tokenizer(given)
    elif tokenizer is None:
        base = getattr(getattr(given, "config", None), "_name_or_path", "") or "…"
        raise ConfigError(
            "a loaded model needs processing_class: the tokenizer and chat template that it was trained with. Its "
            f"config names only where its weights were first loaded from ({base}), and fine-tuning may have changed "
            "both since. Give the trainer itself, OPSDTrainer(sft, …), or processing_class=sft.processing_class; for "
            f"a model that was not trained since, processing_class=AutoTokenizer.from_pretrained({base!r})."
        )
    return given, tokenizer


def ready_model(
    model: str | nn.Module, tokenizer: Any, args: Any, quantization: Any = None
) -> tuple[str | nn.Module, Any]:
    """Return a student as TRL's trainer takes it, and its tokenizer if it had to be loaded here.

    Args:
        model: a model id, a folder, or a loaded model; a folder with an adapter is loaded as a trainable PEFT model, a
            checkpoint that reads images as its language model.
        tokenizer: the user's, or None.
        args: training arguments; `model_init_kwargs` is set, so that TRL loads safetensors only.
        quantization: a BitsAndBytesConfig for a model that is loaded here, or None.

    Raises:
        ConfigError: no such model, or one to quantise that is loaded already.
    """
    if not isinstance(model, str):
        if quantization is not None:
            raise ConfigError(
                "quantization_config quantises a model while it loads, and this one is loaded already. Give the "
                "model's name, or load it with quantization_config in from_pretrained."
            )
        return without_autocast(model), tokenizer
    # safetensors only, unless the user sets another value: a pickle can run code when it is opened.
    args.model_init_kwargs = {
        "use_safetensors": True,
        "device_map": own_device(args.device, args.world_size),
        **(args.model_init_kwargs or {}),
    }
    check_reachable(check_model_name(model), args.model_init_kwargs.get("revision"))
    kwargs = {key: value for key, value in args.model_init_kwargs.items() if value is not None}
    adds_images = reads_images(model, revision=kwargs.get("revision"), trust_remote_code=args.trust_remote_code)
    if not adds_images and not is_adapter(model):
        return model, tokenizer
    if adds_images:
        save = f"load_causal_model({model!r}).save_pretrained(FOLDER), from opsd.models.causal"
        if args.use_vllm:
            raise ConfigError(
                f"{model} reads images as well, and vLLM would load all of it, under other names than those of its "
                f"language model, which is trained alone. Save the language model first: {save}; and give that folder."
            )
        warnings.warn(
            f"{model} reads images as well: its language model is trained alone. A full model is saved as a text "
            f"model; an adapter fits that language model only, which opsd loads by itself, and others from {save}.",
            OPSDWarning,
            stacklevel=3,
        )
    if quantization is not None:
        kwargs["quantization_config"] = quantization
    args.model_init_kwargs = None
    return load_model(model, tokenizer=tokenizer, trainable=True, trust_remote_code=args.trust_remote_code, **kwargs)
