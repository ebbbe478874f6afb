"""Workdirs, processes and signals: nothing of diffusion."""
