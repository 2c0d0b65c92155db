"""The rules of the fifty chat questions, and the study that asks them."""

import json

import pytest
from checkpoints import save_checkpoint
from verbs import load_script

from modeling_flashlite.cli import parse_args

FACT, SUM = {"kind": "fact", "any": ["Leonardo", "da Vinci"]}, {"kind": "arithmetic", "any": ["7", "seven"]}
LIST, INVENTED = {"kind": "list", "count": 2, "of": ["autumn|fall", "spring"]}, {"kind": "invented"}


@pytest.mark.parametrize(
    ("question", "answer", "right"),
    [
        (FACT, "It was painted by da Vinci.", True),
        (FACT, "It was painted by Davinci.", False),
        (SUM, "You have 7 apples.", True),
        (SUM, "You have 17 or 70 apples.", False),
        (LIST, "Spring and fall", True),
        (LIST, "Fall and autumn", False),
        (INVENTED, "I don't have information about that.", True),
        (INVENTED, "There is no known metal of that name.", True),
        (INVENTED, "It melts at 1,200 degrees.", False),
    ],
)
def test_answers_are_judged_by_rules(question, answer, right):
    assert load_script("chat_questions").is_right(question, answer) is right


def test_models_are_asked_and_compared(tmp_path):
    script = load_script("chat_questions")
    questions = [json.loads(line) for line in script.QUESTIONS.read_text(encoding="utf-8").splitlines()]
    assert len(questions) == 50 and len({question["question"] for question in questions}) == 50
    folder = save_checkpoint("causal", tmp_path / "tiny")
    argv = ["--models", f"a={folder}", f"b={folder}", "--limit", "3", "--tokens", "4"]
    script.main(*parse_args((script.QuestionArgs,), [*argv, f"--output={tmp_path / 'out.json'}"]))
    first, second = json.loads((tmp_path / "out.json").read_text())["points"]
    assert first["answers"] == second["answers"] and len(first["answers"]) == 3
