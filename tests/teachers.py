"""Small teachers of transformers, a tokenizer and rows for them, and arguments of a short distillation."""

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

V = 97
OFF = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
DEPTHS = {"layers": 1, "ffn_dim": 32, "attention_heads": 2}


def make_tokenizer(size=V, padding_side="right"):
    vocabulary = {"<pad>": 0, "</s>": 1, "<s>": 2, **{f"w{i}": i for i in range(3, size)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>", padding_side=padding_side
    )


def seq2seq_rows(count=8, seed=0):
    draw = np.random.default_rng(seed)
    return Dataset.from_list(
        [
            {
                "input_ids": draw.integers(3, V, draw.integers(4, 12)).tolist(),
                "labels": draw.integers(3, V, draw.integers(3, 10)).tolist() + [1],
            }
            for _ in range(count)
        ]
    )


def causal_rows(count=8, seed=0):
    draw = np.random.default_rng(seed)
    return Dataset.from_list([{"input_ids": draw.integers(3, V, draw.integers(6, 14)).tolist()} for _ in range(count)])


def with_labels(rows):
    return rows.map(lambda row: {"labels": row["input_ids"]})


def t5(vocab_size=V, layers=2, seed=1):
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=vocab_size, d_model=16, d_kv=4, d_ff=32, num_layers=layers, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, initializer_factor=4.0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def llama(vocab_size=V, seed=1, layers=2):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=4,
        initializer_range=0.3, pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def arguments(path, **options):
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return Seq2SeqTrainingArguments(str(path), **{**defaults, **options})


def oracle(name, log_p, log_q):
    """The textbook definitions on probabilities, in float64."""
    p, q = log_p.exp(), log_q.exp()
    kind, _, value = name.partition(":")
    value = float(value) if value else None
    kl = lambda a, b: (a * (a / b).log()).sum(-1)  # noqa: E731
    if kind == "forward" or name == "jsd:0":
        return kl(p, q)
    if kind == "reverse" or name == "jsd:1":
        return kl(q, p)
    if kind == "jsd":
        m = value * p + (1 - value) * q
        return value * kl(p, m) + (1 - value) * kl(q, m)
    if kind == "skew":
        return kl(p, value * p + (1 - value) * q)
    between = q.detach() ** (1 - value) * p**value
    return kl(between / between.sum(-1, keepdim=True), q)


def other(family):
    """A student of transformers that calls its loss hook in another way than ours, or not at all."""
    torch.manual_seed(5)
    sizes = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
    if family == "GPT2":
        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, **OFF, **sizes)).eval()
    if family == "BART":
        width = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in DEPTHS.items()}
        return BartForConditionalGeneration(
            BartConfig(d_model=16, decoder_start_token_id=1, max_position_embeddings=64, dropout=0.0, **width, **sizes)
        ).eval()
    return t5(seed=5) if family == "T5" else llama(seed=5)
