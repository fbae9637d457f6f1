"""mk.swap on models of transformers, and "mmkernels" among its implementations of attention and experts."""

from __future__ import annotations

import copy
import importlib
import io
import json
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from oracles import oracle
from support import assert_same_bits
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mmkernels as mk
from mmkernels.calls import mapped, tensors, to_dtype
from mmkernels.integrations import rules
from mmkernels.integrations.transformers_blocks import _Attention, _PreNormLayer

hf = oracle("transformers")
if not hasattr(hf.integrations.moe, "ExpertsInterface"):
    pytest.skip("transformers without ExpertsInterface", allow_module_level=True)

from transformers_models import IMAGE, MODELS, C, ids, padded, text  # noqa: E402 - imports transformers

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def registered() -> ModuleType:
    return importlib.import_module("mmkernels.integrations.transformers")


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    """These models are so small that threads would only wait for each other."""
    torch.set_num_threads(1)


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model = MODELS[name].build().eval().to(dtype)
    for parameter in model.parameters():
        if parameter.numel() == 1:
            parameter.requires_grad_(False)  # the error of one number is the luck of one draw, which no rule holds for
    return model, to_dtype(MODELS[name].inputs(), dtype)


def run(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Everything floating that the model gives. (ViLT draws the patches that it looks at.)"""
    torch.manual_seed(0)
    with torch.no_grad():
        return tensors(model(**inputs), "output")


def assert_all_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected) and expected
    for name, tensor in expected.items():
        assert_same_bits(actual[name], tensor, name)


def state_of(model: nn.Module) -> dict[str, Any]:
    return {name: (type(module), dict(module.__dict__)) for name, module in model.named_modules()}


# Where gradients are given more than the rule, five times the model's own error: in bfloat16 a rounding that changes the
# sign before a ReLU changes whole rows of them, and the gradient of the sinks is of four numbers.
UNSTEADY = {("t5 eager", torch.bfloat16), ("blip2", torch.bfloat16), ("gpt oss", torch.float32)}


# --- the numbers ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_hold_and_the_kernels_do_the_work(name: str, dtype: torch.dtype) -> None:
    model, inputs = made(name, dtype)
    report = mk.swap(model)
    found = report.verify(inputs)
    outside = found.outside
    if (name, dtype) in UNSTEADY:
        outside = tuple(d for d in outside if not d.name.startswith("gradient") or d.after > 5 * d.before)
    assert not outside and not found.problems, str(found)
    assert found.oracle == torch.float64
    assert any(difference.name.startswith("gradient") for difference in found.differences)
    covered = report.coverage(inputs)
    assert covered.share >= MODELS[name].share and covered.before > 0, str(covered)
    assert not covered.fallbacks
    run(model, inputs)
    assert {item.reason for item in report.declined} == set(MODELS[name].declined)
    assert any("mk.attention" in entry.runs or "mk.window_attention" in entry.runs for entry in report.replaced)


def test_clips_mlps_are_one_op_each() -> None:
    model, inputs = made("clip")
    mk.swap(model, only="*.mlp*")
    mk.last_kernels(clear=True)
    run(model, inputs)
    assert [op for op, _ in mk.last_kernels()] == ["mlp"] * 4


@pytest.mark.parametrize("name", ["clip gelu", "lxmert", "swin odd", "mask2former", "mixtral", "t5", "gemma2"])
def test_unswap_brings_everything_back(name: str) -> None:
    model, inputs = made(name)
    plain, before = run(model, inputs), state_of(model)
    report = mk.swap(model)
    assert report.replaced and list(model.state_dict()) == list(copy.deepcopy(model).state_dict())
    run(model, inputs)
    mk.unswap(model)
    after = state_of(model)
    assert {key: kind for key, (kind, _) in after.items()} == {key: kind for key, (kind, _) in before.items()}
    assert {key: set(state) for key, (_, state) in after.items()} == {key: set(state) for key, (_, state) in before.items()}
    assert_all_same_bits(run(model, inputs), plain)


def test_models_that_share_a_config_are_independent() -> None:
    config = hf.LlamaConfig(vocab_size=61, hidden_size=C, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    torch.manual_seed(0)
    swapped, other = (hf.LlamaForCausalLM(config).eval() for _ in range(2))
    inputs = text()()
    plain, said, before = run(other, inputs), config.to_json_string(), state_of(other)
    implementation = config._attn_implementation, config._experts_implementation
    mk.swap(swapped)
    assert (config._attn_implementation, config._experts_implementation) == implementation
    assert config.to_json_string() == said and swapped.config is other.config is config
    assert state_of(other) == before
    assert_all_same_bits(run(other, inputs), plain)


# --- residuals ----------------------------------------------------------------------------------------------------------
PRE_NORM = ["vit", "vit eager", "vivit", "deit", "clip", "siglip", "blip", "blip2", "aimv2"]


class _Sums(TorchDispatchMode):
    """Counts torch's own sums of two tensors of three dimensions."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.add.Tensor and all(isinstance(x, Tensor) and x.dim() == 3 for x in args):
            self.count += 1
        return function(*args, **(kwargs or {}))


def sums_in(model: nn.Module, inputs: dict[str, Any], **more: Any) -> int:
    """How many sums the model's pre-norm layers leave to torch."""
    layers = [module for module in model.modules() if isinstance(module, _PreNormLayer)]
    counter, handles = _Sums(), []
    for layer in layers:
        handles.append(layer.register_forward_pre_hook(lambda *_: counter.__enter__() and None))
        handles.append(layer.register_forward_hook(lambda *_: counter.__exit__(None, None, None)))
    run(model, inputs | more)
    for handle in handles:
        handle.remove()
    assert layers
    return counter.count


@pytest.mark.parametrize("name", PRE_NORM)
def test_last_products_add_the_residuals(name: str) -> None:
    model, inputs = made(name)
    report = mk.swap(model)
    assert sums_in(model, inputs) == 0
    assert not report.declined


def test_layers_whose_outputs_were_collected_go_on_adding() -> None:
    """transformers' hooks stay on attention modules after the call that asks for hidden states."""
    model, inputs = made("siglip")
    plain = run(model, inputs | {"output_hidden_states": True})
    report = mk.swap(model)
    assert sums_in(model, inputs, output_hidden_states=True) == 0
    for key, tensor in run(model, inputs | {"output_hidden_states": True}).items():
        torch.testing.assert_close(tensor, plain[key], atol=1e-5, rtol=1e-4)
    assert any(module._forward_hooks for module in model.modules() if isinstance(module, _Attention))
    assert sums_in(model, inputs) == 0 and not report.declined


@pytest.mark.parametrize(
    ("name", "part", "reason"),
    [
        ("clip", "self_attn", "somebody listens to the attention module"),
        ("clip", "mlp", "somebody listens to the MLP"),
        ("clip", "self_attn.out_proj", None),
        ("clip", "mlp.fc2", None),
        ("blip", "self_attn", "somebody listens to the attention module"),
        ("blip", "self_attn.projection", None),
        ("vit", "dropout", "dropout of what is added"),
        ("vit", "attention.o_proj", None),
        ("aimv2", "ffn", "somebody listens to the MLP"),
    ],
)
def test_listeners_to_parts_of_layers_are_served(name: str, part: str, reason: str | None) -> None:
    model, inputs = made(name)
    plain = run(model, inputs)
    report = mk.swap(model)
    layer = next(module for module in model.modules() if isinstance(module, _PreNormLayer))
    heard: list[Any] = []

    def double(module: nn.Module, args: Any, output: Any) -> Any:
        heard.append(output)
        return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output

    for change in (lambda *call: heard.append(call), double):
        heard.clear()
        handle = layer.get_submodule(part).register_forward_hook(change)
        actual = run(model, inputs)
        handle.remove()
        assert len(heard) == (2 if part == "dropout" else 1)
        same = all(torch.allclose(tensor, plain[key], atol=1e-5, rtol=1e-4) for key, tensor in actual.items())
        assert same == (change is not double)
    assert {item.reason for item in report.declined} == (set() if reason is None else {reason})
    assert sums_in(model, inputs) == 0


def test_dropout_in_training_and_parts_left_out_are_the_originals() -> None:
    torch.manual_seed(0)
    model = hf.ViTModel(hf.ViTConfig(**IMAGE, hidden_dropout_prob=0.3)).train()
    inputs = MODELS["vit"].inputs()
    plain = run(model, inputs)
    with mk.swapped(model) as report:
        for key, tensor in run(model, inputs).items():
            torch.testing.assert_close(tensor, plain[key], atol=1e-5, rtol=1e-4)
        assert {item.reason for item in report.declined} == {"dropout of what is added"}
        model.eval()
        assert sums_in(model, inputs) == 0
    plain = run(model, inputs)
    report = mk.swap(model, only="layers.*", skip="layers.*.attention")
    for key, tensor in run(model, inputs).items():
        torch.testing.assert_close(tensor, plain[key], atol=1e-5, rtol=1e-4)
    assert {item.reason for item in report.declined} == {"attention or an MLP that is not swapped"}


@pytest.mark.parametrize("name", ["vit", "clip", "blip", "aimv2"])
def test_layers_under_autocast(name: str) -> None:
    model, inputs = made(name)
    exact, results = run(model, inputs), []
    for swap in (False, True):
        if swap:
            mk.swap(model)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(run(model, inputs))
    theirs, ours = results
    for key, tensor in exact.items():
        assert ours[key].dtype == theirs[key].dtype
        assert (ours[key] - tensor).abs().max() <= 2 * (theirs[key] - tensor).abs().max() + 0.01 * tensor.abs().max()


def test_gradient_checkpointing_of_layers() -> None:
    model, inputs = made("vit")
    mk.swap(model)
    found = []
    for again in (False, True):
        model.train()
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(**inputs)[0].square().sum().backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    for actual, expected in zip(*found, strict=True):
        assert_same_bits(actual, expected, "gradient")


# --- masks, caches, weights -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama left", "mistral", "gemma2", "mixtral", "t5", "whisper", "llama eager"])
def test_generation_gives_the_same_tokens(name: str) -> None:
    model, inputs = made(name)
    inputs = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
    options: dict[str, Any] = {"max_new_tokens": 7, "do_sample": False, "use_cache": True}
    expected = model.generate(**inputs, **options)
    report = mk.swap(model)
    assert torch.equal(model.generate(**inputs, **options), expected)
    assert not report.declined
    static = model.generate(**inputs, **options, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, expected)


def test_speecht5_caches_of_both_attentions() -> None:
    model, inputs = made("speecht5")
    inputs["decoder_input_values"] = ids(2, 4)
    report = mk.swap(model)

    def steps() -> list[Tensor]:
        with torch.no_grad():
            first = model(**inputs, use_cache=True)
            second = model(
                encoder_outputs=(first.encoder_last_hidden_state,),
                attention_mask=inputs["attention_mask"],
                decoder_input_values=ids(2, 1, 5),
                past_key_values=first.past_key_values,
                use_cache=True,
            )
        return [first.last_hidden_state, second.last_hidden_state]

    ours = steps()
    assert not report.declined
    mk.unswap(model)
    for actual, expected in zip(ours, steps(), strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["vit eager", "bert eager", "lxmert", "vilt", "timesformer", "speecht5", "swin eager", "t5 eager"]
)
def test_attention_weights_that_are_asked_for_are_there(name: str) -> None:
    model, inputs = made(name)
    expected = run(model, inputs | {"output_attentions": True})
    report = mk.swap(model)
    actual = run(model, inputs | {"output_attentions": True})
    assert list(actual) == list(expected) and any("attentions" in key for key in expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key], tensor, atol=1e-5, rtol=1e-4)
    assert {item.reason for item in report.declined} == {"attention weights are asked for"}
    assert "calls served by the original: attention weights" in str(report)


