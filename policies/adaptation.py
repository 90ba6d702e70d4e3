"""What of a policy is trained, and in which precision: whole parts, or low-rank adapters (LoRA), beside frozen weights.

Works on the names of a policy's modules, for every family. It is applied to a policy right after it was built or
loaded; what `save_policy` writes of an adapted policy is a plain one again, with the adapters merged.

Precision: frozen matrices may be bfloat16. What is trained stays float32, because a bfloat16 weight of 0.02 cannot take
a step of less than 4e-5; and so do norms, normalisers and whatever touches actions. Each layer computes in the
precision of its own weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import MethodType
from typing import Any, Literal, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Part = Literal["vision", "projector", "language_model", "expert"]
PARTS: tuple[Part, ...] = ("vision", "projector", "language_model", "expert")
_WORDS: dict[Part, tuple[str, ...]] = {
    "expert": ("expert", "action_head"),
    "vision": ("vision", "vision_tower", "vision_model", "visual", "images"),
    "projector": ("projector", "connector", "multi_modal_projector"),
    "language_model": ("language_model", "text_model", "decoder", "lm_head", "text"),
}
_PART_OF: dict[str, Part] = {word: part for part, words in _WORDS.items() for word in words}
# Words in the names of what touches actions, states and flow times, and of what makes logits.
_FLOAT32 = re.compile(
    r"(^|\.)(action_\w+|state_\w+|time_mlp\w*|proprio_\w+|pooled_in|project|context_kv|logits_out|lm_head)(\.|$)"
)
_LAYER_LISTS = ("layers", "blocks")
_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters (Hu et al. 2021): W x + (alpha / rank) B A x, with B = 0 at the start.

    `targets`: last words of the names of the linear layers that get one. `parts`: where.
    """

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    parts: tuple[Part, ...] = ("language_model",)

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0.0:
            raise ValueError(f"LoRAConfig: rank must be at least 1 and alpha positive, got {self.rank}, {self.alpha}")


@dataclass(frozen=True)
class AdaptationConfig:
    """The default changes nothing.

    `train`: the parts whose own weights are trained ("all": each as the policy comes), beside `lora`'s adapters.
    "expert" is all that is not the vision-language model. `precision`: "bfloat16" is for what is frozen.
    `gradient_checkpointing`: layers are computed again in the backward pass instead of kept. `compile`: the expert.
    """

    train: tuple[Literal["all", "vision", "projector", "language_model", "expert"], ...] = ("all",)
    lora: LoRAConfig | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        both = [part for part in (self.lora.parts if self.lora else ()) if part in self.train or "all" in self.train]
        if both:
            raise ValueError(
                f"AdaptationConfig: {both} would be trained whole and have adapters too; name in train the other parts "
                "alone, such as ('expert',)"
            )
        if not self.train and self.lora is None:
            raise ValueError("AdaptationConfig: nothing would be trained; name parts in train, or give lora")

    @property
    def is_off(self) -> bool:
        return self == AdaptationConfig()

    def of_frozen_encoder(self) -> AdaptationConfig:
        """What of it is left where the expert alone is to learn."""
        lora = self.lora
        if lora is not None:
            lora = replace(lora, parts=("expert",)) if "expert" in lora.parts else None
        return replace(self, train=() if lora is not None else ("expert",), lora=lora)


def apply_adaptation(policy: nn.Module, config: AdaptationConfig, *, seed: int = 0) -> None:
    """Change `policy` in place; its outputs stay (to rounding in bfloat16). `seed`: of the adapters' first weights.

    What the policy itself had frozen stays so. Raises ValueError where the policy has no such part or layer.
    """
    if config.is_off:
        return
    if config.lora is not None:
        _add_adapters(policy, config.lora, seed)
    if "all" not in config.train:
        _train_only(policy, config)
    for parameter in policy.parameters():  # of a policy that was stored with parts of lower precision
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if config.precision == "bfloat16":
        _lower_precision(policy)
    if config.gradient_checkpointing:
        _checkpoint_layers(policy)
    if config.compile:
        _compile_expert(policy)


def part_of(name: str) -> Part:
    """Of a parameter or module with this dotted name. The first word that says it counts; "expert" where none does."""
    for word in name.split("."):
        if word in _PART_OF:
            return _PART_OF[word]
    return "expert"


