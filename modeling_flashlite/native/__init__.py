"""Decoding of coded models by compiled code, for whoever asks for it: see `kernels`."""
