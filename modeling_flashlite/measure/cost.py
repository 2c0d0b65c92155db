"""Cost of a model: time to the first token, time per token, peak memory, parameters, bytes on disk."""

import copy
import functools
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint import base_of

# weight files as the library names them; a run's folder holds other tensors too
WEIGHT_FILES = re.compile(r"(model|pytorch_model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)|.*\.gguf")


@torch.inference_mode()
def measure_generation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    new_tokens: int = 32,
    repeats: int = 5,
    special_tokens: bool = True,
) -> list[dict]:
    """Time greedy generation of exactly `new_tokens` tokens, for the first prompt alone and for all as one batch.

    Args:
        model (`PreTrainedModel`): on its device, in its dtype.
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        prompts (`Sequence[str]`): real inputs; their number is the batch size.
        new_tokens (`int`, *optional*, defaults to 32): tokens to generate, at least 2.
        repeats (`int`, *optional*, defaults to 5): timed runs after one that warms up; the median counts.
        special_tokens (`bool`, *optional*, defaults to `True`): whether the tokenizer adds its own.

    Returns:
        `list[dict]`: rows of `name`, `value`, `unit` and `spread`, the range of the runs.
    """
    if new_tokens < 2 or repeats < 1 or not len(prompts):
        raise ValueError(
            f"new_tokens is {new_tokens}, repeats {repeats} and there are {len(prompts)} prompts, but at least 2, 1 "
            "and 1 are needed; 32, 5 and 16 are usual."
        )
    model.eval()
    rows = []
    for size in sorted({1, len(prompts)}):
        encoded = tokenizer(
            list(prompts[:size]),
            return_tensors="pt",
            padding=True,
            padding_side="right" if model.config.is_encoder_decoder else "left",
            add_special_tokens=special_tokens,
        )
        inputs = {name: encoded[name].to(model.device) for name in ("input_ids", "attention_mask")}
        with tqdm(total=2 * (repeats + 1), desc=f"time generation, batch {size}", unit="run") as bar:
            first = _timed(functools.partial(_generate, model, inputs, 1), repeats, model.device, bar)
            whole = _timed(functools.partial(_generate, model, inputs, new_tokens), repeats, model.device, bar)
        later = [(b - a) / (new_tokens - 1) for a, b in zip(sorted(first), sorted(whole))]
        batch = f"greedy, batch {size}"
        rows += [
            _row(f"first token, {batch}", [1e3 * t for t in first], "ms"),
            _row(f"later tokens, {batch}", [1e3 * t for t in later], "ms/token"),
            _row(batch, [size * new_tokens / t for t in whole], "tokens/s"),
            _row(f"{new_tokens} tokens each, {batch}", [size / t for t in whole], "sentences/s"),
        ]
    return rows


def peak_memory_bytes(device: torch.device | str = "cpu") -> int | None:
    """Peak memory in bytes: of PyTorch's allocator on an accelerator, else of this process; `None` if unknown."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # Linux; there, `getrusage` of a new process begins with its parent's peak
    peak = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.is_file() else None
    if peak:
        return int(peak[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux kibibytes
    return held if _is_macos() else held * 1024


def model_size(model: PreTrainedModel, path: str | Path | None = None) -> dict[str, float]:
    """Parameters of the unquantized model and, given the directory it was loaded from, bytes that a user downloads.

    Those of an adapter include its base's, if that is a directory, too; else they are left out.

    Returns:
        `dict` with `parameters` and, with `path`, `file_bytes` (all files), `weight_bytes` (weight files) and
        `bits_per_weight` (of the weight files, everything in them included).
    """
    sizes: dict[str, float] = {"parameters": count_parameters(model)}
    folders = {Path(path), Path(base_of(str(path))[0])} if path is not None and Path(path).is_dir() else set()
    if folders and all(folder.is_dir() for folder in folders):
        files = [file for folder in folders for file in folder.iterdir() if file.is_file()]
        files = [file for file in files if not file.name.startswith(".")]
        weights = sum(file.stat().st_size for file in files if WEIGHT_FILES.fullmatch(file.name))
        sizes["file_bytes"] = sum(file.stat().st_size for file in files)
        sizes["weight_bytes"] = weights
        sizes["bits_per_weight"] = 8 * weights / sizes["parameters"]
    return sizes


def count_parameters(model: PreTrainedModel) -> int:
    """Parameters of the model that the config describes, without quantization or adapters, tied ones once."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = copy.deepcopy(base.config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in type(base)(config).parameters())


def _generate(model: PreTrainedModel, inputs: dict, tokens: int) -> torch.Tensor:
    return model.generate(**inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, num_beams=1)


def _timed(run: Callable[[], object], repeats: int, device: torch.device, bar: tqdm) -> list[float]:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
        bar.update()
    return times[1:]


def _row(name: str, values: list[float], unit: str) -> dict:
    spread = [round(min(values), 3), round(max(values), 3)]
    return {"name": name, "value": round(statistics.median(values), 3), "unit": unit, "spread": spread}


def _is_macos() -> bool:
    import sys

    return sys.platform == "darwin"
