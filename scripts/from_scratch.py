"""The whole pipeline on real text: tokenizer, teacher, distilled student, 4-bit file, LoRA, clean reload.

python scripts/from_scratch.py
python scripts/from_scratch.py --size smallest --output runs/quick
python scripts/from_scratch.py --dataset train=a.jsonl,validation=b.jsonl --target_bits 2.5 --output runs/mine
"""

import dataclasses
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from modeling_flashlite.cli import finish, start
from modeling_flashlite.training.scratch import SIZES, ScratchStages


@dataclass
class DemoArgs:
    size: str = field(default="default", metadata={"help": "default (minutes) or smallest (seconds of training)"})
    dataset: str = field(default="python", metadata={"help": "python, local files (train=a.txt,...), or a Hub id"})
    column: str = field(default="text", metadata={"help": "column that holds the text"})
    limit: int | None = field(default=None, metadata={"help": "rows to use of every split; all if unset"})
    target_bits: float = field(default=3.0, metadata={"help": "budget of the quantized file, bits per weight"})
    output: str = field(default="runs/scratch", metadata={"help": "a stage that is finished here is not run again"})
    seed: int = field(default=0, metadata={"help": "seed of weights, data order and sampling"})


COLUMNS = {
    "parameters": ("parameters", "{:,}"),
    "bits_per_weight": ("bits/weight", "{:.2f}"),
    "file_bytes": ("file bytes", "{:,}"),
    "loss": ("loss", "{:.3f}"),
    "perplexity": ("perplexity", "{:.1f}"),
    "tokens_per_second": ("tokens/s", "{:.0f}"),
}


def main(args: DemoArgs) -> dict:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # peft asks transformers for it by the old name
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    if args.size not in SIZES:
        raise ValueError(f"size is {args.size!r}, but must be one of {', '.join(SIZES)}.")
    made_with = {key: value for key, value in dataclasses.asdict(args).items() if key != "output"}
    demo = ScratchStages(Path(args.output), made_with, args.seed, SIZES[args.size], args.target_bits)
    demo.load_texts(args.dataset, args.column, args.limit)
    demo.stage(demo.tokenizer)
    demo.pack_rows()
    for work in (demo.teacher, demo.annotations, demo.distilled, demo.quantized, demo.qat, demo.lora):
        demo.stage(work)
    text = demo.stage(demo.reloaded)["text"]
    print(f"\n{text}\n\n{demo.render(COLUMNS)}\n")
    config = {**dataclasses.asdict(args), **dataclasses.asdict(demo.size)}
    return finish(demo.write_results(config, dataset=args.dataset, sample=text))


if __name__ == "__main__":
    start(main, [DemoArgs], __doc__)
