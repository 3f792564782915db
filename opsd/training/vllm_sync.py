"""Sends the student's weights to a sampling engine (vLLM). Adapters are merged into copies: the base is never written.

TRL merges the adapter into the base at each sync and takes it out again. Each of the two rounds, so a bfloat16 base
drifts. Knows TRL's wrapper around vLLM and PEFT's layers; nothing of teachers or losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from opsd.errors import ConfigError
from opsd.models.sharding import from_first_process, full_tensor, plain_name, reshard
from opsd.training.together import failing_together
from opsd.training.vllm_logprobs import EngineLogprobs

PROCESSED = "processed_logprobs"


def prepare_engine(engine: Any, keep_logprobs: bool) -> EngineLogprobs | None:
    """Let an engine receive merged copies of the student's weights, and keep its log-probabilities if they are needed.

    Args:
        engine: TRL's `VLLMGeneration`, before its first sync.
        keep_logprobs: whether the loss corrects for the engine's probabilities (importance_clip).

    Raises:
        ConfigError: an adapter that cannot be merged into a copy, or a server with other log-probabilities.
    """
    check_mergeable(engine.model)
    engine._iter_named_params = partial(_of_engine, engine)
    if not keep_logprobs:
        return None
    check_logprobs_mode(engine)
    return EngineLogprobs(engine)


def check_logprobs_mode(engine: Any) -> None:
    """Refuse a server whose log-probabilities are not those it samples with; an engine in this process has TRL's mode.

    Raises:
        ConfigError: in every process; names the server's flag.
    """
    if engine.mode != "server":
        return
    client = getattr(engine, "vllm_client", None)  # the first process's
    mode = None
    with failing_together():  # a server that does not answer
        if client is not None:
            mode = client.get_server_info()["model_config"]["logprobs_mode"]
    mode = from_first_process(mode)
    if mode != PROCESSED:
        raise ConfigError(
            f"importance_clip is set, and the vLLM server runs with --logprobs-mode {mode}. Its log-probabilities are "
            "then those before temperature and top-p, not those it samples with, and importance ratios would be "
            f"wrong. Start the server with --logprobs-mode {PROCESSED}, or leave importance_clip out."
        )


def _of_engine(engine: Any) -> Iterator[tuple[str, Tensor]]:
    return merged_parameters(engine.model, engine.accelerator.device)


def merged_parameters(model: nn.Module, device: torch.device | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, value) of every parameter, as a checkpoint of the merged model holds them.

    Values of layers with an adapter are W + ΔW, computed in float32 and rounded once to the dtype of W; the others are
    the parameters themselves. Where FSDP2 shards the model each value is gathered, in every process.

    Args:
        model: the student, with or without adapters.
        device: where shards that are kept in CPU memory are gathered.

    Example:
        >>> for name, value in merged_parameters(trainer.model):
        ...     engine.load_weights([(name, value)])
    """
    reshard(model)  # between passes a sharded model may still hold what the last one gathered
    sent = set[int]()
    for name, parameter, value in _walk(model.get_base_model() if isinstance(model, PeftModel) else model, device):
        if id(parameter) not in sent:  # tied weights once, as engines expect
            sent.add(id(parameter))
            yield plain_name(name), _whole(parameter, device) if value is None else value


def _walk(
    module: nn.Module, device: torch.device | None, prefix: str = ""
) -> Iterator[tuple[str, nn.Parameter, Tensor | None]]:
    """Yield (name, parameter, merged value) as of a model without PEFT's wrappers; None where nothing is merged."""
    module = _in_use(module)
    if isinstance(module, BaseTunerLayer):
        if module.disable_adapters:  # a teacher is the base model
            yield from ((name, p, None) for name, p in _plain_parameters(module, prefix))
        else:
            yield from _merged(module, device, prefix)
        return
    for name, parameter in module.named_parameters(recurse=False):
        yield prefix + name, parameter, None
    for name, child in module.named_children():
        yield from _walk(child, device, f"{prefix}{name}.")


def _in_use(module: nn.Module) -> nn.Module:
    """Return the module that computes in place of a wrapper: what is trained and saved whole, or single tokens."""
    while isinstance(module, AuxiliaryTrainingWrapper):
        if module.disable_adapters:
            module = module.original_module
        elif isinstance(module, TrainableTokensWrapper):
            module = module.token_adapter
        elif isinstance(module, ModulesToSaveWrapper) and module.active_adapters:
            module = module.modules_to_save[module.active_adapters[0]]
        else:
            module = module.original_module
    return module


def _merged(
    layer: BaseTunerLayer, device: torch.device | None, prefix: str
) -> list[tuple[str, nn.Parameter, Tensor | None]]:
    """Return the merged values of one layer, which PEFT computes on copies."""
    kind = next(layer.parameters()).device.type
    with _copies(layer, device) as originals, torch.no_grad(), torch.autocast(kind, enabled=False):
        for part in _tuner_layers(layer):
            part.merge()
        # ΔW is part of these values already: layers inside are walked as plain modules.
        values = _plain_parameters(layer, prefix)
        return [(name, originals[id(p)], p.detach().to(originals[id(p)].dtype)) for name, p in values]


