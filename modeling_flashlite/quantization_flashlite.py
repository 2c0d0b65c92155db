"""Entropy-constrained quantization (ECQ): a bit budget for the file, 4-bit codes in memory, plain `from_pretrained`.

    AutoModelForCausalLM.from_pretrained("any/llama", quantization_config=EcqConfig(target_bits=3.0))

quantizes without data while loading. `calibration.quantize` uses data, `qat.prepare_qat` trains. The saved model
contains, under the name of each quantized weight, its entropy-coded bytes as a one-dimensional uint8 tensor (see
`ecq_stream_flashlite`), and everything else in bfloat16. Loading requires this module to be imported first, or
`trust_remote_code=True`, which imports the copy saved with the model (see `coded_flashlite`). Otherwise transformers
finds tensors of the wrong shape and raises, unless `ignore_mismatched_sizes=True` suppresses that.
"""

from __future__ import annotations

import itertools
import json
import re
import struct
import types

import torch
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from .coded_flashlite import auto_map, coded_class, with_code, without_code
from .ecq_config_flashlite import METHOD, EcqConfig
from .ecq_layers_flashlite import (
    coded_places,
    collect_layers,
    enter_codes,
    groups_of,
    ids_of,
    install,
    is_quantizable,
    overhead_bytes,
    quantizable_layers,
    weight_of,
)
from .ecq_modules_flashlite import EcqModule, to_float, to_quantized
from .ecq_probe_flashlite import scale_columns
from .ecq_reader_flashlite import decode_weights
from .ecq_search_flashlite import GRID, search
from .ecq_stream_flashlite import encode_weight
from .ecq_twins_flashlite import FakeQuantModule, to_twin
from .ecq_weight_flashlite import QuantizedWeight

_SMALL = 1 << 20  # tensors up to this many bytes are copied out of the loader's memory map


def attach(model, config: EcqConfig) -> None:
    """Mark a model that was quantized in memory as `from_pretrained` would."""
    model.hf_quantizer = EcqQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    model.is_quantized, model.quantization_method = True, METHOD
    model.config._is_quantized = True
    _keep_names(model)


def _keep_names(model) -> None:
    """Save under the model's own names: streams cannot be split, joined or transposed for other formats.

    The vocabulary cannot be resized either: transformers would resize the placeholders of coded tables.
    """
    model._weight_conversions = []
    with_code(model, __name__)
    model.resize_token_embeddings = types.MethodType(_resize_token_embeddings, model)


