"""Convert a pre-trained decoder to Flash-Lite and back, give it an encoder, or make it smaller.

python scripts/convert.py --model HuggingFaceTB/SmolLM2-135M-Instruct --output runs/smol
python scripts/convert.py --model SmolLM2-135M-Instruct.Q4_1.gguf --output runs/smol
python scripts/convert.py --model runs/smol --to llama --output runs/smol-llama
python scripts/convert.py --model runs/smol --encoder_decoder --output runs/smol-seq2seq
python scripts/convert.py --model runs/smol --prune layers=20,intermediate_size=1152 --output runs/smol-90m
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from modeling_flashlite.checkpoint import read_config, read_tokenizer
from modeling_flashlite.cli import finish, start
from modeling_flashlite.data.loading import load_data, pick_split, require_columns
from modeling_flashlite.measure.cost import count_parameters
from modeling_flashlite.measure.parity import logit_parity, perplexities
from modeling_flashlite.measure.results import write_json
from modeling_flashlite.training.conversion import convert_back, parent_of, to_encoder_decoder, transplant
from modeling_flashlite.training.converted_files import check_output, write_checkpoint
from modeling_flashlite.training.families import ConversionError, dense_length
from modeling_flashlite.training.pruning import parse_target, prune
from modeling_flashlite.training.source import Source, open_source


@dataclass
class ConvertArgs:
    model: str = field(metadata={"help": "folder, Hub id or .gguf file, or a Flash-Lite model to change"})
    output: str = field(metadata={"help": "folder of the new checkpoint; it must not exist"})
    to: str | None = field(
        default=None, metadata={"help": "write this family instead of Flash-Lite: llama, qwen3, ..."}
    )
    encoder_decoder: bool = field(default=False, metadata={"help": "add an encoder with the same weights"})
    prune: str | None = field(
        default=None, metadata={"help": "sizes to reach: layers=20,intermediate_size=1152 or parameters=90M"}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "tokens of the longest text, if not the trained length"}
    )
    relevance_top_k: int | None = field(default=None, metadata={"help": "blocks read in full; by the trained length"})
    memory_blocks: int | None = field(default=None, metadata={"help": "blocks reached back; by the trained length"})
    block_size: int | None = field(
        default=None, metadata={"help": "tokens of a block; 8 if unset, 64 reads long prompts fastest"}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "text for report and pruning: a.txt, a.jsonl.xz, a Hub id; built-in if unset"}
    )
    column: str = field(default="text", metadata={"help": "column that holds the text"})
    report_tokens: int = field(default=2048, metadata={"help": "tokens of the report's text; 0 for no perplexities"})


def read_text(args: ConvertArgs) -> str:
    """Text to measure on, or to prune by: from the data set, else the language topics in the Python installation."""
    if args.dataset is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics.values())
    splits = load_data(args.dataset, limit=2000)
    wanted = "train" if args.prune else "test"
    rows = pick_split(splits, next(iter(splits)) if len(splits) == 1 else wanted)
    require_columns(rows, [args.column], "Name the text column with --column.")
    return "\n".join(rows[args.column])


def show(found: dict, output: str) -> None:
    parity = found["parity"]
    print(f"parameters                 {found['parameters']:,}")
    print(
        f"logits                     differ by {parity['with_plain_products']:.1e} with the parent's products, by "
        f"{parity['largest_difference']:.1e} with faster ones ({parity['tokens']} tokens)"
    )
    print(
        f"                           from float64: {parity['from_float64']:.1e} here, "
        f"{parity['parent_from_float64']:.1e} in the parent; the largest logit is {parity['largest_logit']:.1f}"
    )
    print(f"attention is full up to    {found['full_attention_up_to']:,} tokens, and sparse beyond")
    if "perplexity" in found:
        measured = found["perplexity"]
        print(
            f"perplexity                 {measured['dense']:.2f} with full attention, {measured['sparse']:.2f} as "
            f"converted ({measured['tokens']:,} tokens)"
        )
    print(f"next                       python scripts/chat.py --model {output}")
    print(f"                           python scripts/quantize.py --model {output} --target_bits 3 ...")
    print(f"                           python scripts/distill.py --teacher {output} ... (heals the sparse attention)")


def from_parent(args: ConvertArgs) -> dict:
    axes = {name: getattr(args, name) for name in ("relevance_top_k", "memory_blocks", "block_size")}
    axes = {name: value for name, value in axes.items() if value is not None}
    source = open_source(args.model, args.max_length)
    model = transplant(source, args.max_length, **axes)
    write_checkpoint(model, source, args.output)
    tokenizer = source.tokenizer()
    found = {"parameters": count_parameters(model), "full_attention_up_to": dense_length(model.config)}
    ids = torch.arange(max(48, args.report_tokens))[None] % model.config.vocab_size
    if tokenizer is not None:
        ids = tokenizer(read_text(args)[: 16 * ids.shape[1]], return_tensors="pt", verbose=False)["input_ids"]
    found["parity"] = logit_parity(model, parent_of(model, source.config), ids[:, :48])
    if tokenizer is not None and args.report_tokens:
        found["perplexity"] = perplexities(model, ids[:, : args.report_tokens])
    show(found, args.output)
    return found


def from_flashlite(args: ConvertArgs) -> dict:
    """Convert back to a family of transformers, add an encoder, or prune."""
    model = AutoModelForCausalLM.from_pretrained(args.model)
    tokenizer = read_tokenizer(args.model) if any(Path(args.model).glob("tokenizer*")) else None
    source = Source.of_flashlite(args.model, model)
    found: dict = {}
    if args.prune:
        if tokenizer is None:
            raise ConversionError(f"{args.model} has no tokenizer, and pruning reads text; save one beside it.")
        rows = tokenizer(read_text(args)[:200_000], return_tensors="pt", verbose=False)["input_ids"][0]
        rows = rows[: len(rows) // 512 * 512][: 32 * 512].view(-1, 512)
        model, found["kept"] = prune(model, parse_target(args.prune), rows)
    if args.encoder_decoder:
        model = to_encoder_decoder(model)
    if args.to:
        model = convert_back(model, args.to)
    found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    write_checkpoint(model, source, args.output)
    print(f"{type(model).__name__} with {found['parameters']:,} parameters in {args.output}")
    if args.to:
        print("Its attention is full at every length: the family has no sparse attention.")
    if args.prune:
        print(f"It needs training now: python scripts/distill.py --model {args.output} --teacher {args.model} ...")
    if args.encoder_decoder:
        print("It needs training now: see scripts/recipes/adapt_seq2seq.yaml.")
    return found


def main(args: ConvertArgs) -> dict:
    check_output(args.output)
    changes = bool(args.prune or args.encoder_decoder or args.to)
    local = (Path(args.model) / "config.json").is_file()
    if local and read_config(args.model).model_type == "flashlite":
        if not changes:
            raise ConversionError(
                f"{args.model} is a Flash-Lite model already; give --to, --prune or --encoder_decoder."
            )
        found = from_flashlite(args)
    elif changes:
        raise ConversionError(
            f"--to, --prune and --encoder_decoder change Flash-Lite models; convert {args.model} first."
        )
    else:
        found = from_parent(args)
    write_json(Path(args.output) / "conversion.json", found)
    return finish({"output": args.output, **found})


if __name__ == "__main__":
    start(main, [ConvertArgs], __doc__)
