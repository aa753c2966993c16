"""What can be adapted: targets, their regions, roles and selectors, and the plan of their ranks."""
