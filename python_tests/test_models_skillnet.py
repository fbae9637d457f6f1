"""SkillNet: the active skills alone."""

from __future__ import annotations

import pytest
import torch
from small_models import named, skillnet


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    torch.set_num_threads(1)  # nothing here is large enough for two


def test_skillnet_runs_the_active_skills_alone() -> None:
    model = skillnet()
    ids = named(50, 2, 9)
    out = model(ids, ["general", "image"])
    out.sum().backward()
    for block in model.blocks:
        assert [bool(gradient.any()) for gradient in block.mlp.w_out.grad] == [True, False, True, False, False, False]
    torch.testing.assert_close(out, model(ids, ["image", "general"]))
    assert not torch.allclose(out, model(ids, ["general", "text"]))
    with torch.no_grad():
        for block in model.blocks:
            for parameter in block.mlp.parameters():
                parameter[3] = parameter[1]
    torch.testing.assert_close(model(ids, ["sound"]), model(ids, ["text"]))
    visible = torch.tensor([[True] * 6 + [False] * 3] * 2)
    for kernels in (True, False):
        model.kernels = kernels
        torch.testing.assert_close(model(ids, ["code"], visible)[:, :6], model(ids[:, :6], ["code"]), rtol=1e-4, atol=1e-5)
