# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Tools as chat templates have them: which templates take descriptions, and calls in the `<tool_call>` JSON format."""

import json
import re
import uuid

__all__ = ["marks_calls", "split_calls", "takes_tools"]

# the format of Hermes, Qwen and SmolLM3: one JSON object with `name` and `arguments` between two marks
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


def takes_tools(template: str) -> bool:
    """Whether a chat template reads descriptions of tools."""
    return re.search(r"\btools\b", template) is not None


def marks_calls(template: str) -> bool:
    """Whether a chat template asks for calls in the format that [`split_calls`] reads."""
    return "<tool_call>" in template


def split_calls(text: str) -> tuple[str | None, list[dict]]:
    """What an answer says besides its calls (`None` for nothing), and the calls in OpenAI's shape.

    A call that is no JSON object with a `name` stays text.
    """
    calls: list[dict] = []

    def read(match: re.Match) -> str:
        try:
            call = json.loads(match[1])
            name, arguments = call["name"], call.get("arguments", {})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return match[0]
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return match[0]
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
        return ""

    said = _CALL.sub(read, text)
    return (said.strip() or None, calls) if calls else (text, [])