@pytest.mark.parametrize("name", ["vit eager", "swin eager"])
def test_attention_weights_that_a_config_asks_for_are_there(name: str) -> None:
    model, inputs = made(name)
    model.config.output_attentions = True
    mk.swap(model)
    assert len(model(**inputs).attentions) == 2


def test_bridgetower_gives_the_weights_that_it_always_gives(registered: ModuleType) -> None:
    model, inputs = made("bridgetower")
    mk.swap(model)
    with torch.no_grad():
        assert all(weights is not None for pair in model(**inputs).attentions for weights in pair)
    mk.unswap(model)
    model.set_attn_implementation("mmkernels")
    with pytest.raises(ValueError, match="supports 'eager' alone"):
        model(**inputs)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bert", "BertSelfAttention"),
        ("bert eager", "BertSelfAttention"),
        ("llama left", "LlamaAttention"),
        ("lxmert", "LxmertAttention"),
        ("vilt", "ViltSelfAttention"),
        ("timesformer", "TimesformerSelfAttention"),
        ("speecht5", "SpeechT5Attention"),
        ("mask2former", "Mask2FormerAttention"),
        ("cvt", "CvtSelfAttention"),
    ],
)
def test_dropout_of_weights_in_training(name: str, kind: str) -> None:
    """On average what eval mode gives, and spread as the original's draws are."""
    model, inputs = made(name)
    attention: Any = next(module for module in model.modules() if type(module).__name__ == kind)
    calls: list[Any] = []
    handle = attention.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    run(model, inputs)
    handle.remove()
    args, kwargs = calls[0]
    kwargs |= {key: None for key in kwargs if key in ("cache", "past_key_values")}
    if "output_attentions" in kwargs:
        kwargs["output_attentions"] = False
    draws = 300

    def drawn() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            outputs = torch.stack([attention(*args, **kwargs)[0].double() for _ in range(draws)])
        return outputs.mean(0), outputs.var(0)

    with torch.no_grad():
        expected = attention(*args, **kwargs)[0]
    layers = [layer for layer in attention.children() if isinstance(layer, nn.Dropout)]
    for layer in layers:
        layer.p = 0.3
        layer.train()
    if not layers:
        setattr(attention, "dropout" if hasattr(attention, "dropout") else "attention_dropout", 0.3)
    attention.training = True
    torch.manual_seed(1)
    _, theirs = drawn()
    report = mk.swap(model)
    ours, spread = drawn()
    assert not report.declined and spread.max() > 0
    assert ((ours - expected).abs() <= 6 * (spread / draws).sqrt() + 1e-6).all()
    assert 0.9 < spread.mean() / theirs.mean() < 1.1


