"""Quantisation configs of the tests' own: every place in which weights can hide after processing.

`mx_hiding` turns each linear layer's weight into int8 and spreads what `apply` needs over a transposed view, a plain
attribute, a helper object that is no module, a dictionary, an attribute of a parameter, and Python floats.
`mx_opaque` hides the weight in a function, which nobody can copy. `mx_shared_scale` asks all ranks.
`mx_wider` is `mx_hiding` under another layout.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.nn import Parameter
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig


class Helper:
    """An object that is no module."""

    __slots__ = ("column_means", "tables")

    def __init__(self, weight: torch.Tensor, rows: int) -> None:
        self.column_means = weight.mean(dim=0)
        self.tables = {"row_signs": [torch.sign(weight.sum(dim=1))[:rows].clone()]}


class HidingMethod(UnquantizedLinearMethod):
    """int8, one scale a row; what is left of the weight's precision is dropped, so that every part counts."""

    wide: ClassVar[bool] = False

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        weight = layer.weight.data.float()
        scale = weight.abs().amax(dim=1).clamp(min=1e-8) / 127
        quantised = torch.round(weight / scale[:, None]).to(torch.int8)
        layer.packed = Parameter(quantised.t().contiguous().t(), requires_grad=False)  # strided
        layer.packed.row_scale = scale  # on a parameter
        layer.shift = (weight.mean(dim=1) * 0.01).clone()  # a plain attribute
        layer.helper = Helper(weight, weight.shape[0])
        layer._gain_float = 1.0 + float(weight.abs().mean())
        layer.sign_float = 0.99 if weight.sum() < 0 else 1.01
        if self.wide:
            layer.one_more = torch.zeros(3)
        del layer.weight

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        weight = layer.packed.float() * layer.packed.row_scale[:, None]
        weight = weight + layer.helper.column_means * 0.05
        weight = weight * layer._gain_float * layer.sign_float
        out = torch.nn.functional.linear(x.float(), weight) + layer.shift
        out = out + layer.helper.tables["row_signs"][0] * 0.01
        return (out + bias if bias is not None else out).to(x.dtype)


class OpaqueMethod(UnquantizedLinearMethod):
    """The weight in a closure."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        weight = layer.weight.data.clone()
        layer.weight = Parameter(torch.empty(0, dtype=weight.dtype), requires_grad=False)
        layer.matmul = lambda x, bias: torch.nn.functional.linear(x, weight, bias)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return layer.matmul(x, bias)


class SharedScaleMethod(UnquantizedLinearMethod):
    """int8 by one scale for all ranks, as vLLM's online fp8 under TP has it: processing is a collective."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        weight = layer.weight.data.float()
        largest = weight.abs().max()
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=get_tp_group().cpu_group)
        layer.scale = largest / 127
        layer.weight = Parameter(torch.round(weight / layer.scale).to(torch.int8), requires_grad=False)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        out = torch.nn.functional.linear(x.float(), layer.weight.float() * layer.scale)
        return (out + bias if bias is not None else out).to(x.dtype)


class WiderMethod(HidingMethod):
    """One tensor more."""

    wide = True


class HidingConfig(QuantizationConfig):
    """Found by name; needs no files."""

    method: ClassVar[type[UnquantizedLinearMethod]] = HidingMethod
    name: ClassVar[str] = "mx_hiding"

    def get_name(self) -> str:
        return self.name

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> HidingConfig:
        return cls()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        return self.method() if isinstance(layer, LinearBase) else None


class OpaqueConfig(HidingConfig):
    """`mx_opaque`."""

    method = OpaqueMethod
    name = "mx_opaque"


class SharedScaleConfig(HidingConfig):
    """`mx_shared_scale`."""

    method = SharedScaleMethod
    name = "mx_shared_scale"


def register(*, wider: bool) -> None:
    """Registers the configs in this process; `wider`: the layout of `mx_hiding` is not that of other processes."""
    HidingConfig.method = WiderMethod if wider else HidingMethod
    register_quantization_config("mx_hiding")(HidingConfig)
    register_quantization_config("mx_opaque")(OpaqueConfig)
    register_quantization_config("mx_shared_scale")(SharedScaleConfig)
