"""Code formats: tables, trellis and residual codes, their training and their bytes."""
