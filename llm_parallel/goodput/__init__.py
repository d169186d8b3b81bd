"""What failures cost: expected goodput of a cluster, the best checkpoint interval, and spares worth having."""
