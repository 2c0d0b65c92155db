"""What a model writes itself to be calibrated on."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from modeling_flashlite import train_tokenizer
from modeling_flashlite.data.tokenization import turn_end
from modeling_flashlite.training import sampling
from modeling_flashlite.training.sampling import conversation_rows, with_conversations, write_texts


@pytest.fixture(scope="module")
def speaker():
    tokenizer = train_tokenizer([f"question {i} and its answer {i * i}" for i in range(200)], 400)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes)
    model = LlamaForCausalLM(config).eval()
    model.generation_config.sequence_bias = {(turn_end(tokenizer),): 4.0}  # it knows how to end a turn
    model.generation_config.min_new_tokens = 3
    return model, tokenizer


def texts(rows: int = 4) -> list[dict]:
    return [{"input_ids": torch.full((2, 256), 9)} for _ in range(rows)]


def test_half_of_the_data_are_conversations_kept_for_another_run(speaker, tmp_path, monkeypatch):
    model, tokenizer = speaker
    state = torch.get_rng_state()
    mixed = with_conversations(texts(), model, tokenizer, folder=tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    own = [batch["input_ids"] for batch in mixed if not (batch["input_ids"] == 9).all()]
    assert sum(ids.numel() for ids in own) == 4 * 256 and len(mixed) - len(own) == 2
    assert not (mixed[0]["input_ids"] != 9).all() or not (mixed[1]["input_ids"] != 9).all()  # evenly mixed
    begin = tokenizer.apply_chat_template([{"role": "user", "content": "zebra"}], tokenize=False).split("zebra")[0]
    begin = tokenizer(begin, add_special_tokens=False)["input_ids"]
    assert all(row[: len(begin)].tolist() == begin for ids in own for row in ids)
    monkeypatch.setattr(sampling, "write_conversations", None)
    again = with_conversations(texts(), model, tokenizer, folder=tmp_path)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(mixed, again, strict=True))


def test_models_without_a_template_keep_their_data(speaker):
    model, tokenizer = speaker
    data, template = texts(), tokenizer.chat_template
    assert with_conversations(data, model, tokenizer, share=0.0) == data
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    assert with_conversations(data, t5, tokenizer) == data
    with pytest.raises(ValueError, match="share of conversations is 1.0, but must be"):
        with_conversations(data, model, tokenizer, share=1.0)
    tokenizer.chat_template = None
    try:
        assert with_conversations(data, model, tokenizer) == data
        with pytest.raises(ValueError, match="cannot write conversations"):
            with_conversations(data, model, tokenizer, share=0.5)
    finally:
        tokenizer.chat_template = template


def test_a_model_that_never_learned_the_template_keeps_its_data(speaker, caplog, monkeypatch):
    model, tokenizer = speaker
    monkeypatch.setattr(model.generation_config, "sequence_bias", {(turn_end(tokenizer),): -1e9})
    data = texts()
    assert with_conversations(data, model, tokenizer) == data
    assert "does not end a turn" in caplog.text


def test_a_row_begins_where_a_conversation_does(speaker):
    _, tokenizer = speaker
    talk = [
        [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "answer"}] for i in range(9)
    ]
    rows = conversation_rows(tokenizer, talk, 40)
    starts = [tokenizer.apply_chat_template(messages)["input_ids"] for messages in talk]
    assert len(rows) >= 2 and all(any(row[: len(s)].tolist() == s[:40] for s in starts) for row in rows)
    assert conversation_rows(tokenizer, [], 40).shape == (0, 40)


def test_texts_need_a_first_token(speaker):
    model, tokenizer = speaker
    assert 1 <= len(write_texts(model, tokenizer, 3, 8, 2)) <= 3
    bare = train_tokenizer(["a b c"], 400)
    bare.bos_token = bare.eos_token = None
    model.generation_config.bos_token_id, held = None, model.generation_config.bos_token_id
    with pytest.raises(ValueError, match="no bos and no eos token"):
        write_texts(model, bare, 1, 8, 1)
    model.generation_config.bos_token_id = held
