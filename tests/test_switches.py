"""Options for converted families: the same function in every path, and no effect when off."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from models import causal_model, one_by_one, tokens

from modeling_flashlite import FlashLiteConfig, FlashLiteForCausalLM
from modeling_flashlite.ecq_config_flashlite import EcqConfig
from modeling_flashlite.layers_flashlite import FlashLiteRMSNorm
from modeling_flashlite.publish.onnx_export import DecoderGraph, cache_shapes

SWITCHES = {
    "biases": {"attention_bias": True, "mlp_bias": True},
    "query biases": {"qkv_bias": True},
    "head norms": {"qk_norm": "head", "head_dim": 6, "num_attention_heads": 3},
    "projection norms after": {"qk_norm": "projection", "norm_placement": "post"},
    "four norms, two ropes": {
        "qk_norm": "head",
        "norm_placement": "both",
        "rms_norm_offset": 1.0,
        "local_rope_layers": [1, 0],
        "rope_local_base_freq": 100.0,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
        "embedding_multiplier": 4.0,
        "attention_multiplier": 0.3,
    },
    "no rope": {"no_rope_layers": [1, 0], "rope_dtype": "float32"},
    "multipliers": {
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
    },
}
LENGTHS = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 10,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    },
}


def switched(name, **overrides):
    return causal_model(**{"position_encoding": "rotary", **SWITCHES[name], **overrides})


@pytest.mark.parametrize("encoder", [False, True])
@pytest.mark.parametrize("name", SWITCHES)
def test_a_session_equals_the_decoder(name, encoder):
    model = switched(name, is_encoder_decoder=encoder)
    inputs = {"input_ids": tokens(2, 7, seed=2)} if encoder else {}
    ids = tokens(2, 17)
    short, _ = one_by_one(model, ids, **inputs)
    layers, _ = one_by_one(model, ids, session=False, **inputs)
    whole = model(**{"decoder_input_ids" if encoder else "input_ids": ids}, **inputs).logits
    torch.testing.assert_close(short, layers, rtol=0, atol=1e-12)
    torch.testing.assert_close(short, whole, rtol=0, atol=1e-11)


@pytest.mark.parametrize("rope", LENGTHS)
def test_a_session_equals_the_decoder_where_angles_follow_the_length(rope):
    model = causal_model(position_encoding="rotary", rope_parameters=LENGTHS[rope], max_position_embeddings=12)
    ids = tokens(1, 20)
    short, _ = one_by_one(model, ids)
    layers, _ = one_by_one(model, ids, session=False)
    torch.testing.assert_close(short, layers, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SWITCHES)
def test_padding_and_the_slow_truth(name):
    model, ids = switched(name), tokens(2, 30)
    logits = model(ids).logits
    padded = torch.nn.functional.pad(ids, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 3:], logits, rtol=0, atol=1e-11)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", SWITCHES)
def test_the_exported_graph(name):
    model, ids = switched(name), tokens(2, 14)
    caches = [torch.zeros(shape, dtype=torch.float64) for shape in cache_shapes(model, 16, 2)]
    logits, _, _ = DecoderGraph(model)(ids, torch.zeros(2, dtype=torch.long), *caches)
    torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", SWITCHES)
def test_saved_as_codes_and_back(name, tmp_path):
    model = switched(name, dtype=torch.float32, hidden_size=128)
    model.save_pretrained(tmp_path / "float")
    loaded = FlashLiteForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.float32)
    assert torch.equal(loaded(tokens(1, 9)).logits, model(tokens(1, 9)).logits)
    coded = FlashLiteForCausalLM.from_pretrained(
        tmp_path / "float", dtype=torch.float32, quantization_config=EcqConfig(target_bits=4.5)
    )
    coded.save_pretrained(tmp_path / "codes")
    again = FlashLiteForCausalLM.from_pretrained(tmp_path / "codes", dtype=torch.float32)
    assert torch.equal(again(tokens(1, 9)).logits, coded(tokens(1, 9)).logits)
    past = again(tokens(1, 9), use_cache=True).past_key_values
    step = again(tokens(1, 1, seed=3), past_key_values=past).logits
    whole = again(torch.cat([tokens(1, 9), tokens(1, 1, seed=3)], 1)).logits[:, -1:]
    torch.testing.assert_close(step, whole, rtol=1e-3, atol=5e-3)


def test_fresh_norms_with_an_offset_change_nothing():
    model = FlashLiteForCausalLM(
        FlashLiteConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, rms_norm_offset=1.0)
    )
    norms = [module for module in model.modules() if isinstance(module, FlashLiteRMSNorm)]
    assert len(norms) == 3 and all(bool((norm.weight == 0).all()) for norm in norms)


@pytest.mark.parametrize("name", ["head norms", "projection norms after"])
def test_tensor_parallel_plan_names_what_is_there(name):
    model = switched(name)
    stack = model.config.decoder
    modules = {f"layers.*.{module.partition('.')[2]}" for module, _ in model.model.decoder.layers.named_modules()}
    assert set(stack.base_model_tp_plan) <= modules


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("qk_norm", "channel", "must be one of"),
        ("norm_placement", "between", "must be one of"),
        ("rope_dtype", "bfloat16", "must be one of"),
        ("no_rope_layers", [1], "has 1 entries, but there are 6 layers"),
    ],
)
def test_values_that_cannot_work_are_refused(field, value, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        FlashLiteConfig(**{field: value})


def test_local_layers_need_their_base():
    with pytest.raises(StrictDataclassClassValidationError, match="give both or neither"):
        FlashLiteConfig(num_hidden_layers=2, position_encoding="rotary", local_rope_layers=[1, 0])
