"""Coded checkpoints: budget, exact round trip, foreign architectures, shards, damaged files."""

import copy
import json
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
    MixtralConfig,
    ViTConfig,
    ViTForImageClassification,
)

from modeling_flashlite import quantization_flashlite
from modeling_flashlite.ecq_config_flashlite import EcqConfig
from modeling_flashlite.ecq_layers_flashlite import collect_layers, quantizable_layers
from modeling_flashlite.ecq_modules_flashlite import EcqEmbedding, EcqLinear
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
    for wrong in ({"bits": 3}, {"target_bits": 2, "target_bytes": "1MB"}, {"target_bytes": "1 furlong"}):
        with pytest.raises(ValueError):
            EcqConfig(**wrong)


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
