"""Measurements of speed and memory: never tests, always ratios within one run, with what they ran on."""
