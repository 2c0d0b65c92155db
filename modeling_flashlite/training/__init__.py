"""Trainers, distillation, quantization-aware training, calibration and LoRA."""
