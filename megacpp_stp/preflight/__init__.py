"""What a machine must have for a run: facts of the machine, and judgements of them as findings.

`megacpp_stp.preflight.machine` looks, the other modules judge, and `megacpp_stp.training.preflight` holds the one list
of checks that ``doctor`` and ``launch`` go through.  Nothing here needs torch.
"""
