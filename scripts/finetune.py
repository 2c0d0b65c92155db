"""Fine-tune a checkpoint, full precision or quantized, with LoRA adapters (the default) or in full.

python scripts/finetune.py --config scripts/recipes/lora_tiny.yaml --model runs/train_tiny
accelerate launch scripts/finetune.py --config scripts/recipes/lora_summarization.yaml --lora_r 16
"""

from dataclasses import dataclass, field

from modeling_flashlite.checkpoint import is_adapter
from modeling_flashlite.cli import finish, start
from modeling_flashlite.training.calibration import batches_of, merge_adapters
from modeling_flashlite.training.checks import task_measures
from modeling_flashlite.training.launch import (
    ArchitectureArgs,
    DataArgs,
    ModelArgs,
    TrainArgs,
    load_model,
    load_rows,
    load_splits,
    load_task,
    load_tokenizer,
    make_trainer,
    run,
)
from modeling_flashlite.training.lora import add_lora, save_base
from modeling_flashlite.training.trainers import CarefulTrainer

# for quantizing the merged weights of a coded base
CALIBRATION_BATCHES = 16


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


def merge(trainer: CarefulTrainer, tokenizer, rows) -> str:
    """Save the model with its adapters merged, quantized again if the base is; return the folder."""
    folder = f"{trainer.args.output_dir}/merged"
    model = trainer.accelerator.unwrap_model(trainer.model)
    if getattr(model.get_base_model(), "hf_quantizer", None) is None:
        merged = model.merge_and_unload()
    else:
        batches = batches_of(rows, model, trainer.data_collator, trainer.args.train_batch_size, CALIBRATION_BATCHES)
        merged = merge_adapters(model, calibration=batches)
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main(model_args: ModelArgs, data: DataArgs, lora: LoraArgs, args: TrainArgs) -> dict:
    if model_args.model is None:
        raise SystemExit("finetune.py: no model is given; pass --model with a folder or Hub id.")
    if lora.merge and not lora.lora_r:
        raise SystemExit("finetune.py: merge is set, but without adapters (lora_r 0) there is nothing to merge.")
    splits = load_splits(data)
    task = load_task(data, model_args, splits)
    tokenizer = load_tokenizer(model_args, task, args.output_dir, splits)
    model = load_model(model_args, ArchitectureArgs(), tokenizer, task)
    measures = task_measures(task.task, args, model, tokenizer, data.max_target_length)
    rows = load_rows(task.for_model(model.config), data, args, tokenizer, splits)
    if lora.lora_r:
        # new adapters must name what they change; the first process saves them, too
        if args.process_index == 0 and is_adapter(model_args.model, **model_args.hub):
            save_base(model, tokenizer, f"{args.output_dir}/base")
        model = add_lora(
            model,
            lora.lora_r,
            lora.lora_alpha,
            lora.lora_dropout,
            target_modules=names(lora.lora_targets),
            modules_to_save=names(lora.modules_to_save),
        )
    trainer = make_trainer(CarefulTrainer, model, args, tokenizer, rows, **measures)
    metrics = run(trainer, "finetune")
    if lora.merge and trainer.is_world_process_zero():
        metrics["merged"] = merge(trainer, tokenizer, rows[0])
    return finish(metrics)


if __name__ == "__main__":
    start(main, (ModelArgs, DataArgs, LoraArgs, TrainArgs), __doc__)
