"""Adapters in the files of Hugging Face PEFT."""
