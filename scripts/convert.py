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
from transformers import AutoModelForCausalLM, PreTrainedConfig

from modeling_flashlite.checkpoint import is_adapter, read_config
from modeling_flashlite.cli import finish, refuse_unused, start
from modeling_flashlite.data.loading import load_data, pick_split, require_columns
from modeling_flashlite.measure.cost import count_parameters
from modeling_flashlite.measure.parity import logit_parity, perplexities
from modeling_flashlite.measure.results import write_json
from modeling_flashlite.training.conversion import convert_back, parent_of, to_encoder_decoder, transplant
from modeling_flashlite.training.converted_files import check_output, staged, write_checkpoint
from modeling_flashlite.training.families import ConversionError, check_decoder, dense_length, one_line, parent_config
from modeling_flashlite.training.pruning import parse_target, prune
from modeling_flashlite.training.source import Source, local_folder, open_source

AXES = ("relevance_top_k", "memory_blocks", "block_size")
PRUNING_ROW = 512  # tokens


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

    def __post_init__(self):
        if self.report_tokens != 0 and self.report_tokens < 2:
            raise ValueError(f"report_tokens is {self.report_tokens}, but must be 0 or at least 2.")


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
    axes = {name: getattr(args, name) for name in AXES if getattr(args, name) is not None}
    source = open_source(args.model, args.max_length)
    tokenizer = source.tokenizer()
    ids = torch.arange(max(48, args.report_tokens))[None] % source.config.vocab_size
    if tokenizer is not None:  # before the weights, which take longer
        ids = tokenizer(read_text(args)[: 16 * ids.shape[1]], return_tensors="pt", verbose=False)["input_ids"]
        if ids.shape[1] < 2:
            raise ConversionError(f"{args.dataset} has {ids.shape[1]} tokens, but the report needs 2; give more text.")
    model = transplant(source, args.max_length, **axes)
    found = {"parameters": count_parameters(model), "full_attention_up_to": dense_length(model.config)}
    found["parity"] = logit_parity(model, parent_of(model, source.config), ids[:, :48])
    if tokenizer is not None and args.report_tokens:
        found["perplexity"] = perplexities(model, ids[:, : args.report_tokens])
    write(model, source, args.output, found)
    show(found, args.output)
    return found


def from_flashlite(args: ConvertArgs, config: PreTrainedConfig) -> dict:
    """Convert back to a family of transformers, add an encoder, or prune."""
    refuse_unused(args, ("max_length", *AXES, "report_tokens"), "to convert a model of another family")
    if not args.prune:
        refuse_unused(args, ("dataset", "column"), "with --prune, or to convert a model of another family")
    check_decoder(config, (config.architectures or ["FlashLiteForCausalLM"])[0], args.model)
    if args.to and args.encoder_decoder:
        raise ConversionError("--to and --encoder_decoder exclude each other; the families have no encoder.")
    if args.to:
        parent_config(config, args.to)  # refuses what the family cannot express
    target, folder = parse_target(args.prune) if args.prune else {}, local_folder(args.model)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    if odd := sorted({*info["missing_keys"], *info["unexpected_keys"]}):
        raise ConversionError(
            f"The weights of {args.model} do not fit its config ({odd[0]}, {len(odd)} in all); save it again with "
            "save_pretrained."
        )
    source = Source.of_flashlite(args.model, folder, model)
    found: dict = {}
    if args.prune:
        model, found["kept"] = prune(model, target, pruning_rows(args, source))
    if args.encoder_decoder:
        model = to_encoder_decoder(model)
    if args.to:
        model = convert_back(model, args.to)
    found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    write(model, source, args.output, found)
    print(f"{type(model).__name__} with {found['parameters']:,} parameters in {args.output}")
    if args.to:
        print("Its attention is full at every length: the family has no sparse attention.")
    if args.prune:
        print(f"It needs training now: python scripts/distill.py --model {args.output} --teacher {args.model} ...")
    if args.encoder_decoder:
        print("It needs training now: see scripts/recipes/adapt_seq2seq.yaml.")
    return found


def pruning_rows(args: ConvertArgs, source: Source) -> torch.Tensor:
    """Tokens `[R, 512]`, at most 32 rows."""
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise ConversionError(f"{args.model} has no tokenizer, and pruning reads text; save one beside it.")
    tokens = tokenizer(read_text(args)[:200_000], return_tensors="pt", verbose=False)["input_ids"][0]
    if len(tokens) < PRUNING_ROW:
        raise ConversionError(
            f"{args.dataset} has {len(tokens)} tokens, but pruning needs {PRUNING_ROW}; give more text."
        )
    return tokens[: len(tokens) // PRUNING_ROW * PRUNING_ROW][: 32 * PRUNING_ROW].view(-1, PRUNING_ROW)


def write(model, source: Source, output: str, found: dict) -> None:
    with staged(output) as folder:
        write_checkpoint(model, source, folder)
        write_json(folder / "conversion.json", found)


def config_of(model: str) -> PreTrainedConfig | None:
    """The config of a checkpoint, `None` for a GGUF file; adapters are refused."""
    if Path(model).is_file() or Path(model).suffix == ".gguf":
        return None
    try:
        if not is_adapter(model):
            return read_config(model)
    except (OSError, ValueError) as error:
        raise ConversionError(
            f"{model} has no config that can be read ({one_line(error)}); give a folder with config.json, a .gguf "
            "file or a Hub id."
        ) from error
    raise ConversionError(f"{model} is an adapter; merge it into its base (merge_and_unload) and save that.")


def main(args: ConvertArgs) -> dict:
    check_output(args.output)
    changes = bool(args.prune or args.encoder_decoder or args.to)
    config = config_of(args.model)
    if config is not None and config.model_type == "flashlite":
        if not changes:
            raise ConversionError(
                f"{args.model} is a Flash-Lite model already; give --to, --prune or --encoder_decoder."
            )
        found = from_flashlite(args, config)
    elif changes:
        raise ConversionError(
            f"--to, --prune and --encoder_decoder change Flash-Lite models; convert {args.model} first."
        )
    else:
        found = from_parent(args)
    return finish({"output": args.output, **found})


if __name__ == "__main__":
    start(main, [ConvertArgs], __doc__)
