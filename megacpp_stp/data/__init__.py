"""Training data: preparing it (`prepare`) and reading what was prepared (`manifest`).

Importing this package imports neither torch nor tokenizers.
"""

from __future__ import annotations

from megacpp_stp.data.manifest import DatasetManifest, load_manifest

__all__ = ["DatasetManifest", "load_manifest"]
