"""Take copyrighted text out of a language model, one takedown after another, with proof.

The library: one module per stage, in the order the data travels. Nothing here imports Prefect or
`flows`; the reading side (ledger, versions, verify, report) never imports torch.
"""

__version__ = "0.1.0"