def _resize_token_embeddings(model, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
    """Replaces [`PreTrainedModel.resize_token_embeddings`] in a quantized model.

    Raises:
        ValueError: for another size, where a table is quantized.
    """
    tables = model.get_input_embeddings(), model.get_output_embeddings()
    if not any(isinstance(table, (EcqModule, FakeQuantModule)) for table in tables):
        return type(model).resize_token_embeddings(model, new_num_tokens, pad_to_multiple_of, mean_resizing)
    rows, multiple = tables[0].num_embeddings, pad_to_multiple_of or 1
    size = -(-(new_num_tokens or rows) // multiple) * multiple
    if size != rows:
        raise ValueError(
            f"The vocabulary of {rows} cannot be resized to {size} while its table is quantized; call dequantize() "
            "(or, in quantization-aware training, resize before prepare_qat), resize, and quantize again."
        )
    return tables[0]


def quantize_data_free(model, config: EcqConfig) -> None:
    """Quantize a float model in place to the budget of `config`, without data."""
    if config.max_loss_increase is not None:
        raise ValueError("max_loss_increase needs calibration data: call calibration.quantize(model, config, data).")
    fresh = _not_loaded(model)
    layers = [layer for layer in collect_layers(model, config) if fresh.isdisjoint(layer.names)]
    budget = config.budget(sum(p.numel() for p in model.parameters()))
    scale_columns(model, layers)
    install(model, layers, search(layers, budget, overhead_bytes(model, ids_of(layers))))


def _not_loaded(model) -> set[str]:
    """Names of layers missing from the checkpoint, such as a new head, which stay float to be trained.

    The loader marks every parameter that it has filled.
    """
    filled = {
        name: any(getattr(value, "_is_hf_initialized", False) for value in module._parameters.values())
        for name, module in model.named_modules()
        if is_quantizable(module)
    }
    return {name for name, is_filled in filled.items() if not is_filled} if any(filled.values()) else set()


class EcqQuantizer(HfQuantizer):
    """Behind [`EcqConfig`]: loads coded checkpoints, quantizes float ones after loading, saves coded ones."""

    # newer versions' `serialized_names` and `get_load_operations` keep their defaults: a stream has the name of its
    # weight, and streams are decoded together after loading, since several weights may share one
    requires_calibration = False

    def validate_environment(self, *args, device_map=None, **kwargs):
        devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if "disk" in devices:
            raise ValueError("Quantized modules cannot be offloaded to disk; leave 'disk' out of device_map.")
        # "auto" comes again, as the map that it means on this machine
        if not self.pre_quantized and len(devices) > 1:
            raise ValueError(
                f"Quantizing while loading needs the model on one device, got device_map={device_map!r}; quantize on"
                " one device, save, and load the saved model with this device_map."
            )

    def update_parallel_plan(self, model, plan):
        self.update_tp_plan(model.config)

    def update_tp_plan(self, config):  # transformers 5.16 calls this instead
        if getattr(config, "distributed_config", None) is not None:
            raise ValueError(
                "Entropy-coded weights cannot be split over processes; load without distributed_config and tp_plan, or"
                " load on one process, call dequantize(), save, and load that folder."
            )
        return config

    def param_needs_quantization(self, model, param_name, **kwargs) -> bool:
        """Whether a checkpoint tensor may have another shape than the parameter: the stream of a coded weight has."""
        module = model.get_submodule(param_name.rpartition(".")[0]) if "." in param_name else model
        return self.pre_quantized and isinstance(module, EcqModule) and param_name.endswith("weight")

    def _process_model_before_weight_loading(self, model, dtype=None, checkpoint_files=None, **kwargs):
        if not self.pre_quantized:
            return
        if self.quantization_config.stage == "qat":
            for name, module in quantizable_layers(model, self.quantization_config).items():
                rows, columns = weight_of(module).shape
                steps = torch.zeros(rows, dtype=torch.int8)
                empty = QuantizedWeight(steps[:, None], 1.0, steps, GRID)
                new = to_twin(module, empty, weight_of(module))
                if new is not module:
                    model.set_submodule(name, new)
            model.register_buffer("ecq_rate", torch.zeros(3, device="meta"))
            return
        coded = _coded_names(checkpoint_files)
        prefix = model.base_model_prefix + "."
        tied = model.all_tied_weights_keys
        for name, module in quantizable_layers(model, self.quantization_config).items():
            key = name + ".weight"
            names = {key, tied.get(key)} | {other for other, source in tied.items() if source in (key, tied.get(key))}
            names |= {prefix + n for n in names if n} | {n.removeprefix(prefix) for n in names if n}
            if coded is None or coded & {key, *names}:
                plan = model._get_dtype_plan(module.weight.dtype)
                new = to_quantized(module, size_only=True)
                new.proxy_dtype = _kept_dtype(key, plan, new.proxy_dtype)
                if new is not module:
                    model.set_submodule(name, new)

    def _process_model_after_weight_loading(self, model, **kwargs):
        if not self.pre_quantized:
            quantize_data_free(model, self.quantization_config)
            self.pre_quantized = True
        elif self.quantization_config.stage == "coded":
            _decode_model(model)
        else:
            for _, twins in groups_of(model, FakeQuantModule):
                for twin in twins[1:]:
                    twin.share_twin(twins[0])
        _keep_names(model)
        return model

    def _dequantize(self, model, dtype=None):
        model.__dict__.pop("resize_token_embeddings", None)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
        for names, modules in groups_of(model):
            weight = None
            for name, module in zip(names, modules):
                plain = to_float(module, dtype)
                if plain is not module:
                    model.set_submodule(name, plain)
                if weight is not None:
                    plain.weight = weight
                weight = plain.weight
        without_code(model)
        return model

    def get_state_dict_and_metadata(self, model):
        """The tensors of the file: streams for coded weights, bfloat16 for other floats."""
        if self.quantization_config.stage == "qat":
            state, seen = {}, set()
            for key, value in model.state_dict(keep_vars=True).items():
                if id(value) not in seen:
                    seen.add(id(value))
                    state[key] = value.detach()
            return state, {}
        if type(model).__module__ == __name__:
            model.config.auto_map = auto_map(model.config, __name__)
        streams = {id(modules[0].weight): encode_weight(modules[0].quantized()) for _, modules in groups_of(model)}
        places = coded_places(model)
        state = {}
        memo = {}
        for key, value in model.state_dict().items():
            parent, _, leaf = key.rpartition(".")
            if parent in places and leaf != "bias":
                continue
            if value.is_floating_point():
                value = memo.setdefault((value.data_ptr(), value.shape), value.to(torch.bfloat16))
            state[key] = value
        return state | {f"{name}.weight": streams[id(module.weight)] for name, module in places.items()}, {}

    def is_serializable(self):
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return self.quantization_config.stage == "qat"

    @property
    def is_compileable(self) -> bool:
        return True


def _kept_dtype(name: str, plan: dict[str, torch.dtype], dtype: torch.dtype) -> torch.dtype:
    """The dtype of a weight by the `dtype_plan` of the loader, which keeps T5's `wo` in float32 in a float16 model."""
    return next((kept for glob, kept in plan.items() if re.search(glob.replace("*", ".*"), name)), dtype)


def _coded_names(checkpoint_files) -> set[str] | None:
    """Names of the one-dimensional uint8 tensors in safetensors files, from their headers; `None` without files."""
    if not checkpoint_files:
        return None
    names = set()
    for path in checkpoint_files:
        if not str(path).endswith(".safetensors"):
            raise ValueError(f"Coded checkpoints are safetensors files only, got {path}.")
        entries, _ = safetensors_header(path)
        names |= {name for name, entry in entries.items() if entry["dtype"] == "U8" and len(entry["shape"]) == 1}
    return names


def safetensors_header(path) -> tuple[dict[str, dict], int]:
    """Dtype, shape and data offsets of every tensor in a safetensors file, and the byte where the data begin.

    Raises:
        ValueError: the header is damaged.
    """
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > 100_000_000:
                raise ValueError(f"it claims {length} bytes")
            entries = dict(json.loads(file.read(length)))
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            if not {"dtype", "shape", "data_offsets"} <= set(entry):
                raise ValueError(f"{name} has no dtype, shape or data_offsets")
    except (struct.error, ValueError, TypeError) as error:
        raise ValueError(f"The header of {path} is damaged ({error}); fetch the file again.") from error
    return entries, 8 + length


def _decode_model(model) -> None:
    """Decode the loaded streams to codes, a few at a time, freeing each one afterwards."""
    for value in itertools.chain(model.parameters(), model.buffers()):
        if value.device.type == "cpu" and value.nbytes <= _SMALL:
            value.data = value.data.clone()  # release the loader's mmap: touched pages stay resident
    jobs = []
    for names, modules in groups_of(model):
        owner = next((module for module in modules if module.stream is not None), None)
        if owner is None:
            raise ValueError(f"The checkpoint has no coded weight for {names[0]}; it does not fit this architecture.")
        jobs.append((names[0], modules, owner))
    families = [list(members) for _, members in itertools.groupby(jobs, lambda job: _family(model, *job))]
    streams = ([(name, owner.take_stream(), owner.weight_shape) for name, _, owner in family] for family in families)
    for family, weights in zip(families, decode_weights(streams)):
        for (_, modules, owner), weight in zip(family, weights):
            enter_codes(owner, modules, weight)


def _family(model, name: str, modules: list[EcqModule], owner: EcqModule) -> str:
    """The parent's name for layers that it computes together (`SISTERS` in `layers_flashlite`), else the layer's."""
    parent, _, leaf = name.rpartition(".")
    together = len(modules) == 1 and leaf in getattr(model.get_submodule(parent), "SISTERS", ()) and owner.bias is None
    return parent if together else name


def use_this_quantizer() -> None:
    """Register the classes of this file with transformers for the method `ecq`.

    The package and copies of this file from the Hub may live in one process. A model, its quantizer and the layers
    of codes must be of one copy, so a Flash-Lite model calls this before it loads.
    """
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = EcqConfig
    AUTO_QUANTIZER_MAPPING[METHOD] = EcqQuantizer


# models of other families have no copy of their own and use the first one
if METHOD not in AUTO_QUANTIZER_MAPPING:
    use_this_quantizer()


def __getattr__(name: str) -> type:
    """Model classes of transformers by name, as the `auto_map` of coded checkpoints refers to them."""
    return coded_class(name, __name__)
