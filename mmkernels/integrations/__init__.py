"""Drop-in replacement in models that others wrote: :func:`mmkernels.swap`, and what each of their packages needs for it."""

from mmkernels.integrations.report import SwapReport
from mmkernels.integrations.swap import swap, swapped, unswap

__all__ = ["SwapReport", "swap", "swapped", "unswap"]
