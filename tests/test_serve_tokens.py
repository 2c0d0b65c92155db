"""Single tokens in answers: their bytes and offsets where characters take several tokens, and echoes of prompts."""

import pytest
from checkpoints import httpx, make_tokenizer, save_checkpoint
from serving import make_engine, served
from tokenizers import Tokenizer, decoders, models, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

pytest.importorskip("uvicorn", reason="the serve extra is not installed")

from modeling_flashlite.serve.jobs import TokenLogprob  # noqa: E402
from modeling_flashlite.serve.openai_schema import chat_logprobs, completion_logprobs  # noqa: E402


def make_sentencepiece() -> PreTrainedTokenizerFast:
    """Words with a space in front, and bytes for what has no piece, as Llama 2 has them."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "\u2581a", "\u00e9"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocabulary, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("make", [make_tokenizer, make_sentencepiece])
def test_bytes_of_tokens_are_those_of_the_text(make):
    tokenizer, text = make(), "a \u00e9 \U0001f600 a a\u4e2d"
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    parts = tokenizer("\U0001f600\u4e2d", add_special_tokens=False)["input_ids"][-6:]  # all are parts of characters
    entries = [TokenLogprob(token, -1.0, [(part, -2.0) for part in parts]) for token in ids]
    content = chat_logprobs(entries, tokenizer)["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content[:-1]).decode() == text
    assert content[-1]["token"] == "</s>" and content[-1]["bytes"] is None
    values = completion_logprobs(entries, tokenizer, text)
    assert all(len(best) == len(parts) for best in values["top_logprobs"])
    assert "bytes:\\xf0" in values["tokens"] and values["text_offset"][-1] == len(text)
    whole = [(token, at) for token, at in zip(values["tokens"], values["text_offset"]) if "bytes:" not in token]
    assert all(text.startswith(token, at) for token, at in whole[:-1])


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A server of a model whose tokenizer puts `<s>` before each text."""
    folder = save_checkpoint("causal", tmp_path_factory.mktemp("serve") / "tiny-lm")
    tokenizer = make_tokenizer()
    begin = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begin
    tokenizer.save_pretrained(folder)
    with served(make_engine(folder)) as address:
        yield address


def complete(address, **body):
    answer = httpx.post(f"{address}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("prompt", ["You may", "You<|user|>may", "\u00dcbung"])
def test_prompts_are_echoed_as_they_were_given(address, prompt):
    plain = complete(address, prompt=prompt, max_tokens=3, temperature=0)
    echoed = complete(address, prompt=prompt, max_tokens=3, temperature=0, echo=True, logprobs=2)
    (choice,) = echoed["choices"]
    assert choice["text"] == prompt + plain["choices"][0]["text"] and echoed["usage"] == plain["usage"]
    values = choice["logprobs"]
    assert values["tokens"][0] == "<s>" and values["text_offset"][:2] == [0, 0]
    for token, at in list(zip(values["tokens"], values["text_offset"]))[1:]:
        assert "bytes:" in token or choice["text"].startswith(token, at)


@pytest.mark.parametrize("logprobs", [None, 1])
def test_no_new_tokens_give_the_prompt_alone(address, logprobs):
    made = complete(address, prompt=["You may", "Any"], max_tokens=0, echo=True, logprobs=logprobs)
    assert [choice["text"] for choice in made["choices"]] == ["You may", "Any"]
    assert made["usage"]["completion_tokens"] == 0 and made["choices"][0]["finish_reason"] == "length"
    if logprobs:
        values = made["choices"][0]["logprobs"]
        assert "".join(values["tokens"]) == "<s>You may" and values["token_logprobs"][0] is None
        assert all(value < 0 for value in values["token_logprobs"][1:])


def test_the_smallest_top_p_is_greedy(address):
    greedy = complete(address, prompt="You may", max_tokens=9, temperature=0)
    assert complete(address, prompt="You may", max_tokens=9, top_p=0)["choices"] == greedy["choices"]
