"""`import mmkernels.integrations.transformers`: "mmkernels" among transformers' implementations of attention and experts.

Then ``attn_implementation="mmkernels"`` and ``experts_implementation="mmkernels"`` choose the kernels, in from_pretrained, a
config, or set_attn_implementation. (:func:`mmkernels.swap` needs none of this, and replaces more.) What an op cannot do is
done by transformers' sdpa function, or by the experts' eager forward.

"mmkernels" means what transformers means by "sdpa": there are no attention weights, and a call without a mask is causal
where the attention module says so of itself. Modules of models that support "eager" alone refuse it when they are called.
"""

from __future__ import annotations

import transformers

from mmkernels.integrations.transformers_attention import implementation
from mmkernels.integrations.transformers_experts import experts

NAME = "mmkernels"


def _register() -> bool:
    """Registers what this version of transformers has a place for; whether experts are among it."""
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    except ImportError as error:
        raise ImportError(
            f"transformers: expected at least 4.53, which has AttentionInterface and AttentionMaskInterface, got "
            f"{transformers.__version__}"
        ) from error
    AttentionInterface.register(NAME, implementation)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # bool, or None where the module's is_causal says it
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError:
        return False
    ExpertsInterface.register(NAME, experts)
    return True


_has_experts = _register()


def require_experts() -> None:
    """Raises ImportError where this version of transformers lets nobody register experts."""
    if not _has_experts:
        raise ImportError(
            f"transformers: expected at least 5.0, which has ExpertsInterface, got {transformers.__version__}; "
            f'attn_implementation="{NAME}" works, experts_implementation does not'
        )
