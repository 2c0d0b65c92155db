"""The main job on a real model: convert, read sparsely, quantize, adapt by LoRA, reload cleanly, answer a question.

python scripts/demo.py
python scripts/demo.py --size smallest --output runs/quick
python scripts/demo.py --model Qwen/Qwen2.5-0.5B-Instruct --target_bits 3.5 --output runs/qwen
python scripts/demo.py --from_scratch
"""

import dataclasses
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from modeling_flashlite.cli import finish, start
from modeling_flashlite.training.pretrained import SIZES, PretrainedStages

COLUMNS = {
    "parameters": ("parameters", "{:,}"),
    "bits_per_weight": ("bits/weight", "{:.2f}"),
    "file_bytes": ("file bytes", "{:,}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "task_perplexity": ("on the task", "{:.2f}"),
    "tokens_per_second": ("tokens/s", "{:.1f}"),
    "seconds": ("seconds", "{:.0f}"),
}


@dataclass
class DemoArgs:
    model: str | None = field(
        default=None, metadata={"help": "folder, Hub id or .gguf; SmolLM2-135M-Instruct if unset"}
    )
    size: str = field(default="default", metadata={"help": "default (minutes), or smallest: a random model, seconds"})
    target_bits: float = field(default=3.0, metadata={"help": "budget of the quantized file, bits per weight"})
    question: str = field(default="What is the capital of France?", metadata={"help": "for the finished model"})
    output: str = field(default="runs/demo", metadata={"help": "a stage that is finished here is not run again"})
    seed: int = field(default=0, metadata={"help": "seed of data order and adapters"})


def main(args: DemoArgs) -> dict:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # peft asks transformers for it by the old name
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    if args.size not in SIZES:
        raise ValueError(f"size is {args.size!r}, but must be one of {', '.join(SIZES)}.")
    made_with = {key: value for key, value in dataclasses.asdict(args).items() if key not in ("output", "question")}
    size = SIZES[args.size]
    demo = PretrainedStages(Path(args.output), made_with, args.seed, size, args.target_bits, args.question)
    found = demo.random_parent if args.size == "smallest" else demo.parent
    demo.source = args.model or demo.stage(found)["model"]
    demo.stage(demo.converted)
    demo.prepare()
    demo.stage(demo.sparse)
    demo.talks = demo.stage(demo.conversations)["texts"]
    for work in (demo.quantized, demo.lora):
        demo.stage(work)
    chat = demo.stage(demo.answered)
    print(f"\n{chat['question']}\n{chat['answer']}\n\n{demo.render(COLUMNS)}\n")
    config = {**dataclasses.asdict(args), **dataclasses.asdict(size)}
    model = args.model or Path(demo.source).name
    return finish(demo.write_results(config, dataset="python", model=model, chat=chat) | {"chat": chat})


if __name__ == "__main__":
    if "--from_scratch" in sys.argv:
        script = Path(__file__).with_name("from_scratch.py")
        rest = [word for word in sys.argv[1:] if word != "--from_scratch"]
        raise SystemExit(subprocess.run([sys.executable, str(script), *rest], check=False).returncode)
    start(main, [DemoArgs], __doc__)
