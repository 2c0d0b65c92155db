"""Train a byte-level BPE tokenizer on any text and save it where `AutoTokenizer` finds it.

python scripts/train_tokenizer.py --dataset python --vocab_size 4096 --output_dir runs/tokenizer
python scripts/train_tokenizer.py --dataset train=pairs.jsonl.xz --columns en,de --add_eos_token --output_dir runs/tok
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from modeling_flashlite.cli import finish, start
from modeling_flashlite.data.loading import load_data, pick_split, require_columns
from modeling_flashlite.data.tasks import texts_of
from modeling_flashlite.data.tokenization import train_tokenizer


@dataclass
class TokenizerArgs:
    output_dir: str = field(metadata={"help": "directory that receives tokenizer.json and its configuration"})
    dataset: str = field(default="python", metadata={"help": "python, local files (train=a.jsonl.xz), or a Hub id"})
    dataset_name: str | None = field(default=None, metadata={"help": "configuration of a Hub data set"})
    split: str = field(default="train", metadata={"help": "split to learn from"})
    columns: str = field(default="text", metadata={"help": "text columns to train on, separated by commas"})
    vocab_size: int = field(default=8192, metadata={"help": "tokens, bytes and special tokens included"})
    add_eos_token: bool = field(
        default=False, metadata={"help": "close encoded text with </s>: encoder-decoder models"}
    )
    model_max_length: int = field(default=1024, metadata={"help": "tokens kept by truncation=True"})
    streaming: bool = field(default=False, metadata={"help": "read rows on demand"})
    limit: int | None = field(default=None, metadata={"help": "rows to learn from; all if unset"})


def main(args: TokenizerArgs) -> dict:
    options = {"name": args.dataset_name, "streaming": args.streaming, "limit": args.limit, "columns": args.columns}
    rows = pick_split(load_data(args.dataset, **options), args.split)
    columns = [column.strip() for column in args.columns.split(",")]
    require_columns(rows, columns, "Name the text columns with --columns.")

    def texts() -> Iterator[str]:
        for row in rows:
            yield from (text for column in columns for text in texts_of(row[column]))

    tokenizer = train_tokenizer(
        texts(),
        args.vocab_size,
        add_eos_token=args.add_eos_token,
        model_max_length=args.model_max_length,
        total=None if args.streaming else len(rows) * len(columns),
    )
    tokenizer.save_pretrained(args.output_dir)
    sample = next(filter(None, texts()))
    result = {
        "output_dir": args.output_dir,
        "vocab_size": len(tokenizer),
        "characters_per_token": round(len(sample) / max(1, len(tokenizer(sample)["input_ids"])), 3),
    }
    return finish(result)


if __name__ == "__main__":
    start(main, (TokenizerArgs,), __doc__)
