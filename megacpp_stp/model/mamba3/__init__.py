"""The Mamba-3 mixer (single input, single output) for the torch backend: no mamba-ssm, CPU or GPU."""
