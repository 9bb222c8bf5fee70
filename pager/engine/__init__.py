"""What a worker runs: the paged model, and the engine that batches requests on it."""

import os

# In half precision on a CPU, torch compiles and keeps a kernel of 0.7 MB for every number of rows that it ever
# multiplied. It has two caches of them (ideep's and oneDNN's) of 1024 each: more than a plan can spare. Both read their
# capacity at the first multiplication. The plan has room for this many (pager/engine/workspace.py).
KERNEL_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
for _cache in KERNEL_CACHES:
    os.environ.setdefault(_cache, "128")
