"""IMP: modalities on their own, the share of each expert, active parameters."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_models import imp, named, tokens
from support import assert_same_bits
from torch import Tensor

import mmkernels as mk
from mmkernels.models.imp import ImpBlock


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    torch.set_num_threads(1)  # nothing here is large enough for two


@torch.no_grad()
def test_imp_modalities_go_alone_and_experts_take_their_share() -> None:
    model = imp().eval()
    text, video = named(50, 2, 13), tokens(2, 3, 8, 32, 48)
    both = model(text, video)
    assert both.text.shape == (2, 13, 24) and both.video.shape == (2, 2 * 2 * 3, 24) and len(both.routings) == 4
    assert_same_bits(model(text).text, both.text, "text alone")
    assert_same_bits(model(video=video).video, both.video, "video alone")
    assert model(text).video is None and model(video=video).text is None
    for routing, count in zip(both.routings, (26, 26, 24, 24), strict=True):
        taken = torch.bincount(routing.expert_ids[routing.expert_ids >= 0], minlength=4)
        assert taken.tolist() == [round(count / 4)] * 4
    # Shorter, smaller, one word.
    assert model(video=video[:1, :, :4, :16, :16]).video.shape == (1, 1, 24)
    assert model(text[:1, :1]).text.shape == (1, 1, 24)


@torch.no_grad()
def test_imp_active_parameters_are_those_of_the_dense_model() -> None:
    """With a capacity factor of 1 a token passes one expert on average."""
    for size, millions in {"base": 85, "large": 302}.items():
        with torch.device("meta"):
            dense, sparse = (mk.models.create_model(f"imp_{kind}{size}") for kind in ("", "moe_"))
        active = sum(p.numel() / (16 if ".mlp.w_" in n else 1) for n, p in sparse.blocks.named_parameters())
        routers = sum(p.numel() for n, p in sparse.blocks.named_parameters() if n.endswith("router"))
        norms = sum(p.numel() for n, p in sparse.blocks.named_parameters() if n.endswith(("q_norm.weight", "k_norm.weight")))
        assert active - routers - norms == sum(p.numel() for p in dense.blocks.parameters())
        assert round(active / 1e6) == millions


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [True, False])
def test_imp_block_by_hand(qk_norm: bool) -> None:
    """All norms have the same eps, which counts in inputs as small as these; nothing has a bias."""
    eps, x = 1e-3, tokens(2, 7, 24, dtype=torch.float64) * 1e-2
    block = ImpBlock(24, 3, 40, qk_norm=qk_norm, eps=eps).double()
    assert not any("bias" in name or "b_" in name for name in block.state_dict())

    def norm(value: Tensor, weight: Tensor) -> Tensor:
        return F.layer_norm(value, value.shape[-1:], weight, eps=eps)

    for parameter in block.parameters():
        parameter.mul_(1.5)
    attn = block.attn
    q, k, v = (norm(x, block.norm1.weight) @ attn.qkv.weight.T).view(2, 7, 3, 3, 8).permute(2, 0, 3, 1, 4)
    if qk_norm:
        q, k = norm(q, attn.q_norm.weight), norm(k, attn.k_norm.weight)
    seen = (q @ k.mT / 8**0.5).softmax(-1) @ v
    middle = x + seen.transpose(1, 2).flatten(2) @ attn.proj.weight.T
    hidden = F.gelu(norm(middle, block.norm2.weight) @ block.mlp.fc1.weight.T, approximate="tanh")
    wanted = middle + hidden @ block.mlp.fc2.weight.T
    for kernels in (True, False):
        block.kernels = kernels
        torch.testing.assert_close(block(x)[0], wanted)


def test_imp_dense_models_have_no_norms_of_heads() -> None:
    """As in the code's configurations; the dense layers of models with experts have them."""
    for name, wanted in {"imp_base": False, "imp_large": False, "imp_moe_base": True, "imp_moe_large": True}.items():
        with torch.device("meta"):
            model = mk.models.create_model(name)
        names = [set(dict(block.attn.named_parameters())) for block in model.blocks]
        norms = {"q_norm.weight", "k_norm.weight"}
        assert all(found == {"qkv.weight", "proj.weight"} | (norms if wanted else set()) for found in names)
