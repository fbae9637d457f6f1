"""Models of timm and transformers by name, and what they have to be called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.integrations.packages import require

# Tokens of a text, and samples of a sound, where a model takes any number of them.
_TEXT_LENGTH, _SOUND_LENGTH = 32, 16000

# Regions of a picture that LXMERT's kind takes.
_REGIONS = 36


@dataclass(frozen=True)
class Need:
    """An argument of a model.

    Attributes:
        kind: "image" [C, H, W], "video" [T, C, H, W], "ids" [L], or "numbers" of any other shape.
        shape: without the batch.
        vocabulary: of ids.
    """

    kind: str
    shape: tuple[int, ...]
    vocabulary: int = 0


def load_model(name: str, *, weights: Path | None = None, seed: int = 0) -> tuple[str, nn.Module]:
    """A model in eval mode, its weights random unless they are on this machine. Nothing is downloaded.

    Args:
        name: a timm model ("vit_base_patch16_224"), a type of transformers ("bert", "clip": its configuration by default),
            or a folder or a name that transformers finds on this machine, weights included; "timm:" or "transformers:"
            before it says which is meant.
        weights: a state_dict to load, a file of safetensors or of torch.
        seed: of the random weights.

    Returns:
        ("timm" or "transformers", the model).

    Raises:
        ValueError: neither package knows the name, or the weights do not fit. ImportError: the package is not installed.
        OSError: the weights cannot be read.
    """
    source, _, rest = name.rpartition(":")
    if source not in ("", "timm", "transformers"):
        raise ValueError(f"model: expected timm:NAME or transformers:NAME, got {name!r}")
    if source == "":
        source = "timm" if _is_timm(rest) else "transformers"
    torch.manual_seed(seed)
    if source == "timm":
        timm = require("timm")
        if not timm.is_model(rest):
            raise ValueError(f"model: timm {timm.__version__} has no {rest!r}; timm.list_models() has the names")
        model = timm.create_model(rest, pretrained=False)
    else:
        model = _from_transformers(rest)
    if weights is not None:
        try:
            model.load_state_dict(_read(weights))
        except RuntimeError as error:
            raise ValueError(f"weights: {weights} does not fit {name}: {error}") from error
    return source, model.eval()


def needs(model: nn.Module) -> dict[str, Need]:
    """The arguments that a model of timm or transformers has to be called with, by name.

    Raises:
        ValueError: they are of kinds that are not known here.
    """
    parameters = inspect.signature(model.forward).parameters
    config = getattr(model, "config", None)
    if config is None:
        shape = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))
        return {next(iter(parameters)): Need("image", tuple(shape))}
    found = {name: need for name, of in _NEEDS.items() if name in parameters and (need := of(config)) is not None}
    if not found:
        raise ValueError(f"model: what {type(model).__name__} takes is not known here: {', '.join(parameters)}")
    return found


def random_inputs(model: nn.Module, batch: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Random arguments for the model, [batch, ...] each."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for name, need in needs(model).items():
        shape = (batch, *need.shape)
        if need.kind == "ids":
            inputs[name] = torch.randint(min(5, need.vocabulary - 1), need.vocabulary, shape, generator=generator)
        else:
            inputs[name] = torch.randn(shape, generator=generator).to(dtype)
    return inputs


def _is_timm(name: str) -> bool:
    try:
        return bool(require("timm").is_model(name))
    except ImportError:
        return False


def _from_transformers(name: str) -> nn.Module:
    transformers = require("transformers")
    if name in transformers.CONFIG_MAPPING:
        return transformers.AutoModel.from_config(transformers.AutoConfig.for_model(name))
    try:
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model: {name!r} is no model of timm, no type of transformers {transformers.__version__}, and nothing that "
            "transformers finds on this machine (nothing is downloaded)"
        ) from error
    files = [*Path(name).glob("*.safetensors"), *Path(name).glob("*.bin")] if Path(name).is_dir() else [Path(name)]
    if not files:
        return transformers.AutoModel.from_config(config)
    return transformers.AutoModel.from_pretrained(name, local_files_only=True)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"weights: there is no file {path}")
    if path.suffix == ".safetensors":
        return require("safetensors.torch").load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


# --- what the arguments of transformers' models are -------------------------------------------------------------------
def _pixels(config: Any) -> Need | None:
    vision = getattr(config, "vision_config", config)
    size, frames = getattr(vision, "image_size", 224), getattr(vision, "num_frames", None)
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    picture = (getattr(vision, "num_channels", 3), height, width)
    return Need("image", picture) if frames is None else Need("video", (frames, *picture))


def _ids(config: Any) -> Need | None:
    text = config.get_text_config()
    vocabulary = getattr(text, "vocab_size", None)
    if vocabulary is None:
        return None
    longest = getattr(text, "max_position_embeddings", None) or _TEXT_LENGTH
    return Need("ids", (min(_TEXT_LENGTH, longest),), vocabulary)


def _decoder_ids(config: Any) -> Need | None:
    return _ids(config) if getattr(config, "is_encoder_decoder", False) else None


def _spectrum(config: Any) -> Need | None:
    bins, positions = getattr(config, "num_mel_bins", 80), getattr(config, "max_source_positions", 1500)
    return Need("numbers", (bins, 2 * positions))


def _sound(config: Any) -> Need | None:
    return Need("numbers", (_SOUND_LENGTH,))


_NEEDS: dict[str, Callable[[Any], Need | None]] = {
    "input_ids": _ids,
    "pixel_values": _pixels,
    "input_features": _spectrum,
    "input_values": _sound,
    "decoder_input_ids": _decoder_ids,
    "visual_feats": lambda config: Need("numbers", (_REGIONS, config.visual_feat_dim)),
    "visual_pos": lambda config: Need("numbers", (_REGIONS, config.visual_pos_dim)),
}