def test_lengths_where_causal_is_implied() -> None:
    """One query, no mask; fewer queries than keys; is_causal=False in the call."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from mmkernels.integrations.transformers_attention import as_sdpa

    generator = torch.Generator().manual_seed(0)
    module = nn.Module()
    for is_causal_attribute in (None, True, False):
        if is_causal_attribute is not None:
            module.is_causal = is_causal_attribute  # type: ignore[assignment]
        for len_q, len_k in ((1, 5), (3, 5), (5, 5)):
            for groups in (1, 2):
                module.num_key_value_groups = groups  # type: ignore[assignment]
                q = torch.randn(2, 4, len_q, 8, generator=generator)
                k, v = torch.randn(2, 2, 4 // groups, len_k, 8, generator=generator)
                position_bias = torch.randn(1, 4, len_q, len_k, generator=generator)
                seen = torch.rand(2, 1, len_q, len_k, generator=generator) < 0.7
                seen[0, 0, 0] = False  # a query that sees nothing
                floats = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
                for mask in (None, seen, floats):
                    for more in ({}, {"is_causal": False}, {"is_causal": True}, {"position_bias": position_bias}):
                        arguments = (module, q, k, v, mask, 0.0, 0.3)
                        actual, weights = as_sdpa(*arguments, **more)
                        expected, _ = sdpa_attention_forward(*arguments, **more)
                        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
                        assert weights is None and actual.is_contiguous()
    assert not rules.declined(module)


def test_calls_that_the_op_does_not_take_go_to_transformers() -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from mmkernels.integrations.transformers_attention import as_sdpa

    q, k, v = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    module = nn.Module()
    for key, value, mask in (
        (k[:1], v[:1], None),
        (k, v, torch.zeros(2, 5, 5, dtype=torch.bool)[:, None].expand(2, 4, 5, 5)),
    ):
        expected = sdpa_attention_forward(module, q, key, value, mask)[0]
        torch.testing.assert_close(as_sdpa(module, q, key, value, mask)[0], expected, equal_nan=True)
    with pytest.raises(RuntimeError):
        as_sdpa(module, q, k, v, torch.zeros(2, 4, 5, 5, dtype=torch.float64))
    with pytest.raises(RuntimeError):
        as_sdpa(module, q, k, v, torch.zeros(2, 4, 5, 4))
    assert sum(rules.declined(module).values()) == 3


def test_implementations_chosen_later_are_obeyed() -> None:
    model, inputs = made("llama left")
    plain = run(model, inputs)
    report = mk.swap(model, only="*.self_attn", skip="*_proj")
    model.set_attn_implementation("flex_attention")
    model.set_attn_implementation("eager")
    run(model, inputs)
    assert not report.declined  # Llama's eager function is one that mmkernels knows
    model.set_attn_implementation("sdpa")
    for key, tensor in run(model, inputs).items():
        torch.testing.assert_close(tensor, plain[key], atol=1e-5, rtol=1e-4)


# --- what is left -----------------------------------------------------------------------------------------------------
def test_reasons_of_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = made("clip mish")
    mlps = [entry for entry in mk.swap(model, dry_run=True).entries if entry.cls.endswith("CLIPMLP")]
    assert len(mlps) == 4 and all("its activation is a Mish" in entry.reason for entry in mlps)
    experts = [e for e in mk.swap(made("gpt oss")[0], dry_run=True).entries if e.cls.endswith("GptOssExperts")]
    assert experts and all("transposed" in entry.reason for entry in experts)
    lxmert, _ = made("lxmert")
    attention = next(module for module in lxmert.modules() if type(module).__name__ == "LxmertAttention")

    def forward(self: Any, hidden_states: Tensor, context: Tensor, *_: Any) -> Any:
        return (hidden_states,)

    monkeypatch.setattr(type(attention), "forward", forward)
    entry = next(e for e in mk.swap(lxmert).entries if e.cls.endswith(".LxmertAttention"))
    assert entry.status == "left" and f"transformers {hf.__version__}: its forward is not one" in entry.reason


def test_only_and_skip() -> None:
    model, inputs = made("llama")
    plain = run(model, inputs)
    report = mk.swap(model, only="model.layers.0.*", skip="*.mlp")
    names = {entry.name for entry in report.replaced}
    assert names >= {"model.layers.0.self_attn", "model.layers.0.input_layernorm", "model.layers.0.self_attn.q_proj"}
    assert not any(name.startswith("model.layers.1") or ".mlp" in name for name in names)
    for key, tensor in run(model, inputs).items():
        torch.testing.assert_close(tensor, plain[key], atol=1e-5, rtol=1e-4)


def test_a_listener_to_swins_attention_is_served() -> None:
    model, inputs = made("swin")
    report = mk.swap(model)
    heard: list[Any] = []
    attention = next(module for module in model.modules() if type(module).__name__ == "SwinAttention")
    attention.register_forward_hook(lambda *_: heard.append(1))
    run(model, inputs)
    assert heard == [1] and [item.reason for item in report.declined] == ["somebody listens to the attention module"]


# --- copies, files, compilers -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama left", "swin odd", "mixtral", "bert eager", "vit"])
def test_copies_and_pickles_run_the_kernels_and_can_be_put_back(name: str) -> None:
    model, inputs = made(name)
    plain = run(model, inputs)
    mk.swap(model)
    ours = run(model, inputs)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert_all_same_bits(run(other, inputs), ours)
        mk.unswap(other)
        assert_all_same_bits(run(other, inputs), plain)
        assert not any(rules.record_of(module) for module in other.modules())


def test_a_saved_model_says_nothing_of_the_kernels(tmp_path: Path) -> None:
    model, inputs = made("mixtral")
    plain = run(model, inputs)
    mk.swap(model)
    model.save_pretrained(tmp_path)
    assert "mmkernels" not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["MixtralForCausalLM"]
    loaded = hf.MixtralForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval()
    assert not any(rules.record_of(module) for module in loaded.modules())
    assert_all_same_bits(run(loaded, inputs), plain)


@pytest.mark.parametrize("name", ["llama left", "bert eager", "vit", "blip"])
def test_a_compiled_model_runs_the_kernels(name: str) -> None:
    model, inputs = made(name)
    mk.swap(model)
    expected = run(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager" if name == "llama left" else "aot_eager", fullgraph=True)
    mk.last_kernels(clear=True)
    actual = run(compiled, inputs)
    assert any(op == "attention" for op, _ in mk.last_kernels())
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key], tensor, atol=1e-5, rtol=1e-4)


# --- "mmkernels" in a config ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["bert", "llama left", "llama no mask", "gemma2", "t5", "mixtral", "gpt oss", "modernbert"])
def test_as_an_implementation_of_attention_and_experts(registered: ModuleType, name: str) -> None:
    model, inputs = made(name)
    plain = run(model, inputs)
    model.set_attn_implementation("mmkernels")
    if name in ("mixtral", "gpt oss"):
        model.set_experts_implementation("mmkernels")
    mk.last_kernels(clear=True)
    ours = run(model, inputs)
    served = {op for op, kernel in mk.last_kernels() if kernel != "reference"}
    assert "attention" in served and ("moe_mlp" in served) == (name == "mixtral")
    for key, tensor in plain.items():
        torch.testing.assert_close(ours[key], tensor, atol=1e-4, rtol=1e-4)
    reasons = {reason for module in model.modules() for reason in rules.declined(module)}
    assert reasons == ({"experts with a gate of their own"} if name == "gpt oss" else set())


def test_in_a_config_and_in_from_pretrained(registered: ModuleType, tmp_path: Path) -> None:
    model, inputs = made("mixtral")
    plain = run(model, inputs)
    model.save_pretrained(tmp_path)
    both = {"attn_implementation": "mmkernels", "experts_implementation": "mmkernels"}
    loaded = hf.MixtralForCausalLM.from_pretrained(tmp_path, **both).eval()
    config = copy.deepcopy(model.config)
    fresh = hf.MixtralForCausalLM._from_config(config, **both).eval()
    fresh.load_state_dict(model.state_dict())
    for other in (loaded, fresh):
        assert other.config._attn_implementation == other.config._experts_implementation == "mmkernels"
        mk.last_kernels(clear=True)
        for key, tensor in run(other, inputs).items():
            torch.testing.assert_close(tensor, plain[key], atol=1e-4, rtol=1e-4)
        assert {"attention", "moe_mlp"} <= {op for op, _ in mk.last_kernels()}
        options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
        assert torch.equal(other.generate(**inputs, **options), model.generate(**inputs, **options))
    loaded.save_pretrained(tmp_path / "again")
    assert "mmkernels" not in (tmp_path / "again" / "config.json").read_text()


def test_registering_is_additive_and_can_be_repeated(registered: ModuleType) -> None:
    from transformers.integrations.moe import ExpertsInterface
    from transformers.masking_utils import AttentionMaskInterface

    interfaces = (hf.AttentionInterface, AttentionMaskInterface, ExpertsInterface)
    before = [dict(interface._global_mapping) for interface in interfaces]
    assert all("mmkernels" in mapping for mapping in before)
    importlib.reload(registered)
    registered.require_experts()
    assert [dict(interface._global_mapping) for interface in interfaces] == before


def test_a_transformers_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "mmkernels.integrations.transformers"
    moe = hf.integrations.moe
    for missing in ("attention", "experts"):
        with monkeypatch.context() as context:
            context.delitem(sys.modules, name, raising=False)
            if missing == "experts":
                context.delattr(moe, "ExpertsInterface")
                module = importlib.import_module(name)
                with pytest.raises(ImportError, match=rf"expected at least 5\.0, .*got {hf.__version__}"):
                    module.require_experts()
            else:
                context.setitem(sys.modules, "transformers.masking_utils", None)
                with pytest.raises(ImportError, match=rf"expected at least 4\.53, .*got {hf.__version__}"):
                    importlib.import_module(name)


# --- experts ----------------------------------------------------------------------------------------------------------
def experts_of(**layout: Any) -> nn.Module:
    """A module under transformers' own decorator, whose forward is its eager definition for any layout."""
    from transformers.integrations.moe import use_experts_implementation

    gated, bias, transposed = layout["has_gate"], layout["has_bias"], layout["is_transposed"]
    width = 32 * (2 if gated else 1)

    @use_experts_implementation(**layout)
    class Experts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts, self.act_fn = 4, nn.SiLU()
            first = nn.Parameter(torch.randn(4, 16, width) if transposed else torch.randn(4, width, 16))
            self.down_proj = nn.Parameter(torch.randn(4, 32, 16) if transposed else torch.randn(4, 16, 32))
            name = "gate_up_proj" if gated else "up_proj"
            self.register_parameter(name, first)
            if bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(4, width)))
                self.down_proj_bias = nn.Parameter(torch.randn(4, 16))

        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            raise AssertionError("its eager forward")

    return Experts(hf.PretrainedConfig(experts_implementation="grouped_mm"))


