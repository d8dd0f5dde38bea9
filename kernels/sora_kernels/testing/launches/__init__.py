"""The real launchers of the Triton and Gluon kernels, up to a driver that launches nothing.

`python -m sora_kernels.testing.launches` calls ops at the sizes of published models on a card that
is not there. Triton specialises and compiles every kernel for it, encodes its TMA descriptors and
reads what the machine code takes. What a driver or a device would refuse is a `FaultError`.
`card.py` is the card and its tensors, `driver.py` Triton's driver for it, `production.py` calls.

Arithmetic is not run: Triton's interpreter does that, and `sora_kernels.testing.gluon`.
"""
