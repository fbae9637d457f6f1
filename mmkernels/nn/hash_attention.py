"""EcoFormer's attention as a module: one projection hashed for queries and keys alike.

Names of parameters are those of the published code, so that its checkpoints load.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.nn.linear import Linear
from mmkernels.nn.mlp import KernelSwitch
from mmkernels.nn.tensor_classes import op_takes
from mmkernels.ops.hash_attention import ecoformer_attention
from mmkernels.reference import hash_attention as reference

# Where a published checkpoint has what.
_PUBLISHED = {"supports": "anchor", "projection": "A", "mean": "mvec"}


class EcoFormerAttention(KernelSwitch):
    """proj(ecoformer_attention(to_qk(x), to_v(x))): attention by hash codes, of linear cost; x [B, N, dim] -> [B, N, dim].

    Queries and keys are one projection, hashed to codes of `bits` signs: h = sign(A (k - mean)), where k are the Gaussian
    kernels of the unit row to `supports` points. The hash functions are buffers and no parameters: :func:`fit_hash` learns
    them from one batch, and the gradient passes the sign straight through. A new module has none: its forward raises, until
    they are fitted or loaded. (The published code learns them inside the first forward pass, whatever batch that gets.)
    ``fit_hash(..., iterations=0)`` keeps the random projection and only chooses supports, for who wants no learning.

    Parameters and state_dict keys are to_qk, to_v and proj, each a :class:`Linear`, packed in eval mode; the buffers
    supports [H, supports, D], projection [H, bits, supports] and mean [H, supports]; and, as torch's extra state, whether
    they are fitted (`is_trained`, a bool). Files of the published code load: their names and shapes are converted, and their
    hash functions count as fitted where their supports are not all zero.

    Args:
        dim: channels of x and of the output.
        num_heads: H, which divides dim.
        bits: of a code, from 1 to 32. supports: points that the kernels are centred on.
        self_term: what stands beside the sum over codes: "own", c times the token's own value, as published in code; or
            "all", c times the sum of all values, with which the weights of a row sum to 1.
        offset: c, which keeps the sum of a row's weights positive: a number above `bits`; None for bits + 1, as published in
            code; "power_of_two" for the paper's, the least one that is at least bits + 1.
        qk_bias, v_bias, proj_bias: whether the layers have a bias.
        device, dtype: as in nn.Linear; float32, bfloat16, float16 or float64.
        packed_dtype: as in :class:`Linear`.
        kernels: True runs the ops, False plain torch, as tensors of other classes (DTensor) always do. May be set at any
            time.

    Raises:
        ValueError: an argument is out of range.

    Source: "EcoFormer: Energy-Saving Attention with Linear Complexity" (2022).
    """

    supports: Tensor
    projection: Tensor
    mean: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        bits: int = 16,
        supports: int = 25,
        self_term: str = "own",
        offset: float | str | None = None,
        qk_bias: bool = True,
        v_bias: bool = True,
        proj_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        packed_dtype: torch.dtype | None = None,
        kernels: bool = True,
    ) -> None:
        if num_heads < 1 or dim % num_heads != 0:
            raise ValueError(f"num_heads: expected a divisor of dim, {dim}, got {num_heads}")
        if not 1 <= bits <= 32:
            raise ValueError(f"bits: expected 1 to 32, got {bits}")
        if supports < 1:
            raise ValueError(f"supports: expected at least 1, got {supports}")
        if self_term not in ("own", "all"):
            raise ValueError(f"self_term: expected 'own' or 'all', got {self_term!r}")
        if not (offset in (None, "power_of_two") or (isinstance(offset, (int, float)) and offset > bits)):
            raise ValueError(f"offset: expected None, 'power_of_two' or a number above bits={bits}, got {offset!r}")
        super().__init__()
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.bits, self.self_term, self.offset = bits, self_term, offset
        self.to_qk = Linear(dim, dim, qk_bias, device, dtype, packed_dtype=packed_dtype)
        self.to_v = Linear(dim, dim, v_bias, device, dtype, packed_dtype=packed_dtype)
        self.proj = Linear(dim, dim, proj_bias, device, dtype, packed_dtype=packed_dtype)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.register_buffer("supports", torch.zeros(num_heads, supports, self.head_dim, **like))
        self.register_buffer("projection", torch.randn(num_heads, bits, supports, **like))
        self.register_buffer("mean", torch.zeros(num_heads, supports, **like))
        self.is_trained = False
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, dim] -> [B, N, dim], in the dtype of the weights.

        Raises:
            RuntimeError: the hash functions are not fitted.
            ValueError: x is of another shape. TypeError, ValueError: with kernels, as :func:`mmkernels.linear`.
        """
        self.check_input(x)
        if not self.is_trained:
            raise RuntimeError(
                "EcoFormerAttention: the hash functions are not fitted; call mmkernels.nn.fit_hash(model, batch), or load a "
                "state that has them"
            )
        qk, v = self.heads_of(self.to_qk(x)), self.heads_of(self.to_v(x))
        run = ecoformer_attention if self.kernels and op_takes(qk, v) else reference.ecoformer_attention
        out = run(qk, v, self.supports, self.projection, self.mean, self_term=self.self_term, offset=self.offset)
        return self.proj(out.transpose(1, 2).flatten(2))

    def check_input(self, x: Tensor) -> None:
        if x.dim() != 3 or x.size(-1) != self.dim:
            raise ValueError(f"x: expected [B, N, {self.dim}], got shape {tuple(x.shape)}")

    def heads_of(self, x: Tensor) -> Tensor:
        """[B, N, dim] -> a view [B, H, N, D]."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def get_extra_state(self) -> Tensor:
        # A tensor, so that formats that hold nothing else take it.
        return torch.tensor(self.is_trained)

    def set_extra_state(self, state: Tensor) -> None:
        self.is_trained = bool(state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        published = f"{prefix}fast_attention."
        state_dict.pop(f"{published}projection_matrix", None)  # of another attention; the published forward never reads it
        for name, theirs in _PUBLISHED.items():
            value = state_dict.pop(f"{published}ksh.{theirs}", None)
            if value is None:
                continue
            own = getattr(self, name)
            state_dict[prefix + name] = value.view_as(own) if value.numel() == own.numel() else value
            if name == "supports":
                state_dict.setdefault(f"{prefix}_extra_state", value.any())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, bits={self.bits}, supports={self.supports.shape[1]}, "
            f"self_term={self.self_term!r}, offset={self.offset!r}, is_trained={self.is_trained}, {super().extra_repr()}"
        )
