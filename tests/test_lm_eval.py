"""EleutherAI's evaluation harness reads saved checkpoints by `trust_remote_code`, in a process without the package."""

import functools
import json
import subprocess
import sys

import pytest
import torch
from checkpoints import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model

from modeling_flashlite import EcqConfig, FlashLiteForCausalLM
from modeling_flashlite.measure.perplexity import text_likelihood

pytest.importorskip("lm_eval", reason="the eval extra is not installed")

TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "written": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match"}],
    },
    "likelihood": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}
QUESTIONS = [
    "Each Contributor grants You a license to reproduce the Work",
    "What may You add to the terms?",
    "Who provides the Work on an as is basis, without warranties?",
]
# the checkpoint's own code must do: the package is hidden
PROGRAM = """
import json, sys
sys.modules["modeling_flashlite"] = None
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
tasks, folder = sys.argv[1:3]
results = simple_evaluate(
    "hf",
    model_args=json.loads(sys.argv[3]),
    tasks=["choices", "written", "likelihood"],
    task_manager=TaskManager(include_path=tasks, include_defaults=False),
    batch_size=sys.argv[4],
    device="cpu",
    log_samples=True,
    bootstrap_iters=0,
)
samples = {task: [row["resps"] for row in rows] for task, rows in results["samples"].items()}
print(json.dumps({"results": results["results"], "samples": samples}))
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": text, "choices": [" the Licensor", " You"], "answer": 0} for text in QUESTIONS]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, task in TASKS.items():
        whole = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            **task,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(whole), encoding="utf-8")  # JSON is YAML
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A float model, its codes, and an adapter of it, all with the model's own code."""
    root, tokenizer = tmp_path_factory.mktemp("models"), make_tokenizer()
    model = make_model("causal", len(tokenizer))
    model.save_pretrained(root / "float")
    FlashLiteForCausalLM.from_pretrained(
        root / "float", quantization_config=EcqConfig(target_bits=5.0)
    ).save_pretrained(root / "coded")
    adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False))
    adapted.save_pretrained(root / "adapter")
    for folder in root.iterdir():
        tokenizer.save_pretrained(folder)
    return root


@functools.cache
def harness(tasks, batch_size="1", **arguments) -> dict:
    # ours begin after the end-of-text token, as texts do in training; the harness would take the beginning's
    arguments["prefix_token_id"] = make_tokenizer().eos_token_id
    given = json.dumps({"trust_remote_code": True, **arguments})
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tasks), "-", given, batch_size],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def _numbers(responses) -> list[float]:
    """The first number of each response: a likelihood, or a pair of it and whether it was greedy."""
    return [float(response[0][0] if isinstance(response[0], list) else response[0]) for response in responses]


@pytest.mark.parametrize("kind", ["float", "coded"])
def test_harness_agrees_with_our_own_likelihoods(tasks, folders, kind):
    model, tokenizer = FlashLiteForCausalLM.from_pretrained(folders / kind), make_tokenizer()
    run = harness(tasks, pretrained=str(folders / kind))
    for question, responses in zip(QUESTIONS, run["samples"]["likelihood"]):
        metrics, _ = text_likelihood(model, tokenizer, [question], end="", memory=False, resamples=0)
        tokens = len(tokenizer(question, add_special_tokens=False)["input_ids"])
        expected = -tokens * torch.log(torch.tensor(metrics["token_perplexity"], dtype=torch.float64))
        assert abs(float(responses[0][0]) - float(expected)) < 1e-4 * tokens
    assert set(run["results"]) == set(TASKS)


def test_harness_batches_pad_without_changing_a_likelihood(tasks, folders):
    alone, together = (harness(tasks, *size, pretrained=str(folders / "float")) for size in ((), ("3",)))
    for task in ("choices", "likelihood"):
        pairs = zip(alone["samples"][task], together["samples"][task])
        for one, other in pairs:
            assert _numbers(one) == pytest.approx(_numbers(other), abs=1e-4)
    assert alone["samples"]["written"] == together["samples"]["written"]


def test_harness_reads_adapters(tasks, folders):
    plain = harness(tasks, pretrained=str(folders / "float"))
    adapted = harness(tasks, pretrained=str(folders / "float"), peft=str(folders / "adapter"))
    assert plain["samples"]["likelihood"] != adapted["samples"]["likelihood"]
