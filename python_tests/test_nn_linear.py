"""Linear, Mlp, GluMlp and ActivatorBlock: kernels on and off, and every rule about when a weight is packed."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import assert_same_bits, assert_within_rule
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

import mmkernels as mk
from mmkernels.nn import ActivatorBlock, GluMlp, Linear, Mlp, repack

K, H, N = 24, 40, 16  # N and K of weights are odd for no tile, and differ


@pytest.fixture(autouse=True)
def _alone(threads: None) -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # nothing here is large enough for two
    yield
    torch._dynamo.reset()


class Ops(TorchDispatchMode):
    """The operators of this package that ran, and how many packs each took."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[tuple[str, int]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "mmkernels" and op._schema.name != "mmkernels::norm":  # norms have nothing to pack
            packs = sum(isinstance(arg, Tensor) and arg.dtype == torch.uint8 for arg in args)
            self.ran.append((op._schema.name.removeprefix("mmkernels::"), packs))
        return op(*args, **(kwargs or {}))


def ops(module: nn.Module, *args: Any) -> list[tuple[str, int]]:
    with Ops() as seen:
        module(*args)
    return seen.ran


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)).to(dtype)


def layer(**options: Any) -> Linear:
    """In eval mode, frozen, so that packs serve."""
    return Linear(K, N, **options).eval().requires_grad_(False)


def plain(module: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, module.weight, module.bias)


