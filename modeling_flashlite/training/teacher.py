"""Logits of any teacher, aligned with the student's targets, and checks that teacher and data fit.

Letters: B batch, T target, V vocabulary.
"""

from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

__all__ = ["check_separation", "check_tokens", "shift_right", "teacher_logits"]

# whether a model separates packed documents, cached
_SEPARATING: WeakKeyDictionary = WeakKeyDictionary()


def teacher_logits(
    teacher: PreTrainedModel, batch: dict[str, torch.Tensor], seq2seq: bool
) -> tuple[torch.Tensor, object]:
    """Logits `[B, T, V]` of a teacher, row t being what the student's state t must match, and the teacher's output.

    An encoder-decoder teacher reads the source and its own right-shifted targets, a decoder-only teacher on causal
    data the same tokens as the student. For a sequence-to-sequence student a decoder-only teacher reads source and
    target as one text, and its rows are those that predict the targets.

    Args:
        teacher (`PreTrainedModel`): any model with logits.
        batch (`dict`): `input_ids`, optionally `attention_mask`, `position_ids`, `labels`.
        seq2seq (`bool`): whether `labels` are the targets of a source, else of `input_ids` themselves.

    Raises:
        `ValueError`: the data hold tokens that the teacher does not know, or packed documents that it cannot keep
            apart.
    """
    check_tokens(teacher, *(batch[key] for key in ("input_ids", "labels") if batch.get(key) is not None))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask") if batch.get(key) is not None}
    if teacher.config.is_encoder_decoder:
        if not seq2seq:
            raise ValueError(
                "The teacher is an encoder-decoder, but the data are plain text without a source; use a decoder-only "
                "teacher, or data with input_ids and separate labels."
            )
        inputs["decoder_input_ids"] = shift_right(batch["labels"], teacher)
        output = teacher(**inputs, use_cache=False)
        return output.logits, output
    if not seq2seq:
        if batch.get("position_ids") is not None:
            check_separation(teacher)
            inputs["position_ids"] = batch["position_ids"]
        # with use_cache, transformers ignores the mask implied by restarting positions
        output = teacher(**inputs, use_cache=False)
        return output.logits, output
    return _continuation_logits(teacher, batch)


def check_tokens(model: PreTrainedModel, *tokens: torch.Tensor) -> None:
    """Raise a `ValueError` that names the model if `tokens` contain an id without an embedding."""
    known = getattr(model.get_input_embeddings(), "num_embeddings", None)
    largest = max((int(ids.max()) for ids in tokens if ids.numel()), default=-1)
    if known is not None and largest >= known:
        raise ValueError(
            f"The data hold the token {largest}, but {model.name_or_path or type(model).__name__} knows {known} only; "
            "encode the data with its own tokenizer, or take a model of the data's vocabulary."
        )


def check_separation(model: PreTrainedModel) -> None:
    """Raise `ValueError` if a model attends across the documents of a packed row, which `position_ids` separate.

    Once per model, two short documents are read packed, separately, and joined without a boundary. Packed and separate
    logits may differ by rounding only, relative to the joined ones.
    """
    if model not in _SEPARATING:
        _SEPARATING[model] = _separates(model)
    if not _SEPARATING[model]:
        raise ValueError(
            f"{type(model).__name__} attends across packed documents, because it ignores the boundaries in "
            f"position_ids; give it one document per row, or use a model that separates them, such as Llama."
        )


@torch.no_grad()
def _separates(model: PreTrainedModel) -> bool:
    known = getattr(model.get_input_embeddings(), "num_embeddings", 0) or model.config.get_text_config().vocab_size
    ids = (torch.arange(1, 25, device=model.device) * 7919 % known)[None]
    first, second = torch.arange(9, device=model.device)[None], torch.arange(15, device=model.device)[None]
    training = model.training
    model.eval()
    try:
        packed = (
            model(input_ids=ids, position_ids=torch.cat([first, second], 1), use_cache=False).logits[:, 9:].float()
        )
        alone = model(input_ids=ids[:, 9:], use_cache=False).logits.float()
        joined = model(input_ids=ids, use_cache=False).logits[:, 9:].float()
    except TypeError:  # no position_ids argument
        return False
    finally:
        model.train(training)
    error, across = ((read - alone).abs().max() for read in (packed, joined))
    return bool(error <= 0.25 * across)


def shift_right(labels: torch.Tensor, teacher: PreTrainedModel) -> torch.Tensor:
    """Decoder inputs of an encoder-decoder teacher: its start token, then the targets."""
    if hasattr(teacher, "prepare_decoder_input_ids_from_labels"):
        return teacher.prepare_decoder_input_ids_from_labels(labels)
    generation = teacher.generation_config
    start = generation.decoder_start_token_id
    start = generation.bos_token_id if start is None else start
    shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, generation.pad_token_id or 0)


def _continuation_logits(teacher: PreTrainedModel, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, object]:
    """Logits of a decoder-only teacher for the targets of a source: it reads both as one text."""
    labels, ids = batch["labels"], batch["input_ids"]
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    keep = torch.cat([mask.bool(), labels != -100], dim=1)
    # stable sort moves the padding behind the text of each row
    order = (~keep).long().argsort(dim=1, stable=True)
    text = torch.cat([ids, labels.clamp(min=0)], dim=1).gather(1, order)
    output = teacher(input_ids=text, attention_mask=keep.gather(1, order).long(), use_cache=False)
    place = (mask.sum(1, keepdim=True) + (labels != -100).cumsum(1) - 2).clamp(min=0)
    return output.logits.gather(1, place[..., None].expand(-1, -1, output.logits.shape[-1])), output