@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("is_transposed", [True, False])
def test_layouts_of_experts(registered: ModuleType, has_gate: bool, has_bias: bool, is_transposed: bool) -> None:
    torch.manual_seed(0)
    module = experts_of(has_gate=has_gate, has_bias=has_bias, is_transposed=is_transposed)
    module._is_expert_parallel = True  # type: ignore[assignment] - an index of num_experts is then none of this rank's
    x, index, weights = torch.randn(9, 16), torch.randint(0, 5, (9, 2)), torch.rand(9, 2)
    assert (index == 4).any()

    def gradients(implementation: str) -> list[Tensor]:
        module.config._experts_implementation = implementation  # type: ignore[union-attr]
        given = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        out = module(given[0], index, given[1])
        return [out, *torch.autograd.grad(out.square().sum(), [*given, *module.parameters()])]

    expected = gradients("grouped_mm")
    mk.last_kernels(clear=True)
    for actual, wanted in zip(gradients("mmkernels"), expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-3, rtol=1e-4)
    assert "moe_mlp" in {op for op, _ in mk.last_kernels()} and not rules.declined(module)


def test_experts_by_grouped_mm_in_bfloat16() -> None:
    torch.manual_seed(0)
    model, inputs = made("mixtral", torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    report = mk.swap(model)
    covered = report.coverage(inputs)
    assert covered.share > 0.9 and not covered.fallbacks
    found = report.verify(inputs)
    assert found.within_rule, str(found)
    model.set_experts_implementation("batched_mm")
    run(model, inputs)
    assert not report.declined
    experts = next(module for module in model.modules() if type(module).__name__ == "MixtralExperts")
    experts.config = copy.deepcopy(experts.config)
    experts.config._experts_implementation = "sonicmoe"
    with pytest.raises(Exception):  # noqa: B017 - a kernel from elsewhere, which is asked for as it would have been
        run(model, inputs)
    assert [item.reason for item in report.declined] == ["experts_implementation='sonicmoe'"]


def test_padding_counts_for_nothing() -> None:
    """Other numbers in pads change no token's output, whatever the masks are made of."""
    for name in ("bert", "bert eager", "lxmert", "llama left", "t5"):
        model, inputs = made(name)
        mk.swap(model)
        mask = inputs["attention_mask"]
        first = model(**inputs)[0]
        changed = mapped(inputs, lambda tensor: tensor)
        changed["input_ids"] = torch.where(mask.bool(), inputs["input_ids"], 7)
        second = model(**changed)[0]
        kept = mask.bool() if first.shape[1] == mask.shape[1] else torch.ones(first.shape[:2], dtype=torch.bool)
        torch.testing.assert_close(first[kept], second[kept])
        assert padded().shape == mask.shape
