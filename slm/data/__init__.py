"""Token data: tokens.py (the shard format), packing.py, order.py, batches.py."""
