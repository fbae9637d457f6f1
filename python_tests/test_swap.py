"""mk.swap on models of torch.nn: what is replaced and by what, and that everything else stays what it was."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import run_in_processes
from support import assert_same_bits
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import mmkernels as mk
from mmkernels.integrations import rules
from mmkernels.integrations.verification import Difference

C, HEADS = 24, 3


class SelfAttention(nn.Module):
    """A class that no rule knows, which calls torch's function."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(C, 3 * C)
        self.proj = nn.Linear(C, C)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, C // HEADS)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.RMSNorm(C)
        self.attn = SelfAttention()
        self.mlp = nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(approximate="tanh"), nn.Dropout(0.1), nn.Linear(2 * C, C))
        self.register_buffer("scale", torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x)) * self.scale


def blocks() -> nn.Module:
    return nn.Sequential(Block(), Block())


def encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(C, HEADS + 1, 2 * C, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2)


def decoder(**options: Any) -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(C, HEADS, 2 * C, batch_first=True, **options), 2)


def tokens(seed: int = 0, length: int = 9) -> Tensor:
    return torch.randn(2, length, C, generator=torch.Generator().manual_seed(seed))


MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "blocks": (blocks, tokens()),
    "encoder": (encoder, tokens()),
    "encoder norm first gelu": (lambda: encoder(norm_first=True, activation="gelu"), tokens()),
    "encoder odd activation": (lambda: encoder(activation=F.softplus), tokens()),
    "encoder masks": (
        encoder,
        {"src": tokens(), "mask": torch.ones(9, 9).triu(1).bool(), "src_key_padding_mask": torch.arange(9).expand(2, 9) > 6},
    ),
    "decoder": (
        decoder,
        {"tgt": tokens(), "memory": tokens(1, 5), "tgt_mask": torch.ones(9, 9).triu(1).bool(), "tgt_is_causal": True},
    ),
    "decoder norm first": (lambda: decoder(norm_first=True, activation=nn.SiLU()), (tokens(), tokens(1, 5))),
    "transformer": (
        lambda: nn.Transformer(C, HEADS, 1, 1, 2 * C, batch_first=True, activation=F.gelu),
        (tokens(), tokens(1, 5)),
    ),
    "sequential": (
        lambda: nn.Sequential(nn.Linear(C, 8), nn.ReLU(), nn.Linear(8, 8), nn.SiLU(), nn.LayerNorm(8), nn.Linear(8, 3)),
        tokens(),
    ),
}


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    build, inputs = MODELS[name]

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    if isinstance(inputs, dict):
        inputs = {key: cast(value) for key, value in inputs.items()}
    else:
        inputs = tuple(cast(value) for value in inputs) if isinstance(inputs, tuple) else cast(inputs)
    return build().eval().to(dtype), inputs


