"""Every head in every form that it has, with inputs, labels and greedy tokens."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from modeling_flashlite import (
    FlashLiteForCausalLM,
    FlashLiteForConditionalGeneration,
    FlashLiteForQuestionAnswering,
    FlashLiteForSequenceClassification,
    FlashLiteForTokenClassification,
    FlashLiteModel,
)

AUTO = {
    FlashLiteModel: AutoModel,
    FlashLiteForCausalLM: AutoModelForCausalLM,
    FlashLiteForConditionalGeneration: AutoModelForSeq2SeqLM,
    FlashLiteForSequenceClassification: AutoModelForSequenceClassification,
    FlashLiteForTokenClassification: AutoModelForTokenClassification,
    FlashLiteForQuestionAnswering: AutoModelForQuestionAnswering,
}
# each class in every form it has: (class, with an encoder)
FORMS = [(cls, encoder) for cls in AUTO for encoder in (False, True)]
FORMS.remove((FlashLiteForCausalLM, True))
FORMS.remove((FlashLiteForConditionalGeneration, False))
GENERATORS = [(FlashLiteForCausalLM, False), (FlashLiteForConditionalGeneration, True)]
every_form = pytest.mark.parametrize(("model_class", "encoder"), FORMS)
both_generators = pytest.mark.parametrize(("model_class", "encoder"), GENERATORS)
BATCH, LENGTH = 3, 21


def inputs_of(model, batch=BATCH, length=LENGTH, padded=True):
    """Token ids with holes in no mask, but padding on either side of some rows."""
    ids = torch.randint(3, 97, (batch, length))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
        mask[1, -3:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs |= {"decoder_input_ids": torch.randint(3, 97, (batch, length - 2))}
        inputs["decoder_attention_mask"] = mask[:, 2:]
    return inputs


def labels_of(model, inputs):
    """Labels under the names that the head takes."""
    rows, columns = inputs.get("decoder_input_ids", inputs["input_ids"]).shape
    if isinstance(model, FlashLiteForQuestionAnswering):
        return {"start_positions": torch.zeros(rows, dtype=torch.long), "end_positions": torch.ones(rows).long()}
    if isinstance(model, FlashLiteForSequenceClassification):
        return {"labels": torch.arange(rows) % 2}
    if isinstance(model, FlashLiteForTokenClassification):
        return {"labels": torch.randint(0, 2, (rows, columns))}
    return {"labels": torch.randint(3, 97, (rows, columns))}


@torch.no_grad()
def first_output(model, inputs):
    return model(**inputs)[0]


def continued(model, encoder, inputs, **arguments):
    """Greedy tokens and, if asked for, the whole output."""
    if encoder:
        inputs = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
    # no padding among the new tokens: what is given back to the model would be masked there
    settings = {
        "do_sample": False,
        "max_new_tokens": 12,
        "eos_token_id": -1,
        "pad_token_id": 0,
        "suppress_tokens": [0],
    }
    return model.generate(**inputs, **(settings | arguments))
