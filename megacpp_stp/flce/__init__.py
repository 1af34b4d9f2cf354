"""Fused linear cross entropy: the loss of an output layer without its logits.

`megacpp_stp.flce.reference` is the plain truth, `megacpp_stp.flce.chunked` the operation, `megacpp_stp.flce.backends`
what else can compute it, `megacpp_stp.flce.megatron` the way into Megatron's models.
"""
