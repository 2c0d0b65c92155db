"""Sample training text from a language model, to quantize or distil it when its own data is not available.

python scripts/sample.py --model you/llama --rows 4000 --output runs/sampled.jsonl
python scripts/quantize.py --config scripts/recipes/qat_tiny.yaml --model you/llama --dataset train=runs/sampled.jsonl
python scripts/sample.py --model you/chat --chat --rows 200 --beside wiki.train.txt --output runs/mixed.jsonl

Plain samples, or conversations by the chat template, of which the model writes both sides; see `training/sampling.py`.
"""

from dataclasses import dataclass, field

from transformers import set_seed

import modeling_flashlite  # noqa: F401  (registers the architecture)
from modeling_flashlite.checkpoint import CheckpointArgs, load_language_model, read_tokenizer
from modeling_flashlite.cli import finish, start
from modeling_flashlite.data.loading import load_data, pick_split
from modeling_flashlite.measure.results import write_json_lines
from modeling_flashlite.training.sampling import write_conversations, write_texts

_DOCUMENT = 6000  # characters that consecutive lines of a text file are joined to


@dataclass
class SampleArgs:
    output: str = field(metadata={"help": "jsonl file of rows with a column text"})
    rows: int = field(default=4000, metadata={"help": "texts to write"})
    max_new_tokens: int = field(default=256, metadata={"help": "of a text that does not end before"})
    batch_size: int = field(default=64, metadata={"help": "texts at once"})
    chat: bool = field(default=False, metadata={"help": "conversations by the tokenizer's chat template"})
    beside: str | None = field(default=None, metadata={"help": "file of text that is mixed in, in documents"})
    characters: int = field(default=1_000_000, metadata={"help": "how much of it"})
    seed: int = field(default=0, metadata={"help": "of the samples"})


def mixed(texts: list[str], path: str, characters: int) -> list[str]:
    """The texts, spread evenly between documents from the beginning of a file of lines or of rows."""
    documents: list[list[str]] = [[]]
    size = total = 0
    for text in pick_split(load_data(path), "train")["text"]:
        if size >= _DOCUMENT:
            documents.append([])
            size = 0
        documents[-1].append(text or "")
        size, total = size + len(text or "") + 1, total + len(text or "") + 1
        if total >= characters:
            break
    joined = ["\n".join(lines) for lines in documents]
    places = [((place + 0.5) / len(part), text) for part in (texts, joined) for place, text in enumerate(part)]
    return [text for _, text in sorted(places, key=lambda pair: pair[0])]


def main(checkpoint: CheckpointArgs, args: SampleArgs) -> dict:
    set_seed(args.seed)
    tokenizer = read_tokenizer(checkpoint.model, **checkpoint.hub)
    model = load_language_model(checkpoint.model, device=checkpoint.device, dtype=checkpoint.dtype, **checkpoint.hub)
    if model.config.is_encoder_decoder:
        raise SystemExit(f"sample.py: {checkpoint.model} is an encoder-decoder; name a decoder-only model.")
    if args.chat and tokenizer.chat_template is None:
        raise SystemExit(f"sample.py: the tokenizer of {checkpoint.model} has no chat template; leave --chat out.")
    if args.chat:
        chats = write_conversations(model, tokenizer, args.rows, args.batch_size)
        texts = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in chats]
    else:
        texts = write_texts(model, tokenizer, args.rows, args.max_new_tokens, args.batch_size)
    if args.beside:
        texts = mixed(texts, args.beside, args.characters)
    write_json_lines(args.output, ({"text": text} for text in texts))
    return finish({"output": args.output, "rows": len(texts), "characters": sum(map(len, texts))})


if __name__ == "__main__":
    start(main, (CheckpointArgs, SampleArgs), __doc__)
