"""The disk tier: safetensors as downloaded, or packed into one checksummed extent an expert. Never memory-mapped."""
