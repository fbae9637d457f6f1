"""Experts whose weights are not in memory: they are read one after the other while the one before computes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkernels.nn.expert_parallel import in_slot_order
from mmkernels.ops.moe import dispatch, moe_mlp
from mmkernels.ops.routing import Routing, fixed_routing
from mmkernels.reference import moe as reference


class _File:
    """The experts of a safetensors file.

    The pages of a mapping count as the process's own as long as it stands, so each expert is read through one of its own:
    were one kept, all experts would be resident in the end.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            import safetensors  # noqa: F401 - said here, not at the first call
        except ImportError as error:
            raise ImportError("experts: a file needs the package safetensors") from error
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"experts: expected a safetensors file, got {str(path)!r}")

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            yield file

    def shapes(self, names: list[str]) -> dict[str, tuple[int, ...] | None]:
        with self._opened() as file:
            there = set(file.keys())
            return {name: tuple(file.get_slice(name).get_shape()) if name in there else None for name in names}

    def like(self, name: str) -> Tensor:
        with self._opened() as file:
            return file.get_slice(name)[0].clone()

    def read(self, expert: int, into: dict[str, Tensor]) -> None:
        with self._opened() as file:
            for name, buffer in into.items():
                buffer.copy_(file.get_slice(name)[expert])


class _Tensors:
    """The experts of tensors, which may be on another device."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = {name: tensor.detach() for name, tensor in tensors.items() if isinstance(tensor, Tensor)}

    def shapes(self, names: list[str]) -> dict[str, tuple[int, ...] | None]:
        return {name: tuple(self.tensors[name].shape) if name in self.tensors else None for name in names}

    def like(self, name: str) -> Tensor:
        return self.tensors[name][0]

    def read(self, expert: int, into: dict[str, Tensor]) -> None:
        for name, buffer in into.items():
            buffer.copy_(self.tensors[name][expert], non_blocking=True)


class _Buffer:
    """The weights of one expert, and on a GPU when the work that read them last is done."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights
        self.free: Any = None


class ExpertBuffers:
    """The two buffers of one stream, or of several whose experts have the same shapes and which never run together."""

    def __init__(self) -> None:
        self.pair: tuple[_Buffer, _Buffer] | None = None
        self.one_at_a_time = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ExpertBuffers.__init__(self)

    @property
    def nbytes(self) -> int:
        """0 before the first call."""
        return sum(tensor.nbytes for buffer in self.pair or () for tensor in buffer.weights.values())


