# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Answers that are JSON: grammars of JSON schemas, compiled and followed by llguidance (needs the `json` extra)."""

import json

import torch

# at most one space between values: a model that is unsure would write spaces until its tokens are used up
_COMPACT = {"x-guidance": {"whitespace_pattern": "[ ]?"}}
_ANY_OBJECT = {"type": "object"}


class GrammarError(ValueError):
    """This schema cannot be followed; the message says why."""


class Grammars:
    """Compiles JSON schemas for one vocabulary.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): of the model.
        vocabulary (`int`): V, number of the model's logits.
        ends (`set[int]`): tokens that end an answer.

    Raises:
        ImportError: llguidance is not installed.
    """

    def __init__(self, tokenizer, vocabulary: int, ends: set[int]):
        try:
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise ImportError("JSON answers need llguidance; install it with pip install 'flashlite[json]'.") from None
        self._tokens = from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=sorted(ends))

    def compile(self, schema: dict | None = None) -> "Grammar":
        """The grammar of a JSON schema, of any object if there is none.

        Raises:
            GrammarError: the schema is invalid, too large, or uses what llguidance does not know.
        """
        return self._checked(f"start: %json {json.dumps({**_COMPACT, **(schema or _ANY_OBJECT)})}")

    def compile_call(self, tools: list[dict]) -> "Grammar":
        """The grammar of one call of one of the tools, between the marks that `tools.py` reads.

        Raises:
            GrammarError: as above, for the parameters of a tool.
        """
        functions = [tool["function"] for tool in tools]
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": one["name"]}, "arguments": one.get("parameters") or _ANY_OBJECT},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for one in functions
        ]
        schema = json.dumps({**_COMPACT, "anyOf": calls})
        return self._checked(f'start: "<tool_call>\\n" call "\\n</tool_call>"\ncall: %json {schema}')

    def _checked(self, lark: str) -> "Grammar":
        from llguidance import LLMatcher

        grammar = LLMatcher.grammar_from_lark(lark)
        refused, said = LLMatcher.validate_grammar_with_warnings(grammar, self._tokens)
        if refused:
            # the message ends with the grammar itself
            reason = " ".join(said[0].split()).partition(" 1 | start:")[0]
            raise GrammarError(f"The schema cannot be followed: {reason[:300]}")
        return Grammar(grammar, self._tokens)


class Grammar:
    """A compiled grammar; [`Grammar.start`] begins an answer that follows it."""

    def __init__(self, grammar: str, tokens):
        self._grammar, self._tokens = grammar, tokens

    def start(self) -> "Constraint":
        """The state of one answer."""
        from llguidance import LLMatcher

        return Constraint(LLMatcher(self._tokens, self._grammar))


class Constraint:
    """What an answer may say next: excludes tokens from its logits, and is told each chosen token."""

    def __init__(self, matcher):
        self._matcher = matcher

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits `[V]` with minus infinity at every token after which no answer could follow the grammar.

        Raises:
            GrammarError: the grammar became too complex to follow.
        """
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        if self._matcher.is_error():
            raise GrammarError(f"The grammar failed: {self._matcher.get_error()[:300]}")
        return logits.masked_fill(allowed[: len(logits)] == 0, float("-inf"))

    def take(self, token: int) -> None:
        """Go on after a chosen token."""
        self._matcher.consume_token(token)
