"""Train a byte-level BPE tokenizer that `AutoTokenizer` loads anywhere, and find the tokens that end an answer."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
CHAT_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_FIXED_TOKENS = len(SPECIAL_TOKENS) + len(CHAT_TOKENS) + 256

# {% generation %} marks the assistant's turns, so that `return_assistant_tokens_mask` can restrict the loss to them
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('role ' + message['role'] + ' is not one of system, user, assistant; rename or drop it.') -}}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{% generation %}{{- message['content'] + '<|end|>' -}}{% endgeneration %}"
    "{%- else -%}{{- message['content'] + '<|end|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 8192,
    *,
    add_eos_token: bool = False,
    model_max_length: int = 1024,
    min_frequency: int = 2,
    split_digits: bool = True,
    total: int | None = None,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on a stream of texts.

    All 256 bytes are in the vocabulary and nothing is normalized, so `decode(encode(text)) == text` for every valid
    UTF-8 string, and `<unk>` never appears. Ids: `<pad>` 0, `<s>` 1 (bos), `</s>` 2 (eos), `<unk>` 3, `<|system|>` 4,
    `<|user|>` 5, `<|assistant|>` 6, `<|end|>` 7, then bytes, then merges. Training is deterministic.

    Args:
        texts (iterable of `str`): consumed once; a generator over a streamed data set is fine.
        vocab_size (`int`, *optional*, defaults to 8192): at least 264; the result is smaller if the text yields too
            few merges.
        add_eos_token (`bool`, *optional*, defaults to `False`): append `</s>` to encoded text, as encoder inputs
            expect. Leave it off for decoder-only models, whose prompts are continued. Labels and packed documents get
            their `</s>` from `data/` in either case. `tokenizer.add_eos_token = True` enables it later.
        model_max_length (`int`, *optional*, defaults to 1024): tokens kept by `truncation=True`.
        min_frequency (`int`, *optional*, defaults to 2): rarer pairs are not merged.
        split_digits (`bool`, *optional*, defaults to `True`): every digit is a token of its own.
        total (`int`, *optional*): number of texts, for the progress bar only.

    Returns:
        `transformers.PreTrainedTokenizerFast` (`TokenizersBackend`) with a chat template.

    Raises:
        `ValueError`: the vocabulary is too small, or there is no text.
        `TypeError`: a text is not a string.
    """
    if vocab_size < _FIXED_TOKENS:
        raise ValueError(
            f"vocab_size is {vocab_size}, but bytes and special tokens need {_FIXED_TOKENS}; choose 1024 or more."
        )
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS + CHAT_TOKENS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_checked(texts, total), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=list(CHAT_TOKENS),
        add_eos_token=add_eos_token,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
        padding_side="right",
        truncation_side="right",
        chat_template=CHAT_TEMPLATE,
    )


def run_tokenizer(
    folder: Path, texts: Callable[[], Iterable[str]], *, keep: bool = False, **options
) -> PreTrainedTokenizerBase:
    """The tokenizer in a run's folder; trained there first unless it was made of the same texts and options.

    Args:
        folder (`Path`): of the tokenizer.
        texts (`Callable`): gives the texts from their beginning, of which the first thousand are compared.
        keep (`bool`, *optional*, defaults to `False`): take the tokenizer that is there, as a model was trained on it.
        **options: of [`train_tokenizer`].
    """
    first = hashlib.sha256("\0".join(islice(texts(), 1000)).encode("utf-8", "replace")).hexdigest()[:16]
    made_of, record = {"first_texts": first, **options}, folder / "made_of.json"
    known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
    if not (folder / "tokenizer.json").is_file() or (known != made_of and not keep):
        train_tokenizer(texts(), **options).save_pretrained(folder)
        record.write_text(json.dumps(made_of), encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that closes an assistant turn in the chat template; `None` if there is none."""
    if tokenizer.chat_template is None:
        return None
    said = "zebra"  # a word that no template contains
    messages = [{"role": "user", "content": "animal?"}, {"role": "assistant", "content": said}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError:  # the template requires more than one question and one answer
        return None
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    after = tokenizer(text.rpartition(said)[2], add_special_tokens=False)["input_ids"] if said in text else []
    return next((token for token in after if token in special), None)


def row_end_tokens(tokenizer: PreTrainedTokenizerBase, end: str | None = None) -> list[int]:
    """Ids that close a row of text: those of `end`, or the end of sequence if unset.

    Raises:
        `ValueError`: the tokenizer has no end of sequence.
    """
    if end is not None:
        return tokenizer(end, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no end-of-sequence token to close documents with; set one, or pass end.")
    return [tokenizer.eos_token_id]


def end_tokens(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None = None) -> list[int]:
    """Ids that end an answer: those of the generation settings, the end of sequence, and the chat template's own."""
    given = None if generation is None else generation.eos_token_id
    ends = [*(given if isinstance(given, list) else [given]), tokenizer.eos_token_id, turn_end(tokenizer)]
    return list(dict.fromkeys(token for token in ends if token is not None))


def _checked(texts: Iterable[str], total: int | None) -> Iterator[str]:
    count = 0
    for text in tqdm(texts, desc="tokenizer", unit="text", total=total):
        if not isinstance(text, str):
            raise TypeError(f"text {count} is a {type(text).__name__}, but must be a string; name the text column.")
        count += bool(text)
        yield text
    if not count:
        raise ValueError(
            "The texts are empty, but a tokenizer needs characters to train on; check the files and the column."
        )
