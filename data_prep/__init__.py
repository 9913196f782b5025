"""Data preparation: from a corpus to a tokenizer and to token shards (the `slm-data` command)."""
