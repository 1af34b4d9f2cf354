"""The NAM stack on Megatron's HybridStack: one spec per backend and the modules that the specs name.

Importing this package imports nothing heavy; the submodules need torch and megatron-core.
"""
