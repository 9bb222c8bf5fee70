"""The part of a worker that computes: the paged model, and the engine that batches requests on it."""

import os

# In half precision on a CPU, torch compiles and keeps a kernel of 0.7 MB for every number of rows that it ever
# multiplied. Its two caches for them (ideep's and oneDNN's) hold 1024 each, which is more than a plan can spare. Both
# read their capacity at the first multiplication. The plan has room for this many (pager/engine/workspace.py).
KERNEL_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
for _cache in KERNEL_CACHES:
    os.environ.setdefault(_cache, "128")
