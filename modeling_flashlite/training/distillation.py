"""Distillation on the standard Trainer: cached teachers use the loss hook, live teachers `compute_loss`.

Letters: B batch, T target, V vocabulary.
"""

import copy
import math
import random
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ExportableState

from ..cache_flashlite import FlashLiteCache
from ..configuration_flashlite import FlashLiteConfig
from ..loss_flashlite import check_loss_function
from .conversion import convert
from .divergence import KDLoss, parse_divergence, shared_vocabulary
from .families import FAMILIES
from .teacher import check_tokens, shift_right, teacher_logits
from .teacher_cache import check_teacher_columns, check_vocabulary
from .trainers import CarefulTrainer, SegmentTrainer, memory_tensors, read_memories, write_tensors

__all__ = [
    "DistillationCallback",
    "DistillationTrainer",
    "SegmentDistillationTrainer",
    "set_loss_function",
    "student_from_teacher",
]

# the columns that [`TeacherCache`] adds for the loss
_CACHED = ("teacher_ids", "teacher_weights")


class DistillationCallback(TrainerCallback, ExportableState):
    """Add `ce`, `kd` and `agree` of a [`KDLoss`] to the logs, and move TAID's target from student to teacher.

    TAID's t grows with the relative decrease of its loss (momentum 0.99, step 5e-4), at least linearly over training.

    Args:
        loss (`KDLoss`): the hook of the model in training.
        smooths (`bool`, *optional*, defaults to `False`): whether the trainer passes label smoothing to the hook. The
            standard `Trainer` bypasses the hook under label smoothing, which is refused.
    """

    momentum, step_size = 0.99, 5e-4

    def __init__(self, loss: KDLoss, smooths: bool = False):
        self.loss, self.smooths = loss, smooths
        self.start = parse_divergence(loss.divergence)[1]
        self.taid = {"t": self.start, "gain": 0.0, "last": None}

    def state(self) -> dict:
        """The state saved in checkpoints."""
        return {"args": {}, "attributes": {"taid": self.taid}}

    def on_train_begin(self, args, state, control, **kwargs):
        if args.label_smoothing_factor and not self.smooths:
            raise ValueError(
                f"label_smoothing_factor is {args.label_smoothing_factor}, for which the standard Trainer withholds "
                f"the labels, so that KDLoss would never be called; set it to 0, or use DistillationTrainer."
            )
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        if isinstance(saved, dict):
            self.taid = saved["attributes"]["taid"]
            if self.loss.state["kind"] == "taid":
                self.loss.state["parameter"] = self.taid["t"]

    def on_step_end(self, args, state, control, **kwargs):
        if self.loss.state["kind"] != "taid" or "train" not in self.loss.state:
            return
        sums = self.loss.state["train"].clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        value, t = float(sums[3] / sums[4].clamp(min=1)), self.taid["t"]
        if self.taid["last"] is not None:
            gain = (self.taid["last"] - value) / (self.taid["last"] + 1e-8)
            self.taid["gain"] = self.momentum * self.taid["gain"] + (1 - self.momentum) * gain
            t += self.step_size / (1 + math.exp(-self.taid["gain"])) * (1 - t)
        linear = self.start + (1 - self.start) * state.global_step / max(state.max_steps, 1)
        self.taid |= {"t": min(1.0, max(t, linear)), "last": value}
        self.loss.state["parameter"] = self.taid["t"]

    def on_log(self, args, state, control, logs=None, **kwargs):
        split = "eval" if "eval_loss" in logs else "train"
        values = self.loss.pop_metrics(split)
        values.pop("objective", None)
        prefix = "eval_" if split == "eval" else ""
        values = {prefix + key: value for key, value in values.items()}
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)


def set_loss_function(model: torch.nn.Module, loss_function) -> None:
    """Set the loss hook of a model, inside a peft wrapper too, whose own attribute has no effect."""
    check_loss_function(loss_function)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    model.loss_function = loss_function


