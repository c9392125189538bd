"""Linear layers for inference in float32 on CPUs: weights in oneDNN's own layout, packed once.

torch sends a float32 linear layer to MKL, which repacks the weight in every call and adds the bias in a pass of its
own. oneDNN takes weights that lie as its kernels want them (what torch.compile does when it freezes a model), about a
tenth faster on CPUs with AVX-512, with the same sums up to the order of rounding.
"""

import weakref

import torch
from torch import Tensor, nn

from dinoscope.models.layers import Linear

__all__ = ["PackedLinear", "can_pack", "pack_linears"]

_ROWS = 64 * 201  # of a usual batch, which the layout is chosen for; others are computed as well


class PackedLinear(nn.Module):
    """A linear layer of ours whose weight only oneDNN can read."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        bias = linear.effective_bias()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        with torch.inference_mode():
            self._bias = None if bias is None else bias.detach().clone()
            self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)
        self._handle = len(_packed)
        _packed.append(weakref.ref(self))

    def forward(self, tokens: Tensor) -> Tensor:
        """(…, inputs) -> (…, outputs)."""
        if torch.compiler.is_compiling():
            return _by_handle(tokens, self._handle, self.out_features)
        return self.product(tokens)

    def product(self, tokens: Tensor) -> Tensor:
        """The same, run as it is."""
        return torch.ops.mkldnn._linear_pointwise(tokens, self._weight, self._bias, "none", [], "")


_packed: list[weakref.ref[PackedLinear]] = []


# The compiler cannot look into packed weights; it calls this as a whole and fuses what lies between.
@torch.library.custom_op("dinoscope::packed_linear", mutates_args=())
def _by_handle(tokens: Tensor, handle: int, out_features: int) -> Tensor:
    return _packed[handle]().product(tokens.contiguous())


@_by_handle.register_fake
def _(tokens: Tensor, handle: int, out_features: int) -> Tensor:
    return tokens.new_empty(*tokens.shape[:-1], out_features)


def can_pack() -> bool:
    """Whether this build of torch has the operators, and this CPU gains from them."""
    operators = torch.ops.mkldnn if torch.backends.mkldnn.is_available() else None
    has_them = all(hasattr(operators, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    return has_them and "AVX512" in torch.backends.cpu.get_cpu_capability()


def pack_linears(model: nn.Module) -> int:
    """Replaces the linear layers of a backbone of ours by packed ones, in place; it is for inference only from then on.

    Layers with adapters, of other types than float32 and of other libraries' models, which may look at their weights,
    stay as they are.

    Returns:
        How many were replaced.
    """
    count = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear) and child.lora is None and _fits(child.weight):
                setattr(module, name, PackedLinear(child))
                count += 1
    return count


def _fits(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.device.type == "cpu"
