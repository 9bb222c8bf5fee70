"""What a worker runs: the paged model, and the engine that batches sequences on it."""

import os

# In half precision on a CPU, torch compiles and keeps a kernel of 0.7 MB for every number of rows that it ever
# multiplied. It has two caches of them (ideep's and oneDNN's) of 1024 each: memory in nobody's plan. Both read their
# capacity at the first multiplication.
for _cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "128")
