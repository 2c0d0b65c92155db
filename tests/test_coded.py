"""Coded models of other families where the package is not installed, and copies of the quantizer in one process."""

import json
import os
import subprocess
import sys

import pytest
import torch
from coded import MODELS, build, inputs_of, logits_of

from modeling_flashlite import ecq_weight_flashlite
from modeling_flashlite.ecq_config_flashlite import EcqConfig
from modeling_flashlite.training.calibration import quantize

FOREIGN = """
import sys

HIDDEN = {"modeling_flashlite", "datasets", "peft", "accelerate", "evaluate", "sacrebleu"}

class Finder:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)

    def find_distributions(self, context):
        return self.finder.find_distributions(context) if hasattr(self.finder, "find_distributions") else ()

sys.meta_path[:] = map(Finder, sys.meta_path)
import torch, transformers
folder, auto, again = sys.argv[1:]
model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
assert not HIDDEN & set(sys.modules) and type(model).__name__ == model.config.architectures[0]
inputs = torch.load(folder + "/inputs.pt")
with torch.no_grad():
    torch.save(model(**inputs).logits, folder + "/logits.pt")
model.generate(inputs["input_ids"], max_new_tokens=2)
model.save_pretrained(again)
"""


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bart"])
def test_coded_models_of_other_families_load_elsewhere(kind, tmp_path, monkeypatch):
    """Where only transformers, PyTorch and NumPy are, by the code that travels with them, and save that code again."""
    monkeypatch.setattr(ecq_weight_flashlite, "_LEAST_SAVED", 1 << 19)  # as there
    model = quantize(build(kind), EcqConfig(target_bits=4))
    assert isinstance(model, MODELS[kind][0]._model_mapping[type(model.config)])
    model.save_pretrained(tmp_path / "a")
    torch.save(inputs_of(model), tmp_path / "a" / "inputs.pt")
    command = [sys.executable, "-c", FOREIGN, *map(str, (tmp_path / "a", MODELS[kind][0].__name__, tmp_path / "b"))]
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "a" / "logits.pt"), logits_of(model))
    assert {path.name for path in (tmp_path / "a").glob("*.py")} == {
        path.name for path in (tmp_path / "b").glob("*.py")
    }
    for name in ("model.safetensors", "quantization_flashlite.py"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_dequantized_model_is_saved_without_code(tmp_path):
    """Neither does a float model of the same family in the same process."""
    model = quantize(build("llama"), EcqConfig(target_bits=4))
    model.save_pretrained(tmp_path / "coded")
    assert "AutoModelForCausalLM" in json.loads((tmp_path / "coded" / "config.json").read_text())["auto_map"]
    model.dequantize()
    for name, floating in (("same", model), ("other", build("llama"))):
        floating.save_pretrained(tmp_path / name)
        assert not list((tmp_path / name).glob("*.py"))
        assert "auto_map" not in json.loads((tmp_path / name / "config.json").read_text())


def test_two_copies_of_the_quantizer_live_together():
    import importlib.util

    import modeling_flashlite.quantization_flashlite as package

    spec = importlib.util.spec_from_file_location("modeling_flashlite.copy_flashlite", package.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
