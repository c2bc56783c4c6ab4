"""What can be pruned, and every pure function over it. Knows torch, not Flower."""
