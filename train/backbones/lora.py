"""Low-rank adapters beside frozen linear layers: y = W x + (alpha / r) B A x (Hu et al. 2021, arXiv 2106.09685, section 4.1)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MARK = "lora_"


class LoraLinear(nn.Linear):
    """A linear layer (its own weight kept by name) plus rank-r matrices lora_a (r, in) and lora_b (out, r), in float32.

    lora_b starts at zero, so that the layer starts as it was.
    """

    def __init__(self, layer: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.share = alpha / rank
        self.lora_a = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, layer.in_features), a=5**0.5).to(layer.weight.device))
        self.lora_b = nn.Parameter(torch.zeros(layer.out_features, rank, device=layer.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        frozen = F.linear(x, self.weight, self.bias)
        narrow = F.linear(x if torch.is_autocast_enabled(x.device.type) else x.to(self.lora_a.dtype), self.lora_a)
        return frozen + self.share * F.linear(narrow, self.lora_b).to(frozen.dtype)

    def merged(self) -> Tensor:
        """The one weight that computes the same, in the dtype of the frozen one."""
        with torch.no_grad():
            return (self.weight.float() + self.share * self.lora_b.float() @ self.lora_a.float()).to(self.weight.dtype)


def adapt(model: nn.Module, names: Sequence[str], rank: int, alpha: float, *, skip: str = "") -> None:
    """Put adapters beside every linear layer whose last name is in `names`, but not below `skip`. ValueError for a name without one."""
    linear = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear) and not (skip and path.startswith(skip))}
    found = {path: m for path, m in linear.items() if path.rpartition(".")[2] in names}
    if missing := set(names) - {path.rpartition(".")[2] for path in found}:
        allowed = ", ".join(sorted({path.rpartition(".")[2] for path in linear}))
        raise ValueError(f"no linear layer is called {', '.join(sorted(missing))}; allowed are {allowed}")
    for path, layer in found.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, LoraLinear(layer, rank, alpha))


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of `model` as if it had never been adapted: adapters added into the weights beside them."""
    state = {name: value for name, value in model.state_dict().items() if MARK not in name}
    state |= {f"{path}.weight": m.merged() for path, m in model.named_modules() if isinstance(m, LoraLinear)}
    return state
