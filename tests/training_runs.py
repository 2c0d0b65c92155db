"""Arguments and data of short trainings, for the tests of trainers in one process and in several."""

import numpy as np
from datasets import Dataset

from modeling_flashlite.data.batching import segment_streams

V = 97


def arguments(path, **options):
    defaults = {
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return {"output_dir": str(path), **defaults, **options}


def ragged_rows(causal, teacher=False, count=16):
    """Rows of equal width with different numbers of labels, so that a mean of means would be wrong."""
    draw = np.random.default_rng(0)
    rows = []
    for index in range(count):
        ids, labels = draw.integers(3, V, 10), draw.integers(3, V, 10)
        labels = ids.copy() if causal else labels
        labels[: 1 + index % 9] = -100
        row = {"input_ids": ids.tolist(), "labels": labels.tolist()}
        if teacher:
            weights = draw.dirichlet(np.ones(5), 10)
            row |= {"teacher_ids": draw.permuted(np.tile(np.arange(5), (10, 1)), axis=1).tolist()}
            row |= {"teacher_weights": (0.9 * weights).astype(np.float32).tolist()}
        rows.append(row)
    return Dataset.from_list(rows)


def streams(batch, documents=4, seed=0):
    draw = np.random.default_rng(seed)
    rows = [{"input_ids": draw.integers(3, V, draw.integers(50, 90)).tolist(), "title": i} for i in range(documents)]
    return segment_streams(Dataset.from_list(rows), 20, batch, document_column="title")
