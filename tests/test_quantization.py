"""Coded checkpoints: budget, exact round trip, foreign architectures, shards, damaged files."""

import copy
import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from coded import MODELS, SMALL, build, file_bits, inputs_of, logits_of
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    FalconConfig,
    MixtralConfig,
    ViTConfig,
    ViTForImageClassification,
)

from modeling_flashlite import quantization_flashlite
from modeling_flashlite.ecq_config_flashlite import EcqConfig
from modeling_flashlite.ecq_layers_flashlite import collect_layers, quantizable_layers
from modeling_flashlite.ecq_modules_flashlite import EcqEmbedding, EcqLinear
from modeling_flashlite.ecq_stream_flashlite import encode_weight
from modeling_flashlite.ecq_weight_flashlite import QuantizedWeight
from modeling_flashlite.training.calibration import quantize
from modeling_flashlite.training.lora import add_lora
from modeling_flashlite.training.qat import prepare_qat


@pytest.mark.parametrize("kind", MODELS)
def test_saved_model_is_the_quantized_model(kind, tmp_path):
    model = build(kind)
    parameters = model.num_parameters()
    quantize(model, EcqConfig(target_bits=4.0))
    assert not [
        n for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Embedding) and m.weight.numel() > 2048
    ]
    model.save_pretrained(tmp_path / "a")
    assert file_bits(tmp_path / "a", parameters) == pytest.approx(4.0, rel=0.01)
    loaded, info = MODELS[kind][0].from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits_of(loaded), logits_of(model))
    loaded.save_pretrained(tmp_path / "b")
    first, second = ((tmp_path / d / "model.safetensors").read_bytes() for d in "ab")
    assert first == second


@torch.no_grad()
def test_vision_models_are_quantized(tmp_path):
    """Their class token and positions are 3-D too, but no experts."""
    config = ViTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96, image_size=32)
    model = quantize(ViTForImageClassification(config).eval(), EcqConfig())
    model.save_pretrained(tmp_path)
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(ViTForImageClassification.from_pretrained(tmp_path)(image).logits, model(image).logits)


@pytest.mark.parametrize("kind", MODELS)
def test_dequantized_model_computes_the_same(kind, tmp_path):
    model = build(kind)
    names = dict(model.named_parameters()).keys()
    quantize(model, EcqConfig(target_bits=4.5))
    want = logits_of(model)
    model.dequantize()
    assert dict(model.named_parameters()).keys() == names and not hasattr(model.config, "quantization_config")
    assert (logits_of(model) - want).square().mean() < 1e-3 * want.var()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(MODELS[kind][0].from_pretrained(tmp_path)), logits_of(model))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_quantizes_while_loading(kind, tmp_path):
    build(kind).save_pretrained(tmp_path / "float")
    config = EcqConfig(target_bytes=f"{build(kind).num_parameters() // 2} B")
    model = MODELS[kind][0].from_pretrained(tmp_path / "float", quantization_config=config)
    model.save_pretrained(tmp_path / "coded")
    size = (tmp_path / "coded" / "model.safetensors").stat().st_size
    assert 0.99 * config.target_bytes <= size <= config.target_bytes
    again = MODELS[kind][0].from_pretrained(tmp_path / "coded", config=model.config)
    assert torch.equal(logits_of(again), logits_of(model))


def test_tied_weights_are_stored_and_held_once(tmp_path):
    model = quantize(build("llama"), EcqConfig(target_bits=4))
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded.lm_head, EcqLinear) and isinstance(loaded.model.embed_tokens, EcqEmbedding)
    assert loaded.lm_head.tiles is loaded.model.embed_tokens.tiles


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("trained", [False, True], ids=["coded", "qat"])
def test_a_quantized_vocabulary_keeps_its_size_until_it_is_float(kind, trained, tmp_path):
    model, config = build(kind), EcqConfig(target_bits=5.0)
    if trained:
        prepare_qat(model.train(), config).eval()
    else:
        quantization_flashlite.quantize_data_free(model, config)
        quantization_flashlite.attach(model, config)
    before = logits_of(model)
    size = model.get_input_embeddings().num_embeddings
    for other in (size + 3, size - 3):
        with pytest.raises(ValueError, match=f"vocabulary of {size} cannot be resized to {other} .* dequantize"):
            model.resize_token_embeddings(other)
    assert model.resize_token_embeddings(size) is model.get_input_embeddings()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(type(model).from_pretrained(tmp_path).eval()), before)
    if not trained:
        with pytest.raises(ValueError, match="cannot be resized"):
            copy.deepcopy(type(model).from_pretrained(tmp_path)).resize_token_embeddings(size + 3)
        model.dequantize()
        model.resize_token_embeddings(size + 3)
        assert logits_of(model).shape[-1] == size + 3
        # a resized T5 has one table in three places
        quantize(model, config).save_pretrained(tmp_path / "resized")
        loaded = type(model).from_pretrained(tmp_path / "resized").eval()
        torch.testing.assert_close(logits_of(loaded), logits_of(model))


