"""Adapters on coded models: training, merging, and what is refused."""

import pytest
import torch
from coded import build, logits_of
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
)

from modeling_flashlite.ecq_config_flashlite import EcqConfig
from modeling_flashlite.ecq_modules_flashlite import EcqLinear
from modeling_flashlite.training.calibration import merge_adapters, quantize
from modeling_flashlite.training.lora import add_lora


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


def test_training_a_coded_module_in_full_names_the_way_out():
    model = quantize(build("llama-untied"), EcqConfig(target_bits=4))
    with pytest.raises(ValueError, match=r"lm_head .*which cannot be trained; call dequantize\(\).*modules_to_not"):
        add_lora(model, modules_to_save=["lm_head"])
    add_lora(model.dequantize(), modules_to_save=["lm_head"])
    kept = quantize(build("llama-untied"), EcqConfig(target_bits=6, modules_to_not_convert=["lm_head"]))
    assert add_lora(kept, modules_to_save=["lm_head"]).get_base_model().lm_head.weight.is_floating_point()
