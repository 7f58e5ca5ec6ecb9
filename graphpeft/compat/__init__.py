"""Private or moving parts of torch, transformers, accelerate and quantizing libraries: one file each, pinned by a test."""