def test_loads_into_other_heads_and_dtypes(tmp_path):
    quantize(build("llama"), EcqConfig(target_bits=4)).save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert isinstance(base.layers[0].mlp.up_proj, EcqLinear) and base.dtype == torch.bfloat16
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert isinstance(model.lm_head, EcqLinear)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert type(classifier.score) is nn.Linear


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="memory maps are listed on Linux only")
def test_a_loaded_model_holds_nothing_of_its_file(tmp_path):
    model = quantize(build("t5"), EcqConfig(target_bits=5))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    (tmp_path / "model.safetensors").write_bytes(b"")
    weights = [module.quantized() for module in loaded.modules() if isinstance(module, (EcqLinear, EcqEmbedding))]
    expected = [module.quantized() for module in model.modules() if isinstance(module, (EcqLinear, EcqEmbedding))]
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(weights, expected, strict=True))


def test_sharded_checkpoint(tmp_path):
    model = quantize(build("llama"), EcqConfig(target_bits=4))
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("places", [{"": "disk"}, {"model": "cpu", "lm_head": "disk"}, "auto"])
def test_offloading_to_disk_is_refused(places, tmp_path):
    quantize(build("llama-untied"), EcqConfig(target_bits=4)).save_pretrained(tmp_path)
    limits = {"max_memory": {"cpu": "30KB"}} if places == "auto" else {}
    with pytest.raises(ValueError, match="disk"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, device_map=places, offload_folder=str(tmp_path / "offload"), **limits
        )


def test_splitting_over_processes_is_refused(tmp_path):
    from transformers.distributed import DistributedConfig

    quantize(build("llama"), EcqConfig(target_bits=4)).save_pretrained(tmp_path / "model")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="cannot be split over processes"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "model", distributed_config=DistributedConfig(tp_size=1))
    finally:
        torch.distributed.destroy_process_group()


def test_loading_without_the_quantizer_raises(tmp_path):
    quantize(build("llama"), EcqConfig(target_bits=4)).save_pretrained(tmp_path)
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode and "ignore_mismatched_sizes" in done.stderr


def test_what_cannot_be_quantized_is_refused():
    experts = AutoModelForCausalLM.from_config(
        MixtralConfig(**SMALL, intermediate_size=32, num_key_value_heads=2, num_local_experts=2)
    )
    with pytest.raises(ValueError, match="mixtures of experts"):
        quantize(experts, EcqConfig(target_bits=4))
    with pytest.raises(ValueError, match="out of reach|leaves"):
        quantize(build("llama"), EcqConfig(target_bits=0.6))
    with pytest.raises(ValueError, match="calibration|data"):
        quantize(build("llama"), EcqConfig(max_loss_increase=0.01))


WRONG = [
    {"bits": 3},
    {"target_bits": 2, "target_bytes": "1MB"},
    *({"target_bits": value} for value in ("3", math.nan, 9)),
    *({"target_bytes": value} for value in ("1 furlong", "abcMB", "-3MB", "infMB", "", 0, 3e6)),
    *({"max_loss_increase": value} for value in (-1, math.nan, math.inf, "5%")),
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_wrong_budgets_are_refused_at_once(wrong):
    with pytest.raises(ValueError, match=list(wrong)[-1]) as caught:
        EcqConfig(**wrong)
    assert "\n" not in str(caught.value)


def test_unknown_fields_of_a_config_are_warned_of(tmp_path, caplog):
    build("llama").save_pretrained(tmp_path / "float")
    known = {"quant_method": "ecq", "target_bits": 5}
    for fields, count in (({**known, "target_bit": 3}, 1), (known, 0)):
        caplog.clear()
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=fields)
        said = [record.getMessage() for record in caplog.records if "is ignored" in record.getMessage()]
        assert len(said) == count and all("target_bit in the quantization_config is ignored" in line for line in said)
    model.save_pretrained(tmp_path / "coded")
    AutoModelForCausalLM.from_pretrained(tmp_path / "coded")
    assert not [record for record in caplog.records if "is ignored" in record.getMessage()]


