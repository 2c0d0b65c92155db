"""The server with the real `openai` client: answers, streams, tools, limits, errors, and a fuzz of its API."""

import json
import re
import signal
import threading

import pytest
from checkpoints import httpx, save_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import make_engine, start

openai = pytest.importorskip("openai", reason="the openai client is not installed")
pytest.importorskip("fastapi", reason="the serve extra is not installed")

import torch  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
)

from modeling_flashlite.checkpoint import add_adapter  # noqa: E402
from modeling_flashlite.training.lora import add_lora  # noqa: E402

LIMITS = ("--max-new-tokens=64", "--max-prompt-tokens=200", "--max-body=20000", "--max-waiting=30", "--timeout=60")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint("causal", tmp_path_factory.mktemp("serve") / "tiny-lm")


# what the templates of Hermes and Qwen do, in short
TOOL_TEMPLATE = (
    "{% for tool in tools or [] %}<tool_call> may name {{ tool.function.name }}{% endfor %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.arguments.day }}</tool_call>{% endfor %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """An adapter far from zero, with a tokenizer whose chat template has tools."""
    place = tmp_path_factory.mktemp("adapter")
    model = add_lora(AutoModelForCausalLM.from_pretrained(folder), 2)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(place)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TOOL_TEMPLATE
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def server(folder, adapter):
    process, address = start(folder, *LIMITS, f"--adapters=caller={adapter}")
    yield address
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors, errors


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def engine(folder):
    engine = make_engine(folder)
    yield engine
    engine.close()


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny-lm", "caller"]
    assert client.models.retrieve("tiny-lm").owned_by == "flashlite"
    with pytest.raises(openai.NotFoundError, match="does not exist") as caught:
        client.completions.create(model="gpt-4", prompt="x")
    assert caught.value.code == "model_not_found"


def test_completion_is_what_generate_gives(client, engine):
    prompt = "You may obtain a copy"
    answer = client.completions.create(model="tiny-lm", prompt=prompt, max_tokens=20, temperature=0)
    inputs = engine.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = engine.model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer.choices[0].text == engine.tokenizer.decode(ids, skip_special_tokens=True)
    assert answer.usage.prompt_tokens == inputs["input_ids"].shape[1]
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    by_ids = client.completions.create(
        model="tiny-lm", prompt=inputs["input_ids"][0].tolist(), max_tokens=20, temperature=0
    )
    assert by_ids.choices[0].text == answer.choices[0].text


def test_stream_gives_the_same_text_and_usage(client):
    request = {"model": "tiny-lm", "prompt": "Licensed under", "max_tokens": 24, "seed": 3, "temperature": 1.2}
    whole = client.completions.create(**request)
    chunks = list(client.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason


def test_a_stream_of_several_choices_counts_the_prompt_once(client):
    request = {"model": "tiny-lm", "prompt": ["Licensed under", "You may"], "max_tokens": 6, "seed": 3, "n": 3}
    whole = client.completions.create(**request)
    chunks = list(client.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage


def test_sampling_fields_of_other_servers_are_honoured(client):
    request = {"model": "tiny-lm", "prompt": "Licensed under", "max_tokens": 12, "seed": 3, "temperature": 2.0}
    greedy = client.completions.create(**{**request, "temperature": 0}).choices[0].text
    for field, value in (("top_k", 1), ("min_p", 1.0)):
        assert client.completions.create(**request, extra_body={field: value}).choices[0].text == greedy
    free = client.completions.create(**request).choices[0].text
    assert client.completions.create(**request, extra_body={"top_k": -1, "store": False}).choices[0].text == free
    once = client.completions.create(**{**request, "temperature": 0}, extra_body={"repetition_penalty": 10.0})
    assert once.choices[0].text != greedy


def test_chat_and_its_stream(client):
    request = {
        "model": "tiny-lm",
        "messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Who grants?"}],
        "max_completion_tokens": 16,
        "seed": 1,
    }
    answer = client.chat.completions.create(**request)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length")
    chunks = list(client.chat.completions.create(**request, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content
    parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "grants?"}]
    request["messages"][1]["content"] = parts
    assert client.chat.completions.create(**request).choices[0].message.content == answer.choices[0].message.content


def test_an_adapter_is_chosen_by_its_name(client, folder, adapter):
    request = {"prompt": "You may obtain a copy", "max_tokens": 12, "temperature": 0}
    plain = client.completions.create(model="tiny-lm", **request)
    adapted = client.completions.create(model="caller", **request)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(adapter)
    inputs = tokenizer(request["prompt"], return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert adapted.model == "caller" and adapted.choices[0].text == tokenizer.decode(ids, skip_special_tokens=True)
    assert adapted.choices[0].text != plain.choices[0].text
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert add_adapter(base, str(adapter)).lm_head.weight is base.lm_head.weight  # not a second copy
    assert client.completions.create(model="tiny-lm", **request).choices[0].text == plain.choices[0].text


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"day": {"enum": [1, 2]}}, "required": ["day"]},
    },
}
WEATHER["function"]["parameters"]["additionalProperties"] = False
ASKED = [{"role": "user", "content": "Will it rain?"}]


def test_tools_are_called_in_the_format_of_the_template(client):
    request = {"model": "caller", "messages": ASKED, "tools": [WEATHER], "max_tokens": 64, "seed": 1}
    free = client.chat.completions.create(**request)
    assert free.choices[0].message.tool_calls is None  # noise
    assert free.usage.prompt_tokens > client.chat.completions.create(**request, tool_choice="none").usage.prompt_tokens
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"day": 1}'}}
    request["messages"] = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        answer = client.chat.completions.create(**request, tool_choice=choice).choices[0]
        (called,) = answer.message.tool_calls
        assert answer.finish_reason == "tool_calls" and answer.message.content is None
        assert called.function.name == "weather" and json.loads(called.function.arguments)["day"] in (1, 2)
    chunks = list(client.chat.completions.create(**request, tool_choice="required", stream=True))
    (streamed,) = [chunk.choices[0].delta.tool_calls for chunk in chunks if chunk.choices[0].delta.tool_calls]
    assert streamed[0].function.arguments and chunks[-1].choices[0].finish_reason == "tool_calls"


def test_json_answers_follow_their_schema(client):
    request = {"model": "tiny-lm", "messages": ASKED, "max_tokens": 64}
    schema = {"type": "object", "properties": {"a": {"enum": [10, 20]}, "b": {"type": "boolean"}}}
    schema |= {"required": ["a", "b"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for seed in range(3):
        answer = client.chat.completions.create(**request, seed=seed, response_format=form).choices[0]
        found = json.loads(answer.message.content)
        assert answer.finish_reason == "stop" and found["a"] in (10, 20) and isinstance(found["b"], bool)
    any_object = client.chat.completions.create(**request, seed=1, response_format={"type": "json_object"}).choices[0]
    assert any_object.message.content.startswith("{")
    if any_object.finish_reason == "stop":
        assert isinstance(json.loads(any_object.message.content), dict)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tools": [WEATHER]}, "The chat template of tiny-lm has no tools"),
        ({"tools": [{"type": "function"}], "model": "caller"}, "function"),
        ({"tool_choice": "required", "model": "caller"}, "demands a tool"),
        ({"response_format": {"type": "json_schema"}}, "json_schema is missing"),
        ({"response_format": {"type": "xml"}}, "json_object"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objekt"}}}},
            "The schema cannot be followed",
        ),
        ({"messages": [{"role": "assistant", "content": None}]}, "content is missing"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}]}, "arguments"),
    ],
)
def test_tools_and_schemas_that_cannot_be_honoured_are_refused(server, changes, words):
    body = {"messages": ASKED, "max_tokens": 4, **changes}
    answer = httpx.post(f"{server}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 400 and words in answer.text


def test_log_probabilities_and_echo(client, engine):
    request = {"model": "tiny-lm", "prompt": "Licensed under", "max_tokens": 3, "temperature": 0}
    plain = client.completions.create(**request).choices[0]
    choice = client.completions.create(**request, logprobs=2, echo=True).choices[0]
    assert plain.logprobs is None and choice.text == "Licensed under" + plain.text
    values = choice.logprobs
    assert "".join(values.tokens) == choice.text and values.token_logprobs[0] is None
    assert [
        choice.text[start:][: len(token)] for start, token in zip(values.text_offset, values.tokens)
    ] == values.tokens
    # greedy: every new token is the likeliest of its place
    for token, value, best in list(zip(values.tokens, values.token_logprobs, values.top_logprobs))[-3:]:
        assert max(best, key=best.get) == token and best[token] == value
    messages = [{"role": "user", "content": "Who grants?"}]
    chat = {"model": "tiny-lm", "messages": messages, "max_tokens": 2, "temperature": 0}
    content = client.chat.completions.create(**chat, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(content) == 2 and all(entry.top_logprobs[0].logprob == entry.logprob for entry in content)


def test_a_seed_gives_the_same_answer_beside_other_requests(client):
    request = {"model": "tiny-lm", "prompt": "Licensed under", "max_tokens": 12, "seed": 7}
    alone = client.completions.create(**request).choices[0].text
    texts: list[str] = []

    def ask(**changes):
        text = client.completions.create(**{**request, **changes}).choices[0].text
        if not changes:
            texts.append(text)

    changes = [{}, {"seed": 8, "prompt": "Any"}, {}, {"temperature": 0, "max_tokens": 3}, {}]
    threads = [threading.Thread(target=ask, kwargs=change) for change in changes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [alone] * 3
    several = client.completions.create(**request, n=3)
    assert several.choices[0].text == alone and len({choice.text for choice in several.choices}) == 3
    assert several.choices[1].text == client.completions.create(**{**request, "seed": 8}).choices[0].text


def test_stop_texts_end_the_answer_and_are_left_out(client):
    request = {"model": "tiny-lm", "prompt": "Licensed under", "max_tokens": 40, "seed": 5}
    text = client.completions.create(**request).choices[0].text
    stop = text[8:11]
    for stream in (False, True):
        answer = client.completions.create(**request, stop=[stop, "never there"], stream=stream)
        pieces = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
        assert "".join(piece.text for piece in pieces) == text[: text.index(stop)]
        assert pieces[-1].finish_reason == "stop"


def test_several_prompts_in_one_request(client):
    prompts = ["Licensed under", "The Licensor", "a"]
    answer = client.completions.create(model="tiny-lm", prompt=prompts, max_tokens=8, temperature=0)
    alone = [client.completions.create(model="tiny-lm", prompt=p, max_tokens=8, temperature=0) for p in prompts]
    assert [choice.text for choice in answer.choices] == [single.choices[0].text for single in alone]
    assert answer.usage.prompt_tokens == sum(single.usage.prompt_tokens for single in alone)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"prompt": "x", "max_tokens": 65}, 400, "the limit is 64"),
        ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
        ({"prompt": "word " * 400}, 400, "the limit is 200"),
        ({"prompt": ""}, 400, "empty"),
        ({"prompt": []}, 400, "empty"),
        ({"prompt": [10**9]}, 400, "token outside"),
        ({"prompt": "x", "n": 9}, 400, "limit of 8"),
        ({"prompt": "x", "temperature": 3}, 400, "temperature"),
        ({"prompt": "x", "stop": ["a"] * 5}, 400, "at most 4"),
        ({"prompt": "x", "logprobs": 3, "stream": True}, 400, "logprobs is not supported in streams"),
        ({"prompt": "x", "logprobs": 21}, 400, "logprobs"),
        ({"prompt": "x", "typical_p": 0.3}, 400, "typical_p is not supported"),
        ({"prompt": "x", "top_k": -2}, 400, "top_k"),
        ({"prompt": "x" * 30000}, 413, "larger than 20000 bytes"),
        ({}, 400, "prompt"),
    ],
)
def test_limits_are_4xx_in_the_shape_of_openai(server, body, status, words):
    answer = httpx.post(f"{server}/v1/completions", json=body, timeout=60)
    error = answer.json()["error"]
    assert answer.status_code == status and words in error["message"] and "\n" not in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'"a"', b"\xff", b'{"prompt": "\\ud800"}', b'{"temperature": NaN}']
)
def test_bodies_that_are_not_requests_are_400(server, content):
    for path in ("completions", "chat/completions"):
        answer = httpx.post(f"{server}/v1/{path}", content=content, timeout=60)
        assert answer.status_code == 400 and "error" in answer.json()


def test_body_without_a_length_is_limited_too(server):
    def chunks():
        for _ in range(100):
            yield b" " * 1000

    assert httpx.post(f"{server}/v1/completions", content=chunks(), timeout=60).status_code == 413


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = {
    "prompt": st.text(max_size=30) | st.lists(st.integers(-5, 500), max_size=5),
    "messages": st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": st.text()}
        ),
        max_size=3,
    ),
    "max_tokens": st.integers(-1, 6),
    "temperature": st.floats(-1, 3),
    "top_p": st.floats(-0.5, 1.5),
    "frequency_penalty": st.floats(-3, 3),
    "n": st.integers(-1, 3),
    "seed": st.integers(),
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=2), max_size=5),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "model": st.just("tiny-lm") | st.text(max_size=5),
    "logit_bias": JSON,
    "response_format": JSON | st.fixed_dictionaries({"type": st.just("json_schema"), "json_schema": JSON}),
    "tools": JSON,
}
BODIES = st.fixed_dictionaries({}, optional={name: good | JSON for name, good in FIELDS.items()})
LIKELY = st.fixed_dictionaries(
    {"prompt": FIELDS["prompt"], "messages": FIELDS["messages"], "max_tokens": st.integers(1, 4)},
    optional={
        name: FIELDS[name] for name in ("temperature", "top_p", "n", "seed", "stop", "stream", "frequency_penalty")
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.sampled_from(["completions", "chat/completions"]), BODIES | LIKELY | JSON)
def test_fuzz_finds_no_server_error(server, path, body):
    content = json.dumps(body).encode()
    answer = httpx.post(f"{server}/v1/{path}", content=content, timeout=60)
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    st.sampled_from(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "POST"]),
    st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="?#"), max_size=20),
)
def test_fuzz_of_paths_finds_no_server_error(server, method, path):
    answer = httpx.request(method, f"{server}/{path}", timeout=60)
    assert answer.status_code < 500
    if answer.status_code >= 400:
        assert "error" in answer.json()


def test_health_and_metrics(server, client):
    client.completions.create(model="tiny-lm", prompt="x", max_tokens=2)
    assert httpx.get(f"{server}/health").json()["status"] == "ok"
    text = httpx.get(f"{server}/metrics").text
    assert re.search(r'flashlite_responses_total\{status="200"\} \d', text)
    assert re.search(r"flashlite_generated_tokens_total [1-9]", text)
