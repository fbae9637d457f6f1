"""mmkernels: compute kernels for multimodal transformers.

    import mmkernels as mk
    rolled = mk.token_roll(x, num_frames=3)

Every op is a torch operator with autograd and torch.compile support, compiled kernels for the CPU and CUDA, Triton
kernels, and a definition in plain PyTorch beside it (``mmkernels.reference``).
"""

from mmkernels.inspection import explain, info
from mmkernels.ops.token_roll import token_roll, token_roll_layer_norm
from mmkernels.runtime import FallbackWarning, last_kernels
from mmkernels.version import __version__

__all__ = [
    "FallbackWarning",
    "__version__",
    "explain",
    "info",
    "last_kernels",
    "token_roll",
    "token_roll_layer_norm",
]