def assert_current(module: Linear, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> None:
    """No old weight is served: the call gives what the weight as it is now gives."""
    call = module if call is None else call
    torch.testing.assert_close(call(x), plain(module, x), rtol=1e-4, atol=1e-4)


def packed(module: Linear) -> mk.PackedLinear | None:
    return module._pack._packed


def used_by_graphs(module: Linear) -> bool:
    """What a compiled graph finds while it runs: whether the pack is of the weight as it is now."""
    return bool(torch.ops.mmkernels.check_packs([module.weight], [packed(module)._panels]))


class Graphs:
    """A torch.compile backend that runs the graph as it is, and keeps it."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs.append(graph)
        return graph

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, backend=self, fullgraph=True)

    def packs(self) -> int:
        """How many packs are inputs of the last graph; none may be a constant."""
        graph = self.graphs[-1]
        constants = [value for value in vars(graph).values() if isinstance(value, Tensor)] + list(graph.buffers())
        assert not any(value.dtype == torch.uint8 for value in constants)
        return sum(
            node.op == "placeholder" and node.meta["example_value"].dtype == torch.uint8 for node in graph.graph.nodes
        )


MODULES: dict[str, tuple[Callable[..., nn.Module], bool]] = {  # and whether it takes a residual
    "linear": (lambda **o: Linear(K, K, **o), True),
    "linear_gelu": (lambda **o: Linear(K, K, bias=False, activation="gelu", **o), True),
    "mlp": (lambda **o: Mlp(K, H, **o), True),
    "mlp_no_bias": (lambda **o: Mlp(K, H, activation="silu", bias=(False, True), **o), True),
    "glu": (lambda **o: GluMlp(K, H, **o), True),
    "glu_product": (lambda **o: GluMlp(K, H, norm="product", **o), True),
    "glu_factors": (lambda **o: GluMlp(K, H, activation="gelu", norm="factors", **o), True),
    "activator": (lambda **o: ActivatorBlock(K, H, **o), False),
    "activator_glu": (lambda **o: ActivatorBlock(K, H, feed_forward=False, **o), False),
}
PACKS = {"linear": 1, "linear_gelu": 1, "mlp": 2, "mlp_no_bias": 2, "glu": 3, "glu_product": 3, "glu_factors": 3}
PACKS |= {"activator": 5, "activator_glu": 3}


# --- the numbers ------------------------------------------------------------------------------------------------------
def outputs(module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of inputs and parameters."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    out = module(*inputs)
    upstream = tokens(*out.shape, dtype=out.dtype)
    return [out, *torch.autograd.grad(out, [*inputs, *module.parameters()], upstream)]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODULES)
def test_kernels_and_plain_torch_agree(name: str, dtype: torch.dtype, training: bool) -> None:
    make, takes_residual = MODULES[name]
    module = make(dtype=dtype).train(training)
    off = make(dtype=dtype, kernels=False).train(training)
    off.load_state_dict(module.state_dict())
    oracle = copy.deepcopy(off).double()
    inputs = [tokens(3, 5, K, dtype=dtype)] + ([tokens(5, K, dtype=dtype)] if takes_residual else [])
    names = ["output", "grad x", *["grad residual"] * takes_residual, *(n for n, _ in module.named_parameters())]
    wanted = outputs(oracle, [tensor.double() for tensor in inputs])
    for what, a, b, c in zip(names, outputs(module, inputs), outputs(off, inputs), wanted, strict=True):
        assert_within_rule(a, b, c, what)
    with torch.no_grad():  # with packs, in eval mode
        assert_within_rule(module(*inputs), off(*inputs), wanted[0].detach(), "without gradients")
        with Ops() as seen:
            module(*inputs)
        assert sum(packs for _, packs in seen.ran) == (0 if training else PACKS[name]), seen.ran
        with Ops() as seen:
            off(*inputs)
        assert not seen.ran


def test_kernels_may_be_switched_at_any_time() -> None:
    for name, (make, _) in MODULES.items():
        module, x = make().eval(), tokens(5, K)
        assert ops(module, x), name
        module.kernels = False
        assert not module.kernels and not ops(module, x), name
        module.eval()
        assert all(packed(m) is None for m in module.modules() if isinstance(m, Linear))
        module.kernels = True
        with torch.no_grad():
            assert sum(packs for _, packs in ops(module, x)) == PACKS[name], name


def test_linear_is_an_nn_linear() -> None:
    for bias in (True, False):
        torch.manual_seed(1)
        ours = Linear(K, N, bias, activation="relu")
        torch.manual_seed(1)
        theirs = nn.Linear(K, N, bias)
        assert isinstance(ours, nn.Linear)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for key, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[key], value)
        ours.eval()
        assert packed(ours) is not None and list(ours.state_dict()) == list(theirs.state_dict())
        assert not list(ours.buffers()) and len(list(ours.children())) == 0
        theirs.reset_parameters()
        ours.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours(tokens(3, K)), F.relu(theirs(tokens(3, K))))


def test_arguments() -> None:
    for make in (Linear, Mlp, GluMlp):
        with pytest.raises(ValueError, match=r"activation: expected one of None, relu, .* got 'tanh'"):
            make(K, N, activation="tanh")
        with pytest.raises(ValueError, match=r"packed_dtype: expected None .* or torch.int8, got torch.bfloat16"):
            make(K, N, packed_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="norm: expected one of None, product, factors, got 'rms'"):
        GluMlp(K, N, norm="rms")
    with pytest.raises(TypeError, match="weight: expected the dtype of x"):
        Linear(K, N)(tokens(3, K).double())
    with pytest.raises(ValueError, match="residual: expected the shape"):
        Mlp(K, H)(tokens(3, K), tokens(2, K))
    assert "activation=gelu" in repr(Linear(K, N, activation="gelu")) and "kernels=True" in repr(Mlp(K))


def test_sizes_of_the_mlps() -> None:
    for make in (Mlp, GluMlp):
        assert make(K)(tokens(2, K)).shape == (2, K)
        assert make(K, H, N)(tokens(2, K)).shape == (2, N)
    for k, n in ((0, 5), (5, 0), (1, 5), (5, 1)):
        torch.testing.assert_close(Linear(k, n).eval()(torch.ones(3, k)).shape, torch.Size([3, n]))


# --- when a weight is packed ------------------------------------------------------------------------------------------
def test_eval_packs_and_train_drops() -> None:
    module, x = Linear(K, N).requires_grad_(False), tokens(3, K)
    assert packed(module) is None and ops(module, x) == [("linear", 0)] and packed(module) is None
    nn.Sequential(module).eval()  # a parent's eval() reaches it
    first = packed(module)
    assert first is not None and ops(module, x) == [("linear", 1)]
    module.eval()
    assert packed(module) is first
    module.train()
    assert packed(module) is None and ops(module, x) == [("linear", 0)]
    module.weight.data.mul_(2)  # nobody counts this, and nobody needs to
    module.eval()
    assert_current(module, x)


def test_an_eager_call_packs_unless_the_weight_wants_a_gradient() -> None:
    module, x = Linear(K, N).eval(), tokens(3, K)
    assert ops(module, x) == [("linear", 0)] and packed(module) is None  # the pack of eval() has gone
    with torch.no_grad():
        assert ops(module, x) == [("linear", 1)]
    module.requires_grad_(False)
    x.requires_grad_()
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, module.weight.sum(0).expand(3, K))
    assert packed(module) is not None


@pytest.mark.parametrize("int8", [False, True], ids=["own", "int8"])
def test_a_changed_weight_is_never_served_stale(int8: bool) -> None:
    module = Linear(64, 64, packed_dtype=torch.int8 if int8 else None).eval().requires_grad_(False)
    x = tokens(3, 64)

    def check(*, packs: bool = True) -> None:
        wanted = plain(module, x)
        error = (module(x) - wanted).norm() / wanted.norm()
        assert error < (3e-2 if int8 else 1e-6), error
        assert not packs or packed(module) is not None

    check()
    module.weight.mul_(2)
    check()
    module.weight.detach()[3] = 7  # shares the counter
    check()
    nn.init.normal_(module.weight)
    check()
    module.bias.add_(3)
    check()
    for _ in range(8):  # the allocator soon gives the address of the first weight again
        module.weight.data = module.weight.data * 1.5
        module.weight.data = module.weight.data * 1.5
        check()
    module.weight.data = module.weight.data.t()  # the same address, the same version
    check(packs=False)
    module.weight = nn.Parameter(tokens(64, 64), requires_grad=False)
    check(packs=False)
    check()
    module.bias = None
    check(packs=False)
    check()


def test_a_write_behind_torchs_back_needs_repack() -> None:
    model, x = nn.Sequential(layer(), nn.ReLU()), tokens(3, K)
    module = model[0]
    module(x)
    module.weight.data.mul_(2)
    module.repack()
    assert_current(module, x)
    module.weight.numpy()[:] = 3
    assert repack(model) is model
    assert_current(module, x)
    model.train()
    repack(model)
    assert packed(module) is None


def test_a_pack_by_itself_follows_its_weight() -> None:
    weight, x = nn.Parameter(tokens(64, 64), requires_grad=False), tokens(3, 64)
    pack = mk.pack_linear(weight)
    for _ in range(4):
        weight.data = weight.data * 1.5
        weight.data = weight.data * 1.5
        torch.testing.assert_close(mk.linear(x, pack), F.linear(x, weight), rtol=1e-4, atol=1e-4)
    weight.data, x = weight.data.bfloat16(), x.bfloat16()
    torch.testing.assert_close(mk.linear(x, pack), F.linear(x, weight), rtol=2e-2, atol=2e-2)
    assert pack.dtype == torch.bfloat16 and pack.is_current()


def test_load_state_dict_packs_anew() -> None:
    x = tokens(3, K)
    for assign in (False, True):
        module = layer()
        old = packed(module)
        module.load_state_dict(nn.Linear(K, N).state_dict(), assign=assign)
        new = packed(module)
        assert new is not None and new is not old and new.weight is module.weight and new.is_current()
        assert_current(module, x)
        module.train().load_state_dict(nn.Linear(K, N).state_dict(), assign=assign)
        assert packed(module) is None


def test_conversion_packs_anew() -> None:
    module, swapped = layer(), layer()
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        module.to(dtype)
        assert packed(module).dtype == dtype and packed(module).is_current()
        x = tokens(3, K, dtype=dtype)
        oracle = plain(copy.deepcopy(module).double(), x.double())
        assert_within_rule(module(x), plain(module, x), oracle, str(dtype))
    assert packed(module.to("meta")) is None
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        swapped.double()
        assert packed(swapped).dtype == torch.float64
        swapped.load_state_dict(nn.Linear(K, N).state_dict())
        assert_current(swapped, tokens(3, K).double())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    # Nobody tells the module of this one.
    module = layer()
    module.weight.data, module.bias.data = module.weight.data.bfloat16(), module.bias.data.bfloat16()
    x = tokens(3, K, dtype=torch.bfloat16)
    torch.testing.assert_close(module(x), plain(module, x))
    assert packed(module).dtype == torch.bfloat16


def test_meta_weights_come_alive() -> None:
    with torch.device("meta"):
        module, model = Linear(K, N).eval(), Mlp(K, H).eval()
        assert module(torch.empty(3, K)).shape == (3, N) and model(torch.empty(3, K)).device.type == "meta"
    assert packed(module) is None
    module.to_empty(device="cpu")
    module.load_state_dict(nn.Linear(K, N).state_dict())
    assert packed(module) is not None
    assert_current(module, tokens(3, K))


def test_weights_of_odd_strides_are_used_unpacked() -> None:
    module = layer()
    module.weight.data = tokens(2 * N, 2 * K)[::2, ::2]
    assert ops(module, tokens(3, K)) == [("linear", 0)]
    assert_current(module, tokens(3, K))
    module.eval()
    assert packed(module) is None
    module.weight.data = tokens(K, N).t()
    assert_current(module, tokens(3, K))


def test_tied_weights() -> None:
    a, b = Linear(K, N), Linear(K, N)
    b.weight = a.weight
    model = nn.ModuleList([a, b]).eval().requires_grad_(False)
    x = tokens(3, K)
    for module in model:
        assert_current(module, x)
        assert packed(module).weight is a.weight
    a.weight.mul_(3)
    for module in model:
        assert_current(module, x)
    model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()})
    for module in copy.deepcopy(model):
        assert_current(module, x)


# --- copies -----------------------------------------------------------------------------------------------------------
def by_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def by_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_file])
def test_copies_have_a_pack_of_their_own(copied: Callable[[nn.Module], Any]) -> None:
    module, x = Mlp(K, H, packed_dtype=torch.int8).eval().requires_grad_(False), tokens(3, K)
    twin = copied(module)
    assert twin.fc1.packed_dtype == torch.int8
    for a, b in ((module.fc1, twin.fc1), (module.fc2, twin.fc2)):
        assert packed(b) is not None and packed(b) is not packed(a) and packed(b).weight is b.weight
    assert_same_bits(twin(x), module(x), "copy")
    before = module(x)
    twin.fc1.weight.zero_()
    twin.fc2.bias.zero_()
    assert_same_bits(module(x), before, "the original")
    assert twin(x).abs().max() < before.abs().max()
    assert packed(copied(module.train()).fc1) is None


def by_bytes(module: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(module, file)
    return file.getvalue()


def test_files_hold_the_plain_weight_alone() -> None:
    module, theirs = Linear(256, 256), nn.Linear(256, 256)
    for save in (pickle.dumps, by_bytes):
        without = len(save(module.train()))
        assert len(save(module.eval())) <= without + 8
        assert len(save(module)) < len(save(theirs)) + 1000
    assert packed(module) is not None
    assert b"PackedLinear" not in pickle.dumps(module)


# --- what may stand in the place of the weight ------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [nn.Parameter, torch.clone], ids=["parameter", "tensor"])
def test_functional_call(kind: Callable[[Tensor], Tensor]) -> None:
    module, x = layer(), tokens(3, K)
    own = packed(module)
    for scale in (2.0, 3.0):
        other = {name: kind(value * scale) for name, value in module.named_parameters()}
        out = torch.func.functional_call(module, other, (x,))
        torch.testing.assert_close(out, F.linear(x, other["weight"], other["bias"]))
        assert_current(module, x)
        assert packed(module) is own  # not packed back and forth
    other = {"bias": kind(module.bias + 1)}
    torch.testing.assert_close(torch.func.functional_call(module, other, (x,)), plain(module, x) + 1)
    assert_current(module, x)
    # Whoever stays is packed.
    module.weight, module.bias = nn.Parameter(module.weight * 2, False), nn.Parameter(module.bias * 2, False)
    assert [ops(module, x), ops(module, x)] == [[("linear", 0)], [("linear", 1)]]
    assert_current(module, x)


def test_functorch() -> None:
    module, x = layer(), tokens(3, K)
    module._pack.drop()
    torch.testing.assert_close(torch.vmap(module)(x), plain(module, x))  # packs under a transform, for later
    module.weight.mul_(2)
    torch.testing.assert_close(torch.vmap(module)(x), plain(module, x))
    module._pack.drop()
    torch.testing.assert_close(torch.func.grad(lambda x: module(x).sum())(x), module.weight.sum(0).expand(3, K))
    assert type(packed(module)._panels) is Tensor
    assert not torch._C._functorch.is_functorch_wrapped_tensor(packed(module)._panels)
    assert_current(module, x)
    parameters = {name: value.detach() for name, value in module.named_parameters()}
    gradients = torch.func.grad(lambda p: torch.func.functional_call(module, p, (x,)).sum())(parameters)
    torch.testing.assert_close(gradients["weight"], x.sum(0).expand(N, K))
    stacked = {name: torch.stack([value, value * 2]) for name, value in parameters.items()}
    out = torch.vmap(lambda p: torch.func.functional_call(module, p, (x,)))(stacked)
    torch.testing.assert_close(out, torch.stack([plain(module, x), plain(module, x) * 2]))


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def test_parametrizations() -> None:
    module, x = layer(), tokens(3, K)
    parametrize.register_parametrization(module, "weight", Scaled())
    module.parametrizations.weight.original.requires_grad_(False)
    for _ in range(2):
        assert ops(module, x) == [("linear", 0)]
        assert_current(module, x)
        module.parametrizations.weight.original.mul_(3)
        assert_current(module, x)
        module.eval()
        assert packed(module) is None
    assert_current(module, x, Graphs().compile(module))
    model = Mlp(K, H).eval()
    parametrize.register_parametrization(model.fc1, "weight", Scaled())
    torch.testing.assert_close(model(x), model.fc2(F.gelu(plain(model.fc1, x))))
    parametrize.remove_parametrizations(module, "weight")
    module.eval()
    assert type(module) is Linear and packed(module) is not None
    assert_current(module, x)


def test_weights_that_a_hook_computes() -> None:
    x = tokens(3, K)
    for change in (lambda m: prune.l1_unstructured(m, "weight", 0.5), weight_norm):
        module = layer()
        change(module)
        assert ops(module, x) == [("linear", 0)]
        assert_current(module, x)
        model = Mlp(K, H).eval()
        change(model.fc1)
        torch.testing.assert_close(model(x), model.fc2(F.gelu(plain(model.fc1, x))))


def test_inference_tensors() -> None:
    x = tokens(3, K)
    with torch.inference_mode():
        module = Linear(K, N).eval()
        assert module.weight.is_inference() and packed(module) is None
        assert_current(module, x)
        module.weight.mul_(2)  # is not counted
        assert_current(module, x)
    with torch.no_grad():
        assert_current(module, x)
    # A pack made in inference mode serves outside of it.
    module = layer()
    module._pack.drop()
    with torch.inference_mode():
        assert_current(module, x)
        module.weight.is_inference()
    assert not packed(module)._panels.is_inference()
    x.requires_grad_()
    Graphs().compile(module)(x).sum().backward()
    torch.testing.assert_close(x.grad, module.weight.sum(0).expand(3, K))
    with torch.inference_mode():
        module.double()
        assert_current(module, x.double())


def test_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        module, model = Linear(K, N).eval(), Mlp(K, H).eval()
        assert packed(module) is None
        assert type(module(torch.empty(3, K))) is FakeTensor and model(torch.empty(3, K)).shape == (3, K)
    module = layer()
    module._pack.drop()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert type(module(mode.from_tensor(tokens(3, K)))) is FakeTensor
    assert type(packed(module)._panels) is Tensor  # a real one, though made under the mode
    assert_current(module, tokens(3, K))


class Tagged(Tensor):
    """A subclass that its own functions keep."""


def test_tensor_subclasses_run_plain_torch() -> None:
    x = tokens(3, K).as_subclass(Tagged)
    for module in (layer(), Mlp(K, H).eval()):
        assert ops(module, x) == [] and type(module(x)) is Tagged
    module = layer()
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Tagged), requires_grad=False)
    module.eval()
    assert packed(module) is None and ops(module, tokens(3, K)) == []
    model = Mlp(K, H).eval()
    wanted = model(tokens(3, K))
    model.fc2.weight = nn.Parameter(model.fc2.weight.detach().as_subclass(Tagged))
    torch.testing.assert_close(model(tokens(3, K)).as_subclass(Tensor), wanted)


def test_dtensor() -> None:
    import torch.distributed as dist

    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        mesh = init_device_mesh("cpu", (1,))
        x = distribute_tensor(tokens(3, K), mesh, [Replicate()])
        for module in (layer(), Mlp(K, H).eval(), ActivatorBlock(K, H).eval()):
            wanted = module(tokens(3, K))
            distribute_module(module, mesh)
            module.eval()
            out = module(x)
            assert isinstance(out, DTensor)
            torch.testing.assert_close(out.to_local(), wanted)
    finally:
        dist.destroy_process_group()


# --- hooks and what others put in the place of a layer ----------------------------------------------------------------
def test_whoever_listens_to_a_layer_hears_it() -> None:
    x = tokens(3, K)
    for model in (Mlp(K, H).eval(), GluMlp(K, H).eval(), GluMlp(K, H, norm="factors").eval(), ActivatorBlock(K, H).eval()):
        wanted = model(x)
        for name, child in model.named_modules():
            if not isinstance(child, Linear):
                continue
            heard: list[Tensor] = []
            for listen in (child.register_forward_hook, child.register_forward_pre_hook):
                hook = listen(lambda module, args, out=None, heard=heard: heard.append(out))
                torch.testing.assert_close(model(x), wanted)
                hook.remove()
                assert len(heard) == 1, name
                if heard.pop() is not None:
                    torch.testing.assert_close(model(x), wanted)
            hook = child.register_full_backward_hook(lambda module, grad_in, grad_out, heard=heard: heard.append(grad_in))
            model(x.clone().requires_grad_()).sum().backward()
            hook.remove()
            assert len(heard) == 1, name
            forward = child.forward
            child.forward = lambda *args, forward=forward: forward(*args) * 0
            assert not torch.allclose(model(x), wanted), name
            del child.forward
        torch.testing.assert_close(model(x), wanted)


class Doubled(Linear):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return super().forward(x, residual) * 2


def test_what_a_hook_sees_is_what_timms_layers_give() -> None:
    model, x, seen = Mlp(K, H).eval(), tokens(3, K), []
    model.fc1.register_forward_hook(lambda module, args, out: seen.append(out))
    model(x)
    torch.testing.assert_close(seen[0], plain(model.fc1, x))  # before the activation
    for other in (nn.Linear(K, H), Doubled(K, H)):  # another class in its place, as adapters do
        model.fc1 = other
        torch.testing.assert_close(model(x), model.fc2(F.gelu(model.fc1(x))))


def test_global_hooks_hear_the_layers() -> None:
    model, seen = Mlp(K, H).eval(), []
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        model(tokens(3, K))
    finally:
        hook.remove()
    assert model.fc1 in seen and model.fc2 in seen


def test_requires_grad_is_left_alone() -> None:
    module = Mlp(K, H)
    module.fc1.weight.requires_grad_(False)
    module.eval().train().eval()
    module(tokens(3, K)).sum().backward()
    assert [p.requires_grad for p in module.parameters()] == [False, True, True, True]
    assert module.fc1.weight.grad is None and module.fc2.weight.grad is not None


# --- training ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=["single", "foreach", "fused"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_optimizers_in_eval_mode(options: dict[str, bool], compiled: bool) -> None:
    ours, theirs = Linear(K, N).eval(), nn.Linear(K, N)
    theirs.load_state_dict(ours.state_dict())
    call = Graphs().compile(ours) if compiled else ours
    x = tokens(5, K)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.1, **options) for m in (ours, theirs)]
    for _ in range(4):
        for module, optimizer in zip((call, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
        with torch.no_grad():
            assert_current(ours, x, call)
            assert_current(ours, x)
        torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-3, atol=1e-3)


def test_a_write_into_data_between_training_and_eval() -> None:
    module, x = Linear(K, N), tokens(3, K)
    for _ in range(3):
        module.train()
        module(x).sum().backward()
        module.weight.data.add_(module.weight.grad)
        module.eval()
        with torch.no_grad():
            assert_current(module, x)


@pytest.mark.parametrize("drop", [(0.4, 0.3), (0.4, 0.0), (0.0, 0.3)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_dropout_draws_as_timms(drop: tuple[float, float], with_residual: bool) -> None:
    x = tokens(50, K)
    residual = tokens(50, K) if with_residual else None
    added = 0 if residual is None else residual
    act = {Mlp: F.gelu, GluMlp: F.silu}
    for make, norm in ((Mlp, None), (GluMlp, None), (GluMlp, "product"), (GluMlp, "factors")):
        model = make(K, H, drop=drop, **({} if norm is None else {"norm": norm})).train()

        def reference(model: Any = model, make: Any = make, norm: Any = norm) -> Tensor:
            if make is Mlp:
                hidden = F.dropout(act[make](plain(model.fc1, x)), drop[0], model.training)
            else:
                gate, value = act[make](plain(model.fc1_g, x)), plain(model.fc1_x, x)
                hidden = model.norm(gate) * model.norm(value) if norm == "factors" else gate * value
                hidden = F.dropout(hidden, drop[0], model.training)
                hidden = model.norm(hidden) if norm == "product" else hidden
            return F.dropout(plain(model.fc2, hidden), drop[1], model.training) + added

        for kernels in (True, False):
            model.kernels = kernels
            for training in (True, False):
                model.train(training)
                torch.manual_seed(3)
                out = model(x, residual)
                torch.manual_seed(3)
                torch.testing.assert_close(out, reference(), rtol=1e-4, atol=1e-5)
        model.kernels = True
        if norm is None:
            assert [name for name, _ in ops(model.eval(), x)] == ["mlp"]
            with torch.no_grad():
                assert ops(model, x)[0][1] == (2 if make is Mlp else 3)
            assert [name for name, _ in ops(model.train(), x)] == (
                ["linear"] * (2 + (make is GluMlp)) if drop[0] else ["mlp"]
            )
    model = Mlp(K, H, drop=0.5).eval()
    model.drop1.train()  # as for Monte Carlo dropout
    assert not torch.equal(model(x), model(x))


# --- checkpoints ------------------------------------------------------------------------------------------------------
def test_state_dict_keys_are_timms() -> None:
    assert list(Mlp(K).state_dict()) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    keys = [f"{name}.{kind}" for name in ("fc1_g", "fc1_x", "norm", "fc2") for kind in ("weight", "bias")]
    assert list(GluMlp(K, norm="product").state_dict()) == keys
    assert list(GluMlp(K).state_dict()) == [key for key in keys if "norm" not in key]
    assert list(GluMlp(K, bias=False).state_dict()) == ["fc1_g.weight", "fc1_x.weight", "fc2.weight"]


@pytest.mark.parametrize("gate_last", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_a_checkpoint_with_gate_and_value_in_one(gate_last: bool, assign: bool) -> None:
    fc1, fc2, x = nn.Linear(K, 2 * H), nn.Linear(H, K), tokens(3, K)
    checkpoint = {f"mlp.fc1.{k}": v for k, v in fc1.state_dict().items()}
    checkpoint |= {f"mlp.fc2.{k}": v for k, v in fc2.state_dict().items()}
    first, second = fc1(x).chunk(2, dim=-1)
    wanted = fc2(first * F.silu(second) if gate_last else F.silu(first) * second)
    model = nn.ModuleDict({"mlp": GluMlp(K, H, gate_last=gate_last).eval()})
    given = dict(checkpoint)
    model.load_state_dict(checkpoint, assign=assign)
    assert checkpoint.keys() == given.keys()
    torch.testing.assert_close(model["mlp"](x), wanted)
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(storages) == len(list(model.parameters()))
    alone = GluMlp(K, H, gate_last=gate_last)
    alone.load_state_dict({key.removeprefix("mlp."): value for key, value in checkpoint.items()})
    torch.testing.assert_close(alone(x), wanted)
    alone.load_state_dict(model["mlp"].state_dict())  # and its own layout still
    with pytest.raises(RuntimeError, match=r"gate_last=\.\.\."):
        GluMlp(K, H).load_state_dict({key.removeprefix("mlp."): value for key, value in checkpoint.items()}, strict=False)


def test_activator_is_the_published_block() -> None:
    for feed_forward in (True, False):
        block, x = ActivatorBlock(K, H, feed_forward=feed_forward).eval(), tokens(2, 5, K)
        names = [f"actgu.{n}" for n in ("proj_1", "proj_2", "proj_3", "norm")] + ["ffn.net.0", "ffn.net.3"] * feed_forward
        assert list(block.state_dict()) == [f"{n}.{kind}" for n in ["norm", *names] for kind in ("weight", "bias")]
        for norm in (block.norm, block.actgu.norm):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        unit = block.actgu

        def norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], module.weight, module.bias, 1e-5)

        inner = norm(block.norm, x)
        both = norm(unit.norm, F.gelu(plain(unit.proj_1, inner))) * norm(unit.norm, plain(unit.proj_2, inner))
        wanted = x + plain(unit.proj_3, both)
        if feed_forward:
            wanted = wanted + plain(block.ffn.net[3], F.gelu(plain(block.ffn.net[0], norm(block.norm, wanted))))
        torch.testing.assert_close(block(x), wanted, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            assert ops(block, x) == [("linear", 1)] * 3 + [("mlp", 2)] * feed_forward
    block = ActivatorBlock(K, H, dropout=0.5).train()
    assert not torch.equal(block(x), block(x))
    assert torch.equal(block.actgu(x), block.actgu(x))


# --- compiled and exported --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["linear_gelu", "mlp", "glu", "activator"])
def test_compiled_right_after_eval_with_packs_as_inputs(name: str) -> None:
    make, takes_residual = MODULES[name]
    module = make().eval()
    inputs = [tokens(3, 5, K)] + ([tokens(3, 5, K)] if takes_residual else [])
    graphs = Graphs()
    call = graphs.compile(module)
    with torch.no_grad():
        out = call(*inputs)
        assert graphs.packs() == PACKS[name]
        assert_same_bits(out, module(*inputs), "compiled")
        for child in module.modules():
            assert not isinstance(child, Linear) or used_by_graphs(child)
        for parameter in module.parameters():
            parameter.mul_(2)
        changed = call(*inputs)
        assert len(graphs.graphs) == 1
        module.kernels = False
        torch.testing.assert_close(changed, module(*inputs), rtol=1e-4, atol=1e-4)
        module.kernels = True
    call(*inputs).sum().backward()
    assert graphs.packs() == 0  # as the weights want gradients
    wanted = [parameter.grad for parameter in module.parameters()]
    module.zero_grad()
    module(*inputs).sum().backward()
    for parameter, gradient in zip(module.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    module.train()
    with torch.no_grad():
        call(*inputs)
    assert graphs.packs() == 0


def test_a_compiled_graph_serves_no_old_weight() -> None:
    module, x, graphs = Linear(64, 64).eval().requires_grad_(False), tokens(3, 64), Graphs()
    call = graphs.compile(module)
    assert_current(module, x, call)
    assert used_by_graphs(module)
    module.weight.mul_(2)
    assert_current(module, x, call)
    assert not used_by_graphs(module)
    module.weight.data = module.weight.data * 1.5
    module.weight.data = module.weight.data * 1.5
    assert_current(module, x, call)
    module(x)  # eager calls pack again
    assert used_by_graphs(module)
    assert_current(module, x, call)
    module.weight.data.mul_(2)
    module.repack()
    assert_current(module, x, call)
    module.load_state_dict(nn.Linear(64, 64).state_dict())
    assert_current(module, x, call)
    assert len(graphs.graphs) == 1 and graphs.packs() == 1  # all that without another graph
    module.weight.data = module.weight.data.t()
    torch._dynamo.reset()  # torch 2.10 compiles nothing anew for other strides of a parameter
    assert_current(module, x, call)
    module.weight = nn.Parameter(tokens(64, 64), requires_grad=False)
    assert_current(module, x, call)
    module.to(torch.float64)
    assert_current(module, x.double(), call)
    module.weight.data, module.bias.data = module.weight.data.float(), module.bias.data.float()
    assert_current(module, x, call)


def test_a_compiled_graph_that_writes_to_the_weight() -> None:
    for backend in ("aot_eager", "inductor"):
        module, x = layer(), tokens(3, K)

        def step(module: Linear, x: Tensor) -> Tensor:
            module.weight.mul_(2)
            return module(x)

        call = torch.compile(step, backend=backend, fullgraph=True)
        for _ in range(3):
            out = call(module, x)
            torch.testing.assert_close(out, plain(module, x))
        assert_current(module, x)
        assert_current(module, x, torch.compile(module, backend=backend, fullgraph=True))


def test_functional_call_compiled() -> None:
    module, x, graphs = layer(), tokens(3, K), Graphs()
    call = graphs.compile(lambda parameters, x: torch.func.functional_call(module, parameters, (x,)))
    own = packed(module)
    for scale in (2.0, 3.0):
        other = {name: value * scale for name, value in module.named_parameters()}
        torch.testing.assert_close(call(other, x), F.linear(x, other["weight"], other["bias"]))
    assert graphs.packs() == 0 and packed(module) is own


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export(strict: bool) -> None:
    for make in (lambda: layer(activation="gelu"), lambda: GluMlp(K, H).eval(), lambda: ActivatorBlock(K, H).eval()):
        module, x = make(), tokens(3, K)
        held = [packed(m) for m in module.modules() if isinstance(m, Linear)]
        exported = torch.export.export(module, (x,), strict=strict)
        assert not exported.constants and exported.state_dict.keys() == module.state_dict().keys()
        assert any("mmkernels" in str(node.target) for node in exported.graph.nodes)
        torch.testing.assert_close(exported.module()(x), module(x))
        assert all(packed(m) is None or packed(m) in held for m in module.modules() if isinstance(m, Linear))


def test_compiled_by_inductor() -> None:
    module, x = Mlp(K, H).eval(), tokens(3, 5, K)
    with torch.no_grad():
        assert_same_bits(torch.compile(module, fullgraph=True)(x), module(x), "compiled")


# --- int8 -------------------------------------------------------------------------------------------------------------
def relative(actual: Tensor, oracle: Tensor) -> float:
    return ((actual.double() - oracle).norm() / oracle.norm()).item()


@pytest.mark.parametrize("name", ["linear", "linear_gelu", "mlp", "glu", "glu_factors"])
def test_int8_is_close(name: str) -> None:
    make, _ = MODULES[name]
    module, x = make(packed_dtype=torch.int8).eval(), tokens(6, K)
    oracle = copy.deepcopy(module)
    oracle.kernels = False
    wanted = oracle.double()(x.double())
    assert relative(module.train()(x), wanted) < 1e-5
    module.eval()
    out = module(x)
    assert 1e-5 < relative(out, wanted) < 0.03, "gradients wanted or not, eval mode quantises"
    with torch.no_grad():
        assert_same_bits(module(x), out, "without gradients")
        assert_same_bits(Graphs().compile(module)(x), out, "compiled")
        for child in module.modules():
            if isinstance(child, Linear):
                child._pack.drop()
        assert_same_bits(module(x), out, "packed by the call")
    assert relative(module.bfloat16()(x.bfloat16()), wanted) < 0.04


def test_int8_elsewhere() -> None:
    module, x = layer(packed_dtype=torch.int8), tokens(3, K)
    assert packed(module).dtype == torch.int8
    assert module(x.bfloat16()).dtype == torch.bfloat16
    x.requires_grad_()
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, module.weight.sum(0).expand(3, K), rtol=1e-4, atol=1e-4)  # of the weight itself
    module.double()
    assert packed(module) is None
    assert_current(module, x.double())
    module = Linear(K, N, packed_dtype=torch.int8).eval()
    for _ in range(3):
        with torch.no_grad():
            module.weight.mul_(2)
        assert relative(module(x), plain(module, x).double()) < 0.03
        assert packed(module) is not None


# --- autocast ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODULES)
def test_autocast(name: str) -> None:
    make, _ = MODULES[name]
    module = make().eval()
    off = copy.deepcopy(module)
    off.kernels = False
    oracle = copy.deepcopy(off).double()
    x = tokens(6, K)
    for grad in (torch.no_grad, nullcontext):
        with grad():
            wanted = oracle(x.double()).detach()
            with torch.autocast("cpu", torch.bfloat16):
                out, theirs = module(x), off(x)
            assert out.dtype == theirs.dtype
            bound = relative(theirs, wanted)
            assert relative(out, wanted) <= 2 * bound + 4e-3


def test_the_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMKERNELS_STRICT", "1")
    for name, (make, _) in MODULES.items():
        mk.last_kernels(clear=True)
        make().eval()(tokens(3, K))
        ran = mk.last_kernels()
        assert ran and all(op in ("linear", "mlp", "norm") and kernel.startswith("cpu/") for op, kernel in ran), (name, ran)
