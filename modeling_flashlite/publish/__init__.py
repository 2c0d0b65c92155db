"""Hub repositories, model cards and ONNX export."""
