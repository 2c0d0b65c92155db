"""Data sets, tasks and tokenizers: from rows to batches."""
