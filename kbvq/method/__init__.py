"""The method on tensors: shared basis, error feedback, codes, corrections, budget. Knows torch alone."""
