"""Read and write adapters in Hugging Face PEFT's file format."""
