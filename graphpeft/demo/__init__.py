"""`graphpeft demo`: two adapters on a real pretrained encoder and real text, from training to ONNX Runtime."""
