"""Reading checkpoints without PyTorch: manifest, chunk table, safetensors headers, DCP files."""
