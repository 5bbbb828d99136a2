"""A run: sensitivities, plan, the layer loop, tuning."""