def _plain_parameters(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Parameter]]:
    module = _in_use(module)
    module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    for name, parameter in module.named_parameters(recurse=False):
        yield prefix + name, parameter
    for name, child in module.named_children():
        yield from _plain_parameters(child, f"{prefix}{name}.")


def _tuner_layers(layer: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in layer.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def _copies(layer: nn.Module, device: torch.device | None) -> Iterator[dict[int, nn.Parameter]]:
    """Let a layer hold whole float32 copies of its parameters for the length of the block.

    Yields:
        The parameter that each copy stands for, by the copy's id.
    """
    slots = [(module, name, p) for module in layer.modules() for name, p in module._parameters.items() if p is not None]
    tuners = [(part, list(part.merged_adapters), dict(getattr(part, "_caches", {}))) for part in _tuner_layers(layer)]
    copies = {id(p): _copy(p, device) for _, _, p in slots}
    try:
        for module, name, p in slots:
            module._parameters[name] = copies[id(p)]
        yield {id(copies[id(p)]): p for _, _, p in slots}
    finally:
        for module, name, p in slots:
            module._parameters[name] = p
        for part, merged, caches in tuners:
            part.merged_adapters = merged
            if hasattr(part, "_caches"):
                part._caches = caches  # DoRA keeps what it would need to take the adapter out again


def _copy(parameter: nn.Parameter, device: torch.device | None) -> nn.Parameter:
    whole = _whole(parameter, device)
    dtype = torch.promote_types(whole.dtype, torch.float32)
    return nn.Parameter(whole.to(dtype, copy=True), requires_grad=False)


def _whole(parameter: Tensor, device: torch.device | None) -> Tensor:
    if isinstance(parameter, DTensor) and parameter.is_cpu and device is not None:
        parameter = parameter.to(device)  # offloaded shards: the gather runs where the device's processes meet
    return full_tensor(parameter.detach())


# ---- before step 1 ---------------------------------------------------------------------------------------------------


def check_mergeable(model: nn.Module) -> None:
    """Refuse adapters that cannot be merged into a copy, or whose merged weights an engine could not hold.

    One layer of each kind is merged on trial: PEFT must be able to, and must leave the layer as it was.

    Raises:
        ConfigError: names the layer and the reason.
    """
    if not isinstance(model, PeftModel):
        return
    if not isinstance(model.base_model, BaseTuner):
        raise _refused(type(model.base_model).__name__, "it has no weights that could be added to the base")
    _check_tied(model.get_base_model())
    kinds = set[tuple[object, ...]]()
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, BaseTunerLayer):
            variants = sorted(map(str, getattr(layer, "lora_variant", {}).values()))
            names = [name for name, _ in layer.named_parameters()]
            kind = (type(layer), type(layer.get_base_layer()), *variants, *names)
            if kind not in kinds:
                kinds.add(kind)
                _check_layer(name, layer)


def _check_layer(name: str, layer: BaseTunerLayer) -> None:
    base = layer.get_base_layer()
    plain = all(type(p) is nn.Parameter and p.is_floating_point() for p in base.parameters())
    if not plain or not all(buffer.is_floating_point() for buffer in base.buffers()):
        raise _refused(name, "its base is quantised, so that W + ΔW would be rounded to other values than are trained")
    before = {key: value.clone() for key, value in layer.state_dict().items() if isinstance(value, Tensor)}
    try:
        _merged(layer, None, "")
    except Exception as error:
        raise _refused(name, str(error)) from error
    after = {key: value for key, value in layer.state_dict().items() if isinstance(value, Tensor)}
    if before.keys() != after.keys() or not all(torch.equal(before[key], after[key]) for key in before):
        raise _refused(name, "merging it changes the layer itself")


def _check_tied(model: Any) -> None:
    """Refuse an embedding and a head that are tied in the configuration and trained apart."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    pair = [model.get_input_embeddings(), model.get_output_embeddings()]
    trained = [{id(p) for p in module.parameters() if p.requires_grad} for module in pair if module is not None]
    tokens = [module.token_adapter for module in pair if isinstance(module, TrainableTokensWrapper)]
    tied_tokens = len(tokens) == 2 and tokens[1].tied_adapter is tokens[0]
    if len(trained) == 2 and trained[0] != trained[1] and not tied_tokens:
        raise _refused(
            "embedding or head",
            "the model ties the two (tie_word_embeddings), and the adapter trains one of them. vLLM holds one tensor "
            "for both, and would sample from another model",
        )


def _refused(what: str, reason: str) -> ConfigError:
    return ConfigError(
        f"use_vllm is set, and the adapter at {what} cannot be sent to vLLM: {reason}. vLLM gets W + ΔW, computed "
        "beside the base, which must stay as it is. Use LoRA on linear layers of a model that is not quantised, or "
        "sample without vLLM: use_vllm=False."
    )
