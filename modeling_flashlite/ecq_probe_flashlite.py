"""Column scales without data, from the layers' inputs on random tokens.

Trained models have outlier columns, with inputs many times larger than others for every text. Rounding to nearest
costs `sum_c step[c]^2 E[x_c^2]` in the outputs, so at equal rates the optimal column steps are proportional to
`E[x_c^2]^(-1/2)`, which the scales follow most of the way.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from .ecq_search_flashlite import Layer

logger = logging.getLogger(__name__)
_ROWS, _TOKENS = 2, 128
_SHARE, _MOST = 0.8, 2.0  # exponent with which scales follow the inputs, and their limit in octaves


def _probe(model) -> dict[str, torch.Tensor]:
    table = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, table.weight.shape[0], (_ROWS, _TOKENS), generator=generator).to(table.weight.device)
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids}
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}


@torch.no_grad()
def scale_columns(model, layers: list[Layer]) -> None:
    """Set the column scales of `layers` from one forward pass over random tokens, if the model takes tokens.

    For other models, and layers not reached by the pass, the scales stay 1.
    """
    if not model.can_generate() or model.main_input_name != "input_ids":
        return
    powers: dict[int, torch.Tensor] = {}
    readers: dict[int, tuple[torch.Tensor, set[int]]] = {}  # of each input, which is kept: its id stays its own

    def record(index: int, columns: int):
        def hook(module, args):
            if args and isinstance(args[0], torch.Tensor) and args[0].shape[-1] == columns:
                power = args[0].float().reshape(-1, columns).square().mean(0)
                powers[index] = powers.get(index, 0) + power
                readers.setdefault(id(args[0]), (args[0], set()))[1].add(index)

        return hook

    hooks = [
        module.register_forward_pre_hook(record(index, layer.weight.shape[1]))
        for index, layer in enumerate(layers)
        for module in layer.modules
        if not isinstance(module, nn.Embedding)
    ]
    training = model.training
    try:
        model.eval()(**_probe(model), use_cache=False)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        logger.warning("%s cannot read random tokens (%s): no column scales are set.", type(model).__name__, error)
        return
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    for index, power in powers.items():
        sisters = set().union(*(own for _, own in readers.values() if index in own))
        rows = max(len(layers[sister].weight) for sister in sisters)
        layers[index].follow_power(power, _SHARE, _MOST, rows)
