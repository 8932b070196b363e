"""What was learned, as files for other programs: timm, ONNX, PyTorch's exported programs, PEFT. One module a format."""
