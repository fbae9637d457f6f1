"""mk.swap on open_clip's towers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import oracle
from support import assert_same_bits
from torch import Tensor, nn

import mmkernels as mk

oracle("open_clip")

from open_clip.coca_model import CoCa  # noqa: E402
from open_clip.model import CLIP, CustomTextCLIP  # noqa: E402
from open_clip.transformer import LayerNormFp32  # noqa: E402

VISION = {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 9, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
POOLED = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 5}
DECODER = {"context_length": 9, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1, "attn_pooler_heads": 2}


def clip(**vision: Any) -> nn.Module:
    return CLIP(24, VISION | vision, TEXT)


MODELS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "clip": (clip, 0.9),
    "clip quick gelu": (lambda: CLIP(24, VISION, TEXT, quick_gelu=True), 0.9),
    "clip layer scale": (lambda: clip(ls_init_value=0.1), 0.9),
    "clip pooled by attention": (lambda: clip(**POOLED), 0.9),
    "custom text": (lambda: CustomTextCLIP(24, VISION, TEXT), 0.9),
    "coca": (
        lambda: CoCa(
            32,
            DECODER | {"mlp_ratio": 2},
            TEXT | {"embed_cls": True, "output_tokens": True},
            VISION | POOLED | {"output_tokens": True},
        ),
        0.9,
    ),
}


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = MODELS[name][0]().eval().to(dtype)
    if name == "coca":  # left as memory is found
        nn.init.normal_(model.text_decoder.text_projection, std=0.1)
    image = torch.randn(2, 3, 32, 32, generator=generator).to(dtype)
    return model, (image, torch.randint(1, 50, (2, 9), generator=generator))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_numbers_hold_and_the_kernels_do_the_work(name: str, dtype: torch.dtype) -> None:
    model, inputs = made(name, dtype)
    report = mk.swap(model)
    found = report.verify(inputs)
    assert found.within_rule, str(found)
    covered = report.coverage(inputs)
    assert covered.share >= MODELS[name][1] and not covered.fallbacks, str(covered)
    assert not report.declined, str(report)
    assert {"mk.mlp", "mk.layer_norm"} & {entry.runs for entry in report.replaced}


@pytest.mark.parametrize("name", ["clip", "clip quick gelu"])
def test_mlps_are_one_op_each(name: str) -> None:
    model, inputs = made(name)
    mk.swap(model, only="*.mlp*")
    mk.last_kernels(clear=True)
    with torch.no_grad():
        model(*inputs)
    assert [op for op, _ in mk.last_kernels()] == ["mlp"] * 4


def test_put_back() -> None:
    model, inputs = made("clip")
    with torch.no_grad():
        plain = model(*inputs)
        mk.swap(model)
        mk.unswap(model)
        for ours, theirs in zip(model(*inputs), plain, strict=True):
            assert_same_bits(ours, theirs, "put back")


def test_norms_in_float32() -> None:
    norm = LayerNormFp32(24)
    nn.init.normal_(norm.weight)
    x = torch.randn(5, 24).bfloat16()
    wanted = norm(x)
    report = mk.swap(norm)
    mk.last_kernels(clear=True)
    assert_same_bits(norm(x), wanted, "in float32")
    assert mk.last_kernels() and not report.declined
    norm.bfloat16()
    with pytest.raises(RuntimeError):  # torch's own error, as before the swap
        norm(x)
    assert "a weight of torch.bfloat16" in report.declined[0].reason
