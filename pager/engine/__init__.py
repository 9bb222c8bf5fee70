"""The part of a worker that computes: the paged model, and the engine that batches requests on it."""

import os

# In half precision on a CPU, torch compiles a kernel for every number of rows that it multiplies and for every shape of
# a matrix: 0.4 to 0.7 MiB and up to a third of a millisecond each, where a product takes some 40 microseconds. oneDNN
# keeps this many of them unless a plan has less room (pager/engine/workspace.py), and reads the number at the first
# multiplication. ideep would keep other copies of them, which save nothing once oneDNN has a kernel.
KERNEL_CACHE, MOST_KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", 1024
os.environ.setdefault(KERNEL_CACHE, str(MOST_KERNELS))
os.environ.setdefault("LRU_CACHE_CAPACITY", "1")