LAYER = "model.layers.1.mlp.up_proj.weight"
DAMAGED = {
    "nan": (LAYER, math.nan, f"{LAYER} holds nan, but weights are finite"),
    "infinite": (LAYER, -math.inf, f"{LAYER} holds inf"),
    "large": (LAYER, 1e38, f"{LAYER} is too large"),
    "nan in a norm": ("model.norm.weight", math.nan, "model.norm.weight holds nan"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_weights_without_finite_codes_are_refused_by_name(name, tmp_path):
    parameter, value, message = DAMAGED[name]
    model = build("llama")
    model.get_parameter(parameter).data.view(-1)[5] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=EcqConfig(target_bits=4))
    with pytest.raises(ValueError, match=message):
        quantize(model, EcqConfig(target_bits=4), [inputs_of(model)])


def test_a_stream_without_a_finite_step_is_not_written():
    codes, steps = torch.zeros(8, 128, dtype=torch.int8), torch.zeros(8, dtype=torch.int8)
    for base in (math.nan, math.inf, 0.0):
        with pytest.raises(ValueError, match=f"step of a weight is {base}"):
            encode_weight(QuantizedWeight(codes, base, steps, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_that_a_family_keeps_in_float32_stay_so(dtype, tmp_path):
    """T5 in float16 keeps its `wo`, whose outputs would overflow."""
    build("t5").save_pretrained(tmp_path / "float")
    config = EcqConfig(target_bits=5)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "float", dtype=dtype, quantization_config=config)
    model.save_pretrained(tmp_path / "coded")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "coded", dtype=dtype)
    wo = again.encoder.block[0].layer[1].DenseReluDense.wo
    assert wo.weight.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize("places", ["auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}], ids=str)
def test_a_map_of_one_device_is_quantized_on_it(places, tmp_path):
    build("llama-untied").save_pretrained(tmp_path)
    config = EcqConfig(target_bits=5)
    if torch.accelerator.is_available() and places == "auto":
        pytest.skip("an accelerator and the processor are two devices")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, quantization_config=config)
    assert isinstance(model.model.layers[0].mlp.up_proj, EcqLinear)
    with pytest.raises(ValueError, match="needs the model on one device"):
        places = {"model": "cpu", "lm_head": "meta"}
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, quantization_config=config)


def test_layers_with_a_forward_of_their_own_are_named(caplog):
    config = FalconConfig(**SMALL)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="leaves"):
        quantize(model, EcqConfig(target_bits=4))
    (said,) = (record.getMessage() for record in caplog.records if "own forward" in record.getMessage())
    assert said.startswith("8 layers (transformer.h.0.self_attention.query_key_value, ...) stay bfloat16")
    assert "FalconLinear has its own forward" in said


def test_one_name_of_modules_is_one_name():
    assert EcqConfig(modules_to_not_convert="q_proj").modules_to_not_convert == ["q_proj"]


def test_modules_can_be_left_alone():
    config = EcqConfig(target_bits=6, modules_to_not_convert=["lm_head", "embed_tokens"])
    model = quantize(build("llama-untied"), config)
    assert type(model.lm_head) is nn.Linear and type(model.model.embed_tokens) is nn.Embedding
    assert all("embed" not in name for name in quantizable_layers(model, config))


def test_damaged_checkpoints_raise(tmp_path):
    quantize(build("llama"), EcqConfig(target_bits=4)).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    key = "model.layers.0.mlp.up_proj.weight"
    damaged = {**tensors, key: tensors[key].clone()}
    damaged[key][40] ^= 255
    save_file(damaged, path, metadata={"format": "pt"})
    with pytest.raises(ValueError):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    save_file(
        {**tensors, key: tensors["model.layers.0.mlp.down_proj.weight"].clone()}, path, metadata={"format": "pt"}
    )
    with pytest.raises(ValueError):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["intermediate_size"] = 10**6
    save_file(tensors, path, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "header", [b"", b"\xff" * 8, struct.pack("<Q", 9) + b'{"\xef":{}}', struct.pack("<Q", 2) + b"[1"]
)
def test_a_damaged_header_is_named_in_the_error(header, tmp_path):
    quantize(build("llama"), EcqConfig(target_bits=4)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(header)
    with pytest.raises(ValueError, match=r"header of .*model\.safetensors is damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_head_that_the_checkpoint_lacks_stays_float_and_is_trained(tmp_path):
    """Also where it is large enough to be coded, as the 77 classes of Banking77 are."""
    build("llama").save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=77, pad_token_id=0, quantization_config=EcqConfig(target_bits=4.5)
    )
    assert type(model.score) is nn.Linear and isinstance(model.model.layers[0].mlp.up_proj, EcqLinear)
    adapted = add_lora(model, 2)
    before = {name: value.detach().clone() for name, value in adapted.named_parameters() if value.requires_grad}
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 1.0)
    adapted(**inputs_of(model), labels=torch.tensor([3, 70])).loss.backward()
    optimizer.step()
    moved = {
        name for name, value in adapted.named_parameters() if name in before and not torch.equal(value, before[name])
    }
    assert any("score" in name for name in moved) and any("lora_B" in name for name in moved)
    model.save_pretrained(tmp_path / "coded")


@pytest.mark.parametrize("again", [quantize, prepare_qat, collect_layers])
def test_a_quantized_model_is_not_quantized_again(again):
    for first in (quantize, prepare_qat):
        model = first(build("llama"), EcqConfig(target_bits=4.5))
        with pytest.raises(ValueError, match=r"is quantized already \(ecq\); call dequantize\(\) first"):
            again(model, EcqConfig(target_bits=3.5))
    model = quantize(build("llama"), EcqConfig(target_bits=4.5)).dequantize()
    assert isinstance(quantize(model, EcqConfig(target_bits=4)).model.layers[0].mlp.up_proj, EcqLinear)