def run(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        if isinstance(inputs, dict):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def state_of(model: nn.Module) -> dict[str, Any]:
    """What swapping must leave alone, and unswapping must bring back."""
    return {name: (type(module), dict(module.__dict__)) for name, module in model.named_modules()}


# --- the numbers ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_hold_and_the_kernels_do_the_work(name: str, dtype: torch.dtype) -> None:
    model, inputs = made(name, dtype)
    report = mk.swap(model)
    found = report.verify(inputs)
    assert found.within_rule, str(found)
    assert found.oracle == torch.float64
    assert any(difference.name.startswith("output") for difference in found.differences)
    wanted = sum(1 for _ in model.parameters()) + len(inputs if isinstance(inputs, (dict, tuple)) else (inputs,))
    masks = (
        sum(isinstance(v, (bool, Tensor)) and not torch.is_floating_point(torch.as_tensor(v)) for v in inputs.values())
        if (isinstance(inputs, dict))
        else 0
    )
    assert sum(difference.name.startswith("gradient") for difference in found.differences) == wanted - masks
    if name == "encoder masks":
        return  # padded batches become nested tensors, which torch's own path serves
    covered = report.coverage(inputs)
    assert covered.share == 1.0 and covered.before > 0, str(covered)
    assert not covered.fallbacks and all(kernel.split(" ")[1].startswith("cpu/") for kernel in covered.kernels)
    assert not report.declined


def test_verify_sees_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = made("blocks")
    report = mk.swap(model)
    right = mk.nn.Linear.forward
    monkeypatch.setattr(mk.nn.Linear, "forward", lambda self, x, residual=None: right(self, x, residual) * 1.0001)
    found = report.verify(inputs)
    assert not found.within_rule and found.outside and "NOT within the rule" in str(found)
    monkeypatch.setattr(mk.nn.Linear, "forward", lambda self, x, residual=None: right(self, x, residual) * torch.nan)
    found = report.verify(inputs, gradients=False)
    assert not found.within_rule and "not finite where" in str(found)


def test_the_rule_of_a_difference() -> None:
    def holds(after: float, before: float, largest: float = 1.0, typical: float = 0.0) -> bool:
        return Difference("output", largest, after, before, 0.0, 0.0, 1e-7, typical).within_rule

    assert holds(2e-3, 1e-3) and not holds(2.1e-3, 1e-3)
    assert holds(2e-7, 0.0) and not holds(3e-7, 0.0)
    assert holds(2.1e-3, 1e-3, typical=1.1e-3) and not holds(2.3e-3, 1e-3, typical=1.1e-3)
    assert holds(9e-9, 1e-9, largest=1e-9) and not holds(2e-8, 1e-9, largest=1e-9)  # nothing but rounding
    assert not Difference("output", 1.0, 0.0, 0.0, 3e-3, 1e-3, 1e-7).within_rule


def test_coverage_sees_what_is_left() -> None:
    model, inputs = made("blocks")
    report = mk.swap(model, skip=["0", "*.attn"])
    covered = report.coverage(inputs)
    rest = {name.split(" ")[0] for name in covered.remaining}
    assert 0.2 < covered.share < 0.4 and rest == {"aten.addmm", "aten._scaled_dot_product_flash_attention_for_cpu"}
    assert covered.left == sum(covered.remaining.values())


def test_profile_times_both() -> None:
    model, inputs = made("blocks")
    profile = mk.swap(model).profile(inputs, seconds=0.01)
    before, after = ({o.name for o in found} for found in (profile.operators_before, profile.operators_after))
    assert "mmkernels::mlp" in after and "mmkernels::mlp" not in before and "aten::addmm" in before
    assert profile.before.median_ms > 0 and "times as fast" in str(profile)


def test_int8_weights_on_request() -> None:
    model, inputs = made("sequential")
    with torch.no_grad():
        plain = model(inputs)
        report = mk.swap(model, dtype=torch.int8)
        quantised = model(inputs)
    assert not torch.equal(plain, quantised)
    torch.testing.assert_close(plain, quantised, atol=0.05, rtol=0.05)
    assert not report.verify(inputs, gradients=False).within_rule


# --- nothing else changes ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
def test_unswap_brings_everything_back(name: str) -> None:
    model, inputs = made(name)
    plain, before = run(model, inputs), state_of(model)
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    report = mk.swap(model)
    assert report.replaced and list(model.state_dict()) == keys
    assert all(p is parameters[n] for n, p in model.named_parameters()) and len(parameters) == len(list(model.parameters()))
    run(model, inputs)
    assert mk.unswap(model) is model
    after = state_of(model)
    assert after == before
    assert_same_bits(run(model, inputs), plain, "unswapped")


def test_attributes_of_the_same_name_come_back() -> None:
    layer = nn.Linear(C, C)
    layer.activation = "its owner's"  # type: ignore[assignment]
    mk.swap(layer)
    assert layer.activation is None
    assert mk.unswap(layer).activation == "its owner's"


def test_no_other_model_is_touched() -> None:
    model, inputs = made("blocks")
    other = copy.deepcopy(model)
    plain, before = run(other, inputs), state_of(other)
    mk.swap(model)
    assert state_of(other) == before
    assert_same_bits(run(other, inputs), plain, "the other model")
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


def test_swapping_twice_says_so() -> None:
    model, inputs = made("blocks")
    mk.swap(model)
    swapped, state = run(model, inputs), state_of(model)
    again = mk.swap(model)
    assert not again.replaced and "nothing to do" in str(again) and state_of(model) == state
    assert_same_bits(run(model, inputs), swapped, "swapped twice")
    mk.unswap(model)
    mk.unswap(model)
    assert all(rules.record_of(module) is None for module in model.modules())


def test_a_dry_run_changes_nothing() -> None:
    model, inputs = made("blocks")
    before = state_of(model)
    report = mk.swap(model, dry_run=True)
    assert state_of(model) == before and "would be replaced" in str(report)
    assert {entry.status for entry in report.entries} == {"replaced", "left"}
    with pytest.raises(ValueError, match="dry_run"):
        report.verify(inputs)


def test_the_report_lists_every_module() -> None:
    model, _ = made("blocks")
    report = mk.swap(model)
    assert [entry.name for entry in report.entries] == [name for name, _ in model.named_modules()]
    assert all(entry.runs if entry.status == "replaced" else entry.reason for entry in report.entries)
    by_name = {entry.name: entry for entry in report.entries}
    assert by_name["0.attn"].runs == "mk.attention" and by_name["0.mlp"].runs == "mk.mlp"
    assert by_name["1.norm2"].runs == "mk.rms_norm" and by_name["1.norm1"].cls == "torch.nn.modules.normalization.LayerNorm"
    assert "no rule" in by_name["0"].reason
    mk.unswap(model)
    with pytest.raises(ValueError, match="put back"):
        report.verify(tokens())


def test_only_and_skip() -> None:
    model, _ = made("blocks")
    names = lambda report: {entry.name for entry in report.replaced}  # noqa: E731
    assert names(mk.swap(model, only="0.attn", dry_run=True)) == {"0.attn", "0.attn.qkv", "0.attn.proj"}
    assert names(mk.swap(model, only=nn.LayerNorm, dry_run=True)) == {"0.norm1", "1.norm1"}
    assert names(mk.swap(model, only=["*.proj", nn.RMSNorm], skip="1", dry_run=True)) == {"0.attn.proj", "0.norm2"}
    for argument in ("only", "skip"):
        with pytest.raises(ValueError, match=f"{argument}: 'nothing' matches no module"):
            mk.swap(model, **{argument: "nothing"})
        with pytest.raises(TypeError, match=f"{argument}: expected patterns"):
            mk.swap(model, **{argument: [3]})
    with pytest.raises(ValueError, match=r"dtype: expected None or torch\.int8"):
        mk.swap(model, dtype=torch.float16)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module"):
        mk.swap(tokens())  # type: ignore[arg-type]
    assert all(rules.record_of(module) is None for module in model.modules())
    mk.swap(model, only="0")
    assert names(mk.swap(model)) >= {"1.attn", "1.mlp"} and not mk.swap(model).replaced


def test_an_exception_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = made("blocks")
    plain, before = run(model, inputs), state_of(model)
    calls = []
    apply = rules.Change.apply

    def failing(self: rules.Change) -> None:
        calls.append(self)
        if len(calls) == 5:
            raise RuntimeError("the fifth")
        apply(self)

    monkeypatch.setattr(rules.Change, "apply", failing)
    with pytest.raises(RuntimeError, match="the fifth"):
        mk.swap(model)
    assert state_of(model) == before
    assert_same_bits(run(model, inputs), plain, "after the exception")


def test_swapped_undoes_what_it_did() -> None:
    model, _ = made("blocks")
    mk.swap(model, only="0.mlp")
    before = state_of(model)
    with pytest.raises(KeyError), mk.swapped(model, skip="1.norm1") as report:
        assert report.replaced and type(model[0].attn.qkv) is mk.nn.Linear
        raise KeyError
    assert state_of(model) == before and type(model[0].mlp[0]) is mk.nn.Linear


def test_modes_flags_and_later_weights() -> None:
    model, inputs = made("blocks")
    model[0].attn.qkv.weight.requires_grad_(False)
    mk.swap(model)
    assert not model.training and not model[0].attn.qkv.weight.requires_grad
    other = blocks().eval()
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(run(model, inputs), run(other, inputs), rtol=1e-5, atol=1e-5)
    model.train()
    assert model[0].mlp[2].training and not torch.equal(run(model, inputs), run(model, inputs))  # dropout
    model.double()
    model.eval()
    torch.testing.assert_close(run(model, inputs.double()), run(other.double(), inputs.double()))


# --- what is left, and what is declined -------------------------------------------------------------------------------
def test_what_the_ops_cannot_take_is_left_with_its_reason() -> None:
    class Mine(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    patched = nn.Linear(C, C)
    patched.forward = lambda x: F.linear(x, patched.weight) - 1  # type: ignore[method-assign]
    model = nn.ModuleDict(
        {
            "mine": Mine(C, C),
            "patched": patched,
            "parametrized": nn.utils.parametrizations.weight_norm(nn.Linear(C, C)),
            "planes": nn.LayerNorm((4, C)),
            "lazy": nn.LazyLinear(4),
            "complex": nn.Linear(C, C, dtype=torch.complex64),
            "convolution": nn.Conv2d(3, 4, 2),
        }
    )
    report = mk.swap(model)
    assert not report.replaced
    reasons = {entry.name: entry.reason for entry in report.left}
    assert "no rule for this class" in reasons["mine"] and "no rule for this class" in reasons["convolution"]
    assert "set on the instance" in reasons["patched"]
    assert "no rule for this class" in reasons["parametrized"]
    assert "2 dimensions" in reasons["planes"] and "complex64" in reasons["complex"]
    assert "no rule" in reasons["lazy"] or "swap after" in reasons["lazy"]


def test_a_forward_that_is_not_known_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = rules.rule_of(nn.RMSNorm)
    assert rule is not None
    known = rules.digest(nn.RMSNorm)
    assert known is not None
    strict = rules.Rule(rule.replaces, rule.target, rule.runs, (known,), rule.refuses, rule.attributes)
    monkeypatch.setitem(rules._rules, rule.replaces, strict)
    assert mk.swap(nn.RMSNorm(C), dry_run=True).replaced
    original = nn.RMSNorm.forward

    def other(self: Any, x: Tensor) -> Tensor:
        return 2 * original(self, x)

    monkeypatch.setattr(nn.RMSNorm, "forward", other)
    report = mk.swap(nn.RMSNorm(C))
    assert not report.replaced
    assert report.left[0].reason == f"torch {torch.__version__}: its forward is not one that mmkernels knows"


def test_weights_that_are_asked_for_come_from_torch() -> None:
    attention = nn.MultiheadAttention(C, HEADS, batch_first=True).eval()
    x = tokens()
    wanted = attention(x, x, x)
    report = mk.swap(attention)
    found = attention(x, x, x)
    for ours, theirs in zip(found, wanted, strict=True):
        assert_same_bits(ours, theirs, "with weights")
    (declined,) = report.declined
    assert declined.reason == "need_weights=True" and declined.calls == 1 and "need_weights=True" in str(report)
    attention(x, x, x, need_weights=False)
    assert report.declined == (declined,)


def test_padded_batches_of_an_encoder_give_what_torch_gives() -> None:
    model, inputs = made("encoder masks")
    inputs.pop("mask")
    plain = run(model, inputs)
    report = mk.swap(model)
    mk.last_kernels(clear=True)
    torch.testing.assert_close(run(model, inputs), plain)
    assert "nested tensors" in str(report)
    assert run(model, inputs)[0, 7:].abs().max() == 0  # as torch has it where it makes nested tensors


@pytest.mark.parametrize(
    "case",
    ["4 dimensions", "3 dimensions", "5 dimensions", "bool mask", "float mask", "float32 mask", "broadcast", "causal", "gqa",
     "scale", "strided", "mask and causal", "integer", "2 dimensions", "fewer heads"],
)  # fmt: skip
def test_torchs_function_through_the_op(case: str) -> None:
    from mmkernels.integrations.sdpa import refused, sdpa

    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if case == "float32 mask" else torch.float32

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32).to(dtype)

    leading = {"2 dimensions": (), "3 dimensions": (3,), "5 dimensions": (2, 3, 2)}.get(case, (2, 4))
    q = random(*leading, 5, 8)
    kv = (2, 2) if case in ("gqa", "fewer heads") else (1, 4) if case == "broadcast" else leading
    k, v = random(*kv, 7, 8), random(*kv, 7, 8)
    options: dict[str, Any] = {}
    if case == "bool mask":
        options["attn_mask"] = random(2, 1, 5, 7) > 0
    elif case in ("float mask", "float32 mask"):
        options["attn_mask"] = random(5, 7).float()
    elif case == "causal":
        options["is_causal"] = True
    elif case == "gqa":
        options["enable_gqa"] = True
    elif case == "scale":
        options["scale"] = 0.3
    elif case == "strided":
        q = random(2, 4, 8, 5).transpose(-1, -2)
    elif case == "mask and causal":
        options |= {"attn_mask": random(5, 7), "is_causal": True}
    if case == "float32 mask":  # torch's function takes no other dtype than the queries'
        wanted = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options).to(dtype)
    elif case in ("integer", "fewer heads"):
        q = q.int() if case == "integer" else q
        with pytest.raises(RuntimeError) as theirs:
            F.scaled_dot_product_attention(q, k, v, **options)
        with pytest.raises(RuntimeError) as ours:
            sdpa(q, k, v, **options)
        assert str(ours.value) == str(theirs.value)
        return
    else:
        wanted = F.scaled_dot_product_attention(q, k, v, **options)
    mk.last_kernels(clear=True)
    found = sdpa(q, k, v, **options)
    torch.testing.assert_close(found, wanted, **({"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}))
    taken = case not in ("broadcast", "2 dimensions", "mask and causal")
    assert bool(mk.last_kernels()) == taken
    positional = (options.get("attn_mask"), 0.0, options.get("is_causal", False), options.get("enable_gqa", False))
    assert (refused(q, k, v, *positional) is None) == taken


# --- hooks ------------------------------------------------------------------------------------------------------------
def test_hooks_fire_and_change_what_they_change() -> None:
    model, inputs = made("blocks")
    names = ["0.mlp.0", "0.mlp.1", "0.mlp", "0.attn.proj", "1.attn", "1.norm1"]
    heard: list[str] = []
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda m, args, out, name=name: heard.append(name))
    model.get_submodule("0.mlp.0").register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    plain = run(model, inputs)
    order, heard[:] = list(heard), []
    report = mk.swap(model)
    torch.testing.assert_close(run(model, inputs), plain, rtol=1e-5, atol=1e-5)
    assert heard == order and sorted(order) == sorted(names)
    later: list[str] = []
    model.get_submodule("1.mlp.3").register_forward_hook(lambda m, args, out: later.append("swapped"))
    run(model, inputs)
    assert later == ["swapped"]
    assert report.verify(inputs, gradients=False).within_rule


# --- copies, files, compilers, wrappers -------------------------------------------------------------------------------
def through_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_file])
@pytest.mark.parametrize("name", ["encoder", "transformer", "sequential"])
def test_copies_are_swapped_and_can_be_put_back(name: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    model, inputs = made(name)
    plain = run(model, inputs)
    mk.swap(model)
    other = copied(model)
    mk.last_kernels(clear=True)
    assert_same_bits(run(other, inputs), run(model, inputs), "the copy")
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    mk.unswap(other)
    assert_same_bits(run(other, inputs), plain, "the copy put back")
    assert any(rules.record_of(module) is not None for module in model.modules())


@pytest.mark.parametrize("name", ["blocks", "encoder", "decoder", "sequential"])
def test_compiled_and_exported(name: str) -> None:
    model, inputs = made(name)
    mk.swap(model)
    swapped = run(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    mk.last_kernels(clear=True)
    torch.testing.assert_close(run(compiled, inputs), swapped)
    assert {kernel.split("/")[0] for _, kernel in mk.last_kernels()} == {"cpu"}
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
    exported = torch.export.export(model, args, kwargs)
    assert any("mmkernels" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(run(exported.module(), inputs), swapped)


def test_a_compiled_model_is_swapped_and_put_back() -> None:
    model, inputs = made("blocks")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    plain = run(compiled, inputs)
    mk.swap(compiled)
    mk.last_kernels(clear=True)
    torch.testing.assert_close(run(compiled, inputs), plain, rtol=1e-5, atol=1e-5)
    assert "attention" in {op for op, _ in mk.last_kernels(clear=True)}
    mk.unswap(compiled)
    assert_same_bits(run(compiled, inputs), plain, "put back")
    assert not mk.last_kernels()


def test_activation_checkpointing() -> None:
    model, inputs = made("blocks")
    mk.swap(model)
    gradients = []
    for wrapped in (False, True):
        x = inputs.clone().requires_grad_()
        out = checkpoint(model, x, use_reentrant=False) if wrapped else model(x)
        gradients.append(torch.autograd.grad(out.square().sum(), [x, *model.parameters()]))
    for ours, theirs in zip(*gradients, strict=True):
        assert_same_bits(ours, theirs, "checkpointed")


def wrapped_in_ddp(rank: int, size: int) -> None:
    model, _ = made("blocks")
    mk.swap(model)
    parallel = DistributedDataParallel(model)
    parts = [tokens(seed) for seed in range(size)]
    parallel(parts[rank]).square().mean().backward()
    plain, _ = made("blocks")
    sum(plain(part).square().mean() for part in parts).div(size).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def wrapped_in_fsdp(rank: int, size: int) -> None:
    model, _ = made("blocks")
    mk.swap(model)
    for block in model:
        fully_shard(block.attn)
        fully_shard(block)
    fully_shard(model)
    parts = [tokens(seed) for seed in range(size)]
    mk.last_kernels(clear=True)
    loss = model(parts[rank]).square().mean()
    loss.backward()
    assert {"attention", "mlp", "linear", "attention_backward"} <= {op for op, _ in mk.last_kernels()}
    plain, _ = made("blocks")
    sum(plain(part).square().mean() for part in parts).div(size).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, rtol=1e-4, atol=1e-6)
    before = state_of(model)
    with pytest.raises(ValueError, match="since it was swapped"):
        mk.unswap(model)
    assert state_of(model) == before


@pytest.mark.parametrize("wrapped", [wrapped_in_ddp, wrapped_in_fsdp])
def test_wrapped_for_several_processes(tmp_path: Path, wrapped: Callable[[int, int], None]) -> None:
    run_in_processes(2, tmp_path, wrapped)
