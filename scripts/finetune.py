"""Fine-tune a checkpoint, full precision or quantized, with LoRA adapters (the default) or in full.

python scripts/finetune.py --config scripts/recipes/lora_tiny.yaml --model runs/train_tiny
accelerate launch scripts/finetune.py --config scripts/recipes/lora_summarization.yaml --lora_r 16
"""

from dataclasses import dataclass, field

from modeling_flashlite.cli import finish, start
from modeling_flashlite.training.launch import (
    ArchitectureArgs,
    DataArgs,
    ModelArgs,
    TrainArgs,
    load_model,
    load_rows,
    load_splits,
    load_tokenizer,
    make_trainer,
    run,
)
from modeling_flashlite.training.lora import add_lora
from modeling_flashlite.training.trainers import CarefulTrainer


@dataclass
class LoraArgs:
    lora_r: int = field(default=8, metadata={"help": "rank of the adapters; 0 trains all weights"})
    lora_alpha: int | None = field(default=None, metadata={"help": "scale times rank; twice the rank if unset"})
    lora_dropout: float = field(default=0.0, metadata={"help": "on the adapters' inputs"})
    lora_targets: str | None = field(
        default=None, metadata={"help": "all-linear, or names with commas; every projection of a layer if unset"}
    )
    modules_to_save: str | None = field(default=None, metadata={"help": "modules trained in full, with commas"})
    merge: bool = field(default=False, metadata={"help": "also save the model with the adapters merged into it"})


def names(text: str | None) -> list[str] | str | None:
    return text if text in (None, "all-linear") else [name.strip() for name in text.split(",")]


def main(model_args: ModelArgs, data: DataArgs, lora: LoraArgs, args: TrainArgs) -> dict:
    if model_args.model is None:
        raise SystemExit("finetune.py: no model is given; pass --model with a folder or Hub id.")
    splits = load_splits(data)
    tokenizer = load_tokenizer(model_args, data, args.output_dir, splits)
    model = load_model(model_args, ArchitectureArgs(), tokenizer, data, splits)
    rows = load_rows(data, args, tokenizer, splits, model.config.is_encoder_decoder, model.config)
    if lora.lora_r:
        model = add_lora(
            model,
            lora.lora_r,
            lora.lora_alpha,
            lora.lora_dropout,
            target_modules=names(lora.lora_targets),
            modules_to_save=names(lora.modules_to_save),
        )
    trainer = make_trainer(CarefulTrainer, model, args, tokenizer, rows)
    metrics = run(trainer, "finetune")
    if lora.merge and lora.lora_r and trainer.is_world_process_zero():
        merged = f"{args.output_dir}/merged"
        trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().save_pretrained(merged)
        tokenizer.save_pretrained(merged)
        metrics["merged"] = merged
    return finish(metrics)


if __name__ == "__main__":
    start(main, (ModelArgs, DataArgs, LoraArgs, TrainArgs), __doc__)
