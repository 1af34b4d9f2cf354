"""DeepSeek sparse attention without tensors of all heads and all keys: in chunks of queries, for Megatron's DSA layer.

Four operations on plain tensors, and upstream's hooks for them (`megacpp_stp.dsa.backend`):

* `selection.select_keys`: the keys that the indexer chooses for each query.
* `attention.sparse_attention`: attention to these keys, computed again in the backward pass.
* `sparse_loss.sparse_indexer_loss`, `dense_loss.dense_indexer_loss`: the indexer's own loss, over the chosen keys or
  over all of them.

What lives between forward and backward is O(s k); what lives during a pass beside it is a scratch of a fixed size
(`chunks.scratch_of`).  No operation looks at a value on the host, and all shapes follow from the inputs' shapes.
"""
