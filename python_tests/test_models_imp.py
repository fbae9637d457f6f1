"""IMP: modalities on their own, the share of each expert, active parameters."""

from __future__ import annotations

import pytest
import torch
from small_models import imp, named, tokens
from support import assert_same_bits

import mmkernels as mk


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
        assert active - routers == sum(p.numel() for p in dense.blocks.parameters())
        assert round(active / 1e6) == millions
