"""Targets of adapters: their regions, roles and selectors, and the plan of their ranks."""
