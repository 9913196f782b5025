"""The model: config.py (shape and presets), rope.py, attention.py, llama.py (SLMForCausalLM), hf.py."""