class DistillationTrainer(CarefulTrainer):
    r"""A `Seq2SeqTrainer` with a live teacher: only `compute_loss` differs.

    The student may also be any other causal or sequence-to-sequence language model of transformers; its loss is then
    computed from its logits, outside the model.

    Args:
        teacher (`PreTrainedModel`, *optional*): any Hugging Face language model with the student's vocabulary; without
            one the dataset's teacher columns are used.
        loss (`KDLoss`, *optional*): divergence, share of cross-entropy and temperature.
        teacher_tokenizer (`PreTrainedTokenizerBase`, *optional*): compared with `processing_class`.
        on_policy (`float`, *optional*, defaults to 0.0): share of steps on targets sampled by the student itself (GKD,
            arXiv 2306.13649), with the divergence as the only loss.
        encoder_match (`str`, *optional*): `"states"` adds the squared distance between encoder states (of equal
            width), `"relations"` the squared distance between their token-to-token cosine similarities (of any width).
        encoder_weight (`float`, *optional*, defaults to 1.0): weight of that term.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args=None,
        *,
        teacher: PreTrainedModel | None = None,
        loss: KDLoss | None = None,
        teacher_tokenizer=None,
        on_policy: float = 0.0,
        encoder_match: str | None = None,
        encoder_weight: float = 1.0,
        **kwargs,
    ):
        loss = KDLoss() if loss is None else loss
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "compute_loss_func would replace the distillation loss; pass it as loss, or leave it out."
            )
        if encoder_match not in (None, "states", "relations"):
            raise ValueError(f"encoder_match is {encoder_match!r}, but must be 'states', 'relations' or None.")
        if (on_policy or encoder_match) and (teacher is None or not model.config.is_encoder_decoder):
            raise ValueError(
                f"on_policy={on_policy} and encoder_match={encoder_match!r} need a live teacher and an "
                "encoder-decoder student; pass teacher=, or leave both out."
            )
        if teacher is not None:
            shared_vocabulary(*(m.get_output_embeddings().weight.shape[0] for m in (teacher, model)))
            teacher.eval().requires_grad_(False)
        ours = model.config.model_type == FlashLiteConfig.model_type
        if ours:
            set_loss_function(model, loss)
        super().__init__(model, args, **kwargs)
        self.loss = loss
        self._columns: dict = {}
        if not ours:
            self.compute_loss_func = self._loss_outside  # not every model passes all arguments to its hook
            # the Trainer infers it from a table of class names, and would count the first token, which is no target
            self._loss_shifts_labels = not self.model.config.is_encoder_decoder
        if teacher is not None and teacher_tokenizer is not None and self.processing_class is not None:
            check_vocabulary(teacher_tokenizer, self.processing_class)
        if teacher is None and self.processing_class is not None and self.train_dataset is not None:
            check_teacher_columns(self.train_dataset, self.processing_class, loss)
        # ahead of the progress bar and TensorBoard, which print the logs as they are at that point
        self.callback_handler.callbacks.insert(0, DistillationCallback(loss, smooths=True))
        self.teacher = None if teacher is None else teacher.to(self.args.device)
        self.on_policy, self.encoder_match, self.encoder_weight = on_policy, encoder_match, encoder_weight

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Add the teacher's logits to the inputs, and the encoder term to the loss."""
        seq2seq = bool(model_config(model).is_encoder_decoder)
        extra = {key: inputs[key] for key in _CACHED if key in inputs}
        if self.teacher is None:
            return self._loss(model, inputs, extra, return_outputs, num_items_in_batch)
        if model.training and self._student_writes():
            labels = self._sample_targets(inputs)
            if num_items_in_batch is not None:  # share of this batch in the accumulated batch
                share = (labels != -100).sum() / (inputs["labels"] != -100).sum().clamp(min=1)
                num_items_in_batch = num_items_in_batch * share
            inputs, extra["kd_only"] = {**inputs, "labels": labels}, True
            inputs.pop("decoder_input_ids", None)  # derived by the collator from the targets that are replaced here
        with torch.no_grad():
            extra["teacher_logits"], answer = self._ask(model, inputs, seq2seq)
        loss, outputs = self._loss(model, inputs, extra, True, num_items_in_batch)
        if self.encoder_match and model.training:
            items = (inputs["labels"] != -100).sum() if num_items_in_batch is None else num_items_in_batch
            scale = self.accelerator.num_processes if num_items_in_batch is not None else 1
            loss = loss + scale * self.encoder_weight * self._encoder_distance(outputs, answer, inputs) / items
        return (loss, outputs) if return_outputs else loss

    def _ask(self, model, inputs: dict, seq2seq: bool) -> tuple[torch.Tensor, object]:
        """The teacher's logits and output."""
        return teacher_logits(self.teacher, inputs, seq2seq)

    def _loss(self, model, inputs: dict, extra: dict, return_outputs: bool, num_items_in_batch):
        """The trainer's own loss, with `extra` passed to the hook beside the labels."""
        if self.compute_loss_func is None:
            return super().compute_loss(model, {**inputs, **extra}, return_outputs, num_items_in_batch)
        self._columns = extra
        inputs = {key: value for key, value in inputs.items() if key not in _CACHED}
        if model_config(model).is_encoder_decoder and "decoder_input_ids" not in inputs:
            student = self.accelerator.unwrap_model(model)
            inputs["decoder_input_ids"] = shift_right(inputs["labels"], student)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _loss_outside(self, outputs, labels, num_items_in_batch=None):
        """Call the hook with the logits of any model."""
        seq2seq = model_config(self.model).is_encoder_decoder
        shifted = {"shift_labels": labels} if seq2seq else {"labels": labels}
        columns, self._columns = self._columns, {}
        smoothing = self.args.label_smoothing_factor
        return self.loss(
            logits=outputs["logits"],
            num_items_in_batch=num_items_in_batch,
            label_smoothing=smoothing,
            **shifted,
            **columns,
        )

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += [column for column in _CACHED if column not in self._signature_columns]

    def _student_writes(self) -> bool:
        """Whether this step is on-policy; the same on every process and after resuming."""
        return random.Random(f"{self.args.seed} {self.state.global_step}").random() < self.on_policy

    @torch.no_grad()
    def _sample_targets(self, inputs: dict) -> torch.Tensor:
        """Sample `labels` `[B, T]` from the student, with -100 after the end of each text."""
        student = self.accelerator.unwrap_model(self.model)
        student.eval()
        ids = student.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs.get("attention_mask"),
            do_sample=True,
            top_k=0,
            max_new_tokens=inputs["labels"].shape[1],
            use_cache=True,
            synced_gpus=self.is_fsdp_enabled or self.is_deepspeed_enabled,
        )[:, 1:]
        student.train()
        end = student.generation_config.eos_token_id
        ended = torch.isin(ids, torch.as_tensor([] if end is None else end, device=ids.device)).cumsum(1)
        after = torch.cat([torch.zeros_like(ended[:, :1]), ended[:, :-1]], dim=1) > 0
        return ids.masked_fill(after, -100)

    def _encoder_distance(self, outputs, answer, inputs: dict) -> torch.Tensor:
        """Sum over rows of (labelled tokens) x (mean distance per source token), whatever the batch split."""
        mine, its = outputs.encoder_last_hidden_state, answer.encoder_last_hidden_state
        mask = inputs.get("attention_mask")
        mask = (torch.ones_like(inputs["input_ids"]) if mask is None else mask).to(mine.dtype)
        if self.encoder_match == "states" and mine.shape != its.shape:
            raise ValueError(
                f"Encoder states are {mine.shape[-1]} wide in the student and {its.shape[-1]} in the teacher; use "
                "encoder_match='relations', which compares similarities between tokens."
            )
        if self.encoder_match == "states":
            distance, pairs = (mine - its).square().mean(-1), mask
        else:
            mine, its = F.normalize(mine, dim=-1), F.normalize(its, dim=-1)
            distance = (mine @ mine.mT - its @ its.mT).square().flatten(1)
            pairs = (mask[:, :, None] * mask[:, None, :]).flatten(1)
        per_row = (distance * pairs).sum(1) / pairs.sum(1).clamp(min=1)
        return (per_row * (inputs["labels"] != -100).sum(1)).sum()