def _train_only(policy: nn.Module, config: AdaptationConfig) -> None:
    found = {part_of(name) for name, _ in policy.named_parameters()}
    missing = [part for part in config.train if part not in found]
    if missing:
        raise ValueError(f"{type(policy).__name__} has no part {missing} to train, it has {sorted(found)}")
    for name, parameter in policy.named_parameters():
        if part_of(name) not in config.train and ".lora_" not in name:
            parameter.requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------ adapters
def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("adapters need peft: pip install 'vla-rl[vla]'") from error
    return peft


def _add_adapters(policy: nn.Module, config: LoRAConfig, seed: int) -> None:
    linear = {n: part_of(n) for n, m in policy.named_modules() if isinstance(m, nn.Linear)}
    targets = [n for n, part in linear.items() if part in config.parts and n.rpartition(".")[2] in config.targets]
    if not targets:
        known = sorted({n.rpartition(".")[2] for n, part in linear.items() if part in config.parts})
        raise ValueError(f"lora.targets {config.targets} name no linear layer of {config.parts}, there are {known}")
    # a layer that was frozen already is of no result (`freeze_unread`), and its adapter would never get a gradient
    targets = [n for n in targets if cast(nn.Linear, policy.get_submodule(n)).weight.requires_grad]
    if not targets:
        raise ValueError(f"all layers that lora.targets name in {config.parts} are frozen already")
    peft = _peft()
    _inject(policy, peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets), seed)


