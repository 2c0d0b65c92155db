"""Small random models of other families, which conversion and pruning start from."""

import types

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 73,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


LONG = {"original_max_position_embeddings": 32, "factor": 4.0, "rope_theta": 1e4}


ROPES = {
    "linear": {"factor": 4.0, "rope_theta": 1e4},
    "dynamic": {"factor": 4.0, "rope_theta": 1e4},
    "yarn": LONG,
    "llama3": {**LONG, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {**LONG, "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.5, 2.0, 3.0]},
}


CASES = {
    "llama": ("llama", {}),
    "llama, biases, a head size of its own": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 10, "num_attention_heads": 3, "num_key_value_heads": 1},
    ),
    "llama, untied": ("llama", {"tie_word_embeddings": False, "hidden_act": "gelu"}),
    **{
        f"llama, {name}": ("llama", {"rope_parameters": {"rope_type": name, **rope}, "max_position_embeddings": 48})
        for name, rope in ROPES.items()
    },
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 8}),
    "mistral, a window that covers": ("mistral", {"sliding_window": 128}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 8, "attention_bias": True}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.3,
            "logits_scaling": 4.0,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": ("olmo2", {}),
    "gemma3": ("gemma3_text", {"head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 128}),
}


def make_parent(name: str, dtype=torch.float64, **changes):
    model_type, special = CASES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **special, **changes})
    parent = AutoModelForCausalLM.from_config(config)
    for parameter in parent.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return in_full_precision(parent.to(dtype).eval()) if dtype == torch.float64 else parent.to(dtype).eval()


def _norm(offset):
    def forward(self, states):
        eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
        return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + eps) * (self.weight + offset)

    return forward


def _angles(self, states, position_ids, layer_type=None):
    config, kind = self.config, layer_type
    prefix = "" if kind is None else f"{kind}_"
    rope = config.rope_parameters if kind is None else config.rope_parameters[kind]
    frequencies, scaling = getattr(self, f"{prefix}inv_freq"), getattr(self, f"{prefix}attention_scaling")
    if rope["rope_type"] in ("dynamic", "longrope"):
        function = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[rope["rope_type"]]
        frequencies, scaling = function(config, states.device, seq_len=int(position_ids.max()) + 1)
    angles = position_ids[..., None].double() * frequencies.double()
    angles = torch.cat([angles, angles], -1)
    return (angles.cos() * scaling).to(states.dtype), (angles.sin() * scaling).to(states.dtype)


def in_full_precision(model):
    """The library takes norms and angles in float32 whatever the model's type; here they are taken in its own."""
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            offset = 1.0 if name.startswith("Gemma") else 0.0
            module.forward = types.MethodType(_norm(offset), module)
        elif name.endswith("RotaryEmbedding"):
            module.forward = types.MethodType(_angles, module)
    return model


def some_ids(rows=2, columns=40, seed=1):
    return torch.randint(3, 73, (rows, columns), generator=torch.Generator().manual_seed(seed))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