class ExpertStream:
    """Weights of experts in a safetensors file, or in tensors that may be on another device, and two buffers.

    Experts compute in their order, those without tokens left out; a thread fills one buffer while the expert in the other
    computes. What the experts gave is kept by slot in the dtype of the output and summed at the end as the resident kernel
    does, so that in float32 the bits are the same; in half precision each slot's output is rounded before.

    Args:
        source: path of a safetensors file, or a mapping of tensors.
        shapes: the names of the weights and biases, as :func:`mmkernels.moe_mlp` has them, with shapes [E, ...].
        prefix: what the names in the source begin with.

    Raises:
        ValueError: there is no such file, or a weight is missing or has another shape.
        TypeError: the source is neither.

    Source: "M3ViT: Mixture-of-Experts Vision Transformer with Model-Accelerator Co-design" (2022), its computation
    reordering.
    """

    def __init__(
        self, source: str | Path | Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], prefix: str = ""
    ) -> None:
        if not isinstance(source, (str, Path, Mapping)):
            raise TypeError(f"experts: expected a path or a mapping of tensors, got {type(source).__name__}")
        self.source = _Tensors(source) if isinstance(source, Mapping) else _File(source)
        self.prefix, self.names = prefix, list(shapes)
        found = self.source.shapes([prefix + name for name in shapes])
        for name, shape in shapes.items():
            if found[prefix + name] is None:
                raise ValueError(f"experts: expected {prefix + name} of shape {tuple(shape)}, which is not there")
            if found[prefix + name] != tuple(shape):
                raise ValueError(f"experts: expected {prefix + name} of shape {tuple(shape)}, got {found[prefix + name]}")
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.buffers = ExpertBuffers()

    @property
    def buffer_bytes(self) -> int:
        """What the two buffers hold; 0 before the first call."""
        return self.buffers.nbytes

    def share_buffers(self, other: ExpertStream) -> None:
        """Uses the buffers of `other`, whose experts have the same shapes (and dtype): the layers of a model need no more
        than one layer does."""
        if {n: s[1:] for n, s in other.shapes.items()} != {n: s[1:] for n, s in self.shapes.items()}:
            raise ValueError(f"other: expected experts of the shapes {self.shapes}, got {other.shapes}")
        self.buffers = other.buffers

    def _buffers_on(self, device: torch.device) -> tuple[_Buffer, _Buffer]:
        pair = self.buffers.pair
        if pair is None or next(iter(pair[0].weights.values())).device != device:
            with torch.inference_mode(False):  # buffers made in inference mode could be written in no other
                self.buffers.pair = None
                like = {name: self.source.like(self.prefix + name) for name in self.names}
                made = [{n: torch.empty((1, *t.shape), dtype=t.dtype, device=device) for n, t in like.items()} for _ in "ab"]
                pair = self.buffers.pair = _Buffer(made[0]), _Buffer(made[1])
            if device.type == "cuda":  # the memory may be what work in flight still reads
                for buffer in pair:
                    buffer.free = torch.cuda.current_stream(device).record_event()
        return pair

    def _load(self, expert: int, buffer: _Buffer, stream: Any) -> None:
        if buffer.free is not None:
            buffer.free.synchronize()
        with torch.no_grad(), contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            self.source.read(expert, {self.prefix + name: tensor[0] for name, tensor in buffer.weights.items()})
        if stream is not None:
            stream.synchronize()

    def run(
        self, x: Tensor, routing: Routing, activation: str | None, residual: Tensor | None = None, *, kernels: bool = True
    ) -> Tensor:
        """:func:`mmkernels.moe_mlp` of x [..., C], without gradients; the experts' outputs with `kernels` off are plain
        torch's."""
        rows = x.reshape(-1, x.shape[-1])
        slots = max(1, routing.expert_ids.size(1))
        order, offsets, positions = dispatch(routing.expert_ids, routing.num_experts)
        bounds, of_token = offsets.tolist(), order // slots
        used = [expert for expert in range(routing.num_experts) if bounds[expert] < bounds[expert + 1]]
        function = moe_mlp if kernels else reference.moe_mlp
        on_gpu = x.device.type == "cuda"
        copies = torch.cuda.Stream(x.device) if on_gpu else None
        values: Tensor | None = None
        with self.buffers.one_at_a_time, ThreadPoolExecutor(1, "mmkernels-experts") as loader:
            buffers = self._buffers_on(x.device)
            loads: list[Future] = [loader.submit(self._load, used[0], buffers[0], copies)] if used else []
            for number, expert in enumerate(used):
                loads[number].result()
                if number + 1 < len(used):
                    loads.append(loader.submit(self._load, used[number + 1], buffers[(number + 1) % 2], copies))
                buffer = buffers[number % 2]
                begin, end = bounds[expert], bounds[expert + 1]
                chosen = rows[of_token[begin:end]]
                alone = fixed_routing(torch.zeros(end - begin, dtype=torch.int64, device=x.device), 1)
                given = function(chosen, alone, activation=activation, **buffer.weights)
                if values is None:
                    values = given.new_empty((bounds[-1], given.size(1)))
                values[begin:end] = given
                if on_gpu:
                    buffer.free = torch.cuda.current_stream(x.device).record_event()
        if values is None:
            values = x.new_empty((0, buffers[0].weights["w_out"].size(1)))
        out = in_slot_order(values, positions, routing.weights).to(values.dtype).view(*x.shape[:-1], values.size(1))
        return out if residual is None else out + residual
