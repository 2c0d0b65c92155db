"""Sample training text from a language model, to quantize or distil it when its own data is not available.

python scripts/sample.py --model you/llama --rows 4000 --output runs/sampled.jsonl
python scripts/quantize.py --config scripts/recipes/qat_tiny.yaml --model you/llama --dataset train=runs/sampled.jsonl

Plain samples at temperature 1 from the beginning of a text (LLM-QAT, arXiv 2305.17888, whose first tokens are greedy,
which writes the same few beginnings again and again).
"""

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import set_seed

import modeling_flashlite  # noqa: F401  (registers the architecture)
from modeling_flashlite.checkpoint import CheckpointArgs, load_language_model, read_tokenizer
from modeling_flashlite.cli import finish, start


@dataclass
class SampleArgs:
    output: str = field(metadata={"help": "jsonl file of rows with a column text"})
    rows: int = field(default=4000, metadata={"help": "texts to write"})
    max_new_tokens: int = field(default=256, metadata={"help": "of a text that does not end before"})
    batch_size: int = field(default=64, metadata={"help": "texts at once"})
    seed: int = field(default=0, metadata={"help": "of the samples"})


@torch.inference_mode()
def sample(model, tokenizer, args: SampleArgs) -> list[str]:
    """Texts of the model, written from its first token on."""
    starts = (tokenizer.bos_token_id, model.generation_config.bos_token_id, tokenizer.eos_token_id)
    start = next((token for token in starts if token is not None), None)
    if start is None:
        raise SystemExit(f"sample.py: {model.name_or_path} has no bos and no eos token to begin a text with; set one.")
    pad = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, start) if token is not None)
    texts: list[str] = []
    with tqdm(total=args.rows, desc="sample", unit="text") as bar:
        while len(texts) < args.rows:
            count = min(args.batch_size, args.rows - len(texts))
            ids = torch.full((count, 1), start, device=model.device)
            options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "pad_token_id": pad}
            ids = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.max_new_tokens, **options
            )
            texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
            bar.update(count)
    return texts


def main(checkpoint: CheckpointArgs, args: SampleArgs) -> dict:
    set_seed(args.seed)
    tokenizer = read_tokenizer(checkpoint.model, **checkpoint.hub)
    model = load_language_model(checkpoint.model, device=checkpoint.device, dtype=checkpoint.dtype, **checkpoint.hub)
    if model.config.is_encoder_decoder:
        raise SystemExit(f"sample.py: {checkpoint.model} is an encoder-decoder; name a decoder-only model.")
    texts = [text for text in sample(model, tokenizer, args) if text.strip()]
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        path = Path(folder) / output.name
        Dataset.from_dict({"text": texts}).to_json(path, force_ascii=False)
        os.replace(path, output)
    return finish({"output": str(output), "rows": len(texts), "characters": sum(map(len, texts))})


if __name__ == "__main__":
    start(main, (CheckpointArgs, SampleArgs), __doc__)
