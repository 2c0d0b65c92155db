"""Perplexity of long texts by position, for a dense or a sparse model that reads chunks through its cache.

python scripts/studies/long_text.py --model runs/smol --dataset test=books.jsonl --length 8192 --texts 2 --dense
python scripts/studies/long_text.py --model runs/smol --dataset test=books.jsonl --length 32768 \
    --ranges 4096-8192,8192-32768 --control 8192
"""

import math
from dataclasses import asdict, dataclass, field

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import modeling_flashlite  # noqa: F401  registers the Auto classes
from modeling_flashlite.cli import finish, start
from modeling_flashlite.data.loading import load_data, pick_split
from modeling_flashlite.measure.results import write_results


@dataclass
class StudyArgs:
    model: str = field(metadata={"help": "directory or Hub id of a causal model"})
    dataset: str = field(metadata={"help": "local files (test=a.jsonl.xz) or a Hub id, rows of a `text` column"})
    split: str = field(default="test", metadata={"help": "split"})
    document_column: str | None = field(default="book", metadata={"help": "column whose change begins a new text"})
    length: int = field(default=8192, metadata={"help": "tokens of a text"})
    texts: int = field(default=1, metadata={"help": "texts, each the beginning of another document"})
    ranges: str | None = field(default=None, metadata={"help": "positions from-to, separated by commas; all if unset"})
    chunk: int = field(default=2048, metadata={"help": "tokens read at once"})
    control: int | None = field(
        default=None,
        metadata={"help": "read the ranges anew in windows of this many tokens, of which the second half counts"},
    )
    dense: bool = field(default=False, metadata={"help": "read everything, whatever the model's axes are"})
    block_size: int | None = field(default=None, metadata={"help": "tokens of a block; the model's own"})
    sub_block_size: int | None = field(default=None, metadata={"help": "tokens under one mean key; the model's own"})
    relevance_top_k: int | None = field(default=None, metadata={"help": "blocks read in full; the model's own"})
    memory_blocks: int | None = field(default=None, metadata={"help": "blocks reached back; the model's own"})
    dtype: str = field(default="bfloat16", metadata={"help": "float32 or bfloat16"})
    output: str = field(default="runs/results/long_text.json", metadata={"help": "results file"})
    label: str | None = field(default=None, metadata={"help": "name of the data set in tables"})
    note: str | None = field(default=None, metadata={"help": "about the checkpoint, for the results file"})


def beginnings(args: StudyArgs, tokenizer) -> list[torch.Tensor]:
    """Token ids `[1, length]` of the beginnings of sufficiently long documents, evenly spaced over the split."""
    rows, texts, ids, last = pick_split(load_data(args.dataset), args.split), [], [], None
    for row in rows:
        document = row[args.document_column] if args.document_column else None
        if document != last:
            last, ids = document, []
        if len(ids) < args.length:
            ids += tokenizer(row["text"] + "\n", add_special_tokens=False)["input_ids"]
            if len(ids) >= args.length:
                texts.append(torch.tensor(ids[: args.length])[None])
    if len(texts) < args.texts:
        raise ValueError(f"{len(texts)} documents have {args.length} tokens, not {args.texts}; ask for less.")
    return [texts[index * len(texts) // args.texts] for index in range(args.texts)]


def token_losses(model, ids: torch.Tensor, chunk: int) -> torch.Tensor:
    """Negative log-likelihood `[length - 1]` of every token but the first, read `chunk` by `chunk`."""
    cache, losses = None, []
    targets = ids[0, 1:]
    for place in tqdm(range(0, ids.shape[1], chunk), desc="chunks", leave=False):
        outputs = model.base_model(input_ids=ids[:, place : place + chunk], past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        wanted = targets[place : place + chunk]
        states = outputs.last_hidden_state[0, : len(wanted)]
        for part, answer in zip(states.split(256), wanted.split(256)):
            losses.append(torch.nn.functional.cross_entropy(model.lm_head(part).float(), answer, reduction="none"))
    return torch.cat(losses)


def control_losses(model, ids: torch.Tensor, window: int, chunk: int) -> torch.Tensor:
    """`token_losses` without a memory of the text: each token has `window / 2` to `window` tokens before it, no more.

    A passage may be harder than the one before it. These are the losses of the same tokens, to compare with.
    """
    step = window // 2
    losses = [token_losses(model, ids[:, :window], chunk)]
    for place in tqdm(range(step, ids.shape[1] - step, step), desc="windows", leave=False):
        losses.append(token_losses(model, ids[:, place : place + window], chunk)[step - 1 :])
    return torch.cat(losses)


def perplexities(losses: torch.Tensor, ranges: str, name: str) -> dict[str, float]:
    """Perplexity of positions `from-to`, over all texts `[texts, length - 1]`."""
    found = {}
    for positions in ranges.split(","):
        low, high = map(int, positions.split("-"))
        found[f"{name} {positions}"] = math.exp(losses[:, max(low, 1) - 1 : high - 1].double().mean())
    return found


def config_with_axes(args: StudyArgs):
    """The model's config with the sizes of sparse attention that were asked for; any other model is dense already."""
    config = AutoConfig.from_pretrained(args.model)
    decoder = config.get_text_config(decoder=True)
    names = ("block_size", "sub_block_size", "relevance_top_k", "memory_blocks")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.dense:
        changes |= {"relevance_top_k": None, "memory_blocks": None}
    for name, value in changes.items():
        if hasattr(decoder, name):
            setattr(decoder, name, value)
    return config


@torch.inference_mode()
def main(args: StudyArgs) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    config = config_with_axes(args)
    model = AutoModelForCausalLM.from_pretrained(args.model, config=config, dtype=getattr(torch, args.dtype)).eval()
    texts = beginnings(args, tokenizer)
    losses = torch.stack([token_losses(model, ids, args.chunk) for ids in tqdm(texts, desc="texts")])
    ranges = args.ranges or f"1-{args.length}"
    metrics = perplexities(losses, ranges, "perplexity")
    if args.control:
        anew = [control_losses(model, ids, args.control, args.chunk) for ids in tqdm(texts, desc="control")]
        metrics |= perplexities(torch.stack(anew), ranges, "control")
    write_results(
        args.output,
        metrics,
        task="perplexity by position",
        dataset=args.label or args.dataset,
        split=args.split,
        model=args.model,
        config=asdict(args),
        dtype=args.dtype,
    )
    return finish({"output": args.output, **metrics})


if __name__ == "__main__":
    start(main, (StudyArgs,), __doc__)
