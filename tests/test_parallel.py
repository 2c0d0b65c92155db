"""Two gloo processes compute what one computes: DDP, FSDP2 with save and resume, tensor parallelism."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

TESTS = os.path.dirname(__file__)
COMMON = f"""
import json, os, sys
sys.path.insert(0, {TESTS!r})
import torch
from conftest import TINY
from training_runs import arguments, ragged_rows, streams
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, Seq2SeqTrainingArguments
from modeling_flashlite import FlashLiteConfig, FlashLiteForCausalLM, FlashLiteForConditionalGeneration
from modeling_flashlite.training.distillation import set_loss_function
from modeling_flashlite.training.divergence import KDLoss
from modeling_flashlite.training.lora import add_lora
from modeling_flashlite.training.trainers import CarefulTrainer, SegmentTrainer, last_checkpoint
torch.set_num_threads(1)
folder = sys.argv[1]
world = int(os.environ.get("WORLD_SIZE", 1))
rank = int(os.environ.get("RANK", 0))

def build(causal=False, **options):
    torch.manual_seed(0)
    config = FlashLiteConfig(**{{**TINY, "is_encoder_decoder": not causal, **options}})
    return (FlashLiteForCausalLM if causal else FlashLiteForConditionalGeneration)(config)

def fit(model, rows, cls=CarefulTrainer, resume=None, **options):
    batch = 4 // world
    args = Seq2SeqTrainingArguments(**arguments(folder, per_device_train_batch_size=batch, max_steps=2, **options))
    trainer = cls(model, args, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log]

