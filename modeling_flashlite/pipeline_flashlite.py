# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""The pipelines that transformers 5 no longer has, for encoder-decoder and extractive checkpoints.

`FlashLitePipeline` turns text into text: text2text-generation, translation, summarization and generative question
answering. `FlashLiteQuestionAnsweringPipeline` marks an answer in a context. Both return what the pipelines of
transformers 4 returned. A repository lists one of them in `config.custom_pipelines`, so that
`pipeline(model=repo, trust_remote_code=True)` needs nothing else; with the package imported the names of
`SHORT_NAMES` work as well, e.g. `pipeline("translate", model=repo)`.
"""

import re

import torch
from transformers import AutoModelForQuestionAnswering, AutoModelForSeq2SeqLM, GenerationConfig
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import ChunkPipeline

from .compat_flashlite import GenerationArguments
from .spans_flashlite import question_windows, span_scores

# task -> key of the result
RESULT_KEYS = {
    "text2text-generation": "generated_text",
    "translation": "translation_text",
    "summarization": "summary_text",
    "question-answering": "answer",
}
# names that transformers 5 accepts -> task
SHORT_NAMES = {
    "text-to-text": "text2text-generation",
    "translate": "translation",
    "summarize": "summarization",
    "answer": "question-answering",
}
TEMPLATES = {"question-answering": "question: {question} context: {text}"}
# what one entry of `config.task_specific_params` may hold besides generation arguments
TEMPLATE_FIELDS = ("template", "prefix", "src_lang", "tgt_lang", "max_input_tokens")
SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+|\n+")


def resolve_task(name: str) -> str:
    """Map a pipeline name (`"translate"`, `"translation_en_to_de"`, ...) to a key of `RESULT_KEYS`."""
    task = SHORT_NAMES.get(name, "translation" if name.startswith("translation_") else name)
    if task not in RESULT_KEYS:
        raise ValueError(f"Unknown task '{name}'; choose one of {', '.join([*RESULT_KEYS, *SHORT_NAMES])}.")
    return task


def fill_template(template: str, fields: dict[str, str]) -> str:
    """Replace each `{name}` of the template in one pass; braces inside the values are kept."""
    return re.sub(r"\{(\w+)\}", lambda match: fields.get(match[1], match[0]), template)


class FlashLitePipeline(GenerationArguments, ChunkPipeline):
    r"""Text to text with an encoder-decoder: generation, translation, summarization, question answering.

    Inputs longer than `max_input_tokens` are cut at sentence ends; the pieces are generated in batches and their
    outputs joined (for questions: the most probable answer wins). Lists are batched with `batch_size=`; generators
    and datasets are read lazily, one batch ahead.

    Args (at construction or per call):
        task (`str`, *optional*, defaults to the pipeline's own):
            One of `RESULT_KEYS` or `SHORT_NAMES`; `translation_en_to_de` also sets the two languages.
        template (`str`, *optional*):
            The model's input, with `{text}`, `{question}`, `{src_lang}`, `{tgt_lang}` filled in; defaults to
            `config.task_specific_params[task]["template"]`.
        prefix (`str`, *optional*): text before the input; short for a template.
        src_lang, tgt_lang (`str`, *optional*): languages for the template.
        max_input_tokens (`int`, *optional*): longest encoder input, in tokens; defaults to the tokenizer's limit.
        truncation (`bool`, *optional*): cut the input off at the limit instead of reading it in pieces.
        return_tensors (`bool`, *optional*): return token ids under `output_token_ids` instead of text.
        stop_sequence (`str` or `list[str]`, *optional*): end the output at this text.
        **generate_kwargs: anything `generate` takes, `streamer` included.

    Example:

    ```python
    >>> translator = pipeline(model="you/flash-lite-en-de", trust_remote_code=True)
    >>> translator(["I like cats.", "Where are you?"], batch_size=2)
    ```
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True
    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=256)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not self.model.config.is_encoder_decoder or not self.model.can_generate():
            raise ValueError(
                f"{type(self).__name__} needs an encoder-decoder with a language-model head, got "
                f"{type(self.model).__name__}; use pipeline('text-generation') for a decoder."
            )

    def _sanitize_parameters(
        self,
        task=None,
        template=None,
        prefix=None,
        src_lang=None,
        tgt_lang=None,
        max_input_tokens=None,
        truncation=None,
        return_tensors=None,
        stop_sequence=None,
        **generate_kwargs,
    ):
        if task is not None and (languages := re.fullmatch(r"translation_(\w+?)_to_(\w+)", task)):
            src_lang, tgt_lang = src_lang or languages[1], tgt_lang or languages[2]
        if max_input_tokens is not None and max_input_tokens < 1:
            raise ValueError(f"max_input_tokens is {max_input_tokens}, it must be at least 1.")
        task = {} if task is None else {"task": resolve_task(task)}
        given = {
            "template": template if prefix is None else prefix + "{text}",
            "src_lang": src_lang,
            "tgt_lang": tgt_lang,
            "max_input_tokens": max_input_tokens,
            "truncation": truncation,
        }
        preprocess_params = {**task, **{name: value for name, value in given.items() if value is not None}}
        if stop_sequence is not None:
            generate_kwargs["stop_strings"] = stop_sequence
            generate_kwargs["tokenizer"] = self.tokenizer
        postprocess_params = dict(task)
        if return_tensors is not None:
            postprocess_params["return_tensors"] = return_tensors
        return preprocess_params, {**task, **generate_kwargs}, postprocess_params

    def __call__(self, inputs=None, *, question=None, context=None, **kwargs):
        """Generate for one input or many.

        Args:
            inputs (`str`, `dict`, or a list, generator or dataset of them):
                Text, or `{"question": ..., "context": ...}` for question answering.
            question, context (`str`, *optional*): the same dict, as two arguments.

        Returns:
            `list[dict]`, one per input, with the key of `RESULT_KEYS`; a list per input when more than one sequence
            is returned for it. One question gives one `dict` with `score` and `answer`.
        """
        if question is not None or context is not None:
            inputs = {"question": question, "context": context}
        if isinstance(inputs, list) and not inputs:
            return []
        results = super().__call__(inputs, **kwargs)
        if isinstance(inputs, list) and all(isinstance(result, list) and len(result) == 1 for result in results):
            return [result[0] for result in results]
        if isinstance(inputs, dict) and len(results) == 1:
            return results[0]
        return results

    def preprocess(self, inputs, task=None, truncation=False, **given):
        task = task or self._own_task()
        fields = {**self._task_defaults(task, template=True), **given}
        limit = fields.pop("max_input_tokens", None) or self._token_limit()
        template = fields.pop("template", TEMPLATES.get(task, "{text}"))
        fields.update(self._read(inputs, task))
        text = fields.pop("text")

        def encode(piece):
            rendered = fill_template(template, {**fields, "text": piece})
            return self.tokenizer(rendered, return_tensors="pt", return_token_type_ids=False)

        pieces = self._cut(text, lambda piece: encode(piece)["input_ids"].shape[1], limit)
        # truncation drops whole pieces of text, so the final special tokens are kept
        pieces = pieces[:1] if truncation else pieces
        for index, piece in enumerate(pieces):
            yield {"is_last": index == len(pieces) - 1, **encode(piece)}

    def _forward(self, model_inputs, task=None, **generate_kwargs):
        task = task or self._own_task()
        is_last = model_inputs.pop("is_last")
        generate_kwargs = {**self._task_defaults(task), **self._generate_kwargs, **generate_kwargs}
        scored = task == "question-answering"
        outputs = self.model.generate(
            **model_inputs,
            **self._prepare_generate_kwargs(generate_kwargs, return_dict_in_generate=True, output_scores=scored),
        )
        sequences = outputs.sequences
        batch = model_inputs["input_ids"].shape[0]
        result = {"output_ids": sequences.reshape(batch, -1, sequences.shape[-1]), "is_last": is_last}
        if scored:
            result["log_prob"] = self._sequence_log_prob(outputs).reshape(batch, -1)
        return result

    def postprocess(self, model_outputs, task=None, return_tensors=False):
        task = task or self._own_task()
        key = RESULT_KEYS[task]
        if return_tensors:
            pieces = [ids for output in model_outputs for ids in output["output_ids"][0]]
            return [{"output_token_ids": ids} for ids in pieces]
        texts = [
            self.tokenizer.batch_decode(output["output_ids"][0], skip_special_tokens=True) for output in model_outputs
        ]
        if task == "question-answering":
            scores = [output["log_prob"][0].exp().tolist() for output in model_outputs]
            best = max(range(len(scores)), key=lambda index: scores[index][0])
            return [{"score": score, key: text.strip()} for score, text in zip(scores[best], texts[best])]
        return [{key: " ".join(part.strip() for part in parts)} for parts in zip(*texts)]

    def _own_task(self) -> str:
        return resolve_task(self.task or "text2text-generation")

    def _task_defaults(self, task: str, template: bool = False) -> dict:
        """What `config.task_specific_params` sets for the task: template fields, or generation arguments."""
        params = (getattr(self.model.config, "task_specific_params", None) or {}).get(task, {})
        if template and "prefix" in params and "template" not in params:
            params = {**params, "template": params["prefix"] + "{text}"}
        return {name: value for name, value in params.items() if (name in TEMPLATE_FIELDS) == template}

    def _token_limit(self) -> int | None:
        # tokenizers without a limit report a huge sentinel
        limit = self.tokenizer.model_max_length
        return limit if limit < 10**6 else None

    @staticmethod
    def _read(inputs, task: str) -> dict[str, str]:
        """Check one input and return its template fields."""
        if task == "question-answering":
            if not isinstance(inputs, dict) or not inputs.get("question") or not inputs.get("context"):
                raise ValueError(
                    "Question answering takes a non-empty question and context: "
                    "pipe(question='...', context='...') or a list of such dicts."
                )
            fields = {"question": inputs["question"], "text": inputs["context"]}
        else:
            fields = {"text": inputs}
        for name, value in fields.items():
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"The {name} must be a non-empty string, got {value!r}.")
        return fields

    @staticmethod
    def _cut(text: str, count, limit: int | None) -> list[str]:
        """Cut text at sentence ends, else at words, else at characters, into pieces of `count(piece) <= limit`."""
        if limit is None or count(text) <= limit:
            return [text]
        if (empty := count("")) >= limit:
            raise ValueError(
                f"max_input_tokens is {limit}, but the template alone takes {empty} tokens; raise the limit."
            )
        for parts, glue in ((SENTENCE_END.split(text), " "), (text.split(), " "), (list(text), "")):
            parts = [part for part in parts if part]
            if len(parts) < 2:
                continue
            pieces, current = [], parts[0]
            for part in parts[1:]:
                if count(current + glue + part) <= limit:
                    current += glue + part
                else:
                    pieces.append(current)
                    current = part
            pieces.append(current)
            return [small for piece in pieces for small in FlashLitePipeline._cut(piece, count, limit)]
        return [text]  # a single character with more tokens than the limit

    def _sequence_log_prob(self, outputs) -> torch.Tensor:
        """Log-probability of each generated sequence up to its end; shape `[batch * sequences]`."""
        steps = self.model.compute_transition_scores(
            outputs.sequences, outputs.scores, outputs.get("beam_indices"), normalize_logits=True
        )
        tokens = outputs.sequences[:, -steps.shape[1] :]
        ends = self.model.generation_config.eos_token_id
        is_end = torch.isin(tokens, torch.tensor(ends if ends is not None else [], device=tokens.device))
        after_end = is_end.cumsum(-1) - is_end.long() > 0
        return steps.masked_fill(after_end, 0.0).sum(-1)


