# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Flash-Lite: small language models, distilled, quantized to a bit budget and published with the Hugging Face tools.

Importing the package registers its classes with the Auto classes of transformers.
"""

import importlib

# first, so that an old library gives one clear error instead of a failing import
from .compat_flashlite import check_version  # noqa: F401

# isort: split

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .cache_flashlite import FlashLiteCache
from .configuration_flashlite import FlashLiteConfig, FlashLiteDecoderConfig, FlashLiteEncoderConfig
from .modeling_flashlite import (
    FlashLiteForCausalLM,
    FlashLiteForConditionalGeneration,
    FlashLiteForQuestionAnswering,
    FlashLiteForSequenceClassification,
    FlashLiteForTokenClassification,
    FlashLiteModel,
    FlashLitePreTrainedModel,
)
from .pipeline_flashlite import FlashLitePipeline, FlashLiteQuestionAnsweringPipeline, register_pipelines

__version__ = "0.1.0"

# imported on first use: importing the package must not import datasets, accelerate or peft
_LAZY = {
    "CarefulTrainer": "training.trainers",
    "DistillationCallback": "training.distillation",
    "DistillationTrainer": "training.distillation",
    "EcqCallback": "training.qat",
    "EcqConfig": "quantization_flashlite",
    "KDLoss": "training.divergence",
    "PaddingCollator": "data.batching",
    "SegmentTrainer": "training.trainers",
    "TeacherCache": "training.teacher_cache",
    "add_lora": "training.lora",
    "convert": "training.conversion",
    "enable_native": "native.kernels",
    "load_data": "data.loading",
    "merge_adapters": "training.calibration",
    "pack": "data.batching",
    "prepare_qat": "training.qat",
    "quantize": "training.calibration",
    "student_from_teacher": "training.distillation",
    "tokenize_texts": "data.batching",
    "train_tokenizer": "data.tokenization",
}


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_LAZY})


for _config in (FlashLiteConfig, FlashLiteEncoderConfig, FlashLiteDecoderConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
for _auto, _model in (
    (AutoModel, FlashLiteModel),
    (AutoModelForSeq2SeqLM, FlashLiteForConditionalGeneration),
    (AutoModelForCausalLM, FlashLiteForCausalLM),
    (AutoModelForSequenceClassification, FlashLiteForSequenceClassification),
    (AutoModelForTokenClassification, FlashLiteForTokenClassification),
    (AutoModelForQuestionAnswering, FlashLiteForQuestionAnswering),
):
    _auto.register(FlashLiteConfig, _model, exist_ok=True)
    # `save_pretrained` then writes the code beside the weights, for machines without this package
    _model.register_for_auto_class(_auto.__name__)
FlashLiteConfig.register_for_auto_class()
# under label smoothing the stock Trainer shifts the labels of those causal models that this table names
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(FlashLiteConfig.model_type, FlashLiteForCausalLM.__name__)
register_pipelines()

__all__ = [
    "CarefulTrainer",
    "DistillationCallback",
    "DistillationTrainer",
    "EcqCallback",
    "EcqConfig",
    "FlashLiteCache",
    "FlashLiteConfig",
    "FlashLiteDecoderConfig",
    "FlashLiteEncoderConfig",
    "FlashLiteForCausalLM",
    "FlashLiteForConditionalGeneration",
    "FlashLiteForQuestionAnswering",
    "FlashLiteForSequenceClassification",
    "FlashLiteForTokenClassification",
    "FlashLiteModel",
    "FlashLitePipeline",
    "FlashLitePreTrainedModel",
    "FlashLiteQuestionAnsweringPipeline",
    "KDLoss",
    "PaddingCollator",
    "SegmentTrainer",
    "TeacherCache",
    "add_lora",
    "convert",
    "enable_native",
    "load_data",
    "merge_adapters",
    "pack",
    "prepare_qat",
    "quantize",
    "student_from_teacher",
    "tokenize_texts",
    "train_tokenizer",
]