def report(value):
    if rank == 0:
        print(json.dumps(value), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
"""


def launch(code, folder, world=2):
    """Run `code` in `world` processes as torchrun would; returns the JSON line of rank 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        if world > 1:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            env |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            env |= {"ACCELERATE_USE_CPU": "true", "ACCELERATE_TORCH_DEVICE": "cpu"}
        command = [sys.executable, "-c", COMMON + code, str(folder)]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    results = []
    for process in processes:
        try:
            results.append(process.communicate(timeout=400))
        except subprocess.TimeoutExpired:
            for other in processes:
                other.kill()
            raise
    for process, (_, errors) in zip(processes, results):
        assert process.returncode == 0, errors[-3000:]
    return json.loads(results[0][0].splitlines()[-1])


DDP = """
results = {"ce": fit(build(), ragged_rows(False)), "causal": fit(build(True), ragged_rows(True))}
model = add_lora(build(), r=2)
set_loss_function(model, KDLoss(temperature=1.0))
results["lora_kd"] = fit(model, ragged_rows(False, teacher=True))
results["segments"] = fit(build(True), streams(4), SegmentTrainer)
report(results)
"""


def test_ddp_on_two_ranks_equals_one(tmp_path):
    two, one = (launch(DDP, tmp_path / str(world), world) for world in (2, 1))
    for key in one:
        np.testing.assert_allclose(two[key], one[key], rtol=2e-4, err_msg=key)


FSDP = """
fsdp = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["FlashLiteEncoderLayer", "FlashLiteDecoderLayer"],
        "state_dict_type": "SHARDED_STATE_DICT"}} if world > 1 else {}
whole = fit(build(), ragged_rows(False), save_strategy="steps", save_steps=1, **fsdp)
resumed = fit(build(), ragged_rows(False), resume=folder + "/checkpoint-1", **fsdp)
model = build()
set_loss_function(model, KDLoss(temperature=1.0))
kd = fit(model, ragged_rows(False, teacher=True), **fsdp)
report({"whole": whole, "resumed": resumed, "kd": kd})
"""


def test_fsdp2_on_two_ranks_equals_one_and_resumes(tmp_path):
    two, one = (launch(FSDP, tmp_path / str(world), world) for world in (2, 1))
    np.testing.assert_allclose(two["whole"], one["whole"], rtol=2e-4)
    np.testing.assert_allclose(two["kd"], one["kd"], rtol=2e-4)
    np.testing.assert_allclose(two["resumed"][-1], two["whole"][-1], rtol=1e-5)


SHARDED_HEAD = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from modeling_flashlite.loss_flashlite import chunked_cross_entropy, is_plain_linear
torch.distributed.init_process_group("gloo")
mesh = init_device_mesh("cpu", (world,))
torch.manual_seed(0)
body, head = torch.nn.Linear(16, 16), torch.nn.Linear(16, 50, bias=False)
states, labels = torch.randn(2, 9, 16), torch.randint(0, 50, (2, 9))
labels[0, 2:] = -100  # ranks have different numbers of labels, and must gather the head equally often
expected = chunked_cross_entropy(body(states), head, labels, num_items_in_batch=11)
expected.backward()
gradient = head.weight.grad.clone() / world
head.weight.grad = None
fully_shard(head, mesh=mesh)
assert not is_plain_linear(head)
loss = chunked_cross_entropy(body(states[rank:rank + 1]), head, labels[rank:rank + 1], num_items_in_batch=11)
loss.backward()
total = loss.detach().clone()
torch.distributed.all_reduce(total)
error = (head.weight.grad.full_tensor() - gradient).abs().max().item()
report([total.item(), expected.item(), error])
"""


def test_head_sharded_by_itself_is_called_as_a_module(tmp_path):
    total, expected, error = launch(SHARDED_HEAD, tmp_path)
    assert total == pytest.approx(expected, rel=1e-5) and error < 1e-6


TP = """
options = {}
if world > 1:
    from transformers import DistributedConfig
    options = {"distributed_config": DistributedConfig(tp_size=world)}
results = {}
for kind, auto in (("causal", AutoModelForCausalLM), ("seq2seq", AutoModelForSeq2SeqLM)):
    model = auto.from_pretrained(f"{folder}/{kind}", dtype=torch.float32, **options)
    ids = torch.arange(3, 27).view(2, 12)
    outputs = model(input_ids=ids, labels=ids)
    outputs.loss.backward()
    plain = model.get_decoder().layers[0].input_layernorm.weight.grad
    plain = plain.full_tensor() if hasattr(plain, "full_tensor") else plain
    with torch.no_grad():
        tokens = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    model.train()
    model.loss_function = KDLoss(temperature=1.0)
    kd = model(input_ids=ids, labels=ids, teacher_logits=torch.ones(2, 12, 97)).loss
    logits = outputs.logits
    logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    results[kind] = [outputs.loss.item(), logits.sum().item(), kd.item(), plain.abs().sum().item(), tokens.tolist()]
report(results)
"""


def test_tensor_parallel_on_two_ranks_equals_one(tmp_path, tiny_config):
    from modeling_flashlite import FlashLiteForCausalLM, FlashLiteForConditionalGeneration

    torch.manual_seed(0)
    FlashLiteForCausalLM(tiny_config()).save_pretrained(tmp_path / "causal")
    FlashLiteForConditionalGeneration(tiny_config(is_encoder_decoder=True)).save_pretrained(tmp_path / "seq2seq")
    two, one = (launch(TP, tmp_path, world) for world in (2, 1))
    for kind in one:
        np.testing.assert_allclose(two[kind][:4], one[kind][:4], rtol=2e-4)
        assert two[kind][4] == one[kind][4]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "seq2seq"])
def test_layers_on_the_disk_compute_the_same(tmp_path, tiny_config, causal):
    """`device_map` with offloading: hooks move the weights in and out, also those of the head."""
    from modeling_flashlite import FlashLiteForCausalLM, FlashLiteForConditionalGeneration

    model_class = FlashLiteForCausalLM if causal else FlashLiteForConditionalGeneration
    model = model_class(tiny_config(is_encoder_decoder=not causal, tie_word_embeddings=False)).eval()
    model.save_pretrained(tmp_path / "model")
    ids = torch.arange(3, 27).view(2, 12)
    stacks = ["model.decoder"] if causal else ["model.encoder", "model.decoder"]
    places = (
        {"model": "cpu", "lm_head": "disk"} if causal else {stacks[0]: "disk", stacks[1]: "cpu", "lm_head": "disk"}
    )
    offloaded = model_class.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "offload")
    )
    with torch.no_grad():
        expected, found = (m(input_ids=ids, labels=ids) for m in (model, offloaded))
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss)
