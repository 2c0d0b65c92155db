"""State created under `torch.inference_mode` does not break later training or generation."""

import copy

import pytest
import torch

from modeling_flashlite import EcqConfig, FlashLiteForCausalLM, FlashLiteForConditionalGeneration, add_lora
from modeling_flashlite.compat_flashlite import CACHE
from modeling_flashlite.quantization_flashlite import attach, quantize_data_free

# peft 0.21 asks for an attribute that transformers 5.23 renamed
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def make(config, coded=True):
    torch.manual_seed(0)
    model_class = FlashLiteForConditionalGeneration if config.is_encoder_decoder else FlashLiteForCausalLM
    model = model_class(config).eval()
    if coded:
        settings = EcqConfig()
        quantize_data_free(model, settings)
        attach(model, settings)
    return model


@pytest.mark.parametrize("encoder_decoder", [False, True])
@pytest.mark.parametrize("rows", [1, 24])
def test_a_coded_model_that_inferred_trains_as_one_that_did_not(tiny_config, encoder_decoder, rows):
    ids = torch.randint(3, 97, (rows, 13))
    gradients = []
    for inferred in (False, True):
        model = make(tiny_config(is_encoder_decoder=encoder_decoder, hidden_size=64, intermediate_size=64))
        if inferred:
            with torch.inference_mode():
                model(ids, labels=ids)
                model.generate(ids, max_new_tokens=5, do_sample=False)
                model.generate(ids, max_new_tokens=5, do_sample=False, num_beams=2)
        torch.manual_seed(1)
        model = add_lora(model).train()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 0
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("coded", [False, True])
def test_a_cache_filled_in_inference_mode_goes_on_outside(causal_config, coded):
    model = make(causal_config, coded)
    ids = torch.randint(3, 97, (2, 150))
    settings = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0}
    whole = model.generate(ids, **settings)
    for start in (1, 149):
        with torch.inference_mode():
            out = model(ids[:, :start], use_cache=True)
            for column in range(start, 149):
                out = model(ids[:, column : column + 1], past_key_values=out.past_key_values, use_cache=True)
        past = out.past_key_values
        past.crop(-3)
        if start == 1:
            past.reorder_cache(torch.tensor([1, 0]))
            past.reorder_cache(torch.tensor([1, 0]))
        with torch.no_grad():
            model(ids[:, 146:149], past_key_values=past)
        torch.testing.assert_close(model.generate(ids, **{**settings, CACHE: past}), whole, rtol=0, atol=0)


def test_models_quantized_or_copied_in_inference_mode_generate_and_train(tiny_config):
    config = tiny_config(hidden_size=64, intermediate_size=64)
    ids = torch.randint(3, 97, (1, 70))
    settings = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    expected = make(config).generate(ids, **settings)
    with torch.inference_mode():
        quantized = make(config)
        copied = copy.deepcopy(quantized)
        for model in (quantized, copied, copy.deepcopy(quantized).to(torch.bfloat16)):
            for _ in range(2):
                written = model.generate(ids, **settings)
                assert model.dtype != torch.float32 or torch.equal(written, expected)
            model(torch.randint(3, 97, (4, 40)))
    for model in (quantized, copied):
        assert torch.equal(model.generate(ids, **settings), expected)
