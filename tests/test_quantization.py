"""Coded checkpoints: budget, exact round trip, foreign architectures, adapters, shards, hostile files."""

import copy
import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    DebertaConfig,
    DebertaV2Config,
    FalconMambaConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MarianConfig,
    MixtralConfig,
    T5Config,
    T5GemmaConfig,
    T5GemmaModuleConfig,
    ViTConfig,
    ViTForImageClassification,
)

from modeling_flashlite import quantization_flashlite
from modeling_flashlite.ecq_modules_flashlite import EcqEmbedding, EcqLinear, join
from modeling_flashlite.int8_flashlite import int8_codes
from modeling_flashlite.quantization_flashlite import EcqConfig, collect_layers, quantizable_layers
from modeling_flashlite.training.calibration import merge_adapters, quantize
from modeling_flashlite.training.lora import add_lora
from modeling_flashlite.training.qat import prepare_qat

SMALL = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = LlamaConfig(**SMALL, intermediate_size=96, num_key_value_heads=2, tie_word_embeddings=True)
_GEMMA = T5GemmaModuleConfig(
    **SMALL, intermediate_size=96, num_key_value_heads=2, head_dim=16, sliding_window=16, query_pre_attn_scalar=16
)
_STACK = {"layers": 2, "attention_heads": 4, "ffn_dim": 96}
_BART = {f"{part}_{size}": value for part in ("encoder", "decoder") for size, value in _STACK.items()}
_BART |= {"vocab_size": 256, "d_model": 64, "max_position_embeddings": 128}
MODELS = {
    "llama": (AutoModelForCausalLM, LLAMA),
    "llama-untied": (AutoModelForCausalLM, LlamaConfig(**SMALL, intermediate_size=96)),
    "gpt2": (AutoModelForCausalLM, GPT2Config(vocab_size=256, n_positions=128, n_embd=64, n_layer=2, n_head=4)),
    "bert": (AutoModelForMaskedLM, BertConfig(**SMALL, intermediate_size=96, max_position_embeddings=128)),
    "t5": (
        AutoModelForSeq2SeqLM,
        T5Config(vocab_size=256, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0),
    ),
    "bart": (AutoModelForSeq2SeqLM, BartConfig(**_BART, scale_embedding=True)),
    # positions that the file leaves out
    "marian": (AutoModelForSeq2SeqLM, MarianConfig(**_BART, pad_token_id=0, decoder_start_token_id=0)),
    # names that differ between model and original file
    "gpt-neox": (AutoModelForCausalLM, GPTNeoXConfig(**SMALL, intermediate_size=96)),
    # a tied embedding that asks its weight for the dtype
    "gemma3": (
        AutoModelForCausalLM,
        Gemma3TextConfig(**SMALL, intermediate_size=96, num_key_value_heads=2, head_dim=16, sliding_window=16),
    ),
    "t5gemma": (AutoModelForSeq2SeqLM, T5GemmaConfig(encoder=_GEMMA, decoder=_GEMMA, vocab_size=256)),
}


def build(kind: str, seed: int = 0):
    if kind == "t5gemma" and transformers.__version__.startswith("5.16."):
        pytest.skip("transformers 5.16 does not load its own T5Gemma as it saved it, quantized or not")
    auto, config = MODELS[kind]
    torch.manual_seed(seed)
    return auto.from_config(copy.deepcopy(config)).eval()


