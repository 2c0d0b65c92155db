"""Saving over an older model: an interruption leaves the old model intact, and the new one has no old files."""

import os
import subprocess
import sys

import pytest
import torch
from checkpoints import make_model

from modeling_flashlite import FlashLiteForCausalLM
from modeling_flashlite.ecq_config_flashlite import EcqConfig
from modeling_flashlite.training.calibration import quantize

resource = pytest.importorskip("resource", reason="no limits on this system")

# no file may grow beyond 40 kB: as an error, like that of a full disk, or as a signal that ends the process at once
SAVE = """
import resource, signal, sys
import torch
from modeling_flashlite import FlashLiteForCausalLM
folder, end, shard = sys.argv[1:]
model = FlashLiteForCausalLM.from_pretrained(folder)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(1)
if end == "kill":
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
model.save_pretrained(folder, max_shard_size=shard)
"""


def build(seed: int) -> FlashLiteForCausalLM:
    model, generator = make_model("causal"), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(input_ids=torch.arange(5, 20)[None]).logits


@pytest.mark.parametrize(("end", "shard"), [("error", "1GB"), ("kill", "1GB"), ("kill", "30KB")])
def test_an_interrupted_save_costs_no_older_model(end, shard, tmp_path):
    model = build(0)
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    done = subprocess.run([sys.executable, "-c", SAVE, str(tmp_path), end, shard], capture_output=True, text=True)
    assert done.returncode and (end == "kill") == (done.returncode < 0), done.stderr
    left = {path.name for path in tmp_path.iterdir()} - names
    assert left == ({".incomplete"} if end == "kill" else set())
    assert torch.equal(logits_of(FlashLiteForCausalLM.from_pretrained(tmp_path)), logits_of(model))
    newer = build(1)
    assert not torch.equal(logits_of(newer), logits_of(model))
    newer.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == names
    assert torch.equal(logits_of(FlashLiteForCausalLM.from_pretrained(tmp_path)), logits_of(newer))


def test_no_weights_of_an_older_model_are_left(tmp_path):
    for seed, shard in enumerate(("30KB", "1GB", "20KB", "40KB")):
        model = build(seed)
        (tmp_path / "optimizer.pt").write_bytes(b"kept")
        model.save_pretrained(tmp_path, max_shard_size=shard)
        weights = [name for name in os.listdir(tmp_path) if ".safetensors" in name]
        assert (len(weights) == 1) == (shard == "1GB")
        assert len({name.rpartition("-of-")[2] for name in weights if "-of-" in name}) <= 1
        assert torch.equal(logits_of(FlashLiteForCausalLM.from_pretrained(tmp_path)), logits_of(model))
    quantize(model, EcqConfig(target_bits=6)).save_pretrained(tmp_path)
    assert torch.equal(logits_of(FlashLiteForCausalLM.from_pretrained(tmp_path)), logits_of(model))
    assert (tmp_path / "optimizer.pt").read_bytes() == b"kept"
