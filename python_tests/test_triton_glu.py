"""Gated MLPs in Triton, beyond the samples of their card."""

from __future__ import annotations

from interpreted import checks_of


def test_interpreter() -> None:
    """Every activation, many tiles and exact ones, empty tensors, numbers that overflow, on the CPU (triton_glu.py)."""
    assert checks_of("triton_glu") > 100
