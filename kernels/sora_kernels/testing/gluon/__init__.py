"""An emulator of what Gluon gives a Hopper kernel, which has no interpreter.

`python -m sora_kernels.testing.gluon` runs packed attention for Hopper, its source unchanged, on
packed batches, and holds each against fp64. `machine.py` is the schedule, `memory.py` shared memory
with its barriers, copies and products, `language.py` the stand-ins for Triton's language.

It works at the granularity of partitions. Barriers among a partition's threads, layouts, registers
and what ptxas makes of it are the compiler's: `sora_kernels.aot` reads those.
"""
