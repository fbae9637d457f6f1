"""Instructions that add, or take the least or the most of, floating-point numbers in memory in whatever order threads come.

Results would hang on that order. Those on integers give the same whatever the order. A compare-and-swap in a loop is how
software makes the others, so it counts as one.
"""

from __future__ import annotations

import re

_FLOATS = r"(?:f16x2|bf16x2|f16|bf16|f32|f64)"
# PTX: atom and red, those of several devices or elements (multimem.red, red.global.v4.f32) too.
_PTX = re.compile(rf"\b(?:atom|red)\b[.\w:]*\.(?:{_FLOATS}|cas)\b")
# SASS: RED, ATOM and what their names grow into (REDG, ATOMS, UREDGR); REDUX reduces in registers of one warp.
_SASS = re.compile(r"\b(?:(?:U?RED(?!UX)|ATOM|UBLKRED)\w*)\.[\w.]*(?:F16|BF16|F32|F64|CAS)[\w.]*")
_GCN = re.compile(
    rf"\b(?:global|flat|buffer|ds)_(?:atomic_)?(?:(?:pk_)?f?(?:add|min|max)_(?:rtn_)?{_FLOATS}\b|(?:cmpswap|cmpst)\w*)"
)


def in_ptx(text: str) -> list[str]:
    return _PTX.findall(text)


def in_sass(text: str) -> list[str]:
    return _SASS.findall(text)


def in_gcn(text: str) -> list[str]:
    return _GCN.findall(text)