def inputs_of(model) -> dict:
    ids = torch.randint(3, 256, (2, 12), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids[:, :7]
    return batch


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(**inputs_of(model)).logits


def file_bits(folder, parameters: int) -> float:
    return 8 * sum(p.stat().st_size for p in folder.glob("*.safetensors")) / parameters


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


def test_every_weight_of_a_tied_pair_is_float_or_none():
    model = build("llama")
    kept = quantizable_layers(model, EcqConfig(modules_to_not_convert=["lm_head"]))
    assert "model.embed_tokens" not in kept and "model.layers.0.mlp.up_proj" in kept


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


def test_steps_survive_a_cast():
    model = quantize(build("llama"), EcqConfig(target_bits=4))
    step = model.lm_head.step.clone()
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16 and torch.equal(model.lm_head.step, step)
    assert logits_of(model).dtype == torch.bfloat16


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


FOREIGN = """
import sys

HIDDEN = {"modeling_flashlite", "datasets", "peft", "accelerate", "evaluate", "sacrebleu"}

class Finder:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)

    def find_distributions(self, context):
        return self.finder.find_distributions(context) if hasattr(self.finder, "find_distributions") else ()

sys.meta_path[:] = map(Finder, sys.meta_path)
import torch, transformers
folder, auto, again = sys.argv[1:]
model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
assert not HIDDEN & set(sys.modules) and type(model).__name__ == model.config.architectures[0]
inputs = torch.load(folder + "/inputs.pt")
with torch.no_grad():
    torch.save(model(**inputs).logits, folder + "/logits.pt")
model.generate(inputs["input_ids"], max_new_tokens=2)
model.save_pretrained(again)
"""


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bart"])
def test_coded_models_of_other_families_load_elsewhere(kind, tmp_path):
    """Where only transformers, PyTorch and NumPy are, by the code that travels with them, and save that code again."""
    model = quantize(build(kind), EcqConfig(target_bits=4))
    assert isinstance(model, MODELS[kind][0]._model_mapping[type(model.config)])
    model.save_pretrained(tmp_path / "a")
    torch.save(inputs_of(model), tmp_path / "a" / "inputs.pt")
    command = [sys.executable, "-c", FOREIGN, *map(str, (tmp_path / "a", MODELS[kind][0].__name__, tmp_path / "b"))]
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "a" / "logits.pt"), logits_of(model))
    assert {path.name for path in (tmp_path / "a").glob("*.py")} == {
        path.name for path in (tmp_path / "b").glob("*.py")
    }
    for name in ("model.safetensors", "quantization_flashlite.py"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_float_model_again_takes_no_code_along(tmp_path):
    """Neither does a float model of the same family in the same process."""
    model = quantize(build("llama"), EcqConfig(target_bits=4))
    model.save_pretrained(tmp_path / "coded")
    assert "AutoModelForCausalLM" in json.loads((tmp_path / "coded" / "config.json").read_text())["auto_map"]
    model.dequantize()
    for name, floating in (("same", model), ("other", build("llama"))):
        floating.save_pretrained(tmp_path / name)
        assert not list((tmp_path / name).glob("*.py"))
        assert "auto_map" not in json.loads((tmp_path / name / "config.json").read_text())


def test_two_copies_of_the_quantizer_live_together():
    import importlib.util

    import modeling_flashlite.quantization_flashlite as package

    spec = importlib.util.spec_from_file_location("modeling_flashlite.copy_flashlite", package.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


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


def test_generates_and_backpropagates_to_inputs():
    model = quantize(build("t5"), EcqConfig(target_bits=4))
    out = model.generate(torch.randint(3, 256, (2, 9)), max_new_tokens=5, do_sample=False)
    assert out.shape[0] == 2
    embeds = torch.randn(2, 5, 64, requires_grad=True)
    model(inputs_embeds=embeds, decoder_input_ids=torch.ones(2, 3, dtype=torch.long)).logits.sum().backward()
    assert embeds.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks for a renamed property
def test_lora_on_the_quantized_model(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

    quantize(build("llama"), EcqConfig(target_bits=4)).save_pretrained(tmp_path / "base")
    base = prepare_model_for_kbit_training(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    peft = get_peft_model(base, LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False))
    ids = torch.randint(3, 256, (2, 12))
    peft(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for n, p in peft.named_parameters() if "lora_B" in n]
    assert grads and all(g is not None and torch.isfinite(g).all() for g in grads)
    peft.eval()
    want = logits_of(peft)
    peft.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.allclose(logits_of(again.eval()), want, atol=1e-5)
    merged = merge_adapters(again, EcqConfig(target_bits=5))
    assert isinstance(merged.lm_head, EcqLinear) and not any("lora" in name for name, _ in merged.named_modules())
    assert (logits_of(merged) - want).square().mean() < 0.5 * want.var()


@pytest.mark.filterwarnings("ignore")  # peft's advice about tied weights
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_merge_into_codes_is_refused_with_the_way_out(kind):

    targets = {"llama": ["q_proj", "embed_tokens"], "gpt2": ["c_attn", "wte"]}[kind]
    for target in targets:
        model = quantize(build(kind), EcqConfig(target_bits=5))
        peft = get_peft_model(model, LoraConfig(target_modules=[target], r=2, init_lora_weights=False)).eval()
        want = logits_of(peft)
        for merge in (peft.merge_adapter, peft.merge_and_unload):
            for safe in (False, True):
                with pytest.raises(RuntimeError, match="calibration.merge_adapters"):
                    merge(safe_merge=safe)
        assert torch.equal(logits_of(peft), want)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_merged_conv1d_adapters_keep_their_effect():

    model = quantize(build("gpt2"), EcqConfig(target_bits=5))
    peft = get_peft_model(model, LoraConfig(target_modules=["c_attn"], r=4, init_lora_weights=False)).eval()
    with torch.no_grad():
        for name, value in peft.named_parameters():
            if "lora" in name:
                value.mul_(4)
        with peft.disable_adapter():
            plain = logits_of(peft)
    want = logits_of(peft)
    got = logits_of(merge_adapters(peft).eval())
    assert (got - want).square().mean() < 0.5 * (plain - want).square().mean()


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
def test_a_damaged_header_is_said_to_be_so(header, tmp_path):
    quantize(build("llama"), EcqConfig(target_bits=4)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(header)
    with pytest.raises(ValueError, match=r"header of .*model\.safetensors is damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_copy_and_a_pickle_compute_the_same():
    model = quantize(build("llama"), EcqConfig(target_bits=4))
    assert torch.equal(logits_of(copy.deepcopy(model)), logits_of(model))
    assert torch.equal(logits_of(pickle.loads(pickle.dumps(model))), logits_of(model))


def projections(model) -> list[nn.Module]:
    attention = model.model.layers[0].self_attn
    return [attention.q_proj, attention.v_proj]


def tile_filling(seed: int = 0, wide: bool = False):
    """A Llama whose attention layers fill their tiles; some have wide columns, each others."""
    torch.manual_seed(seed)
    config = LlamaConfig(**{**SMALL, "hidden_size": 128}, intermediate_size=96, num_key_value_heads=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    for column, layer in enumerate(projections(model) * wide):
        layer.weight.data[:, column : 3 * column + 1] *= 12
    return quantize(model, EcqConfig())


@torch.no_grad()
@pytest.mark.parametrize("wide", [False, True])
def test_joined_layers_compute_what_each_computes(wide, tmp_path):
    model, other = tile_filling(0, wide), tile_filling(1, not wide)
    layers = projections(model)
    before, bits = logits_of(model), [layer.quantized().codes for layer in layers]
    names, footprint = set(model.state_dict()), model.get_memory_footprint()
    joint = join(layers)
    assert joint.numbers is not None or not wide
    assert joint is join(layers) and joint.out_features == sum(layer.out_features for layer in layers)
    for layer, codes in zip(layers, bits):
        assert torch.equal(layer.quantized().codes, codes)
    # nothing is held twice, and the model is the same to everybody else
    addresses = [layer.tiles.data_ptr() for layer in layers]
    assert addresses == [joint.tiles.data_ptr(), joint.tiles.data_ptr() + layers[0].tiles.numel()]
    # but for wide columns of one, which the others now have too
    assert set(model.state_dict()) >= names and footprint <= model.get_memory_footprint() < 1.03 * footprint
    torch.testing.assert_close(logits_of(model), before, atol=0.02, rtol=0.02)
    for rows in (1, 5, 40):
        x = torch.randn(rows, layers[0].in_features)
        want = torch.cat([layer(x) for layer in layers], -1)
        torch.testing.assert_close(joint(x), want, atol=2e-2, rtol=2e-2)
        with int8_codes():
            torch.testing.assert_close(joint(x), want, atol=6e-2, rtol=2e-2)
    # what changes a layer parts it from the others, and the next joint follows
    for layer, from_layer in zip(layers, projections(other)):
        layer.set_quantized(from_layer.quantized())
    assert join(layers) is not joint
    joint, x = join(layers), torch.randn(1, layers[0].in_features)
    want = torch.cat([layer(x) for layer in projections(other)], -1)
    torch.testing.assert_close(joint(x), want, atol=1e-2, rtol=1e-2)
    assert "joint" not in copy.deepcopy(layers[0]).__dict__
    want = logits_of(model)
    near = {"atol": 0.02, "rtol": 0.02}  # the kernel adds up in another order where wide columns were added
    torch.testing.assert_close(logits_of(copy.deepcopy(model)), want, **near)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), want, **near)
    model.to(torch.bfloat16)
    assert join(layers) is not joint


@torch.no_grad()
def test_joined_layers_that_do_not_fill_their_tiles():
    mlp = tile_filling(1).model.layers[0].mlp
    joint, x = join([mlp.gate_proj, mlp.up_proj]), torch.randn(3, 128)
    gate, up = joint(x).split(128, dim=-1)  # 96 rows take two tiles of 64
    torch.testing.assert_close(gate[:, :96], mlp.gate_proj(x), atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(up[:, :96], mlp.up_proj(x), atol=1e-2, rtol=1e-2)


@torch.no_grad()
def test_layers_that_cannot_be_joined():
    model = tile_filling()
    first, second = projections(model)
    assert join([first, nn.Linear(128, 64)]) is None and join([nn.Linear(128, 64), first]) is None
    first.step.requires_grad_()
    assert join([first, second]) is None
    first.step.requires_grad_(False)
    second.bias = nn.Parameter(torch.zeros(second.out_features))
    assert join([first, second]) is None


@torch.no_grad()
@pytest.mark.parametrize("wide", [(False, False), (False, True), (True, False)])
def test_a_layer_follows_its_codes(wide):
    """What was prepared for the kernel is forgotten when codes or steps are set, loaded, shared or moved."""
    first, second = (projections(tile_filling(seed, wide[seed]))[1] for seed in (0, 1))
    x = torch.randn(1, 128)
    wanted = second(x)
    assert not torch.equal(first(x), wanted)
    before = copy.deepcopy(first)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x), wanted)
    assert torch.allclose(first.dequantize(), second.dequantize(), rtol=1e-6)
    before(x)
    before.set_quantized(second.quantized())
    assert torch.equal(before(x), wanted)
    before.set_quantized(projections(tile_filling())[1].quantized())
    before(x)
    before.share_quantized(second)
    assert torch.equal(before(x), wanted)


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


def test_training_a_coded_module_in_full_names_the_way_out():
    model = quantize(build("llama-untied"), EcqConfig(target_bits=4))
    with pytest.raises(ValueError, match=r"lm_head .*codes cannot be trained; call dequantize\(\).*modules_to_not"):
        add_lora(model, modules_to_save=["lm_head"])
    add_lora(model.dequantize(), modules_to_save=["lm_head"])
    kept = quantize(build("llama-untied"), EcqConfig(target_bits=6, modules_to_not_convert=["lm_head"]))
    assert add_lora(kept, modules_to_save=["lm_head"]).get_base_model().lm_head.weight.is_floating_point()


@pytest.mark.parametrize("again", [quantize, prepare_qat, collect_layers])
def test_a_quantized_model_is_not_quantized_again(again):
    for first in (quantize, prepare_qat):
        model = first(build("llama"), EcqConfig(target_bits=4.5))
        with pytest.raises(ValueError, match=r"is quantized already \(ecq\); call dequantize\(\) first"):
            again(model, EcqConfig(target_bits=3.5))
    model = quantize(build("llama"), EcqConfig(target_bits=4.5)).dequantize()
    assert isinstance(quantize(model, EcqConfig(target_bits=4)).model.layers[0].mlp.up_proj, EcqLinear)


class Reads(nn.Module):
    """Two equal layers, of which one is called and the other's weight is read, in a helper and in a comprehension."""

    def __init__(self):
        super().__init__()
        self.called, self.read, self.looped = (nn.Linear(64, 64) for _ in range(3))

    def helper(self):
        return self.read.weight

    def forward(self, states):
        assert self.called.weight.dtype == states.dtype and isinstance(self.called.weight, torch.Tensor)
        return self.called(states) @ self.helper() + sum(layer.looped.weight.sum() for layer in [self])


def test_weights_that_a_parent_reads_stay_float():
    assert set(quantizable_layers(nn.Sequential(Reads()), EcqConfig())) == {"0.called"}
    sizes = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
    attention = {"num_attention_heads": 4, "intermediate_size": 96}
    relative = {"relative_attention": True, "position_buckets": 64, "pos_att_type": ["p2c", "c2p"]}
    for auto, config, float_ones in (
        (AutoModelForCausalLM, FalconMambaConfig(**sizes, state_size=8), {"dt_proj"}),
        (AutoModelForMaskedLM, DebertaV2Config(**sizes, **attention, **relative), {"rel_embeddings"}),
        (AutoModelForMaskedLM, DebertaConfig(**sizes, **attention, **relative), {"in_proj", "rel_embeddings"}),
    ):
        torch.manual_seed(0)
        model = auto.from_config(config).eval()
        expected = logits_of(model)
        coded = quantize(copy.deepcopy(model), EcqConfig())
        for name, module in coded.named_modules():
            assert not (name.rpartition(".")[2] in float_ones and isinstance(module, (EcqLinear, EcqEmbedding))), name
        assert any(isinstance(module, EcqLinear) for module in coded.modules())
        assert torch.nn.functional.cosine_similarity(logits_of(coded), expected, dim=-1).mean() > 0.9