def _inject(policy: nn.Module, peft_config: Any, seed: int) -> None:
    trained = {id(p): p.requires_grad for p in policy.parameters()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _peft().inject_adapter_in_model(peft_config, policy)
    adapted = {id(p) for _, layer in _adapted(policy) for p in layer.base_layer.parameters()}
    for name, parameter in policy.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
        else:  # peft freezes all that is no adapter
            parameter.requires_grad_(trained[id(parameter)] and id(parameter) not in adapted)


def _adapted(policy: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in policy.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "get_delta_weight"):
            yield name, module


def _merged_weight(layer: Any) -> Tensor:
    weight = layer.base_layer.weight
    return (weight.float() + sum(layer.get_delta_weight(a).float() for a in layer.active_adapters)).to(weight.dtype)


@torch.no_grad()
def plain_state_dict(policy: nn.Module) -> dict[str, Tensor]:
    """The state of `policy` with its adapters merged: keys and shapes of the policy as it was built."""
    state = {k.replace(".base_layer.", "."): v for k, v in policy.state_dict().items() if ".lora_" not in k}
    return state | {f"{name}.weight": _merged_weight(layer) for name, layer in _adapted(policy)}


@torch.no_grad()
def merge_lora(policy: nn.Module) -> None:
    """Put the adapters into the weights, for good. Nothing to do where there are none."""
    for name, layer in list(_adapted(policy)):
        base = layer.base_layer
        base.weight.copy_(_merged_weight(layer))
        base.requires_grad_(True)  # as it was: a frozen layer gets no adapter
        parent, _, own = name.rpartition(".")
        setattr(policy.get_submodule(parent), own, base)
    policy.__dict__.pop("peft_config", None)


def save_adapter(policy: nn.Module, folder: str | Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` as peft does. Raises ValueError without adapters."""
    configs, folder = getattr(policy, "peft_config", None), Path(folder)
    if not configs:
        raise ValueError(f"{type(policy).__name__} has no adapters; give apply_adaptation a LoRAConfig first")
    folder.mkdir(parents=True, exist_ok=True)
    configs["default"].save_pretrained(str(folder))
    state = _peft().get_peft_model_state_dict(policy, adapter_name="default")
    tensors = {f"{_PEFT_PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / _ADAPTER_WEIGHTS, metadata={"format": "pt"})


def load_adapter(policy: nn.Module, folder: str | Path) -> None:
    """Add the adapters of `folder` to a policy without any. Raises ValueError where they do not fit."""
    folder, peft = Path(folder), _peft()
    if list(_adapted(policy)):
        raise ValueError(f"{type(policy).__name__} has adapters already; merge_lora them first")
    if not (folder / _ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {_ADAPTER_CONFIG}; expected a folder written by save_adapter or peft"
        )
    kind = json.loads((folder / _ADAPTER_CONFIG).read_text()).get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{folder}: adapters of kind {kind!r}, expected 'LORA'")
    config = peft.LoraConfig.from_pretrained(str(folder))
    state = {k.removeprefix(_PEFT_PREFIX): v for k, v in load_file(folder / _ADAPTER_WEIGHTS).items()}
    layers = {k.rpartition(".lora_")[0] for k in state}
    known = dict(policy.named_modules())
    wrong = sorted(name for name in layers if not isinstance(known.get(name), nn.Linear))
    if wrong:
        raise ValueError(f"{folder}: {type(policy).__name__} has no linear layers {wrong[:5]}")
    config.target_modules = sorted(layers)
    _inject(policy, config, seed=0)
    peft.set_peft_model_state_dict(policy, state, adapter_name="default")


# ----------------------------------------------------------------------------------------------------------- precision
def _lower_precision(policy: nn.Module) -> None:
    lowered = 0
    for name, module in policy.named_modules():
        words = name.split(".")
        if not isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d | nn.Conv3d) or _is_in_norm(policy, words):
            continue
        if _FLOAT32.search(name) or any(p.requires_grad for p in module.parameters()):
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.bfloat16()
        lowered += 1
    if not lowered:
        raise ValueError("precision 'bfloat16' has no effect: no matrix is frozen; name in train what is to be trained")
    compute_in_own_precision(policy)


def _is_in_norm(policy: nn.Module, words: list[str]) -> bool:
    return any("Norm" in type(policy.get_submodule(".".join(words[:i]))).__name__ for i in range(1, len(words) + 1))


def compute_in_own_precision(policy: nn.Module) -> None:
    """From now on each layer takes inputs of any precision, and computes in that of its weights."""
    for module in policy.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d | nn.LayerNorm):
            if module.weight is not None and _cast_inputs not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_cast_inputs)
        elif "RMSNorm" in type(module).__name__ and _cast_output not in module._forward_hooks.values():
            module.register_forward_hook(_cast_output)


def load_precision(policy: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give the parameters of `policy` that are bfloat16 in `tensors` that precision."""
    lower = {name for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16}
    for name, parameter in policy.named_parameters():
        if name in lower:
            parameter.data = parameter.data.bfloat16()
    if lower:
        compute_in_own_precision(policy)


def _cast_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = cast(Tensor, module.weight).dtype
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def _cast_output(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    del module
    return output.to(inputs[0].dtype) if isinstance(output, Tensor) else output


# -------------------------------------------------------------------------------------------------- memory and speed
def layers_of(policy: nn.Module) -> list[nn.Module]:
    """The repeated layers of all transformers in `policy`: what is computed again, or sharded, one at a time."""
    lists = [m for n, m in policy.named_modules() if isinstance(m, nn.ModuleList) and n.endswith(_LAYER_LISTS)]
    return [layer for layers in lists for layer in layers]


def _checkpoint_layers(policy: nn.Module) -> None:
    layers = layers_of(policy)
    if not layers:
        raise ValueError(f"gradient_checkpointing: {type(policy).__name__} has no transformer layers")
    for layer in layers:
        layer.forward = MethodType(forward, layer)


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`forward` of a checkpointed layer. It has that name because a pickled bound method is looked up by it: a copy in
    another process has the class's own, which is right where nobody learns. (A deep copy is bound to the copy.)"""
    own = type(self).forward
    if not torch.is_grad_enabled():
        return own(self, *args, **kwargs)
    return checkpoint(own, self, *args, use_reentrant=False, **kwargs)


def _compile_expert(policy: nn.Module) -> None:
    modules = [module for name, module in policy.named_children() if _PART_OF.get(name) == "expert"]
    if not modules:
        raise ValueError(f"compile: {type(policy).__name__} has no module named expert or action_head")
    for module in modules:
        module.compile()  # in place: a compiled function would keep the policy that it was made of when that is copied


__all__ = [
    "AdaptationConfig",
    "LoRAConfig",
    "apply_adaptation",
    "compute_in_own_precision",
    "layers_of",
    "load_adapter",
    "load_precision",
    "merge_lora",
    "part_of",
    "plain_state_dict",
    "save_adapter",
]
