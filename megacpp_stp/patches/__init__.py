"""Patch surfaces: the places upstream that we replace at run time, one module each.

A patch is the last resort, after an argument, a spec and a subclass.  Each one is declared as a
`megacpp_stp.patches.surface.Surface`, has an entry in the ledger ``patches/<id>.yaml`` and can be undone.
"""
