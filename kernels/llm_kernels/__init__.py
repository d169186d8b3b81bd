"""Operators of a Llama-style transformer. Stands alone: needs torch, and triton only on a GPU."""
