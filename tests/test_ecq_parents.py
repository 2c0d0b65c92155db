"""Weights that a parent module reads itself stay float."""

import copy

import torch
from coded import build, logits_of
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DebertaConfig,
    DebertaV2Config,
    FalconMambaConfig,
)

from modeling_flashlite.ecq_config_flashlite import EcqConfig
from modeling_flashlite.ecq_layers_flashlite import quantizable_layers
from modeling_flashlite.ecq_modules_flashlite import EcqEmbedding, EcqLinear
from modeling_flashlite.training.calibration import quantize


def test_every_weight_of_a_tied_pair_is_float_or_none():
    model = build("llama")
    kept = quantizable_layers(model, EcqConfig(modules_to_not_convert=["lm_head"]))
    assert "model.embed_tokens" not in kept and "model.layers.0.mlp.up_proj" in kept


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
