"""Trainers that stop on a non-finite loss, survive a full disk, and carry segment memory across steps."""

import inspect
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Seq2SeqTrainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..cache_flashlite import FlashLiteCache
from ..data.loading import require_columns

__all__ = ["CarefulTrainer", "SegmentTrainer", "last_checkpoint"]

logger = logging.get_logger(__name__)
# written last: a folder that contains it is complete
LAST_FILE = "trainer_state.json"
# the complete state of a segment memory layer; other attributes are derived
MEMORY_STATE = ("_keys", "_values", "fill", "base", "columns")


def last_checkpoint(output_dir: str | Path) -> str | None:
    """Newest complete checkpoint of a run, or `None`; incomplete folders are skipped."""
    folders = [p for p in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (p / LAST_FILE).is_file()]
    steps = {int(p.name.rpartition("-")[2]): p for p in folders if p.name.rpartition("-")[2].isdigit()}
    return str(steps[max(steps)]) if steps else None


class CarefulTrainer(Seq2SeqTrainer):
    """A `Seq2SeqTrainer` that never loses a good checkpoint.

    A non-finite loss stops the training before the optimizer step; the batch is saved for inspection. A checkpoint
    that cannot be written completely is removed, and the previous one is kept. Label smoothing is left to the model's
    loss hook, which receives `label_smoothing`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._loss_options: dict[str, float] = {}
        if self.label_smoother is not None:
            self._smooth_in_the_loss()

    def _smooth_in_the_loss(self) -> None:
        """Pass label smoothing to the model's loss hook, which the `Trainer` would otherwise bypass.

        The `Trainer` smooths by withholding the labels from the model and computing the loss from its logits. A hook
        that accepts `label_smoothing` needs neither all logits at once nor a second softmax.
        """
        factor, hook = self.args.label_smoothing_factor, getattr(self.model, "loss_function", None)
        if hook is not None and "label_smoothing" in inspect.signature(hook).parameters:
            self.label_smoother = None
            self._loss_options["label_smoothing"] = factor
        elif hook is not None and "lm_head" in inspect.signature(hook).parameters:
            raise ValueError(
                f"label_smoothing_factor is {factor}, but the Trainer smooths by keeping the labels from the model, "
                f"and {hook} would never be called; set it to 0, or let the hook take label_smoothing."
            )
        elif "labels" not in self.label_names:
            raise ValueError(
                f"label_smoothing_factor is {factor}, but {type(self.model).__name__} learns from "
                f"{', '.join(self.label_names)}, which the Trainer cannot smooth; set it to 0."
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the loss as usual and check that it is finite."""
        loss, outputs = super().compute_loss(model, {**inputs, **self._loss_options}, True, num_items_in_batch)
        if model.training and not torch.isfinite(loss).all():
            kept = Path(self.args.output_dir) / f"broken_batch_rank{self.args.process_index}.safetensors"
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_tensors({key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}, kept)
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}; its batch is kept in {kept} and the "
                f"last good checkpoint is {last_checkpoint(self.args.output_dir)}; lower learning_rate or set "
                "max_grad_norm, and continue with --resume."
            )
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **gen_kwargs):
        """As in `Seq2SeqTrainer`; a decoder-only model generates from the tokens before a row's first label."""
        unwrapped = self.accelerator.unwrap_model(model)
        if prediction_loss_only or not self.args.predict_with_generate or unwrapped.config.is_encoder_decoder:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)
        loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        ids, mask = prompts_of(inputs["input_ids"], inputs["labels"], self.processing_class.pad_token_id or 0)
        options = {"max_new_tokens": self.args.generation_max_length, "num_beams": self.args.generation_num_beams or 1}
        found = unwrapped.generate(input_ids=ids, attention_mask=mask, do_sample=False, **options)
        return loss, found[:, ids.shape[1] :], inputs["labels"]

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not (folder / LAST_FILE).is_file():
                shutil.rmtree(folder, ignore_errors=True)
            free = shutil.disk_usage(folder.parent).free / 2**20
            raise OSError(
                f"Checkpoint {folder} could not be written ({error}); {free:.0f} MiB are free, the last good one is "
                f"{last_checkpoint(folder.parent)}; free some space or lower save_total_limit, and use --resume."
            ) from error