class SegmentDistillationTrainer(SegmentTrainer, DistillationTrainer):
    """Distillation with segment recurrence: student and teacher read every stream through memories of their own.

    The dataset is that of [`SegmentTrainer`], the arguments are those of [`DistillationTrainer`]. Checkpoints hold the
    teacher's memories too.

    Raises:
        ValueError: there is no live teacher with a segment memory. Cached columns hold what a teacher says that reads
            each row by itself.
    """

    def __init__(self, *args, teacher: PreTrainedModel | None = None, **kwargs):
        if not hasattr(teacher, "new_memory"):
            raise ValueError(
                f"The teacher is {type(teacher).__name__}, but over segments it must be a live Flash-Lite model, for "
                "its memory; pass teacher=, or train on packed rows."
            )
        super().__init__(*args, teacher=teacher, **kwargs)
        self._teacher_memories: dict[int, FlashLiteCache] = {}
        self._reset = torch.ones(1, dtype=torch.bool)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As in both trainers."""
        self._reset = inputs["memory_reset"]
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _ask(self, model, inputs: dict, seq2seq: bool) -> tuple[torch.Tensor, object]:
        teacher: Any = self.teacher
        slot = self._micro_step % self.args.gradient_accumulation_steps if model.training else -1
        memory = self._teacher_memories.get(slot)
        if memory is None or bool(self._reset.all()):
            memory = teacher.new_memory()
        else:
            memory.reset_rows(self._reset)
        check_tokens(teacher, inputs["input_ids"])
        given = {key: inputs[key] for key in ("input_ids", "attention_mask") if key in inputs}
        answer = teacher(**given, memory=memory, use_cache=False)
        self._teacher_memories[slot] = answer.memory
        return answer.logits, answer

    def evaluate(self, *args, **kwargs):
        """Evaluate from empty memories."""
        self._teacher_memories.pop(-1, None)
        return super().evaluate(*args, **kwargs)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self._teacher_memories.pop(-1, None)
        write_tensors(memory_tensors(self._teacher_memories), self._memory_file(output_dir, "teacher_memory"))

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        path, args = self._memory_file(checkpoint, "teacher_memory"), self.args
        slots, rows = args.gradient_accumulation_steps, args.train_batch_size
        self._teacher_memories = read_memories(path, self.teacher, slots, rows, args.device)


def model_config(model: torch.nn.Module):
    """Configuration of a model, unwrapped from DDP or a compiler."""
    return (model.module if hasattr(model, "module") else model).config


def student_from_teacher(
    teacher: PreTrainedModel,
    encoder_layers: int | None = None,
    decoder_layers: int | None = None,
    changes: Mapping[str, object] | None = None,
) -> PreTrainedModel:
    """Copy a teacher with fewer layers, evenly spaced, first and last included (DistilBART, Distil-Whisper).

    Args:
        teacher (`PreTrainedModel`): a model with layers named `...layers.N...`.
        encoder_layers, decoder_layers (`int`, *optional*): layers to keep; all if unset. The layers of a decoder-only
            model are decoder layers.
        changes (`dict`, *optional*): changes to config fields on which no weight depends, such as dropout.

    Returns:
        `PreTrainedModel`: a new model with copied weights: a Flash-Lite model if the teacher belongs to a family that
        can be converted (see `families.py`), else a model of the teacher's class.
    """
    if teacher.config.model_type in FAMILIES:
        teacher = convert(teacher)
    config = copy.deepcopy(teacher.config)
    config.update(dict(changes or {}))
    if encoder_layers is not None and not config.is_encoder_decoder:
        raise ValueError(f"encoder_layers is {encoder_layers}, but the teacher has no encoder; leave it out.")
    keep = {}
    for stack, wanted in (("encoder", encoder_layers), ("decoder", decoder_layers)):
        part = getattr(config, stack, None) if config.is_encoder_decoder else config
        part = config if part is None else part
        if wanted is None:
            continue
        have = part.num_hidden_layers
        if not 1 <= wanted <= have:
            raise ValueError(f"{stack}_layers is {wanted}, but the teacher has {have}; choose 1 to {have}.")
        keep[stack] = [round(x) for x in torch.linspace(0, have - 1, wanted).tolist()] if wanted > 1 else [have - 1]
        part = getattr(part, "decoder", part)  # a decoder-only config forwards the fields of its decoder
        for name in ("layer_types", "no_rope_layers", "local_rope_layers"):
            if getattr(part, name, None):
                setattr(part, name, [getattr(part, name)[layer] for layer in keep[stack]])
        part.num_hidden_layers = wanted
    student = type(teacher)(config).to(teacher.dtype)
    # not from the config, where training has set use_cache to False
    student.generation_config = copy.deepcopy(teacher.generation_config)
    source = teacher.state_dict()

    def origin(name: str) -> str:
        match = re.fullmatch(r"(.*\blayers\.)(\d+)(\..*)", name)
        layers = keep.get("encoder" if "encoder." in name else "decoder")
        return f"{match[1]}{layers[int(match[2])]}{match[3]}" if match and layers else name

    student.load_state_dict({name: source[origin(name)] for name in student.state_dict()})
    return student