class FlashLiteQuestionAnsweringPipeline(ChunkPipeline):
    r"""Extractive question answering: the span of the context with the highest start and end probability.

    Contexts longer than `max_seq_len` are read in windows that overlap by `doc_stride` tokens.

    Args (at construction or per call):
        top_k (`int`, *optional*, defaults to 1): how many answers to return.
        max_answer_len (`int`, *optional*, defaults to 15): longest answer, in tokens.
        max_seq_len (`int`, *optional*, defaults to 384): question and window of context together, in tokens.
        doc_stride (`int`, *optional*, defaults to 128): overlap of two windows, in tokens.
        handle_impossible_answer (`bool`, *optional*, defaults to `False`):
            Allow the empty answer; its score is that of the first token.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def _sanitize_parameters(
        self, top_k=None, max_answer_len=None, max_seq_len=None, doc_stride=None, handle_impossible_answer=None
    ):
        for name, value in (("top_k", top_k), ("max_answer_len", max_answer_len), ("max_seq_len", max_seq_len)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, it must be at least 1.")
        preprocess_params = {"max_seq_len": max_seq_len, "doc_stride": doc_stride}
        postprocess_params = {
            "top_k": top_k,
            "max_answer_len": max_answer_len,
            "handle_impossible_answer": handle_impossible_answer,
        }
        given = ({k: v for k, v in p.items() if v is not None} for p in (preprocess_params, postprocess_params))
        preprocess_params, postprocess_params = given
        return preprocess_params, {}, postprocess_params

    def __call__(self, inputs=None, *, question=None, context=None, **kwargs):
        """Answer one `{"question": ..., "context": ...}`, a list of them, or `question=` and `context=`.

        Returns:
            `dict` with `score`, `start`, `end` (character offsets in the context) and `answer`, a list of them for a
            list of inputs; a list per input when `top_k` is above 1.
        """
        if question is not None or context is not None:
            inputs = {"question": question, "context": context}
        return [] if isinstance(inputs, list) and not inputs else super().__call__(inputs, **kwargs)

    def preprocess(self, inputs, max_seq_len=384, doc_stride=128):
        fields = FlashLitePipeline._read(inputs, "question-answering")
        # question and special tokens have offsets (0, 0), so only tokens with an end are candidates
        windows = question_windows(self.tokenizer, fields["question"], fields["text"], max_seq_len, doc_stride)
        for index, (ids, offsets) in enumerate(windows):
            yield {
                "is_last": index == len(windows) - 1,
                "input_ids": torch.tensor([ids]),
                "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
                "offsets": torch.tensor([offsets]),
                "context": fields["text"],
            }

    def _forward(self, model_inputs):
        outputs = self.model(
            input_ids=model_inputs["input_ids"], attention_mask=model_inputs["attention_mask"], return_dict=True
        )
        kept = {name: model_inputs[name] for name in ("attention_mask", "offsets", "is_last", "context")}
        return {"start_logits": outputs.start_logits, "end_logits": outputs.end_logits, **kept}

    def postprocess(self, model_outputs, top_k=1, max_answer_len=15, handle_impossible_answer=False):
        answers = []
        for window in model_outputs:
            joint = self._span_probabilities(window, max_answer_len, handle_impossible_answer)
            values, places = joint.flatten().topk(min(top_k, joint.numel()))
            context = window["context"] if isinstance(window["context"], str) else window["context"][0]
            offsets = window["offsets"][0].tolist()
            for score, place in zip(values.tolist(), places.tolist()):
                if score == 0:  # no span: its last token comes before its first, or lies outside the context
                    continue
                first, last = offsets[place // len(offsets)][0], offsets[place % len(offsets)][1]
                # byte-level tokens include the space before a word
                first += len(context[first:last]) - len(context[first:last].lstrip())
                if last > first or handle_impossible_answer and last == 0:
                    answers.append({"score": score, "start": first, "end": last, "answer": context[first:last]})
        answers.sort(key=lambda answer: -answer["score"])
        unique = list({(answer["start"], answer["end"]): answer for answer in reversed(answers)}.values())[::-1]
        return unique[0] if top_k == 1 and unique else unique[:top_k]

    @staticmethod
    def _span_probabilities(window, max_answer_len, allow_empty):
        """Probability of each span, `[L, L]` by its first and last token; zero outside the context."""
        candidate = window["offsets"][0][:, 1] > 0
        first_token = int(window["attention_mask"][0].argmax())
        if allow_empty:
            candidate[first_token] = True
        start, end = (
            window[name][0].float().masked_fill(~candidate, float("-inf")).log_softmax(-1)
            for name in ("start_logits", "end_logits")
        )
        joint = span_scores(start, end, candidate, max_answer_len).exp()
        if allow_empty:  # the empty answer starts and ends at the first token
            joint[first_token, first_token + 1 :] = 0.0
        return joint


def register_pipelines() -> None:
    """Register `pipeline("translate", ...)` and the other `SHORT_NAMES` with transformers; the package calls it."""
    for name in SHORT_NAMES:
        if name not in PIPELINE_REGISTRY.get_supported_tasks():
            PIPELINE_REGISTRY.register_pipeline(name, FlashLitePipeline, pt_model=AutoModelForSeq2SeqLM, type="text")
    name = "extractive-question-answering"
    if name not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            name, FlashLiteQuestionAnsweringPipeline, pt_model=AutoModelForQuestionAnswering, type="text"
        )
    # what `pipe.save_pretrained` writes into `config.custom_pipelines`
    FlashLitePipeline._registered_impl = {
        "text2text-generation": {"impl": FlashLitePipeline, "pt": (AutoModelForSeq2SeqLM,), "type": "text"}
    }
    FlashLiteQuestionAnsweringPipeline._registered_impl = {
        "question-answering": {
            "impl": FlashLiteQuestionAnsweringPipeline,
            "pt": (AutoModelForQuestionAnswering,),
            "type": "text",
        }
    }