class SegmentTrainer(CarefulTrainer):
    """Segment recurrence across steps: each row of a batch continues its stream, with its own past as memory.

    The dataset comes from [`segment_streams`] with as many streams as rows per optimizer step: processes x batch size
    x accumulation steps. Rows are read in order; `memory_reset` resets a row's memory where a new document begins.
    Checkpoints contain each process's memory, so a resumed run equals an uninterrupted one. Evaluation carries memory
    too, with processes x evaluation batch size streams.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._memories: dict[int, FlashLiteCache] = {}
        self._micro_step = 0
        self._evaluation_memory: FlashLiteCache | None = None
        for dataset in filter(None, (self.train_dataset, self.eval_dataset)):
            require_columns(dataset, ["memory_reset"], "Make it with segment_streams.")
        streams = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        if self.train_dataset is not None and len(self.train_dataset) % streams:
            raise ValueError(
                f"The dataset has {len(self.train_dataset)} segments, which {streams} streams (processes x batch size "
                f"x accumulation) do not divide; call segment_streams with batch_size={streams}."
            )

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        # `shift_labels` includes the target of a segment's last token, the first token of the next segment
        self._signature_columns += [
            name for name in ("memory_reset", "shift_labels") if name not in self._signature_columns
        ]

    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Pass the rows' memory to the model, and keep the returned memory for the next step."""
        inputs = dict(inputs)
        reset = inputs.pop("memory_reset")
        slot = self._micro_step % self.args.gradient_accumulation_steps
        memory = self._memories.get(slot) if model.training else self._evaluation_memory
        if memory is None or bool(reset.all()):
            memory = self.accelerator.unwrap_model(model).new_memory()
        else:
            memory.reset_rows(reset)
        loss, outputs = super().compute_loss(model, {**inputs, "memory": memory}, True, num_items_in_batch)
        if model.training:
            self._memories[slot] = outputs.memory
            self._micro_step += 1
        else:
            self._evaluation_memory = outputs.memory
        # the evaluation loop would gather the memory as a prediction
        return (loss, {k: v for k, v in outputs.items() if k != "memory"}) if return_outputs else loss

    def evaluate(self, *args, **kwargs):
        """Evaluate from an empty memory."""
        self._evaluation_memory = None
        return super().evaluate(*args, **kwargs)

    # memory is state of a resumable run: it is saved and loaded with the random states
    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        write_tensors(memory_tensors(self._memories), self._memory_file(output_dir))

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        path, model = self._memory_file(checkpoint), self.accelerator.unwrap_model(self.model)
        if path.is_file():
            slots = self.args.gradient_accumulation_steps
            self._memories = read_memories(path, model, slots, self.args.train_batch_size, self.args.device)
        else:
            logger.warning(f"{path} is missing: the streams of this process continue with an empty memory.")

    def _memory_file(self, folder: str | Path, name: str = "memory") -> Path:
        return Path(folder) / f"{name}_{self.args.process_index}.safetensors"


def prompts_of(input_ids: torch.Tensor, labels: torch.Tensor, pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens before the first label of each row `[B, T]`, padded on the left, and their attention mask."""
    lengths = (labels != -100).int().argmax(1)
    width = int(lengths.max())
    places = torch.arange(width, device=labels.device) + lengths[:, None] - width
    mask = places >= 0
    return input_ids.gather(1, places.clamp(min=0)).masked_fill(~mask, pad_token_id), mask.long()


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file atomically."""
    partial = path.with_name(f"{path.name}.incomplete")
    try:
        # copies: safetensors rejects tensors that share memory
        save_file({k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def memory_tensors(memories: dict[int, FlashLiteCache]) -> dict[str, torch.Tensor]:
    """Segment memories, one for each micro-batch of a step, as tensors `slot.layer.name`; integers become scalars."""
    return {
        f"{slot}.{index}.{name}": torch.as_tensor(getattr(layer, name))
        for slot, memory in memories.items()
        for index, layer in enumerate(memory.layers)
        for name in MEMORY_STATE
    }


def read_memories(path: Path, model, slots: int, rows: int, device) -> dict[int, FlashLiteCache]:
    """Read the file of an earlier run; the inverse of [`memory_tensors`].

    Args:
        path (`Path`): file written by [`SegmentTrainer`].
        model (`FlashLitePreTrainedModel`): gives the layers and their shapes.
        slots (`int`): micro-batches of a step.
        rows (`int`): rows of a micro-batch on this process.
        device (`torch.device`): device of the memories.

    Raises:
        ValueError: the file is damaged, or belongs to another model or batch size.
    """
    try:
        tensors = load_file(path, device=str(device))
        memories = {slot: model.new_memory() for slot in range(slots)}
        layers = {(slot, i): layer for slot in memories for i, layer in enumerate(memories[slot].layers)}
        if set(tensors) != {f"{slot}.{i}.{name}" for slot, i in layers for name in MEMORY_STATE}:
            raise ValueError(f"other tensors than {slots} micro-batches of {len(layers) // slots} layers have")
        for (slot, i), layer in layers.items():
            state = {name: tensors[f"{slot}.{i}.{name}"] for name in MEMORY_STATE}
            _check_memory(state, model.config.get_text_config(decoder=True), rows)
            layer.lazy_initialization(state["_keys"], state["_values"])
            for name, value in state.items():
                setattr(layer, name, value if value.dim() else value.item())
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"The segment memory {path} is damaged or of another run ({error}); resume with the settings that it was "
            "written with, or from another checkpoint."
        ) from error
    return memories


def _check_memory(state: dict[str, torch.Tensor], config, rows: int) -> None:
    keys, values, *counts = state.values()
    slots, heads = keys.shape[-2] if keys.dim() == 4 else 0, config.num_key_value_heads
    expected = (rows, heads, slots, config.key_dim), (rows, heads, slots, config.head_dim)
    if (
        (tuple(keys.shape), tuple(values.shape)) != expected
        or not keys.is_floating_point()
        or keys.dtype != values.dtype
    ):
        raise ValueError(
            f"keys {list(keys.shape)} {keys.dtype} and values {list(values.shape)} {values.dtype} for {rows} rows, "
            f"{heads} heads and sizes {config.key_dim} and {config.head_dim}"
        )
    for name, value in zip(MEMORY_STATE[2:], counts):
        most = slots if name == "fill" else torch.iinfo(torch.int64).max
        if value.dtype != torch.int64 or value.shape not in ((), (rows,)) or value.min() < 0 or value.max() > most:
            raise ValueError(f"{name} is not a count for each of {rows} rows, or beyond its {slots} slots")
