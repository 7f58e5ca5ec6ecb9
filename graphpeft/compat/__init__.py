"""Private or unstable parts of torch, transformers, accelerate and quantizers: one file each, pinned by a test."""
