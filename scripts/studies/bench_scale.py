"""The scaling plan: memory and time per device of training 1 B and 7 B parameters, by formula; nothing is measured.

python scripts/studies/bench_scale.py
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from modeling_flashlite import FlashLiteConfig
from modeling_flashlite.cli import finish, start
from modeling_flashlite.measure.benchmark import format_table
from modeling_flashlite.measure.results import write_results
from modeling_flashlite.measure.scaling import Device, count_decoder_parameters, plan

# width, layers, heads, key-value heads
SCALED = {"1 B": (2048, 34, 16, 4), "7 B": (4096, 62, 32, 8)}


@dataclass
class ScaleArgs:
    output: str = field(default="model_cards/results", metadata={"help": "directory of the results file"})


def plans() -> list[dict]:
    rows = []
    for name, (width, layers, heads, kv_heads) in SCALED.items():
        config = FlashLiteConfig(
            vocab_size=32000,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            is_encoder_decoder=False,
        )
        parameters = count_decoder_parameters(config)
        for devices in (8, 64, 256, 1024):
            tokens = 16384 if devices < 1024 else 8192
            costs = plan(config, devices, tokens=tokens, length=4096)
            rows.append({"name": name, "parameters": parameters, "tokens_per_device": tokens, **costs})
    return rows


def main(args: ScaleArgs) -> dict:
    rows, path = plans(), Path(args.output) / "scaling.json"
    write_results(path, {}, task="bench scale", rows=rows, assumptions=vars(Device()))
    sys.stdout.write(format_table(rows) + "\n")
    return finish({"results": path.as_posix()})


if __name__ == "__main__":
    start(main, (ScaleArgs,), __doc__)
