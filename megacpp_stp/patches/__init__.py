"""Patch surfaces: the places upstream that we replace at run time.

A patch is the last resort, after an argument, a spec, a subclass and an autograd function on a tensor of ours. Each one
is declared in the ledger (``patches/<id>.yaml``) and coded in a module of its own; `megacpp_stp.patches.registry` makes
it active or refuses it. docs/patches.md: how to add one, and how to judge a new megatron-core.
"""
